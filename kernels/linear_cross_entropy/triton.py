"""Linear cross-entropy in Triton: logits live in registers only.

`_row_kernel` walks over the vocabulary with a block of rows, keeping maximum, sum of exponentials and the sum of
exponentials times W: softmax attention of h over the rows of W, cut along the vocabulary when there are few rows.
`_combine_kernel` joins the cuts to loss and dh. `_weight_kernel` walks over the rows with a block of the
vocabulary, computes the logits again and sums dW = (softmax - onehot)^T h. Four products where storing the logits
takes three, but no logit ever crosses the memory bus. Exponentials are taken to base 2.

float32 inputs, where their products may round to TF32, are computed from float16 copies: the mantissa is the same,
and the tensor cores are twice as fast. What float16 lacks is range. Softmax weights are scaled by 2^SHIFT, so that
they keep their precision down to 4e-9; entries of W and h below 6e-5 lose relative precision, an absolute error of
3e-8 at most; entries above 65504 become infinite, which the loss then shows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row_kernel(
    h,
    w,
    maxima,
    sums,
    products,
    N,
    V,
    PART,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    SHIFT: tl.constexpr,
    PREC: tl.constexpr,
):
    """Of BM rows and one part of the vocabulary: max, sum of 2^(s - max + SHIFT) and that sum weighted by w; base 2."""
    i_m, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    m_m = o_m < N
    b_h = tl.load(h + o_m[:, None] * D + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)  # [BM, DP]
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DP], tl.float32)
    for start in range(i_s * PART, tl.minimum((i_s + 1) * PART, V), BN):
        o_n = start + tl.arange(0, BN)
        m_w = (o_n[:, None] >= 0) & (o_d < D)[None, :] if EVEN else (o_n < V)[:, None] & (o_d < D)[None, :]
        b_w = tl.load(w + o_n[:, None] * D + o_d[None, :], mask=m_w, other=0.0)  # [BN, DP]
        b_s = tl.dot(b_h, tl.trans(b_w), input_precision=PREC)  # [BM, BN]
        if not EVEN:
            b_s = tl.where((o_n < V)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * LOG2E)
        b_p = tl.exp2(b_s * LOG2E - (b_new - SHIFT)[:, None])
        b_scale = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_w.dtype), b_w, b_acc * b_scale[:, None], input_precision=PREC)
        b_max = b_new
    row = i_s * N + o_m
    tl.store(maxima + row, b_max, mask=m_m)
    tl.store(sums + row, b_sum, mask=m_m)
    tl.store(products + row[:, None] * D + o_d[None, :], b_acc, mask=m_m[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["PARTS"])
def _combine_kernel(
    h,
    w,
    targets,
    maxima,
    sums,
    products,
    share,
    losses,
    log_sums,
    dh,
    N,
    IGNORE,
    PARTS,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Loss [N], base-2 logsumexp [N] (inf for rows that do not count) and dh [N, D] from the parts."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    m_m = o_m < N
    m_md = m_m[:, None] & (o_d < D)[None, :]
    b_max = tl.full([BM], float("-inf"), tl.float32)
    for i_s in range(PARTS):
        b_max = tl.maximum(b_max, tl.load(maxima + i_s * N + o_m, mask=m_m, other=0.0))
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DP], tl.float32)
    for i_s in range(PARTS):
        b_scale = tl.exp2(tl.load(maxima + i_s * N + o_m, mask=m_m, other=0.0) - b_max)
        b_sum += tl.load(sums + i_s * N + o_m, mask=m_m, other=1.0) * b_scale
        b_acc += (
            tl.load(products + (i_s * N + o_m)[:, None] * D + o_d[None, :], mask=m_md, other=0.0) * b_scale[:, None]
        )
    b_t = tl.load(targets + o_m, mask=m_m, other=IGNORE)
    counted = b_t != IGNORE
    b_t = tl.where(counted, b_t, 0)
    b_h = tl.load(h + o_m[:, None] * D + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
    b_w = tl.load(w + b_t[:, None] * D + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
    b_log = b_max + tl.log2(b_sum) - SHIFT
    tl.store(losses + o_m, tl.where(counted, b_log / LOG2E - tl.sum(b_h * b_w, 1), 0.0), mask=m_m)
    tl.store(log_sums + o_m, tl.where(counted, b_log, float("inf")), mask=m_m)
    b_share = tl.where(counted, tl.load(share), 0.0)
    b_dh = (b_acc / b_sum[:, None] - b_w) * b_share[:, None]
    tl.store(dh + o_m[:, None] * D + o_d[None, :], b_dh.to(dh.dtype.element_ty), mask=m_md)


@triton.jit
def _weight_kernel(
    h,
    w,
    targets,
    log_sums,
    share,
    dw,
    N,
    V,
    PART,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SHIFT: tl.constexpr,
    ONE: tl.constexpr,
    PREC: tl.constexpr,
):
    """dW of BM symbols from one part of the rows: sum_n (2^(s - logsumexp) - onehot) h, times the rows' share.

    Inside, everything is scaled by ONE = 2^SHIFT.
    """
    i_m, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    m_md = (o_m < V)[:, None] & (o_d < D)[None, :]
    b_w = tl.load(w + o_m[:, None] * D + o_d[None, :], mask=m_md, other=0.0)  # [BM, DP]
    b_acc = tl.zeros([BM, DP], tl.float32)
    first, last = i_s * PART, tl.minimum((i_s + 1) * PART, N)
    o_n = first + tl.arange(0, BN)
    b_log = tl.load(log_sums + o_n, mask=o_n < N, other=float("inf"))
    b_t = tl.load(targets + o_n, mask=o_n < N, other=-1).to(tl.int32)
    for start in range(first, last, BN):
        o_n = start + tl.arange(0, BN)
        # Too few bytes for the compiler to fetch ahead: the next block's are asked for before this one is computed.
        o_next = o_n + BN
        b_next_log = tl.load(log_sums + o_next, mask=o_next < N, other=float("inf"))
        b_next_t = tl.load(targets + o_next, mask=o_next < N, other=-1).to(tl.int32)
        b_h = tl.load(h + o_n[:, None] * D + o_d[None, :], mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0)
        b_s = tl.dot(b_w, tl.trans(b_h), input_precision=PREC)  # [BM, BN]
        hot = o_m.to(tl.int32)[:, None] == b_t[None, :]
        b_p = tl.exp2(b_s * LOG2E - (b_log - SHIFT)[None, :]) - tl.where(hot, ONE, 0.0)
        b_acc = tl.dot(b_p.to(b_h.dtype), b_h, b_acc, input_precision=PREC)
        b_log, b_t = b_next_log, b_next_t
    b_acc *= tl.load(share) / ONE
    tl.store(dw + (i_s * V + o_m)[:, None] * D + o_d[None, :], b_acc.to(dw.dtype.element_ty), mask=m_md)


@triton.jit
def _share_kernel(targets, share, N, IGNORE, BN: tl.constexpr):
    """1 / the number of rows that count."""
    b_count = tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_count += (tl.load(targets + o_n, mask=o_n < N, other=IGNORE) != IGNORE).to(tl.float32)
    tl.store(share, 1.0 / tl.sum(b_count, 0))


@triton.jit
def _mean_kernel(losses, share, mean, N, BN: tl.constexpr):
    """The losses' sum times the share: one program, so that the order of the sum is fixed."""
    b_sum = tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_sum += tl.load(losses + o_n, mask=o_n < N, other=0.0)
    tl.store(mean, tl.sum(b_sum, 0) * tl.load(share))


