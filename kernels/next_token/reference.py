"""The next token in plain PyTorch: the specification of the operation."""

from __future__ import annotations

from torch import Tensor


def next_token_reference(scores: Tensor, token: Tensor, made: Tensor, count: Tensor) -> None:
    """scores [B, V] -> token [B], and the same as row count [1] of made [T, B]."""
    token.copy_(scores.argmax(-1))
    made.index_copy_(0, count, token[None])
