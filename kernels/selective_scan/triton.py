"""The selective scan in Triton: a program walks along one sequence with the states of a few channels in registers.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t,    y_t = h_t . C_t
    dh_t = dy_t C_t + exp(dt_{t+1} A) * dh_{t+1}

A tile of states is [N, D]: a thread owns channels whole, and sums over N need no exchange. Forwards, the state before
each stretch of `STRETCH` tokens is kept. Backwards a program walks from the last stretch to the first: it scans the
stretch again, leaving its states in memory that it writes over in the next one, and then back through it. Gradients of
B and C are sums over channels, that of A one over sequences: a program writes its share, and the shares are added up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import rows_apart

STRETCH = 16


@triton.jit
def _tile(p, o_n, o_d, N: tl.constexpr, D: tl.constexpr):
    """[BN, BD] in float32 of [N, D] at p, zero outside."""
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    return tl.load(p + o_n[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _row(p, t, T, row, o, SIZE: tl.constexpr):
    """Row t of T rows of SIZE at p, `row` apart, in float32; those behind the last are zero, and change no state."""
    return tl.load(p + t * row + o, mask=(o < SIZE) & (t < T), other=0.0).to(tl.float32)


@triton.jit
def _decay(dt, A, EXACT: tl.constexpr):
    """e^(dt A), at most 1. The instruction is off by up to two roundings to one side: that adds up over many tokens."""
    if not EXACT:
        return tl.exp2((dt * 1.4426950408889634)[None, :] * A)
    x = tl.maximum(dt[None, :] * A, -150.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = 1.0 / 720 + r * (1.0 / 5040)
    p = 1.0 / 24 + r * (1.0 / 120 + r * p)
    return (1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6 + r * p)))) * tl.exp2(n)


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    initial_ptr,
    y_ptr,
    starts_ptr,
    last_ptr,
    T,
    row_x,
    row_B,
    row_C,
    HAS_INITIAL: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    STRETCH: tl.constexpr,
    UNROLL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """y of one sequence and BD channels, the states before every stretch [S, N, D] and after the last token [N, D]."""
    i_b, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n, o_d, o_u = tl.arange(0, BN), i_d * BD + tl.arange(0, BD), tl.arange(0, UNROLL)
    m_h = (o_n < N)[:, None] & (o_d < D)[None, :]
    p_h = o_n[:, None] * D + o_d[None, :]
    num = tl.cdiv(T, STRETCH)
    p_x, p_dt, p_y = x_ptr + i_b * T * row_x, dt_ptr + i_b * T * D, y_ptr + i_b * T * D
    p_B, p_C = B_ptr + i_b * T * row_B, C_ptr + i_b * T * row_C
    b_A = _tile(A_ptr, o_n, o_d, N, D)
    b_h = tl.zeros([BN, BD], tl.float32)
    if HAS_INITIAL:
        b_h += _tile(initial_ptr + i_b * N * D, o_n, o_d, N, D)
    for i_s in range(0, num):
        tl.store(starts_ptr + (i_b * num + i_s) * N * D + p_h, b_h, mask=m_h)
        for i_u in range(0, STRETCH // UNROLL):
            first = i_s * STRETCH + i_u * UNROLL
            b_y = tl.zeros([UNROLL, BD], tl.float32)
            # What is written comes behind all that is read, so that no read has to wait for it.
            for u in tl.static_range(0, UNROLL):
                b_dt, b_x = _row(p_dt, first + u, T, D, o_d, D), _row(p_x, first + u, T, row_x, o_d, D)
                b_B, b_C = _row(p_B, first + u, T, row_B, o_n, N), _row(p_C, first + u, T, row_C, o_n, N)
                b_h = _decay(b_dt, b_A, EXACT) * b_h + b_B[:, None] * (b_dt * b_x)[None, :]
                b_y += tl.where((o_u == u)[:, None], tl.sum(b_h * b_C[:, None], 0)[None, :], 0.0)
            m_y = (first + o_u < T)[:, None] & (o_d < D)[None, :]
            tl.store(p_y + (first + o_u)[:, None] * D + o_d[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m_y)
    tl.store(last_ptr + i_b * N * D + p_h, b_h, mask=m_h)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    starts_ptr,
    dy_ptr,
    dlast_ptr,
    dx_ptr,
    ddt_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dinitial_ptr,
    states_ptr,
    T,
    row_x,
    row_B,
    row_C,
    HAS_DLAST: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    STRETCH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradients of one sequence and BD channels; shares dA [N, D] of a sequence, dB and dC [T, N] of these channels.

    `states_ptr` is room for the states of one stretch, [STRETCH, BN, BD] a program.
    """
    i_b, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n, o_d = tl.arange(0, BN), i_d * BD + tl.arange(0, BD)
    m_n, m_d = o_n < N, o_d < D
    m_h = m_n[:, None] & m_d[None, :]
    p_h = o_n[:, None] * D + o_d[None, :]
    num = tl.cdiv(T, STRETCH)
    p_x, p_dt, p_dy = x_ptr + i_b * T * row_x, dt_ptr + i_b * T * D, dy_ptr + i_b * T * D
    p_dx, p_ddt = dx_ptr + i_b * T * D, ddt_ptr + i_b * T * D
    p_B, p_C = B_ptr + i_b * T * row_B, C_ptr + i_b * T * row_C
    share = (i_d * tl.num_programs(0) + i_b) * T * N
    p_states = states_ptr + (i_b * tl.num_programs(1) + i_d) * STRETCH * BN * BD
    p_states += tl.arange(0, BN)[:, None] * BD + tl.arange(0, BD)[None, :]
    b_A = _tile(A_ptr, o_n, o_d, N, D)
    b_dh = tl.zeros([BN, BD], tl.float32)
    if HAS_DLAST:
        b_dh += _tile(dlast_ptr + i_b * N * D, o_n, o_d, N, D)
    b_dA = tl.zeros([BN, BD], tl.float32)
    for i in range(0, num):
        first = (num - 1 - i) * STRETCH
        b_h = tl.load(starts_ptr + (i_b * num + num - 1 - i) * N * D + p_h, mask=m_h, other=0.0)
        for s in range(0, STRETCH):
            b_dt, b_x = _row(p_dt, first + s, T, D, o_d, D), _row(p_x, first + s, T, row_x, o_d, D)
            b_B = _row(p_B, first + s, T, row_B, o_n, N)
            tl.store(p_states + s * BN * BD, b_h)
            b_h = _decay(b_dt, b_A, EXACT) * b_h + b_B[:, None] * (b_dt * b_x)[None, :]
        tl.debug_barrier()
        for j in range(0, STRETCH):
            t = first + STRETCH - 1 - j
            b_dt, b_x, b_dy = (
                _row(p_dt, t, T, D, o_d, D),
                _row(p_x, t, T, row_x, o_d, D),
                _row(p_dy, t, T, D, o_d, D),
            )
            b_B, b_C = _row(p_B, t, T, row_B, o_n, N), _row(p_C, t, T, row_C, o_n, N)
            b_before = tl.load(p_states + (STRETCH - 1 - j) * BN * BD)
            b_u = b_dt * b_x
            b_dh += b_C[:, None] * b_dy[None, :]
            b_dC, b_dB = tl.sum(b_h * b_dy[None, :], 1), tl.sum(b_dh * b_u[None, :], 1)
            b_du = tl.sum(b_dh * b_B[:, None], 0)
            b_dh *= _decay(b_dt, b_A, EXACT)
            b_exponent = b_dh * b_before
            b_dA += b_exponent * b_dt[None, :]
            b_ddt = tl.sum(b_exponent * b_A, 0) + b_du * b_x
            tl.store(p_dx + t * D + o_d, (b_du * b_dt).to(dx_ptr.dtype.element_ty), mask=m_d & (t < T))
            tl.store(p_ddt + t * D + o_d, b_ddt.to(ddt_ptr.dtype.element_ty), mask=m_d & (t < T))
            tl.store(dB_ptr + share + t * N + o_n, b_dB, mask=m_n & (t < T))
            tl.store(dC_ptr + share + t * N + o_n, b_dC, mask=m_n & (t < T))
            b_h = b_before
        tl.debug_barrier()
    tl.store(dA_ptr + i_b * N * D + p_h, b_dA, mask=m_h)
    tl.store(dinitial_ptr + i_b * N * D + p_h, b_dh, mask=m_h)


