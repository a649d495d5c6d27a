"""DeltaNet, and what its gated successors share with it: projections, short convolution, delta rule, output norm."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures import fla
from architectures.layers import ShortConvolution, merge_heads, split_heads, whole_sequences_only
from architectures.mixer import (
    SequenceMixer,
    default_num_heads,
    divide_heads,
    expanded_width,
    require_at_least,
    require_positive,
)
from architectures.registry import register
from kernels.delta_rule import MAX_TRITON_WIDTH, delta_rule, delta_rule_step


class DeltaState(NamedTuple):
    """Memory of a delta-rule mixer."""

    kv: Tensor  # [B, H, K, V]
    conv: Tensor  # [B, conv_size - 1, 2 H K + H V], the last queries, keys and values before the convolution


class DeltaMixer(SequenceMixer):
    """The frame of DeltaNet, Gated DeltaNet and Kimi Delta Attention; a subclass says how it decays and gates.

    x -> q, k, v (linear, short causal convolution, SiLU) -> q, k of unit length -> delta rule -> RMSNorm per head,
    gated -> linear. One projection and one depthwise convolution hold the three of the official code. Every subclass
    has a state type of its own, so that the state of one is refused by another.
    """

    backends = ("triton", "fla", "reference")
    State: ClassVar[type[DeltaState]]
    fla_operation: ClassVar[str]  # what `architectures.fla` calls the subclass's delta rule

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        require_at_least(1, num_heads=num_heads, head_dim=head_dim, conv_size=conv_size)
        require_positive(norm_eps=norm_eps)
        self.num_heads = default_num_heads(d_model, head_dim or 64) if num_heads is None else num_heads
        self.head_dim = divide_heads(d_model, self.num_heads) if head_dim is None else head_dim
        self.head_v_dim = expanded_width(self.head_dim, expand_v, name="expand_v", of="head_dim")
        self.allow_neg_eigval = allow_neg_eigval
        self.widths = [self.num_heads * width for width in (self.head_dim, self.head_dim, self.head_v_dim)]
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = None
        if use_short_conv:
            self.conv = ShortConvolution(sum(self.widths), conv_size, bias=False, activation="silu")
        self.beta_proj = nn.Linear(d_model, self.num_heads, bias=False)
        self.norm = nn.RMSNorm(self.head_v_dim, eps=norm_eps)
        self.gate_proj = nn.Linear(d_model, self.widths[2], bias=False) if use_gate else None
        self.out_proj = nn.Linear(self.widths[2], d_model, bias=False)

    def _decay(self, x: Tensor) -> Tensor | None:
        """Log decay of x [..., D]: [..., H], [..., H, K] or None."""
        raise NotImplementedError

    def _gate(self, x: Tensor) -> Tensor | None:
        """Factor [..., H, V] of the output, or None."""
        return None if self.gate_proj is None else split_heads(F.silu(self.gate_proj(x)), self.num_heads)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, kernel: str
    ) -> tuple[Tensor, Tensor]:
        """The delta rule on [B, T, H, ...], or on one token [B, H, ...], from a state on."""
        if q.dim() == 3:
            return delta_rule_step(q, k, v, beta, g, state)
        return delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True, backend=kernel)

    def _run(self, x: Tensor, state: DeltaState, *, empty: bool = False) -> tuple[Tensor, DeltaState]:
        """x [B, T, D] or [B, D]; `empty`: the state is."""
        self.check_state(x, state)
        backend = self.backend_for(x)
        qkv, tail = self.qkv_proj(x), state.conv
        if self.conv is None:
            qkv = F.silu(qkv)
        elif backend == "triton" and x.dim() == 3:
            qkv, tail = self.conv.prefill_by_kernel(qkv, tail, empty=empty)
        else:
            qkv, tail = (self.conv.step if x.dim() == 2 else self.conv.prefill)(qkv, tail)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.split(self.widths, dim=-1))
        beta = self.beta_proj(x).sigmoid()
        if self.allow_neg_eigval:
            beta = 2 * beta
        inputs = unit_length(q), unit_length(k), v, beta, self._decay(x), state.kv
        if backend == "fla":
            o, kv = fla.delta_rule(*inputs)
        else:
            o, kv = self._mix(*inputs, "triton" if backend == "triton" else "reference")
        # Under autocast o is narrower than the norm's weight.
        o, gate = self.norm(o.to(self.norm.weight.dtype)), self._gate(x)
        return self.out_proj(merge_heads(o if gate is None else o * gate)), self.State(kv, tail)

    def unsupported(self, backend, **case):
        if backend == "triton":
            return whole_sequences_only(self.head_dim, MAX_TRITON_WIDTH, named=self.backend == backend, **case)
        return fla.refusal(backend, self.fla_operation, self.head_dim, self.head_v_dim, **case)

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> DeltaState:
        like = self.like_parameters(device, dtype)
        kv = torch.zeros(batch_size, self.num_heads, self.head_dim, self.head_v_dim, **like)
        if self.conv is None:
            return self.State(kv, torch.zeros(batch_size, 0, sum(self.widths), **like))
        return self.State(kv, self.conv.init_tail(batch_size, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.empty_state(x), empty=True)[0]

    def prefill(self, x: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        return self._run(x, state)

    def step(self, x: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        return self._run(x, state)


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last axis, the norm of the official kernels."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class DeltaNetState(DeltaState):
    """Memory of DeltaNet: no other delta rule takes it."""

    __slots__ = ()


@register("deltanet", paper="arXiv:2406.06484")
class DeltaNet(DeltaMixer):
    """DeltaNet: linear attention that replaces what is stored at a key,
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T.

    Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv:2406.06484), section 2.2 for the
    rule and 3.4 for the layer: SiLU and unit length for q and k, short convolutions, beta_t = sigmoid(W x_t) (times
    2 with `allow_neg_eigval`, arXiv:2411.12537), RMSNorm per head. `use_gate` adds the SiLU output gate of
    the official code. Initialisation is that of `nn.Linear` and `nn.Conv1d`, as there.

    The state is H K V elements, and the tails of the short convolution, (conv_size - 1)(2 H K + H V) elements that
    the published counts leave out. Checked against fla's naive recurrence; fla's layer has no CPU form.
    """

    State = DeltaNetState
    fla_operation = "delta_rule"

    def _decay(self, x: Tensor) -> None:
        return None
