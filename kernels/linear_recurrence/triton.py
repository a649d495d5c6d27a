"""The linear recurrence in Triton, whole sequences at a time: its operator, and kernels for one decay a head and token.

A program walks over the chunks of one sequence, one head and a block of value columns, the state [K, V] in registers.
In a chunk that starts from S, with G_ij = sum_{j < l <= i} g_l (no sum is the difference of two: see `reference.py`),

    o_i = exp(sum_{l <= i} g_l) S^T q_i + sum_{j <= i} exp(G_ij) (q_i . k_j) v_j
    S'  = exp(sum_l g_l) S + sum_j exp(G_Cj) k_j v_j^T

Forwards the state before each chunk is kept; backwards a program walks from the last chunk to the first with dS. The
gradient of g_l adds up what every exponential that g_l is part of changes: W_ij = exp(G_ij) (q_i . k_j) (do_i . v_j)
for all j < l <= i, and the same for what is read from S and what is left in S'.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_recurrence import triton_channels
from kernels.linear_recurrence.triton_chunks import (
    LONGEST,
    decays,
    dot,
    keep,
    outputs,
    put_rows,
    rows,
    shares,
    states,
    tiles,
)


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
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
        b_pairs, b_until, b_after, b_total = decays(g_ptr + start, o_t, T, H, C)
        b_o = dot(dot(b_q, tl.trans(b_k), OP, PREC) * b_pairs, b_v, OP, PREC)
        b_o += dot(b_q * b_until[:, None], b_s, OP, PREC)
        put_rows(o_ptr + start * V, b_o, o_t, o_v, T, H, V)
        b_s = b_s * b_total + dot(tl.trans(b_k * b_after[:, None]), b_v, OP, PREC)
    tl.store(last_ptr + row * K * V + p_s, b_s, mask=m_s)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
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
    """dv of one sequence, head and BV columns, and these columns' shares of dq, dk [T, H, K] and dg [T, H]."""
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
        b_do = rows(do_ptr + start * V, o_t, o_v, T, H, V)
        b_s = tl.load(starts_ptr + (row * num + i_c) * K * V + p_s, mask=m_s, other=0.0)
        b_pairs, b_until, b_after, b_total = decays(g_ptr + start, o_t, T, H, C)
        b_a = dot(b_q, tl.trans(b_k), OP, PREC) * b_pairs
        b_da = dot(b_do, tl.trans(b_v), OP, PREC)
        b_w = tl.where(later, b_a * b_da, 0.0)  # [i, j]
        b_da *= b_pairs
        b_from = dot(b_do, tl.trans(b_s), OP, PREC) * b_until[:, None]
        b_into = dot(b_v, tl.trans(b_ds), OP, PREC) * b_after[:, None]
        b_dq = dot(b_da, b_k, OP, PREC) + b_from
        b_dk = dot(tl.trans(b_da), b_q, OP, PREC) + b_into
        b_dv = dot(tl.trans(b_a), b_do, OP, PREC) + dot(b_k * b_after[:, None], b_ds, OP, PREC)
        b_read, b_left = tl.sum(b_q * b_from, 1), tl.sum(b_k * b_into, 1)
        # At [l, j]: pairs of j with l or a later token; at [i, l] and [l, j] those with the chunk's start and end.
        b_dg = tl.sum(tl.where(later, tl.cumsum(b_w, 0, reverse=True), 0.0), 1)
        b_dg += tl.sum(tl.where(later, 0.0, b_read[None, :]), 1)
        b_dg += tl.sum(tl.where(later, b_left[None, :], 0.0), 1)
        b_dg += b_total * tl.sum(b_ds * b_s)
        put_rows(dq_ptr + share * K, b_dq, o_t, o_k, T, H, K)
        put_rows(dk_ptr + share * K, b_dk, o_t, o_k, T, H, K)
        put_rows(dv_ptr + start * V, b_dv, o_t, o_v, T, H, V)
        tl.store(dg_ptr + share + o_t * H, b_dg, mask=o_t < T)
        b_ds = b_ds * b_total + dot(tl.trans(b_q * b_until[:, None]), b_do, OP, PREC)
    tl.store(dinitial_ptr + row * K * V + p_s, b_ds, mask=m_s)


