"""Prefix linear attention in plain PyTorch: Taylor linear attention that starts from the memory of the prefix."""

from __future__ import annotations

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
