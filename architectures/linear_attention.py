"""Linear attention with a choice of feature maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from architectures import backends
from architectures.feature_maps import Taylor, create_feature_map
from architectures.layers import merge_heads, split_heads
from architectures.mixer import SequenceMixer, divide_heads, require_at_least, require_positive
from architectures.registry import register
from kernels.linear_recurrence import linear_recurrence, linear_recurrence_step
from kernels.taylor_linear_attention import (
    TaylorState,
    taylor_linear_attention,
    taylor_linear_attention_step,
    triton_refusal,
)


class LinearAttentionState(NamedTuple):
    """`kv` [B, H, F, V] = sum phi(k) v^T, `key_sum` [B, H, F] = sum phi(k), `position` [] int64 (tokens seen)."""

    kv: Tensor
    key_sum: Tensor
    position: Tensor


@register("linear_attention", paper="arXiv:2006.16236")
class LinearAttention(SequenceMixer):
    """Linear attention: softmax attention with exp(q.k) replaced by phi(q).phi(k), so that memory does not grow.

        S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t),   y_t = phi(q_t).S_t / d(phi(q_t).z_t)

    The normaliser d depends on the feature map: where no weight phi(q).phi(k) is negative, d(w) = w + eps (the
    Taylor map has w >= t / 2 and needs no eps); where weights have either sign, w can be 0 and d(w) = max(|w|, 1),
    as in retention (arXiv:2307.08621, section 2.1) and mLSTM (arXiv:2405.04517, eq. 21).

    Args:
        feature_dim: width f of queries and keys per head.
        num_heads: divides d_model; each head has values of width d_model / num_heads.
        feature_map: a name of `architectures.feature_maps`; feature_map_options: its options.
        eps: added to the sum of weights of maps that are not negative, other than taylor.

    Checked against: the quadratic form with explicit weights for every map; fla's `naive_recurrent_linear_attn`.
    State of the published count for Based, (V + 1) F per head, with F = 1 + f + f (f + 1) / 2 where Based's code
    counts 1 + f + f^2.
    """

    backends = ("triton", "reference")

    def __init__(
        self,
        d_model: int,
        *,
        feature_dim: int = 16,
        num_heads: int = 1,
        feature_map: str = "taylor",
        feature_map_options: dict | None = None,
        eps: float = 1e-6,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        require_at_least(1, feature_dim=feature_dim)
        require_positive(eps=eps)
        self.head_dim = divide_heads(d_model, num_heads)
        self.num_heads, self.feature_dim, self.eps = num_heads, feature_dim, eps
        options = feature_map_options or {}
        self.feature_map_q = create_feature_map(feature_map, feature_dim, **options)
        self.feature_map_k = create_feature_map(feature_map, feature_dim, **options)
        self.q_proj = nn.Linear(d_model, num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(d_model, num_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def unsupported(self, backend, *, device, dtype, seq_len):
        if backend != "triton":
            return None
        if not isinstance(self.feature_map_k, Taylor):
            return "there are Triton kernels for feature_map='taylor' only"
        return triton_refusal(torch.empty(1, 1, 1, self.feature_dim, device=device, dtype=dtype))

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> LinearAttentionState:
        like = self.like_sums(device, dtype)
        shape = (batch_size, self.num_heads, self.feature_map_k.num_features)
        return LinearAttentionState(
            kv=torch.zeros(*shape, self.head_dim, **like),
            key_sum=torch.zeros(shape, **like),
            position=torch.zeros((), dtype=torch.int64, device=like["device"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self._run(x, None)[0]

    def prefill(self, x: Tensor, state: LinearAttentionState) -> tuple[Tensor, LinearAttentionState]:
        self.check_state(x, state)
        return self._run(x, state)

    def step(self, x: Tensor, state: LinearAttentionState) -> tuple[Tensor, LinearAttentionState]:
        self.check_state(x, state)
        backend = self.backend_for(x)
        q, k, v = self._project(x)
        if isinstance(self.feature_map_k, Taylor):
            taylor_state = TaylorState(state.kv, state.key_sum)
            if backend == "triton" and backends.wants_grad(q, k, v, *taylor_state):
                backend = self.ran_beside("reference")  # the Triton step has no gradient
            o, taylor_state = taylor_linear_attention_step(q, k, v, taylor_state, backend=backend)
            return self.out_proj(merge_heads(o)), LinearAttentionState(*taylor_state, state.position + 1)
        q, k, v = self._features(q[:, None], k[:, None], v[:, None], state.position[None])
        o, joint = linear_recurrence_step(q[:, 0], k[:, 0], v[:, 0], None, _join(state))
        return self._output(o), _split(joint, state.position + 1)

    def _run(self, x: Tensor, state: LinearAttentionState | None) -> tuple[Tensor, LinearAttentionState | None]:
        backend = self.backend_for(x)
        q, k, v = self._project(x)
        length, resumed = x.shape[1], state is not None
        if isinstance(self.feature_map_k, Taylor):
            o, taylor_state = taylor_linear_attention(
                q,
                k,
                v,
                initial_state=TaylorState(state.kv, state.key_sum) if resumed else None,
                output_final_state=resumed,
                backend=backend,
            )
            after = LinearAttentionState(*taylor_state, state.position + length) if resumed else None
            return self.out_proj(merge_heads(o)), after
        positions = torch.arange(length, device=x.device)
        q, k, v = self._features(q, k, v, positions + state.position if resumed else positions)
        o, joint = linear_recurrence(
            q, k, v, initial_state=_join(state) if resumed else None, output_final_state=resumed
        )
        return self._output(o), _split(joint, state.position + length) if resumed else None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] -> q k [..., H, f], v [..., H, V]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(split_heads(projection(x), self.num_heads) for projection in projections)

    def _features(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k) and [v, 1], [B, T, H, ...]: the column of ones makes the recurrence sum the keys as well."""
        return (
            self.feature_map_q(q, positions).to(v.dtype),
            self.feature_map_k(k, positions).to(v.dtype),
            torch.cat([v, torch.ones_like(v[..., :1])], dim=-1),
        )

    def _output(self, o: Tensor) -> Tensor:
        """[..., H, V + 1], the last column being the sum of weights, -> [..., D]."""
        o, weight = o[..., :-1], o[..., -1:]
        normaliser = weight + self.eps if self.feature_map_k.nonnegative else weight.abs().clamp(min=1)
        return self.out_proj(merge_heads(o / normaliser))


def _join(state: LinearAttentionState) -> Tensor:
    return torch.cat([state.kv, state.key_sum.unsqueeze(-1)], dim=-1)


def _split(joint: Tensor, position: Tensor) -> LinearAttentionState:
    return LinearAttentionState(joint[..., :-1], joint[..., -1], position)
