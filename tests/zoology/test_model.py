"""The language-model shell: shortcuts equal the plain computation, decoding equals the parallel form."""

import math

import pytest
import torch
from torch.nn import functional as F

import architectures
from zoology.config import ModelConfig, layer
from zoology.data import gather_labels
from zoology.generation import Decoder
from zoology.model import LONG_GENERATION, LanguageModel, measured_state
from zoology.tasks import IGNORE_INDEX, MQAR
from zoology.train import labelled_loss

TASK = MQAR(vocab_size=32, seq_len=24, num_kv_pairs=4)


def build(*names, seed=0, **options):
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=32, d_model=16, layers=[layer(name) for name in names], **options)
    return LanguageModel(config).double().eval()


def test_labelled_loss_is_the_full_head_loss_with_its_gradients():
    batch = TASK.sample(6, seed=0)
    short, full = build("base_conv", "attention"), build("base_conv", "attention")
    labelled_loss(short, gather_labels(batch).rows(slice(None))).backward()
    logits = full(batch.inputs)
    F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX).backward()
    for (name, one), other in zip(short.named_parameters(), full.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-10, atol=1e-14), name


def test_rows_with_fewer_labels_are_padded_without_effect():
    batch = TASK.sample(5, seed=1)
    batch.labels[2, batch.labels[2].ne(IGNORE_INDEX).nonzero()[:3, 0]] = IGNORE_INDEX
    data = gather_labels(batch)
    assert (data.targets[2] != IGNORE_INDEX).sum() == 1
    model = build("base_conv", "attention")
    plain = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    assert torch.allclose(labelled_loss(model, data.rows(slice(None))), plain, rtol=1e-12)


def test_an_example_without_labels_is_refused():
    batch = TASK.sample(3, seed=1)
    batch.labels[1] = IGNORE_INDEX
    with pytest.raises(ValueError, match="example 1 has no label"):
        gather_labels(batch)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_positions": 24}, {"channel_mixer": "swiglu", "norm": "rmsnorm"}, {"channel_mixer": "none"}],
)
@torch.no_grad()
def test_decoding_is_the_parallel_form(options):
    model = build("base_conv", "based", "sliding_window", "attention", n_layers=4, **options)
    tokens = TASK.sample(3, seed=2).inputs
    expected = model(tokens)
    first, state = model.prefill(tokens[:, :9], model.init_state(3, 24))
    rest = []
    for t in range(9, 24):
        logits, state = model.step(tokens[:, t], state)
        rest.append(logits)
    actual = torch.cat([first, torch.stack(rest, 1)], 1)
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)
    assert int(state.position) == 24


@torch.no_grad()
def test_state_is_counted_on_the_live_tensors():
    model = build("base_conv", "based")
    _, state = model.prefill(TASK.sample(3, seed=2).inputs, model.init_state(3, 24))
    elements, size = measured_state(state)
    assert elements == 3 * model.state_size(24)
    assert size == 3 * model.state_bytes(24) == 8 * elements
    features = 1 + 16 + 16 * 17 // 2
    assert model.state_fields(24) == {
        "0.base_conv.conv": 2 * 16,
        "1.based.kv": features * 16,
        "1.based.key_sum": features,
    }


@torch.no_grad()
def test_greedy_generation_is_argmax_of_the_parallel_form():
    model = build("base_conv", "attention", seed=3)
    tokens = TASK.sample(2, seed=3).inputs[:, :5]
    expected = tokens
    for _ in range(4):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(tokens, 4), expected)


@torch.no_grad()
def test_sampled_generation_follows_seed_and_temperature():
    model = build("base_conv", "attention", seed=3)
    tokens = TASK.sample(64, seed=3).inputs[:, :5]
    one, same = (model.generate(tokens, 6, temperature=1.0, seed=5) for _ in range(2))
    other = model.generate(tokens, 6, temperature=1.0, seed=6)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(model.generate(tokens, 6, temperature=1e-7, seed=5), model.generate(tokens, 6))


@torch.no_grad()
def test_a_text_is_drawn_from_one_stream():
    """The draws of later tokens are not those of the first one again."""
    model, tokens = build("attention", seed=3), TASK.sample(4, seed=3).inputs[:, :5]
    decoder = Decoder(model, 4, 11)
    first = decoder.pick(decoder.prefill(tokens), temperature=2.0, seed=5)
    rest = decoder.decode(first, 5, temperature=2.0)
    made = model.generate(tokens, 6, temperature=2.0, seed=5)
    assert torch.equal(made, torch.cat([tokens, first[:, None], rest], 1))
    decoder.reset()
    decoder.prefill(tokens)
    assert not torch.equal(decoder.decode(first, 5, temperature=2.0, seed=5), rest)


@pytest.mark.parametrize(("new", "compiled"), [(LONG_GENERATION - 1, False), (LONG_GENERATION, "auto")])
def test_a_short_text_is_not_worth_a_compiler(monkeypatch, new, compiled):
    class Asked(Exception):
        pass

    def ask(*_, compiled):
        raise Asked(compiled)

    monkeypatch.setattr("zoology.generation.Decoder", ask)
    with pytest.raises(Asked) as asked:
        build("attention").generate(torch.zeros(1, 1, dtype=torch.int64), new)
    assert asked.value.args == (compiled,)


