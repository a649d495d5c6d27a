"""GLA against flash-linear-attention's naive recurrence."""

import pytest
import torch
from torch.nn import functional as F

import architectures


@torch.no_grad()
def test_equals_fla_naive_recurrence(fla_naive):
    torch.manual_seed(0)
    mixer = architectures.create("gla", 16, num_heads=2)
    mixer.norm_weight.add_(0.3 * torch.randn(8))
    x = torch.randn(2, 70, 16)
    q, k, v = (F.linear(x, p.weight).unflatten(-1, (2, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    logits = x @ mixer.decay_proj[0].weight.T @ mixer.decay_proj[1].weight.T + mixer.decay_proj[1].bias
    g = (torch.sigmoid(logits) ** (1 / 16)).log().unflatten(-1, (2, -1))
    o, _ = fla_naive("gla").naive_recurrent_gla(q, k, v, g)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm_weight
    gate = x @ mixer.g_proj.weight.T
    wanted = (o.flatten(-2) * gate * torch.sigmoid(gate)) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_short_convolution_precedes_the_recurrence():
    """With a convolution that passes its input through, only the SiLU remains; with a lag, tokens move."""
    torch.manual_seed(0)
    mixer = architectures.create("gla", 16, use_short_conv=True).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    mixer.conv.weight.zero_()
    mixer.conv.weight[:, 1] = 1.0
    (q, _, v, _), _ = mixer._project(x, mixer.init_state(2, 9).conv)
    late = F.pad(x, (0, 0, 1, 0))[:, :-1]
    torch.testing.assert_close(q.flatten(-2), F.silu(mixer.q_proj(late)))
    torch.testing.assert_close(v.flatten(-2), F.silu(mixer.v_proj(late)))


@pytest.mark.parametrize("d_model", [64, 128, 256])
def test_state_is_the_published_count(d_model):
    """key_dim * head_v_dim; at two heads and beside a base convolution of kernel 3 the published bytes follow."""
    mixer = architectures.create("gla", d_model, num_heads=2)
    assert mixer.state_size(1024) == (d_model // 2) * (d_model // 2)
    published = {64: 4_864, 128: 17_920, 256: 68_608}
    assert 4 * (mixer.state_size(1024) + 3 * d_model) == published[d_model]


def test_state_with_a_convolution():
    fields = architectures.create("gla", 64, use_short_conv=True, conv_size=4).state_fields(1024)
    assert fields == {"kv": 32 * 64, "conv": 3 * (32 + 32 + 64)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand_k": 0.3}, r"expand_k=0.3 times d_model=16 is 4.8; allowed: a positive integer"),
        ({"num_heads": 3}, "num_heads=3 does not divide both widths, 8 of keys and 16 of values"),
        ({"gate_rank": 0}, "gate_rank must be at least 1, got 0"),
        ({"gate_temperature": 0.0}, "gate_temperature must be positive and finite, got 0.0"),
        ({"use_short_conv": True, "conv_size": 0}, "conv_size must be at least 1, got 0"),
        ({"backend": "sdpa"}, "backend='sdpa' is not one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("gla", 16, **options)
