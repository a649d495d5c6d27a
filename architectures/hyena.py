"""Hyena: gates and long convolutions in turn, the filters given by a network of the lag."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from architectures.layers import ShortConvolution, check_room, with_skip
from architectures.long_conv import convolve_on, exact_linear, filter_clock
from architectures.mixer import SequenceMixer, require_at_least
from architectures.registry import register
from kernels.fft_conv import fft_conv
from kernels.short_convolution import short_convolution


class HyenaState(NamedTuple):
    """Memory of a Hyena operator."""

    history: Tensor  # [B, M, order - 1, D], inputs of the long convolutions, oldest first
    conv: Tensor  # [B, short_filter - 1, (order + 1) D], the last projections
    position: Tensor  # [], int64, tokens seen


class ImplicitFilter(nn.Module):
    """h(lag) = W sin(f (W sin(f (W sin(f (W z(lag) + b)) + b)) + b)) exp(-time delta), Hyena's filter (section 3.3).

    One trainable frequency vector f serves all layers. The decay rates delta run, over the channels, from one
    that leaves 1% after 1.5 spans to one that leaves 1% after 0.3 spans, and are fixed.
    """

    def __init__(self, channels: int, *, span: int, width: int, num_bands: int, num_inner: int):
        super().__init__()
        self.span = span
        self.num_bands = num_bands
        widths = [1 + 2 * num_bands, *[width] * (1 + num_inner)]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.last = nn.Linear(width, channels, bias=False)
        for layer in (*self.layers, self.last):
            layer.keep_float32 = True  # for whoever keeps weights in the dtype that autocast casts them to
        self.frequency = nn.Parameter(torch.ones(width))
        decay = torch.linspace(-math.log(1e-2) / 1.5, -math.log(1e-2) / 0.3, channels)
        self.register_buffer("decay", decay, persistent=False)

    def forward(self, length: int) -> Tensor:
        """The first `length` taps, [L, channels]."""
        weight = self.last.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        clock = filter_clock(torch.arange(length, device=weight.device), self.span, self.num_bands, exact)
        hidden = clock
        for layer in self.layers:
            hidden = torch.sin(self.frequency.to(exact) * exact_linear(layer, hidden))
        return exact_linear(self.last, hidden) * torch.exp(-clock[:, :1] * self.decay.to(exact))


@register("hyena", paper="arXiv:2302.10866")
class Hyena(SequenceMixer):
    """Hyena: gates and long convolutions in turn on (x_1, .., x_N, v), the short convolution of a projection of x:
    v <- h_n * (x_n v) + b_n x_n v for n = N .. 2, then y = W_o (x_1 v).

    Hyena Hierarchy (arXiv:2302.10866), definition 3.1, with the parameterisation and initialisation of the official
    code (HazyResearch/safari): N = `order` gates, a depthwise convolution of `short_filter` taps on the
    projections, implicit filters (section 3.3) with a bias as identity path. The order is that of the code, which gates
    before it convolves: N gates and N - 1 long convolutions. The clock of the filters spans `filter_len` tokens,
    the code's l_max, and goes on beyond, so that no length has to be known. The code also trains the
    positional features, at learning rate 1e-5, keeps weight decay off the filter network and trains it at 1e-3:
    here features are fixed and the optimiser is not the mixer's business.

    The state is the honest one of a long convolution: its whole input history, (order - 1) T D elements at length T
    as published, and the tail of the short convolution, (short_filter - 1)(order + 1) D, which the published count
    leaves out. Checked against the operator of the official code, written out with direct convolutions.
    """

    def __init__(
        self,
        d_model: int,
        *,
        order: int = 2,
        filter_len: int = 1024,
        filter_width: int = 64,
        num_bands: int = 1,
        num_inner: int = 2,
        short_filter: int = 3,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        require_at_least(2, order=order, filter_len=filter_len)
        require_at_least(1, filter_width=filter_width, num_bands=num_bands, short_filter=short_filter)
        require_at_least(0, num_inner=num_inner)
        self.order = order
        self.in_proj = nn.Linear(d_model, (order + 1) * d_model)
        self.short_conv = ShortConvolution((order + 1) * d_model, short_filter)
        self.filter = ImplicitFilter(
            (order - 1) * d_model, span=filter_len, width=filter_width, num_bands=num_bands, num_inner=num_inner
        )
        self.filter_bias = nn.Parameter(torch.randn(order - 1, d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def _operate(self, projected: Tensor, taps: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gates and long convolutions on the short convolution's output, [B, T, ..] or [B, ..]."""
        *gates, v = projected.chunk(self.order + 1, dim=-1)
        # The channels of the official filter network run over the convolutions fastest.
        taps = taps.unflatten(-1, (self.d_model, self.order - 1))
        kept = []
        for n, gate in enumerate(reversed(gates[1:])):
            v, with_bias = v * gate, with_skip(taps[..., n], self.filter_bias[n])
            if history is None:
                v = fft_conv(v, with_bias)
            else:
                v, rest = convolve_on(v, with_bias, history[:, :, n])
                kept.append(rest)
        return self.out_proj(v * gates[0]), torch.stack(kept, dim=2) if kept else None

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        projected, short = self.in_proj(x), self.short_conv
        # In the dtype of the projection: under autocast float32 weights would widen what the backward pass reads.
        weight, bias = short.weight.to(projected.dtype), short.bias.to(projected.dtype)
        return self._operate(short_convolution(projected, weight, bias), self.filter(x.shape[1]), None)[0]

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> HyenaState:
        like = self.like_parameters(device, dtype)
        history = torch.zeros(batch_size, max_seq_len, self.order - 1, self.d_model, **like)
        position = torch.zeros((), dtype=torch.int64, device=like["device"])
        return HyenaState(history, self.short_conv.init_tail(batch_size, **like), position)

    def _run(self, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        """x [B, T, D] or [B, D]."""
        self.check_state(x, state)
        length, capacity = x.shape[1] if x.dim() == 3 else 1, state.history.shape[1]
        check_room(state.position, length, capacity)
        convolve = self.short_conv.prefill if x.dim() == 3 else self.short_conv.step
        projected, tail = convolve(self.in_proj(x), state.conv)
        y, history = self._operate(projected, self.filter(capacity + length), state.history)
        return y, HyenaState(history, tail, state.position + length)

    def prefill(self, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        return self._run(x, state)

    def step(self, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        return self._run(x, state)
