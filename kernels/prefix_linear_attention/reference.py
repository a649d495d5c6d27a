"""Prefix linear attention in plain PyTorch: Taylor linear attention that starts from the memory of the prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.taylor_linear_attention.reference import (
    TaylorState,
    accumulation_dtype,
    taylor_linear_attention_reference,
    taylor_state_reference,
)


def prefix_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_mask: Tensor | None,
    scale: float,
    initial_state: TaylorState | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, TaylorState | None]:
    """The prefix is summed without order, then the sequence runs causally on top of that sum."""
    acc = accumulation_dtype(q.dtype, initial_state)
    state_dtype = acc if initial_state is None else initial_state.kv.dtype
    prefix_state = taylor_state_reference(
        prefix_k.to(acc).transpose(1, 2),
        prefix_v.to(acc).transpose(1, 2),
        scale=scale,
        mask=prefix_mask,
        initial_state=None if initial_state is None else TaylorState(*(x.to(acc) for x in initial_state)),
    )
    o, state = taylor_linear_attention_reference(
        q, k, v, scale=scale, initial_state=prefix_state, output_final_state=output_final_state
    )
    return o, None if state is None else TaylorState(*(x.to(state_dtype) for x in state))


def prefix_linear_attention_quadratic(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, prefix_mask: Tensor | None, scale: float
) -> Tensor:
    """The same without a state: every weight 1 + s + s^2 / 2 written out, T (T + M) of them per head.

    For short sequences, where features cost more passes over memory than weights do. A weight is at least 1/2 here in
    any precision; a product of rounded features is not.
    """
    acc = accumulation_dtype(q.dtype, None)
    out_dtype = v.dtype
    q, k, v, prefix_k, prefix_v = (x.to(acc).transpose(1, 2) for x in (q, k, v, prefix_k, prefix_v))

    def weights(keys: Tensor) -> Tensor:
        s = (q * scale) @ keys.transpose(-1, -2)
        return 1 + s * (1 + 0.5 * s)

    own, ahead = weights(k).tril(), weights(prefix_k)
    if prefix_mask is not None:
        # `where` and not a product: what stands at a masked position may be anything, NaN too.
        ahead = torch.where(prefix_mask[:, None, None], ahead, 0.0)
        prefix_v = torch.where(prefix_mask[:, None, :, None], prefix_v, 0.0)
    total = own.sum(-1, keepdim=True) + ahead.sum(-1, keepdim=True)
    return ((own @ v + ahead @ prefix_v) / total).transpose(1, 2).to(out_dtype)
