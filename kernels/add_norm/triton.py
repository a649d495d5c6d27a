"""Pending additions and their norm in Triton: one program a row, which is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fetch_ahead import PROGRAMS, divided, fetch_ahead, fetched


@triton.jit
def _add_norm_kernel(
    x_ptr,
    parts_ptr,
    weight_ptr,
    bias_ptr,
    ahead_ptr,
    sum_ptr,
    y_ptr,
    eps,
    B,
    D,
    ahead_size,
    ahead_bytes,
    S: tl.constexpr,
    DP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
):
    """s = x + sum of parts + b, y = s / sqrt(mean(s^2) + eps) * w for one row; programs beyond the rows only ask."""
    i_b = tl.program_id(0).to(tl.int64)
    if AHEAD:
        fetch_ahead(ahead_ptr, ahead_size, ahead_bytes, i_b, THREADS)
    o_d = tl.arange(0, DP)
    m_d = (o_d < D) & (i_b < B)
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
    schema=("(Tensor x, Tensor parts, Tensor weight, Tensor? bias, float eps, Tensor? ahead) -> (Tensor, Tensor)"),
)
def add_norm_op(x, parts, weight, bias, eps, ahead):
    x, parts = x.contiguous(), parts.contiguous()
    (b, d), size = x.shape, fetched(ahead)
    padded = triton.next_power_of_2(d)
    warps = min(8, max(1, padded // 256))
    programs = max(b, PROGRAMS) if size else b
    total, y = torch.empty_like(x), torch.empty_like(x)
    _add_norm_kernel[(programs,)](
        x,
        parts,
        weight,
        x if bias is None else bias,
        ahead if size else x,
        total,
        y,
        eps,
        b,
        d,
        size,
        divided(size, programs, 32 * warps),
        S=parts.shape[0],
        DP=padded,
        HAS_BIAS=bias is not None,
        AHEAD=size > 0,
        THREADS=32 * warps,
        num_warps=warps,
    )
    return total, y


@add_norm_op.register_fake
def _(x, parts, weight, bias, eps, ahead):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in "sy")


def add_norm_triton(
    x: Tensor, parts: Tensor, weight: Tensor, bias: Tensor | None, eps: float, ahead: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.ops.zoology.add_norm(x, parts, weight, bias, eps, ahead)
