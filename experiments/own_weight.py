"""The layers of the published set disjointness models, where they are not those of the papers.

    python -m zoology.run experiments/jrt_published.py --architectures experiments/own_weight.py

Linear attention divided by a token's weight for itself, y_t = sum_{u <= t} w_tu v_u / w_tt with the weights w of Based
(HazyResearch/prefix-linear-attention, 7490f22, synthetic/zoology/mixers/based.py, `train_view: quadratic`), where the
paper divides by the sum of the weights. A token that was read before thus counts as one more of itself however many
others there are, and they as noise, which grows with the number of tokens read.

A base convolution with a dense layer before and after its convolution (convolution.py there, `expand_dim=1`). With
weights of .02 to begin with it mixes neighbours some twenty times less than `base_conv` does.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.base_conv import BaseConv
from architectures.layers import merge_heads
from architectures.mixer import check_prefix_length
from architectures.prefix_linear_attention import PrefixLinearAttention
from architectures.registry import register


class TrainedOnly:
    """For mixers that are trained and scored only: raises NotImplementedError when asked to decode."""

    def prefill(self, x, state, prefix_length=0):
        raise NotImplementedError(f"{type(self).__name__} is trained and scored, not decoded")

    def prefill_empty(self, x, state, prefix_length=0):
        return self.prefill(x, state)

    def step(self, x, state):
        return self.prefill(x, state)


class OwnWeight(TrainedOnly, PrefixLinearAttention):
    """Weights as in `PrefixLinearAttention`, sums divided by w_tt in place of all weights.

    x [B, T, D] to [B, T, D], in the quadratic form.
    """

    backends = ("reference",)

    def unsupported(self, backend, *, device, dtype, seq_len):
        return None

    def forward(self, x: Tensor, prefix_length: int = 0) -> Tensor:
        self.check_input(x)
        check_prefix_length(prefix_length, x.shape[1])
        q, k, v = (part.transpose(1, 2) for part in self._project(x))
        y = self._seen(_weights(q, k), prefix_length) @ v
        if prefix_length and hasattr(self, "prefix_k_proj"):
            prefix = x[:, :prefix_length]
            keys, values = (
                part(prefix).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for part in (self.prefix_k_proj, self.prefix_v_proj)
            )
            y = y + _weights(q, keys) @ values
        y = y / _own_weights(q, k)
        return self.out_proj(merge_heads(y.transpose(1, 2)))

    def _seen(self, w: Tensor, prefix_length: int) -> Tensor:
        """w [B, H, T, T] with zeros where a token may not look."""
        return w.tril()


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """q [B, H, T, f], k [B, H, U, f] -> 1 + s + s^2 / 2 [B, H, T, U], s = q.k / sqrt(f).

    Computed as ((1 + s)^2 + 1) / 2, the first 1 as one more feature: three passes over what is quadratic in T.
    """
    q = F.pad(q * (2 * q.shape[-1]) ** -0.5, (0, 1), value=0.5**0.5)
    return (q @ F.pad(k, (0, 1), value=1.0).transpose(-1, -2)).square() + 0.5


def _own_weights(q: Tensor, k: Tensor) -> Tensor:
    """q, k [B, H, T, f] -> [B, H, T, 1], the diagonal of `_weights`."""
    s = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
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


@register("own_weight_noncausal", paper="arXiv:2407.05483")
class OwnWeightNoncausal(OwnWeightCausal):
    """Every token reads the whole prefix, by the same keys and values: within it order is lost, as published."""

    takes_prefix = True

    def _seen(self, w: Tensor, prefix_length: int) -> Tensor:
        place = torch.arange(w.shape[-1], device=w.device)
        return w * ((place <= place[:, None]) | (place < prefix_length))


@register("dense_base_conv", paper="arXiv:2407.05483")
class DenseBaseConv(TrainedOnly, BaseConv):
    """y = A conv(C x) * (W x) + x, each dense layer with a bias; x [B, T, D] to [B, T, D]."""

    def __init__(self, d_model: int, *, kernel_size: int = 3, backend: str = "auto"):
        super().__init__(d_model, kernel_size=kernel_size, backend=backend)
        self.before, self.after = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, prefix_length: int = 0) -> Tensor:
        self.check_input(x)
        check_prefix_length(prefix_length, x.shape[1])
        convolved = self._convolved(self.before(x), prefix_length)
        return self.after(convolved) * self.projection(x) + x

    def _convolved(self, x: Tensor, prefix_length: int) -> Tensor:
        return self.conv(x)


@register("dense_base_conv_noncausal", paper="arXiv:2407.05483")
class DenseBaseConvNoncausal(DenseBaseConv):
    """The convolution wraps around the prefix: its first tokens also read its last, as published."""

    takes_prefix = True

    def _convolved(self, x: Tensor, prefix_length: int) -> Tensor:
        before = x[:, max(prefix_length - self.conv.kernel_size + 1, 0) : prefix_length]
        return self.conv(torch.cat([before, x], dim=1))[:, before.shape[1] :]
