"""RWKV-7 against the equations of the official code, token by token, and against its initialisation."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import architectures

D_MODEL, HEADS, HEAD_DIM = 12, 3, 4


def official_time_mix(mixer, x):
    """Time mixing of BlinkDL/RWKV-LM `x070`, first layer: state [V, K], decay exp(-exp(w)), in a loop over tokens."""
    batch, length, _ = x.shape
    xx = nn.functional.pad(x, (0, 0, 1, -1)) - x
    xr, xw, xk, xv, xa, xg = (x + xx * mixer.mix[name] for name in "rwkvag")

    def lora(module, value, activation):
        out = activation(value @ module.down.weight.T) @ module.up.weight.T
        return out if module.up.bias is None else out + module.up.bias

    r, k, v = xr @ mixer.r_proj.weight.T, xk @ mixer.k_proj.weight.T, xv @ mixer.v_proj.weight.T
    w = -F.softplus(-lora(mixer.decay, xw, torch.tanh)) - 0.5
    a = torch.sigmoid(lora(mixer.rate, xa, nn.Identity()))
    g = lora(mixer.gate, xg, torch.sigmoid)
    kk = F.normalize((k * mixer.k_k).view(batch, length, HEADS, -1), dim=-1, p=2.0).view(batch, length, -1)
    k = k * (1 + (a - 1) * mixer.k_a)
    heads = [y.view(batch, length, HEADS, HEAD_DIM) for y in (r, torch.exp(-torch.exp(w)), k, v, -kk, kk * a)]
    state, out = x.new_zeros(batch, HEADS, HEAD_DIM, HEAD_DIM), []
    for t in range(length):
        rt, wt, kt, vt, at, bt = (y[:, t] for y in heads)
        removed = torch.einsum("bhij,bhj,bhk->bhik", state, at, bt)
        state = state * wt[:, :, None, :] + removed + torch.einsum("bhi,bhj->bhij", vt, kt)
        out.append(torch.einsum("bhij,bhj->bhi", state, rt))
    o = torch.stack(out, 1).view(batch * length, -1)
    o = F.group_norm(o, HEADS, mixer.norm_weight, mixer.norm_bias, eps=1e-5 * HEAD_DIM).view(batch, length, -1)
    bonus = (heads[0] * heads[2] * mixer.r_k).sum(-1, keepdim=True) * heads[3]
    return ((o + bonus.flatten(-2)) * g) @ mixer.out_proj.weight.T, state.transpose(-1, -2)


@torch.no_grad()
def test_official_equations():
    torch.manual_seed(0)
    mixer = architectures.create("rwkv7", d_model=D_MODEL, num_heads=HEADS).double()
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 70, D_MODEL, dtype=torch.float64)
    expected, expected_state = official_time_mix(mixer, x)
    y, state = mixer.prefill(x, mixer.init_state(2, 70))
    assert torch.allclose(y, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert torch.allclose(state.kv, expected_state, rtol=0, atol=1e-10 * float(expected_state.abs().max()))


@pytest.mark.parametrize(("layer_idx", "n_layers"), [(0, 1), (0, 3), (2, 3)])
def test_official_initialisation(layer_idx, n_layers):
    mixer = architectures.create("rwkv7", d_model=8, num_heads=2, layer_idx=layer_idx, n_layers=n_layers)
    height, depth = 1 - layer_idx / n_layers, layer_idx / max(1, n_layers - 1)
    for n in range(8):
        zigzag = (n % 4 - 1.5) / 1.5
        zigzag *= abs(zigzag)
        linear = n / 7 - 0.5
        assert mixer.mix["w"][n].item() == pytest.approx(1 - (n / 8) ** (0.9 * height), abs=1e-6)
        www = -6 + 6 * (n / 7) ** (1 + depth**0.3)
        assert mixer.decay.up.bias[n].item() == pytest.approx(www + 0.5 + 2.5 * zigzag, abs=1e-5)
        assert mixer.rate.up.bias[n].item() == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * linear, abs=1e-6)
        assert mixer.k_k[n].item() == pytest.approx(0.71 - 0.1 * linear, abs=1e-6)
    assert mixer.norm_weight[0].item() == pytest.approx(((1 + layer_idx) / n_layers) ** 0.7)
    identity = torch.eye(8)
    assert torch.allclose(mixer.r_proj.weight @ mixer.r_proj.weight.T, identity, atol=1e-5)
    assert torch.allclose(mixer.k_proj.weight @ mixer.k_proj.weight.T, 0.01 * identity, atol=1e-6)
    assert mixer.out_proj.weight.abs().max() == 0
    assert mixer.decay.up.weight.shape == (8, 32)
    assert mixer.keep_init
    gain = 0.1 * math.sqrt(32 / 8)
    assert torch.allclose(mixer.decay.up.weight @ mixer.decay.up.weight.T, gain**2 * identity, atol=1e-6)


@pytest.mark.parametrize(("d_model", "published"), [(128, 34_304), (256, 68_608)])
def test_published_memory(d_model, published):
    """Bytes of [base_conv, rwkv7] in the Based protocol, corrected: the kv state and 3 d_model for the base
    convolution; the d_model elements of the token shift are missing from it."""
    fields = architectures.create("rwkv7", d_model=d_model, head_dim=64).state_fields(1024)
    assert 4 * (fields["kv"] + 3 * d_model) == published
    assert fields["shift"] == d_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, "head_dim=5 does not divide d_model=12"),
        ({"head_dim": 4, "num_heads": 2}, "head_dim=4 times num_heads=2 must be d_model=12"),
        ({"num_heads": 5}, "num_heads=5 does not divide d_model=12"),
        ({"layer_idx": 1}, r"layer_idx=1 must lie in \[0, n_layers=1\)"),
        ({"a_low_rank_dim": 0}, "a_low_rank_dim must be at least 1, got 0"),
    ],
)
def test_shape_rules(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("rwkv7", d_model=D_MODEL, **options)
