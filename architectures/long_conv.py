"""Base convolution with a filter as long as the sequence, and the parts of long convolutions that Hyena shares."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.layers import check_room
from architectures.mixer import SequenceMixer, require_at_least
from architectures.registry import register
from kernels.fft_conv import fft_conv, fft_conv_step


def filter_clock(lags: Tensor, span: int, num_bands: int, dtype: torch.dtype) -> Tensor:
    """Hyena's positional features of a lag, [L] -> [L, 1 + 2 num_bands]: time (1 at the end of the span), cos and -sin
    of slow waves. They go on beyond the span, so a filter made of them has any length."""
    lags = lags.to(torch.float64)
    time, angle = lags / (span - 1), 2 * math.pi * lags / span
    frequencies = torch.linspace(1e-4, num_bands - 1, num_bands, dtype=torch.float64, device=lags.device)
    waves = angle.unsqueeze(-1) * frequencies
    return torch.cat([time.unsqueeze(-1), waves.cos(), -waves.sin()], dim=-1).to(dtype)


def exact_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the dtype of x, under autocast too, and where its weights are kept in less: what neighbouring lags
    differ by is lost in 8 bits."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)


def convolve_on(x: Tensor, taps: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve x [B, T, *C], or one token [B, *C], after its history [B, M, *C] -> y, the last M inputs."""
    tokens = x.unsqueeze(1) if x.dim() < history.dim() else x
    if tokens.shape[1] == 1:
        y = fft_conv_step(tokens[:, 0], taps, history=history).reshape(x.shape)
    else:
        y = fft_conv(x, taps, history=history)
    return y, torch.cat([history, tokens.to(history.dtype)], dim=1)[:, tokens.shape[1] :]


class LongConvState(NamedTuple):
    """Inputs that the filter still reaches."""

    history: Tensor  # [B, M, D], oldest first
    position: Tensor  # [], int64, tokens seen


@register("long_conv", paper="arXiv:2312.04927")
class LongConv(SequenceMixer):
    """Base convolution with a long filter: y = (h * x + x) (W x + b) + x, with a causal filter h per channel.

    Zoology (arXiv:2312.04927), BaseConv with a long filter, and the residuals of its code. The "implicit" filter is a
    network of the lag, W_2 relu(W_1 z(lag) + b_1) + b_2 on Hyena's positional features, 16 wide; its clock spans
    `filter_len` tokens and goes on beyond, so that no length has to be known. The "explicit" filter has `filter_len`
    free taps, standard normal at the start as in the paper's code, and is zero beyond.

    The state is what the filter reaches: the whole history of an implicit one, T D elements at length T as published;
    the last filter_len - 1 inputs of an explicit one. A recurrence that would replace it is not known in general.
    Checked against the operator of the official code, written out token by token.
    """

    def __init__(
        self,
        d_model: int,
        *,
        filter: Literal["implicit", "explicit"] = "implicit",
        filter_len: int = 1024,
        num_bands: int = 1,
        filter_hidden: int = 16,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        require_at_least(2, filter_len=filter_len)
        require_at_least(1, num_bands=num_bands, filter_hidden=filter_hidden)
        if filter not in ("implicit", "explicit"):
            raise ValueError(f"filter={filter!r} is not one of 'implicit', 'explicit'")
        self.filter_len = filter_len
        self.num_bands = num_bands
        self.projection = nn.Linear(d_model, d_model, bias=bias)
        if filter == "implicit":
            self.network = nn.Sequential(
                nn.Linear(1 + 2 * num_bands, filter_hidden), nn.ReLU(), nn.Linear(filter_hidden, d_model)
            )
            for layer in (self.network[0], self.network[2]):
                layer.keep_float32 = True  # for whoever keeps weights in the dtype that autocast casts them to
        else:
            self.network = None
            self.taps = nn.Parameter(torch.randn(filter_len, d_model))

    def _taps(self, length: int) -> Tensor:
        """The filter at the first `length` lags, [L, D]; an explicit one may end before."""
        if self.network is None:
            return self.taps[:length]
        first, activation, last = self.network
        exact = torch.promote_types(first.weight.dtype, torch.float32)
        lags = torch.arange(length, device=first.weight.device)
        clock = filter_clock(lags, self.filter_len, self.num_bands, exact)
        return exact_linear(last, activation(exact_linear(first, clock)))

    def _gate(self, x: Tensor, convolved: Tensor) -> Tensor:
        return (convolved + x) * self.projection(x) + x

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self._gate(x, fft_conv(x, self._taps(x.shape[1])))

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> LongConvState:
        like = self.like_parameters(device, dtype)
        reach = max_seq_len if self.network is not None else min(self.filter_len - 1, max_seq_len)
        position = torch.zeros((), dtype=torch.int64, device=like["device"])
        return LongConvState(torch.zeros(batch_size, reach, self.d_model, **like), position)

    def _run(self, x: Tensor, state: LongConvState) -> tuple[Tensor, LongConvState]:
        """x [B, T, D] or [B, D]."""
        self.check_state(x, state)
        length, reach = x.shape[1] if x.dim() == 3 else 1, state.history.shape[1]
        if self.network is not None or reach < self.filter_len - 1:
            check_room(state.position, length, reach)
        convolved, history = convolve_on(x, self._taps(reach + length), state.history)
        return self._gate(x, convolved), LongConvState(history, state.position + length)

    def prefill(self, x: Tensor, state: LongConvState) -> tuple[Tensor, LongConvState]:
        return self._run(x, state)

    def step(self, x: Tensor, state: LongConvState) -> tuple[Tensor, LongConvState]:
        return self._run(x, state)
