"""One token of a short depthwise causal convolution in plain PyTorch: the specification of the operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def convolution_step_reference(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    x_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x gate [B, D], tail [B, W - 1, D] oldest first, weight [D, W] -> y [B, D], the tail one token later."""
    x = x if x_bias is None else (x + x_bias).to(x.dtype)
    gate = gate if gate_bias is None else gate + gate_bias
    window = torch.cat([tail.to(x.dtype), x.unsqueeze(1)], dim=1)
    # The weight's first entry is that of the current token.
    y = (window * weight.flip(-1).T).sum(1)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    return (y if gate is None else y * gate), window[:, 1:].to(tail.dtype)
