"""The delta rule of RWKV-7, a decay per key channel and a correction of rank one, in Triton, whole sequences at a time.

As `kernels.linear_recurrence.triton_channels`: a program walks over chunks of 16 tokens of one sequence, one head and a
block of value columns, with the state S [K, V] in registers; what tokens of a chunk read of each other is computed
column by column. In the notation of `reference.py`, with R what a token reads that it need not wait for,

    (I - A(a, b)) U = R = A(a, k) V + diag(exp(G_{i-1})) a S

and backwards, where dS is walked from the last chunk to the first, dR = (I - A(a, b))^-T dU and dA(a, b) = dR U^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.delta_rule.triton import inverse
from kernels.linear_recurrence.triton_channels import LONGEST
from kernels.linear_recurrence.triton_chunks import dot, keep, outputs, put_rows, row_at, rows, shares, states, tiles


@triton.jit
def _channel_decays(g_ptr, o_t, o_k, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """exp of the sums of g before, up to and behind a token [C, BK], and of the whole chunk [BK]."""
    o_c = tl.arange(0, C)
    b_g = rows(g_ptr, o_t, o_k, T, H, K)
    b_earlier = tl.where((o_c > 0)[:, None], rows(g_ptr, tl.maximum(o_t - 1, 0), o_k, T, H, K), 0.0)
    b_behind = tl.where((o_c < C - 1)[:, None], rows(g_ptr, o_t + 1, o_k, T, H, K), 0.0)
    b_after = tl.exp(tl.cumsum(b_behind, 0, reverse=True))
    return tl.exp(tl.cumsum(b_earlier, 0)), tl.exp(tl.cumsum(b_g, 0)), b_after, tl.exp(tl.sum(b_g, 0))


@triton.jit
def _pairs(
    q_ptr, k_ptr, a_ptr, b_ptr, g_ptr, first, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr
):
    """A(a, b), A(a, k), A(q, b) and A(q, k) [C, C] of the chunk at `first`, the first two strictly lower triangular."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    b_q, b_a = rows(q_ptr, first + o_c, o_k, T, H, K), rows(a_ptr, first + o_c, o_k, T, H, K)
    b_ab, b_ak = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    b_qb, b_qk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    b_before, b_until = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for i in range(0, C):
        j = C - 1 - i
        at_j = (o_c == j)[None, :]
        behind, from_j = (o_c > j)[:, None], (o_c >= j)[:, None]
        b_kj = row_at(k_ptr, first + j, T, o_k, H, K)[None, :]
        b_bj = row_at(b_ptr, first + j, T, o_k, H, K)[None, :]
        b_gj = row_at(g_ptr, first + j, T, o_k, H, K)[None, :]
        b_read_a = tl.where(behind, b_a * tl.exp(b_before), 0.0)
        b_read_q = tl.where(from_j, b_q * tl.exp(b_until), 0.0)
        b_ab = tl.where(at_j, tl.sum(b_read_a * b_bj, 1)[:, None], b_ab)
        b_ak = tl.where(at_j, tl.sum(b_read_a * b_kj, 1)[:, None], b_ak)
        b_qb = tl.where(at_j, tl.sum(b_read_q * b_bj, 1)[:, None], b_qb)
        b_qk = tl.where(at_j, tl.sum(b_read_q * b_kj, 1)[:, None], b_qk)
        b_before += tl.where(behind, b_gj, 0.0)
        b_until += tl.where(from_j, b_gj, 0.0)
    return b_ab, b_ak, b_qb, b_qk


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
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
    p_q, p_k, p_a, p_b, p_g = (
        q_ptr + start * K,
        k_ptr + start * K,
        a_ptr + start * K,
        b_ptr + start * K,
        g_ptr + start * K,
    )
    b_s = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        b_s += tl.load(initial_ptr + row * K * V + p_s, mask=m_s, other=0.0)
    for i_c in range(0, num):
        o_t = i_c * C + o_c
        tl.store(starts_ptr + (row * num + i_c) * K * V + p_s, b_s, mask=m_s)
        b_v = rows(v_ptr + start * V, o_t, o_v, T, H, V)
        b_ab, b_ak, b_qb, b_qk = _pairs(p_q, p_k, p_a, p_b, p_g, i_c * C, T, H, K, C, BK)
        b_before, b_until, b_after, b_total = _channel_decays(p_g, o_t, o_k, T, H, K, C)
        b_r = dot(b_ak, b_v, OP, PREC) + dot(rows(p_a, o_t, o_k, T, H, K) * b_before, b_s, OP, PREC)
        b_u = dot(inverse(-b_ab, C), b_r, OP, PREC)
        b_o = dot(b_qb, b_u, OP, PREC) + dot(b_qk, b_v, OP, PREC)
        b_o += dot(rows(p_q, o_t, o_k, T, H, K) * b_until, b_s, OP, PREC)
        put_rows(o_ptr + start * V, b_o, o_t, o_v, T, H, V)
        b_s = b_s * b_total[:, None] + dot(tl.trans(rows(p_b, o_t, o_k, T, H, K) * b_after), b_u, OP, PREC)
        b_s += dot(tl.trans(rows(p_k, o_t, o_k, T, H, K) * b_after), b_v, OP, PREC)
    tl.store(last_ptr + row * K * V + p_s, b_s, mask=m_s)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
    g_ptr,
    starts_ptr,
    do_ptr,
    dlast_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    da_ptr,
    db_ptr,
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
    """dv of one sequence, head and BV columns, and these columns' shares of dq, dk, da, db and dg [T, H, K]."""
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    p_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    num = tl.cdiv(T, C)
    start, row = i_b * T * H + i_h, i_b * H + i_h
    share = (i_v.to(tl.int64) * tl.num_programs(2) * T * H + start) * K
    p_q, p_k, p_a, p_b, p_g = (
        q_ptr + start * K,
        k_ptr + start * K,
        a_ptr + start * K,
        b_ptr + start * K,
        g_ptr + start * K,
    )
    b_ds = tl.zeros([BK, BV], tl.float32)
    if HAS_DLAST:
        b_ds += tl.load(dlast_ptr + row * K * V + p_s, mask=m_s, other=0.0)
    for i_n in range(0, num):
        i_c = num - 1 - i_n
        o_t = i_c * C + o_c
        b_v, b_do = rows(v_ptr + start * V, o_t, o_v, T, H, V), rows(do_ptr + start * V, o_t, o_v, T, H, V)
        b_s = tl.load(starts_ptr + (row * num + i_c) * K * V + p_s, mask=m_s, other=0.0)
        b_ab, b_ak, b_qb, b_qk = _pairs(p_q, p_k, p_a, p_b, p_g, i_c * C, T, H, K, C, BK)
        b_before, b_until, b_after, b_total = _channel_decays(p_g, o_t, o_k, T, H, K, C)
        b_a, b_b = rows(p_a, o_t, o_k, T, H, K), rows(p_b, o_t, o_k, T, H, K)
        b_q, b_k = rows(p_q, o_t, o_k, T, H, K), rows(p_k, o_t, o_k, T, H, K)
        b_inverse = inverse(-b_ab, C)
        b_u = dot(b_inverse, dot(b_ak, b_v, OP, PREC) + dot(b_a * b_before, b_s, OP, PREC), OP, PREC)
        b_du = dot(tl.trans(b_qb), b_do, OP, PREC) + dot(b_b * b_after, b_ds, OP, PREC)
        b_dr = dot(tl.trans(b_inverse), b_du, OP, PREC)
        b_dv = dot(tl.trans(b_qk), b_do, OP, PREC) + dot(b_k * b_after, b_ds, OP, PREC)
        put_rows(dv_ptr + start * V, b_dv + dot(tl.trans(b_ak), b_dr, OP, PREC), o_t, o_v, T, H, V)
        # By pairs of tokens, columns from the last on, as in `_pairs`.
        b_dab, b_dak = dot(b_dr, tl.trans(b_u), OP, PREC), dot(b_dr, tl.trans(b_v), OP, PREC)
        b_dqb, b_dqk = dot(b_do, tl.trans(b_u), OP, PREC), dot(b_do, tl.trans(b_v), OP, PREC)
        b_dq, b_da = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        b_dk, b_db = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        b_sum_a, b_sum_q = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for i in range(0, C):
            j = C - 1 - i
            at_j, here = (o_c == j)[None, :], (o_c == j)[:, None]
            behind, from_j = (o_c > j)[:, None], (o_c >= j)[:, None]
            b_kj = row_at(p_k, i_c * C + j, T, o_k, H, K)[None, :]
            b_bj = row_at(p_b, i_c * C + j, T, o_k, H, K)[None, :]
            b_gj = row_at(p_g, i_c * C + j, T, o_k, H, K)[None, :]
            b_ea, b_eq = tl.where(behind, tl.exp(b_sum_a), 0.0), tl.where(from_j, tl.exp(b_sum_q), 0.0)
            b_dabj, b_dakj = tl.sum(tl.where(at_j, b_dab, 0.0), 1), tl.sum(tl.where(at_j, b_dak, 0.0), 1)
            b_dqbj, b_dqkj = tl.sum(tl.where(at_j, b_dqb, 0.0), 1), tl.sum(tl.where(at_j, b_dqk, 0.0), 1)
            b_da += b_ea * (b_dabj[:, None] * b_bj + b_dakj[:, None] * b_kj)
            b_dq += b_eq * (b_dqbj[:, None] * b_bj + b_dqkj[:, None] * b_kj)
            b_ra, b_rq = b_ea * b_a, b_eq * b_q
            b_dbj = tl.sum(b_dabj[:, None] * b_ra + b_dqbj[:, None] * b_rq, 0)
            b_dkj = tl.sum(b_dakj[:, None] * b_ra + b_dqkj[:, None] * b_rq, 0)
            b_db, b_dk = tl.where(here, b_dbj[None, :], b_db), tl.where(here, b_dkj[None, :], b_dk)
            b_sum_a += tl.where(behind, b_gj, 0.0)
            b_sum_q += tl.where(from_j, b_gj, 0.0)
        # By way of the states at both ends of the chunk.
        b_from_q, b_from_a = dot(b_do, tl.trans(b_s), OP, PREC) * b_until, dot(b_dr, tl.trans(b_s), OP, PREC) * b_before
        b_into_k, b_into_b = dot(b_v, tl.trans(b_ds), OP, PREC) * b_after, dot(b_u, tl.trans(b_ds), OP, PREC) * b_after
        b_upto = b_q * (b_dq + b_from_q) - b_b * b_db - b_k * b_dk
        b_later = b_a * (b_da + b_from_a)
        b_left = b_b * b_into_b + b_k * b_into_k
        b_dg = tl.cumsum(b_upto, 0, reverse=True) + tl.cumsum(b_later, 0, reverse=True) - b_later
        b_dg += tl.cumsum(b_left, 0) - b_left + (b_total * tl.sum(b_ds * b_s, 1))[None, :]
        put_rows(dq_ptr + share, b_dq + b_from_q, o_t, o_k, T, H, K)
        put_rows(dk_ptr + share, b_dk + b_into_k, o_t, o_k, T, H, K)
        put_rows(da_ptr + share, b_da + b_from_a, o_t, o_k, T, H, K)
        put_rows(db_ptr + share, b_db + b_into_b, o_t, o_k, T, H, K)
        put_rows(dg_ptr + share, b_dg, o_t, o_k, T, H, K)
        b_ds = b_ds * b_total[:, None] + dot(tl.trans(b_q * b_until), b_do, OP, PREC)
        b_ds += dot(tl.trans(b_a * b_before), b_dr, OP, PREC)
    tl.store(dinitial_ptr + row * K * V + p_s, b_ds, mask=m_s)


