"""The Ray engine on a real cluster of this machine."""

import json
import os
import signal
import subprocess
import sys

import pytest

from architectures import registry
from zoology.engines.local import Finished
from zoology.runner import plan, store, worker
from zoology.runner.driver import Exit, run_sweep
from zoology.runner.plan import PlanError

HANGING = """
import time, torch
from typing import NamedTuple
from architectures import SequenceMixer, register


class Nothing(NamedTuple):
    pass


@register("hanging", paper="none")
class Hanging(SequenceMixer):
    def __init__(self, d_model: int, *, backend: str = "auto"):
        super().__init__(d_model, backend=backend)

    def forward(self, x):
        time.sleep(600)

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        return Nothing()
"""

MEETING = """
import os, time, torch
from pathlib import Path
from typing import NamedTuple
from architectures import SequenceMixer, register


class Nothing(NamedTuple):
    pass


@register("meeting", paper="none")
class Meeting(SequenceMixer):
    where = Path({where!r})

    def __init__(self, d_model: int, *, backend: str = "auto"):
        super().__init__(d_model, backend=backend)
        self.scale = torch.nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        (self.where / str(os.getpid())).touch()
        limit = time.monotonic() + 60
        while len(list(self.where.iterdir())) < 2 and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.02)
        return x * self.scale

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        return Nothing()
"""

SPY = """
import json, os, time

started = time.time()
time.sleep(1.5)
with open({path!r}, "a") as file:
    file.write(json.dumps([started, time.time(), os.environ["CUDA_VISIBLE_DEVICES"]]) + "\\n")
os._exit(1)  # there is no GPU to go on with, and the next run shall be spied on as well
"""


def test_the_engine_says_that_ray_is_not_installed(monkeypatch):
    from zoology.engines import ray as engine

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError, match=r"pip install 'zoology\[ray\]'"):
        engine.RayEngine([])


def test_nothing_else_imports_ray():
    code = "import sys, zoology.run, zoology.runner.worker, zoology.engines.local; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_dead_address_is_refused_at_once(tmp_path):
    pytest.importorskip("ray")
    from zoology.engines.ray import RayEngine

    setup = worker.Setup("cpu", 1, str(tmp_path), (), None, None)
    with pytest.raises(PlanError, match=r"--address 127\.0\.0\.1:1: no Ray cluster answers there"):
        RayEngine([setup], address="127.0.0.1:1")


def test_a_sweep_on_a_cluster_survives_a_killed_worker(tmp_path, make_run, watcher):
    """A hanging run is given up, a killed one tried again; the driver's directory has every file of every run."""
    pytest.importorskip("ray")
    from zoology.engines.ray import RayEngine

    path = tmp_path / "hanging.py"
    path.write_text(HANGING)
    registry.load_file(path)
    try:
        (hanging,) = plan.make_plan([make_run(("base_conv", "hanging"))], "cpu")
    finally:
        registry._entries.pop("hanging")
    out = tmp_path / "out"
    out.mkdir()
    setup = worker.Setup("cpu", 1, str(out), (str(path),), None, None)
    engine = RayEngine([setup] * 2, timeout=0.5)
    try:
        assert (engine.slots, engine.free) == (2, 2)
        path.unlink()  # nodes have no disk in common with the driver: the file has travelled already
        engine.start(hanging.run_id, hanging.point_id, hanging.config.model_dump_json(), 0.0)
        assert engine.free == 1
        events = []
        while not any(isinstance(event, Finished) for event in events):
            events += engine.poll(0.2)
        assert events[-1].failure == worker.Failure("timed out", "timed out after 0.5 s")
        assert engine.free == 2

        engine._timeout = None
        runs = plan.make_plan([make_run(epochs=3), make_run(lr=1e-3), make_run(lr=2e-3)], "cpu")
        pids, killed = {}, []

        def kill_once(run, epoch):
            if run is runs[0] and not killed:
                killed.append(pids[run.run_id])
                os.kill(killed[0], signal.SIGKILL)

        watcher.started = lambda run, pid: pids.update({run.run_id: pid})
        watcher.epoch = kill_once
        outcome = run_sweep(runs, engine, out, watcher, total=3, retries=1)
    finally:
        engine.stop()
    assert (outcome.exit, outcome.failures) == (Exit.DONE, {})
    assert len(killed) == 1
    assert set(store.scan(out).finished) == {run.run_id for run in runs}
    lines = (out / runs[0].run_id / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


@pytest.fixture
def cluster():
    """A head with one CPU, on which nodes can be added and lost."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False} | small)
    cluster.add_small_node = lambda **options: cluster.add_node(**options, **small)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_that_is_lost_costs_no_run(tmp_path, make_run, watcher, cluster):
    """Both nodes are at work when one is lost: runs wait in their first step until there are two."""
    from zoology.engines.ray import RayEngine

    path, met = tmp_path / "meeting.py", tmp_path / "met"
    path.write_text(MEETING.format(where=str(met)))
    met.mkdir()
    registry.load_file(path)
    try:
        runs = plan.make_plan([make_run(("meeting",), lr=lr, epochs=6) for lr in (1e-3, 2e-3, 3e-3)], "cpu")
    finally:
        registry._entries.pop("meeting")
    node = cluster.add_small_node(num_cpus=1)
    setup = worker.Setup("cpu", 1, str(tmp_path), (str(path),), None, None)
    engine = RayEngine([setup], address=cluster.address)
    attempts = []

    def lose_it_once(run, epoch):
        in_progress = [active for active in watcher.progress.active.values() if active.epoch is not None]
        if len(in_progress) == 2 and cluster.worker_nodes:  # one of them is there
            cluster.remove_node(node, allow_graceful=False)

    watcher.started = lambda run, pid: attempts.append(run.run_id)
    watcher.epoch = lose_it_once
    try:
        assert engine.slots == 2
        outcome = run_sweep(runs, engine, tmp_path, watcher, total=3, retries=1)
    finally:
        engine.stop()
    assert (outcome.exit, outcome.failures) == (Exit.DONE, {})
    assert not cluster.worker_nodes
    assert len(attempts) == 4  # that of the lost node twice
    assert set(store.scan(tmp_path).finished) == {run.run_id for run in runs}
    for run in runs:
        lines = (tmp_path / run.run_id / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_runs_share_a_gpu_by_fractions(tmp_path, make_run, cluster):
    """A GPU that Ray believes in is enough to see who gets it: two runs at once, the third after one of them."""
    from zoology.engines.ray import RayEngine

    cluster.add_small_node(num_cpus=4, num_gpus=1)
    spy = tmp_path / "spy.py"
    spy.write_text(SPY.format(path=str(tmp_path / "seen")))
    setup = worker.Setup("cuda:0", 1, str(tmp_path), (), str(spy), None)
    engine = RayEngine([setup], address=cluster.address, jobs=2)
    runs = plan.make_plan([make_run(lr=lr) for lr in (1e-3, 2e-3, 3e-3)], "cpu")
    try:
        assert engine.slots == 2
        for run in runs:
            engine.start(run.run_id, run.point_id, run.config.model_dump_json(), 0.0)
        events = []
        while sum(isinstance(event, Finished) for event in events) < 3:
            events += engine.poll(0.2)
    finally:
        engine.stop()
    seen = sorted(json.loads(line) for line in (tmp_path / "seen").read_text().splitlines())
    assert [gpus for _, _, gpus in seen] == ["0", "0", "0"]
    (_, first_end, _), (second_start, second_end, _), (third_start, _, _) = seen
    assert second_start < first_end
    assert third_start >= min(first_end, second_end)
