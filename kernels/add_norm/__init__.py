"""What a residual block begins with: the pending additions to the residual stream, and the norm of the sum."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.add_norm.reference import add_norm_reference

__all__ = ["add_norm"]

BACKENDS = ("auto", "reference", "triton")
MAX_WIDTH = 16384


def add_norm(
    x: Tensor,
    parts: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """s = x + sum of parts + bias, and s / sqrt(mean(s^2) + eps) * weight, for the few rows of a decode step.

    Args:
        x: [B, D]; parts: [S, B, D], S >= 1, of the dtype of x or float32.
        weight: [D] of the norm; bias: [D] or None.
        eps: as for `torch.nn.RMSNorm`: the precision of the dtype that sums are made in when None.
        backend: "reference" (plain PyTorch), "triton" (no gradient), or "auto": triton where it supports the input.

    Returns:
        s [B, D] and its norm [B, D] in the dtype of x; both sums are in float32 at least, s is rounded once.

    Raises:
        ValueError: a shape or backend that does not fit.

    Source: Zhang and Sennrich, arXiv:1910.07467, eq. 4.
    """
    if x.dim() != 2 or parts.dim() != 3 or parts.shape[1:] != x.shape or parts.shape[0] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)} and parts {tuple(parts.shape)}; allowed: [B, D] and [S, B, D]")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; allowed: ({x.shape[1]},)")
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
    given = [part for part in (x, parts, weight, bias) if part is not None]
    refusal = _refusal(given)
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend == "reference" or refusal:
        return add_norm_reference(x, parts, weight, bias, eps)
    from kernels.add_norm import triton as impl

    return impl.add_norm_triton(x, parts, weight, bias, eps)


def _refusal(tensors: list[Tensor]) -> str | None:
    """Why the Triton kernel does not take x, ...; None if it does."""
    x = tensors[0]
    if found := triton_support.refusal("x", x):
        return found
    if x.shape[1] > MAX_WIDTH:
        return f"the width is {x.shape[1]}; allowed: up to {MAX_WIDTH}"
    return triton_support.gradient_refusal(tensors)
