"""The gated norm of Mamba-2's blocks: a skip, a gate and a root-mean-square norm in one pass, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.gated_norm.reference import gated_norm_reference

__all__ = ["gated_norm"]

BACKENDS = ("auto", "reference", "triton")
MAX_WIDTH = 16384


def gated_norm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    x: Tensor | None = None,
    skip: Tensor | None = None,
    num_groups: int = 1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """h / sqrt(mean(h^2) + eps) * weight, for h = (y + skip * x) * silu(gate) and the mean of a group of channels.

    Args:
        y, gate: [..., D]; weight: [D]; x [..., D] and skip [D] come together: h = y * silu(gate) without them. Any
            floating dtypes.
        num_groups: the channels are divided in this many groups of neighbours, each with a mean of its own.
        eps: at least 0.
        backend: "reference" (plain PyTorch, which rounds every step), "triton" (no fp64, groups of up to 16,384
            channels; computes in float32 and rounds once), or "auto": triton where it supports the input.

    Returns:
        [..., D] in the dtype of y. One derivative, not two.

    Raises:
        ValueError: a shape, dtype, device, number or backend that does not fit.

    Source: Mamba-2, arXiv:2405.21060, section 7.1; Zhang and Sennrich, arXiv:1910.07467, eq. 4.
    """
    _check(y, gate, weight, x, skip, num_groups, eps)
    refusal = triton_refusal(y, gate, weight, x, skip, num_groups)
    triton_support.check_backend(backend, BACKENDS, refusal)
    run = gated_norm_reference
    if backend != "reference" and not refusal:
        from kernels.gated_norm.triton import gated_norm_triton as run
    with torch.autocast(y.device.type, enabled=False):
        return run(y, gate, weight, x, skip, num_groups, eps)


def triton_refusal(
    y: Tensor, gate: Tensor, weight: Tensor, x: Tensor | None, skip: Tensor | None, num_groups: int
) -> str | None:
    """Why the Triton kernels do not take these arguments of `gated_norm`; None if they do."""
    for name, part in {"y": y, "gate": gate, "weight": weight, "x": x, "skip": skip}.items():
        if part is not None and (found := triton_support.refusal(name, part)):
            return found
    if y.shape[-1] // num_groups > MAX_WIDTH:
        return f"groups have {y.shape[-1] // num_groups} channels; allowed: up to {MAX_WIDTH}"
    return None


def _check(
    y: Tensor, gate: Tensor, weight: Tensor, x: Tensor | None, skip: Tensor | None, num_groups: int, eps: float
) -> None:
    if y.ndim < 1 or 0 in y.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}; allowed: [..., D], every axis at least 1")
    d = y.shape[-1]
    if num_groups < 1 or d % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the width of y, {d}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps} is not a finite number >= 0")
    if (x is None) != (skip is None):
        raise ValueError(f"{'x' if x is None else 'skip'} is None; allowed: x and skip together, or neither")
    shapes = {"y": y.shape, "gate": y.shape, "x": y.shape, "weight": (d,), "skip": (d,)}
    for name, part in {"y": y, "gate": gate, "x": x, "weight": weight, "skip": skip}.items():
        if part is None:
            continue
        if part.shape != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(part.shape)}; allowed: {tuple(shapes[name])}")
        if not part.is_floating_point():
            raise ValueError(f"{name} has dtype {part.dtype}; allowed: a floating dtype")
        if part.device != y.device:
            raise ValueError(f"{name} is on {part.device}; allowed: {y.device}, the device of y")
