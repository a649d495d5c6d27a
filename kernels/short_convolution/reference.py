"""Causal depthwise convolution over a few tokens in plain PyTorch: the specification of the operation.

y_t = b + sum_{j < W} w_j * x_{t-j},   x_t = 0 for t < 0
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def short_convolution_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, T, D], weight [D, W], bias [D] -> [B, T, D]."""
    length, taps = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = padded[:, taps - 1 :] * weight[:, 0]
    for lag in range(1, taps):
        start = taps - 1 - lag
        y = y + padded[:, start : start + length] * weight[:, lag]
    return y if bias is None else y + bias
