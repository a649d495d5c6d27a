"""Training: deterministic, scheduled as configured, stopped by NaN with the step; evaluation of any callable."""

import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zoology.config import TrainConfig
from zoology.data import epoch_batches
from zoology.evaluate import Score
from zoology.loops import EagerLoop, check_losses, epoch_rates
from zoology.model import LanguageModel
from zoology.train import TrainingDiverged, learning_rate, train


def test_learns_what_it_is_shown(make_run):
    seen = []
    outcome = train(make_run(num_examples=2048, epochs=12), on_epoch=seen.append)
    assert outcome.epochs == seen
    assert all(score.accuracy > 0.95 for score in outcome.test.values())
    assert outcome.test["short"].num_examples == 40
    assert outcome.validation["long"].num_examples == 20
    assert seen[-1].loss < 0.5 * seen[0].loss


def test_same_config_same_numbers_and_the_seed_matters(make_run):
    before = torch.get_rng_state()
    first, again, other = (train(make_run(epochs=2, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert [e.loss for e in first.epochs] == [e.loss for e in again.epochs]
    assert first.test == again.test
    assert first.epochs[-1].loss != other.epochs[-1].loss


def test_the_seed_starts_the_weights(make_run):
    """A step that is too small to move a weight leaves those that the seed gave."""
    for seed in (0, 5):
        config = make_run(lr=1e-30, seed=seed)
        torch.manual_seed(seed)
        wanted = LanguageModel(config.model).state_dict()
        found = train(config).model.state_dict()
        assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-20) for name in wanted)


def test_the_seed_orders_the_examples_whatever_the_model_is(make_run, monkeypatch):
    orders = []

    def noted(*arguments, **options):
        batches = list(epoch_batches(*arguments, **options))
        orders.append([(index, rows.tolist()) for index, rows in batches])
        return batches

    monkeypatch.setattr("zoology.train.epoch_batches", noted)
    for run in (make_run(seed=5), make_run(("attention",), seed=5), make_run(seed=6)):
        train(run)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps_and_finite():
    config = TrainConfig(lr=0.5)
    assert check_losses(torch.tensor([1.0, 2.0, 6.0]), 1, config) == 3.0
    for broken in ("inf", "-inf", "nan"):
        with pytest.raises(TrainingDiverged, match=rf"{broken} at epoch 4, step 2 of 3 \(lr=0.5\)"):
            check_losses(torch.tensor([1.0, float(broken), 6.0]), 4, config)


def test_stops_early_once_validation_is_above_the_threshold(make_run):
    run = make_run(epochs=40, num_examples=1024, stop_accuracy=0.6)
    outcome = train(run)
    assert outcome.stopped_early
    assert outcome.epochs[-1].validation_accuracy > 0.6
    assert all(epoch.validation_accuracy <= 0.6 for epoch in outcome.epochs[:-1])


def test_best_epoch_is_the_one_scored(make_run):
    run = make_run(epochs=6, num_examples=256, select="best", stop_accuracy=None, lr=3e-2)
    outcome = train(run)
    accuracies = [epoch.validation_accuracy for epoch in outcome.epochs]
    assert outcome.selected_epoch == 1 + accuracies.index(max(accuracies))
    mean = sum(score.accuracy for score in outcome.validation.values()) / 2
    assert mean == pytest.approx(max(accuracies))


@pytest.fixture
def validated(monkeypatch):
    """Makes a series of numbers the validation accuracies of the epochs to come."""

    def series(*accuracies):
        given = iter(accuracies)

        def scores(loop, split):
            accuracy = next(given) if split == "validation" else 0.0
            return {part.label: Score(accuracy, 0.0, 1) for part in loop.config.data.test}

        monkeypatch.setattr(EagerLoop, "score", scores)

    return series


def test_of_equal_epochs_the_first_is_best_and_the_threshold_itself_is_not_above_it(make_run, validated):
    validated(0.25, 0.75, 0.75, 0.5)
    outcome = train(make_run(epochs=3, select="best", stop_accuracy=0.75))
    assert [epoch.validation_accuracy for epoch in outcome.epochs] == [0.25, 0.75, 0.75]
    assert outcome.selected_epoch == 2


def test_the_best_epoch_may_lie_before_an_interruption(make_run, validated, tmp_path):
    run, path = make_run(epochs=3, select="best", stop_accuracy=None), tmp_path / "state.pt"

    def cut(epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    validated(0.75, 0.25)
    with pytest.raises(KeyboardInterrupt):
        train(run, checkpoint=path, on_epoch=cut)
    validated(0.5, 0.75)
    resumed = train(run, checkpoint=path)
    assert resumed.selected_epoch == 1
    validated(0.75, 0.25, 0.5, 0.75)
    whole = train(run)
    assert torch.equal(resumed.model.embedding.weight, whole.model.embedding.weight)


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_gradients_are_clipped_to_the_norm_that_is_asked_for(make_run, clip_norm):
    norms = []

    def note(optimizer, *_):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    hook = register_optimizer_step_pre_hook(note)
    try:
        train(make_run(epochs=1, clip_norm=clip_norm))
    finally:
        hook.remove()
    assert len(norms) == 6
    assert all(norm == pytest.approx(0.01, rel=1e-3) if clip_norm else norm > 0.1 for norm in norms)


def test_a_loss_that_is_no_number_names_the_step(make_run):
    with pytest.raises(TrainingDiverged, match=r"epoch 1, step \d+ of 6 \(lr=1e\+30\)"):
        train(make_run(lr=1e30))


def test_cosine_by_epoch_and_by_step():
    config = TrainConfig(lr=1.0, min_lr=0.1)
    assert learning_rate(config, 0.0) == 1.0
    assert learning_rate(config, 0.5) == pytest.approx(0.55)
    assert learning_rate(config, 1.0) == pytest.approx(0.1)
    assert learning_rate(config, 0.25) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(TrainConfig(lr=1.0, schedule="constant"), 0.7) == 1.0


def test_the_first_step_of_an_epoch_has_the_rate_of_its_beginning():
    by_step = TrainConfig(lr=1.0, epochs=2, schedule="step")
    wanted = [learning_rate(by_step, progress) for progress in (0, 0.25, 0.5, 0.75)]
    assert [*epoch_rates(by_step, 1, 2), *epoch_rates(by_step, 2, 2)] == wanted
    by_epoch = TrainConfig(lr=1.0, epochs=2)
    assert [*epoch_rates(by_epoch, 1, 2), *epoch_rates(by_epoch, 2, 2)] == [1.0, 1.0, wanted[2], wanted[2]]


def test_epochs_report_the_scheduled_rate(make_run):
    rates = [epoch.lr for epoch in train(make_run(epochs=4, stop_accuracy=None)).epochs]
    assert rates == pytest.approx([1e-2 * 0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)])
