"""Base convolution with long filters against the operator of the official code, written out directly."""

import math

import pytest
import torch
from torch.nn import functional as F

import architectures

D_MODEL = 6


def direct(mixer, x, taps):
    """y = (h * x + x) (W x + b) + x, token by token."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for lag in range(min(t + 1, len(taps))):
            out[:, t] += taps[lag] * x[:, t - lag]
    return (out + x) * F.linear(x, mixer.projection.weight, mixer.projection.bias) + x


@torch.no_grad()
def test_implicit_filter():
    torch.manual_seed(0)
    mixer = architectures.create("long_conv", d_model=D_MODEL, filter_len=30, num_bands=2).double()
    x = torch.randn(2, 30, D_MODEL, dtype=torch.float64)
    # Features of the official code: linspaces over l_max, bands from 1e-4 to one less than their number.
    time, angle = torch.linspace(0, 1, 30)[:, None], 2 * math.pi * torch.linspace(0, 29, 30)[:, None] / 30
    waves = torch.exp(-1j * torch.tensor([1e-4, 1.0]) * angle)
    taps = mixer.network(torch.cat([time, waves.real, waves.imag], -1).double())
    expected = direct(mixer, x, taps)
    assert torch.allclose(mixer(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 7, 20])
def test_explicit_filter(length):
    """Shorter than the filter, as long, and longer: its state holds no more than the filter reaches."""
    torch.manual_seed(0)
    mixer = architectures.create("long_conv", d_model=D_MODEL, filter="explicit", filter_len=7).double()
    x = torch.randn(2, length, D_MODEL, dtype=torch.float64)
    expected = direct(mixer, x, mixer.taps)
    assert mixer.state_fields(length) == {"history": min(6, length) * D_MODEL, "position": 0}
    y, state = mixer.prefill(x[:, :2], mixer.init_state(2, length))
    outputs = [y]
    for t in range(2, length):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y.unsqueeze(1))
    tolerance = 1e-12 * float(expected.abs().max())
    assert torch.allclose(mixer(x), expected, rtol=0, atol=tolerance)
    assert torch.allclose(torch.cat(outputs, 1), expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_memory_is_the_history():
    """d_model T elements at length T, as published; tokens beyond max_seq_len are refused, not forgotten."""
    mixer = architectures.create("long_conv", d_model=64)
    assert mixer.state_fields(1024) == {"history": 64 * 1024, "position": 0}
    with pytest.raises(ValueError, match="holds max_seq_len=5 tokens, 0 are in it, 6 more came"):
        mixer.prefill(torch.randn(1, 6, 64), mixer.init_state(1, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_len": 1}, "filter_len must be at least 2, got 1"),
        ({"num_bands": 0}, "num_bands must be at least 1, got 0"),
        ({"filter_hidden": 0}, "filter_hidden must be at least 1, got 0"),
        ({"filter": "learned"}, "filter='learned'"),
    ],
)
def test_shape_rules(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("long_conv", d_model=D_MODEL, **options)


def test_the_implicit_filter_tells_neighbouring_lags_apart_under_autocast():
    torch.manual_seed(0)
    mixer = architectures.create("long_conv", d_model=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = mixer._taps(1024)
    assert under.dtype == torch.float32
    assert torch.allclose(under.double(), mixer.double()._taps(1024), rtol=0, atol=1e-6)
