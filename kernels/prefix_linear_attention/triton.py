"""Prefix linear attention in Triton: the causal kernels start from the sum over the prefix instead of from nothing."""

from __future__ import annotations

from torch import Tensor

from kernels.taylor_linear_attention.reference import TaylorState
from kernels.taylor_linear_attention.triton import Prefix, taylor_linear_attention_triton


def prefix_linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, prefix_mask: Tensor | None, **options
) -> tuple[Tensor, TaylorState | None]:
    return taylor_linear_attention_triton(q, k, v, prefix=Prefix(prefix_k, prefix_v, prefix_mask), **options)
