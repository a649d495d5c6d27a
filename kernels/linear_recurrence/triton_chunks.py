"""What Triton kernels share that walk over chunks of a sequence with a matrix state [K, V] in registers.

One program has one sequence, one head and a block of value columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import INTERPRETED

MAX_VALUES = 64  # value columns of a program
LONGEST = {True: 32, False: 16}  # chunks, by whether operands are of 16 bits: longer ones take too many registers


@triton.jit
def operand(x, OP: tl.constexpr, PREC: tl.constexpr):
    """An operand of a product; for tf32 rounded, where the tensor cores would cut digits off."""
    x = x.to(OP)
    if PREC == "tf32" and x.dtype != tl.bfloat16:
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot(x, y, OP: tl.constexpr, PREC: tl.constexpr):
    return tl.dot(operand(x, OP, PREC), operand(y, OP, PREC), input_precision=PREC)


@triton.jit
def rows(p, o_t, o_x, T, H: tl.constexpr, X: tl.constexpr):
    """[C, BX] in float32 of one sequence and head of [T, H, X] at p, zero outside."""
    m = (o_t < T)[:, None] & (o_x < X)[None, :]
    return tl.load(p + o_t[:, None] * (H * X) + o_x[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def put_rows(p, x, o_t, o_x, T, H: tl.constexpr, X: tl.constexpr):
    m = (o_t < T)[:, None] & (o_x < X)[None, :]
    tl.store(p + o_t[:, None] * (H * X) + o_x[None, :], x.to(p.dtype.element_ty), mask=m)


@triton.jit
def row_at(p, t, T, o_x, H: tl.constexpr, X: tl.constexpr):
    """[BX] in float32, row t of one sequence and head of [T, H, X] at p, zero outside."""
    return tl.load(p + t * (H * X) + o_x, mask=(o_x < X) & (t < T), other=0.0).to(tl.float32)


@triton.jit
def decays(g_ptr, o_t, T, H: tl.constexpr, C: tl.constexpr):
    """exp(G) [C, C], zero where j > i; of the sums up to a token [C]; of those behind a token [C]; of the whole."""
    o_c = tl.arange(0, C)
    b_g = tl.load(g_ptr + o_t * H, mask=o_t < T, other=0.0).to(tl.float32)
    later, upto = o_c[:, None] > o_c[None, :], o_c[:, None] >= o_c[None, :]
    b_between = tl.where(later, b_g[:, None] + tl.zeros([C, C], tl.float32), 0.0)  # [l, j]
    b_after = tl.exp(tl.sum(b_between, 0))
    b_until = tl.exp(tl.sum(tl.where(later, 0.0, b_g[:, None]), 0))  # [l, i], l <= i
    b_pairs = tl.where(upto, tl.exp(tl.cumsum(b_between, 0)), 0.0)
    return b_pairs, b_until, b_after, tl.exp(tl.sum(b_g, 0))


def tiles(q: Tensor, v: Tensor, longest: dict[bool, int] = LONGEST) -> tuple[tuple[int, int, int], dict]:
    """Grid and constants for q [B, T, H, K] and v [B, T, H, V], of 4 warps and chunks of at most `longest`."""
    (b, t, heads, width), values = q.shape, v.shape[-1]
    block_v = min(MAX_VALUES, max(16, triton.next_power_of_2(values)))
    block_k = max(16, triton.next_power_of_2(width))
    # float16 as tf32, which has the same mantissa and more room; float32 as torch is set to, or three tf32 products.
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    narrow = q.dtype == torch.bfloat16 and not INTERPRETED  # the interpreter has no bf16 products
    op, prec = (tl.bfloat16, "tf32") if narrow else (tl.float32, "tf32x3" if exact else "tf32")
    chunk = min(longest[narrow], max(16, triton.next_power_of_2(t)))
    constants = {"H": heads, "K": width, "V": values, "C": chunk, "BK": block_k, "BV": block_v, "OP": op, "PREC": prec}
    return (triton.cdiv(values, block_v), heads, b), constants | {"num_warps": 4, "num_stages": 1}


def states(q: Tensor, v: Tensor, *axes: int) -> Tensor:
    """Room for states [B, H, *axes, K, V]."""
    return q.new_empty(q.shape[0], q.shape[2], *axes, q.shape[3], v.shape[3], dtype=torch.float32)


def outputs(q: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for o, the states before every chunk and the last state."""
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, states(q, v, -(-q.shape[1] // chunk)), states(q, v)


def shares(like: Tensor, blocks: int) -> Tensor:
    """Room for each block's share of a gradient. A single one is the gradient itself, and as wide as that."""
    return like.new_empty(blocks, *like.shape, dtype=like.dtype if blocks == 1 else torch.float32)


def keep(ctx, tensors: tuple[Tensor | None, ...], initial: Tensor | None) -> None:
    """Save tensors for the backward pass of an operator that started from `initial`."""
    ctx.save_for_backward(*tensors)
    ctx.has_initial = initial is not None
    ctx.set_materialize_grads(False)  # zeros for the kept states would be as large as they are