def launch(x: Tensor, width: int, *, backward: bool) -> tuple[tuple[int, int], dict]:
    """Grid and constants for x [B, T, D] and states of this width."""
    block_n = max(2, triton.next_power_of_2(width))
    # Backwards a thread has two channels where registers allow it: sums over channels then take half the exchanges.
    block_d = 64 if backward and block_n <= 16 else 32
    block_d = max(1, block_d // max(1, block_n // 64))
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    constants = {"N": width, "D": x.shape[2], "BN": block_n, "BD": block_d, "STRETCH": STRETCH, "EXACT": exact}
    return (x.shape[0], triton.cdiv(x.shape[2], block_d)), constants | {"num_warps": 1}


@torch.library.custom_op(
    "zoology::selective_scan",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial) -> (Tensor, Tensor, Tensor)",
)
def forward_op(x, dt, A, B, C, initial):
    """x dt [B, T, D], A [N, D], B C [B, T, N], initial [B, N, D] -> y, the states before stretches, the last state."""
    (x, row_x), (B, row_B), (C, row_C) = (rows_apart(part) for part in (x, B, C))
    dt, A = dt.contiguous(), A.contiguous()
    (b, t, d), n = x.shape, A.shape[0]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = x.new_empty(b, n, d, dtype=torch.float32)
    starts = x.new_empty(b, triton.cdiv(t, STRETCH), n, d, dtype=torch.float32)
    grid, constants = launch(x, n, backward=False)
    given = last if initial is None else initial.contiguous()
    flags = {"HAS_INITIAL": initial is not None, "UNROLL": 4}
    _forward_kernel[grid](x, dt, A, B, C, given, y, starts, last, t, row_x, row_B, row_C, **flags, **constants)
    return y, starts, last


