"""The linear recurrence with a decay per key channel in Triton, whole sequences at a time.

As `kernels.linear_recurrence.triton`, in chunks of 16 tokens. Within a chunk what token i reads of token j,
A_ij = sum_K q_i k_j exp(sum_{j < l <= i} g_l), is no product of matrices: its columns are computed one after the other
from the last on, each exponent being that of the column behind plus one more g. Only the gradient of g takes a
difference, q dq - k dk within a chunk, in which what a token reads of itself cancels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_recurrence.triton import dot, put_rows, rows
from kernels.triton_support import INTERPRETED

MAX_VALUES = 64  # value columns of a program
CHUNK = 16


@triton.jit
def row_at(p, t, T, o_x, H: tl.constexpr, X: tl.constexpr):
    """[BX] in float32, row t of one sequence and head of [T, H, X] at p, zero outside."""
    return tl.load(p + t * (H * X) + o_x, mask=(o_x < X) & (t < T), other=0.0).to(tl.float32)


@triton.jit
def _channel_decays(g_ptr, o_t, o_k, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """exp of the sums of g up to a token and behind a token [C, BK], and of the whole chunk [BK]."""
    o_c = tl.arange(0, C)
    b_g = rows(g_ptr, o_t, o_k, T, H, K)
    b_behind = tl.where((o_c < C - 1)[:, None], rows(g_ptr, o_t + 1, o_k, T, H, K), 0.0)
    return tl.exp(tl.cumsum(b_g, 0)), tl.exp(tl.cumsum(b_behind, 0, reverse=True)), tl.exp(tl.sum(b_g, 0))


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


def launch(q: Tensor, v: Tensor) -> tuple[tuple[int, int, int], dict]:
    """Grid and constants for q [B, T, H, K] and v [B, T, H, V]."""
    (b, _, heads, width), values = q.shape, v.shape[-1]
    block_v = min(MAX_VALUES, max(16, triton.next_power_of_2(values)))
    block_k = max(16, triton.next_power_of_2(width))
    # As in `kernels.linear_recurrence.triton`.
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    narrow = q.dtype == torch.bfloat16 and not INTERPRETED
    op, prec = (tl.bfloat16, "tf32") if narrow else (tl.float32, "tf32x3" if exact else "tf32")
    constants = {"H": heads, "K": width, "V": values, "C": CHUNK, "BK": block_k, "BV": block_v, "OP": op, "PREC": prec}
    return (triton.cdiv(values, block_v), heads, b), constants | {"num_warps": 4, "num_stages": 1}


@torch.library.custom_op(
    "zoology::channel_recurrence",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial) -> (Tensor, Tensor, Tensor)",
)
def forward_op(q, k, v, g, initial):
    """q k g [B, T, H, K], v [B, T, H, V], initial [B, H, K, V] -> o, states before chunks, the last state."""
    q, k, v, g = (part.contiguous() for part in (q, k, v, g))
    grid, constants = launch(q, v)
    o, starts, last = _outputs(q, v)
    given = last if initial is None else initial.contiguous()
    _forward_kernel[grid](q, k, v, g, given, o, starts, last, q.shape[1], HAS_INITIAL=initial is not None, **constants)
    return o, starts, last


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (b, t, heads, width), values = q.shape, v.shape[-1]
    starts = q.new_empty(b, heads, -(-t // CHUNK), width, values, dtype=torch.float32)
    last = q.new_empty(b, heads, width, values, dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), starts, last


@forward_op.register_fake
def _(q, k, v, g, initial):
    return _outputs(q, v)


@torch.library.custom_op(
    "zoology::channel_recurrence_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor starts, Tensor d_o, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(q, k, v, g, starts, d_o, d_last):
    """Gradients of q, k and g by blocks of columns, of v, and of the initial state."""
    q, k, v, g, d_o = (part.contiguous() for part in (q, k, v, g, d_o))
    grid, constants = launch(q, v)
    outputs = dq, dk, dv, dg, d_initial = _gradients(q, k, v, g)
    inputs = q, k, v, g, starts, d_o, d_initial if d_last is None else d_last.contiguous()
    _backward_kernel[grid](*inputs, *outputs, q.shape[1], HAS_DLAST=d_last is not None, **constants)
    return dq, dk, dv, dg, d_initial


def _gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    blocks = launch(q, v)[0][0]
    # A single share is the gradient itself, and as wide as that.
    dq, dk = (
        part.new_empty(blocks, *part.shape, dtype=part.dtype if blocks == 1 else torch.float32) for part in (q, k)
    )
    dg = g.new_empty(blocks, *g.shape, dtype=torch.float32)
    d_initial = q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return dq, dk, torch.empty_like(v, memory_format=torch.contiguous_format), dg, d_initial


@backward_op.register_fake
def _(q, k, v, g, starts, d_o, d_last):
    return _gradients(q, k, v, g)


def _setup(ctx, inputs, output):
    *given, initial = inputs
    ctx.save_for_backward(*given, output[1])
    ctx.has_initial = initial is not None
    ctx.set_materialize_grads(False)  # zeros for the kept states would be as large as they are


def _backward(ctx, d_o, _, d_last):
    q, k, v, g, starts = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o
    dq, dk, dv, dg, d_initial = torch.ops.zoology.channel_recurrence_backward(q, k, v, g, starts, d_o, d_last)
    dq, dk, dg = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dg.sum(0).to(g.dtype)
    return dq, dk, dv, dg, d_initial if ctx.has_initial else None


forward_op.register_autograd(_backward, setup_context=_setup)


def channel_recurrence_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_recurrence` with g [B, T, H, K], the state in the dtype of `initial_state` or float32."""
    initial = None if initial_state is None else initial_state.float()
    o, _, last = torch.ops.zoology.channel_recurrence(q, k, v, g, initial)
    return o, last if initial_state is None else last.to(initial_state.dtype)
