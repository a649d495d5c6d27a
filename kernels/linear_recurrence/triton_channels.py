"""The linear recurrence with a decay per key channel in Triton, whole sequences at a time.

As `kernels.linear_recurrence.triton`, in chunks of 16 tokens. Within a chunk what token i reads of token j,
A_ij = sum_K q_i k_j exp(sum_{j < l <= i} g_l), is no product of matrices: its columns are computed one after the other
from the last on, each exponent being that of the column behind plus one more g. Only the gradient of g takes a
difference, q dq - k dk within a chunk, in which what a token reads of itself cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear_recurrence.triton_chunks import dot, put_rows, row_at, rows

LONGEST = {True: 16, False: 16}  # chunks, as in `kernels.linear_recurrence.triton_chunks`


@triton.jit
def _channel_decays(g_ptr, o_t, o_k, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """exp of the sums of g up to a token and behind a token [C, BK], and of the whole chunk [BK]."""
    o_c = tl.arange(0, C)
    b_g = rows(g_ptr, o_t, o_k, T, H, K)
    b_behind = tl.where((o_c < C - 1)[:, None], rows(g_ptr, o_t + 1, o_k, T, H, K), 0.0)
    return tl.exp(tl.cumsum(b_g, 0)), tl.exp(tl.cumsum(b_behind, 0, reverse=True)), tl.exp(tl.sum(b_g, 0))


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    initial_ptr,
    o_ptr,
    starts_ptr,
    last_ptr,
    T,
    HAS_INITIAL: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """o of one sequence, head and BV columns of values; the states before every chunk [N, K, V] and after the last."""
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    p_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    num = tl.cdiv(T, C)
    start, row = i_b * T * H + i_h, i_b * H + i_h
    b_s = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        b_s += tl.load(initial_ptr + row * K * V + p_s, mask=m_s, other=0.0)
    for i_c in range(0, num):
        o_t = i_c * C + o_c
        tl.store(starts_ptr + (row * num + i_c) * K * V + p_s, b_s, mask=m_s)
        b_q = rows(q_ptr + start * K, o_t, o_k, T, H, K)
        b_k = rows(k_ptr + start * K, o_t, o_k, T, H, K)
        b_v = rows(v_ptr + start * V, o_t, o_v, T, H, V)
        b_until, b_after, b_total = _channel_decays(g_ptr + start * K, o_t, o_k, T, H, K, C)
        b_a, b_sum = tl.zeros([C, C], tl.float32), tl.zeros([C, BK], tl.float32)
        for i in range(0, C):
            j = C - 1 - i
            from_j = (o_c >= j)[:, None]
            b_kj = row_at(k_ptr + start * K, i_c * C + j, T, o_k, H, K)
            b_aj = tl.sum(b_q * tl.exp(b_sum) * b_kj[None, :], 1)
            b_a = tl.where(from_j & (o_c == j)[None, :], b_aj[:, None], b_a)
            b_sum += tl.where(from_j, row_at(g_ptr + start * K, i_c * C + j, T, o_k, H, K)[None, :], 0.0)
        b_o = dot(b_a, b_v, OP, PREC) + dot(b_q * b_until, b_s, OP, PREC)
        put_rows(o_ptr + start * V, b_o, o_t, o_v, T, H, V)
        b_s = b_s * b_total[:, None] + dot(tl.trans(b_k * b_after), b_v, OP, PREC)
    tl.store(last_ptr + row * K * V + p_s, b_s, mask=m_s)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    starts_ptr,
    do_ptr,
    dlast_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dg_ptr,
    dinitial_ptr,
    T,
    HAS_DLAST: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """dv of one sequence, head and BV columns, and these columns' shares of dq, dk and dg [T, H, K]."""
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    p_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    num = tl.cdiv(T, C)
    start, row = i_b * T * H + i_h, i_b * H + i_h
    share = i_v.to(tl.int64) * tl.num_programs(2) * T * H + start
    b_ds = tl.zeros([BK, BV], tl.float32)
    if HAS_DLAST:
        b_ds += tl.load(dlast_ptr + row * K * V + p_s, mask=m_s, other=0.0)
    for i_n in range(0, num):
        i_c = num - 1 - i_n
        o_t = i_c * C + o_c
        b_q = rows(q_ptr + start * K, o_t, o_k, T, H, K)
        b_k = rows(k_ptr + start * K, o_t, o_k, T, H, K)
        b_v = rows(v_ptr + start * V, o_t, o_v, T, H, V)
        b_do = rows(do_ptr + start * V, o_t, o_v, T, H, V)
        b_s = tl.load(starts_ptr + (row * num + i_c) * K * V + p_s, mask=m_s, other=0.0)
        b_until, b_after, b_total = _channel_decays(g_ptr + start * K, o_t, o_k, T, H, K, C)
        b_da = dot(b_do, tl.trans(b_v), OP, PREC)
        b_a, b_sum = tl.zeros([C, C], tl.float32), tl.zeros([C, BK], tl.float32)
        b_dq, b_dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for i in range(0, C):
            j = C - 1 - i
            from_j, at_j = (o_c >= j)[:, None], (o_c == j)[None, :]
            b_kj = row_at(k_ptr + start * K, i_c * C + j, T, o_k, H, K)
            b_read = tl.where(from_j, b_q * tl.exp(b_sum), 0.0)
            b_a = tl.where(at_j, tl.sum(b_read * b_kj[None, :], 1)[:, None], b_a)
            b_daj = tl.sum(tl.where(at_j, b_da, 0.0), 1)
            b_dq += tl.where(from_j, b_daj[:, None] * tl.exp(b_sum) * b_kj[None, :], 0.0)
            b_dk = tl.where((o_c == j)[:, None], tl.sum(b_daj[:, None] * b_read, 0)[None, :], b_dk)
            b_sum += tl.where(from_j, row_at(g_ptr + start * K, i_c * C + j, T, o_k, H, K)[None, :], 0.0)
        b_from = dot(b_do, tl.trans(b_s), OP, PREC) * b_until
        b_into = dot(b_v, tl.trans(b_ds), OP, PREC) * b_after
        b_dv = dot(tl.trans(b_a), b_do, OP, PREC) + dot(b_k * b_after, b_ds, OP, PREC)
        b_left = b_k * b_into
        b_dg = tl.cumsum(b_q * b_dq - b_k * b_dk + b_q * b_from, 0, reverse=True)
        b_dg += tl.cumsum(b_left, 0) - b_left + (b_total * tl.sum(b_ds * b_s, 1))[None, :]
        put_rows(dq_ptr + share * K, b_dq + b_from, o_t, o_k, T, H, K)
        put_rows(dk_ptr + share * K, b_dk + b_into, o_t, o_k, T, H, K)
        put_rows(dv_ptr + start * V, b_dv, o_t, o_v, T, H, V)
        put_rows(dg_ptr + share * K, b_dg, o_t, o_k, T, H, K)
        b_ds = b_ds * b_total[:, None] + dot(tl.trans(b_q * b_until), b_do, OP, PREC)
    tl.store(dinitial_ptr + row * K * V + p_s, b_ds, mask=m_s)
