"""Loggers are told what the results say, and cannot harm a sweep."""

import sys
import types

import pytest

from zoology import loggers
from zoology.runner import plan
from zoology.runner.driver import Exit, run_sweep
from zoology.runner.plan import PlanError


class FakeWandB(types.ModuleType):
    """Stands in for wandb: remembers its calls."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **options):
        run = types.SimpleNamespace(options=options, logged=[], summary={}, ended=[])
        run.log = lambda scalars, step: run.logged.append((step, scalars))
        run.finish = lambda exit_code: run.ended.append(exit_code)
        self.runs.append(run)
        return run


class FakeWriter:
    made = []

    def __init__(self, folder):
        self.folder, self.scalars, self.closed = folder, [], False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def libraries(monkeypatch):
    wandb, board = FakeWandB(), types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = type("Writer", (FakeWriter,), {"made": []})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return wandb, board.SummaryWriter


def test_both_are_told_what_the_results_say(tmp_path, make_run, in_process_engine, watcher, libraries):
    wandb, writer = libraries
    (run,) = plan.make_plan([make_run(epochs=2)], "cpu")
    view = loggers.LoggedView(watcher, loggers.make_loggers("wandb,tensorboard", tmp_path))
    record = run_sweep([run], in_process_engine(tmp_path), tmp_path, view, total=1).records[run.run_id]
    (opened,), (written,) = wandb.runs, writer.made
    assert opened.options["id"] == run.run_id
    assert opened.options["config"] == run.config.model_dump(mode="json")
    assert [step for step, _ in opened.logged] == [1, 2]
    assert opened.summary == {f"test/{part['name']}": part["test"]["accuracy"] for part in record["slices"]}
    assert opened.ended == [0]
    last = opened.logged[-1][1]
    assert [value for name, value, step in written.scalars if (name, step) == ("loss", 2)] == [last["loss"]]
    assert ("test/long", record["slices"][1]["test"]["accuracy"], 2) in written.scalars
    assert written.closed
    assert [seen[0] for seen in watcher.seen] == ["started", "epoch", "epoch", "finished", "end"]


def test_a_logger_that_raises_is_dropped(tmp_path, make_run, in_process_engine, watcher, libraries):
    wandb, _ = libraries
    wandb.init = lambda **_: 1 / 0
    runs = plan.make_plan([make_run(), make_run(lr=1e-3)], "cpu")
    view = loggers.LoggedView(watcher, loggers.make_loggers("wandb", tmp_path))
    assert run_sweep(runs, in_process_engine(tmp_path), tmp_path, view, total=2).exit is Exit.DONE
    notes = [seen[1] for seen in watcher.seen if seen[0] == "note"]
    assert notes == ["WandB is left out from here on: ZeroDivisionError: division by zero"]


def test_what_is_unknown_or_missing_is_refused(tmp_path, monkeypatch):
    with pytest.raises(PlanError, match="--log mlflow: must be among tensorboard, wandb"):
        loggers.make_loggers("wandb,mlflow", tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PlanError, match=r"--log wandb: it is not installed: pip install 'zoology\[loggers\]'"):
        loggers.make_loggers("wandb", tmp_path)
    assert loggers.make_loggers(None, tmp_path) == []
