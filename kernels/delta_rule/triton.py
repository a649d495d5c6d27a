"""The delta rule with one decay per head and token, or none, in Triton, whole sequences at a time.

A program walks over the chunks of one sequence, one head and a block of value columns, the state S [K, V] in registers.
With G as in `kernels.linear_recurrence.triton`, what the tokens of a chunk write, u, solves a triangular system, and
the rest is the linear recurrence of the values w:

    (I + N) U = V - diag(exp(sum_{l <= i} g_l)) K S,    N_ij = beta_j exp(G_ij) k_i . k_j if j < i,    w_j = beta_j u_j

The inverse of I + N is built row by row, as products of its powers would lose what alike keys have in common. Forwards
it is kept, with the state before each chunk; backwards a program walks from the last chunk to the first with dS:

    dU = beta dW,    dR = (I + N)^-T dU = dV,    dN = -dR U^T
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_recurrence.triton_chunks import decays, dot, keep, outputs, put_rows, rows, shares, states, tiles


@triton.jit
def inverse(n, C: tl.constexpr):
    """(I + n)^-1 for a strictly lower triangular n [C, C]: row i is that of I less n_i times the rows before."""
    o_c = tl.arange(0, C)
    unit = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)
    found = unit
    for i in range(1, C):
        here = o_c[:, None] == i
        n_i = tl.sum(tl.where(here, n, 0.0), 0)
        row = tl.sum(n_i[:, None] * found, 0)
        found = tl.where(here, unit - row[None, :], found)
    return found


@triton.jit
def _chunk_decays(g_ptr, o_t, T, HAS_G: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """`decays`, all of them 1 without g."""
    if HAS_G:
        return decays(g_ptr, o_t, T, H, C)
    o_c = tl.arange(0, C)
    one = tl.full([C], 1.0, tl.float32)
    return tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0), one, one, tl.sum(tl.where(o_c == 0, 1.0, 0.0), 0)


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    g_ptr,
    initial_ptr,
    o_ptr,
    inverses_ptr,
    starts_ptr,
    last_ptr,
    scale,
    T,
    HAS_INITIAL: tl.constexpr,
    HAS_G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """o of one sequence, head and BV columns; inverse [C, C] and state before each chunk, and the last state."""
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    p_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    num = tl.cdiv(T, C)
    start, row = i_b * T * H + i_h, i_b * H + i_h
    later = o_c[:, None] > o_c[None, :]
    b_s = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        b_s += tl.load(initial_ptr + row * K * V + p_s, mask=m_s, other=0.0)
    for i_c in range(0, num):
        o_t = i_c * C + o_c
        tl.store(starts_ptr + (row * num + i_c) * K * V + p_s, b_s, mask=m_s)
        b_q = rows(q_ptr + start * K, o_t, o_k, T, H, K)
        b_k = rows(k_ptr + start * K, o_t, o_k, T, H, K)
        b_v = rows(v_ptr + start * V, o_t, o_v, T, H, V)
        b_beta = tl.load(beta_ptr + start + o_t * H, mask=o_t < T, other=0.0).to(tl.float32)
        b_pairs, b_until, b_after, b_total = _chunk_decays(g_ptr + start, o_t, T, HAS_G, H, C)
        b_n = tl.where(later, dot(b_k, tl.trans(b_k), OP, PREC) * b_pairs * b_beta[None, :], 0.0)
        b_inverse = inverse(b_n, C)
        if i_v == 0:
            p_inverse = inverses_ptr + (row * num + i_c) * C * C + o_c[:, None] * C + o_c[None, :]
            tl.store(p_inverse, b_inverse)
        b_u = dot(b_inverse, b_v - dot(b_k, b_s, OP, PREC) * b_until[:, None], OP, PREC)
        b_w = b_u * b_beta[:, None]
        b_o = dot(dot(b_q, tl.trans(b_k), OP, PREC) * b_pairs, b_w, OP, PREC)
        b_o += dot(b_q * b_until[:, None], b_s, OP, PREC)
        put_rows(o_ptr + start * V, b_o * scale, o_t, o_v, T, H, V)
        b_s = b_s * b_total + dot(tl.trans(b_k * b_after[:, None]), b_w, OP, PREC)
    tl.store(last_ptr + row * K * V + p_s, b_s, mask=m_s)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    g_ptr,
    inverses_ptr,
    starts_ptr,
    do_ptr,
    dlast_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dbeta_ptr,
    dg_ptr,
    dinitial_ptr,
    scale,
    T,
    HAS_DLAST: tl.constexpr,
    HAS_G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """dv of one sequence, head and BV columns, and these columns' shares of dq, dk [T, H, K], dbeta and dg [T, H]."""
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    p_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    num = tl.cdiv(T, C)
    start, row = i_b * T * H + i_h, i_b * H + i_h
    share = i_v.to(tl.int64) * tl.num_programs(2) * T * H + start
    later = o_c[:, None] > o_c[None, :]
    b_ds = tl.zeros([BK, BV], tl.float32)
    if HAS_DLAST:
        b_ds += tl.load(dlast_ptr + row * K * V + p_s, mask=m_s, other=0.0)
    for i in range(0, num):
        i_c = num - 1 - i
        o_t = i_c * C + o_c
        b_q = rows(q_ptr + start * K, o_t, o_k, T, H, K)
        b_k = rows(k_ptr + start * K, o_t, o_k, T, H, K)
        b_v = rows(v_ptr + start * V, o_t, o_v, T, H, V)
        b_do = rows(do_ptr + start * V, o_t, o_v, T, H, V) * scale
        b_beta = tl.load(beta_ptr + start + o_t * H, mask=o_t < T, other=0.0).to(tl.float32)
        b_s = tl.load(starts_ptr + (row * num + i_c) * K * V + p_s, mask=m_s, other=0.0)
        b_inverse = tl.load(inverses_ptr + (row * num + i_c) * C * C + o_c[:, None] * C + o_c[None, :])
        b_pairs, b_until, b_after, b_total = _chunk_decays(g_ptr + start, o_t, T, HAS_G, H, C)
        b_u = dot(b_inverse, b_v - dot(b_k, b_s, OP, PREC) * b_until[:, None], OP, PREC)
        b_w = b_u * b_beta[:, None]
        b_a = dot(b_q, tl.trans(b_k), OP, PREC) * b_pairs
        b_dw = dot(tl.trans(b_a), b_do, OP, PREC) + dot(b_k * b_after[:, None], b_ds, OP, PREC)
        b_dr = dot(tl.trans(b_inverse), b_dw * b_beta[:, None], OP, PREC)
        put_rows(dv_ptr + start * V, b_dr, o_t, o_v, T, H, V)
        b_da = dot(b_do, tl.trans(b_w), OP, PREC)
        b_dn = tl.where(later, -dot(b_dr, tl.trans(b_u), OP, PREC) * b_pairs, 0.0)
        b_kk = dot(b_k, tl.trans(b_k), OP, PREC)
        # dn times n, and da times a, are what a decay between two tokens changes.
        b_changes = tl.where(later, b_a * b_da, 0.0) + b_dn * b_kk * b_beta[None, :]
        b_da *= b_pairs
        b_from = dot(b_do, tl.trans(b_s), OP, PREC) * b_until[:, None]
        b_into = dot(b_w, tl.trans(b_ds), OP, PREC) * b_after[:, None]
        b_back = -dot(b_dr, tl.trans(b_s), OP, PREC) * b_until[:, None]
        b_m = b_dn * b_beta[None, :]
        put_rows(dq_ptr + share * K, dot(b_da, b_k, OP, PREC) + b_from, o_t, o_k, T, H, K)
        b_dk = dot(tl.trans(b_da), b_q, OP, PREC) + b_into + b_back
        b_dk += dot(b_m, b_k, OP, PREC) + dot(tl.trans(b_m), b_k, OP, PREC)
        put_rows(dk_ptr + share * K, b_dk, o_t, o_k, T, H, K)
        tl.store(dbeta_ptr + share + o_t * H, tl.sum(b_dw * b_u, 1) + tl.sum(b_dn * b_kk, 0), mask=o_t < T)
        if HAS_G:
            b_read = tl.sum(b_q * b_from, 1) + tl.sum(b_k * b_back, 1)
            b_left = tl.sum(b_k * b_into, 1)
            b_dg = tl.sum(tl.where(later, tl.cumsum(b_changes, 0, reverse=True), 0.0), 1)
            b_dg += tl.sum(tl.where(later, 0.0, b_read[None, :]), 1)
            b_dg += tl.sum(tl.where(later, b_left[None, :], 0.0), 1)
            b_dg += b_total * tl.sum(b_ds * b_s)
            tl.store(dg_ptr + share + o_t * H, b_dg, mask=o_t < T)
        b_ds = b_ds * b_total + dot(tl.trans(b_q * b_until[:, None]), b_do, OP, PREC)
        b_ds -= dot(tl.trans(b_k * b_until[:, None]), b_dr, OP, PREC)
    tl.store(dinitial_ptr + row * K * V + p_s, b_ds, mask=m_s)