@forward_op.register_fake
def _(x, dt, A, B, C, initial):
    (b, t, d), n = x.shape, A.shape[0]
    last = x.new_empty(b, n, d, dtype=torch.float32)
    starts = x.new_empty(b, -(-t // STRETCH), n, d, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), starts, last


@torch.library.custom_op(
    "zoology::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor starts, Tensor dy, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(x, dt, A, B, C, starts, dy, d_last):
    """Gradients of x, dt, A by sequence, B and C by blocks of channels, and the initial state."""
    (x, row_x), (B, row_B), (C, row_C) = (rows_apart(part) for part in (x, B, C))
    dt, A, dy = (part.contiguous() for part in (dt, A, dy))
    (b, t, d), n = x.shape, A.shape[0]
    grid, constants = launch(x, n, backward=True)
    dx, ddt = torch.empty_like(dy), torch.empty_like(dt)
    dA, d_initial = (x.new_empty(b, n, d, dtype=torch.float32) for _ in range(2))
    dB, dC = (x.new_empty(grid[1], b, t, n, dtype=torch.float32) for _ in range(2))
    states = x.new_empty(*grid, STRETCH, constants["BN"], constants["BD"], dtype=torch.float32)
    inputs = x, dt, A, B, C, starts, dy, d_initial if d_last is None else d_last.contiguous()
    outputs = dx, ddt, dA, dB, dC, d_initial
    flags = {"HAS_DLAST": d_last is not None}
    _backward_kernel[grid](*inputs, *outputs, states, t, row_x, row_B, row_C, **flags, **constants)
    return outputs


@backward_op.register_fake
def _(x, dt, A, B, C, starts, dy, d_last):
    (b, t, d), n = x.shape, A.shape[0]
    blocks = launch(x, n, backward=True)[0][1]
    dx, ddt = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, dt))
    dA, d_initial = (x.new_empty(b, n, d, dtype=torch.float32) for _ in range(2))
    dB, dC = (x.new_empty(blocks, b, t, n, dtype=torch.float32) for _ in range(2))
    return dx, ddt, dA, dB, dC, d_initial


def _setup(ctx, inputs, output):
    x, dt, A, B, C, initial = inputs
    ctx.save_for_backward(x, dt, A, B, C, output[1])
    ctx.has_initial = initial is not None
    ctx.set_materialize_grads(False)  # zeros for the kept states would be as large as they are


def _backward(ctx, dy, _, d_last):
    x, dt, A, B, C, starts = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, d_initial = torch.ops.zoology.selective_scan_backward(x, dt, A, B, C, starts, dy, d_last)
    dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    return dx, ddt, dA.sum(0), dB, dC, d_initial if ctx.has_initial else None


forward_op.register_autograd(_backward, setup_context=_setup)


def selective_scan_triton(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`selective_scan`; A and states are transposed on the way, so that channels lie side by side."""
    initial = None if initial_state is None else initial_state.float().transpose(1, 2)
    y, _, last = torch.ops.zoology.selective_scan(x, dt.float(), A.float().transpose(0, 1), B, C, initial)
    last = last.transpose(1, 2)
    return y, last if initial_state is None else last.to(initial_state.dtype)
