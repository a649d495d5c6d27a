"""Gated DeltaNet against transformers' module of it, weights copied over."""

import pytest
import torch

import architectures

D_MODEL, HEADS, KEY, VALUE = 12, 3, 4, 8


def transformers_layer(module, mixer):
    """transformers' module for the shapes of `mixer`, with its weights."""
    config = module.Qwen3NextConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
    )
    layer = module.Qwen3NextGatedDeltaNet(config, 0)
    # Theirs holds q, k, v and the output gate of a head together, and beside them beta and the decay.
    parts = [*mixer.qkv_proj.weight.split(mixer.widths), mixer.gate_proj.weight]
    together = torch.cat([part.unflatten(0, (HEADS, -1)) for part in parts], dim=1).flatten(0, 1)
    small = torch.stack([mixer.beta_proj.weight, mixer.decay_proj.weight], dim=1).flatten(0, 1)
    copies = {
        "in_proj_qkvz.weight": together,
        "in_proj_ba.weight": small,
        "conv1d.weight": mixer.conv.weight.flip(-1).unsqueeze(1),
        "dt_bias": mixer.step_bias,
        "A_log": mixer.log_rate,
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": mixer.out_proj.weight,
    }
    layer.load_state_dict(copies)
    return layer


@torch.no_grad()
def test_transformers_module(transformers_module):
    torch.manual_seed(0)
    mixer = architectures.create("gated_deltanet", d_model=D_MODEL, num_heads=HEADS)
    mixer.norm.weight.add_(0.1 * torch.randn_like(mixer.norm.weight))
    x = torch.randn(2, 70, D_MODEL)
    expected = transformers_layer(transformers_module("qwen3_next"), mixer)(x)
    assert torch.allclose(mixer(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("d_model", "published"), [(64, 17_152), (128, 67_072), (256, 265_216)])
def test_published_memory(d_model, published):
    """Bytes of [base_conv, gated_deltanet] in the Based protocol: the kv state and 3 d_model for the base convolution;
    the tails of Gated DeltaNet's own convolutions are missing from it."""
    fields = architectures.create("gated_deltanet", d_model=d_model, num_heads=2, use_gate=False).state_fields(1024)
    assert 4 * (fields["kv"] + 3 * d_model) == published
    assert fields["conv"] == 3 * 4 * d_model


def test_initial_decay():
    """log alpha = -A dt at x = 0, with A in (0, 16) and dt in [0.001, 0.1] as in the official code."""
    torch.manual_seed(0)
    mixer = architectures.create("gated_deltanet", d_model=64, num_heads=64)
    assert mixer._gate(torch.zeros(1, 64)).abs().max() == 0
    decay = -mixer._decay(torch.zeros(1, 64))
    rate = mixer.log_rate.exp()
    assert 0 < rate.min() < 2
    assert 14 < rate.max() < 16
    step = decay / rate
    assert 0.001 <= step.min() < 0.003
    assert 0.03 < step.max() <= 0.1


def test_shape_rules():
    with pytest.raises(ValueError, match=r"expand_v=1.3 times head_dim=4 is 5.2"):
        architectures.create("gated_deltanet", d_model=D_MODEL, num_heads=HEADS, expand_v=1.3)
    with pytest.raises(ValueError, match="num_heads=5 does not divide d_model=12"):
        architectures.create("gated_deltanet", d_model=D_MODEL, num_heads=5)
