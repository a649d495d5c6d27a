"""Gated linear attention: a matrix state with a data-dependent decay per key channel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures import fla
from architectures.layers import ShortConvolution, merge_heads, split_heads, whole_sequences_only
from architectures.mixer import SequenceMixer, default_num_heads, expanded_width, require_at_least, require_positive
from architectures.registry import register
from kernels.linear_recurrence import MAX_TRITON_WIDTH, linear_recurrence, linear_recurrence_step


class GLAState(NamedTuple):
    """`kv` [B, H, K, V]."""

    kv: Tensor


class GLAConvState(NamedTuple):
    """`kv` [B, H, K, V]; `conv` [B, conv_size - 1, 2 H K + H V], the last inputs of the short convolution."""

    kv: Tensor
    conv: Tensor


@register("gla", paper="arXiv:2312.06635")
class GatedLinearAttention(SequenceMixer):
    """Gated linear attention: S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), alpha_t in (0, 1)^K.

    GLA (arXiv:2312.06635), section 4.4:

        alpha = sigmoid(W_2 W_1 x + b)^(1 / 16);   y = W_o (silu(W_g x) * RMSNorm(o)), the norm per head

    Keys are `expand_k`, values `expand_v` times d_model wide; `gate_rank` is the width between W_1 and W_2, and
    `gate_temperature` the 16. Queries, keys and gate start as in the official code, xavier-uniform with gain
    2^-2.5. Norm with weights and the optional short convolution (SiLU, `conv_size`) as in flash-linear-attention.

    Checked against fla's `naive_recurrent_gla`. Without the convolution the state is the published count, K V per
    head; the convolution's (conv_size - 1)(2 H K + H V) elements come on top.

    Raises ValueError where expand_k or expand_v times d_model is no integer, or num_heads does not divide both.
    """

    backends = ("triton", "fla", "reference")

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        expand_k: float | None = None,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        if expand_k is None:
            expand_k = 0.5 if d_model % 2 == 0 else 1.0
        key_dim = expanded_width(d_model, expand_k, name="expand_k", of="d_model")
        value_dim = expanded_width(d_model, expand_v, name="expand_v", of="d_model")
        require_at_least(1, gate_rank=gate_rank, conv_size=conv_size)
        require_positive(gate_temperature=gate_temperature, norm_eps=norm_eps)
        self.num_heads = default_num_heads(math.gcd(key_dim, value_dim), 32) if num_heads is None else num_heads
        if self.num_heads < 1 or key_dim % self.num_heads or value_dim % self.num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide both widths, {key_dim} of keys and {value_dim} of values"
            )
        self.head_k_dim, self.head_v_dim = key_dim // self.num_heads, value_dim // self.num_heads
        self.gate_temperature = gate_temperature
        self.q_proj = nn.Linear(d_model, key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, value_dim, bias=False)
        self.g_proj = nn.Linear(d_model, value_dim, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, key_dim))
        for layer in (self.q_proj, self.k_proj, *self.decay_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        self.conv = None
        if use_short_conv:
            self.conv = ShortConvolution(2 * key_dim + value_dim, conv_size, bias=False, activation="silu")
        self.norm_weight = nn.Parameter(torch.ones(self.head_v_dim))
        self.norm_eps = norm_eps
        self.out_proj = nn.Linear(value_dim, d_model, bias=False)

    def unsupported(self, backend, **case):
        if backend == "triton":
            return whole_sequences_only(self.head_k_dim, MAX_TRITON_WIDTH, named=self.backend == backend, **case)
        return fla.refusal(backend, "gla", self.head_k_dim, self.head_v_dim, **case)

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> GLAState | GLAConvState:
        like = self.like_parameters(device, dtype)
        kv = torch.zeros(batch_size, self.num_heads, self.head_k_dim, self.head_v_dim, **like)
        return GLAState(kv) if self.conv is None else GLAConvState(kv, self.conv.init_tail(batch_size, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.empty_state(x))[0]

    def prefill(self, x: Tensor, state: GLAState | GLAConvState) -> tuple[Tensor, GLAState | GLAConvState]:
        self.check_state(x, state)
        return self._run(x, state)

    def step(self, x: Tensor, state: GLAState | GLAConvState) -> tuple[Tensor, GLAState | GLAConvState]:
        self.check_state(x, state)
        return self._run(x, state)

    def _run(self, x: Tensor, state: GLAState | GLAConvState) -> tuple[Tensor, GLAState | GLAConvState]:
        """x [B, T, D] or, one token, [B, D]."""
        (q, k, v, g), *conv = self._project(x, *state[1:])
        backend, q = self.backend_for(x), q * self.head_k_dim**-0.5
        if backend == "fla":
            o, kv = fla.linear_recurrence(q, k, v, g, state.kv)
        else:
            o, kv = self._mix(q, k, v, g, state.kv, "triton" if backend == "triton" else "reference")
        o = F.rms_norm(o, o.shape[-1:], self.norm_weight.to(o.dtype), self.norm_eps)
        o = merge_heads(o) * F.silu(self.g_proj(x))
        return self.out_proj(o), type(state)(kv, *conv)

    def _project(self, x: Tensor, *conv: Tensor) -> tuple:
        """x [..., D] -> (q, k and log decay g [..., H, K], v [..., H, V]), and the tail of the convolution if any."""
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv is not None:
            convolve = self.conv.step if x.ndim == 2 else self.conv.prefill
            joint, *conv = convolve(torch.cat(parts, dim=-1), *conv)
            parts = joint.split([part.shape[-1] for part in parts], dim=-1)
        logits = self.decay_proj(x)
        # A decay of 1 - 1e-4 is lost in a 16-bit sigmoid.
        g = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.gate_temperature
        return tuple(split_heads(part, self.num_heads) for part in (*parts, g)), *conv

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, kv: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        if q.ndim == 3:
            return linear_recurrence_step(q, k, v, g, kv)
        return linear_recurrence(q, k, v, g, initial_state=kv, output_final_state=True, backend=kernel)
