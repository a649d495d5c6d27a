"""The gated norm in Triton: what is read is read once, each way.

    h = (y + d x) * silu(z),   r = 1 / sqrt(mean(h^2) + eps),   o = r h w
    dh = r (w do - r^2 h mean(h w do)),   dy = dh silu(z),   dz = dh (y + d x) silu'(z)
    dw = sum of r h do,   dd = sum of x dy,   dx = d dy

A tile is [rows, channels of a group]. Nothing but the inputs is kept for the backward pass. There a program walks over
every P-th tile and adds up its shares of dw and dd, which are summed over the programs in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import rows_apart

TILE = 1024
"""Elements of a tile: 8 for each thread of four warps, so that four programs fit on a multiprocessor."""

PROGRAMS = 512
"""Of the backward pass: about as many as a large GPU runs at once."""


@triton.jit
def _part(p, o_r, o_c, m, row):
    """[BR, BC] in float32 of rows `row` apart at p, zero outside."""
    return tl.load(p + o_r.to(tl.int64)[:, None] * row + o_c[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _vector(p, o_c, m_c):
    return tl.load(p + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["R"])
def _gated_norm_kernel(
    y_ptr,
    z_ptr,
    w_ptr,
    x_ptr,
    d_ptr,
    o_ptr,
    eps,
    R,
    row_y,
    row_z,
    row_x,
    D: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HAS_SKIP: tl.constexpr,
):
    """o of BR rows and one group of C channels."""
    o_r, i_c = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BC)
    o_c, m_c = tl.program_id(1) * C + i_c, i_c < C
    m = (o_r < R)[:, None] & m_c[None, :]
    b_y, b_z = _part(y_ptr, o_r, o_c, m, row_y), _part(z_ptr, o_r, o_c, m, row_z)
    if HAS_SKIP:
        b_y += _vector(d_ptr, o_c, m_c) * _part(x_ptr, o_r, o_c, m, row_x)
    b_h = b_y * (b_z * tl.sigmoid(b_z))
    b_o = b_h * tl.rsqrt(tl.sum(b_h * b_h, 1) / C + eps)[:, None] * _vector(w_ptr, o_c, m_c)
    tl.store(o_ptr + o_r.to(tl.int64)[:, None] * D + o_c[None, :], b_o.to(o_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["R"])
def _gated_norm_backward_kernel(
    y_ptr,
    z_ptr,
    w_ptr,
    x_ptr,
    d_ptr,
    do_ptr,
    dy_ptr,
    dz_ptr,
    dw_ptr,
    dd_ptr,
    eps,
    R,
    row_y,
    row_z,
    row_x,
    D: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HAS_SKIP: tl.constexpr,
):
    """dy and dz of every P-th BR rows, and shares dw and dd [C] of these rows."""
    i_p, i_c = tl.program_id(0), tl.arange(0, BC)
    o_c, m_c = tl.program_id(1) * C + i_c, i_c < C
    b_w, b_dw, b_dd = _vector(w_ptr, o_c, m_c), tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
    for start in range(i_p * BR, R, tl.num_programs(0) * BR):
        o_r = start + tl.arange(0, BR)
        m = (o_r < R)[:, None] & m_c[None, :]
        b_y, b_z = _part(y_ptr, o_r, o_c, m, row_y), _part(z_ptr, o_r, o_c, m, row_z)
        b_do = _part(do_ptr, o_r, o_c, m, D)
        if HAS_SKIP:
            b_x = _part(x_ptr, o_r, o_c, m, row_x)
            b_y += _vector(d_ptr, o_c, m_c) * b_x
        b_s = tl.sigmoid(b_z)
        b_a = b_z * b_s
        b_h = b_y * b_a
        b_r = tl.rsqrt(tl.sum(b_h * b_h, 1) / C + eps)[:, None]
        b_n, b_g = b_h * b_r, b_do * b_w
        b_dw += b_n * b_do
        b_dh = b_r * (b_g - b_n * (tl.sum(b_n * b_g, 1) / C)[:, None])
        b_dy = b_dh * b_a
        if HAS_SKIP:
            b_dd += b_dy * b_x
        b_dz = b_dh * b_y * (b_s + b_a * (1.0 - b_s))
        p = o_r.to(tl.int64)[:, None] * D + o_c[None, :]
        tl.store(dy_ptr + p, b_dy.to(dy_ptr.dtype.element_ty), mask=m)
        tl.store(dz_ptr + p, b_dz.to(dz_ptr.dtype.element_ty), mask=m)
    tl.store(dw_ptr + i_p * D + o_c, tl.sum(b_dw, 0), mask=m_c)
    if HAS_SKIP:
        tl.store(dd_ptr + i_p * D + o_c, tl.sum(b_dd, 0), mask=m_c)


def launch(y: Tensor, num_groups: int) -> tuple[int, dict]:
    """Number of tiles over the rows of y [..., D], and constants."""
    d = y.shape[-1]
    block_c = max(16, triton.next_power_of_2(d // num_groups))
    block_r = max(1, TILE // block_c)
    constants = {"D": d, "C": d // num_groups, "BR": block_r, "BC": block_c}
    return triton.cdiv(y.numel() // d, block_r), constants | {"num_warps": 4 if block_c <= TILE else 8}


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., D] with its rows at equal distances, and the distance."""
    return rows_apart(x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1]))


