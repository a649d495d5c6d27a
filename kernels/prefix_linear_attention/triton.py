"""Prefix linear attention in Triton: one pass sums the prefix, the causal kernel starts from that sum."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels.taylor_linear_attention.triton  # noqa: F401  registers the operators
from kernels.taylor_linear_attention.reference import TaylorState


def prefix_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_mask: Tensor | None,
    scale: float,
    initial_state: TaylorState | None,
    output_final_state: bool,
) -> tuple[Tensor, TaylorState | None]:
    initial = (None, None) if initial_state is None else initial_state
    prefix = torch.ops.zoology.taylor_state(prefix_k, prefix_v, prefix_mask, *initial, scale)
    o, _, kv, key_sum = torch.ops.zoology.taylor_linear_attention(q, k, v, *prefix, scale, output_final_state)
    if not output_final_state:
        return o, None
    dtype = torch.float32 if initial_state is None else initial_state[0].dtype
    return o, TaylorState(kv.to(dtype), key_sum.to(dtype))
