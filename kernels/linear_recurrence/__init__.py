"""The matrix state with decay that linear attention, retention, GLA, SSD and RWKV-6 share:
S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.linear_recurrence.reference import (
    linear_recurrence_reference,
    linear_recurrence_step_reference,
    naive_linear_recurrence,
)

__all__ = ["linear_recurrence", "linear_recurrence_step", "naive_linear_recurrence"]

BACKENDS = ("auto", "reference", "triton")
MAX_TRITON_WIDTH = 128


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, over a whole sequence.

    Args:
        q, k: [B, T, H, K], bf16, fp16, fp32 or fp64; v: [B, T, H, V] of the same dtype. Scale q outside.
        g: log decay, natural logarithm, at most 0 (not checked: that would read the data): None for no decay,
            [B, T, H] for one per head, [B, T, H, K] for one per key channel. Any floating dtype.
        bonus: [H, K] or None. With it token t reads o_t = (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t (RWKV-5 and 6).
        initial_state: S_0 [B, H, K, V], any floating dtype; zeros when None.
        output_final_state: also return S_T, in the dtype of `initial_state`, or float32 (float64 for float64
            inputs) without one.
        chunk_size: a power of two (None: chosen); the work inside a chunk is quadratic in it.
        backend: "reference" (plain PyTorch), "triton" (a decay, no bonus, no fp64, K up to 128, chunks of its own), or
            "auto": triton where it supports the input in 16 bits, or in float32 where torch may multiply in TF32.

    Returns:
        o [B, T, H, V] in the dtype of v, and the final state or None. Sums are kept in float32 at least.

    Raises:
        ValueError: a shape, dtype, device, chunk size or backend that does not fit.

    Source: retention (arXiv:2307.08621, eq. 6-7), GLA (arXiv:2312.06635, section 4), SSD (arXiv:2405.21060, section 6);
    `reference.py` holds the formulas.
    """
    _check(q, k, v, g, bonus, initial_state, axes="BTH", name="initial_state")
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size is {chunk_size}; allowed: a power of two, or None")
    refusal = triton_refusal(q, v, g, bonus, initial_state, chunk_size)
    triton_support.check_backend(backend, BACKENDS, refusal)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton" or (backend == "auto" and not refusal and triton_support.may_round(q)):
            from kernels.linear_recurrence.triton import linear_recurrence_triton

            o, state = linear_recurrence_triton(q, k, v, g, initial_state=initial_state)
            return o, state if output_final_state else None
        return linear_recurrence_reference(
            q,
            k,
            v,
            g,
            bonus=bonus,
            initial_state=initial_state,
            output_final_state=output_final_state,
            chunk_size=chunk_size,
        )


def triton_refusal(
    q: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
) -> str | None:
    """Why the Triton kernels do not take these arguments of `linear_recurrence`; None if they do."""
    for name, part in (("q", q), ("v", v), ("g", g), ("initial_state", initial_state)):
        if part is not None and (found := triton_support.refusal(name, part)):
            return found
    if g is None:
        return "there is no decay; allowed: g [B, T, H] or [B, T, H, K]"
    if bonus is not None:
        return "there is a bonus; allowed: None"
    if chunk_size is not None:
        return f"chunk_size is {chunk_size}; allowed: None"
    if q.shape[-1] > MAX_TRITON_WIDTH:
        return f"keys have width {q.shape[-1]}; allowed: up to {MAX_TRITON_WIDTH}"
    return None


def linear_recurrence_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, *, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `linear_recurrence`.

    Args:
        q, k: [B, H, K]; v: [B, H, V] of the same dtype; g: None, [B, H] or [B, H, K]; state: [B, H, K, V].
        bonus: [H, K] or None, as in `linear_recurrence`.

    Returns:
        o [B, H, V] in the dtype of v, computed before the state is rounded, and the new state in its own dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    if state is None:
        raise ValueError("state is None; allowed: a tensor [B, H, K, V], zeros for an empty memory")
    _check(q, k, v, g, bonus, state, axes="BH", name="state")
    with torch.autocast(q.device.type, enabled=False):
        return linear_recurrence_step_reference(q, k, v, g, state, bonus=bonus)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    *,
    axes: str,
    name: str,
) -> None:
    rank = len(axes) + 1
    if q.ndim != rank or 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}; allowed: [{', '.join(axes)}, K], every axis at least 1")
    lead, heads, width = tuple(q.shape[:-1]), q.shape[-2], q.shape[-1]
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; allowed: {tuple(q.shape)}, that of q")
    if v.ndim != rank or tuple(v.shape[:-1]) != lead or v.shape[-1] < 1:
        raise ValueError(f"v has shape {tuple(v.shape)}; allowed: {lead} + (V,)")
    if g is not None and tuple(g.shape) not in (lead, tuple(q.shape)):
        raise ValueError(f"g has shape {tuple(g.shape)}; allowed: {lead} or {tuple(q.shape)}, or None")
    if bonus is not None and tuple(bonus.shape) != (heads, width):
        raise ValueError(f"bonus has shape {tuple(bonus.shape)}; allowed: {(heads, width)}, or None")
    wanted = (q.shape[0], heads, width, v.shape[-1])
    if state is not None and tuple(state.shape) != wanted:
        raise ValueError(f"{name} has shape {tuple(state.shape)}; allowed: {wanted}")
    for label, x in (("q", q), ("k", k), ("v", v), ("g", g), ("bonus", bonus), (name, state)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{label} has dtype {x.dtype}; allowed: a floating dtype")
        if label in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{label} has dtype {x.dtype}; allowed: {q.dtype}, that of q")
        if x.device != q.device:
            raise ValueError(f"{label} is on {x.device}; allowed: {q.device}, the device of q")
