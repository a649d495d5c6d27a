"""Turns with a GPU: one at a time, for no longer than a process lives or others are patient."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from zoology import train, turns
from zoology.turns import Turn, turn_on, under_mps

HOLDING = """
import sys, time
from pathlib import Path
from zoology.turns import Turn
with Turn(Path(sys.argv[1])):
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "of a user" / "gpu.lock"


def test_a_turn_waits_for_the_end_of_another(path, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 0.5)
    first, second = Turn(path), Turn(path)
    for _ in range(2):  # what ended may begin again
        with first as mine:
            assert mine is True
            started = time.monotonic()
            with second as mine:  # out of patience, it goes on
                assert mine is False
                assert time.monotonic() - started >= 0.5
        started = time.monotonic()
        with second as mine:
            assert mine is True
            assert time.monotonic() - started < 0.5


def test_an_error_ends_a_turn(path, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 5.0)
    with pytest.raises(KeyError), Turn(path):
        raise KeyError
    started = time.monotonic()
    with Turn(path):
        assert time.monotonic() - started < 1


def test_a_process_that_is_killed_gives_its_turn_back(path):
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holding\n"
        process.kill()
        process.wait()
    started = time.monotonic()
    with Turn(path):
        assert time.monotonic() - started < 5


def test_where_there_are_turns(tmp_path, monkeypatch):
    turn_on.cache_clear()
    monkeypatch.setattr(turns.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"of {device}"))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "mps"))
    assert not under_mps()
    assert turn_on(torch.device("cpu")) is None
    assert isinstance(turn_on(torch.device("cuda:0")), Turn)
    assert [file.name for file in tmp_path.glob("zoology-*/*")] == ["gpu-of cuda:0.lock"]
    (tmp_path / "mps").mkdir()
    (tmp_path / "mps" / "control").touch()
    assert under_mps()
    assert turn_on(torch.device("cuda:1")) is None
    turn_on.cache_clear()


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_a_loop_that_leaves_the_device_time_takes_none(make_run, mode, monkeypatch):
    monkeypatch.setattr(train, "turn_on", lambda device: pytest.fail("asked for a turn"))
    run = train._Run(make_run(), torch.device("cpu"), train.load_split, mode)
    assert not run.loop.fills_device
    assert run.turn is None
    run._train_epoch()
    assert run._outcome().waited_seconds is None


class Slow:
    """A turn that others have for a while."""

    def __enter__(self):
        time.sleep(0.2)
        return True

    def __exit__(self, *_):
        pass


def test_the_wait_for_a_turn_is_known(make_run):
    run = train._Run(make_run(), torch.device("cpu"), train.load_split, "eager")
    run.turn = Slow()
    for _ in range(2):
        run._train_epoch()
    outcome = run._outcome()
    assert [epoch.waited_seconds for epoch in outcome.epochs] == pytest.approx([0.2, 0.2], abs=0.1)
    assert 0.4 <= outcome.waited_seconds < outcome.train_seconds
    run.epochs[0] = run.epochs[0]._replace(waited_seconds=None)  # of a checkpoint from before it was noted
    assert run._outcome().waited_seconds is None


def test_an_epoch_that_ran_beside_that_of_another_does_not_count_as_alone(make_run, path, monkeypatch):
    """What it waited says nothing then of what it had of the device while it trained: its share does."""
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    run = train._Run(make_run(epochs=3), torch.device("cpu"), train.load_split, "eager")
    run.turn = Turn(path)
    run._train_epoch()
    with Turn(path):
        run._train_epoch()
    run._train_epoch()
    assert [epoch.waited_seconds is None for epoch in run.epochs] == [False, True, False]
    assert run.epochs[1].train_seconds >= 0.1
    assert run._outcome().waited_seconds is None


class Noting:
    """A turn that says when it begins and ends."""

    def __init__(self):
        self.seen = []

    def __enter__(self):
        self.seen.append("turn")

    def __exit__(self, *_):
        self.seen.append("over")


@pytest.mark.gpu
def test_a_recorded_loop_takes_a_turn_for_an_epoch(make_run, monkeypatch):
    turn = Noting()
    monkeypatch.setattr(train, "turn_on", lambda device: turn)
    outcome = train.train(make_run(), device="cuda", mode="graph", on_epoch=lambda epoch: turn.seen.append(epoch.epoch))
    assert turn.seen == [step for epoch in outcome.epochs for step in ("turn", "over", epoch.epoch)]
