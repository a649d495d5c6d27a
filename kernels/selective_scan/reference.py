"""The selective scan of Mamba in plain PyTorch: the specification, token by token, and a form that is fast enough.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T,        y_t = h_t C_t

Axes: B batch, T time, D channels, N state width. Every entry (d, n) of the state has a decay of its own, so there
is no form in matrix products; the state is scanned. The fast form runs without autograd, keeps only the state at
the start of each stretch of time, and computes the gradients by scanning backwards:

    dh_t = dy_t C_t^T + exp(dt_{t+1} A) * dh_{t+1}

On a GPU, where a launch costs more than the arithmetic, time is cut into `num_stretches` that are scanned side by side:
once from zero to find what each leaves behind, then again from where the one before it ended. Every exponent is
dt A times a stretch of time, at most 0: nothing overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.linear_recurrence.reference import accumulation_dtype


def step_sizes(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    """softplus(dt + dt_bias) in float32 at least, or dt as it is."""
    if dt_bias is None:
        return dt
    acc = accumulation_dtype(dt, dt_bias)
    return F.softplus(dt.to(acc) + dt_bias.to(acc))


def selective_scan_step_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step: x dt [B, D], A [D, N], B C [B, N], state [B, D, N], skip [D]; the state is rounded after the output."""
    acc = accumulation_dtype(x, state)
    out_dtype, state_dtype = x.dtype, state.dtype
    x, dt, A, B, C, state = (part.to(acc) for part in (x, dt, A, B, C, state))
    state = torch.exp(dt.unsqueeze(-1) * A) * state + (dt * x).unsqueeze(-1) * B.unsqueeze(-2)
    y = (state @ C.unsqueeze(-1)).squeeze(-1)
    if skip is not None:
        y = y + skip.to(acc) * x
    return y.to(out_dtype), state.to(state_dtype)


def naive_selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence above, one token at a time; shapes as in `selective_scan`. The specification."""
    state = initial_state
    if state is None:
        state = torch.zeros(x.shape[0], *A.shape, dtype=accumulation_dtype(x), device=x.device)
    outputs = []
    for t in range(x.shape[1]):
        y, state = selective_scan_step_reference(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    num_stretches: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Fast form of `naive_selective_scan`, with skip [D] times x; the state as `initial_state`, or float32 at least."""
    acc, length = accumulation_dtype(x, initial_state), x.shape[1]
    if num_stretches is None:
        num_stretches = 1 if x.device.type == "cpu" else max(1, math.isqrt(length))
    state = x.new_zeros(x.shape[0], *A.shape, dtype=acc) if initial_state is None else initial_state.to(acc)
    # A padded token has dt = 0: it changes no state.
    padding = -length % num_stretches
    x_, dt_, B_, C_ = (F.pad(part.to(acc), (0, 0, 0, padding)) for part in (x, dt, B, C))
    y, last = _SelectiveScan.apply(x_, dt_, A.to(acc), B_, C_, state, num_stretches)
    y = y[:, :length]
    if skip is not None:
        y = y + skip.to(acc) * x.to(acc)
    return y.to(x.dtype), last if initial_state is None else last.to(initial_state.dtype)


