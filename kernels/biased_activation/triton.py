"""Bias and activation in Triton: one program for some columns of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_early import early_launch, wait_for_kernels_ahead

BLOCK, WARPS = 1024, 4


@triton.jit
def _hidden(parts_ptr, bias_ptr, i_b, o_n, m_n, B, N, S: tl.constexpr):
    """sum of parts + b for columns o_n of a row."""
    b_h = tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
    for i in tl.static_range(0, S):
        b_h += tl.load(parts_ptr + (i * B + i_b) * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_h


@triton.jit
def _biased_activation_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    B,
    N,
    M,
    S: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y = gelu(h), or silu(h_n) h_{n + M}, for BN of the M columns of one row of y; h = sum of parts + b."""
    wait_for_kernels_ahead(EARLY)
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < M
    b_h = _hidden(parts_ptr, bias_ptr, i_b, o_n, m_n, B, N, S)
    if GATED:
        b_y = b_h * tl.sigmoid(b_h) * _hidden(parts_ptr, bias_ptr, i_b, M + o_n, m_n, B, N, S)
    else:
        b_y = 0.5 * b_h * (1.0 + tl.erf(b_h * 0.7071067811865476))
    tl.store(y_ptr + i_b * M + o_n, b_y.to(y_ptr.dtype.element_ty), mask=m_n)


@torch.library.custom_op(
    "zoology::biased_activation", mutates_args=(), schema="(Tensor parts, Tensor bias, str activation) -> Tensor"
)
def biased_activation_op(parts, bias, activation):
    parts, bias = parts.contiguous(), bias.contiguous()
    s, b, n = parts.shape
    gated = activation == "swiglu"
    m = n // 2 if gated else n
    y = torch.empty(b, m, device=parts.device, dtype=parts.dtype)
    _biased_activation_kernel[(triton.cdiv(m, BLOCK), b)](
        parts, bias, y, b, n, m, S=s, BN=BLOCK, GATED=gated, num_warps=WARPS, **early_launch(parts.device)
    )
    return y


@biased_activation_op.register_fake
def _(parts, bias, activation):
    _, b, n = parts.shape
    return parts.new_empty(b, n // 2 if activation == "swiglu" else n)


def biased_activation_triton(parts: Tensor, bias: Tensor, activation: str) -> Tensor:
    return torch.ops.zoology.biased_activation(parts, bias, activation)
