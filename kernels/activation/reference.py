"""Activations of a channel mixer in plain PyTorch: the specification of the operation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def activation_reference(x: Tensor, kind: str) -> Tensor:
    """x [B, N] -> [B, N / 2] of "swiglu", [B, N] of "gelu"."""
    if kind == "gelu":
        return F.gelu(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value