@triton.jit
def _softmax_gradient_kernel(logits, targets, share, losses, V, IGNORE, BV: tl.constexpr):
    """One row in place: logits [V] become (softmax - onehot) * share; its loss."""
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    row = logits + i_n * V
    b_max = tl.full([BV], float("-inf"), tl.float32)
    b_sum = tl.zeros([BV], tl.float32)
    for start in range(0, V, BV):
        b_s = tl.load(row + start + o_v, mask=start + o_v < V, other=float("-inf")).to(tl.float32) * LOG2E
        b_new = tl.maximum(b_max, b_s)
        b_sum = b_sum * tl.exp2(b_max - tl.maximum(b_new, -1e38)) + tl.exp2(b_s - tl.maximum(b_new, -1e38))
        b_max = b_new
    b_top = tl.max(b_max, 0)
    b_total = tl.sum(b_sum * tl.exp2(b_max - b_top), 0)
    b_t = tl.load(targets + i_n)
    counted = b_t != IGNORE
    b_picked = tl.load(row + tl.where(counted, b_t, 0)).to(tl.float32) * LOG2E
    tl.store(losses + i_n, tl.where(counted, (tl.log2(b_total) + (b_top - b_picked)) / LOG2E, 0.0))
    b_share = tl.where(counted, tl.load(share), 0.0)
    tl.debug_barrier()  # the picked logit is read before any thread overwrites it
    for start in range(0, V, BV):
        o = start + o_v
        b_s = tl.load(row + o, mask=o < V, other=float("-inf")).to(tl.float32) * LOG2E
        b_p = (tl.exp2(b_s - b_top) / b_total - (o == b_t).to(tl.float32)) * b_share
        tl.store(row + o, b_p.to(logits.dtype.element_ty), mask=o < V)


