"""Causal depthwise convolution in Triton: one pass over x forwards; backwards one over x and the gradient of y.

A program holds a tile of tokens and channels. The tokens before (or, for the gradient, behind) it are read again by its
neighbour out of the cache. The gradients of weight and bias are summed per tile, then over the tiles in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D, NUM_WARPS = 64, 64, 4


@triton.jit
def _shifted(p, o_t, shift, o_d, T, D: tl.constexpr):
    """Tokens o_t + shift of one sequence at p, [BT, BD] in float32, zero outside of it."""
    t = o_t + shift
    m = ((t >= 0) & (t < T))[:, None] & (o_d < D)[None, :]
    return tl.load(p + t[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    T,
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
        b_y += b_w[None, :] * _shifted(x_ptr + base, o_t, -lag, o_d, T, D)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    tl.store(y_ptr + base + o_t[:, None] * D + o_d[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _backward_kernel(
    x_ptr,
    w_ptr,
    dy_ptr,
    dx_ptr,
    sums_ptr,
    T,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """dx of a tile, and its share of the gradients of the weights and, behind them, of the bias: [W + 1, D]."""
    i_d, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    base = i_b.to(tl.int64) * T * D
    b_dy = _shifted(dy_ptr + base, o_t, 0, o_d, T, D)
    b_dx = tl.zeros([BT, BD], tl.float32)
    p_sums = sums_ptr + (i_b.to(tl.int64) * tl.num_programs(1) + i_t) * (W + 1) * D + o_d
    for lag in tl.static_range(0, W):
        b_w = tl.load(w_ptr + o_d * W + lag, mask=o_d < D, other=0.0).to(tl.float32)
        if lag == 0:
            b_dx += b_w[None, :] * b_dy
        else:
            b_dx += b_w[None, :] * _shifted(dy_ptr + base, o_t, lag, o_d, T, D)
        b_dw = tl.sum(b_dy * _shifted(x_ptr + base, o_t, -lag, o_d, T, D), 0)
        tl.store(p_sums + lag * D, b_dw, mask=o_d < D)
    tl.store(p_sums + W * D, tl.sum(b_dy, 0), mask=o_d < D)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    tl.store(dx_ptr + base + o_t[:, None] * D + o_d[None, :], b_dx.to(dx_ptr.dtype.element_ty), mask=m)


def launch(x: Tensor, taps: int) -> tuple[tuple[int, int, int], dict]:
    """Grid and constants for x [B, T, D]."""
    b, t, d = x.shape
    grid = (triton.cdiv(d, BLOCK_D), triton.cdiv(t, BLOCK_T), b)
    return grid, {"D": d, "W": taps, "BT": BLOCK_T, "BD": BLOCK_D, "num_warps": NUM_WARPS}


@torch.library.custom_op(
    "zoology::short_convolution", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def forward_op(x, weight, bias):
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    grid, constants = launch(x, weight.shape[1])
    _forward_kernel[grid](x, weight, x if bias is None else bias, y, x.shape[1], HAS_BIAS=bias is not None, **constants)
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
    x, weight, dy = (tensor.contiguous() for tensor in (x, weight, dy))
    dx = torch.empty_like(x)
    grid, constants = launch(x, weight.shape[1])
    sums = torch.empty(grid[1] * grid[2], weight.shape[1] + 1, x.shape[2], device=x.device, dtype=torch.float32)
    _backward_kernel[grid](x, weight, dy, dx, sums, x.shape[1], **constants)
    total = sums.sum(0)
    return dx, total[:-1].t().contiguous().to(weight.dtype), total[-1].to(weight.dtype, copy=True)


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
