"""Base convolution: a short convolution gated by a linear projection, the simplest mixer that shifts tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from architectures.layers import ShortConvolution
from architectures.mixer import SequenceMixer
from architectures.registry import register


class BaseConvState(NamedTuple):
    conv: Tensor  # [B, kernel_size - 1, D], the last inputs


@register("base_conv", paper="arXiv:2312.04927")
class BaseConv(SequenceMixer):
    """Base convolution of Zoology: y = conv(x) * (W x + b) + x, with a depthwise causal convolution.

    Zoology (arXiv:2312.04927), BaseConv operator; the residual form with kernel 3 is the one of Based
    (arXiv:2402.18668). The papers count kernel_size x D elements of memory for it; between two tokens
    kernel_size - 1 inputs are carried, the current one being in hand.
    """

    def __init__(self, d_model: int, *, kernel_size: int = 3, bias: bool = True, backend: str = "auto"):
        super().__init__(d_model, backend=backend)
        self.conv = ShortConvolution(d_model, kernel_size, bias=bias)
        self.projection = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.projection(x) + x

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> BaseConvState:
        return BaseConvState(self.conv.init_tail(batch_size, **self.like_parameters(device, dtype)))

    def prefill(self, x: Tensor, state: BaseConvState) -> tuple[Tensor, BaseConvState]:
        self.check_state(x, state)
        y, tail = self.conv.prefill(x, state.conv)
        return y * self.projection(x) + x, BaseConvState(tail)

    def step(self, x: Tensor, state: BaseConvState) -> tuple[Tensor, BaseConvState]:
        y, state = self.prefill(x.unsqueeze(1), state)
        return y.squeeze(1), state
