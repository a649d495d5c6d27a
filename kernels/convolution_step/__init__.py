"""The decode step of a short convolution: convolution, activation, gate and the shift of its memory at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.convolution_step.reference import convolution_step_reference

__all__ = ["convolution_step", "triton_refusal"]

BACKENDS = ("auto", "reference", "triton")


def convolution_step(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    x_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y = act(sum_j w_j x_{t-j} + b) * gate for the newest token, j < W, and the memory one token later.

    Args:
        x: [B, D]; gate: [B, D] or None (1).
        x_bias, gate_bias: [D] or None, added to x, which is rounded then, and to the gate: of the layer they come from.
        tail: [B, W - 1, D], the inputs before, oldest first.
        weight: [D, W], the current token's entry first; bias: [D] or None.
        activation: None or "silu".
        backend: "reference" (plain PyTorch), "triton" (no gradient, writes the new memory over the old one), or "auto".

    Returns:
        y [B, D] in the dtype of x, summed in float32 by triton, and the tail.

    Raises:
        ValueError: a shape, activation or backend that does not fit.
    """
    b, d = x.shape if x.dim() == 2 else (-1, -1)
    if weight.dim() != 2 or weight.shape[0] != d or tuple(tail.shape) != (b, weight.shape[1] - 1, d):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, tail {tuple(tail.shape)} and weight {tuple(weight.shape)}; "
            "allowed: [B, D], [B, W - 1, D] and [D, W]"
        )
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}; allowed: {tuple(x.shape)}, that of x")
    for name, vector, allowed in (("x_bias", x_bias, True), ("gate_bias", gate_bias, gate is not None)):
        if vector is not None and (vector.shape != (d,) or not allowed):
            where = f"({d},)" if allowed else "None without a gate"
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; allowed: {where}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; allowed: None, 'silu'")
    given = [part for part in (x, tail, weight, bias, gate, x_bias, gate_bias) if part is not None]
    refusal = triton_refusal(given)
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend == "reference" or refusal:
        return convolution_step_reference(x, tail, weight, bias, activation, gate, x_bias, gate_bias)
    from kernels.convolution_step import triton as impl

    return impl.convolution_step_triton(x, tail, weight, bias, activation, gate, x_bias, gate_bias), tail


def triton_refusal(tensors: list[Tensor]) -> str | None:
    """Why the Triton kernel does not take x, tail, ...; None if it does."""
    x, tail = tensors[:2]
    if found := triton_support.refusal("x", x):
        return found
    if any(part.dtype not in (torch.bfloat16, torch.float16, torch.float32) for part in tensors):
        return "the dtypes are not among bfloat16, float16, float32"
    if tail.dtype != x.dtype or not tail.is_contiguous():
        return "the tail is not contiguous, or not of the dtype of x"
    return triton_support.gradient_refusal(tensors)
