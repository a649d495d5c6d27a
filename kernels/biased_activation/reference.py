"""Bias and activation in plain PyTorch: the specification of the operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def biased_activation_reference(parts: Tensor, bias: Tensor, activation: str) -> Tensor:
    """parts [S, B, N], bias [N] -> [B, N], or [B, N / 2] of a gated activation, in the wider dtype until the end."""
    hidden = parts.sum(0, dtype=torch.promote_types(parts.dtype, torch.float32)) + bias
    if activation == "gelu":
        return F.gelu(hidden).to(parts.dtype)
    gate, value = hidden.chunk(2, dim=-1)
    return (F.silu(gate) * value).to(parts.dtype)
