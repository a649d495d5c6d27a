"""Mamba: a selective state space model, one decay per channel, state entry and token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures import backends, mamba_ssm
from architectures.layers import ShortConvolution, step_size_bias, whole_sequences_only
from architectures.mixer import SequenceMixer, require_at_least
from architectures.registry import register
from kernels.selective_scan import MAX_WIDTH, selective_scan, selective_scan_step

LONGEST_SCAN = 2048


class MambaState(NamedTuple):
    """`ssm` [B, E, N], the state of the scan; `conv` [B, d_conv - 1, E], the last inputs of the short convolution."""

    ssm: Tensor
    conv: Tensor


@register("mamba", paper="arXiv:2312.00752")
class Mamba(SequenceMixer):
    """Mamba: h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, with dt, B and C read from the input.

    Mamba (arXiv:2312.00752), section 3 (algorithm 2 for the selection, 3.4 for the block, 3.6 for the initialisation):

        x, z = W_in u;   x = silu(conv(x));   dt', B, C = W_x x;   dt = softplus(W_dt dt' + b_dt);   A = -exp(A_log)
        out = W_out ((scan(x, dt, A, B, C) + D x) * silu(z))

    E = expand * d_model channels, N = `d_state`, dt' of width `dt_rank` (d_model / 16, rounded up). As in the
    official code A starts at -(1 .. N) in every channel (S4D-real), D at 1, softplus(b_dt) log-uniform in
    [0.001, 0.1], W_dt uniform in +-dt_rank^(-1/2).

    Checked against transformers' `MambaMixer`, weights copied over. The published count is 2 * d_model * N, the `ssm`
    at expand = 2; it leaves out the (d_conv - 1) E elements of `conv`, and counts a whole Mamba block as nothing.
    """

    backends = ("triton", "mamba-ssm", "reference")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        require_at_least(1, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank)
        self.d_inner, self.d_state, self.dt_rank = expand * d_model, d_state, dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv = ShortConvolution(self.d_inner, d_conv, activation="silu")
        self.x_proj = nn.Linear(self.d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, self.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_size_bias(self.d_inner))
        self.dt_proj.keep_init = True  # a bias of 0 would be a step of .7: nothing is kept beyond a few tokens
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def unsupported(self, backend, **case):
        if backend == "triton":
            if case["seq_len"] > LONGEST_SCAN:
                return f"there are {case['seq_len']} tokens; allowed: {LONGEST_SCAN}, as one program scans a sequence"
            return whole_sequences_only(self.d_state, MAX_WIDTH, named=self.backend == backend, **case)
        return mamba_ssm.refusal(backend, self.conv, self.d_state, chunked=False, **case)

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> MambaState:
        like = self.like_parameters(device, dtype)
        ssm = torch.zeros(batch_size, self.d_inner, self.d_state, **like)
        return MambaState(ssm, self.conv.init_tail(batch_size, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.empty_state(x), empty=True, alone=True)[0]

    def prefill(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        self.check_state(x, state)
        return self._run(x, state)

    def prefill_empty(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        self.check_state(x, state)
        if self.backend_for(x) != "mamba-ssm" or backends.wants_grad(x, self.in_proj.weight):
            y, after = self._run(x, state, empty=True)
        else:
            y, after = self._read_prompt(x)
        return y, MambaState(after.ssm.to(state.ssm.dtype), after.conv.to(state.conv.dtype))

    def _read_prompt(self, u: Tensor) -> tuple[Tensor, MambaState]:
        """u [B, T, D] from an empty state on, without a gradient, channels first all the way."""

        def product(weight: Tensor, x: Tensor) -> Tensor:
            return torch.bmm(weight.expand(x.shape[0], -1, -1), x)

        def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dt, b, c = product(self.x_proj.weight, x).split([self.dt_rank, self.d_state, self.d_state], dim=1)
            return product(self.dt_proj.weight, dt), b, c

        x, z = product(self.in_proj.weight, u.transpose(1, 2)).chunk(2, dim=1)
        rest = {"A": -self.A_log.float().exp(), "D": self.D, "dt_bias": self.dt_proj.bias}
        y, ssm, tail = mamba_ssm.read_prompt(x, z, self.conv, project, **rest)
        return product(self.out_proj.weight, y).transpose(1, 2), MambaState(ssm, tail)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        self.check_state(x, state)
        return self._run(x, state)

    def _run(
        self, u: Tensor, state: MambaState, *, empty: bool = False, alone: bool = False
    ) -> tuple[Tensor, MambaState]:
        """u [B, T, D] or, one token, [B, D]; `empty`: the state is, and `alone`: the one after is not wanted."""
        backend = self.backend_for(u)
        x, z = self.in_proj(u).chunk(2, dim=-1)
        if backend == "mamba-ssm" and not alone and backends.wants_grad(x, *state):
            backend = self.ran_beside("reference")  # mamba-ssm knows no gradient through a state
        if backend == "mamba-ssm":
            x, tail = mamba_ssm.short_convolution(self.conv, x, state.conv)
        elif backend == "triton" and u.ndim == 3:
            x, tail = self.conv.prefill_by_kernel(x, state.conv, empty=empty)
        else:
            x, tail = (self.conv.step if u.ndim == 2 else self.conv.prefill)(x, state.conv)
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if backend == "mamba-ssm":
            decay = -self.A_log.float().exp()
            if u.ndim == 2 or empty:
                # Skip, bias and gate are the kernels' own.
                rest = {"D": self.D, "dt_bias": self.dt_proj.bias, "z": z}
                if u.ndim == 2:
                    dt = F.linear(dt, self.dt_proj.weight)
                    y, ssm = mamba_ssm.selective_scan_step(x, dt, decay, b, c, state.ssm, **rest)
                else:
                    dt = self.dt_proj.weight @ dt.transpose(1, 2)
                    y, ssm = mamba_ssm.gated_scan(x, dt, decay, b, c, **rest)
                return self.out_proj(y), MambaState(ssm, tail)
            y, ssm = mamba_ssm.selective_scan(x, self.dt_proj(dt), decay, b, c, state.ssm, D=self.D)
        else:
            kernel = "triton" if backend == "triton" else "reference"
            y, ssm = self._mix(x, F.linear(dt, self.dt_proj.weight), b, c, state.ssm, kernel)
        return self.out_proj(y * F.silu(z)), MambaState(ssm, tail)

    def _mix(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, ssm: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        """x and dt before its bias and softplus [..., E], b c [..., N], ssm [B, E, N] -> y with the skip, ssm."""
        decay = -self.A_log.to(torch.promote_types(dt.dtype, torch.float32)).exp()
        rest = {"dt_bias": self.dt_proj.bias, "skip": self.D}
        if x.ndim == 2:
            return selective_scan_step(x, dt, decay, b, c, ssm, **rest)
        return selective_scan(x, dt, decay, b, c, **rest, initial_state=ssm, backend=kernel)
