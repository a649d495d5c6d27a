"""Who runs where and when: memory on simulated GPUs, and a paper's sweep on four of them by a simulated clock."""

import math
import os
import time
from itertools import groupby

import pytest

from zoology.engines import local
from zoology.engines.local import CONTEXT_BYTES, EpochDone, Finished, LocalEngine
from zoology.runner import plan
from zoology.runner.driver import Exit, run_sweep
from zoology.runner.memory import ALONE, MemoryEstimate
from zoology.runner.worker import Failure, Memory, Setup

GB = 1e9


# -- what runs take ----------------------------------------------------------------------------------------------


@pytest.fixture
def planned(make_run):
    """Runs of one second each: two rates of one model, another model of its architecture, another architecture."""
    wide = make_run()
    wide = wide.model_copy(update={"model": wide.model.model_copy(update={"d_model": 32})})
    return plan.make_plan([make_run(), make_run(lr=1e-3), wide, make_run(("base_conv", "based"))], "cpu")


def test_what_a_model_takes_is_guessed_then_measured(planned):
    first, second, wide, other = planned
    memory = MemoryEstimate()
    guesses = [memory.bytes(run) for run in planned]
    assert guesses[0] == guesses[1]
    # 16 sequences of 24 tokens, 16 tensors for each of two layers and the embedding, in float32.
    assert guesses[2] - guesses[0] == 16 * 24 * 16 * 16 * 3 * 4 + 20 * (wide.size.parameters - first.size.parameters)
    memory.observe(first, 2 * GB, whole=False)
    assert [memory.bytes(run) for run in planned] == [2 * GB, 2 * GB, *guesses[2:]]
    memory.observe(first, 3 * GB, whole=True)
    memory.observe(second, 2.5 * GB, whole=True)
    assert memory.bytes(first) == memory.bytes(second) == 3 * GB
    assert memory.bytes(wide) == pytest.approx(1.1 * 3 * GB * guesses[2] / guesses[0])
    assert memory.bytes(other) == guesses[3]


def test_less_than_was_guessed_is_believed_at_the_end_only(planned):
    first, memory = planned[0], MemoryEstimate()
    memory.observe(first, 1e6, whole=False)
    assert memory.bytes(first) > 0.4 * GB
    memory.observe(first, 2e6, whole=True)
    assert memory.bytes(first) == 2e6


def test_a_model_that_found_no_memory_is_alone_until_measured_and_for_ever_if_that_was_not_enough(planned):
    first, second, wide, _ = planned
    memory = MemoryEstimate()
    memory.crowded(first)
    assert memory.bytes(second) == ALONE
    assert memory.bytes(wide) < ALONE
    memory.observe(first, 2 * GB, whole=True)
    assert memory.bytes(second) == 2 * GB
    memory.crowded(second)
    memory.crowded(second)
    memory.observe(second, 2 * GB, whole=True)
    assert memory.bytes(first) == ALONE


# -- whose memory it is ------------------------------------------------------------------------------------------


class FakeProcess:
    pid = 1

    def is_alive(self, *_):
        return True

    def send(self, message):
        pass

    kill = join = close = is_alive


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """Two workers on each of two GPUs of 10 GB; no processes. `finish` ends a run, which leaves `held` bytes behind."""

    def spawn(worker):
        worker.process = worker.connection = FakeProcess()

    monkeypatch.setattr(local._Worker, "spawn", spawn)
    setups = [Setup(device, 1, str(tmp_path), (), None, None) for device in ("cuda:0", "cuda:1") * 2]
    engine = LocalEngine(setups, memory={"cuda:0": 10 * GB, "cuda:1": 10 * GB})

    def finish(run_id, *, held=0.0, failure=None):
        (worker,) = (worker for worker in engine._workers if worker.run_id == run_id)
        (event,) = worker._receive(("done", run_id, None if failure else {}, failure, Memory(held, held)))
        return engine._relieve(worker, event)

    engine.finish = finish
    return engine


def where(engine):
    """Runs by device."""
    found = {"cuda:0": set(), "cuda:1": set()}
    for worker in engine._workers:
        if worker.run_id is not None:
            found[worker.setup.device].add(worker.run_id)
    return found


