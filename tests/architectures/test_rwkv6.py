"""RWKV-6 against the official recurrence, written token by token, and fla's naive recurrence."""

import pytest
import torch
from torch.nn import functional as F

import architectures


def build(**options):
    torch.manual_seed(0)
    mixer = architectures.create("rwkv6", 12, num_heads=2, mix_rank=3, decay_rank=4, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def official_recurrence(mixer, x):
    """The RNN of RWKV-v5/rwkv_v6_demo.py for one sequence x [T, D], with the names of this mixer."""
    heads, width = mixer.num_heads, mixer.head_dim
    last, state, outputs = torch.zeros_like(x[0]), torch.zeros(heads, width, width, dtype=x.dtype), []
    for token in x:
        change = last - token
        hidden = torch.tanh((token + change * mixer.mix_x) @ mixer.mix_down).reshape(5, 1, -1)
        m_w, m_k, m_v, m_r, m_g = torch.bmm(hidden, mixer.mix_up).squeeze(1)
        mu_w, mu_k, mu_v, mu_r, mu_g = mixer.mix
        x_w = token + change * (mu_w + m_w)
        w = mixer.time_decay + torch.tanh(x_w @ mixer.decay_down) @ mixer.decay_up
        r = mixer.receptance(token + change * (mu_r + m_r)).reshape(heads, 1, width)
        k = mixer.key(token + change * (mu_k + m_k)).reshape(heads, width, 1)
        v = mixer.value(token + change * (mu_v + m_v)).reshape(heads, 1, width)
        gate = F.silu(mixer.gate(token + change * (mu_g + m_g)))
        o = r @ (mixer.bonus.unsqueeze(-1) * (k @ v) + state)
        state = k @ v + torch.exp(-torch.exp(w)).reshape(heads, width, 1) * state
        o = F.group_norm(o.reshape(1, -1), heads, mixer.norm_weight, mixer.norm_bias, eps=64e-5)[0]
        outputs.append(mixer.output(o * gate))
        last = token
    return torch.stack(outputs)


@torch.no_grad()
def test_equals_the_official_recurrence():
    mixer = build()
    x = torch.randn(2, 70, 12, dtype=torch.float64)
    wanted = torch.stack([official_recurrence(mixer, sequence) for sequence in x])
    assert ((mixer(x) - wanted).abs().max() / wanted.abs().max()).item() < 1e-12


@torch.no_grad()
def test_core_equals_fla_naive_recurrence():
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    mixer = build().float()
    x = torch.randn(2, 70, 12)
    r, k, v, g, _ = mixer._project(x, F.pad(x, (0, 0, 1, 0))[:, :-1] - x)
    state = torch.randn(2, 2, 6, 6)
    o, last = mixer._mix(r, k, v, g, state)
    heads_first = [part.transpose(1, 2) for part in (r, k, v, g)]
    wanted, wanted_last = naive_recurrent_rwkv6(
        *heads_first, mixer.bonus, scale=1.0, initial_state=state, output_final_state=True
    )
    assert ((o - wanted.transpose(1, 2)).abs().max() / wanted.abs().max()).item() < 1e-6
    assert ((last - wanted_last).abs().max() / wanted_last.abs().max()).item() < 1e-6


def test_official_initialisation():
    """RWKV_Tmix_x060 at n_embd = 4, layer 1 of 3: ratio_0_to_1 = 1/2, ratio_1_to_almost0 = 2/3."""
    torch.manual_seed(0)
    mixer = architectures.create("rwkv6", 4, layer_idx=1, n_layers=3)
    mix = torch.tensor([0.0, 0.25, 0.5, 0.75])
    wanted = [1 - mix ** (2 / 3)] * 2 + [1 - (mix ** (2 / 3) + 0.15)] + [1 - mix ** (1 / 3)] * 2
    torch.testing.assert_close(mixer.mix.data, torch.stack(wanted))
    torch.testing.assert_close(mixer.mix_x.data, wanted[0])
    decay = torch.tensor([-6 + 5 * (n / 3) ** (0.7 + 1.3 * 0.5) for n in range(4)])
    torch.testing.assert_close(mixer.time_decay.data, decay)
    bonus = torch.tensor([[0.5 * (1 - n / 3) + 0.1 * ((n + 1) % 3 - 1) for n in range(4)]])
    torch.testing.assert_close(mixer.bonus.data, bonus)
    torch.testing.assert_close(mixer.norm_weight.data, torch.full((4,), (2 / 3) ** 0.7))
    assert mixer.output.weight.abs().max() == 0
    torch.testing.assert_close(mixer.key.weight @ mixer.key.weight.T, 0.01 * torch.eye(4))


def test_state_is_the_published_count_and_the_token_shift():
    fields = architectures.create("rwkv6", 128).state_fields(1024)
    assert fields == {"kv": 2 * 64 * 64, "shift": 128}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide d_model=16"),
        ({"mix_rank": 0}, "mix_rank must be at least 1, got 0"),
        ({"decay_rank": 0}, "decay_rank must be at least 1, got 0"),
        ({"layer_idx": 1}, r"layer_idx=1 must lie in \[0, n_layers=1\)"),
        ({"backend": "sdpa"}, "backend='sdpa' is not one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("rwkv6", 16, **options)
