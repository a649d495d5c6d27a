"""Causal second-order Taylor linear attention (Based), normalised, with a packed recurrent state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import triton_support
from kernels.taylor_linear_attention.reference import (
    TaylorState,
    num_taylor_features,
    taylor_linear_attention_reference,
    taylor_linear_attention_step_reference,
)

__all__ = ["TaylorState", "num_taylor_features", "taylor_linear_attention", "taylor_linear_attention_step"]

MAX_TRITON_FEATURE_DIM = 32
LONGEST_QUADRATIC = 512
BACKENDS = ("auto", "reference", "triton")


def taylor_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: TaylorState | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, TaylorState | None]:
    """Causal attention with weights 1 + s + s^2 / 2, s = scale * q.k, normalised by their sum.

    Args:
        q, k: [B, T, H, f], bf16, fp16, fp32 or fp64 (reference only: fp64, f > 32).
        v: [B, T, H, V] of the same dtype.
        scale: positive; f^(-1/2) when None.
        initial_state: memory of the tokens before, kv [B, H, F, V] and key_sum [B, H, F], any floating dtype.
        output_final_state: also return the memory after the last token, in the dtype of `initial_state`, or float32
            (float64 for float64 inputs) without one.
        backend: "reference" (plain PyTorch), "triton", or "auto": triton where it supports the input,
            but the reference for float32 up to 512 tokens, where it is faster.

    Returns:
        o [B, T, H, V] in the dtype of v, and the final state or None. Sums are kept in float32 at least.
        Under autocast q, k and v are first cast to the autocast dtype.

    Raises:
        ValueError: a shape, dtype, device, scale or backend that does not fit.

    Source: Based, arXiv:2402.18668, section 4; the layout of the state is described in `reference.py`.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v, axes="BTH")
    scale = check_scale(scale, q.shape[-1])
    check_state(initial_state, q.shape[0], q.shape[2], q.shape[3], v.shape[3], q.device)
    if choose_backend(backend, q) == "triton":
        from kernels.taylor_linear_attention import triton as impl

        return impl.taylor_linear_attention_triton(
            q, k, v, scale=scale, initial_state=initial_state, output_final_state=output_final_state
        )
    # On a GPU a short sequence is one chunk: features cost more passes over memory there than weights do.
    whole = {"chunk_size": LONGEST_QUADRATIC} if q.device.type == "cuda" and q.shape[1] <= LONGEST_QUADRATIC else {}
    with torch.autocast(q.device.type, enabled=False):
        return taylor_linear_attention_reference(
            q, k, v, scale=scale, initial_state=initial_state, output_final_state=output_final_state, **whole
        )


def taylor_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: TaylorState,
    *,
    scale: float | None = None,
    backend: str = "auto",
    inplace: bool = False,
) -> tuple[Tensor, TaylorState]:
    """One decode step of `taylor_linear_attention`: the token joins the memory, then reads it.

    Args:
        q, k: [B, H, f]; v: [B, H, V] of the same dtype; state: kv [B, H, F, V] and key_sum [B, H, F].
        scale, backend: as in `taylor_linear_attention`. The triton step has no gradient.
        inplace: the triton step may write the new state over the old one, and then returns that one.

    Returns:
        o [B, H, V] in the dtype of v, computed before the state is rounded, and the new state in its own dtype.

    Raises:
        ValueError: a shape, dtype, device, scale or backend that does not fit.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v, axes="BH")
    scale = check_scale(scale, q.shape[-1])
    if state is None:
        raise ValueError("state is None; allowed: a TaylorState, TaylorState.zeros(...) for an empty memory")
    check_state(state, q.shape[0], q.shape[1], q.shape[2], v.shape[2], q.device, name="state")
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *state))
    if backend == "triton" and wants_grad:
        raise ValueError("backend='triton' has no gradient for a decode step; allowed: 'reference', or no_grad")
    if choose_backend("reference" if backend == "auto" and wants_grad else backend, q) == "triton":
        from kernels.taylor_linear_attention import triton as impl

        if inplace and state.kv.is_contiguous() and state.key_sum.is_contiguous():
            return impl.taylor_linear_attention_step_inplace(q, k, v, state, scale=scale)
        return impl.taylor_linear_attention_step_triton(q, k, v, state, scale=scale)
    with torch.autocast(q.device.type, enabled=False):
        return taylor_linear_attention_step_reference(q, k, v, state, scale=scale)


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, as for a matrix product; float64 stays."""
    device_type = tensors[0].device.type
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, axes: str, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """Shapes [*axes, f], [*axes, f] and [*axes, V], one floating dtype, one device."""
    layout = ", ".join(axes)
    rank = len(axes) + 1
    for name, x in zip(names, (q, k, v)):
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {rank} axes [{layout}, width]")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: a floating dtype")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: {q.dtype}, that of {names[0]}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; allowed: {q.device}, the device of {names[0]}")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: every axis at least 1")
    if k.shape != q.shape:
        raise ValueError(f"{names[1]} has shape {tuple(k.shape)}; allowed: {tuple(q.shape)}, that of {names[0]}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"{names[2]} has shape {tuple(v.shape)}; allowed: {tuple(q.shape[:-1])} + (V,), as {names[0]} has"
        )


def check_scale(scale: float | None, feature_dim: int) -> float:
    """The scale to use: f^(-1/2) by default, a positive finite number otherwise."""
    if scale is None:
        return feature_dim**-0.5
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        raise ValueError(f"scale is {scale!r}; allowed: a positive finite number, or None for f^(-1/2)")
    return float(scale)


def check_state(
    state: TaylorState | None,
    batch_size: int,
    num_heads: int,
    feature_dim: int,
    value_dim: int,
    device: torch.device,
    *,
    name: str = "initial_state",
) -> None:
    """kv [B, H, F, V] and key_sum [B, H, F], floating, of one dtype, on the device of q."""
    if state is None:
        return
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(f"{name} is a {type(state).__name__}; allowed: a TaylorState(kv, key_sum)")
    num = num_taylor_features(feature_dim)
    kv, key_sum = state
    wanted = {"kv": (batch_size, num_heads, num, value_dim), "key_sum": (batch_size, num_heads, num)}
    for field, x in (("kv", kv), ("key_sum", key_sum)):
        if tuple(x.shape) != wanted[field]:
            raise ValueError(f"{name}.{field} has shape {tuple(x.shape)}; allowed: {wanted[field]}")
        if not x.is_floating_point() or x.dtype != kv.dtype:
            raise ValueError(f"{name}.{field} has dtype {x.dtype}; allowed: one floating dtype for kv and key_sum")
        if x.device != device:
            raise ValueError(f"{name}.{field} is on {x.device}; allowed: {device}, the device of q")


def choose_backend(backend: str, q: Tensor) -> str:
    """The backend that runs: a named one or an error with the reason; `auto` takes triton where it can."""
    refusal = triton_refusal(q)
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend != "auto":
        return backend
    # Measured: in fp32 the quadratic form of a short sequence is the faster one, forward and backward together.
    short = q.dtype == torch.float32 and q.dim() == 4 and q.shape[1] <= LONGEST_QUADRATIC
    return "reference" if refusal or short else "triton"


def triton_refusal(q: Tensor) -> str | None:
    """Why the Triton kernels do not take q [B, T, H, f], or [B, H, f] for a step; None if they do."""
    if found := triton_support.refusal("q", q):
        return found
    if q.shape[-1] > MAX_TRITON_FEATURE_DIM:
        return f"the feature dimension is {q.shape[-1]}; allowed: up to {MAX_TRITON_FEATURE_DIM}"
    return None