def test_runs_spread_over_gpus_and_share_them_while_they_fit(engine):
    assert engine.fits("p", 50 * GB)  # alone on an empty GPU anything may try
    for name, needs in (("a", 6 * GB), ("b", 3 * GB), ("c", 3 * GB)):
        assert engine.fits(name, needs)
        engine.start(name, name, "", needs)
    assert where(engine) == {"cuda:0": {"a"}, "cuda:1": {"b", "c"}}  # c beside b: 6 + 3 + 1.4 GB are too much
    assert engine.free == 1
    assert engine.fits("d", 10 * GB - 6 * GB - 2 * CONTEXT_BYTES)
    assert not engine.fits("d", 10 * GB - 6 * GB - 2 * CONTEXT_BYTES + 1)
    engine.finish("b", held=3 * GB)
    assert engine.fits("b", 3 * GB)
    assert engine.fits("e", 5 * GB)


def test_what_an_idle_worker_keeps_is_given_up_where_it_is_in_the_way(engine):
    for name in ("a", "b", "c", "d"):
        engine.start(name, name, "", 2 * GB)
    engine.finish("a", held=4 * GB)
    engine.finish("b", held=4 * GB)
    assert engine.built == {"a", "b"}
    engine.finish("c", held=1 * GB)
    assert where(engine) == {"cuda:0": set(), "cuda:1": {"d"}}
    engine.start("c2", "c", "", 5 * GB)  # 5 + 4 + 1.4 GB do not fit: a's worker has to go
    assert where(engine)["cuda:0"] == {"c2"}
    assert engine.built == {"b"}
    engine.start("a2", "a", "", 1 * GB)  # both GPUs have one run: a worker that is there beats one to be started
    assert where(engine) == {"cuda:0": {"c2"}, "cuda:1": {"a2", "d"}}
    assert engine.built == set()


def test_a_run_that_must_be_alone_waits_for_an_empty_gpu_and_keeps_it_empty(engine):
    for name in ("a", "b", "c"):
        engine.start(name, name, "", 1 * GB)
    assert not engine.fits("e", ALONE)
    crowded = engine.finish("a", failure=Failure("out of memory", "no"))
    assert (type(crowded), crowded.run_id) == (local.Crowded, "a")
    engine.finish("c")
    assert engine.fits("a", ALONE)
    engine.start("a", "a", "", ALONE)
    assert where(engine) == {"cuda:0": {"a"}, "cuda:1": {"b"}}
    engine.start("f", "f", "", 0.0)
    assert where(engine) == {"cuda:0": {"a"}, "cuda:1": {"b", "f"}}
    failed = engine.finish("a", failure=Failure("out of memory", "no"))
    assert isinstance(failed, Finished)
    assert (failed.run_id, failed.record, failed.failure) == ("a", None, Failure("out of memory", "no"))


def test_a_worker_is_known_by_all_models_that_it_keeps(engine):
    assert local.KEPT_LOOPS == 2
    for name in ("a", "b", "c", "a"):
        engine.start(name, name, "", GB)
        engine.finish(name, held=GB)
    assert len({worker.process for worker in engine._workers}) == 2  # None, and the one that had all
    assert engine.built == {"c", "a"}
    for name in ("x", "c"):  # one takes x, and gives up c for it
        engine.start(name, name, "", GB)
    assert [worker.points for worker in engine._workers if worker.points] == [["a", "x"], ["c"]]
    engine.finish("x", failure=Failure("error", "CUDA error: an illegal memory access"))
    assert engine.built == set()


def test_a_part_of_an_engine_leaves_its_workers_running(engine):
    engine.launch()
    processes = [worker.process for worker in engine._workers]
    first, second = engine.part([0, 2]), engine.part([1])
    assert (engine.slots, first.slots, second.slots) == (4, 2, 1)
    for name in ("a", "b"):
        first.start(name, name, "", GB)
    assert where(engine) == {"cuda:0": {"a", "b"}, "cuda:1": set()}
    assert (first.free, second.free, engine.free) == (0, 1, 2)
    engine.finish("b")
    first.stop()
    engine.launch()
    assert [worker.process for worker in engine._workers] == processes
    assert (first.built, second.built) == ({"b"}, set())
    engine.finish("a")
    engine.stop()
    assert {worker.process for worker in engine._workers} == {None}


