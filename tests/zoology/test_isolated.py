"""Calls in processes of their own: what dies, hangs or breaks its GPU costs one call."""

import os
import time

import pytest

from zoology.engines.isolated import Died, run_isolated

CALLS = """
import os, sys, time
import torch


def act(what):
    if what == "die":
        os.abort()
    if what == "hang":
        time.sleep(600)
    if what == "raise":
        raise ValueError("not today")
    if what == "break the GPU":
        def broken():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
    return os.getpid(), getattr(sys, "started_with", None)


def start(value):
    sys.started_with = value
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    (tmp_path / "calls_for_a_test.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    import calls_for_a_test

    return calls_for_a_test


def test_a_call_that_dies_or_hangs_or_breaks_its_gpu_is_alone(calls):
    what = ["", "", "die", "", "hang", "", "break the GPU", "", ""]
    options = {"jobs": 1, "initializer": calls.start, "initargs": ("a value",), "timeout": 1.0}
    found = dict(run_isolated(calls.act, [(name,) for name in what], **options))
    assert list(found) == list(range(9))  # one process: in order
    assert (found[2], found[4]) == (Died("its process died"), Died("no answer within 1 s"))
    answers = {index: answer for index, answer in found.items() if index not in (2, 4)}
    assert {value for _, value in answers.values()} == {"a value"}
    pids = {index: pid for index, (pid, _) in answers.items()}
    assert pids[0] == pids[1]
    assert pids[5] == pids[6]
    assert pids[7] == pids[8]
    assert len({pids[0], pids[3], pids[5], pids[7], os.getpid()}) == 5


def test_what_a_call_raises_is_raised_and_ends_the_rest(calls):
    started = time.monotonic()
    with pytest.raises(ValueError, match="not today"):
        list(run_isolated(calls.act, [("raise",), *[("",)] * 5], jobs=1))
    assert time.monotonic() - started < 60
    assert list(run_isolated(calls.act, [], jobs=3)) == []
