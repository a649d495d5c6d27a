"""Plain PyTorch: all logits at once, which is the specification, and a few rows of them at a time.

Axes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 32 << 20
"""Logits of one chunk: few enough that a GPU's last-level cache holds them between the products."""


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    """The mean of logsumexp(W h) - (W h)[target] over rows whose target is not `ignore_index`."""
    logits = F.linear(hidden, weight.to(hidden.dtype))
    acc = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(acc), targets.long(), ignore_index=ignore_index)


def linear_cross_entropy_chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_dtype: torch.dtype,
    *,
    ignore_index: int,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dhidden [N, D] in the dtype of `hidden`, dweight [V, D] in `weight_dtype`.

    A chunk's logits become its share of the gradient in place, and are gone before the next chunk.
    """
    acc = torch.promote_types(hidden.dtype, torch.float32)
    chunk_size = chunk_size or max(1, CHUNK_BYTES // (weight.shape[0] * hidden.element_size()))
    counted = targets != ignore_index
    share = counted.sum().to(acc).reciprocal()
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros(weight.shape, dtype=acc, device=weight.device)
    loss = torch.zeros((), dtype=acc, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        h, kept = hidden[rows], counted[rows]
        at = targets[rows].long().masked_fill(~kept, 0)[:, None]
        log_p = torch.log_softmax(h @ weight.T, 1, dtype=acc)
        loss -= log_p.gather(1, at)[:, 0].masked_fill(~kept, 0).sum()
        grad = log_p.exp_()
        grad.scatter_add_(1, at, grad.new_full((1, 1), -1.0).expand_as(at))
        grad = (grad * (kept * share)[:, None]).to(hidden.dtype)
        torch.mm(grad, weight, out=dhidden[rows])
        dweight += grad.T @ h if hidden.dtype == acc else (grad.T @ h).to(acc)
    return loss * share, dhidden, dweight.to(weight_dtype)


def linear_argmax_chunked(hidden: Tensor, weight: Tensor, *, chunk_size: int) -> Tensor:
    """The index of each row's largest logit, the first of equal ones."""
    return torch.cat([(part @ weight.T).argmax(-1) for part in hidden.split(chunk_size)])