# In 16 bits, by the width that holds the keys: chunk; warps and stages of the loop forwards and backwards; as measured.
LAUNCH = {16: (16, (1, 1), (1, 2)), 32: (32, (2, 2), (2, 1)), 64: (32, (4, 2), (4, 2)), 128: (32, (4, 1), (8, 1))}


def launch(q: Tensor, v: Tensor, g: Tensor, *, backward: bool) -> tuple[tuple[int, int, int], dict]:
    """Grid and constants for q [B, T, H, K], v [B, T, H, V] and g [B, T, H] or [B, T, H, K]."""
    if g.ndim == 4:
        return tiles(q, v, triton_channels.LONGEST)
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    chunk, *settings = LAUNCH[width]
    grid, constants = tiles(q, v, {True: chunk, False: LONGEST[False]})
    warps, stages = settings[backward] if constants["OP"] == tl.bfloat16 else (8 if backward and width > 64 else 4, 1)
    return grid, constants | {"num_warps": warps, "num_stages": stages}


@torch.library.custom_op(
    "zoology::linear_recurrence",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial) -> (Tensor, Tensor, Tensor)",
)
def forward_op(q, k, v, g, initial):
    """q k [B, T, H, K], v [B, T, H, V], g [B, T, H] or like k, initial [B, H, K, V] -> o, starts, last."""
    q, k, v, g = (part.contiguous() for part in (q, k, v, g))
    grid, constants = launch(q, v, g, backward=False)
    o, starts, last = outputs(q, v, constants["C"])
    given = last if initial is None else initial.contiguous()
    kernel = triton_channels.forward_kernel if g.ndim == 4 else _forward_kernel
    kernel[grid](q, k, v, g, given, o, starts, last, q.shape[1], HAS_INITIAL=initial is not None, **constants)
    return o, starts, last


@forward_op.register_fake
def _(q, k, v, g, initial):
    return outputs(q, v, launch(q, v, g, backward=False)[1]["C"])


@torch.library.custom_op(
    "zoology::linear_recurrence_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor starts, Tensor d_o, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(q, k, v, g, starts, d_o, d_last):
    """Gradients of q, k and g by blocks of columns, of v, and of the initial state."""
    q, k, v, g, d_o = (part.contiguous() for part in (q, k, v, g, d_o))
    grid, constants = launch(q, v, g, backward=True)
    found = _gradients(q, k, v, g)
    inputs = q, k, v, g, starts, d_o, found[-1] if d_last is None else d_last.contiguous()
    kernel = triton_channels.backward_kernel if g.ndim == 4 else _backward_kernel
    kernel[grid](*inputs, *found, q.shape[1], HAS_DLAST=d_last is not None, **constants)
    return found


def _gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    blocks = launch(q, v, g, backward=True)[0][0]
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dg = g.new_empty(blocks, *g.shape, dtype=torch.float32)
    return shares(q, blocks), shares(k, blocks), dv, dg, states(q, v)


@backward_op.register_fake
def _(q, k, v, g, starts, d_o, d_last):
    return _gradients(q, k, v, g)


def _setup(ctx, inputs, output):
    *given, initial = inputs
    keep(ctx, (*given, output[1]), initial)


def _backward(ctx, d_o, _, d_last):
    q, k, v, g, starts = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o
    dq, dk, dv, dg, d_initial = torch.ops.zoology.linear_recurrence_backward(q, k, v, g, starts, d_o, d_last)
    dq, dk, dg = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dg.sum(0).to(g.dtype)
    return dq, dk, dv, dg, d_initial if ctx.has_initial else None


forward_op.register_autograd(_backward, setup_context=_setup)


def linear_recurrence_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_recurrence` with a decay, the state in the dtype of `initial_state` or float32."""
    initial = None if initial_state is None else initial_state.float()
    o, _, last = torch.ops.zoology.linear_recurrence(q, k, v, g, initial)
    return o, last if initial_state is None else last.to(initial_state.dtype)