def _read(y, gate, weight, x, skip) -> tuple[list[Tensor], list[int]]:
    """The kernels' inputs, and how far apart the rows of y, gate and x lie."""
    parts = [_rows(part) for part in (y, gate, y if x is None else x)]
    (y, _), (gate, _), (x, _) = parts
    weight = weight.contiguous()
    return [y, gate, weight, x, weight if skip is None else skip.contiguous()], [row for _, row in parts]


@torch.library.custom_op(
    "zoology::gated_norm",
    mutates_args=(),
    schema="(Tensor y, Tensor gate, Tensor weight, Tensor? x, Tensor? skip, int num_groups, float eps) -> Tensor",
)
def forward_op(y, gate, weight, x, skip, num_groups, eps):
    """y gate x [..., D], weight skip [D] -> [..., D]."""
    inputs, rows = _read(y, gate, weight, x, skip)
    o = torch.empty_like(y, memory_format=torch.contiguous_format)
    tiles, constants = launch(y, num_groups)
    number = y.numel() // y.shape[-1]
    _gated_norm_kernel[(tiles, num_groups)](*inputs, o, eps, number, *rows, HAS_SKIP=x is not None, **constants)
    return o


@forward_op.register_fake
def _(y, gate, weight, x, skip, num_groups, eps):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "zoology::gated_norm_backward",
    mutates_args=(),
    schema="(Tensor y, Tensor gate, Tensor weight, Tensor? x, Tensor? skip, Tensor do, int num_groups, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(y, gate, weight, x, skip, do, num_groups, eps):
    """Gradients of y and of gate [..., D], and of weight and skip [P, D] by program; the last is empty without one."""
    inputs, rows = _read(y, gate, weight, x, skip)
    found = _gradients(y, gate, x, num_groups)
    constants, number = launch(y, num_groups)[1], y.numel() // y.shape[-1]
    flags = {"HAS_SKIP": x is not None}
    grid = found[2].shape[0], num_groups
    _gated_norm_backward_kernel[grid](*inputs, do.contiguous(), *found, eps, number, *rows, **flags, **constants)
    return found


def _gradients(y: Tensor, gate: Tensor, x: Tensor | None, num_groups: int) -> tuple[Tensor, ...]:
    programs, d = min(PROGRAMS, launch(y, num_groups)[0]), y.shape[-1]
    dy, dz = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (y, gate))
    dw, dd = (y.new_empty(number, d, dtype=torch.float32) for number in (programs, 0 if x is None else programs))
    return dy, dz, dw, dd


@backward_op.register_fake
def _(y, gate, weight, x, skip, do, num_groups, eps):
    return _gradients(y, gate, x, num_groups)


def _setup(ctx, inputs, output):
    *given, ctx.num_groups, ctx.eps = inputs
    ctx.save_for_backward(*given)


def _backward(ctx, do):
    _, _, weight, x, skip = ctx.saved_tensors
    options = ctx.num_groups, ctx.eps
    dy, dz, dw, dd = torch.ops.zoology.gated_norm_backward(*ctx.saved_tensors, do, *options)
    dw = dw.sum(0).to(weight.dtype)
    if x is None:
        return dy, dz, dw, None, None, None, None
    return dy, dz, dw, (skip * dy).to(x.dtype), dd.sum(0).to(skip.dtype), None, None


forward_op.register_autograd(_backward, setup_context=_setup)


def gated_norm_triton(
    y: Tensor, gate: Tensor, weight: Tensor, x: Tensor | None, skip: Tensor | None, num_groups: int, eps: float
) -> Tensor:
    return torch.ops.zoology.gated_norm(y, gate, weight, x, skip, num_groups, eps)
