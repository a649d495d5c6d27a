"""The papers' models: their sizes, what they are made of, and that a small cut of each runs."""

import pytest
import torch

from zoology import presets
from zoology.model import LanguageModel


def on_meta(name):
    with torch.device("meta"):
        return LanguageModel(presets.config(name))


@pytest.mark.parametrize("name", presets.names())
def test_parameters_are_those_the_papers_state(name):
    nominal = presets.get(name).nominal_parameters
    assert abs(on_meta(name).num_parameters() / nominal - 1) < 0.03


def test_parameters_by_hand():
    d, vocab = 1680, presets.VOCAB_SIZE
    # Four projections and two of the MLP without the attention's biases, two norms a layer, one at the end.
    layer = 4 * d * d + 2 * 4 * d * d + 5 * d + 2 * d
    assert on_meta("attention-1.3b").num_parameters() == 36 * layer + vocab * d + d


def test_layers_of_based_are_where_the_paper_has_them():
    at = {"based": [], "sliding_window": [], "base_conv": []}
    for index, spec in enumerate(presets.config("based-1.3b").layers):
        at[spec.name].append(index)
    assert at["based"] == [1, 6, 11, 16, 21, 27, 33]
    assert at["sliding_window"] == [2, 7, 12, 17, 22, 28, 34]
    assert len(at["base_conv"]) == 22


def test_state_of_based_and_of_attention():
    d, heads = 1792, 16
    features = 1 + 16 + 16 * 17 // 2
    linear, window, conv = features * (d + heads), 2 * 128 * d, 2 * 2 * d
    assert on_meta("based-1.3b").state_size(4096) == 7 * linear + 7 * window + 22 * conv
    assert on_meta("jrt-1.3b").state_size(4096) == on_meta("based-1.3b").state_size(4096)
    # Heads of 70 are kept in 72 entries.
    assert on_meta("attention-1.3b").state_size(1024) == 36 * 2 * 1024 * 24 * 72
    assert on_meta("mamba-1.3b").state_size(1024) == 46 * 4096 * (16 + 3)


def test_a_head_of_70_turns_36():
    mixer = on_meta("attention-1.3b").blocks[0].mixer
    assert (mixer.head_dim, int(mixer.head_dim * mixer.rotary_fraction)) == (70, 36)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'based-1b': did you mean 'based-1.3b'\? Known presets are"):
        presets.config("based-1b")
    with pytest.raises(ValueError, match=", ".join(presets.names())):
        presets.build("gpt")


def test_changes_are_checked():
    assert presets.config("mamba-360m", vocab_size=64).vocab_size == 64
    with pytest.raises(ValueError, match="unknown field depth=3"):
        presets.config("mamba-360m", depth=3)


def test_building_follows_the_seed_and_leaves_the_callers_random_state():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, same, other = (presets.build_config(tiny("based-360m"), dtype=torch.float32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not torch.equal(pairs[0][0], pairs[0][2])
    assert not one.training


def tiny(name):
    return presets.config(name, n_layers=3, vocab_size=64, d_model=64)


@pytest.mark.parametrize("name", ["based-360m", "jrt-360m", "mamba-360m"])
def test_a_cut_of_each_generates(name):
    model = presets.build_config(tiny(name), dtype=torch.float64)
    tokens = torch.arange(12).reshape(2, 6)
    expected = model(torch.cat([tokens, model.generate(tokens, 4)[:, 6:-1]], 1), 0)[:, 5:].argmax(-1)
    assert torch.equal(model.generate(tokens, 4)[:, 6:], expected)


def test_a_named_backend_goes_to_the_mixers_that_have_it():
    config = presets.with_backend(presets.config("based-360m"), "triton")
    assert {spec.options.get("backend", "auto") for spec in config.layers if spec.name == "based"} == {"triton"}
    assert {spec.options.get("backend", "auto") for spec in config.layers if spec.name != "based"} == {"auto"}
