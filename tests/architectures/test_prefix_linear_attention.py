"""Prefix linear attention against its definition; what sees what; a prefix comes first and whole."""

import pytest
import torch

import architectures
from architectures import parity
from architectures.mixer import clone_state

WIDTH, F_DIM, HEADS, LENGTH, PREFIX = 8, 3, 2, 11, 5


def mixer(seed=0, **options):
    """Float64, every parameter well away from zero, so that weights differ from token to token."""
    torch.manual_seed(seed)
    built = architectures.create(
        "prefix_linear_attention", WIDTH, feature_dim=F_DIM, num_heads=HEADS, **options
    ).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def inputs(seed=1, batch=2, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def brute_force(built, x, prefix_length):
    """The definition with explicit weights, token by token and head by head."""
    rows = []
    for sequence in x:
        heads = []
        for h in range(HEADS):
            keys, values = slice(h * F_DIM, (h + 1) * F_DIM), slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
            q, k = sequence @ built.q_proj.weight[keys].T, sequence @ built.k_proj.weight[keys].T
            v = sequence @ built.v_proj.weight[values].T
            prefix = sequence[:prefix_length]
            prefix_k, prefix_v = (
                prefix @ built.prefix_k_proj.weight[keys].T,
                prefix @ built.prefix_v_proj.weight[values].T,
            )
            outputs = []
            for t in range(len(sequence)):
                s = torch.cat([k[: t + 1], prefix_k]) @ q[t] / F_DIM**0.5
                w = 1 + s + s**2 / 2
                outputs.append(w @ torch.cat([v[: t + 1], prefix_v]) / w.sum())
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, dim=1) @ built.out_proj.weight.T)
    return torch.stack(rows)


def read_by(built, x, prefix_length, changed):
    """Which outputs move when token `changed` does."""
    other = x.clone()
    other[:, changed] += 1
    moved = (built(other, prefix_length=prefix_length) - built(x, prefix_length=prefix_length)).abs().amax((0, 2))
    return (moved > 1e-12).nonzero().flatten().tolist()


@torch.no_grad()
@pytest.mark.parametrize("prefix_length", [0, 1, PREFIX, LENGTH])
def test_is_its_definition(prefix_length):
    built, x = mixer(), inputs()
    expected = brute_force(built, x, prefix_length)
    assert torch.allclose(built(x, prefix_length=prefix_length), expected, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_the_definition():
    built, x, weight = mixer(), inputs().requires_grad_(), inputs(seed=2)
    gradients = []
    for forward in (lambda: built(x, prefix_length=PREFIX), lambda: brute_force(built, x, PREFIX)):
        gradients.append(torch.autograd.grad((forward() * weight).sum(), [x, *built.parameters()]))
    for actual, expected in zip(*gradients):
        assert expected.abs().max() > 1e-3
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_the_prefix_is_read_by_all_and_the_rest_causally():
    built, x = mixer(), inputs()
    for token in range(PREFIX):
        assert read_by(built, x, PREFIX, token) == list(range(LENGTH))
    for token in range(PREFIX, LENGTH):
        assert read_by(built, x, PREFIX, token) == list(range(token, LENGTH))
    assert read_by(built, x, 0, 3) == list(range(3, LENGTH))


@torch.no_grad()
def test_without_a_prefix_it_is_based():
    built, x = mixer(), inputs()
    based = architectures.create("based", WIDTH, feature_dim=F_DIM, num_heads=HEADS).double()
    based.load_state_dict(built.state_dict(), strict=False)
    assert torch.equal(built(x), based(x))
    assert built.state_fields(64) == based.state_fields(64)


@torch.no_grad()
@pytest.mark.parametrize("cut", [PREFIX, PREFIX + 1, LENGTH - 1, LENGTH])
def test_decoding_goes_on_behind_the_prefix(cut):
    """The parallel form, prefill and then steps, and prefill twice agree."""
    built, x = mixer(), inputs()
    expected = built(x, prefix_length=PREFIX)
    first, state = built.prefill(x[:, :cut], built.init_state(2, LENGTH), prefix_length=PREFIX)
    outputs, resumed = [first], clone_state(state)
    for token in x[:, cut:].unbind(1):
        y, state = built.step(token, state)
        outputs.append(y[:, None])
    assert torch.allclose(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-12)
    parts = [built.prefill(part, resumed)[0] for part in (x[:, cut:],) if part.shape[1]]
    assert torch.allclose(torch.cat([first, *parts], 1), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_state_holds_both_sums():
    built, x = mixer(), inputs()
    _, state = built.prefill(x, built.init_state(2, LENGTH), prefix_length=PREFIX)
    assert torch.equal(state.key_sum[..., 0], torch.full((2, HEADS), LENGTH + PREFIX, dtype=torch.float64))
    causal = mixer()
    _, alone = causal.prefill(x, causal.init_state(2, LENGTH))
    values = (x[:, :PREFIX] @ built.prefix_v_proj.weight.T).sum(1).view(2, HEADS, -1)
    assert torch.allclose(state.kv[:, :, 0] - alone.kv[:, :, 0], values, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_keeps_its_dtype_behind_a_prefix(dtype):
    built, x = mixer().bfloat16(), inputs().bfloat16()
    state = built.init_state(2, LENGTH, dtype=dtype)
    for fill in (built.prefill, built.prefill_empty):
        _, after = fill(x, clone_state(state), prefix_length=PREFIX)
        assert (after.kv.dtype, after.key_sum.dtype) == (dtype, dtype)


@torch.no_grad()
def test_a_prefix_comes_first_and_whole():
    built, x = mixer(), inputs()
    _, after = built.prefill(x[:, :2], built.init_state(2, LENGTH))
    with pytest.raises(ValueError, match="prefix_length=5 with a state that holds tokens"):
        built.prefill(x[:, 2:], after, prefix_length=PREFIX)
    with pytest.raises(ValueError, match="prefix_length=5: there are 4 tokens, and a prefix must come whole"):
        built.prefill(x[:, :4], built.init_state(2, LENGTH), prefix_length=PREFIX)
    with pytest.raises(ValueError, match="prefix_length=12: there are 11 tokens"):
        built(x, prefix_length=LENGTH + 1)
    for bad in (-1, 2.0, True):
        with pytest.raises(ValueError, match="must be a whole number >= 0"):
            built(x, prefix_length=bad)


def test_one_sequence_without_a_batch_is_refused_behind_a_prefix_too():
    with pytest.raises(ValueError, match=r"x has shape \(5, 16\); allowed: \[B, T, 16\]"):
        architectures.create("prefix_linear_attention", 16)(torch.randn(5, 16), prefix_length=2)


@pytest.mark.parametrize("seq_len", [1, 40])
def test_parity_is_checked_behind_a_prefix(seq_len):
    """What a parity check compares moves with the projections that only a prefix reads."""
    built, device = mixer(), torch.device("cpu")
    changed = mixer()
    with torch.no_grad():
        changed.prefix_v_proj.weight.add_(1)
    cases = [parity._Case(each, device, torch.float32, seq_len) for each in (built, changed)]
    outputs, gradients = zip(*(case.run("reference", torch.float64) for case in cases))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    reached = [bool(g["prefix_k_proj.weight"].abs().max() > 1e-3) for g in gradients if g]
    assert reached == ([True, True] if seq_len > 1 else [])  # decoding is compared without gradients
    assert parity.check(built, "reference", device, torch.float32, seq_len).passed
