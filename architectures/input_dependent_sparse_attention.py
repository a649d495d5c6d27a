"""Input-dependent sparse attention: only the tokens that select themselves look anything up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.attention import Attention, AttentionState
from architectures.mixer import require_at_least
from architectures.registry import register


class SparseAttentionState(AttentionState):
    """KV cache of every token, selected or not: any later query may read it."""

    __slots__ = ()


class AddedLoss(torch.autograd.Function):
    """Return y unchanged, and add `loss` to whatever loss is derived from it: its gradient there is one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.like = (inputs[1].shape, inputs[1].dtype, inputs[1].device)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return gradient, torch.ones(shape, dtype=dtype, device=device)


@register("input_dependent_sparse_attention", paper="arXiv:2312.04927")
class InputDependentSparseAttention(Attention):
    """Selective attention of Zoology: y_t = f(x_t) attention(x)_t, where f is 0 for tokens that need no look-up.

    Zoology (arXiv:2312.04927), section 5, "learned selection", and `SigmoidLookups` of its code: f(x) = sigmoid(w . x)
    scales the attention output, and a penalty max(0, mean_t f(x_t) - num_lookups / T) keeps look-ups rare (weight
    `selection_penalty`; num_lookups is sqrt(T) when None). The paper places it after convolutions, as
    `[base_conv, input_dependent_sparse_attention]`.

    The code trains with the soft f at every token and keeps, at test time, the sqrt(T) highest f of the whole
    sequence. That choice looks at the future and differs between training and testing, so here a token is selected
    when f(x_t) > `threshold`, by itself, in both: y_t = 0 below it, and the gradient passes as if f were soft there
    (straight through), so that a token that was not selected can become so. threshold = 0 is the soft form of
    the code's training. The penalty reaches the parameters in training mode without the training loop's help:
    it is added to the loss where the output is differentiated. The code adds x to the output; here the model does.

    The state is the whole KV cache, 2 T D elements at length T: selection saves reads, not memory. `selected(x)` tells
    which tokens read it. Checked against `attention`, selected and scaled by hand.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 1,
        num_lookups: int | None = None,
        threshold: float = 0.5,
        selection_penalty: float = 1e-3,
        rotary_fraction: float = 0.0,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__(d_model, num_heads=num_heads, rotary_fraction=rotary_fraction, bias=bias, backend=backend)
        require_at_least(1, num_lookups=num_lookups)
        require_at_least(0, selection_penalty=selection_penalty)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
        self.num_lookups = num_lookups
        self.threshold = threshold
        self.selection_penalty = selection_penalty
        self.select = nn.Linear(d_model, 1, bias=False)

    def _score(self, x: Tensor) -> Tensor:
        """f(x), [..., 1], in single precision at least: rounding must not flip a selection between two ways to run."""
        acc = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(acc), self.select.weight.to(acc)).sigmoid()

    def selected(self, x: Tensor) -> Tensor:
        """Which tokens of x [..., D] look something up, bool [...]."""
        return (self._score(x) > self.threshold).squeeze(-1)

    def _gate(self, y: Tensor, x: Tensor) -> Tensor:
        """Keep the attention output y of the selected tokens of x, [B, T, D]."""
        score = self._score(x)
        gate = score - torch.where(score > self.threshold, 0.0, score).detach()
        y = y * gate.to(y.dtype)
        if self.training and self.selection_penalty and torch.is_grad_enabled():
            length = x.shape[1]
            budget = (length**0.5 if self.num_lookups is None else self.num_lookups) / length
            y = AddedLoss.apply(y, self.selection_penalty * (score.mean() - budget).relu())
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self._gate(super().forward(x), x)

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> SparseAttentionState:
        return SparseAttentionState(*super().init_state(batch_size, max_seq_len, device=device, dtype=dtype))

    def prefill(self, x: Tensor, state: SparseAttentionState) -> tuple[Tensor, SparseAttentionState]:
        y, state = super().prefill(x, state)
        return self._gate(y, x), SparseAttentionState(*state)

    def prefill_empty(self, x: Tensor, state: SparseAttentionState) -> tuple[Tensor, SparseAttentionState]:
        return self.prefill(x, state)

    def step(self, x: Tensor, state: SparseAttentionState) -> tuple[Tensor, SparseAttentionState]:
        y, state = super().step(x, state)
        return self._gate(y.unsqueeze(1), x.unsqueeze(1)).squeeze(1), SparseAttentionState(*state)