class _SelectiveScan(torch.autograd.Function):
    """x dt [B, S L, D], A [D, N], B C [B, S L, N], state [B, D, N], S stretches of L tokens -> y, last state."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, state, num_stretches):
        x, dt, B, C = (_side_by_side(part, num_stretches) for part in (x, dt, B, C))
        u = dt * x
        starts = state
        if num_stretches > 1:
            ends, _, _ = _scan(u, dt, A, B, None, torch.zeros_like(A).expand(u.shape[1], -1, -1))
            starts = _carry(state, _decay(dt.sum(0), A), ends, num_stretches)
        ends, y, _ = _scan(u, dt, A, B, C, starts)
        ctx.save_for_backward(x, dt, A, B, C, starts)
        ctx.num_stretches = num_stretches
        last = ends.unflatten(0, (-1, num_stretches))[:, -1]
        return _in_a_row(y, num_stretches), last.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_last):
        x, dt, A, B, C, starts = ctx.saved_tensors
        num = ctx.num_stretches
        dy, u = _side_by_side(dy, num), dt * x
        _, _, states = _scan(u, dt, A, B, None, starts, keep=True)
        d_end = d_last
        if num > 1:
            d_starts = _scan_back(dt, A, C, dy, torch.zeros_like(A).expand(u.shape[1], -1, -1))
            d_end, d_state = _carry_back(d_last, _decay(dt.sum(0), A), d_starts, num)
        du, d_dt, dA = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(A)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dh = d_end.clone()
        for t in reversed(range(dt.shape[0])):
            dh.addcmul_(dy[t].unsqueeze(-1), C[t].unsqueeze(-2))
            torch.matmul(dy[t].unsqueeze(-2), states[t + 1], out=dC[t].unsqueeze(-2))
            torch.matmul(u[t].unsqueeze(-2), dh, out=dB[t].unsqueeze(-2))
            torch.matmul(dh, B[t].unsqueeze(-1), out=du[t].unsqueeze(-1))
            dh.mul_(_decay(dt[t], A))
            # states[t + 1] is not needed again, and states[0] is an input: it must not change.
            d_exponent = torch.mul(states[t], dh, out=states[t + 1])
            torch.sum(d_exponent * A, dim=-1, out=d_dt[t])
            dA.add_((d_exponent * dt[t].unsqueeze(-1)).sum(0))
        d_dt.addcmul_(du, x)
        dx = du.mul_(dt)
        if num == 1:
            d_state = dh
        dx, d_dt, dB, dC = (_in_a_row(part, num) for part in (dx, d_dt, dB, dC))
        return dx, d_dt, dA, dB, dC, d_state, None


def _scan(u, dt, A, B, C, h, keep=False):
    """Over the first axis: u dt [L, R, D], B C [L, R, N], h [R, D, N] -> last h, y [L, R, D] if C, states if keep."""
    y, states = None if C is None else torch.empty_like(u), [h] if keep else None
    for t in range(u.shape[0]):
        h = (_decay(dt[t], A).mul_(h)).addcmul_(u[t].unsqueeze(-1), B[t].unsqueeze(-2))
        if C is not None:
            torch.matmul(h, C[t].unsqueeze(-1), out=y[t].unsqueeze(-1))
        if keep:
            states.append(h)
    return h, y, states


def _scan_back(dt, A, C, dy, dh):
    """The gradient at the start of each stretch, given that at its end."""
    for t in reversed(range(dt.shape[0])):
        dh = torch.addcmul(dh, dy[t].unsqueeze(-1), C[t].unsqueeze(-2)).mul_(_decay(dt[t], A))
    return dh


def _carry(state, decay, ends, num):
    """The state at the start of each stretch, [B, D, N] -> [B S, D, N]."""
    decay, ends, starts = decay.unflatten(0, (-1, num)), ends.unflatten(0, (-1, num)), []
    for s in range(num):
        starts.append(state)
        state = torch.addcmul(ends[:, s], decay[:, s], state)
    return torch.stack(starts, dim=1).flatten(0, 1)


def _carry_back(d_state, decay, d_starts, num):
    """The gradient at the end of each stretch, [B S, D, N], and that at the very start, [B, D, N]."""
    decay, d_starts, d_ends = decay.unflatten(0, (-1, num)), d_starts.unflatten(0, (-1, num)), []
    for s in reversed(range(num)):
        d_ends.append(d_state)
        d_state = torch.addcmul(d_starts[:, s], decay[:, s], d_state)
    return torch.stack(d_ends[::-1], dim=1).flatten(0, 1), d_state


def _decay(dt: Tensor, A: Tensor) -> Tensor:
    return (dt.unsqueeze(-1) * A).exp_()


def _side_by_side(x: Tensor, num: int) -> Tensor:
    """[B, S L, X] -> [L, B S, X]."""
    return x.unflatten(1, (num, -1)).permute(2, 0, 1, 3).flatten(1, 2).contiguous()


def _in_a_row(x: Tensor, num: int) -> Tensor:
    """[L, B S, X] -> [B, S L, X]."""
    return x.unflatten(1, (-1, num)).permute(1, 2, 0, 3).flatten(1, 2).contiguous()
