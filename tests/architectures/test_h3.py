"""H3 against the recurrences of the official code, token by token, and against the kernel formula of S4D."""

import math

import pytest
import torch
from torch.nn import functional as F

import architectures

D_MODEL, D_STATE = 12, 6


def build(head_dim, **options):
    torch.manual_seed(0)
    mixer = architectures.create("h3", d_model=D_MODEL, d_state=D_STATE, head_dim=head_dim, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def official_steps(mixer, x, head_dim):
    """H3.step, SSKernelShift.step and SSKernelDiag.step of HazyResearch/H3, in a loop over tokens."""
    heads, batch = D_MODEL // head_dim, len(x)
    dt = mixer.ssm.log_dt.exp()[:, None]
    a = -mixer.ssm.log_decay.exp() + 1j * mixer.ssm.frequency
    b, c = torch.view_as_complex(mixer.ssm.b), torch.view_as_complex(mixer.ssm.c)
    da, db = (1 + dt * a / 2) / (1 - dt * a / 2), b / (1 - dt * a / 2) * dt
    shift_state = x.new_zeros(batch, D_MODEL, D_STATE)
    state = torch.zeros(batch, head_dim, head_dim, heads, D_STATE // 2, dtype=torch.complex128)
    outputs = []
    for t in range(x.shape[1]):
        q, k, v = mixer.q_proj(x[:, t]), mixer.k_proj(x[:, t]), mixer.v_proj(x[:, t])
        shift_state = F.pad(shift_state, (1, -1)) + mixer.shift.b * k[..., None]
        k = (mixer.shift.c * shift_state).sum(-1) + k * mixer.shift_skip
        k, v, q = (y.view(batch, heads, head_dim) for y in (k, v, q))
        kv = torch.einsum("bhd,bhe->bdeh", k, v)
        state = da * state + db * kv[..., None]
        y = 2 * (c * state).sum(-1).real + kv * mixer.ssm_skip
        outputs.append(torch.einsum("bdeh,bhd->bhe", y, q).flatten(1))
    return mixer.out_proj(torch.stack(outputs, 1)), state.permute(0, 3, 1, 2, 4)


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [1, 3])
def test_official_recurrence(head_dim):
    mixer = build(head_dim)
    x = torch.randn(2, 50, D_MODEL, dtype=torch.float64)
    expected, expected_state = official_steps(mixer, x, head_dim)
    tolerance = 1e-10 * float(expected.abs().max())
    assert torch.allclose(mixer(x), expected, rtol=0, atol=tolerance)
    y, state = mixer.prefill(x, mixer.init_state(2, 50))
    assert torch.allclose(y, expected, rtol=0, atol=tolerance)
    assert torch.allclose(torch.view_as_complex(state.ssm), expected_state, rtol=0, atol=1e-10)


@torch.no_grad()
def test_shift_taps_are_the_correlation_of_the_official_kernel():
    mixer = build(1)
    b, c = (torch.fft.rfft(p, n=2 * D_STATE) for p in (mixer.shift.b, mixer.shift.c))
    expected = torch.fft.irfft(b.conj() * c, n=2 * D_STATE)[:, :D_STATE]
    assert torch.allclose(mixer.shift().T, expected, atol=1e-12)


def test_official_initialisation():
    torch.manual_seed(0)
    mixer = architectures.create("h3", d_model=64, d_state=16)
    assert torch.equal(mixer.shift.b[:, 0], torch.ones(64))
    assert mixer.shift.b.sum() == 64
    assert 0.24 < mixer.shift.c.abs().max() <= 0.25
    assert torch.allclose(mixer.ssm.log_decay.exp(), torch.full((64, 8), 0.5))
    assert torch.allclose(mixer.ssm.frequency[3], math.pi * torch.arange(8))
    dt = mixer.ssm.log_dt.exp()
    assert 0.001 <= dt.min() < 0.003 < 0.03 < dt.max() <= 0.1
    # A standard complex normal: variance one, half of it in each part.
    assert mixer.ssm.c.square().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("d_model", "published"), [(64, 8_192), (128, 32_768), (256, 131_072)])
def test_published_memory(d_model, published):
    """Bytes of two H3 layers, d_state = d_model / 4 and head_dim 2: the published count is half the diagonal SSM's
    (it forgets the factor head_dim) and has no shift SSM."""
    fields = architectures.create("h3", d_model=d_model, d_state=d_model // 4, head_dim=2).state_fields(1024)
    assert 2 * 4 * fields["ssm"] == 2 * published
    assert fields["shift"] == (d_model // 4 - 1) * d_model
    single = architectures.create("h3", d_model=d_model, d_state=d_model // 4).state_fields(1024)
    assert 2 * 4 * single["ssm"] == published


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 5}, "d_state must be an even number of at least 2 .*, got 5"),
        ({"d_state": 0}, "d_state must be an even number"),
        ({"head_dim": 5}, "head_dim=5 does not divide d_model=12"),
        ({"dt_min": 0.2}, "dt_min=0.2 and dt_max=0.1"),
        ({"dt_min": 0.0}, "dt_min=0.0"),
    ],
)
def test_shape_rules(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("h3", d_model=D_MODEL, **options)
