"""RWKV-7: a delta rule whose decay, removal key and in-context learning rate are vectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures import fla
from architectures.layers import merge_heads, split_heads, token_shift, whole_sequences_only
from architectures.mixer import SequenceMixer, default_num_heads, depth_and_height, divide_heads, require_at_least
from architectures.registry import register
from kernels.delta_rule import MAX_TRITON_WIDTH, dplr_delta_rule, dplr_delta_rule_step


class RWKV7State(NamedTuple):
    """Memory of an RWKV-7 time mixer."""

    kv: Tensor  # [B, H, K, V]
    shift: Tensor  # [B, D], the last input, for the token shift


class LowRank(nn.Module):
    """bias + f(x A) B with A zero and B orthogonal of gain 0.1 at the start, RWKV-7's "loramlp"."""

    def __init__(self, d_model: int, rank: int, bias: Tensor | None, activation=None):
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(d_model, rank, bias=False)
        self.up = nn.Linear(rank, d_model, bias=bias is not None)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1 * max(1.0, math.sqrt(rank / d_model)))
        if bias is not None:
            self.up.bias.data.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x)
        return self.up(hidden if self.activation is None else self.activation(hidden))


@register("rwkv7", paper="arXiv:2503.14456")
class RWKV7(SequenceMixer):
    """RWKV-7 time mixing: S_t = (diag(w_t) - kappa_t (a_t * kappa_t)^T)^T S_{t-1} + k_t v_t^T, read by r_t.

    RWKV-7 "Goose" (arXiv:2503.14456), section 4 and eq. 3-17, as in the official code (BlinkDL/RWKV-LM, `x070`). With
    the token shift x_t + (x_{t-1} - x_t) mu for each of r, w, k, v, a, g:

        decay                     w_t = exp(-e^{-1/2} sigmoid(low rank of x_w))
        in-context learning rate  a_t = sigmoid(low rank of x_a)
        removal key               kappa_t = unit length of k * k_k
        key                       k_t = k (1 + (a_t - 1) k_a)
        output                    W_o (g_t * (GroupNorm(S_t^T r_t) + (r_t . r_k * k_t) v_t)),  g_t low rank of x_g

    Departs from the paper in one thing: there is no value residual. The paper mixes the values of the first layer
    into those of later ones; a sequence mixer sees its own input only, so every layer here is what the paper's
    first layer is (which is also what ran in the published MQAR results). Initialisation is the official one: it
    depends on `layer_idx` of `n_layers`, and starts the output projection at zero.

    The state is H K V elements and the d_model of the token shift, which the published counts leave out. Checked
    against the equations of the official code written out token by token.
    """

    backends = ("fla", "triton", "reference")
    keep_init = True  # decay and learning rate start as biases of linear layers

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        decay_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        layer_idx: int = 0,
        n_layers: int = 1,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        if num_heads is None and head_dim is None:
            num_heads = default_num_heads(d_model, 64)
        elif num_heads is None:
            num_heads = divide_heads(d_model, head_dim, name="head_dim")
        self.num_heads = num_heads
        if head_dim is not None and head_dim * num_heads != d_model:
            raise ValueError(f"head_dim={head_dim} times num_heads={num_heads} must be d_model={d_model}")
        self.head_dim = divide_heads(d_model, num_heads)
        ranks = {
            "decay_low_rank_dim": decay_low_rank_dim,
            "a_low_rank_dim": a_low_rank_dim,
            "gate_low_rank_dim": gate_low_rank_dim,
        }
        require_at_least(1, **ranks)
        # The official rank for a width, in multiples of 32.
        official = [max(32, round(factor * d_model**0.5 / 32) * 32) for factor in (2.5, 2.5, 5.0)]
        chosen = (default if rank is None else rank for rank, default in zip(ranks.values(), official))
        self._init_parameters(*chosen, layer_idx, n_layers)

    def _init_parameters(self, decay_rank: int, a_rank: int, gate_rank: int, layer_idx: int, n_layers: int) -> None:
        d_model, channel = self.d_model, torch.arange(self.d_model)
        depth, height = depth_and_height(layer_idx, n_layers)
        self.mix = nn.ParameterDict(
            {
                name: nn.Parameter(1 - (channel / d_model) ** (power * height))
                for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items()
            }
        )
        ramp = channel / max(1, d_model - 1)
        zigzag = 2 * (channel % self.head_dim) / max(1, self.head_dim - 1) - 1
        zigzag = zigzag * zigzag.abs()
        decay = 6 * ramp ** (1 + depth**0.3) - 5.5 + 2.5 * zigzag
        self.decay = LowRank(d_model, decay_rank, decay, torch.tanh)
        self.rate = LowRank(d_model, a_rank, -0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
        self.gate = LowRank(d_model, gate_rank, None, torch.sigmoid)
        self.k_k = nn.Parameter(0.71 - 0.1 * (ramp - 0.5))
        self.k_a = nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.num_heads, self.head_dim), -0.04))
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        nn.init.orthogonal_(self.r_proj.weight)
        nn.init.orthogonal_(self.k_proj.weight, gain=0.1)
        nn.init.orthogonal_(self.v_proj.weight)
        nn.init.zeros_(self.out_proj.weight)
        self.norm_weight = nn.Parameter(torch.full((d_model,), ((1 + layer_idx) / n_layers) ** 0.7))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))

    def _mix(
        self, r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor, kernel: str
    ) -> tuple[Tensor, Tensor]:
        """The recurrence on [B, T, H, K], or on one token [B, H, K], from a state on."""
        if r.dim() == 3:
            return dplr_delta_rule_step(r, k, v, a, b, g, state, scale=1.0)
        return dplr_delta_rule(
            r, k, v, a, b, g, scale=1.0, initial_state=state, output_final_state=True, backend=kernel
        )

    def _run(self, x: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        """x [B, T, D] or [B, D]."""
        self.check_state(x, state)
        shifted, last = token_shift(x, state.shift)
        mixed = {name: torch.lerp(x, shifted, mu.to(x.dtype)) for name, mu in self.mix.items()}
        g = -math.exp(-0.5) * self.decay(mixed["w"]).sigmoid()
        rate = self.rate(mixed["a"]).sigmoid()
        r, k, v = self.r_proj(mixed["r"]), self.k_proj(mixed["k"]), self.v_proj(mixed["v"])
        removal = F.normalize(split_heads(k * self.k_k, self.num_heads), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        r, k, v, rate, g = (split_heads(part, self.num_heads) for part in (r, k, v, rate, g))
        backend, inputs = self.backend_for(x), (r, k, v, -removal, removal * rate, g, state.kv)
        if backend == "fla":
            o, kv = fla.dplr_delta_rule(*inputs)
        else:
            o, kv = self._mix(*inputs, "triton" if backend == "triton" else "reference")
        o = merge_heads(F.layer_norm(o, (self.head_dim,), eps=1e-5 * self.head_dim))
        o = o * self.norm_weight + self.norm_bias
        o = o + merge_heads((r * k * self.r_k).sum(-1, keepdim=True) * v)
        return self.out_proj(o * self.gate(mixed["g"])), RWKV7State(kv, last)

    def unsupported(self, backend, **case):
        if backend == "triton":
            return whole_sequences_only(self.head_dim, MAX_TRITON_WIDTH, named=self.backend == backend, **case)
        return fla.refusal(backend, "dplr_delta_rule", self.head_dim, self.head_dim, **case)

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> RWKV7State:
        like = self.like_parameters(device, dtype)
        kv = torch.zeros(batch_size, self.num_heads, self.head_dim, self.head_dim, **like)
        return RWKV7State(kv, torch.zeros(batch_size, self.d_model, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.prefill(x, self.empty_state(x))[0]

    def prefill(self, x: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        return self._run(x, state)

    def step(self, x: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        return self._run(x, state)
