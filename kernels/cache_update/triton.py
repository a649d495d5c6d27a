"""A new token for a cache of keys and values in Triton: one kernel turns and writes all three of its parts."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_update.reference import frequencies

BLOCK = 2048


@triton.jit
def _cache_update_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    frequency_ptr,
    new_q_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    slots,
    H,
    K: tl.constexpr,
    KC: tl.constexpr,
    HALF: tl.constexpr,
    HB: tl.constexpr,
    KP: tl.constexpr,
):
    """HB heads of one token: q -> new_q [B, H, KC] and k -> keys turned, v -> values, filled up with zeros.

    Entry i < HALF and entry i + HALF are a pair (a, b): a cos - b sin and b cos + a sin.
    """
    i_b, i_what = tl.program_id(0).to(tl.int64), tl.program_id(2)
    o_h = tl.program_id(1) * HB + tl.arange(0, HB)
    o_k = tl.arange(0, KP)
    m = (o_h < H)[:, None] & (o_k < K)[None, :]
    position = tl.load(position_ptr)
    o_new = ((i_b * slots + position % slots) * H + o_h[:, None]) * KC + o_k[None, :]
    m_new = (o_h < H)[:, None] & (o_k < KC)[None, :]
    if i_what == 2:
        b_v = tl.load(v_ptr + i_b * v_row + o_h[:, None] * v_head + o_k[None, :], mask=m, other=0.0)
        tl.store(values_ptr + o_new, b_v, mask=m_new)
    else:
        p_x = tl.where(i_what == 0, q_ptr + i_b * q_row, k_ptr + i_b * k_row)
        head = tl.where(i_what == 0, q_head, k_head)
        b_x = tl.load(p_x + o_h[:, None] * head + o_k[None, :], mask=m, other=0.0)
        if HALF > 0:
            m_turned = o_k < 2 * HALF
            first = o_k < HALF
            o_other = tl.where(first, o_k + HALF, o_k - HALF)
            o_f = tl.where(first, o_k, o_k - HALF)
            b_f = tl.load(frequency_ptr + o_f, mask=m_turned, other=0.0)
            # Whole turns are taken off while there are digits.
            b_turns = position.to(tl.float64) * b_f * 0.15915494309189535
            b_angle = ((b_turns - tl.floor(b_turns + 0.5)) * 6.283185307179586).to(tl.float32)
            b_sin = tl.where(first, -tl.sin(b_angle), tl.sin(b_angle))
            b_other = tl.load(p_x + o_h[:, None] * head + o_other[None, :], mask=m & m_turned[None, :], other=0.0).to(
                tl.float32
            )
            b_turned = b_x.to(tl.float32) * tl.cos(b_angle)[None, :] + b_other * b_sin[None, :]
            b_x = tl.where(m_turned[None, :], b_turned.to(b_x.dtype), b_x)
        if i_what == 0:
            tl.store(new_q_ptr + (i_b * H + o_h[:, None]) * KC + o_k[None, :], b_x, mask=m_new)
        else:
            tl.store(keys_ptr + o_new, b_x, mask=m_new)


@functools.lru_cache(maxsize=16)
def _frequencies(turned: int, base: float, device: torch.device) -> Tensor:
    return frequencies(turned, base, device)


@torch.library.custom_op(
    "zoology::cache_update_",
    mutates_args=("keys", "values"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, int turned, float base)"
        " -> Tensor"
    ),
)
def cache_update_op(q, k, v, keys, values, position, turned, base):
    # Parts of one projection come as they are: rows and heads may lie apart, entries of a head may not.
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    (b, h, width), wide = q.shape, keys.shape[3]
    padded = triton.next_power_of_2(wide)
    heads = min(max(1, BLOCK // padded), triton.next_power_of_2(h))
    new_q = torch.empty(b, h, wide, device=q.device, dtype=q.dtype)
    _cache_update_kernel[(b, triton.cdiv(h, heads), 3)](
        q,
        k,
        v,
        keys,
        values,
        position,
        _frequencies(turned, base, q.device) if turned else q,
        new_q,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        keys.shape[1],
        h,
        K=width,
        KC=wide,
        HALF=turned // 2,
        HB=heads,
        KP=padded,
        num_warps=4,
    )
    return new_q


@cache_update_op.register_fake
def _(q, k, v, keys, values, position, turned, base):
    return q.new_empty(*q.shape[:2], keys.shape[3])


def cache_update_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    turned: int,
    base: float,
) -> Tensor:
    return torch.ops.zoology.cache_update_(q, k, v, keys, values, position, turned, base)
