"""The selective scan in Triton: a program walks along one sequence with the states of a few channels in registers.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t,    y_t = h_t . C_t + skip x_t
    dh_t = dy_t C_t + exp(dt_{t+1} A) * dh_{t+1}

A tile of states is [N, D]. Forwards the state before every group of four tokens is kept. Backwards a program walks from
the last group to the first: it computes the states within the group again, which its registers hold, and goes back
through them. Gradients of B and C are sums over channels, that of A one over sequences: a program writes its share, and
the shares are added up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import rows_apart

GROUP = 4  # as written out in the kernels


@triton.jit
def _tile(p, o_n, o_d, N: tl.constexpr, D: tl.constexpr):
    """[BN, BD] in float32 of [N, D] at p, zero outside."""
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    return tl.load(p + o_n[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _row(p, t, T, row, o, SIZE: tl.constexpr):
    """Row t of T rows of SIZE at p, `row` apart; those behind the last are zero, and change no state."""
    return tl.load(p + t * row + o, mask=(o < SIZE) & (t < T), other=0.0)


@triton.jit
def _rows(p, t, T, row, o, SIZE: tl.constexpr):
    """The rows of a group: read before anything is written, so that none has to wait for that."""
    first, second = _row(p, t, T, row, o, SIZE), _row(p, t + 1, T, row, o, SIZE)
    return first, second, _row(p, t + 2, T, row, o, SIZE), _row(p, t + 3, T, row, o, SIZE)


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


@triton.jit
def _step_size(b_dt, b_bias, t, T, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr):
    """softplus(dt + bias) of token t, 0 behind the last: that changes no state. Without a bias it is dt."""
    b_dt = b_dt.to(tl.float32)
    if HAS_BIAS:
        b_dt += b_bias
        b_e = tl.exp(-tl.abs(b_dt))
        b_one = 1.0 + b_e
        b_log = tl.log(b_one)
        if EXACT:  # what 1 + e has lost of e
            b_log = tl.where(b_one == 1.0, b_e, b_log * (b_e / (b_one - 1.0)))
        b_dt = tl.where(t < T, tl.maximum(b_dt, 0.0) + b_log, 0.0)
    return b_dt


@triton.jit
def _after(b_h, b_A, b_dt, b_x, b_B, EXACT: tl.constexpr):
    """The state one token later."""
    b_x, b_B = b_x.to(tl.float32), b_B.to(tl.float32)
    return _decay(b_dt, b_A, EXACT) * b_h + b_B[:, None] * (b_dt * b_x)[None, :]


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr,
    dt_ptr,
    bias_ptr,
    skip_ptr,
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
    HAS_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    KEEP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of one sequence and BD channels, the states before every group [G, N, D] if kept and after the last [N, D]."""
    i_b, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n, o_d = tl.arange(0, BN), i_d * BD + tl.arange(0, BD)
    m_n, m_d = o_n < N, o_d < D
    m_h, p_h = m_n[:, None] & m_d[None, :], o_n[:, None] * D + o_d[None, :]
    num = tl.cdiv(T, 4)
    p_x, p_dt, p_y = x_ptr + i_b * T * row_x, dt_ptr + i_b * T * D, y_ptr + i_b * T * D
    p_B, p_C = B_ptr + i_b * T * row_B, C_ptr + i_b * T * row_C
    b_A, b_bias = _tile(A_ptr, o_n, o_d, N, D), tl.load(bias_ptr + o_d, mask=m_d & HAS_BIAS, other=0.0).to(tl.float32)
    b_skip = tl.load(skip_ptr + o_d, mask=m_d & HAS_SKIP, other=0.0).to(tl.float32)
    b_h = tl.zeros([BN, BD], tl.float32)
    if HAS_INITIAL:
        b_h += _tile(initial_ptr + i_b * N * D, o_n, o_d, N, D)
    for i in tl.range(0, num, num_stages=STAGES):
        t = i * 4
        b_dt, b_x = _rows(p_dt, t, T, D, o_d, D), _rows(p_x, t, T, row_x, o_d, D)
        b_B, b_C = _rows(p_B, t, T, row_B, o_n, N), _rows(p_C, t, T, row_C, o_n, N)
        if KEEP:
            tl.store(starts_ptr + (i_b * num + i) * N * D + p_h, b_h, mask=m_h)
        for u in tl.static_range(0, 4):
            b_dtu = _step_size(b_dt[u], b_bias, t + u, T, HAS_BIAS, EXACT)
            b_h = _after(b_h, b_A, b_dtu, b_x[u], b_B[u], EXACT)
            b_y = tl.sum(b_h * b_C[u].to(tl.float32)[:, None], 0)
            if HAS_SKIP:
                b_y += b_skip * b_x[u].to(tl.float32)
            tl.store(p_y + (t + u) * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d & (t + u < T))
    tl.store(last_ptr + i_b * N * D + p_h, b_h, mask=m_h)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    x_ptr,
    dt_ptr,
    bias_ptr,
    skip_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    starts_ptr,
    dy_ptr,
    dlast_ptr,
    dx_ptr,
    ddt_ptr,
    dbias_ptr,
    dskip_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dinitial_ptr,
    T,
    row_x,
    row_B,
    row_C,
    HAS_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_DLAST: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one sequence and BD channels; shares dA [N, D] of a sequence, dB and dC [T, N] of these channels."""
    i_b, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n, o_d = tl.arange(0, BN), i_d * BD + tl.arange(0, BD)
    m_n, m_d = o_n < N, o_d < D
    m_h, p_h = m_n[:, None] & m_d[None, :], o_n[:, None] * D + o_d[None, :]
    num = tl.cdiv(T, 4)
    p_x, p_dt, p_dy = x_ptr + i_b * T * row_x, dt_ptr + i_b * T * D, dy_ptr + i_b * T * D
    p_dx, p_ddt = dx_ptr + i_b * T * D, ddt_ptr + i_b * T * D
    p_B, p_C = B_ptr + i_b * T * row_B, C_ptr + i_b * T * row_C
    share = (i_d * tl.num_programs(0) + i_b) * T * N
    p_dB, p_dC = dB_ptr + share, dC_ptr + share
    b_A, b_bias = _tile(A_ptr, o_n, o_d, N, D), tl.load(bias_ptr + o_d, mask=m_d & HAS_BIAS, other=0.0).to(tl.float32)
    b_skip = tl.load(skip_ptr + o_d, mask=m_d & HAS_SKIP, other=0.0).to(tl.float32)
    b_dh, b_dA = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    b_dbias, b_dskip = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    if HAS_DLAST:
        b_dh += _tile(dlast_ptr + i_b * N * D, o_n, o_d, N, D)
    for i in tl.range(0, num, num_stages=STAGES):
        t = (num - 1 - i) * 4
        b_h0 = tl.load(starts_ptr + (i_b * num + num - 1 - i) * N * D + p_h, mask=m_h, other=0.0)
        b_dt, b_x, b_dy = _rows(p_dt, t, T, D, o_d, D), _rows(p_x, t, T, row_x, o_d, D), _rows(p_dy, t, T, D, o_d, D)
        b_B, b_C = _rows(p_B, t, T, row_B, o_n, N), _rows(p_C, t, T, row_C, o_n, N)
        b_dt0 = _step_size(b_dt[0], b_bias, t, T, HAS_BIAS, EXACT)
        b_dt1 = _step_size(b_dt[1], b_bias, t + 1, T, HAS_BIAS, EXACT)
        b_dt2 = _step_size(b_dt[2], b_bias, t + 2, T, HAS_BIAS, EXACT)
        b_dt3 = _step_size(b_dt[3], b_bias, t + 3, T, HAS_BIAS, EXACT)
        b_size = b_dt0, b_dt1, b_dt2, b_dt3
        b_h1 = _after(b_h0, b_A, b_dt0, b_x[0], b_B[0], EXACT)
        b_h2 = _after(b_h1, b_A, b_dt1, b_x[1], b_B[1], EXACT)
        b_h3 = _after(b_h2, b_A, b_dt2, b_x[2], b_B[2], EXACT)
        b_h = b_h0, b_h1, b_h2, b_h3, _after(b_h3, b_A, b_dt3, b_x[3], b_B[3], EXACT)
        for u in tl.static_range(3, -1, -1):
            b_dtu, b_xu, b_dyu = b_size[u], b_x[u].to(tl.float32), b_dy[u].to(tl.float32)
            b_dh += b_C[u].to(tl.float32)[:, None] * b_dyu[None, :]
            b_dC, b_dB = tl.sum(b_h[u + 1] * b_dyu[None, :], 1), tl.sum(b_dh * (b_dtu * b_xu)[None, :], 1)
            b_du = tl.sum(b_dh * b_B[u].to(tl.float32)[:, None], 0)
            b_dh *= _decay(b_dtu, b_A, EXACT)
            b_exponent = b_dh * b_h[u]
            b_dA += b_exponent * b_dtu[None, :]
            b_ddt = tl.sum(b_exponent * b_A, 0) + b_du * b_xu
            if HAS_BIAS:  # the slope of softplus
                b_ddt *= tl.sigmoid(b_dt[u].to(tl.float32) + b_bias)
                b_dbias += tl.where(t + u < T, b_ddt, 0.0)
            b_dx = b_du * b_dtu
            if HAS_SKIP:
                b_dx += b_skip * b_dyu
                b_dskip += b_xu * b_dyu
            m_t, p_t = m_d & (t + u < T), (t + u) * D + o_d
            tl.store(p_dx + p_t, b_dx.to(dx_ptr.dtype.element_ty), mask=m_t)
            tl.store(p_ddt + p_t, b_ddt.to(ddt_ptr.dtype.element_ty), mask=m_t)
            tl.store(p_dB + (t + u) * N + o_n, b_dB, mask=m_n & (t + u < T))
            tl.store(p_dC + (t + u) * N + o_n, b_dC, mask=m_n & (t + u < T))
    if HAS_BIAS:
        tl.store(dbias_ptr + i_b * D + o_d, b_dbias, mask=m_d)
    if HAS_SKIP:
        tl.store(dskip_ptr + i_b * D + o_d, b_dskip, mask=m_d)
    tl.store(dA_ptr + i_b * N * D + p_h, b_dA, mask=m_h)
    tl.store(dinitial_ptr + i_b * N * D + p_h, b_dh, mask=m_h)


# Channels of a program and stages of its loop, forwards and backwards, by the width that holds the states; as measured.
LAUNCH = {8: ((64, 1), (64, 2)), 16: ((64, 1), (32, 2))}

# Entries of a state that a program holds: 24 in a tile of 32 take a third longer backwards than 16 and then 8 do.
WIDEST = 16


def launch(x: Tensor, width: int, *, backward: bool) -> tuple[tuple[int, int], dict]:
    """Grid and constants for x [B, T, D] and states of this width."""
    block_n = max(2, triton.next_power_of_2(width))
    block_d, stages = LAUNCH[max(8, block_n)][backward]
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    constants = {"N": width, "D": x.shape[2], "BN": block_n, "BD": block_d, "EXACT": exact, "STAGES": stages}
    return (x.shape[0], triton.cdiv(x.shape[2], block_d)), constants | {"num_warps": 1}


def _outputs(x: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (b, t, d), n = x.shape, A.shape[0]
    starts = x.new_empty(b, -(-t // GROUP) if keep else 0, n, d, dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, starts, x.new_empty(b, n, d, dtype=torch.float32)


@torch.library.custom_op(
    "zoology::selective_scan",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor? bias, Tensor? skip, Tensor A, Tensor B, Tensor C, Tensor? initial, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
)
def forward_op(x, dt, bias, skip, A, B, C, initial, keep):
    """x dt [B, T, D], bias skip [D], A [N, D], B C [B, T, N], initial [B, N, D] -> y, states if kept, last state."""
    (x, row_x), (B, row_B), (C, row_C) = (rows_apart(part) for part in (x, B, C))
    dt, A = dt.contiguous(), A.contiguous()
    y, starts, last = _outputs(x, A, keep)
    grid, constants = launch(x, A.shape[0], backward=False)
    given = last if initial is None else initial.contiguous()
    inputs = x, dt, dt if bias is None else bias, x if skip is None else skip, A, B, C, given
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_SKIP": skip is not None,
        "HAS_INITIAL": initial is not None,
        "KEEP": keep,
    }
    _forward_kernel[grid](*inputs, y, starts, last, x.shape[1], row_x, row_B, row_C, **flags, **constants)
    return y, starts, last


@forward_op.register_fake
def _(x, dt, bias, skip, A, B, C, initial, keep):
    return _outputs(x, A, keep)


@torch.library.custom_op(
    "zoology::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor? bias, Tensor? skip, Tensor A, Tensor B, Tensor C, Tensor starts, Tensor dy,"
    " Tensor? d_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(x, dt, bias, skip, A, B, C, starts, dy, d_last):
    """Gradients of x, dt, bias, skip and A by sequence, B and C by blocks of channels, and the initial state."""
    (x, row_x), (B, row_B), (C, row_C) = (rows_apart(part) for part in (x, B, C))
    dt, A, dy = (part.contiguous() for part in (dt, A, dy))
    grid, constants = launch(x, A.shape[0], backward=True)
    found = _gradients(x, dt, A)
    given = found[-1] if d_last is None else d_last.contiguous()
    inputs = x, dt, dt if bias is None else bias, x if skip is None else skip, A, B, C, starts, dy, given
    flags = {"HAS_BIAS": bias is not None, "HAS_SKIP": skip is not None, "HAS_DLAST": d_last is not None}
    _backward_kernel[grid](*inputs, *found, x.shape[1], row_x, row_B, row_C, **flags, **constants)
    return found


def _gradients(x: Tensor, dt: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    (b, t, d), n = x.shape, A.shape[0]
    blocks = launch(x, n, backward=True)[0][1]
    dx, ddt = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, dt))
    dbias, dskip = (x.new_empty(b, d, dtype=torch.float32) for _ in range(2))
    dA, d_initial = (x.new_empty(b, n, d, dtype=torch.float32) for _ in range(2))
    dB, dC = (x.new_empty(blocks, b, t, n, dtype=torch.float32) for _ in range(2))
    return dx, ddt, dbias, dskip, dA, dB, dC, d_initial


@backward_op.register_fake
def _(x, dt, bias, skip, A, B, C, starts, dy, d_last):
    return _gradients(x, dt, A)


def _setup(ctx, inputs, output):
    x, dt, bias, skip, A, B, C, initial, _ = inputs
    ctx.save_for_backward(x, dt, bias, skip, A, B, C, output[1])
    ctx.has_initial = initial is not None
    ctx.set_materialize_grads(False)  # zeros for the kept states would be as large as they are


def _backward(ctx, dy, _, d_last):
    *given, starts = ctx.saved_tensors
    x, _, bias, skip, _, B, C = given
    dy = torch.zeros_like(x) if dy is None else dy
    found = torch.ops.zoology.selective_scan_backward(*given, starts, dy, d_last)
    dx, ddt, dbias, dskip, dA, dB, dC, d_initial = found
    dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
    dskip = None if skip is None else dskip.sum(0).to(skip.dtype)
    dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    return dx, ddt, dbias, dskip, dA.sum(0), dB, dC, d_initial if ctx.has_initial else None, None


forward_op.register_autograd(_backward, setup_context=_setup)


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`; A and states are transposed on the way, so that channels lie side by side.

    Entries of a state do not see each other: those that fit in no tile without waste are scans of their own.
    """
    initial = None if initial_state is None else initial_state.float().transpose(1, 2)
    decay, keep = A.float().transpose(0, 1), torch.is_grad_enabled()
    y, ends = None, []
    for first in range(0, A.shape[1], WIDEST):
        part = slice(first, first + WIDEST)
        given = None if initial is None else initial[:, part]
        inputs = x, dt, dt_bias, skip if y is None else None, decay[part], B[..., part], C[..., part], given
        found, _, last = torch.ops.zoology.selective_scan(*inputs, keep)
        y = found if y is None else y + found
        ends.append(last.transpose(1, 2))
    last = ends[0] if len(ends) == 1 else torch.cat(ends, dim=2)
    return y, last if initial_state is None else last.to(initial_state.dtype)
