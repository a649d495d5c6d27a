"""Addition and root-mean-square norm in plain PyTorch: the specification of the operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_norm_reference(
    x: Tensor, parts: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x [B, D], parts [S, B, D] -> x + sum of parts + bias, added in the wider dtype and rounded once, and its norm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + (parts[0] if parts.shape[0] == 1 else parts.sum(0, dtype=wide))
    if bias is not None:
        total = total + bias.to(wide)
    total = total.to(x.dtype)
    return total, F.rms_norm(total, (x.shape[1],), weight, eps)
