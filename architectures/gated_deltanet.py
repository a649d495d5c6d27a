"""Gated DeltaNet: the delta rule with a decay per head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.deltanet import DeltaMixer, DeltaState
from architectures.layers import step_size_bias
from architectures.registry import register


class GatedDeltaNetState(DeltaState):
    """Memory of Gated DeltaNet: no other delta rule takes it."""

    __slots__ = ()


@register("gated_deltanet", paper="arXiv:2412.06464")
class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet: S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T with a scalar alpha_t per head.

    Gated Delta Networks (arXiv:2412.06464), eq. 10 and section 3.4. The decay is that of Mamba-2,
    log alpha_t = -exp(A) softplus(W_a x_t + dt); values are `expand_v` = 2 times as wide as keys and the output
    passes an RMSNorm per head gated by SiLU(W_g x_t). A and dt are initialised as in the official code (exp(A) uniform
    in (0, 16), softplus(dt) log-uniform in [0.001, 0.1]), which also keeps both out of weight decay. Where the
    official code takes num_heads x head_dim = 3/4 d_model, the default here is d_model, as in the MQAR experiments;
    those also have no output gate (`use_gate=False`). Grouped value heads are left out.

    The state is H K V elements and the tails of the short convolution, (conv_size - 1)(2 H K + H V), which the
    published counts leave out. Checked against transformers' Qwen3NextGatedDeltaNet, weights copied over.
    """

    State = GatedDeltaNetState
    fla_operation = "gated_delta_rule"

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        use_gate: bool = True,
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
            use_gate=use_gate,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
            backend=backend,
        )
        self.decay_proj = nn.Linear(d_model, self.num_heads, bias=False)
        # Kept away from 0, whose logarithm has no gradient.
        self.log_rate = nn.Parameter(torch.empty(self.num_heads).uniform_(0, 16).clamp(min=1e-3).log())
        self.step_bias = nn.Parameter(step_size_bias(self.num_heads))

    def _decay(self, x: Tensor) -> Tensor:
        return -self.log_rate.exp() * F.softplus(self.decay_proj(x) + self.step_bias)