def softmax_gradient_triton(logits: Tensor, targets: Tensor, share: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """`reference.softmax_gradient` in place, one pass over the logits."""
    n, v = logits.shape
    losses = torch.empty(n, device=logits.device)
    block = min(8192, triton.next_power_of_2(v))
    _softmax_gradient_kernel[(n,)](
        logits, targets, share, losses, v, ignore_index, block, num_warps=max(1, min(16, block // 512))
    )
    return losses, logits


class Launch(NamedTuple):
    """Block sizes and launch options: BM rows (or symbols) stay, BN symbols (or rows) pass by."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


def choose_launches(width: int, rows: int, element_size: int) -> tuple[Launch, Launch]:
    """For `_row_kernel` and `_weight_kernel` at D = `width` (padded) and N = `rows`: the fastest seen on an H200."""
    if element_size > 2:
        return Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)
    if width > 128:
        return Launch(64, 64, 4, 3), Launch(64, 64, 4, 3)
    if width == 128 and rows > 4096:
        return Launch(64, 128, 4, 3), Launch(128, 64, 8, 3)
    return Launch(64, 128, 4, 3), Launch(64, 128, 4, 3)


@functools.lru_cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cut(length: int, block: int, programs: int, device: torch.device, most: int) -> tuple[int, int]:
    """How many parts, and how long each is, so that the programs fill the device: multiples of `block`."""
    blocks = triton.cdiv(length, block)
    parts = max(1, min(most, blocks, round(num_multiprocessors(device) / programs)))
    per_part = triton.cdiv(blocks, parts)
    return triton.cdiv(blocks, per_part), per_part * block


def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_dtype: torch.dtype,
    ignore_index: int,
    launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dhidden in the dtype of `hidden`, dweight in `weight_dtype`; `weight` in the dtype of `hidden`."""
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if hidden.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        hidden, weight = hidden.half(), weight.half()
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    (n, d), v, device = hidden.shape, weight.shape[0], hidden.device
    shift = 14 if hidden.dtype == torch.float16 else 0
    dp = max(16, triton.next_power_of_2(d))
    by_row, by_symbol = launches or choose_launches(dp, n, hidden.element_size())
    prec = "tf32x3"  # of float32 operands
    share, mean = (torch.empty((), device=device) for _ in range(2))
    _share_kernel[(1,)](targets, share, n, ignore_index, 8192, num_warps=8)

    parts, length = cut(v, by_row.BN, triton.cdiv(n, by_row.BM), device, most=16)
    maxima, sums = (torch.empty(parts, n, device=device) for _ in range(2))
    products = torch.empty(parts, n, d, device=device)
    options = {"num_warps": by_row.num_warps, "num_stages": by_row.num_stages}
    grid = (triton.cdiv(n, by_row.BM), parts)
    even = v % by_row.BN == 0
    _row_kernel[grid](
        hidden, weight, maxima, sums, products, n, v, length, d, dp, by_row.BM, by_row.BN, even, shift, prec, **options
    )
    losses, log_sums = (torch.empty(n, device=device) for _ in range(2))
    block = max(1, 4096 // dp)
    _combine_kernel[(triton.cdiv(n, block),)](
        hidden,
        weight,
        targets,
        maxima,
        sums,
        products,
        share,
        losses,
        log_sums,
        dhidden,
        n,
        ignore_index,
        parts,
        d,
        dp,
        block,
        shift,
        num_warps=4,
    )
    parts, length = cut(n, by_symbol.BN, triton.cdiv(v, by_symbol.BM), device, most=4)
    dweight = torch.empty(parts, v, d, device=device, dtype=weight_dtype if parts == 1 else torch.float32)
    options = {"num_warps": by_symbol.num_warps, "num_stages": by_symbol.num_stages}
    grid = (triton.cdiv(v, by_symbol.BM), parts)
    _weight_kernel[grid](
        hidden,
        weight,
        targets,
        log_sums,
        share,
        dweight,
        n,
        v,
        length,
        d,
        dp,
        by_symbol.BM,
        by_symbol.BN,
        shift,
        float(1 << shift),
        prec,
        **options,
    )
    _mean_kernel[(1,)](losses, share, mean, n, 8192, num_warps=8)
    dweight = dweight[0] if parts == 1 else dweight.sum(0).to(weight_dtype)
    return mean, dhidden, dweight
