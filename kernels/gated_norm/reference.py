"""The gated norm in plain PyTorch: the specification of the operation.

o = h / sqrt(mean(h^2) + eps) * w,   h = (y + d x) * silu(z)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gated_norm_reference(
    y: Tensor, gate: Tensor, weight: Tensor, x: Tensor | None, skip: Tensor | None, num_groups: int, eps: float
) -> Tensor:
    """y gate x [..., D], weight skip [D] -> [..., D] in the dtype of y."""
    h = (y if x is None else y + skip.to(x.dtype) * x) * F.silu(gate)
    grouped = h.unflatten(-1, (num_groups, -1))
    return (F.rms_norm(grouped, grouped.shape[-1:], eps=eps).flatten(-2) * weight.to(h.dtype)).to(y.dtype)
