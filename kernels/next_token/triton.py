"""The next token in Triton: rows of scores in parts, and then the largest of the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
PROGRAMS = 1024
"""About as many as keep a large device busy with reading."""


@triton.jit
def _largest_kernel(
    scores_ptr,
    best_ptr,
    at_ptr,
    row,
    V,
    per_part,
    PARTS: tl.constexpr,
    BV: tl.constexpr,
):
    """The largest score of one part of one row, and the first index that has it."""
    i_b, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low = i_p * per_part
    high = tl.minimum(low + per_part, V)
    o_v = tl.arange(0, BV)
    b_best = tl.full([BV], float("-inf"), tl.float32)
    b_at = low + o_v
    for start in range(low, high, BV):
        n = start + o_v
        b_x = tl.load(scores_ptr + i_b * row + n, mask=n < high, other=float("-inf")).to(tl.float32)
        b_at = tl.where(b_x > b_best, n, b_at)
        b_best = tl.where(b_x > b_best, b_x, b_best)
    best = tl.max(b_best, 0)
    tl.store(best_ptr + i_b * PARTS + i_p, best)
    tl.store(at_ptr + i_b * PARTS + i_p, tl.min(tl.where(b_best == best, b_at, 2147483647), 0))


@triton.jit
def _note_kernel(
    best_ptr,
    at_ptr,
    token_ptr,
    made_ptr,
    count_ptr,
    B,
    PARTS: tl.constexpr,
    PP: tl.constexpr,
    BB: tl.constexpr,
):
    """The first index of the largest part, for BB rows."""
    o_b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)
    o_p = tl.arange(0, PP)
    o_part = o_b[:, None] * PARTS + o_p[None, :]
    m = (o_b < B)[:, None] & (o_p < PARTS)[None, :]
    b_best = tl.load(best_ptr + o_part, mask=m, other=float("-inf"))
    b_at = tl.load(at_ptr + o_part, mask=m, other=2147483647)
    b_token = tl.min(tl.where(b_best == tl.max(b_best, 1)[:, None], b_at, 2147483647), 1).to(tl.int64)
    tl.store(token_ptr + o_b, b_token, mask=o_b < B)
    tl.store(made_ptr + tl.load(count_ptr) * B + o_b, b_token, mask=o_b < B)


@torch.library.custom_op(
    "zoology::next_token_",
    mutates_args=("token", "made"),
    schema="(Tensor scores, Tensor(a!) token, Tensor(b!) made, Tensor count) -> ()",
)
def next_token_op(scores, token, made, count):
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    b, v = scores.shape
    parts = max(1, min(triton.cdiv(PROGRAMS, b), triton.cdiv(v, BLOCK)))
    per_part = triton.cdiv(v, parts)
    best = torch.empty(b, parts, device=scores.device, dtype=torch.float32)
    at = torch.empty(b, parts, device=scores.device, dtype=torch.int32)
    _largest_kernel[(b, parts)](scores, best, at, scores.stride(0), v, per_part, PARTS=parts, BV=BLOCK, num_warps=4)
    padded = triton.next_power_of_2(parts)
    rows = max(1, 128 // padded)
    _note_kernel[(triton.cdiv(b, rows),)](best, at, token, made, count, b, PARTS=parts, PP=padded, BB=rows, num_warps=1)


@next_token_op.register_fake
def _(scores, token, made, count):
    return None


def next_token_triton(scores: Tensor, token: Tensor, made: Tensor, count: Tensor) -> None:
    torch.ops.zoology.next_token_(scores, token, made, count)
