"""The decode step in Triton that writes the new state over the old one, for states that live at fixed addresses."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.taylor_linear_attention import triton_kernels as tk
from kernels.taylor_linear_attention.reference import TaylorState, num_taylor_features


@torch.library.custom_op(
    "zoology::taylor_linear_attention_step_",
    mutates_args=("kv", "key_sum"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!) key_sum, float scale) -> Tensor",
)
def step_inplace_op(q, k, v, kv, key_sum, scale):
    q, k, v = (x.contiguous() for x in (q, k, v))
    (b, h, f), v_dim = q.shape, v.shape[-1]
    o = torch.empty_like(v)
    # A program owns one head's state, and each element is read before the thread that read it writes it.
    tk._step_kernel[(b * h,)](
        q,
        k,
        v,
        kv,
        key_sum,
        o,
        kv,
        key_sum,
        scale,
        F=f,
        NF=num_taylor_features(f),
        V=v_dim,
        VP=triton.next_power_of_2(v_dim),
        BR=max(1, 4096 // triton.next_power_of_2(v_dim)),
        num_warps=1 if kv.dtype.itemsize == 2 else 2,
    )
    return o


@step_inplace_op.register_fake
def _(q, k, v, kv, key_sum, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def taylor_linear_attention_step_inplace(
    q: Tensor, k: Tensor, v: Tensor, state: TaylorState, *, scale: float
) -> tuple[Tensor, TaylorState]:
    """`taylor_linear_attention_step`, written into the tensors of `state`, which must be contiguous."""
    o = torch.ops.zoology.taylor_linear_attention_step_(q, k, v, state.kv, state.key_sum, scale)
    return o, state
