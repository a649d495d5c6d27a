"""A new token for a cache of keys and values in plain PyTorch: the specification of the operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cache_update_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, turned: int, base: float
) -> Tensor:
    """Write k and v [B, H, K] into slot position mod S of keys and values [B, S, H, K'] -> q [B, H, K'].

    The first `turned` entries of q and k are turned by their angles at `position`, those beyond K are zero.
    """
    if turned:
        exact = torch.promote_types(q.dtype, torch.float32)
        angles = position * frequencies(turned, base, q.device)
        cos, sin = angles.cos().to(exact), angles.sin().to(exact)
        q, k = (_turn(x, cos, sin).to(x.dtype) for x in (q, k))
    slot = (position % keys.shape[1]).reshape(1)
    q, k, v = (F.pad(x, (0, keys.shape[-1] - x.shape[-1])) for x in (q, k, v))
    keys.index_copy_(1, slot, k[:, None])
    values.index_copy_(1, slot, v[:, None])
    return q


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second, rest = x.split([len(cos), len(cos), x.shape[-1] - 2 * len(cos)], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def frequencies(turned: int, base: float, device: torch.device) -> Tensor:
    """base^(-2 i / turned), i < turned / 2, in float64: angles of late positions need its digits."""
    return base ** (-torch.arange(0, turned, 2, device=device, dtype=torch.float64) / turned)
