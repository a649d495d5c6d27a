"""Kimi Delta Attention: the delta rule with a decay per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.deltanet import DeltaMixer, DeltaState
from architectures.layers import split_heads, step_size_bias
from architectures.registry import register


class KimiDeltaAttentionState(DeltaState):
    """Memory of Kimi Delta Attention: no other delta rule takes it."""

    __slots__ = ()


@register("kda", paper="arXiv:2510.26692")
class KimiDeltaAttention(DeltaMixer):
    """Kimi Delta Attention: S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, alpha_t per channel.

    Kimi Linear (arXiv:2510.26692), eq. 1 and section 4. The decay is log alpha_t = -exp(A) softplus(W_2 W_1 x_t + dt)
    with one A per head and one dt per channel, W_1 of rank V; the output passes an RMSNorm per head gated by
    sigmoid(W_4 W_3 x_t + b). A and dt are initialised as in the official code (exp(A) uniform in (1, 16), softplus(dt)
    log-uniform in [0.001, 0.1]), which also keeps both out of weight decay. Grouped value heads and the bounded
    gate of the code's later versions are left out.

    The state is H K V elements and the tails of the short convolution, (conv_size - 1)(2 H K + H V). Checked against
    transformers' KimiLinearDeltaAttention, weights copied over.
    """

    backends = ("fla", "reference")
    State = KimiDeltaAttentionState
    fla_operation = "kda"

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__(
            d_model,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
            backend=backend,
        )
        rank = self.head_v_dim
        self.decay_proj = nn.Sequential(
            nn.Linear(d_model, rank, bias=False), nn.Linear(rank, self.widths[1], bias=False)
        )
        self.log_rate = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.step_bias = nn.Parameter(step_size_bias(self.widths[1]))
        self.gate_proj = nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, self.widths[2]))

    def _decay(self, x: Tensor) -> Tensor:
        step = F.softplus(self.decay_proj(x) + self.step_bias)
        return -self.log_rate.exp().unsqueeze(-1) * split_heads(step, self.num_heads)

    def _gate(self, x: Tensor) -> Tensor:
        return split_heads(self.gate_proj(x).sigmoid(), self.num_heads)
