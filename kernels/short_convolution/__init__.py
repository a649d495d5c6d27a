"""Causal depthwise convolution over a few tokens of a whole sequence, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.short_convolution.reference import short_convolution_reference

__all__ = ["short_convolution"]

BACKENDS = ("auto", "reference", "triton")
MAX_TAPS = 16


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = b + sum_{j < W} w_j * x_{t-j}, channel by channel.

    Args:
        x: [B, T, D], bf16, fp16, fp32 or fp64; weight: [D, W], the current token's entry first; bias: [D] or None; of
            one dtype, which the output has too.
        initial_state: the W - 1 tokens before x, [B, W - 1, D], oldest first; zeros when None.
        backend: "reference" (plain PyTorch), "triton" (not fp64, W up to 16; sums in float32), or "auto": triton
            where it supports the input.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit.
    """
    _check(x, weight, bias, initial_state)
    refusal = triton_refusal(x, weight)
    triton_support.check_backend(backend, BACKENDS, refusal)
    run = short_convolution_reference
    if backend != "reference" and not refusal:
        from kernels.short_convolution.triton import short_convolution_triton as run
    taps = weight.shape[1]
    if initial_state is None or taps == 1:
        return run(x, weight, bias)
    return run(torch.cat([initial_state.to(x.dtype), x], dim=1), weight, bias)[:, taps - 1 :]


def triton_refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why the Triton kernels do not take x [B, T, D] and weight [D, W]; None if they do."""
    if found := triton_support.refusal("x", x):
        return found
    if weight.shape[1] > MAX_TAPS:
        return f"weight has {weight.shape[1]} columns; allowed: up to {MAX_TAPS}"
    return None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> None:
    if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; allowed: floating [B, T, D], every axis at least 1"
        )
    b, _, d = x.shape
    if weight.ndim != 2 or weight.shape[0] != d or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; allowed: ({d}, W >= 1)")
    if bias is not None and tuple(bias.shape) != (d,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed: ({d},)")
    wanted = (b, weight.shape[1] - 1, d)
    if initial_state is not None and tuple(initial_state.shape) != wanted:
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}; allowed: {wanted}")
    for name, part in (("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        if part is None:
            continue
        if part.device != x.device:
            raise ValueError(f"{name} is on {part.device}; allowed: {x.device}, the device of x")
        if name != "initial_state" and part.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {part.dtype}; allowed: {x.dtype}, that of x")
