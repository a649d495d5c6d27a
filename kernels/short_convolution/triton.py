"""Causal depthwise convolution in Triton: one pass over x forwards; backwards one over x and the gradient of y.

A program holds a tile of tokens and channels. The tokens before (or, for the gradient, behind) it are read again by its
neighbour out of the cache. The gradients of weight and bias are summed per tile, then over the tiles in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import rows_apart

# Channels that a thread holds side by side backwards: with few, a warp is few rows, and sums over them few exchanges.
RUN = 4


@triton.jit
def _shifted(p, o_t, shift, o_d, T, row, D: tl.constexpr):
    """Tokens o_t + shift of one sequence at p, `row` apart, [BT, BD] in float32, zero outside of it."""
    t = o_t + shift
    m = ((t >= 0) & (t < T))[:, None] & (o_d < D)[None, :]
    return tl.load(p + t[:, None] * row + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    T,
    row,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """y of a tile."""
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    base = i_b.to(tl.int64) * T * D
    b_y = tl.zeros([BT, BD], tl.float32)
    if HAS_BIAS:
        b_y += tl.load(b_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    for lag in tl.static_range(0, W):
        b_w = tl.load(w_ptr + o_d * W + lag, mask=o_d < D, other=0.0).to(tl.float32)
        b_y += b_w[None, :] * _shifted(x_ptr + i_b.to(tl.int64) * T * row, o_t, -lag, o_d, T, row, D)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    tl.store(y_ptr + base + o_t[:, None] * D + o_d[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    x_ptr,
    w_ptr,
    dy_ptr,
    dx_ptr,
    sums_ptr,
    T,
    row,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    RUN: tl.constexpr,
):
    """dx of a tile, and its share of the gradients of the weights and, behind them, of the bias: [W + 1, D]."""
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.max_contiguous(i_d * BD + tl.arange(0, BD), RUN)
    base = i_b.to(tl.int64) * T * D
    p_x = x_ptr + i_b.to(tl.int64) * T * row
    b_dy = _shifted(dy_ptr + base, o_t, 0, o_d, T, D, D)
    b_dx = tl.zeros([BT, BD], tl.float32)
    p_sums = sums_ptr + (i_b.to(tl.int64) * tl.num_programs(1) + i_t) * (W + 1) * D + o_d
    for lag in tl.static_range(0, W):
        b_w = tl.load(w_ptr + o_d * W + lag, mask=o_d < D, other=0.0).to(tl.float32)
        if lag == 0:
            b_dx += b_w[None, :] * b_dy
        else:
            b_dx += b_w[None, :] * _shifted(dy_ptr + base, o_t, lag, o_d, T, D, D)
        b_dw = tl.sum(b_dy * _shifted(p_x, o_t, -lag, o_d, T, row, D), 0)
        tl.store(p_sums + lag * D, b_dw, mask=o_d < D)
    tl.store(p_sums + W * D, tl.sum(b_dy, 0), mask=o_d < D)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    tl.store(dx_ptr + base + o_t[:, None] * D + o_d[None, :], b_dx.to(dx_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N"])
def _total_kernel(sums_ptr, dw_ptr, db_ptr, N, D: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Sums [N, W + 1, D] of the tiles -> gradients of the weights [D, W] and of the bias [D]."""
    i_d, i_w = tl.program_id(0), tl.program_id(1)
    o_n, o_d = tl.arange(0, BN), i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_total = tl.zeros([BN, BD], tl.float32)
    for start in range(0, N, BN):
        n = start + o_n
        p = sums_ptr + (n.to(tl.int64)[:, None] * (W + 1) + i_w) * D + o_d[None, :]
        b_total += tl.load(p, mask=(n < N)[:, None] & m_d[None, :], other=0.0)
    b_total = tl.sum(b_total, 0)
    if i_w < W:
        tl.store(dw_ptr + o_d * W + i_w, b_total.to(dw_ptr.dtype.element_ty), mask=m_d)
    else:
        tl.store(db_ptr + o_d, b_total.to(db_ptr.dtype.element_ty), mask=m_d)


def launch(x: Tensor, taps: int, *, backward: bool) -> tuple[tuple[int, int, int], dict]:
    """Grid and constants for x [B, T, D]."""
    b, t, d = x.shape
    block_t, block_d, warps = 64, 64, 4
    if backward:
        # One warp waits for no other one's sums, if it has the registers for all taps.
        block_t, warps = 32, 1 if taps <= (4 if x.element_size() == 2 else 3) else 2
    grid = (triton.cdiv(d, block_d), triton.cdiv(t, block_t), b)
    return grid, {"D": d, "W": taps, "BT": block_t, "BD": block_d, "num_warps": warps}


@torch.library.custom_op(
    "zoology::short_convolution", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def forward_op(x, weight, bias):
    (x, row), weight = rows_apart(x), weight.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid, constants = launch(x, weight.shape[1], backward=False)
    inputs = x, weight, weight if bias is None else bias.contiguous()
    _forward_kernel[grid](*inputs, y, x.shape[1], row, HAS_BIAS=bias is not None, **constants)
    return y


@forward_op.register_fake
def _(x, weight, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "zoology::short_convolution_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor dy) -> (Tensor, Tensor, Tensor)",
)
def backward_op(x, weight, dy):
    (x, row), weight, dy = rows_apart(x), weight.contiguous(), dy.contiguous()
    d, taps = weight.shape
    dx, dw, db = torch.empty_like(dy), torch.empty_like(weight), weight.new_empty(d)
    grid, constants = launch(x, taps, backward=True)
    num = grid[1] * grid[2]
    sums = torch.empty(num, taps + 1, d, device=x.device, dtype=torch.float32)
    _backward_kernel[grid](x, weight, dy, dx, sums, x.shape[1], row, RUN=RUN, **constants)
    _total_kernel[(triton.cdiv(d, 16), taps + 1)](sums, dw, db, num, D=d, W=taps, BN=256, BD=16, num_warps=8)
    return dx, dw, db


@backward_op.register_fake
def _(x, weight, dy):
    dx, dw = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, weight))
    return dx, dw, weight.new_empty(weight.shape[0])


def _setup(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, dy):
    dx, dw, db = torch.ops.zoology.short_convolution_backward(*ctx.saved_tensors, dy)
    return dx, dw, db if ctx.has_bias else None


forward_op.register_autograd(_backward, setup_context=_setup)


def short_convolution_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.zoology.short_convolution(x, weight, bias)
