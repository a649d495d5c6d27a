"""Attention of one token over a cache in Triton: the cache is read once, at the pace of memory."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_SLOTS_PER_SPLIT = 256
MAX_SPLITS = 64
TUNED = {64: (64, 32, 2), 72: (64, 32, 4), 112: (128, 16, 1)}
"""Row entries -> first piece, lanes and warps in 16 bit, as measured on an H200; other rows follow the rule below."""


@triton.jit
def _load_slots(p, n, m_n, o_k, STRIDE: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """Slots n, [BN, width of o_k]; WHOLE: all of these entries are below K."""
    if WHOLE:
        return tl.load(p + n[:, None] * STRIDE + o_k[None, :], mask=m_n[:, None], other=0.0)
    return tl.load(p + n[:, None] * STRIDE + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)


@triton.jit
def _cached_attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    o_ptr,
    part_ptr,
    slots,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    KA: tl.constexpr,
    KB: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One part of one head's cache: o = sum_n exp(s_n) v_n / sum_n exp(s_n), s_n = scale q.k_n.

    Each of BN lanes goes through its own slots with a maximum and sums of its own: the lanes meet once, at the end.
    A row of K entries is read as KA and KB of them, powers of two, so that few threads are idle. With SPLITS > 1 the
    sums, and log2 of their scale, go to `part` [B*H, SPLITS, K + 2].
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    position = tl.load(position_ptr).to(tl.int32)
    used = tl.minimum(position + 1, slots)
    per_split = tl.cdiv(tl.cdiv(used, SPLITS), BN) * BN
    low = i_s * per_split
    high = tl.minimum(low + per_split, used)
    o_n, o_a = tl.arange(0, BN), tl.arange(0, KA)
    # Adding a zero that the compiler cannot know keeps it from giving whole rows of the second piece to one thread:
    # both pieces then lie in the same threads, and nothing is exchanged between them.
    o_b = KA + tl.arange(0, KB) + tl.minimum(position, 0)
    STRIDE: tl.constexpr = H * K
    p_k = keys_ptr + i_b * slots * STRIDE + i_h * K
    p_v = values_ptr + i_b * slots * STRIDE + i_h * K
    # log2(e): exp2 is the instruction there is.
    b_qa = tl.load(q_ptr + i_bh * K + o_a, mask=o_a < K, other=0.0).to(tl.float32) * (scale * 1.4426950408889634)
    b_qb = tl.load(q_ptr + i_bh * K + o_b, mask=o_b < K, other=0.0).to(tl.float32) * (scale * 1.4426950408889634)
    b_m = tl.full([BN], float("-inf"), tl.float32)
    b_l = tl.zeros([BN], tl.float32)
    b_oa, b_ob = tl.zeros([BN, KA], tl.float32), tl.zeros([BN, KB], tl.float32)
    b_ka = _load_slots(p_k, low + o_n, low + o_n < high, o_a, STRIDE, K, KA <= K)
    b_va = _load_slots(p_v, low + o_n, low + o_n < high, o_a, STRIDE, K, KA <= K)
    if KA < K:
        b_kb = _load_slots(p_k, low + o_n, low + o_n < high, o_b, STRIDE, K, KA + KB <= K)
        b_vb = _load_slots(p_v, low + o_n, low + o_n < high, o_b, STRIDE, K, KA + KB <= K)
    for start in range(low, high, BN):
        n, after = start + o_n, start + BN + o_n
        # The next slots are asked for before the ones in hand are used.
        b_ka_next = _load_slots(p_k, after, after < high, o_a, STRIDE, K, KA <= K)
        b_va_next = _load_slots(p_v, after, after < high, o_a, STRIDE, K, KA <= K)
        b_s = tl.sum(b_ka.to(tl.float32) * b_qa[None, :], 1)
        if KA < K:
            b_kb_next = _load_slots(p_k, after, after < high, o_b, STRIDE, K, KA + KB <= K)
            b_vb_next = _load_slots(p_v, after, after < high, o_b, STRIDE, K, KA + KB <= K)
            b_s += tl.sum(b_kb.to(tl.float32) * b_qb[None, :], 1)
        b_new = tl.where(n < high, tl.maximum(b_m, b_s), b_m)
        b_p = tl.where(n < high, tl.exp2(b_s - b_new), 0.0)
        b_keep = tl.where(b_l > 0, tl.exp2(b_m - b_new), 1.0)
        b_l = b_l * b_keep + b_p
        b_oa = b_oa * b_keep[:, None] + b_p[:, None] * b_va.to(tl.float32)
        b_m, b_ka, b_va = b_new, b_ka_next, b_va_next
        if KA < K:
            b_ob = b_ob * b_keep[:, None] + b_p[:, None] * b_vb.to(tl.float32)
            b_kb, b_vb = b_kb_next, b_vb_next
    m = tl.max(b_m, 0)
    b_weight = tl.where(b_l > 0, tl.exp2(b_m - m), 0.0)
    total = tl.sum(b_l * b_weight, 0)
    b_oa, b_ob = tl.sum(b_oa * b_weight[:, None], 0), tl.sum(b_ob * b_weight[:, None], 0)
    if SPLITS == 1:
        tl.store(o_ptr + i_bh * K + o_a, (b_oa / total).to(o_ptr.dtype.element_ty), mask=o_a < K)
        tl.store(o_ptr + i_bh * K + o_b, (b_ob / total).to(o_ptr.dtype.element_ty), mask=o_b < K)
    else:
        p_part = part_ptr + (i_bh * SPLITS + i_s) * (K + 2)
        tl.store(p_part + o_a, b_oa, mask=o_a < K)
        tl.store(p_part + o_b, b_ob, mask=o_b < K)
        tl.store(p_part + K, total)
        tl.store(p_part + K + 1, m)


@triton.jit
def _join_kernel(part_ptr, o_ptr, K: tl.constexpr, KP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr):
    """The parts of one head, each at its own scale, into one output."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_s, o_k = tl.arange(0, SP), tl.arange(0, KP)
    p_part = part_ptr + (i_bh * SPLITS + o_s) * (K + 2)
    b_m = tl.load(p_part + K + 1, mask=o_s < SPLITS, other=float("-inf"))
    b_l = tl.load(p_part + K, mask=o_s < SPLITS, other=0.0)
    b_weight = tl.where(b_l > 0, tl.exp2(b_m - tl.max(b_m, 0)), 0.0)
    b_o = tl.load(p_part[:, None] + o_k[None, :], mask=(o_s < SPLITS)[:, None] & (o_k < K)[None, :], other=0.0)
    o = tl.sum(b_o * b_weight[:, None], 0) / tl.sum(b_l * b_weight, 0)
    tl.store(o_ptr + i_bh * K + o_k, o.to(o_ptr.dtype.element_ty), mask=o_k < K)


