"""Mamba against transformers' implementation."""

import pytest
import torch

import architectures


@torch.no_grad()
def test_equals_transformers():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    ours = architectures.create("mamba", 16, d_state=8, dt_rank=3)
    for p in ours.parameters():
        p.add_(0.1 * torch.randn_like(p))
    config = MambaConfig(
        hidden_size=16, state_size=8, expand=2, conv_kernel=4, time_step_rank=3, use_bias=False, use_conv_bias=True,
        num_hidden_layers=1, use_mambapy=False,
    )  # fmt: skip
    theirs = MambaMixer(config, layer_idx=0)
    theirs.conv1d.weight.copy_(ours.conv.weight.flip(-1).unsqueeze(1))  # ours has the latest token first
    theirs.conv1d.bias.copy_(ours.conv.bias)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    theirs.A_log.copy_(ours.A_log)
    theirs.D.copy_(ours.D)
    x = torch.randn(2, 70, 16)
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_official_initialisation():
    torch.manual_seed(0)
    mixer = architectures.create("mamba", 256, d_state=5)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 6).expand(512, 5))
    assert torch.equal(mixer.D, torch.ones(512))
    step = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.999 <= step.min() < 2e-3
    assert 0.05 < step.max() <= 0.1 * 1.001
    assert 0.2 < mixer.dt_proj.weight.abs().max() <= 16**-0.5
    assert mixer.x_proj.weight.shape == (16 + 2 * 5, 512)


@pytest.mark.parametrize("d_model", [64, 128])
def test_state_is_the_published_count_and_the_convolution(d_model):
    """Published: 2 * d_model * d_state. It leaves out the tail of the convolution."""
    fields = architectures.create("mamba", d_model, d_state=16).state_fields(1024)
    assert fields == {"ssm": 2 * d_model * 16, "conv": 3 * 2 * d_model}


@pytest.mark.parametrize("option", ["d_state", "d_conv", "expand", "dt_rank"])
def test_bad_widths(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        architectures.create("mamba", 16, **{option: 0})


def test_bad_backend():
    with pytest.raises(ValueError, match="backend='sdpa' is not one of"):
        architectures.create("mamba", 16, backend="sdpa")
