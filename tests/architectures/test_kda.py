"""Kimi Delta Attention against transformers' module of it, weights copied over."""

import pytest
import torch

import architectures

D_MODEL, HEADS, HEAD_DIM = 12, 3, 4


@torch.no_grad()
def test_transformers_module(transformers_module):
    torch.manual_seed(0)
    mixer = architectures.create("kda", d_model=D_MODEL, num_heads=HEADS)
    mixer.norm.weight.add_(0.1 * torch.randn_like(mixer.norm.weight))
    mixer.gate_proj[1].bias.zero_()  # theirs has none there; the official code has
    module = transformers_module("kimi_linear")
    config = module.KimiLinearConfig(
        hidden_size=D_MODEL,
        linear_num_heads=HEADS,
        linear_head_dim=HEAD_DIM,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=4,
        num_attention_heads=2,
    )
    layer = module.KimiLinearDeltaAttention(config, 0)
    q, k, v = mixer.qkv_proj.weight.split(mixer.widths)
    copies = {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "conv1d.weight": mixer.conv.weight.flip(-1).unsqueeze(1),
        "forget_gate.f_a_proj.weight": mixer.decay_proj[0].weight,
        "forget_gate.f_b_proj.weight": mixer.decay_proj[1].weight,
        "forget_gate.dt_bias": mixer.step_bias,
        "forget_gate.A_log": mixer.log_rate.view(1, 1, HEADS, 1),
        "b_proj.weight": mixer.beta_proj.weight,
        "g_a_proj.weight": mixer.gate_proj[0].weight,
        "g_b_proj.weight": mixer.gate_proj[1].weight,
        "o_norm.weight": mixer.norm.weight,
        "o_proj.weight": mixer.out_proj.weight,
    }
    layer.load_state_dict(copies)
    x = torch.randn(2, 70, D_MODEL)
    expected = layer(x)
    assert torch.allclose(mixer(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_decay_is_per_channel_and_per_head():
    torch.manual_seed(0)
    mixer = architectures.create("kda", d_model=D_MODEL, num_heads=HEADS)
    decay = mixer._decay(torch.zeros(1, D_MODEL))
    assert decay.shape == (1, HEADS, HEAD_DIM)
    assert decay.unique().numel() == HEADS * HEAD_DIM
    step = -decay[0] / mixer.log_rate.exp()[:, None]
    assert 0.001 <= step.min() <= step.max() <= 0.1


def test_memory_and_shape_rules():
    fields = architectures.create("kda", d_model=128, num_heads=2).state_fields(1024)
    assert fields == {"kv": 2 * 64 * 64, "conv": 3 * 3 * 128}
    with pytest.raises(ValueError, match="num_heads=5 does not divide d_model=12"):
        architectures.create("kda", d_model=D_MODEL, num_heads=5)
