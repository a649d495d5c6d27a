"""The selective scan of Mamba: a diagonal state with a decay per entry and token."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.selective_scan.reference import (
    naive_selective_scan,
    selective_scan_reference,
    selective_scan_step_reference,
    step_sizes,
)

__all__ = ["naive_selective_scan", "selective_scan", "selective_scan_step"]

BACKENDS = ("auto", "reference", "triton")
MAX_WIDTH = 64


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T and y_t = h_t C_t, over a whole sequence.

    Args:
        x: [B, T, D], bf16, fp16, fp32 or fp64; dt: [B, T, D], step sizes, at least 0; A: [D, N], at most 0 (neither is
            checked: that would read the data); B, C: [B, T, N]. Any floating dtypes.
        dt_bias: [D], any floating dtype; with one the step sizes are softplus(dt + dt_bias), in float32 at least.
        skip: [D], any floating dtype; with one y_t = h_t C_t + skip * x_t.
        initial_state: h_0 [B, D, N], any floating dtype; zeros when None.
        backend: "reference" (plain PyTorch), "triton" (no float64, N up to 64; states in float32), or "auto": triton
            where it supports the input.

    Returns:
        y [B, T, D] in the dtype of x, and the state after the last token [B, D, N], in the dtype of `initial_state`, or
        float32 (float64 for float64 x) without one. Sums are kept in float32 at least. One derivative, not two.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit.

    Source: Mamba, arXiv:2312.00752, eq. 2 and algorithm 2; `reference.py` holds the formulas.
    """
    _check(x, dt, A, B, C, initial_state, axes="BT", name="initial_state", dt_bias=dt_bias, skip=skip)
    refusal = triton_refusal(x, dt, A, B, C, initial_state, dt_bias, skip)
    triton_support.check_backend(backend, BACKENDS, refusal)
    with torch.autocast(x.device.type, enabled=False):
        if backend != "reference" and not refusal:
            from kernels.selective_scan.triton import selective_scan_triton

            return selective_scan_triton(x, dt, A, B, C, dt_bias=dt_bias, skip=skip, initial_state=initial_state)
        return selective_scan_reference(x, step_sizes(dt, dt_bias), A, B, C, skip=skip, initial_state=initial_state)


def triton_refusal(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    dt_bias: Tensor | None = None,
    skip: Tensor | None = None,
) -> str | None:
    """Why the Triton kernels do not take these arguments of `selective_scan`; None if they do."""
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "initial_state": initial_state}
    given |= {"dt_bias": dt_bias, "skip": skip}
    for name, part in given.items():
        if part is not None and (found := triton_support.refusal(name, part)):
            return found
    if A.shape[1] > MAX_WIDTH:
        return f"states have width {A.shape[1]}; allowed: up to {MAX_WIDTH}"
    return None


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    dt_bias: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`: x dt [B, D], A [D, N], B C [B, N], state [B, D, N] -> y [B, D], state.

    With `dt_bias` [D] and `skip` [D] as there. y is computed before the state is rounded to its own dtype. Raises
    ValueError as `selective_scan` does.
    """
    if state is None:
        raise ValueError("state is None; allowed: a tensor [B, D, N], zeros for an empty memory")
    _check(x, dt, A, B, C, state, axes="B", name="state", dt_bias=dt_bias, skip=skip)
    with torch.autocast(x.device.type, enabled=False):
        return selective_scan_step_reference(x, step_sizes(dt, dt_bias), A, B, C, state, skip=skip)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    *,
    axes: str,
    name: str,
    dt_bias: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    if x.ndim != len(axes) + 1 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [{', '.join(axes)}, D], every axis at least 1")
    if A.ndim != 2 or A.shape[0] != x.shape[-1] or A.shape[1] < 1:
        raise ValueError(f"A has shape {tuple(A.shape)}; allowed: ({x.shape[-1]}, N >= 1)")
    wanted = {"dt": tuple(x.shape), "B": (*x.shape[:-1], A.shape[1]), "C": (*x.shape[:-1], A.shape[1])}
    wanted |= {name: (x.shape[0], *A.shape), "dt_bias": (x.shape[-1],), "skip": (x.shape[-1],)}
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, name: state, "dt_bias": dt_bias, "skip": skip}
    for label, part in given.items():
        if part is None:
            continue
        if label in wanted and tuple(part.shape) != wanted[label]:
            raise ValueError(f"{label} has shape {tuple(part.shape)}; allowed: {wanted[label]}")
        if not part.is_floating_point():
            raise ValueError(f"{label} has dtype {part.dtype}; allowed: a floating dtype")
        if part.device != x.device:
            raise ValueError(f"{label} is on {part.device}; allowed: {x.device}, the device of x")
