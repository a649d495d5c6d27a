"""DeltaNet against fla's naive recurrence inside the published layer, weights copied over."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import architectures

D_MODEL, HEADS = 12, 3


def published_layer(mixer, x, naive, use_gate, allow_neg_eigval):
    """The layer of arXiv:2406.06484 as its code lays it out: three projections, three convolutions."""
    length = x.shape[1]

    def heads(y):
        return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def unit(y):
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def convolved(weight, taps):
        conv = nn.Conv1d(len(weight), len(weight), 4, groups=len(weight), padding=3, bias=False)
        conv.weight.data = taps.flip(-1).unsqueeze(1)
        return F.silu(conv(F.linear(x, weight).transpose(1, 2))[..., :length].transpose(1, 2))

    weights, taps = mixer.qkv_proj.weight.split(mixer.widths), mixer.conv.weight.split(mixer.widths)
    q, k, v = (heads(convolved(weight, tap)) for weight, tap in zip(weights, taps))
    beta = torch.sigmoid(x @ mixer.beta_proj.weight.T).transpose(1, 2) * (2 if allow_neg_eigval else 1)
    o, state = naive.delta_rule_recurrence(unit(q), unit(k), v, beta)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    if use_gate:
        o = o * F.silu(heads(x @ mixer.gate_proj.weight.T))
    return o.transpose(1, 2).flatten(-2) @ mixer.out_proj.weight.T, state


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_gate": True, "allow_neg_eigval": True, "expand_v": 2.0}])
def test_published_layer(fla_naive, options):
    torch.manual_seed(0)
    mixer = architectures.create("deltanet", d_model=D_MODEL, num_heads=HEADS, **options)
    mixer.norm.weight.add_(0.1 * torch.randn_like(mixer.norm.weight))
    x = torch.randn(2, 41, D_MODEL)
    expected, expected_state = published_layer(
        mixer, x, fla_naive("delta_rule"), options.get("use_gate", False), options.get("allow_neg_eigval", False)
    )
    y, state = mixer.prefill(x, mixer.init_state(2, 41))
    assert torch.allclose(y, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(state.kv, expected_state, rtol=0, atol=1e-5 * float(expected_state.abs().max()))


@pytest.mark.parametrize(("d_model", "published"), [(64, 8_960), (128, 34_304), (256, 134_144)])
def test_published_memory(d_model, published):
    """Bytes of [base_conv, deltanet] in the Based protocol: the kv state and 3 d_model for the base convolution;
    the tails of DeltaNet's own convolutions are missing from it."""
    fields = architectures.create("deltanet", d_model=d_model, num_heads=2).state_fields(1024)
    assert 4 * (fields["kv"] + 3 * d_model) == published
    assert fields["conv"] == 3 * 3 * d_model


def test_without_short_convolution():
    mixer = architectures.create("deltanet", d_model=D_MODEL, num_heads=HEADS, use_short_conv=False)
    assert mixer.state_fields(99) == {"kv": HEADS * 4 * 4, "conv": 0}
    x = torch.randn(2, 9, D_MODEL)
    y, state = mixer.prefill(x[:, :5], mixer.init_state(2, 9))
    rest = []
    for t in range(5, 9):
        o, state = mixer.step(x[:, t], state)
        rest.append(o)
    assert torch.allclose(torch.cat([y, torch.stack(rest, 1)], 1), mixer(x), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide d_model=12"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"num_heads": 3, "expand_v": 1.3}, "expand_v=1.3 times head_dim=4"),
        ({"expand_v": 0.0}, "expand_v=0.0"),
        ({"conv_size": 0}, "conv_size must be at least 1, got 0"),
    ],
)
def test_shape_rules(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("deltanet", d_model=D_MODEL, **options)


def test_state_of_a_gated_deltanet_is_refused():
    options = {"d_model": D_MODEL, "num_heads": HEADS, "expand_v": 1.0}
    mixer, other = architectures.create("deltanet", **options), architectures.create("gated_deltanet", **options)
    with pytest.raises(ValueError, match="expects a state of type DeltaNetState, got GatedDeltaNetState"):
        mixer.step(torch.randn(2, D_MODEL), other.init_state(2, 8))
