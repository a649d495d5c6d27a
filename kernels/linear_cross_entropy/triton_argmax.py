"""The largest logit of every row in Triton: logits live in registers only.

A program walks over the vocabulary, or a part of it, with a block of rows. Each place of its tile of logits keeps the
largest that came by and the block it came with; only at the end the places of a row are compared. float32, where its
products may round to TF32, goes through float16 as the loss does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_cross_entropy.triton import Launch, cut


@triton.jit(do_not_specialize=["N"])
def _argmax_kernel(
    h,
    w,
    values,
    indices,
    N,
    V,
    PART,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    PREC: tl.constexpr,
):
    """Of BM rows and one part of the vocabulary: the largest s = h w and its index, the first of equal ones."""
    i_m, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_m, o_d, o_b = i_m * BM + tl.arange(0, BM), tl.arange(0, DP), tl.arange(0, BN)
    m_m, m_d = o_m < N, o_d < D
    b_h = tl.load(h + o_m[:, None] * D + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, DP]
    first = i_s * PART
    b_best = tl.full([BM, BN], float("-inf"), tl.float32)
    b_at = tl.zeros([BM, BN], tl.int32) + first
    for start in range(first, tl.minimum(first + PART, V), BN):
        o_n = start + o_b
        m_w = (o_n[:, None] >= 0) & m_d[None, :] if EVEN else (o_n < V)[:, None] & m_d[None, :]
        b_w = tl.load(w + o_n[:, None].to(tl.int64) * D + o_d[None, :], mask=m_w, other=0.0)  # [BN, DP]
        b_s = tl.dot(b_h, tl.trans(b_w), input_precision=PREC)  # [BM, BN]
        if not EVEN:
            b_s = tl.where((o_n < V)[None, :], b_s, float("-inf"))
        b_at = tl.where(b_s > b_best, start, b_at)
        b_best = tl.maximum(b_best, b_s)
    b_max = tl.max(b_best, 1)
    b_index = tl.min(tl.where(b_best == b_max[:, None], b_at + o_b[None, :], 2147483647), 1)
    tl.store(values + i_s * N + o_m, b_max, mask=m_m)
    # Rows without a number have no largest one.
    tl.store(indices + i_s * N + o_m, tl.minimum(b_index, V - 1).to(tl.int64), mask=m_m)


def linear_argmax_triton(hidden: Tensor, weight: Tensor, launch: Launch | None = None) -> Tensor:
    """argmax_v (W h)_v [N], int64, of hidden [N, D] and weight [V, D]."""
    if hidden.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        hidden, weight = hidden.half(), weight.half()
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (n, d), v = hidden.shape, weight.shape[0]
    dp = max(16, triton.next_power_of_2(d))
    by_row = launch or (Launch(64, 128, 4, 3) if dp <= 128 and hidden.element_size() == 2 else Launch(64, 64, 4, 2))
    tiles = triton.cdiv(n, by_row.BM)
    parts, length = cut(v, by_row.BN, tiles, hidden.device, most=16)
    values = torch.empty(parts, n, device=hidden.device)
    indices = torch.empty(parts, n, device=hidden.device, dtype=torch.int64)
    options = {"num_warps": by_row.num_warps, "num_stages": by_row.num_stages}
    sizes = n, v, length, d, dp, by_row.BM, by_row.BN, v % by_row.BN == 0, "tf32x3"
    _argmax_kernel[(tiles, parts)](hidden, weight, values, indices, *sizes, **options)
    if parts == 1:
        return indices[0]
    return indices.gather(0, values.argmax(0, keepdim=True))[0]
