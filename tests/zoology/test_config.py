"""Configs: identity of runs, and errors that say what is allowed."""

import json

import numpy as np
import pytest

from zoology import config
from zoology.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    Slice,
    TrainConfig,
    layer,
    learning_rates,
)
from zoology.runner.plan import make_plan
from zoology.tasks import MQAR


def test_json_round_trip_keeps_the_identity(make_run):
    run = make_run()
    again = RunConfig(**json.loads(json.dumps(run.model_dump(mode="json"))))
    assert again == run
    assert again.run_id == run.run_id
    assert len(run.run_id) == 12


def test_every_change_is_another_run(make_run):
    run = make_run()
    others = [
        make_run(lr=2e-2),
        make_run(seed=1),
        make_run(("base_conv", "based")),
        make_run(epochs=2),
        make_run(num_examples=128),
        run.model_copy(update={"data": run.data.model_copy(update={"seed": 1})}),
        run.model_copy(update={"data": run.data.model_copy(update={"shuffle": False})}),
    ]
    identities = [run.run_id, *(other.run_id for other in others)]
    assert len(set(identities)) == len(identities)


def test_learning_rate_and_seed_are_runs_of_one_point(make_run):
    points = {make_run(lr=lr, seed=seed).point_id for lr in (1e-3, 1e-2) for seed in (0, 1)}
    assert points == {make_run().point_id}
    assert make_run(epochs=3).point_id not in points
    assert make_run(precision="bf16").point_id not in points


def test_a_new_task_version_is_a_new_run(make_run, monkeypatch):
    before = make_run().run_id
    monkeypatch.setattr(MQAR, "version", MQAR.version + 1)
    config._dataset_hashes.cache_clear()  # within a process a version never changes
    assert make_run().run_id != before
    config._dataset_hashes.cache_clear()


def test_learning_rates_are_the_papers():
    assert learning_rates(-3, -1.5, 4) == pytest.approx(np.logspace(-3, -1.5, 4), rel=1e-5)
    assert learning_rates(-4, -2, 4)[0] == 1e-4


def test_default_slice_label_names_what_was_set():
    assert Slice(task=MQAR(), num_examples=1).label == "mqar"
    assert Slice(task=MQAR(seq_len=128, num_kv_pairs=8), num_examples=1).label == "mqar seq_len=128 num_kv_pairs=8"
    assert Slice(task=MQAR(), num_examples=1, name="easy").label == "easy"


def test_validation_has_the_tasks_of_the_test_in_another_stream(make_run):
    data = make_run().data
    assert [part.task for part in data.validation] == [part.task for part in data.test]
    assert [part.num_examples for part in data.validation] == [20, 20]
    assert [part.label for part in data.validation] == ["short", "long"]
    every = [digest for digests in data.hashes().values() for digest in digests]
    assert len(set(every)) == len(every)


TASK = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2)
MODEL = {"vocab_size": 32, "d_model": 16, "layers": [layer("base_conv")]}
DATA = {"train": [Slice(task=TASK, num_examples=4)], "test": [Slice(task=TASK, num_examples=4)]}
RUN = {
    "architecture": "x",
    "model": ModelConfig(**MODEL),
    "data": DataConfig(**DATA),
    "train": TrainConfig(lr=0.1),
}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig(**MODEL, widht=3), r"unknown field widht=3.*fields are vocab_size, d_model"),
        (lambda: ModelConfig(**MODEL | {"d_model": 0}), r"d_model=0: must be greater than or equal to 1"),
        (lambda: ModelConfig(**MODEL | {"layers": []}), r"layers=.*at least 1 item"),
        (lambda: ModelConfig(**MODEL, channel_mixer="conv"), r"channel_mixer='conv': must be 'identity', 'none'"),
        (lambda: ModelConfig(**MODEL, embed_dropout=1.0), r"embed_dropout=1.0: must be less than 1"),
        (lambda: layer("bassed"), r"unknown architecture 'bassed'.*did you mean 'based'"),
        (lambda: layer("based", feature_dmi=3), r"no option 'feature_dmi'; its options are d_model.*feature_dim"),
        (lambda: layer("based", feature_dim="3"), r"feature_dim='3' is of type str, expected int"),
        (lambda: TrainConfig(lr=0.0), r"lr=0.0: must be greater than 0"),
        (lambda: TrainConfig(lr=0.1, epochs=0), r"epochs=0: must be greater than or equal to 1"),
        (lambda: TrainConfig(lr=0.1, precision="fp8"), r"precision='fp8': must be 'fp32', 'tf32' or 'bf16'"),
        (lambda: TrainConfig(lr=0.1, epocs=3), r"unknown field epocs=3 \(closest: epochs\)"),
        (lambda: DataConfig(**DATA, batch_size=0), r"batch_size=0"),
        (lambda: DataConfig(**DATA | {"test": DATA["test"] * 2}), r"test slices need different names"),
        (lambda: Slice(task={"name": "mqra"}, num_examples=1), r"unknown task 'mqra'.*mqar"),
        (lambda: Slice(task=TASK, num_examples=0), r"num_examples=0"),
        (lambda: RunConfig(**RUN | {"model": ModelConfig(**MODEL | {"vocab_size": 16})}), r"need at least 32"),
        (lambda: RunConfig(**RUN | {"architecture": "based"}), r"architecture='based': the model has none.*base_conv"),
        (lambda: RunConfig(**RUN | {"model": ModelConfig(**MODEL, max_positions=8)}), r"0 or at least 16"),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_wrong_shape_stops_the_plan_with_the_mixers_own_words():
    model = ModelConfig(**MODEL | {"layers": [layer("attention", num_heads=3)]})
    with pytest.raises(ValueError, match=r"num_heads=3 does not divide d_model=16: allowed are \[1, 2, 4, 8, 16\]"):
        make_plan([RunConfig(**RUN | {"model": model})], "cpu")
