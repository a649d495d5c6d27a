"""Long convolution by FFT against the direct sum, and the direct sum against one written by hand."""

import pytest
import torch
from torch.nn import functional as F

from kernels.fft_conv import fft_conv, fft_conv_step, naive_conv
from kernels.fft_conv.reference import fast_length


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def test_by_hand():
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    taps = torch.tensor([[10.0], [1.0]])
    assert naive_conv(x, taps).flatten().tolist() == [10.0, 21.0, 32.0]
    assert naive_conv(x, taps, torch.tensor([[[7.0], [5.0]]])).flatten().tolist() == [15.0, 21.0, 32.0]


def test_direct_sum_is_conv1d():
    x, taps = randn(2, 9, 3), randn(4, 3, seed=1)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), taps.flip(0).T.unsqueeze(1), groups=3).mT
    assert error(naive_conv(x, taps), expected) < 1e-14


@pytest.mark.parametrize("length", [1, 2, 31, 64, 100])
@pytest.mark.parametrize("num_taps", [1, 3, 64, 300])
def test_fft_is_the_direct_sum(length, num_taps):
    x, taps = randn(2, length, 3), randn(num_taps, 3, seed=1)
    assert error(fft_conv(x, taps), naive_conv(x, taps)) < 1e-13
    for past in (0, 1, num_taps - 1, 50):
        history = randn(2, past, 3, seed=2)
        expected = naive_conv(x, taps, history)
        assert error(fft_conv(x, taps, history=history), expected) < 1e-13
        last = torch.cat([history, x[:, :-1]], 1)
        assert error(fft_conv_step(x[:, -1], taps, history=last), expected[:, -1]) < 1e-13


def test_taps_shared_by_several_channels():
    x, taps = randn(2, 20, 3, 2, 2), randn(20, 3, 1, 1, seed=1)
    expected = naive_conv(x.flatten(2), taps.expand(-1, -1, 2, 2).flatten(1)).unflatten(2, (3, 2, 2))
    assert error(fft_conv(x, taps), expected) < 1e-13
    assert error(fft_conv_step(x[:, -1], taps, history=x[:, :-1]), expected[:, -1]) < 1e-13


def test_gradients_are_those_of_the_direct_sum():
    gradients = []
    for form in (naive_conv, lambda x, taps, history: fft_conv(x, taps, history=history)):
        leaves = [t.requires_grad_() for t in (randn(2, 11, 3), randn(7, 3, seed=1), randn(2, 6, 3, seed=2))]
        gradients.append(torch.autograd.grad(form(*leaves).square().sum(), leaves))
    assert max(error(two, one) for one, two in zip(*gradients)) < 1e-12


def test_low_precision_is_computed_in_float32():
    x, taps = randn(2, 200, 3).bfloat16(), randn(200, 3, seed=1).bfloat16()
    exact = naive_conv(x.double(), taps.double())
    assert fft_conv(x, taps).dtype == torch.bfloat16
    assert error(fft_conv(x, taps).double(), exact) < 2**-8
    assert error(fft_conv(x.float(), taps.float()).double(), exact) < 2e-6


@pytest.mark.parametrize(("least", "expected"), [(1, 2), (7, 8), (11, 12), (511, 512), (513, 540), (1201, 1250)])
def test_fast_lengths(least, expected):
    assert fast_length(least) == expected


@pytest.mark.parametrize(
    ("x", "taps", "history", "message"),
    [
        ((2, 5), (4,), None, r"x has shape \(2, 5\)"),
        ((2, 0, 3), (4, 3), None, "x has shape"),
        ((2, 5, 3), (4, 2), None, r"taps has shape \(4, 2\); allowed: \(L,\) \+ \(3,\)"),
        ((2, 5, 3), (0, 3), None, "taps has shape"),
        ((2, 5, 3), (4, 3), (1, 6, 3), r"history has shape \(1, 6, 3\)"),
        ((2, 5, 3), (4, 3), (2, 6, 2), "history has shape"),
    ],
)
def test_wrong_shapes_are_refused(x, taps, history, message):
    with pytest.raises(ValueError, match=message):
        fft_conv(torch.zeros(x), torch.zeros(taps), history=None if history is None else torch.zeros(history))


def test_wrong_dtype_and_device_are_refused():
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"taps has dtype torch.complex64"):
        fft_conv(x, torch.zeros(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="taps is on meta"):
        fft_conv_step(x[:, 0], torch.zeros(4, 3, device="meta"), history=x)
