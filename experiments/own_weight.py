"""The linear attention of the published set disjointness models: divided by a token's weight for itself.

    python -m zoology.run experiments/jrt_small_state.py --architectures experiments/own_weight.py

y_t = sum_{u <= t} w_tu v_u / w_tt with the weights w of Based (HazyResearch/prefix-linear-attention, 7490f22,
synthetic/zoology/mixers/based.py, `train_view: quadratic`), where the paper divides by the sum of the weights. A token
that was read before thus counts as one more of itself however many others there are, and they as noise, which grows
with the number of tokens read.
"""

import torch
from torch import Tensor

from architectures.layers import merge_heads
from architectures.mixer import check_prefix_length
from architectures.prefix_linear_attention import PrefixLinearAttention
from architectures.registry import register


class OwnWeight(PrefixLinearAttention):
    """Weights as in `PrefixLinearAttention`, sums divided by w_tt in place of all weights; trained and scored only.

    x [B, T, D] to [B, T, D], in the quadratic form. Raises NotImplementedError when asked to decode.
    """

    backends = ("reference",)

    def unsupported(self, backend, *, device, dtype, seq_len):
        return None

    def forward(self, x: Tensor, prefix_length: int = 0) -> Tensor:
        self.check_input(x)
        check_prefix_length(prefix_length, x.shape[1])
        q, k, v = (part.transpose(1, 2) for part in self._project(x))
        w = _weights(q, k)
        y = w.tril() @ v
        if prefix_length:
            prefix = x[:, :prefix_length]
            keys, values = (
                part(prefix).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for part in (self.prefix_k_proj, self.prefix_v_proj)
            )
            y = y + _weights(q, keys) @ values
        y = y / torch.diagonal(w, dim1=-2, dim2=-1).unsqueeze(-1)
        return self.out_proj(merge_heads(y.transpose(1, 2)))

    def prefill(self, x, state, prefix_length=0):
        raise NotImplementedError(f"{type(self).__name__} is trained and scored, not decoded")

    def prefill_empty(self, x, state, prefix_length=0):
        return self.prefill(x, state)

    def step(self, x, state):
        return self.prefill(x, state)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """q [B, H, T, f], k [B, H, U, f] -> 1 + s + s^2 / 2 [B, H, T, U], s = q.k / sqrt(f)."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return 1 + s + s * s / 2


@register("own_weight_prefix", paper="arXiv:2407.05483")
class OwnWeightPrefix(OwnWeight):
    """Reads a prefix non-causally, with keys and values of its own, as JRT-RNN does."""


@register("own_weight", paper="arXiv:2407.05483")
class OwnWeightCausal(OwnWeight):
    """Reads nothing but what came before."""

    takes_prefix = False

    def __init__(self, d_model: int, *, feature_dim: int = 16, num_heads: int = 1, backend: str = "auto"):
        super().__init__(d_model, feature_dim=feature_dim, num_heads=num_heads, backend=backend)
        del self.prefix_k_proj, self.prefix_v_proj