@torch.library.custom_op(
    "zoology::dplr_delta_rule",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor g, Tensor? initial) -> (Tensor, Tensor, Tensor)",
)
def forward_op(q, k, v, a, b, g, initial):
    """q k a b g [B, T, H, K], v [B, T, H, V], initial [B, H, K, V] -> o, states before chunks, the last state."""
    q, k, v, a, b, g = (part.contiguous() for part in (q, k, v, a, b, g))
    grid, constants = tiles(q, v, LONGEST)
    o, starts, last = outputs(q, v, constants["C"])
    inputs = q, k, v, a, b, g, last if initial is None else initial.contiguous()
    _forward_kernel[grid](*inputs, o, starts, last, q.shape[1], HAS_INITIAL=initial is not None, **constants)
    return o, starts, last


@forward_op.register_fake
def _(q, k, v, a, b, g, initial):
    return outputs(q, v, tiles(q, v, LONGEST)[1]["C"])


@torch.library.custom_op(
    "zoology::dplr_delta_rule_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor g, Tensor starts, Tensor d_o, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(q, k, v, a, b, g, starts, d_o, d_last):
    """Gradients of q, k, v, a, b and g, all but that of v by blocks of columns, and of the initial state."""
    q, k, v, a, b, g, d_o = (part.contiguous() for part in (q, k, v, a, b, g, d_o))
    grid, constants = tiles(q, v, LONGEST)
    found = _gradients(q, v, g)
    inputs = q, k, v, a, b, g, starts, d_o, found[-1] if d_last is None else d_last.contiguous()
    _backward_kernel[grid](*inputs, *found, q.shape[1], HAS_DLAST=d_last is not None, **constants)
    return found


def _gradients(q: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    blocks = tiles(q, v, LONGEST)[0][0]
    dq, dk, da, db = (shares(q, blocks) for _ in range(4))
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dg = g.new_empty(blocks, *g.shape, dtype=torch.float32)
    return dq, dk, dv, da, db, dg, states(q, v)


@backward_op.register_fake
def _(q, k, v, a, b, g, starts, d_o, d_last):
    return _gradients(q, v, g)


def _setup(ctx, inputs, output):
    *given, initial = inputs
    keep(ctx, (*given, output[1]), initial)


def _backward(ctx, d_o, _, d_last):
    q, k, v, a, b, g, starts = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o
    found = torch.ops.zoology.dplr_delta_rule_backward(q, k, v, a, b, g, starts, d_o, d_last)
    dq, dk, da, db = (found[i].sum(0).to(q.dtype) for i in (0, 1, 3, 4))
    return dq, dk, found[2], da, db, found[5].sum(0).to(g.dtype), found[6] if ctx.has_initial else None


forward_op.register_autograd(_backward, setup_context=_setup)


def dplr_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`dplr_delta_rule`, the state in the dtype of `initial_state` or float32."""
    initial = None if initial_state is None else initial_state.float()
    o, _, last = torch.ops.zoology.dplr_delta_rule(q, k, v, a, b, g, initial)
    o = o if scale == 1 else o * scale
    return o, last if initial_state is None else last.to(initial_state.dtype)
