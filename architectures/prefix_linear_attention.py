"""Prefix linear attention (JRT-RNN): Based's linear attention behind a prefix that is read non-causally."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from architectures.based import Based
from architectures.layers import merge_heads, split_heads
from architectures.mixer import check_prefix_length
from architectures.registry import register
from kernels.taylor_linear_attention import TaylorState


class PrefixState(NamedTuple):
    """`kv` and `key_sum` as Based has them (`TaylorState`), the sums over the prefix among them."""

    kv: Tensor
    key_sum: Tensor


@register("prefix_linear_attention", paper="arXiv:2407.05483")
class PrefixLinearAttention(Based):
    """Linear attention of JRT-RNN: every token also reads all M tokens of a prefix, by keys and values of their own.

        y_t = phi(q_t).(S_t + E) / phi(q_t).(z_t + e),   E = sum_{j <= M} phi(k'_j) v'_j^T,   e = sum_{j <= M} phi(k'_j)

    "Just read twice" (arXiv:2407.05483), section 4: S_t and z_t are the causal sums of Based over all tokens, the
    prefix included, and q is shared. M is the argument `prefix_length` of `forward` and `prefill`; with M = 0 this is
    Based. E and e are added to the same state, which is therefore Based's, element for element.

    A prefix must come whole, in the first prefill: tokens that were read before could not have seen it. Whether a
    state is empty is read off its key_sum, whose constant feature counts keys; that read waits for the device.

    Nothing else of the published models is non-causal: in their language models the short convolutions and sliding
    windows beside this layer stay causal, and so do `base_conv` and `sliding_window` here, which take no prefix.
    Checked against the definition with explicit weights, token by token, and by hand against the layer of the published
    language models (HazyResearch/prefix-linear-attention, 7490f22, its plain PyTorch form): with the same weights and
    prefixes of 1, 7 and 20 of 20 tokens, outputs in float64 agree to 4e-13.

    Their set disjointness models (HazyResearch/prefix-linear-attention, 7490f22, synthetic/zoology) differ from the
    paper's formula and from this: causal or not, they divide by the token's weight for itself, w_tt, in place of the
    sum of weights (`train_view: quadratic`; experiments/own_weight.py has that form), and a dense layer stands before
    and after the convolution. The one that is not causal has no separate k', v'; it drops the order of all tokens, and
    its convolution wraps around the ends.
    """

    State = PrefixState
    takes_prefix = True

    def __init__(self, d_model: int, *, feature_dim: int = 16, num_heads: int = 1, backend: str = "auto"):
        super().__init__(d_model, feature_dim=feature_dim, num_heads=num_heads, backend=backend)
        self.prefix_k_proj = nn.Linear(d_model, num_heads * feature_dim, bias=False)
        self.prefix_v_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, prefix_length: int = 0) -> Tensor:
        if prefix_length == 0:
            return super().forward(x)
        self.check_input(x)
        return self._attend(x, prefix_length)[0]

    def prefill(self, x: Tensor, state: PrefixState, prefix_length: int = 0) -> tuple[Tensor, PrefixState]:
        if prefix_length == 0:
            return super().prefill(x, state)
        self.check_state(x, state)
        if not state.key_sum.is_meta and bool(torch.any(state.key_sum[..., 0] != 0)):
            raise ValueError(
                f"prefix_length={prefix_length} with a state that holds tokens: a prefix must come whole, in the first "
                "prefill; allowed here: 0"
            )
        y, after = self._attend(x, prefix_length, initial_state=TaylorState(*state), output_final_state=True)
        return y, PrefixState(*after)

    def prefill_empty(self, x: Tensor, state: PrefixState, prefix_length: int = 0) -> tuple[Tensor, PrefixState]:
        self.check_state(x, state)
        if prefix_length == 0:
            return super().prefill_empty(x, state)
        y, after = self._attend(x, prefix_length, output_final_state=True)
        return y, PrefixState(*(part.to(state.kv.dtype) for part in after))

    def _attend(self, x: Tensor, prefix_length: int, **states) -> tuple[Tensor, TaylorState | None]:
        check_prefix_length(prefix_length, x.shape[1])
        prefix = x[:, :prefix_length]
        o, state = kernels.prefix_linear_attention(
            *self._project(x),
            split_heads(self.prefix_k_proj(prefix), self.num_heads),
            split_heads(self.prefix_v_proj(prefix), self.num_heads),
            backend=self.backend_for(x),
            **states,
        )
        return self.out_proj(merge_heads(o)), state
