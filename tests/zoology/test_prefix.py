"""Tasks tell the model where their prefix ends, and the masked-token loss hides tokens of the prefix only."""

import math

import pytest
import torch
from torch.nn import functional as F

import zoology
from zoology.config import DataConfig, MaskedPrefix, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.data import gather_labels, mask_prefix
from zoology.model import LanguageModel
from zoology.tasks import MQAR, JRTPrompt, MADInContextRecall, SetDisjointness
from zoology.train import labelled_loss, score_slices, train

TASK = SetDisjointness(vocab_size=24, first_size=3, second_size=8)
PREFIX = TASK.prefix_length


def build(*names, seed=0, **options):
    """Float64, with weights far enough from their start that every layer matters."""
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=24, d_model=16, layers=[layer(name) for name in names], init="mixer", **options)
    model = LanguageModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def make_run(name="prefix_linear_attention", tasks=(TASK,), seed=0, **train_options):
    slices = [Slice(task=task, num_examples=48) for task in tasks]
    return RunConfig(
        architecture=name,
        model=ModelConfig(vocab_size=24, d_model=16, layers=[layer("base_conv"), layer(name)], init="mixer"),
        data=DataConfig(train=slices, test=slices, batch_size=16),
        train=TrainConfig(lr=1e-2, epochs=2, stop_accuracy=None, **train_options),
        seed=seed,
    )


