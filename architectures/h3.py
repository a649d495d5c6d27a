"""H3: a shift state-space model and a diagonal one between multiplicative gates."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.layers import with_skip
from architectures.mixer import SequenceMixer, divide_heads
from architectures.registry import register
from kernels.fft_conv import fft_conv, fft_conv_step


class H3State(NamedTuple):
    """Memory of the two state-space models."""

    shift: Tensor  # [B, d_state - 1, D], the last keys, oldest first
    ssm: Tensor  # [B, H, K, K, d_state / 2, 2], complex states of the diagonal model as real pairs


class ShiftSSM(nn.Module):
    """The filter of s_t = shift(s_{t-1}) + b u_t, y_t = c . s_t: d_state taps h_l = sum_n b_n c_{n + l} a channel.

    b starts as the first unit vector and c as `nn.Conv1d` does. What it remembers is its last d_state - 1 inputs.
    """

    def __init__(self, d_model: int, d_state: int):
        super().__init__()
        self.b = nn.Parameter(torch.eye(1, d_state).repeat(d_model, 1))
        self.c = nn.Parameter(torch.empty(d_model, d_state).uniform_(-(d_state**-0.5), d_state**-0.5))

    def forward(self) -> Tensor:
        """The taps [d_state, D]."""
        d_state = self.b.shape[1]
        windows = F.pad(self.c, (0, d_state - 1)).unfold(1, d_state, 1)
        return torch.einsum("dln,dn->ld", windows, self.b)


class DiagonalSSM(nn.Module):
    """S4D (arXiv:2206.11893) with the S4D-Lin initialisation and bilinear discretisation: with complex s_t,

    s_t = dA s_{t-1} + dB u_t, y_t = 2 Re(C . s_t),  dA = (1 + dt A / 2) / (1 - dt A / 2),  dB = dt B / (1 - dt A / 2),

    A = -exp(a) + i w, starting from -1/2 + i pi n, dt log-uniform in [dt_min, dt_max], B one and C standard normal.
    """

    def __init__(self, num_heads: int, d_state: int, dt_min: float, dt_max: float):
        super().__init__()
        modes = d_state // 2
        log_dt = torch.rand(num_heads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        self.log_dt = nn.Parameter(log_dt)
        self.log_decay = nn.Parameter(torch.full((num_heads, modes), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(modes, dtype=torch.float32).repeat(num_heads, 1))
        self.b = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(num_heads, modes, 1))
        self.c = nn.Parameter(torch.view_as_real(torch.randn(num_heads, modes, dtype=torch.complex64)).clone())

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """dA, dB, C, complex [H, d_state / 2], in single precision at least."""
        acc = torch.promote_types(self.log_dt.dtype, torch.float32)
        log_dt, log_decay, frequency, b, c = (
            p.to(acc) for p in (self.log_dt, self.log_decay, self.frequency, self.b, self.c)
        )
        dt = log_dt.exp().unsqueeze(-1)
        half = torch.complex(-log_decay.exp() * dt, frequency * dt) / 2
        return (1 + half) / (1 - half), torch.view_as_complex(b) * dt / (1 - half), torch.view_as_complex(c)

    def taps(self, length: int) -> Tensor:
        """The filter 2 Re(C . dA^t dB), [T, H], in polar coordinates: real numbers, and one compiled kernel."""
        acc = torch.promote_types(self.log_dt.dtype, torch.float32)
        log_dt, log_decay, frequency, b, c = (
            p.to(acc).unsqueeze(0) for p in (self.log_dt, self.log_decay, self.frequency, self.b, self.c)
        )
        dt = log_dt.exp().unsqueeze(-1)
        real, imaginary = -log_decay.exp() * dt / 2, frequency * dt / 2
        # |1 - half|^2, and dt C B / (1 - half), of which dt B / (1 - half) is dB.
        below = (1 - real).square() + imaginary.square()
        cb_real = c[..., 0] * b[..., 0] - c[..., 1] * b[..., 1]
        cb_imaginary = c[..., 0] * b[..., 1] + c[..., 1] * b[..., 0]
        first_real = dt * (cb_real * (1 - real) - cb_imaginary * imaginary) / below
        first_imaginary = dt * (cb_imaginary * (1 - real) + cb_real * imaginary) / below
        log_size = 0.5 * (((1 + real).square() + imaginary.square()) / below).log()
        angle = torch.atan2(imaginary, 1 + real) + torch.atan2(imaginary, 1 - real)
        t = torch.arange(length, device=dt.device, dtype=acc).view(-1, 1, 1)
        turned = first_real * (t * angle).cos() - first_imaginary * (t * angle).sin()
        return 2 * ((t * log_size).exp() * turned).sum(-1)


def powers(base: Tensor, length: int) -> Tensor:
    """base^0 .. base^(length - 1) on a new last axis, by doubling."""
    result, square = torch.ones_like(base).unsqueeze(-1), base.unsqueeze(-1)
    while result.shape[-1] < length:
        result = torch.cat([result, result * square], dim=-1)
        square = square * square
    return result[..., :length]


@register("h3", paper="arXiv:2212.14052")
class H3(SequenceMixer):
    """H3: y = q * SSM_diag(SSM_shift(k) * v), a memory of the products of a token's value with earlier keys.

    Hungry Hungry Hippos (arXiv:2212.14052), section 3 and algorithm 1, parameterisation and initialisation of the
    official code (HazyResearch/H3): q, k, v projected with biases; a shift SSM and a skip on k; per head the outer
    product of `head_dim` keys and values through one diagonal SSM (S4D) and a skip; a product with q summed over
    the keys; an output projection. Trained as two long convolutions.

    The state is d_model head_dim d_state / 2 complex numbers, twice as many reals, and the last d_state - 1 keys.
    The published count, d_model d_state, is that of the diagonal SSM at head_dim 1: it leaves out the factor
    head_dim and the shift SSM. Checked against the recurrences of the official code written out token by token.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        head_dim: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state must be an even number of at least 2 (complex pairs), got {d_state}")
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"dt_min={dt_min} and dt_max={dt_max} must satisfy 0 < dt_min <= dt_max < inf")
        self.d_state = d_state
        self.head_dim = head_dim
        self.num_heads = divide_heads(d_model, head_dim, name="head_dim")
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in range(3))
        self.shift = ShiftSSM(d_model, d_state)
        self.shift_skip = nn.Parameter(torch.randn(d_model))
        self.ssm = DiagonalSSM(self.num_heads, d_state, dt_min, dt_max)
        self.ssm_skip = nn.Parameter(torch.randn(self.num_heads))
        self.out_proj = nn.Linear(d_model, d_model)

    def _products(self, k: Tensor, v: Tensor) -> Tensor:
        """Outer products per head: k, v [..., D] -> [..., H, K, K]."""
        k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (k, v))
        return k.unsqueeze(-1) * v.unsqueeze(-2)

    def _output(self, q: Tensor, y: Tensor) -> Tensor:
        """q [..., D], the diagonal SSM's output with its skip [..., H, K, K] -> [..., D]."""
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        return self.out_proj((q.unsqueeze(-1) * y).sum(-2).flatten(-2))

    def _run(self, x: Tensor, state: H3State | None) -> tuple[Tensor, H3State | None]:
        """x [B, T, D] from a state on, or from the start without one."""
        length = x.shape[1]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        past = None if state is None else state.shift
        kv = self._products(fft_conv(k, with_skip(self.shift(), self.shift_skip), history=past), v)
        taps = self.ssm.taps(length)
        read = fft_conv(kv, with_skip(taps, self.ssm_skip)[..., None, None])
        if state is None:
            return self._output(q, read), None
        da, db, c = self.ssm()
        power = powers(da, length + 1)  # [H, d_state / 2, T + 1]
        ssm = torch.view_as_complex(state.ssm.to(taps.dtype))
        carried = 2 * torch.einsum("hnt,bhijn->bthij", c.unsqueeze(-1) * power[..., 1:], ssm).real
        writes = torch.view_as_real(db.unsqueeze(-1) * power[..., :-1].flip(-1))
        ssm = torch.view_as_real(ssm * power[:, None, None, :, -1])
        ssm = ssm + torch.einsum("hntc,bthij->bhijnc", writes, kv.to(taps.dtype))
        shift = torch.cat([state.shift, k.to(state.shift.dtype)], dim=1)[:, length:]
        return self._output(q, read + carried.to(kv.dtype)), H3State(shift, ssm.to(state.ssm.dtype))

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self._run(x, None)[0]

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> H3State:
        like = self.like_parameters(device, dtype)
        shift = torch.zeros(batch_size, self.d_state - 1, self.d_model, **like)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim, self.d_state // 2, 2)
        return H3State(shift, torch.zeros(shape, **like))

    def prefill(self, x: Tensor, state: H3State) -> tuple[Tensor, H3State]:
        self.check_state(x, state)
        return self._run(x, state)

    def step(self, x: Tensor, state: H3State) -> tuple[Tensor, H3State]:
        self.check_state(x, state)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        kv = self._products(fft_conv_step(k, self.shift(), history=state.shift) + self.shift_skip * k, v)
        da, db, c = (term[:, None, None] for term in self.ssm())
        ssm = torch.view_as_complex(state.ssm.to(c.real.dtype)) * da + db * kv.unsqueeze(-1)
        remembered = 2 * (c * ssm).sum(-1).real
        shift = torch.cat([state.shift, k.to(state.shift.dtype).unsqueeze(1)], dim=1)[:, 1:]
        y = remembered.to(kv.dtype) + self.ssm_skip[:, None, None] * kv
        return self._output(q, y), H3State(shift, torch.view_as_real(ssm).to(state.ssm.dtype))
