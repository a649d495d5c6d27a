"""Long causal convolution in plain PyTorch: the direct form is the specification, the FFT form computes it.

    y_t = sum_{j = 0}^{L - 1} h_j x_{t - j},    x_u = 0 before the history

Direct it costs T L products a channel, by the fast Fourier transform (T + L) log(T + L): the transform of a
circular convolution, long enough that nothing wraps around into an output that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_conv(x: Tensor, taps: Tensor, history: Tensor | None = None) -> Tensor:
    """The sum above, one tap at a time; shapes as in `fft_conv`."""
    past = x[:, :0] if history is None else history
    extended = torch.cat([torch.zeros_like(x[:, :1]).expand(-1, len(taps) - 1, *x.shape[2:]), past, x], dim=1)
    y = torch.zeros_like(x)
    for lag in range(len(taps)):
        start = extended.shape[1] - x.shape[1] - lag
        y = y + taps[lag] * extended[:, start : start + x.shape[1]]
    return y


def fft_conv_reference(x: Tensor, taps: Tensor, history: Tensor | None = None) -> Tensor:
    """The same by FFT, in the dtype given."""
    past, length = 0 if history is None else history.shape[1], x.shape[1]
    extended = x if history is None else torch.cat([history, x], dim=1)
    taps = taps[: past + length]
    # Outputs before `past` are thrown away, so as much may wrap around into them.
    size = fast_length(max(past + length, length + len(taps) - 1))
    spectrum = torch.fft.rfft(extended, n=size, dim=1) * torch.fft.rfft(taps, n=size, dim=0)
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, past : past + length]


def conv_step_reference(x: Tensor, taps: Tensor, history: Tensor) -> Tensor:
    """The last output of the sum above: x [B, *C], taps [L, *C], history [B, M, *C] -> [B, *C]."""
    reach = min(len(taps) - 1, history.shape[1])
    newest_first = history[:, history.shape[1] - reach :].flip(1)
    return x * taps[0] + (newest_first * taps[1 : reach + 1]).sum(1)


def fast_length(least: int) -> int:
    """The smallest even 2^a 3^b 5^c that is at least `least`: lengths that FFT libraries are fast at."""
    size = max(2, least + least % 2)
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 2
