"""The linear recurrence with one decay per head and token in Triton, whole sequences at a time.

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

from kernels.triton_support import INTERPRETED

MAX_VALUES = 64  # value columns of a program
CHUNK = {True: 32, False: 16}  # by whether operands are of 16 bits: longer ones take more registers than there are


@triton.jit
def operand(x, OP: tl.constexpr, PREC: tl.constexpr):
    """An operand of a product; for tf32 rounded, where the tensor cores would cut digits off."""
    x = x.to(OP)
    if PREC == "tf32" and x.dtype != tl.bfloat16:
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot(x, y, OP: tl.constexpr, PREC: tl.constexpr):
    return tl.dot(operand(x, OP, PREC), operand(y, OP, PREC), input_precision=PREC)


@triton.jit
def rows(p, o_t, o_x, T, H: tl.constexpr, X: tl.constexpr):
    """[C, BX] in float32 of one sequence and head of [T, H, X] at p, zero outside."""
    m = (o_t < T)[:, None] & (o_x < X)[None, :]
    return tl.load(p + o_t[:, None] * (H * X) + o_x[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def put_rows(p, x, o_t, o_x, T, H: tl.constexpr, X: tl.constexpr):
    m = (o_t < T)[:, None] & (o_x < X)[None, :]
    tl.store(p + o_t[:, None] * (H * X) + o_x[None, :], x.to(p.dtype.element_ty), mask=m)


@triton.jit
def decays(g_ptr, o_t, T, H: tl.constexpr, C: tl.constexpr):
    """exp(G) [C, C], zero where j > i; of the sums up to a token [C]; of those behind a token [C]; of the whole."""
    o_c = tl.arange(0, C)
    b_g = tl.load(g_ptr + o_t * H, mask=o_t < T, other=0.0).to(tl.float32)
    later, upto = o_c[:, None] > o_c[None, :], o_c[:, None] >= o_c[None, :]
    b_between = tl.where(later, b_g[:, None] + tl.zeros([C, C], tl.float32), 0.0)  # [l, j]
    b_after = tl.exp(tl.sum(b_between, 0))
    b_until = tl.exp(tl.sum(tl.where(later, 0.0, b_g[:, None]), 0))  # [l, i], l <= i
    b_pairs = tl.where(upto, tl.exp(tl.cumsum(b_between, 0)), 0.0)
    return b_pairs, b_until, b_after, tl.exp(tl.sum(b_g, 0))


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


def launch(q: Tensor, v: Tensor, *, backward: bool) -> tuple[tuple[int, int, int], dict]:
    """Grid and constants for q [B, T, H, K] and v [B, T, H, V]."""
    (b, t, heads, width), values = q.shape, v.shape[-1]
    block_v = min(MAX_VALUES, max(16, triton.next_power_of_2(values)))
    block_k = max(16, triton.next_power_of_2(width))
    # float16 as tf32, which has the same mantissa and more room; float32 as torch is set to, or three tf32 products.
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    narrow = q.dtype == torch.bfloat16 and not INTERPRETED  # the interpreter has no bf16 products
    op, prec = (tl.bfloat16, "tf32") if narrow else (tl.float32, "tf32x3" if exact else "tf32")
    chunk = min(CHUNK[narrow], max(16, triton.next_power_of_2(t)))
    constants = {"H": heads, "K": width, "V": values, "C": chunk, "BK": block_k, "BV": block_v, "OP": op, "PREC": prec}
    # As measured: few warps wait little for each other, and more are needed where a state is wide.
    warps = 4 if not narrow or block_k > 16 else 2
    if backward and block_k > 64:
        warps = 8
    return (triton.cdiv(values, block_v), heads, b), constants | {"num_warps": warps, "num_stages": 1}


@torch.library.custom_op(
    "zoology::linear_recurrence",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial) -> (Tensor, Tensor, Tensor)",
)
def forward_op(q, k, v, g, initial):
    """q k [B, T, H, K], v [B, T, H, V], g [B, T, H], initial [B, H, K, V] -> o, states before chunks, last state."""
    q, k, v, g = (part.contiguous() for part in (q, k, v, g))
    grid, constants = launch(q, v, backward=False)
    o, starts, last = _outputs(q, v)
    given = last if initial is None else initial.contiguous()
    _forward_kernel[grid](q, k, v, g, given, o, starts, last, q.shape[1], HAS_INITIAL=initial is not None, **constants)
    return o, starts, last


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (b, t, heads, width), values = q.shape, v.shape[-1]
    num = -(-t // launch(q, v, backward=False)[1]["C"])
    starts = q.new_empty(b, heads, num, width, values, dtype=torch.float32)
    last = q.new_empty(b, heads, width, values, dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), starts, last


@forward_op.register_fake
def _(q, k, v, g, initial):
    return _outputs(q, v)


@torch.library.custom_op(
    "zoology::linear_recurrence_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor starts, Tensor d_o, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(q, k, v, g, starts, d_o, d_last):
    """Gradients of q, k and g by blocks of columns, of v, and of the initial state."""
    q, k, v, g, d_o = (part.contiguous() for part in (q, k, v, g, d_o))
    grid, constants = launch(q, v, backward=True)
    outputs = dq, dk, dv, dg, d_initial = _gradients(q, k, v, g)
    inputs = q, k, v, g, starts, d_o, d_initial if d_last is None else d_last.contiguous()
    _backward_kernel[grid](*inputs, *outputs, q.shape[1], HAS_DLAST=d_last is not None, **constants)
    return dq, dk, dv, dg, d_initial


def _gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    blocks = launch(q, v, backward=True)[0][0]
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
    dq, dk, dv, dg, d_initial = torch.ops.zoology.linear_recurrence_backward(q, k, v, g, starts, d_o, d_last)
    dq, dk, dg = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dg.sum(0).to(g.dtype)
    return dq, dk, dv, dg, d_initial if ctx.has_initial else None


forward_op.register_autograd(_backward, setup_context=_setup)


def linear_recurrence_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_recurrence` with g [B, T, H], the state in the dtype of `initial_state` or float32."""
    initial = None if initial_state is None else initial_state.float()
    o, _, last = torch.ops.zoology.linear_recurrence(q, k, v, g, initial)
    return o, last if initial_state is None else last.to(initial_state.dtype)
