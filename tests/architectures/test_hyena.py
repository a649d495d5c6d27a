"""Hyena against the operator of the official code, written out with direct convolutions."""

import math

import pytest
import torch
from torch import nn

import architectures

D_MODEL = 6


def official_filter(mixer, length, l_max, num_bands):
    """Filter network of HazyResearch/safari: features over linspaces, one sine frequency, exponential modulation."""
    positions, time = torch.linspace(0, l_max - 1, l_max), torch.linspace(0, 1, l_max)[:, None]
    bands = torch.linspace(1e-4, num_bands - 1, num_bands)
    waves = torch.exp(-1j * bands * 2 * math.pi * positions[:, None] / l_max)
    h = torch.cat([time, waves.real, waves.imag], -1).double()
    for layer in mixer.filter.layers:
        h = torch.sin(mixer.filter.frequency * layer(h))
    h = mixer.filter.last(h)
    fast, slow = math.log(1e-2) / 0.3, math.log(1e-2) / 1.5
    return (h * torch.exp(-time * torch.linspace(slow, fast, h.shape[-1]).abs()))[:length]


def official_operator(mixer, x, order, l_max, num_bands):
    length = x.shape[1]
    short = nn.Conv1d(D_MODEL * (order + 1), D_MODEL * (order + 1), 3, groups=D_MODEL * (order + 1), padding=2).double()
    short.weight.data, short.bias.data = mixer.short_conv.weight.flip(-1).unsqueeze(1), mixer.short_conv.bias
    *gates, v = short(mixer.in_proj(x).mT)[..., :length].split(D_MODEL, dim=1)
    k = official_filter(mixer, length, l_max, num_bands).T.reshape(D_MODEL, order - 1, length)
    for o, gate in enumerate(reversed(gates[1:])):
        v = v * gate
        out = v * mixer.filter_bias[o][:, None]
        for lag in range(length):
            out[..., lag:] = out[..., lag:] + k[:, o, lag, None] * v[..., : length - lag]
        v = out
    return mixer.out_proj((v * gates[0]).mT)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"order": 3, "num_bands": 2, "filter_width": 5, "num_inner": 1}])
def test_official_operator(options):
    torch.manual_seed(0)
    mixer = architectures.create("hyena", d_model=D_MODEL, filter_len=40, **options).double()
    mixer.filter.frequency.add_(0.1 * torch.randn_like(mixer.filter.frequency))
    x = torch.randn(2, 40, D_MODEL, dtype=torch.float64)
    expected = official_operator(mixer, x, options.get("order", 2), 40, options.get("num_bands", 1))
    # The official features are float32.
    assert torch.allclose(mixer(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("d_model", "published"), [(64, 524_288), (128, 1_048_576), (256, 2_097_152)])
def test_published_memory(d_model, published):
    """Bytes of two Hyena layers at 1024 tokens: the histories; the tails of the short convolutions are missing."""
    fields = architectures.create("hyena", d_model=d_model).state_fields(1024)
    assert 2 * 4 * fields["history"] == published
    assert fields["conv"] == 2 * 3 * d_model


@torch.no_grad()
def test_filter_reaches_beyond_its_clock():
    """Twice the span: the filter goes on, decays, and forward still agrees with decoding."""
    torch.manual_seed(0)
    mixer = architectures.create("hyena", d_model=D_MODEL, filter_len=8).double()
    taps = mixer.filter(17).abs()
    assert torch.allclose(mixer.filter(9), mixer.filter(17)[:9], rtol=1e-12, atol=0)
    assert 0 < taps[16].max() < taps[:8].max()
    x = torch.randn(1, 17, D_MODEL, dtype=torch.float64)
    state, steps = mixer.init_state(1, 17), []
    for t in range(17):
        y, state = mixer.step(x[:, t], state)
        steps.append(y)
    expected = mixer(x)
    assert torch.allclose(torch.stack(steps, 1), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@torch.no_grad()
def test_more_tokens_than_the_history_holds_are_refused():
    mixer = architectures.create("hyena", d_model=D_MODEL)
    _, state = mixer.prefill(torch.randn(1, 5, D_MODEL), mixer.init_state(1, 5))
    with pytest.raises(ValueError, match="holds max_seq_len=5 tokens, 5 are in it, 1 more came"):
        mixer.step(torch.randn(1, D_MODEL), state)


@pytest.mark.parametrize(
    ("option", "value"),
    [("order", 1), ("filter_len", 1), ("filter_width", 0), ("num_bands", 0), ("num_inner", -1), ("short_filter", 0)],
)
def test_shape_rules(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least {value + 1}, got {value}"):
        architectures.create("hyena", d_model=D_MODEL, **{option: value})


@pytest.mark.parametrize("low_precision_weights", [False, True])
def test_the_filter_tells_neighbouring_lags_apart_under_autocast(low_precision_weights):
    """A lag is 1 / 1023 of the clock's span; bfloat16 resolves 1 / 256 at its end."""
    torch.manual_seed(0)
    taps = architectures.create("hyena", d_model=4).filter
    if low_precision_weights:
        for layer in taps.layers:
            layer.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = taps(1024)
    exact = taps.double()(1024)
    assert under.dtype == torch.float32
    assert torch.allclose(under.double(), exact, rtol=0, atol=1e-6)
