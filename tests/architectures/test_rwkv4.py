"""RWKV-4 against transformers' implementation."""

import pytest
import torch

import architectures


@torch.no_grad()
def test_equals_transformers():
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    torch.manual_seed(0)
    ours = architectures.create("rwkv4", 16)
    for p in ours.parameters():
        p.add_(0.3 * torch.randn_like(p))
    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=16, num_hidden_layers=2), layer_id=0)
    theirs.time_decay.copy_(ours.time_decay)
    theirs.time_first.copy_(ours.time_first)
    theirs.time_mix_key.copy_(ours.time_mix_k.expand(1, 1, -1))
    theirs.time_mix_value.copy_(ours.time_mix_v.expand(1, 1, -1))
    theirs.time_mix_receptance.copy_(ours.time_mix_r.expand(1, 1, -1))
    for name in ("key", "value", "receptance", "output"):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    x = torch.randn(2, 70, 16)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=1e-5, atol=1e-6)


def test_official_initialisation():
    """RWKV-v4/src/model.py at n_embd = 4, layer 1 of 3: ratio_0_to_1 = 1/2, ratio_1_to_almost0 = 2/3."""
    mixer = architectures.create("rwkv4", 4, layer_idx=1, n_layers=3)
    decay = torch.tensor([-5 + 8 * (h / 3) ** (0.7 + 1.3 * 0.5) for h in range(4)])
    torch.testing.assert_close(mixer.time_decay.data, decay)
    torch.testing.assert_close(mixer.time_first.data, torch.tensor([0.0, 0.5, -0.5, 0.0]) - 1.2039728)
    mix = torch.tensor([0.0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(mixer.time_mix_k.data, mix ** (2 / 3))
    torch.testing.assert_close(mixer.time_mix_v.data, mix ** (2 / 3) + 0.15)
    torch.testing.assert_close(mixer.time_mix_r.data, mix ** (1 / 3))
    assert [layer.weight.abs().sum().item() for layer in (mixer.key, mixer.receptance, mixer.output)] == [0, 0, 0]
    torch.testing.assert_close(mixer.value.weight @ mixer.value.weight.T, torch.eye(4))


def test_state_is_two_numbers_a_channel_and_the_token_shift():
    fields = architectures.create("rwkv4", 64).state_fields(1024)
    assert fields == {"wkv.average": 64, "wkv.log_weight": 64, "shift": 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_idx": 2, "n_layers": 2}, r"layer_idx=2 must lie in \[0, n_layers=2\)"),
        ({"backend": "fla"}, "backend='fla' is not one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("rwkv4", 16, **options)
