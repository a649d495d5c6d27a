"""Retention against flash-linear-attention's naive form."""

import pytest
import torch

import architectures
from architectures.layers import rotary


@torch.no_grad()
@pytest.mark.parametrize("rotate", [False, True])
def test_equals_fla_naive_retention(rotate):
    from fla.ops.retention.naive import naive_retention

    torch.manual_seed(0)
    mixer = architectures.create("retnet", 16, num_heads=2, rotate=rotate)
    x = torch.randn(2, 70, 16)
    q, k, v = ((x @ p.weight.T).unflatten(-1, (2, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if rotate:
        q, k = rotary(q, torch.arange(70)), rotary(k, torch.arange(70))
    o = naive_retention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6)
    gate = x @ mixer.g_proj.weight.T
    wanted = (o.flatten(-2) * gate * torch.sigmoid(gate)) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_distances_matter():
    """Rotation and decay depend on distances, so a sequence after silence reads as it does at the start."""
    torch.manual_seed(0)
    mixer = architectures.create("retnet", 16).double()
    x = torch.randn(1, 10, 16, dtype=torch.float64)
    late = torch.cat([torch.zeros(1, 7, 16, dtype=torch.float64), x], dim=1)
    torch.testing.assert_close(mixer(late)[:, 7:], mixer(x), rtol=1e-9, atol=1e-12)


def test_decays_of_the_paper():
    gamma = architectures.create("retnet", 32, num_heads=4).log_decay(torch.device("cpu"), torch.float32).exp()
    torch.testing.assert_close(gamma, torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256]))


def test_state_is_the_published_count():
    mixer = architectures.create("retnet", 64, num_heads=2)
    assert mixer.state_fields(1024) == {"kv": 2 * 32 * 64, "position": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide d_model=16"),
        ({"num_heads": 16, "rotate": True}, "rotate=True needs an even width of a head, got 1"),
        ({"expand_v": 0}, "expand_v must be at least 1, got 0"),
        ({"backend": "sdpa"}, "backend='sdpa' is not one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("retnet", 16, **options)
