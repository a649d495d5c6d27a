"""Base convolution: a short convolution gated by a linear projection, the simplest mixer that shifts tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from architectures.layers import ShortConvolution
from architectures.mixer import SequenceMixer
from architectures.registry import register


class BaseConvState(NamedTuple):
    """Memory of a base convolution."""

    conv: Tensor  # [B, kernel_size - 1, D], the last inputs


@register("base_conv", paper="arXiv:2312.04927")
class BaseConv(SequenceMixer):
    """Base convolution of Zoology: y = conv(x) * (W x + b) + x, with a depthwise causal convolution.

    Zoology (arXiv:2312.04927), BaseConv operator; the residual form with kernel 3 is the one of Based
    (arXiv:2402.18668). The papers count kernel_size x D elements of memory for it; between two tokens
    kernel_size - 1 inputs are carried, the current one being in hand.

    With `expand`, the form of Based's language models (HazyResearch/based, 32c1bd4): the input is projected to
    expand x D channels; half of them are convolved, pass a SiLU and are gated by the other half; a projection leads
    back, y = W_o (silu(conv(u)) * g), (u, g) = W_i x. Then the convolution remembers inputs of width expand x D / 2.
    Both forms are checked against PyTorch's `nn.Conv1d`, weights copied over.
    """

    def __init__(
        self,
        d_model: int,
        *,
        kernel_size: int = 3,
        expand: int | None = None,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        self.expand = expand
        if expand is None:
            self.conv = ShortConvolution(d_model, kernel_size, bias=bias)
            self.projection = nn.Linear(d_model, d_model, bias=bias)
            return
        if expand < 1 or expand * d_model % 2:
            raise ValueError(f"expand={expand} must be at least 1, with an even expand * d_model; d_model={d_model}")
        inner = expand * d_model // 2
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv = ShortConvolution(inner, kernel_size, bias=bias, activation="silu")
        self.out_proj = nn.Linear(inner, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if self.expand is None:
            return self.conv(x) * self.projection(x) + x
        convolved, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.conv(convolved) * gate)

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> BaseConvState:
        return BaseConvState(self.conv.init_tail(batch_size, **self.like_parameters(device, dtype)))

    def prefill(self, x: Tensor, state: BaseConvState) -> tuple[Tensor, BaseConvState]:
        self.check_state(x, state)
        if self.expand is None:
            y, tail = self.conv.prefill(x, state.conv)
            return y * self.projection(x) + x, BaseConvState(tail)
        convolved, gate = self.in_proj(x).chunk(2, dim=-1)
        y, tail = self.conv.prefill(convolved, state.conv)
        return self.out_proj(y * gate), BaseConvState(tail)

    def step(self, x: Tensor, state: BaseConvState) -> tuple[Tensor, BaseConvState]:
        self.check_state(x, state)
        if self.expand is None:
            y, tail, ran = self.conv.gated_step(x, state.conv, self.projection(x), backend=self.backend)
            self.ran_beside(ran)
            return y + x, BaseConvState(tail)
        # One product for few rows takes longer with a bias, and the kernel of the convolution no longer.
        convolved, gate = F.linear(x, self.in_proj.weight).chunk(2, dim=-1)
        biases = (None, None) if self.in_proj.bias is None else self.in_proj.bias.chunk(2)
        y, tail, ran = self.conv.gated_step(
            convolved, state.conv, gate, x_bias=biases[0], gate_bias=biases[1], backend=self.backend
        )
        self.ran_beside(ran)
        return self.out_proj(y), BaseConvState(tail)
