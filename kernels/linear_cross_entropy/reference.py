"""Plain PyTorch: all logits at once, which is the specification, and a few rows of them at a time.

Axes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

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


def softmax_gradient(logits: Tensor, targets: Tensor, share: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Losses [N] in float32 at least, and (softmax - onehot) * share [N, V] in the dtype of the logits.

    Rows that do not count have zeros in both.
    """
    acc = torch.promote_types(logits.dtype, torch.float32)
    counted = targets != ignore_index
    at = targets.long().masked_fill(~counted, 0)[:, None]
    log_p = torch.log_softmax(logits, 1, dtype=acc)
    losses = -log_p.gather(1, at)[:, 0].masked_fill(~counted, 0)
    grad = log_p.exp_()
    grad.scatter_add_(1, at, grad.new_full((1, 1), -1.0).expand_as(at))
    return losses, (grad * (counted * share)[:, None]).to(logits.dtype)


def linear_cross_entropy_chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_dtype: torch.dtype,
    *,
    ignore_index: int,
    chunk_size: int | None = None,
    gradient: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]] = softmax_gradient,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dhidden [N, D] in the dtype of `hidden`, dweight [V, D] in `weight_dtype`.

    A chunk's logits become its share of the gradient by `gradient`, and are gone before the next chunk.
    """
    acc = torch.promote_types(hidden.dtype, torch.float32)
    chunk_size = chunk_size or max(1, CHUNK_BYTES // (weight.shape[0] * hidden.element_size()))
    share = (targets != ignore_index).sum().to(acc).reciprocal()
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros(weight.shape, dtype=acc, device=weight.device)
    losses = []
    for start in range(0, hidden.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        h = hidden[rows]
        loss, grad = gradient(h @ weight.T, targets[rows], share, ignore_index)
        losses.append(loss.sum())
        torch.mm(grad, weight, out=dhidden[rows])
        if hidden.dtype == acc:
            dweight.addmm_(grad.T, h)
        else:
            dweight += (grad.T @ h).to(acc)
    return torch.stack(losses).sum() * share, dhidden, dweight.to(weight_dtype)


def linear_argmax_chunked(hidden: Tensor, weight: Tensor, *, chunk_size: int) -> Tensor:
    """The index of each row's largest logit, the first of equal ones."""
    return torch.cat([(part @ weight.T).argmax(-1) for part in hidden.split(chunk_size)])
