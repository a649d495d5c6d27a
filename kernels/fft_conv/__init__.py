"""Long causal convolution: every output sums over the whole past. By FFT, for short sequences on a GPU as matrix
products, and directly for one token."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fft_conv.reference import conv_step_reference, fft_conv_reference, naive_conv
from kernels.fft_conv.toeplitz import toeplitz_conv

__all__ = ["fft_conv", "fft_conv_step", "naive_conv"]

BACKENDS = ("auto", "reference", "toeplitz")
MAX_TOEPLITZ_LENGTH = 512


def fft_conv(x: Tensor, taps: Tensor, *, history: Tensor | None = None, backend: str = "auto") -> Tensor:
    """y_t = sum_j taps_j x_{t-j}, causal and depthwise.

    Args:
        x: [B, T, *C], any floating dtype; C is one axis of channels or several.
        taps: [L, *C], or with axes of 1 that several channels share.
        history: [B, M, *C], the inputs before x, oldest first; those before it are zero.
        backend: "reference" (FFT, in float32 at least), "toeplitz" (matrix products, in the dtype and with the rounding
            that PyTorch is set to for them; no history; T^2 entries a channel in memory), or "auto": toeplitz on a
            GPU without a history and up to 512 tokens, else reference.

    Returns:
        y [B, T, *C] in the dtype of x, summed in float32 at least.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit.

    Source: FFTConv of Hyena (arXiv:2302.10866, section 2.1) and H3 (arXiv:2212.14052, section 3).
    """
    _check(x, taps, history, batch_axes=2)
    if _choose_backend(backend, x, history) == "toeplitz":
        return toeplitz_conv(x, taps)
    acc = _accumulation_dtype(x, taps)
    with torch.autocast(x.device.type, enabled=False):
        past = None if history is None else history.to(acc)
        return fft_conv_reference(x.to(acc), taps.to(acc), past).to(x.dtype)


def fft_conv_step(x: Tensor, taps: Tensor, *, history: Tensor) -> Tensor:
    """One output of `fft_conv`, summed directly: x [B, *C], taps [L, *C], history [B, M, *C] -> y [B, *C].

    Raises ValueError as `fft_conv` does.
    """
    _check(x, taps, history, batch_axes=1)
    acc = _accumulation_dtype(x, taps)
    return conv_step_reference(x.to(acc), taps.to(acc), history.to(acc)).to(x.dtype)


def _choose_backend(backend: str, x: Tensor, history: Tensor | None) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "toeplitz" and history is not None:
        raise ValueError("backend='toeplitz' cannot run here: there is a history; allowed: history=None")
    if backend != "auto":
        return backend
    short = history is None and x.shape[1] <= MAX_TOEPLITZ_LENGTH
    return "toeplitz" if short and x.device.type == "cuda" else "reference"


def _accumulation_dtype(x: Tensor, taps: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, taps.dtype), torch.float32)


def _check(x: Tensor, taps: Tensor, history: Tensor | None, *, batch_axes: int) -> None:
    for name, tensor in (("x", x), ("taps", taps), ("history", x if history is None else history)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: a floating dtype")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {x.device}, the device of x")
    if x.dim() <= batch_axes or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [B, {'T, ' * (batch_axes - 1)}channels], none empty")
    channels = tuple(x.shape[batch_axes:])
    fits = taps.dim() == 1 + len(channels) and all(n in (1, c) for n, c in zip(taps.shape[1:], channels))
    if not fits or len(taps) == 0:
        raise ValueError(f"taps has shape {tuple(taps.shape)}; allowed: (L,) + {channels}, or 1 for a shared axis")
    if history is not None and (history.shape[0] != x.shape[0] or tuple(history.shape[2:]) != channels):
        raise ValueError(f"history has shape {tuple(history.shape)}; allowed: ({x.shape[0]}, M) + {channels}")