@functools.lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def choose_splits(heads: int, slots: int, device: torch.device) -> int:
    """Into how many parts a cache is cut so that the programs fill the device about four times."""
    wanted = triton.cdiv(4 * _num_multiprocessors(device), heads)
    return max(1, min(wanted, slots // MIN_SLOTS_PER_SPLIT, MAX_SPLITS))


def choose_tile(k: int, dtype: torch.dtype) -> dict[str, int]:
    """How a row of k entries is cut, the lanes and the warps of a program."""
    whole = triton.next_power_of_2(k)
    # A row whose power of two is at least 3/4 full is read as one piece.
    first = whole if 4 * k >= 3 * whole else whole // 2
    lanes, warps = max(8, 4096 // first), 4
    if dtype.itemsize == 2 and k in TUNED:
        first, lanes, warps = TUNED[k]
    rest = triton.next_power_of_2(k - first) if k > first else 1
    return {"K": k, "KA": first, "KB": rest, "BN": lanes, "num_warps": warps}


@torch.library.custom_op(
    "zoology::cached_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor keys, Tensor values, Tensor position, float scale) -> Tensor",
)
def cached_attention_op(q, keys, values, position, scale):
    q = q.contiguous()
    (b, h, k), slots = q.shape, keys.shape[1]
    splits = choose_splits(b * h, slots, q.device)
    o = torch.empty_like(q)
    part = torch.empty(b * h, splits, k + 2, device=q.device, dtype=torch.float32) if splits > 1 else o
    _cached_attention_kernel[(b * h, splits)](
        q, keys, values, position, o, part, slots, scale, H=h, SPLITS=splits, **choose_tile(k, q.dtype)
    )
    if splits > 1:
        padded = {"KP": triton.next_power_of_2(k), "SP": triton.next_power_of_2(splits)}
        _join_kernel[(b * h,)](part, o, K=k, SPLITS=splits, num_warps=1, **padded)
    return o


@cached_attention_op.register_fake
def _(q, keys, values, position, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def cached_attention_triton(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, *, scale: float) -> Tensor:
    return torch.ops.zoology.cached_attention(q, keys, values, position, scale)
