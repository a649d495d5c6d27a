"""The measurement of scaling: who builds what before the clock runs, and what is compared."""

import json
import sys
from pathlib import Path

import pytest

from zoology.runner.plan import load_module

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "benchmark_scaling.py"


@pytest.fixture
def scaling():
    return load_module(EXPERIMENT)


def test_the_work_of_each_gpu_is_one_model_at_its_own_seed(scaling):
    runs = scaling.work("paper", [3, 4], rates=8, epochs=5, precision="bf16")
    assert len({run.run_id for run in runs}) == 16
    assert len({run.point_id for run in runs}) == 1
    assert [run.seed for run in runs] == 8 * [3] + 8 * [4]
    assert {(run.train.epochs, run.train.precision, run.train.stop_accuracy) for run in runs} == {(5, "bf16", None)}
    assert (runs[0].architecture, runs[0].model.d_model) == ("based", 128)
    assert runs[0].model.layers[-1].options["feature_dim"] == 16


@pytest.fixture
def measure(scaling, monkeypatch, tmp_path):
    """Runs the measurement on two made-up GPUs that train a run a second; returns what was timed, and the record."""

    def run(build_seconds=0.0):
        timed = []

        class Engine:
            def __init__(self, setups, memory):
                self.setups = setups

            def launch(self):
                timed.append("launch")

            def part(self, indices):
                return Engine([self.setups[index] for index in indices], {})

            def stop(self):
                timed.append("stop")

        def fake(configs, engine, devices, folder):
            timed.append(([setup.device for setup in engine.setups], devices, len(configs), {c.seed for c in configs}))
            built = build_seconds if len(configs) > 1 else 30.0
            seconds = len(configs) / len(devices)
            rate = len(configs) / seconds
            return {"runs": len(configs), "seconds": seconds, "runs_per_second": rate, "build_seconds": [built]}

        monkeypatch.setattr(scaling, "resolve_devices", lambda text: ["cuda:0", "cuda:1"])
        monkeypatch.setattr(scaling.plan, "device_memory", lambda devices: {})
        monkeypatch.setattr(scaling, "LocalEngine", Engine)
        monkeypatch.setattr(scaling, "timed", fake)
        record = tmp_path / "record.json"
        monkeypatch.setattr(sys, "argv", ["", "--jobs", "2", "--rates", "3", "--epochs", "1", "--json", str(record)])
        scaling.main()
        return timed, json.loads(record.read_text())

    return run


def test_every_worker_builds_for_itself_before_the_clock_runs(measure):
    timed, record = measure()
    first, *builds = timed[:5]
    assert first == "launch"
    assert sorted(builds, key=str) == [([f"cuda:{i % 2}"], [f"cuda:{i % 2}"], 1, {1000 + i}) for i in (0, 2, 1, 3)]
    one, several, last = timed[5:]
    assert one == (["cuda:0", "cuda:0"], ["cuda:0"], 3, {100})
    assert several == (["cuda:0", "cuda:1"] * 2, ["cuda:0", "cuda:1"], 6, {0, 1})
    assert last == "stop"
    assert record["ratio"] == 2.0


def test_the_paper_scale_is_refused_on_a_cpu(scaling, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "resolve_devices", lambda text: ["cpu"])
    monkeypatch.setattr(scaling, "worker_setups", lambda *_: pytest.fail("workers were set up"))
    monkeypatch.setattr(sys, "argv", [""])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "--scale paper is made for GPUs, this takes the CPU" in capsys.readouterr().err


def test_a_build_within_the_clock_is_an_error(measure):
    with pytest.raises(RuntimeError, match=r"one: models were built within the clock, for \[5\.0\] seconds"):
        measure(build_seconds=5.0)
