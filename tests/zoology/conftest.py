"""Small runs that several test files share."""

import functools
import json
from collections import deque
from pathlib import Path

import pytest
import torch

from zoology.config import SCHEMA_VERSION, DataConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.engines.local import EpochDone, Finished, Started
from zoology.graphs import forget_loops
from zoology.model import LanguageModel
from zoology.runner import plan, store, worker
from zoology.runner.driver import run_sweep
from zoology.tasks import MQAR


def tiny_run(layers=("base_conv", "attention"), *, lr=1e-2, epochs=1, num_examples=64, seed=0, **train):
    """A run of about a second: vocabulary 32, sequences of 16 and 24."""
    short = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2)
    long = MQAR(vocab_size=32, seq_len=24, num_kv_pairs=4)
    return RunConfig(
        architecture=layers[-1],
        model=ModelConfig(vocab_size=32, d_model=16, layers=[layer(name) for name in layers]),
        data=DataConfig(
            train=[Slice(task=short, num_examples=num_examples), Slice(task=long, num_examples=num_examples // 2)],
            test=[Slice(task=short, num_examples=40, name="short"), Slice(task=long, num_examples=30, name="long")],
            num_validation=20,
            batch_size=16,
        ),
        train=TrainConfig(lr=lr, epochs=epochs, **train),
        seed=seed,
    )


@pytest.fixture
def make_run():
    return tiny_run


def ragged_run(names=("base_conv", "attention"), *, seed=0, batch_size=24, model=None, **options):
    """Slices of 60 and 30 examples in batches of 24: both end in a short batch. No dropout."""
    short = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2)
    long = MQAR(vocab_size=32, seq_len=24, num_kv_pairs=4)
    model = {"embed_dropout": 0.0} | (model or {})
    options = {"lr": 1e-2, "epochs": 2, "stop_accuracy": None} | options
    return RunConfig(
        architecture=names[-1],
        model=ModelConfig(vocab_size=32, d_model=16, layers=[layer(name) for name in names], **model),
        data=DataConfig(
            train=[Slice(task=short, num_examples=60), Slice(task=long, num_examples=30)],
            test=[Slice(task=short, num_examples=50, name="short"), Slice(task=long, num_examples=30, name="long")],
            batch_size=batch_size,
        ),
        train=TrainConfig(**options),
        seed=seed,
    )


@pytest.fixture
def small_run():
    return ragged_run


@pytest.fixture
def no_loops_left():
    """Whatever was recorded before, and is during the test, serves no other."""
    forget_loops()
    yield
    forget_loops()


class InProcessEngine:
    """An engine that executes runs in this process, one at a time, through the code that workers run.

    `script` replaces the outcome of the n-th attempt at a run, by run id, with a failure.
    """

    slots = 1
    built = None

    def __init__(self, directory, script=None):
        self.setup = worker.Setup("cpu", 1, str(directory), (), None, None)
        self.script = {run_id: deque(failures) for run_id, failures in (script or {}).items()}
        self.events = deque()
        self.busy = False
        self.started = []
        self.stopped = False

    @property
    def free(self):
        return 0 if self.busy else 1

    def fits(self, point_id, needs):
        return True

    def start(self, run_id, point_id, config_json, needs):
        self.busy = True
        self.started.append(run_id)
        self.events.append(Started(run_id, 0))
        if self.script.get(run_id):
            self.events.append(Finished(run_id, None, self.script[run_id].popleft()))
            return
        record, failure = worker.attempt(
            self.setup, config_json, lambda epoch: self.events.append(EpochDone(run_id, epoch))
        )
        self.events.append(Finished(run_id, record, failure))

    def poll(self, timeout):
        event = self.events.popleft()
        self.busy = not isinstance(event, Finished)
        return [event]

    def stop(self):
        self.stopped = True


class Watcher:
    """A view that remembers what it was shown."""

    def __init__(self):
        self.seen = []

    def begin(self, progress):
        self.progress = progress

    def started(self, run, worker):
        self.seen.append(("started", run.run_id))

    def epoch(self, run, epoch):
        self.seen.append(("epoch", run.run_id, epoch["epoch"]))

    def finished(self, run, record, message):
        self.seen.append(("finished", run.run_id, message))

    def note(self, message):
        self.seen.append(("note", message))

    def tick(self):
        self.left = self.progress.seconds_left()

    def end(self):
        self.seen.append(("end",))


@pytest.fixture
def in_process_engine():
    return InProcessEngine


@pytest.fixture
def watcher():
    return Watcher()


@pytest.fixture(scope="session")
def results_directory(tmp_path_factory):
    """Finished runs of two architectures, two learning rates and two seeds; read it, leave it as it is."""
    directory = tmp_path_factory.mktemp("results")
    runs = [
        tiny_run(layers, lr=lr, seed=seed)
        for layers in (("base_conv", "attention"), ("base_conv", "based"))
        for lr in (1e-3, 1e-2)
        for seed in (0, 1)
    ]
    planned = plan.make_plan(runs, "cpu")
    outcome = run_sweep(planned, InProcessEngine(directory), directory, Watcher(), total=len(planned))
    assert not outcome.failures
    return directory


@functools.lru_cache(maxsize=256)
def _weighed(model_json):
    """A model without memory, to be counted."""
    with torch.device("meta"):
        return LanguageModel(ModelConfig(**json.loads(model_json)))


def made_up_record(config, accuracy, *, validation=None, seconds=60.0):
    """The record of a run that never ran: `accuracy` on test by slice, or the same on all; so for `validation`."""
    validation, labels = accuracy if validation is None else validation, [part.label for part in config.data.test]
    scores = [
        values if isinstance(values, dict) else dict.fromkeys(labels, values) for values in (validation, accuracy)
    ]
    score = {part.label: {"stderr": 0.005, "num_examples": part.num_examples} for part in config.data.test}
    model = _weighed(config.model.model_dump_json())
    hashes = config.data.hashes()
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": config.run_id,
        "point_id": config.point_id,
        "architecture": config.architecture,
        "config": config.model_dump(mode="json"),
        "train_hashes": hashes["train"],
        "slices": [
            {
                "name": part.label,
                "task": part.task.config(),
                "seq_len": part.task.seq_len,
                "required_bits": part.task.required_bits(),
                "answers": getattr(part.task, "num_questions", None),
                "validation": score[part.label] | {"accuracy": scores[0][part.label]},
                "test": score[part.label] | {"accuracy": scores[1][part.label]},
                "baselines": {},
                "validation_hash": hashes["validation"][index],
                "test_hash": hashes["test"][index],
            }
            for index, part in enumerate(config.data.test)
        ],
        "state": {
            str(length): {"elements": model.state_size(length), "bytes": model.state_bytes(length)}
            for length in {part.task.seq_len for part in config.data.test}
        },
        "parameters": model.num_parameters(),
        "device": {"type": "cuda", "name": "made up"},
        "backends": {},
        "versions": {"torch": "made up"},
        "git": None,
        "precision": "fp32",
        "dtype": "float32",
        "epochs": config.train.epochs,
        "selected_epoch": config.train.epochs,
        "stopped_early": False,
        "train_seconds": seconds,
        "wall_seconds": seconds,
        "examples_per_second": 1.0,
        "peak_memory_bytes": 1,
    }


@pytest.fixture(scope="session")
def make_record():
    return made_up_record


@pytest.fixture(scope="session")
def paper_runs():
    """The runs of an experiment's paper scale, by file name."""
    folder = Path(__file__).parents[2] / "experiments"
    return functools.cache(lambda name: plan.load_sweep(folder / name, "paper"))


@pytest.fixture
def write_records(tmp_path):
    """Write records as a results directory."""

    def write(records):
        for record in records:
            folder = tmp_path / record["run_id"]
            folder.mkdir()
            (folder / "result.json").write_text(store.to_json(record))
        return tmp_path

    return write
