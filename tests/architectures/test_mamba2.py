"""Mamba-2 against transformers' implementation."""

import pytest
import torch

import architectures
from architectures import mamba2


def build(**options):
    torch.manual_seed(0)
    mixer = architectures.create("mamba2", 16, d_state=8, head_dim=8, **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


@torch.no_grad()
@pytest.mark.parametrize("num_groups", [1, 2])
def test_equals_transformers(num_groups):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = build(num_groups=num_groups)
    config = Mamba2Config(
        hidden_size=16, state_size=8, expand=2, head_dim=8, num_heads=4, n_groups=num_groups, conv_kernel=4,
        chunk_size=16, layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True, num_hidden_layers=1,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0)
    theirs.in_proj.weight.copy_(ours.in_proj.weight)
    theirs.conv1d.weight.copy_(ours.conv.weight.flip(-1).unsqueeze(1))  # ours has the latest token first
    theirs.conv1d.bias.copy_(ours.conv.bias)
    for name in ("dt_bias", "A_log", "D"):
        getattr(theirs, name).copy_(getattr(ours, name))
    theirs.norm.weight.copy_(ours.norm_weight)
    theirs.out_proj.weight.copy_(ours.out_proj.weight)
    x = torch.randn(2, 70, 16)
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_official_initialisation():
    torch.manual_seed(0)
    mixer = architectures.create("mamba2", 512, head_dim=8)
    decay = mixer.A_log.exp()
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= decay.min() < 2
    assert 15 < decay.max() <= 16
    assert 1e-3 * 0.999 <= step.min() < 2e-3
    assert 0.05 < step.max() <= 0.1 * 1.001
    assert torch.equal(mixer.D, torch.ones(128))


@pytest.mark.parametrize("d_state", [8, 16, 24])
def test_state_is_the_published_count_and_the_convolution(d_state):
    """Published: 2 * d_model * d_state. It leaves out the tail of the convolution over x, B and C."""
    fields = architectures.create("mamba2", 64, d_state=d_state).state_fields(1024)
    assert fields == {"ssm": 2 * 64 * d_state, "conv": 3 * (128 + 2 * d_state)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, r"head_dim=5 does not divide expand \* d_model = 32"),
        ({"head_dim": 8, "num_groups": 3}, "num_groups=3 does not divide the number of heads, 4"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"expand": 0}, "expand must be at least 1, got 0"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"backend": "sdpa"}, "backend='sdpa' is not one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("mamba2", 16, **options)


def test_the_softplus_that_is_kept_is_softplus():
    x = torch.tensor([-200.0, -30.0, -1.0, 0.0, 1e-3, 2.0, 19.0, 25.0, 300.0], dtype=torch.float64, requires_grad=True)
    found, wanted = mamba2.softplus(x), torch.nn.functional.softplus(x)
    assert torch.equal(found, wanted)
    weights = torch.linspace(1, 2, len(x), dtype=torch.float64)
    one, other = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-9)  # PyTorch's is 1 from 20 on
    torch.library.opcheck(torch.ops.zoology.softplus.default, (torch.randn(2, 3, requires_grad=True),))