def test_paper_init_is_gpt2s():
    model = build("base_conv", "attention", n_layers=8)
    attention = model.blocks[1].mixer
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(attention.out_proj.weight.detach().std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.15)
    assert attention.qkv.bias.abs().max() == 0


def test_own_init_is_left_alone():
    paper, own = build("attention"), build("attention", init="mixer")
    assert float(own.blocks[0].mixer.qkv.weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * 16), rel=0.1)
    assert not torch.equal(paper.blocks[0].mixer.qkv.weight, own.blocks[0].mixer.qkv.weight)


def test_plain_init_makes_no_output_projection_smaller():
    model = build("base_conv", "attention", n_layers=8, init="plain")
    attention = model.blocks[1].mixer
    assert float(attention.out_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert attention.qkv.bias.abs().max() == 0


def test_mambas_init_divides_its_output_projections_by_the_square_root_of_depth():
    own, divided = build("mamba", n_layers=4, init="mixer"), build("mamba", n_layers=4, init="mamba")
    for before, after in zip(own.blocks, divided.blocks):
        for name, weight in before.mixer.named_parameters():
            factor = 0.5 if name == "out_proj.weight" else 1
            torch.testing.assert_close(after.mixer.get_parameter(name), factor * weight, rtol=0, atol=0)


def test_paper_init_leaves_the_steps_of_mamba_alone():
    """Their biases at 0 would be a step of softplus(0) = .7."""
    mixer = build("mamba").blocks[0].mixer
    steps = F.softplus(mixer.dt_proj.bias)
    assert steps.min() >= 0.001 - 1e-6
    assert steps.max() <= 0.1 + 1e-6
    assert float(mixer.in_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_identity_channel_mixer_adds_the_second_norm():
    """The papers' blocks ran an identity between norm and residual: x + norm(x)."""
    papers, none = build("base_conv", n_layers=1), build("base_conv", n_layers=1, channel_mixer="none")
    none.load_state_dict(papers.state_dict(), strict=False)
    tokens = TASK.sample(2, seed=0).inputs
    bare = none.blocks[0](none.embed(tokens))
    assert torch.equal(papers.blocks[0](papers.embed(tokens)), bare + F.layer_norm(bare, [16]))


def test_too_long_for_learned_positions_is_refused():
    with pytest.raises(ValueError, match="max_seq_len=25: the model has 24 learned positions"):
        build("base_conv", max_positions=24).init_state(1, 25)


@pytest.mark.parametrize("form", ["forward", "prefill", "step"])
def test_a_mixer_whose_output_would_broadcast_is_refused(form, monkeypatch):
    """[B, T, 1] adds to [B, T, D] without a word: the model would be another than the one that was written."""
    model = LanguageModel(ModelConfig(vocab_size=16, d_model=8, layers=[layer("base_conv")], n_layers=1))
    mixer, tokens = model.blocks[0].mixer, torch.zeros(2, 5, dtype=torch.int64)
    right = getattr(mixer, form)

    def narrow(*args):
        found = right(*args)
        return found[..., :1] if form == "forward" else (found[0][..., :1], found[1])

    monkeypatch.setattr(mixer, form, narrow)
    calls = {
        "forward": lambda: model(tokens),
        "prefill": lambda: model.prefill(tokens, model.init_state(2, 5)),
        "step": lambda: model.step(tokens[:, 0], model.init_state(2, 5)),
    }
    with pytest.raises(ValueError, match=rf"BaseConv\.{form} gave \[2,.* 1\] for an input of \[2,.* 8\]: must be"):
        calls[form]()


def test_each_dropout_is_where_it_says():
    model = build("attention", "base_conv", channel_mixer="mlp", embed_dropout=0.5, resid_dropout=0.5).train()
    tokens, x = TASK.sample(4, seed=0).inputs, torch.randn(2, 5, 16, dtype=torch.float64)
    share = float((model.embed(tokens) == 0).double().mean())
    assert 0.4 < share < 0.6
    assert all(block.dropout.p == 0.5 for block in model.blocks)
    for block in model.blocks:
        block.dropout.p = 1.0  # neither mixer nor channel mixer is heard
    assert torch.equal(model.blocks[1](model.blocks[0](x)), x)
    model.eval()
    assert (model.embed(tokens) != 0).all()
    assert not torch.equal(model.blocks[0](x), x)


@pytest.mark.parametrize("keep", [False, True])
def test_a_mixer_that_keeps_its_initialisation_keeps_it(keep, monkeypatch):
    monkeypatch.setattr(architectures.registry.get("attention").cls, "keep_init", keep)
    largest = [float(block.mixer.out_proj.weight.detach().abs().max()) for block in build("attention").blocks]
    # A linear layer's own start is uniform up to 1 / sqrt(16), the shell's is normal with .02 / sqrt(4).
    assert all((weight > 0.2) if keep else (weight < 0.06) for weight in largest)
