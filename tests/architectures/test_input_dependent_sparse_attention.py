"""Selective attention: what is selected, what is not, and how the penalty reaches the selection."""

import pytest
import torch

import architectures

NAME, D_MODEL = "input_dependent_sparse_attention", 8


def build(**options):
    torch.manual_seed(0)
    return architectures.create(NAME, d_model=D_MODEL, **options).double()


def x_of(length=20):
    return torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(mixer, x):
    """Softmax attention with the same weights, before any selection."""
    attention = architectures.create("attention", d_model=D_MODEL, num_heads=mixer.num_heads).double()
    attention.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != "select.weight"})
    return attention(x)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.6])
def test_selected_tokens_are_scaled_and_the_others_zero(threshold):
    mixer, x = build(num_heads=2, threshold=threshold), x_of()
    score = torch.sigmoid(x @ mixer.select.weight.T)
    expected = torch.where(score > threshold, score * dense(mixer, x), 0.0)
    assert torch.allclose(mixer(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(mixer.selected(x), (score > threshold).squeeze(-1))
    assert mixer.selected(x).float().mean() == pytest.approx({0.0: 1.0, 0.5: 0.5, 0.6: 0.2}[threshold], abs=0.25)


def test_unselected_tokens_still_teach_the_selection():
    """With every token below the threshold the output is zero, and the gradient is that of the soft form."""
    x, gradients = x_of(), []
    for threshold in (0.999, 0.0):
        mixer = build(threshold=threshold, selection_penalty=0.0)
        (mixer(x) * x.cos()).sum().backward()
        gradients.append(mixer.select.weight.grad)
    assert build(threshold=0.999)(x).abs().max() == 0
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_lookups", [None, 2])
def test_penalty_is_that_of_the_paper(num_lookups):
    """Its gradient is added in training mode, not in evaluation, and only above the budget."""
    x, gradients = x_of(), {}
    for penalty in (0.0, 3.0):
        for training in (True, False):
            mixer = build(selection_penalty=penalty, num_lookups=num_lookups).train(training)
            mixer(x).sum().backward()
            gradients[penalty, training] = mixer.select.weight.grad
    mixer = build()
    score = torch.sigmoid(x @ mixer.select.weight.T)
    loss = 3.0 * torch.relu(score.mean() - (20**0.5 if num_lookups is None else num_lookups) / 20)
    (expected,) = torch.autograd.grad(loss, mixer.select.weight)
    assert expected.abs().max() > 0
    assert torch.allclose(gradients[3.0, True] - gradients[0.0, True], expected, rtol=1e-9, atol=1e-14)
    assert torch.equal(gradients[3.0, False], gradients[0.0, False])
    within = build(selection_penalty=3.0, num_lookups=20)
    within(x).sum().backward()
    assert torch.equal(within.select.weight.grad, gradients[0.0, True])


def test_penalty_makes_look_ups_rare():
    torch.manual_seed(0)
    mixer = build(selection_penalty=1.0, num_lookups=2)
    x = x_of() + 0.5 * mixer.select.weight.detach().sign()
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.05)
    before = mixer.selected(x).float().mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        mixer(x).square().mean().backward()
        optimizer.step()
    assert before > 0.4
    assert mixer.selected(x).float().mean().item() < 0.2


def test_memory_is_the_whole_cache():
    assert build().state_fields(100) == {"keys": 100 * D_MODEL, "values": 100 * D_MODEL, "position": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_lookups": 0}, "num_lookups must be at least 1"),
        ({"threshold": 1.0}, r"threshold must lie in \[0, 1\), got 1.0"),
        ({"selection_penalty": -1.0}, "selection_penalty must be at least 0 and finite, got -1.0"),
        ({"num_heads": 3}, "num_heads=3 does not divide d_model=8"),
    ],
)
def test_option_rules(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create(NAME, d_model=D_MODEL, **options)
