"""Based: linear attention whose feature map is the second-order Taylor expansion of the exponential."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import kernels
from architectures import backends
from architectures.layers import merge_heads, split_heads
from architectures.mixer import SequenceMixer, divide_heads, require_at_least
from architectures.registry import register
from kernels.taylor_linear_attention import LONGEST_QUADRATIC, TaylorState, triton_refusal


@register("based", paper="arXiv:2402.18668")
class Based(SequenceMixer):
    """Taylor linear attention of Based: y_t = sum_{u <= t} w_tu v_u / sum_{u <= t} w_tu, w = 1 + s + s^2 / 2.

    Based (arXiv:2402.18668), section 4, with s = q.k / sqrt(feature_dim) the exponent of softmax attention.
    The paper's models alternate it with short convolutions or sliding windows: write those as layers,
    e.g. `[base_conv, based]` or `[sliding_window, based]`. The state is the packed symmetric one of
    `kernels.taylor_linear_attention`, (1 + f + f (f + 1) / 2) (V + 1) elements per head, as published; it is kept in
    float32 unless told otherwise. The queries and keys are projected without bias, as in the paper's code. Checked
    against fla's `naive_parallel_based`.
    """

    backends = ("triton", "reference")
    State: ClassVar[type[NamedTuple]] = TaylorState

    def __init__(self, d_model: int, *, feature_dim: int = 16, num_heads: int = 1, backend: str = "auto"):
        super().__init__(d_model, backend=backend)
        require_at_least(1, feature_dim=feature_dim)
        self.feature_dim = feature_dim
        self.num_heads = num_heads
        self.head_dim = divide_heads(d_model, num_heads)
        self.q_proj = nn.Linear(d_model, num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(d_model, num_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def unsupported(self, backend, *, device, dtype, seq_len):
        if backend != "triton":
            return None
        if self.backend == "auto" and dtype == torch.float32 and 1 < seq_len <= LONGEST_QUADRATIC:
            return f"in float32 up to {LONGEST_QUADRATIC} tokens the quadratic form is faster"
        return triton_refusal(torch.empty(1, 1, 1, self.feature_dim, device=device, dtype=dtype))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] -> q, k [..., H, f], v [..., H, V]."""
        return tuple(split_heads(part(x), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj))

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        o, _ = kernels.taylor_linear_attention(*self._project(x), backend=self.backend_for(x))
        return self.out_proj(merge_heads(o))

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> TaylorState:
        like = self.like_sums(device, dtype)
        return self.State(*TaylorState.zeros(batch_size, self.num_heads, self.feature_dim, self.head_dim, **like))

    def prefill(self, x: Tensor, state: TaylorState) -> tuple[Tensor, TaylorState]:
        self.check_state(x, state)
        o, state = kernels.taylor_linear_attention(
            *self._project(x), initial_state=TaylorState(*state), output_final_state=True, backend=self.backend_for(x)
        )
        return self.out_proj(merge_heads(o)), self.State(*state)

    def prefill_empty(self, x: Tensor, state: TaylorState) -> tuple[Tensor, TaylorState]:
        self.check_state(x, state)
        o, after = kernels.taylor_linear_attention(
            *self._project(x), output_final_state=True, backend=self.backend_for(x)
        )
        return self.out_proj(merge_heads(o)), self.State(*(part.to(state.kv.dtype) for part in after))

    def step(self, x: Tensor, state: TaylorState) -> tuple[Tensor, TaylorState]:
        self.check_state(x, state)
        q, k, v = self._project(x)
        backend = self.backend_for(x)
        if backend == "triton" and backends.wants_grad(q, k, v, *state):
            backend = self.ran_beside("reference")  # the Triton step has no gradient
        o, state = kernels.taylor_linear_attention_step(q, k, v, TaylorState(*state), backend=backend, inplace=True)
        return self.out_proj(merge_heads(o)), self.State(*state)
