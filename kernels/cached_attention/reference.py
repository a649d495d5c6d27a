"""Attention of one token over a cache in plain PyTorch: the specification of the operation."""

from __future__ import annotations

import torch
from torch import Tensor


def cached_attention_reference(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, *, scale: float) -> Tensor:
    """q [B, H, K], keys values [B, S, H, K] -> softmax over the first min(position + 1, S) slots, in float32 at least.

    What stands in the other slots may be anything.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    used = torch.arange(keys.shape[1], device=q.device) <= position
    scores = torch.einsum("bhk,bshk->bhs", q.to(exact), keys.to(exact)) * scale
    weights = torch.softmax(scores.masked_fill(~used, float("-inf")), dim=-1)
    seen = torch.where(used[:, None, None], values.to(exact), 0.0)
    return torch.einsum("bhs,bshk->bhk", weights, seen).to(values.dtype)