@torch.no_grad()
def test_decoding_behind_a_prefix_is_the_parallel_form():
    model, tokens = build("base_conv", "prefix_linear_attention"), TASK.sample(3, seed=0).inputs
    expected = model(tokens, prefix_length=6)
    assert not torch.allclose(expected[:, :6], model(tokens)[:, :6], rtol=1e-3)
    first, state = model.prefill(tokens[:, :7], model.init_state(3, 14), prefix_length=6)
    rest = []
    for t in range(7, 14):
        logits, state = model.step(tokens[:, t], state)
        rest.append(logits)
    assert torch.allclose(torch.cat([first, torch.stack(rest, 1)], 1), expected, rtol=1e-9, atol=1e-12)
    positions = torch.tensor([[2, 13], [5, 6], [0, 9]])
    picked = torch.stack([row[at] for row, at in zip(expected, positions)])
    assert torch.allclose(model.labelled_logits(tokens, positions, prefix_length=6), picked, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_generation_reads_the_prefix_whole():
    model, tokens = build("base_conv", "prefix_linear_attention", seed=4), TASK.sample(32, seed=1).inputs
    expected = tokens
    for _ in range(3):
        expected = torch.cat([expected, model(expected, prefix_length=PREFIX)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(tokens, 3, prefix_length=PREFIX), expected)
    assert not torch.equal(model.generate(tokens, 3), expected)


@torch.no_grad()
def test_models_without_a_prefix_are_unchanged():
    model, tokens = build("base_conv", "based", "sliding_window", n_layers=3), TASK.sample(3, seed=0).inputs
    assert not model.takes_prefix
    assert torch.equal(model(tokens, prefix_length=PREFIX), model(tokens))
    with_prefix, _ = model.prefill(tokens, model.init_state(3, 14), prefix_length=PREFIX)
    assert torch.equal(with_prefix, model.prefill(tokens, model.init_state(3, 14))[0])


@pytest.mark.parametrize("name", ["based", "prefix_linear_attention"])
def test_a_prefix_longer_than_the_sequence_is_refused(name):
    model, tokens = build(name), TASK.sample(3, seed=0).inputs
    with pytest.raises(ValueError, match="prefix_length=15: there are 14 tokens"):
        model(tokens, prefix_length=15)
    with pytest.raises(ValueError, match="prefix_length=6: there are 5 tokens"):
        model.prefill(tokens[:, :5], model.init_state(3, 14), prefix_length=6)


def test_evaluation_tells_a_prefix_model_where_the_prefix_ends():
    seen = []

    class Reader:
        takes_prefix = True

        def __call__(self, tokens, prefix_length):
            seen.append(prefix_length)
            return F.one_hot(tokens, 24).float()

    zoology.evaluate(Reader(), TASK, 5, 0)
    zoology.evaluate(Reader(), JRTPrompt(task=TASK, num_passes=2), 5, 0)
    assert seen == [PREFIX, 2 * PREFIX]


@torch.no_grad()
def test_scoring_uses_the_prefix_of_each_slice():
    model = build("base_conv", "prefix_linear_attention")
    tasks = (TASK, JRTPrompt(task=TASK, num_passes=2))
    parts = [(Slice(task=task, num_examples=300), gather_labels(task.split("test", 300, 0))) for task in tasks]
    for (part, data), scored in zip(parts, score_slices(model, parts, 100).values()):
        assert scored == zoology.evaluate(model, part.task, 300, 0)
        causal = model.labelled_logits(*data.rows(slice(None))[:2]).argmax(-1) == data.targets
        assert scored.accuracy != float(causal.double().mean())


def test_the_prefix_is_learned_from():
    """Training moves the projections that only a prefix reads."""
    config = make_run()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        before = LanguageModel(config.model).blocks[1].mixer.prefix_v_proj.weight.detach()
    after = train(config).model.blocks[1].mixer.prefix_v_proj.weight.detach()
    # Weight decay alone moves a weight by less than lr * weight_decay a step: 6 steps, 0.6%.
    assert (after - before).norm() > 0.05 * before.norm()


# -- masked-token loss ------------------------------------------------------------------------------------


def masked(share=0.15, seed=0, mask_token=0, prefix_length=PREFIX):
    batch = gather_labels(TASK.sample(200, seed=3)).rows(slice(None))
    generator = torch.Generator().manual_seed(seed)
    return batch, mask_prefix(batch, prefix_length, MaskedPrefix(share=share, mask_token=mask_token), generator)


@pytest.mark.parametrize(("share", "count"), [(0.15, 2), (0.5, 6), (0.01, 1)])
def test_a_share_of_the_prefix_is_hidden_and_asked_for(share, count):
    batch, hidden = masked(share)
    changed = batch.tokens != hidden.tokens
    assert (changed.sum(1) == count).all()
    assert not changed[:, PREFIX:].any()
    assert (hidden.tokens[changed] == 0).all()
    assert torch.equal(hidden.positions[:, :1], batch.positions)
    assert torch.equal(hidden.targets[:, :1], batch.targets)
    at, what = hidden.positions[:, 1:], hidden.targets[:, 1:]
    assert at.shape == (200, count)
    assert torch.equal(torch.zeros_like(changed).scatter(1, at, True), changed)
    assert torch.equal(what, batch.tokens.gather(1, at))


def test_every_place_of_the_prefix_is_hidden_as_often():
    batch, hidden = masked(0.5)
    counts = (batch.tokens != hidden.tokens)[:, :PREFIX].sum(0)
    expected = 200 * 6 / PREFIX
    assert (counts - expected).abs().max() < 4.5 * (expected * (1 - 6 / PREFIX)) ** 0.5


def test_masks_follow_the_seed():
    one, same, other = (masked(seed=seed)[1].tokens for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_mask_token_is_the_configured_one():
    batch, hidden = masked(mask_token=7)
    assert (hidden.tokens[batch.tokens != hidden.tokens] == 7).all()


def test_the_weight_is_that_of_a_mean_of_its_own():
    model = build("base_conv", "prefix_linear_attention")
    batch, hidden = masked(0.5)
    logits = model(hidden.tokens, prefix_length=PREFIX)
    asked = F.cross_entropy(logits[:, -1], batch.targets[:, 0])
    at = hidden.positions[:, 1:, None].expand(-1, -1, 24)
    recovered = F.cross_entropy(logits.gather(1, at).flatten(0, 1), hidden.targets[:, 1:].flatten())
    for weight in (0.25, 1.0):
        loss = labelled_loss(model, hidden, PREFIX, num_masked=6, masked_weight=weight)
        assert torch.allclose(loss, asked + weight * recovered, rtol=1e-12)


def test_training_with_masks_repeats_and_adds_to_the_loss():
    with_masks, again, without = (train(make_run(masked_prefix=m)) for m in (MaskedPrefix(), MaskedPrefix(), None))
    assert [e.loss for e in with_masks.epochs] == [e.loss for e in again.epochs]
    # At the start the hidden tokens cost about log(24) each, a quarter of which counts.
    added = with_masks.epochs[0].loss - without.epochs[0].loss
    assert added == pytest.approx(0.25 * math.log(24), rel=0.15)


def test_a_resumed_run_goes_on_with_the_masks_of_an_uninterrupted_one(tmp_path):
    run, path = make_run(masked_prefix=MaskedPrefix()), tmp_path / "state.pt"

    def cut(epoch):
        if epoch.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, checkpoint=path, on_epoch=cut)
    assert [e.loss for e in train(run, checkpoint=path).epochs] == [e.loss for e in train(run).epochs]


def test_a_task_without_a_prefix_is_trained_without_masks():
    tasks = (TASK, MADInContextRecall(vocab_size=24, seq_len=12))
    with_masks, without = (train(make_run("based", tasks=tasks, masked_prefix=m)) for m in (MaskedPrefix(), None))
    added = with_masks.epochs[0].loss - without.epochs[0].loss
    assert added == pytest.approx(0.25 * math.log(24) / 2, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, "share=1.0: must be less than 1"),
        ({"share": 0.0}, "share=0.0: must be greater than 0"),
        ({"weight": 0.0}, "weight=0.0: must be greater than 0"),
        ({"mask_token": -1}, "mask_token=-1: must be greater than or equal to 0"),
        ({"probability": 0.1}, "unknown field probability=0.1"),
    ],
)
def test_bad_mask_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedPrefix(**options)


def test_masking_needs_a_prefix_and_a_token():
    with pytest.raises(ValueError, match="no training task has a prefix to mask"):
        make_run(tasks=(MADInContextRecall(vocab_size=24, seq_len=12),), masked_prefix=MaskedPrefix())
    with pytest.raises(ValueError, match=r"mask_token=24: must be below model.vocab_size=24"):
        make_run(masked_prefix=MaskedPrefix(mask_token=24))
    run = make_run(tasks=(MQAR(vocab_size=24, seq_len=16),), masked_prefix=MaskedPrefix())
    assert (run.train.masked_prefix.weight, run.train.masked_prefix.share) == (0.25, 0.15)
