"""Mamba-2: a state space model with one decay per head and token, computed as a linear recurrence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures import mamba_ssm
from architectures.layers import ShortConvolution, merge_heads, split_heads, step_size_bias, whole_sequences_only
from architectures.mixer import SequenceMixer, default_num_heads, require_at_least, require_positive
from architectures.registry import register
from kernels.gated_norm import gated_norm
from kernels.linear_recurrence import MAX_TRITON_WIDTH, linear_recurrence, linear_recurrence_step


class Mamba2State(NamedTuple):
    """`ssm` [B, H, N, P], the state matrix; `conv` [B, d_conv - 1, H P + 2 G N], inputs of the short convolution."""

    ssm: Tensor
    conv: Tensor


@register("mamba2", paper="arXiv:2405.21060")
class Mamba2(SequenceMixer):
    """Mamba-2: S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t, with scalar A and D per head.

    Transformers are SSMs (arXiv:2405.21060), section 7.1 for the block and definition 4.1 for SSD:

        z, x, B, C, dt = W_in u;   x, B, C = silu(conv(x, B, C));   dt = softplus(dt + dt_bias);   A = -exp(A_log)
        y = SSD(x, dt, A, B, C) + D x;   out = W_out RMSNorm(y * silu(z))

    Axes: H heads of width P (`head_dim`), N = `d_state`, G = `num_groups` shared pairs of B and C. Initialisation as
    in the official code: A uniform in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1], D = 1. The official
    `d_ssm`, `D_has_hdim` and `dt_limit` are left out.

    Checked against transformers' `Mamba2Mixer`, weights copied over. The published count is the expand * d_model * N
    elements of `ssm`; it leaves out the (d_conv - 1)(expand * d_model + 2 G N) elements of `conv`.

    Raises ValueError where `head_dim` does not divide expand * d_model, or `num_groups` the number of heads.
    """

    backends = ("triton", "mamba-ssm", "reference")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int | None = None,
        num_groups: int = 1,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        require_at_least(1, d_state=d_state, d_conv=d_conv, expand=expand)
        require_positive(norm_eps=norm_eps)
        self.d_inner, self.d_state, self.num_groups = expand * d_model, d_state, num_groups
        if head_dim is None:
            self.num_heads = default_num_heads(self.d_inner, 64)
        elif head_dim < 1 or self.d_inner % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide expand * d_model = {self.d_inner}")
        else:
            self.num_heads = self.d_inner // head_dim
        self.head_dim = self.d_inner // self.num_heads
        if num_groups < 1 or self.num_heads % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide the number of heads, {self.num_heads}")
        self.widths = [self.d_inner, num_groups * d_state, num_groups * d_state]
        self.in_proj = nn.Linear(d_model, self.d_inner + sum(self.widths) + self.num_heads, bias=False)
        self.conv = ShortConvolution(sum(self.widths), d_conv, activation="silu")
        self.dt_bias = nn.Parameter(step_size_bias(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.d_inner))
        self.norm_eps = norm_eps
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def unsupported(self, backend, **case):
        if backend == "triton":
            return whole_sequences_only(self.d_state, MAX_TRITON_WIDTH, named=self.backend == backend, **case)
        return mamba_ssm.refusal(backend, self.conv, self.d_state, chunked=True, **case)

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> Mamba2State:
        like = self.like_parameters(device, dtype)
        ssm = torch.zeros(batch_size, self.num_heads, self.d_state, self.head_dim, **like)
        return Mamba2State(ssm, self.conv.init_tail(batch_size, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.empty_state(x), empty=True)[0]

    def prefill(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        self.check_state(x, state)
        return self._run(x, state)

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        self.check_state(x, state)
        return self._run(x, state)

    def _run(self, u: Tensor, state: Mamba2State, *, empty: bool = False) -> tuple[Tensor, Mamba2State]:
        """u [B, T, D] or, one token, [B, D]; `empty`: the state is."""
        backend = self.backend_for(u)
        if backend == "triton" and u.ndim == 3:
            # Products of their own: their gradients are joined by nobody, and few columns suit no tensor cores.
            parts = self.in_proj.weight.split([self.d_inner, sum(self.widths), self.num_heads])
            z, xbc, dt = (F.linear(u, weight) for weight in parts)
        else:
            z, xbc, dt = self.in_proj(u).split([self.d_inner, sum(self.widths), self.num_heads], dim=-1)
        if backend == "mamba-ssm":
            xbc, tail = mamba_ssm.short_convolution(self.conv, xbc, state.conv)
        elif backend == "triton" and u.ndim == 3:
            xbc, tail = self.conv.prefill_by_kernel(xbc, state.conv, empty=empty)
        else:
            xbc, tail = (self.conv.step if u.ndim == 2 else self.conv.prefill)(xbc, state.conv)
        inner, b, c = xbc.split(self.widths, dim=-1)
        x = split_heads(inner, self.num_heads)
        b, c = split_heads(b, self.num_groups), split_heads(c, self.num_groups)
        kernel = "triton" if backend == "triton" and u.ndim == 3 else "reference"
        if backend == "mamba-ssm":
            y, ssm = mamba_ssm.chunk_scan(x, dt, -self.A_log.float().exp(), b, c, self.dt_bias, state.ssm)
        else:
            y, ssm = self._mix(x, dt, b, c, state.ssm, kernel)
        skip = self.D.repeat_interleave(self.head_dim)
        norm = {"num_groups": self.num_groups, "eps": self.norm_eps, "backend": kernel}
        y = gated_norm(merge_heads(y), z, self.norm_weight, x=inner, skip=skip, **norm)
        return self.out_proj(y), Mamba2State(ssm, tail)

    def _mix(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, ssm: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        """x [..., H, P], dt [..., H], b c [..., G, N], ssm [B, H, N, P] -> y [..., H, P], ssm."""
        dt = (dt + self.dt_bias).to(torch.promote_types(dt.dtype, torch.float32))
        dt = softplus(dt) if kernel == "triton" else F.softplus(dt)
        g = -self.A_log.to(dt.dtype).exp() * dt
        k, q = (part.repeat_interleave(self.num_heads // self.num_groups, dim=-2) for part in (b, c))
        v = (x * dt.unsqueeze(-1)).to(x.dtype)
        if x.ndim == 3:
            return linear_recurrence_step(q, k, v, g, ssm)
        return linear_recurrence(q, k, v, g, initial_state=ssm, output_final_state=True, backend=kernel)


@torch.library.custom_op("zoology::softplus", mutates_args=(), schema="(Tensor x) -> Tensor")
def softplus(x: Tensor) -> Tensor:
    """`F.softplus`, whose result the compiler keeps: backwards it would compute it anew for every channel of a head."""
    return F.softplus(x)


@softplus.register_fake
def _(x):
    return torch.empty_like(x)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    (y,) = ctx.saved_tensors
    return grad * -torch.expm1(-y)


softplus.register_autograd(_backward, setup_context=_setup)