def launch(q: Tensor, v: Tensor, *, backward: bool) -> tuple[tuple[int, int, int], dict]:
    """Grid and constants for q [B, T, H, K] and v [B, T, H, V]."""
    grid, constants = tiles(q, v)
    return grid, constants | {"num_warps": 8 if backward and constants["BK"] > 64 else 4}


@torch.library.custom_op(
    "zoology::delta_rule",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def forward_op(q, k, v, beta, g, initial, scale):
    """q k [B, T, H, K], v [B, T, H, V], beta g [B, T, H], initial [B, H, K, V] -> o, inverses, starts, last."""
    q, k, v, beta = (part.contiguous() for part in (q, k, v, beta))
    grid, constants = launch(q, v, backward=False)
    found = _outputs(q, v)
    decay = beta if g is None else g.contiguous()
    inputs = q, k, v, beta, decay, found[-1] if initial is None else initial.contiguous()
    flags = {"HAS_INITIAL": initial is not None, "HAS_G": g is not None}
    _forward_kernel[grid](*inputs, *found, scale, q.shape[1], **flags, **constants)
    return found


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    chunk = launch(q, v, backward=False)[1]["C"]
    o, starts, last = outputs(q, v, chunk)
    return o, q.new_empty(*starts.shape[:3], chunk, chunk, dtype=torch.float32), starts, last


@forward_op.register_fake
def _(q, k, v, beta, g, initial, scale):
    return _outputs(q, v)


@torch.library.custom_op(
    "zoology::delta_rule_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor inverses, Tensor starts, Tensor d_o,"
    " Tensor? d_last, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(q, k, v, beta, g, inverses, starts, d_o, d_last, scale):
    """Gradients of q, k, beta and g by blocks of columns, of v, and of the initial state; that of g empty without g."""
    q, k, v, beta, d_o = (part.contiguous() for part in (q, k, v, beta, d_o))
    grid, constants = launch(q, v, backward=True)
    found = _gradients(q, k, v, beta, g)
    decay = beta if g is None else g.contiguous()
    inputs = q, k, v, beta, decay, inverses, starts, d_o, found[-1] if d_last is None else d_last.contiguous()
    flags = {"HAS_DLAST": d_last is not None, "HAS_G": g is not None}
    _backward_kernel[grid](*inputs, *found, scale, q.shape[1], **flags, **constants)
    return found


def _gradients(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> tuple[Tensor, ...]:
    blocks = launch(q, v, backward=True)[0][0]
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dbeta = beta.new_empty(blocks, *beta.shape, dtype=torch.float32)
    dg = beta.new_empty(0 if g is None else blocks, *beta.shape, dtype=torch.float32)
    return shares(q, blocks), shares(k, blocks), dv, dbeta, dg, states(q, v)


@backward_op.register_fake
def _(q, k, v, beta, g, inverses, starts, d_o, d_last, scale):
    return _gradients(q, k, v, beta, g)


def _setup(ctx, inputs, output):
    q, k, v, beta, g, initial, ctx.scale = inputs
    keep(ctx, (q, k, v, beta, g, *output[1:3]), initial)


def _backward(ctx, d_o, _, __, d_last):
    q, k, v, beta, g, inverses, starts = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o
    dq, dk, dv, dbeta, dg, d_initial = torch.ops.zoology.delta_rule_backward(
        q, k, v, beta, g, inverses, starts, d_o, d_last, ctx.scale
    )
    dq, dk, dbeta = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dbeta.sum(0).to(beta.dtype)
    return dq, dk, dv, dbeta, None if g is None else dg.sum(0).to(g.dtype), d_initial if ctx.has_initial else None, None


forward_op.register_autograd(_backward, setup_context=_setup)


def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`delta_rule` with g [B, T, H] or None, the state in the dtype of `initial_state` or float32."""
    initial = None if initial_state is None else initial_state.float()
    o, _, _, last = torch.ops.zoology.delta_rule(q, k, v, beta, g, initial, scale)
    return o, last if initial_state is None else last.to(initial_state.dtype)
