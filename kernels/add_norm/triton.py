"""Pending additions and their norm in Triton: one program a row, which is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_norm_kernel(
    x_ptr,
    parts_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    eps,
    B,
    D,
    S: tl.constexpr,
    DP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """s = x + sum of parts + b, y = s / sqrt(mean(s^2) + eps) * w for one row."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    b_s = tl.load(x_ptr + i_b * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i in tl.static_range(0, S):
        b_s += tl.load(parts_ptr + (i * B + i_b) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_s += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_s = b_s.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + i_b * D + o_d, b_s, mask=m_d)
    b_s = b_s.to(tl.float32)
    b_y = b_s * tl.rsqrt(tl.sum(b_s * b_s, 0) / D + eps) * b_w
    tl.store(y_ptr + i_b * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


@torch.library.custom_op(
    "zoology::add_norm",
    mutates_args=(),
    schema=("(Tensor x, Tensor parts, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)"),
)
def add_norm_op(x, parts, weight, bias, eps):
    x, parts = x.contiguous(), parts.contiguous()
    (b, d), padded = x.shape, triton.next_power_of_2(x.shape[1])
    warps = min(8, max(1, padded // 256))
    total, y = torch.empty_like(x), torch.empty_like(x)
    _add_norm_kernel[(b,)](
        x,
        parts,
        weight,
        x if bias is None else bias,
        total,
        y,
        eps,
        b,
        d,
        S=parts.shape[0],
        DP=padded,
        HAS_BIAS=bias is not None,
        num_warps=warps,
    )
    return total, y


@add_norm_op.register_fake
def _(x, parts, weight, bias, eps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in "sy")


def add_norm_triton(x: Tensor, parts: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ops.zoology.add_norm(x, parts, weight, bias, eps)
