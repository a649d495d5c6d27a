"""What a decode step ends with: the token of the largest score, noted down."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.next_token.reference import next_token_reference

__all__ = ["next_token"]

BACKENDS = ("auto", "reference", "triton")


def next_token(scores: Tensor, token: Tensor, made: Tensor, count: Tensor, *, backend: str = "auto") -> None:
    """The index of the largest score of each row, the first of several, into `token` and row `count` of `made`.

    Args:
        scores: [B, V], finite; token: [B], int64, written to; made: [T, B], int64, one row of it is written to.
        count: [1], int64, below T.
        backend: "reference" (plain PyTorch), "triton", or "auto": triton where it supports the input.

    Raises:
        ValueError: a shape, dtype or backend that does not fit.
    """
    b = scores.shape[0]
    if scores.dim() != 2 or token.shape != (b,) or made.dim() != 2 or made.shape[1] != b or count.shape != (1,):
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, token {tuple(token.shape)}, made {tuple(made.shape)} and count "
            f"{tuple(count.shape)}; allowed: [B, V], [B], [T, B] and [1]"
        )
    for name, integers in (("token", token), ("made", made), ("count", count)):
        if integers.dtype != torch.int64:
            raise ValueError(f"{name} has dtype {integers.dtype}; allowed: torch.int64")
    refusal = triton_support.refusal("scores", scores) or triton_support.gradient_refusal([scores])
    if refusal is None and not (token.is_contiguous() and made.is_contiguous()):
        refusal = "token or made is not contiguous"
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend == "reference" or refusal:
        next_token_reference(scores, token, made, count)
        return
    from kernels.next_token import triton as impl

    impl.next_token_triton(scores, token, made, count)
