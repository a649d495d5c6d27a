"""RWKV-6: a matrix state with a data-dependent decay per key channel and a bonus for the current token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures import backends, fla
from architectures.layers import merge_heads, split_heads, token_shift
from architectures.mixer import SequenceMixer, default_num_heads, depth_and_height, divide_heads, require_at_least
from architectures.registry import register
from kernels.linear_recurrence import linear_recurrence, linear_recurrence_step


class RWKV6State(NamedTuple):
    """`kv` [B, H, K, K]; `shift` [B, D], the last input."""

    kv: Tensor
    shift: Tensor


@register("rwkv6", paper="arXiv:2404.05892")
class RWKV6(SequenceMixer):
    """RWKV-6 time mixing: o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t, S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T.

    Finch (arXiv:2404.05892), section 4.2, as in the official code (BlinkDL/RWKV-LM, `x060`), with d_t = x_{t-1} - x_t:

        m_w, m_k, m_v, m_r, m_g = tanh((x_t + d_t mu_x) A) B_i          data-dependent part of the token shift
        x_i = x_t + d_t (mu_i + m_i),    i in w, k, v, r, g
        r, k, v = W_r x_r, W_k x_k, W_v x_v;   w = time_decay + tanh(x_w C) D
        y = W_o (GroupNorm(o) * silu(W_g x_g)),  one group per head, eps = 64e-5

    The channel mixing of the paper is a channel mixer and not part of this. Initialisation is the official one: mu,
    decay and u vary over the channels and with `layer_idx` of `n_layers`; W_o, A and C start at zero.

    Checked against the official recurrence written token by token, and fla's `naive_recurrent_rwkv6`. State: K^2 per
    head, the published count, and the d_model of the token shift, which that count leaves out.

    Raises ValueError where num_heads does not divide d_model.
    """

    backends = ("fla", "reference")

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        mix_rank: int = 32,
        decay_rank: int = 64,
        layer_idx: int = 0,
        n_layers: int = 1,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        self.num_heads = default_num_heads(d_model, 64) if num_heads is None else num_heads
        self.head_dim = divide_heads(d_model, self.num_heads)
        require_at_least(1, mix_rank=mix_rank, decay_rank=decay_rank)
        self._init_time_parameters(mix_rank, decay_rank, *depth_and_height(layer_idx, n_layers))
        self.receptance, self.key, self.value, self.gate, self.output = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(5)
        )
        for layer, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0), (self.gate, 0.1)):
            nn.init.orthogonal_(layer.weight, gain=gain)
        nn.init.zeros_(self.output.weight)
        self.norm_weight = nn.Parameter(torch.full((d_model,), ((1 + layer_idx) / n_layers) ** 0.7))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))

    def _init_time_parameters(self, mix_rank: int, decay_rank: int, depth: float, height: float) -> None:
        d_model = self.d_model
        channel = torch.arange(d_model)
        ramp, mix = channel / max(1, d_model - 1), channel / d_model
        self.mix_x = nn.Parameter(1 - mix**height)
        self.mix = nn.Parameter(
            torch.stack(
                [
                    1 - mix**height,  # w
                    1 - mix**height,  # k
                    1 - (mix**height + 0.3 * depth),  # v
                    1 - mix ** (0.5 * height),  # r
                    1 - mix ** (0.5 * height),  # g
                ]
            )
        )
        self.mix_down = nn.Parameter(torch.zeros(d_model, 5 * mix_rank))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, d_model).uniform_(-0.01, 0.01))
        self.time_decay = nn.Parameter(-6 + 5 * ramp ** (0.7 + 1.3 * depth))
        self.decay_down = nn.Parameter(torch.zeros(d_model, decay_rank))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, d_model).uniform_(-0.01, 0.01))
        bonus = depth * (1 - ramp) + 0.1 * ((channel + 1) % 3 - 1)
        self.bonus = nn.Parameter(split_heads(bonus, self.num_heads))

    def unsupported(self, backend, **case):
        return fla.refusal(backend, "rwkv6", self.head_dim, self.head_dim, **case)

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> RWKV6State:
        like = self.like_parameters(device, dtype)
        kv = torch.zeros(batch_size, self.num_heads, self.head_dim, self.head_dim, **like)
        return RWKV6State(kv, torch.zeros(batch_size, self.d_model, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.empty_state(x), alone=True)[0]

    def prefill(self, x: Tensor, state: RWKV6State) -> tuple[Tensor, RWKV6State]:
        self.check_state(x, state)
        return self._run(x, state)

    def step(self, x: Tensor, state: RWKV6State) -> tuple[Tensor, RWKV6State]:
        self.check_state(x, state)
        return self._run(x, state)

    def _run(self, x: Tensor, state: RWKV6State, *, alone: bool = False) -> tuple[Tensor, RWKV6State]:
        """x [B, T, D] or, one token, [B, D]; `alone`: the state after it is not wanted."""
        earlier, last = token_shift(x, state.shift)
        r, k, v, g, gate = self._project(x, earlier - x)
        backend = self.backend_for(x)
        if backend == "fla" and not alone and backends.wants_grad(r, k, v, g, state.kv):
            backend = self.ran_beside("reference")  # fla's recurrent form drops the gradient of the final state
        if backend == "fla":
            o, kv = fla.linear_recurrence(r, k, v, g, state.kv, bonus=self.bonus)
        else:
            o, kv = self._mix(r, k, v, g, state.kv)
        o = merge_heads(F.layer_norm(o, o.shape[-1:], eps=64e-5))
        o = o * self.norm_weight.to(o.dtype) + self.norm_bias.to(o.dtype)
        return self.output(o * gate), RWKV6State(kv, last)

    def _project(self, x: Tensor, change: Tensor) -> tuple[Tensor, ...]:
        """x and x_{t-1} - x_t [..., D] -> r k v and the log decay g [..., H, K], the output gate [..., D]."""
        hidden = torch.tanh((x + change * self.mix_x) @ self.mix_down).unflatten(-1, (5, -1))
        amount = torch.einsum("...ir,ird->...id", hidden, self.mix_up) + self.mix
        x_w, x_k, x_v, x_r, x_g = (x.unsqueeze(-2) + change.unsqueeze(-2) * amount).unbind(-2)
        w = self.time_decay + torch.tanh(x_w @ self.decay_down) @ self.decay_up
        g = -w.to(torch.promote_types(w.dtype, torch.float32)).exp()
        parts = self.receptance(x_r), self.key(x_k), self.value(x_v), g
        return *(split_heads(part, self.num_heads) for part in parts), F.silu(self.gate(x_g))

    def _mix(self, r: Tensor, k: Tensor, v: Tensor, g: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        if r.ndim == 3:
            return linear_recurrence_step(r, k, v, g, kv, bonus=self.bonus)
        return linear_recurrence(r, k, v, g, bonus=self.bonus, initial_state=kv, output_final_state=True)