def test_a_loss_that_is_not_finite_leaves_a_worker_its_model(engine):
    engine.start("a", "a", "", GB)
    engine.finish("a", failure=Failure("diverged", "the loss is nan"))
    assert engine.built == {"a"}
    engine.start("b", "a", "", GB)
    engine.finish("b", failure=Failure("error", "CUDA error: an illegal memory access"))
    assert engine.built == set()


def test_time_on_a_gpu_is_divided_among_its_runs(engine, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(local.time, "monotonic", lambda: clock[0])
    engine._now = 0.0
    for name, at in (("a", 0.0), ("b", 5.0), ("c", 10.0)):
        clock[0] = at
        engine.start(name, name, "", GB)
    assert where(engine) == {"cuda:0": {"a", "c"}, "cuda:1": {"b"}}
    shares = {}
    clock[0] = 20.0
    engine._clock()
    (worker,) = (worker for worker in engine._workers if worker.run_id == "a")
    (event,) = worker._receive(("epoch", "a", {"epoch": 1}, None))
    assert event == EpochDone("a", {"epoch": 1}, None, pytest.approx((10 + 10 / 2) / 20))
    for name, at in (("a", 30.0), ("b", 35.0), ("c", 50.0)):
        clock[0] = at
        engine._clock()
        shares[name] = engine.finish(name).device_share
    assert shares == pytest.approx({"a": (10 + 20 / 2) / 30, "b": 1.0, "c": (20 / 2 + 20) / 40})


# -- a sweep by a simulated clock --------------------------------------------------------------------------------


class SimulatedEngine:
    """GPUs that trainings share, and workers that compile `cold` seconds, or `warm` ones what is on the disk.

    `log` has (what, worker, point, start, end) with what "cold", "warm" or "train".
    """

    def __init__(self, train_seconds, *, gpus, jobs, cold, warm):
        self.train_seconds, self.cold, self.warm = train_seconds, cold, warm
        self.slots, self.now, self.log, self.active = gpus * jobs, 0.0, [], {}
        self.devices = [worker % gpus for worker in range(self.slots)]
        self.points, self.on_disk = [None] * self.slots, set()

    @property
    def free(self):
        return self.slots - len(self.active)

    @property
    def built(self):
        busy = {task["worker"] for task in self.active.values()}
        return {point for worker, point in enumerate(self.points) if worker not in busy} - {None}

    def fits(self, point_id, needs):
        return True

    def start(self, run_id, point_id, config_json, needs):
        busy = [task["worker"] for task in self.active.values()]
        loads = [sum(self.devices[other] == self.devices[worker] for other in busy) for worker in range(self.slots)]
        idle = [worker for worker in range(self.slots) if worker not in busy]
        worker = min(idle, key=lambda worker: (self.points[worker] != point_id, loads[worker]))
        task = {
            "worker": worker,
            "point": point_id,
            "since": self.now,
            "begin": self.now,
            "what": "train",
            "build": 0.0,
        }
        task["left"] = self.train_seconds[point_id]
        if self.points[worker] != point_id:
            task["what"] = "warm" if point_id in self.on_disk else "cold"
            task["left"] = task["build"] = self.warm if point_id in self.on_disk else self.cold
        self.points[worker], self.active[run_id] = point_id, task

    def poll(self, timeout):
        trained = [self.devices[task["worker"]] for task in self.active.values() if task["what"] == "train"]

        def speed(task):
            return 1 / trained.count(self.devices[task["worker"]]) if task["what"] == "train" else 1.0

        run_id = min(self.active, key=lambda name: self.active[name]["left"] / speed(self.active[name]))
        passed = self.active[run_id]["left"] / speed(self.active[run_id])
        speeds = [(task, speed(task)) for task in self.active.values()]
        for task, rate in speeds:
            task["left"] -= passed * rate
        self.now += passed
        task = self.active[run_id]
        self.log.append((task["what"], task["worker"], task["point"], task["since"], self.now))
        if task["what"] == "train":
            del self.active[run_id]
            record = {"wall_seconds": self.now - task["begin"], "execution": {"build_seconds": task["build"]}}
            return [Finished(run_id, record, None)]
        self.on_disk.add(task["point"])
        task |= {"what": "train", "left": self.train_seconds[task["point"]], "since": self.now}
        return [EpochDone(run_id, {"epoch": 1, "train_seconds": 1.0})]

    def stop(self):
        pass


@pytest.fixture(autouse=True)
def _disk_that_never_waits(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def simulate(make_run, watcher, directory, seconds, rates=4, stop_after=math.inf, **machine):
    """Models that train for these seconds at each rate, the longest first as their cost says; ended after some runs."""
    config, runs = make_run(), []
    for index, needed in enumerate(seconds):
        size = plan.Size(1, round(1000 * needed), {16: 0, 24: 0}, {16: 0, 24: 0})
        runs += [
            plan.PlannedRun(f"{index:06x}{rate:06x}", f"{index:012x}", config, f"model {index}", size)
            for rate in range(rates)
        ]
    engine = SimulatedEngine({f"{index:012x}": needed for index, needed in enumerate(seconds)}, **machine)

    def stop():
        return Exit.INTERRUPTED if watcher.progress.done >= stop_after else None

    outcome = run_sweep(runs, engine, directory, watcher, total=len(runs), stop=stop)
    how = Exit.DONE if stop_after == math.inf else Exit.INTERRUPTED
    assert (outcome.exit, len(outcome.records)) == (how, min(len(runs), stop_after))
    return engine


def test_a_papers_sweep_keeps_four_gpus_busy(tmp_path, make_run, watcher):
    """58 models at four rates: each is compiled once, and what that takes hides behind others' training."""
    seconds = [3 + 40 * (index * 37 % 58) / 57 for index in range(58)]
    machine = {"gpus": 4, "cold": 60.0, "warm": 15.0}
    engine = simulate(make_run, watcher, tmp_path, seconds, jobs=4, **machine)
    compiled = [entry for entry in engine.log if entry[0] == "cold"]
    assert sorted(entry[2] for entry in compiled) == sorted(engine.train_seconds)
    assert sum(entry[0] == "warm" for entry in engine.log) <= 16  # helping with a model at the end
    best = 60.0 + 4 * sum(seconds) / 4
    assert engine.now <= 1.08 * best
    # One process per GPU waits for its compiler.
    (tmp_path / "alone").mkdir()
    alone = simulate(make_run, watcher, tmp_path / "alone", seconds, jobs=1, **machine)
    assert alone.now >= 1.4 * engine.now


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_worker_that_compiled_a_model_gets_its_other_rates(tmp_path, make_run, watcher, workers):
    """Three models at four rates. Who has none of its own left helps with one that is compiled, never with another."""
    engine = simulate(make_run, watcher, tmp_path, [40.0, 30.0, 20.0], gpus=workers, jobs=1, cold=30.0, warm=8.0)
    builds = [entry for entry in engine.log if entry[0] != "train"]
    assert sum(what == "cold" for what, *_ in builds) == 3
    first_use = {point: min(end for _, _, _, _, end in entries) for point, entries in by_point(builds)}
    assert all(start >= first_use[point] for what, _, point, start, _ in builds if what == "warm")
    trained = [worker for what, worker, *_ in engine.log if what == "train"]
    assert len(trained) == 12
    if workers == 1:
        assert len(builds) == 3
    assert math.isclose(sum(end - start for what, _, _, start, end in engine.log if what == "train"), 4 * 90.0)


@pytest.mark.parametrize(("seconds", "again"), [([10.0, 14.0], 0), ([10.0, 30.0], 1)])
def test_at_the_end_a_model_is_built_again_only_if_that_is_sooner(tmp_path, make_run, watcher, seconds, again):
    """Who is done while another worker's model waits for 14 s does not build that for 15 s; 60 s are worth it."""
    engine = simulate(make_run, watcher, tmp_path, seconds, gpus=2, jobs=1, cold=60.0, warm=15.0)
    assert [what for what, *_ in engine.log if what != "train"] == ["cold", "cold"] + again * ["warm"]
    assert engine.now == 60.0 + (90.0 if again else 4 * 14.0)


def by_point(entries):
    return groupby(sorted(entries, key=lambda entry: entry[2]), key=lambda entry: entry[2])


def test_ten_thousand_runs_that_wait_cost_the_driver_milliseconds(tmp_path, make_run, watcher):
    watcher.tick = lambda: None
    before = time.process_time()
    simulate(make_run, watcher, tmp_path, [10.0] * 2500, gpus=4, jobs=4, cold=60.0, warm=15.0, stop_after=200)
    assert (time.process_time() - before) / 200 < 0.025
