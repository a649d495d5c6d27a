"""A run that was interrupted is one that was not, bit for bit."""

import errno
import json
import logging
import subprocess
import sys

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from zoology.checkpoint import read_checkpoint
from zoology.graphs import forget_loops
from zoology.train import train

pytestmark = pytest.mark.usefixtures("no_loops_left")


class Killed(Exception):
    pass


def interrupted(config, path, after, **options):
    """Train, be killed right after epoch `after`, and go on; the outcome and the epochs that were reported then."""

    def die(epoch):
        if epoch.epoch == after:
            raise Killed

    with pytest.raises(Killed):
        train(config, checkpoint=path, on_epoch=die, **options)
    seen = []
    return train(config, checkpoint=path, on_epoch=seen.append, **options), seen


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("options", [{}, {"select": "best", "schedule": "step"}])
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(small_run, tmp_path, mode, options):
    config = small_run(epochs=4, model={"embed_dropout": 0.1, "resid_dropout": 0.1}, **options)
    whole = train(config, mode=mode)
    forget_loops()
    resumed, seen = interrupted(config, tmp_path / "state.pt", 2, mode=mode)
    assert [(e.epoch, e.loss, e.validation) for e in seen] == [(e.epoch, e.loss, e.validation) for e in whole.epochs]
    assert torch.equal(*(parameters_to_vector(outcome.model.parameters()) for outcome in (resumed, whole)))
    assert (resumed.test, resumed.validation) == (whole.test, whole.validation)
    assert resumed.selected_epoch == whole.selected_epoch
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_finished_run_is_only_scored_again(small_run, tmp_path):
    config, path = small_run(), tmp_path / "state.pt"
    first, again = (train(config, checkpoint=path) for _ in range(2))
    assert again.epochs == first.epochs
    assert (again.test, again.validation) == (first.test, first.validation)


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(small_run, tmp_path, monkeypatch):
    config, path = small_run(epochs=3), tmp_path / "state.pt"
    whole = train(config)
    save, calls = torch.save, []

    def half(state, file):
        calls.append(len(state["epochs"]))
        if len(calls) == 2:
            file.write(b"half")
            raise Killed
        save(state, file)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        train(config, checkpoint=path)
    assert train(config, checkpoint=path).test == whole.test
    assert calls == [1, 2, 2, 3]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_run_goes_on_without_a_checkpoint_that_cannot_be_written(small_run, tmp_path, monkeypatch, caplog, code):
    config, path = small_run(epochs=4), tmp_path / "state.pt"
    whole = train(config)
    save, kept = torch.save, []

    def full(state, file):
        if len(state["epochs"]) in (2, 3):
            file.write(b"half")
            raise OSError(code, "no room")
        save(state, file)

    def look(epoch):
        kept.append(len(read_checkpoint(path, config.run_id)["epochs"]))

    monkeypatch.setattr(torch, "save", full)
    with caplog.at_level(logging.WARNING, logger="zoology"):
        outcome = train(config, checkpoint=path, on_epoch=look)
    assert kept == [1, 1, 1, 4]
    assert [record.args[0] for record in caplog.records] == [path]  # once
    assert "no room" in caplog.text
    assert outcome.test == whole.test
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


FULL_DISK = """
import json, resource, sys
from pathlib import Path
import torch
from zoology.checkpoint import read_checkpoint, write_checkpoint

path, limit = Path(sys.argv[1]), int(sys.argv[2])
write_checkpoint(path, "a run", {"epochs": [1]})
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    write_checkpoint(path, "a run", {"epochs": [1, 2], "weights": torch.zeros(100_000)})
except Exception as error:
    left = [read_checkpoint(path, "a run")["epochs"], len(list(path.parent.iterdir()))]
    print(json.dumps([type(error).__name__, *left]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are a matter of Unix")
@pytest.mark.parametrize("limit", [10, 5_000, 300_000, 400_500], ids=["start", "header", "weights", "end"])
def test_where_the_space_ends_in_a_file_torch_says_what_the_system_said(tmp_path, limit):
    """Of a write that fails in the middle torch itself raises a RuntimeError about positions."""
    arguments = [sys.executable, "-c", FULL_DISK, str(tmp_path / "state.pt"), str(limit)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == ["OSError", [1], 1]


def test_a_checkpoint_of_another_run_is_refused(small_run, tmp_path):
    path = tmp_path / "state.pt"
    train(small_run(epochs=1), checkpoint=path)
    other = small_run(epochs=1, seed=1)
    with pytest.raises(ValueError, match=f"allowed is run {other.run_id}, version 1"):
        train(other, checkpoint=path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"state.pt cannot be read \(.*\): delete it"):
        train(other, checkpoint=path)
