"""Faults injected into real worker processes and drivers: what survives, and what is said about it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import zoology
from architectures import registry
from zoology.engines import local
from zoology.engines.local import LocalEngine
from zoology.runner import plan, store, worker
from zoology.runner.driver import Exit, run_sweep

TROUBLE = '''
import multiprocessing, os, sys, time, torch
from architectures import SequenceMixer, register
from typing import NamedTuple
from zoology.runner import worker

if multiprocessing.parent_process() is not None:  # in a worker, what a GPU would say is made up
    worker.read_memory = lambda device: worker.Memory(int(os.environ.get("MEMORY_TAKEN", "0")), 0)


class Nothing(NamedTuple):
    pass


@register("trouble", paper="none")
class Trouble(SequenceMixer):
    """Does as `what` says when it is first run, in `where` a file appears each time."""

    def __init__(self, d_model: int, *, what: str = "nothing", where: str = "", takes: int = 0, backend: str = "auto"):
        super().__init__(d_model, backend=backend)
        self.what, self.where, self.takes = what, where, takes
        self.scale = torch.nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        os.environ["MEMORY_TAKEN"] = str(self.takes)
        if self.where:
            open(f"{self.where}-{os.getpid()}", "a").close()
        if self.what == "crash":
            print("last words", flush=True)
            os.abort()
        if self.what == "exit":
            sys.exit(3)
        if self.what == "raise":
            raise RuntimeError("mixer is upset")
        if self.what == "memory":
            raise MemoryError("no 7 GB left")
        if self.what == "hang":
            time.sleep(600)
        if self.what == "slow":
            time.sleep(0.05)
        if self.what == "nan":
            return x * self.scale * float("nan")
        return x * self.scale

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        return Nothing()
'''

EXPERIMENT = """
import os, signal
from zoology.config import DataConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.tasks import MQAR

left = int(os.environ.get("KILLED_WRITING_RESULT", "0"))
replace = os.replace


def replace_or_die(source, target):
    global left
    left -= os.path.basename(target) == "result.json"
    if left == 0 and os.path.basename(target) == "result.json":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)


os.replace = replace_or_die


def sweep(scale):
    task = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2)
    data = DataConfig(
        train=[Slice(task=task, num_examples=512)], test=[Slice(task=task, num_examples=64)], batch_size=16
    )
    model = ModelConfig(vocab_size=32, d_model=16, layers=[layer("base_conv")])
    return [
        RunConfig(architecture="base_conv", model=model, data=data, train=TrainConfig(lr=lr, epochs=6))
        for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    ]
"""


@pytest.fixture
def trouble(tmp_path):
    """The file that registers the architecture "trouble", known in this process for the test's time."""
    path = tmp_path / "trouble.py"
    path.write_text(TROUBLE)
    registry.load_file(path)
    yield path
    registry._entries.pop("trouble")


@pytest.fixture
def make_engine(tmp_path):
    engines = []

    def make(*files, jobs=1, device="cpu", threads=1, experiment=None, **options):
        setup = worker.Setup(device, threads, str(tmp_path), tuple(map(str, files)), experiment, None)
        engines.append(LocalEngine([setup] * jobs, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()


def troubled(run, **options):
    layers = (run.model.layers[0].model_copy(update={"name": "trouble", "options": options}),)
    model = run.model.model_copy(update={"layers": layers})
    return run.model_copy(update={"architecture": "trouble", "model": model})


def test_no_run_takes_another_down(tmp_path, make_run, trouble, make_engine, watcher):
    """Of runs on one worker some raise, diverge, run out of memory or crash, and the others never notice."""
    where = tmp_path / "pid"
    kinds = ("raise", "memory", "exit", "nan", "crash")
    runs = [troubled(make_run(epochs=2), what=what) for what in kinds]
    fine = plan.with_seeds([troubled(make_run(num_examples=16), what="nothing", where=str(where))], 8)
    planned = plan.make_plan([*runs, *fine], "cpu")
    times = []
    watcher.finished = lambda run, record, message: times.append((time.perf_counter(), record, run))
    outcome = run_sweep(planned, make_engine(trouble), tmp_path, watcher, total=len(planned), retries=0)
    assert outcome.exit is Exit.FAILURES
    assert set(outcome.records) == {run.run_id for run in fine}
    said = {what: outcome.failures[run.run_id] for what, run in zip(kinds, runs)}
    assert said["raise"] == "RuntimeError: mixer is upset"
    assert said["memory"] == "out of memory: no 7 GB left"
    assert said["exit"] == "SystemExit: 3"
    assert "the loss is nan at epoch 1, step 1 of" in said["nan"]
    assert said["crash"] == "the worker process was ended by SIGABRT"
    texts = {what: (tmp_path / run.run_id / "error.txt").read_text() for what, run in zip(kinds, runs)}
    assert all(texts[what].startswith(said[what]) for what in kinds)
    assert 'raise RuntimeError("mixer is upset")' in texts["raise"]
    assert "last words" in texts["crash"]
    assert "Fatal Python error: Aborted" in texts["crash"]

    assert len(list(tmp_path.glob("pid-*"))) == 1  # the worker is used again, not started for each run
    # From the end of a run to the end of the next one, less what the run itself took; the best of seven, for the
    # machine may be busy with other things.
    pairs = [pair for pair in itertools.pairwise(times) if pair[0][1] and pair[1][1]]
    assert len(pairs) == 7
    assert min(end - before - record["wall_seconds"] for (before, _, _), (end, record, _) in pairs) < 0.05


def test_a_run_that_hangs_is_given_up(tmp_path, make_run, trouble, make_engine, watcher):
    (run,) = plan.make_plan([troubled(make_run(), what="hang")], "cpu")
    engine = make_engine(trouble, timeout=0.5)
    outcome = run_sweep([run], engine, tmp_path, watcher, total=1)
    assert outcome.failures == {run.run_id: "timed out after 0.5 s"}
    assert engine.pids() == []


@pytest.mark.parametrize("timeout", [None, 100.0])
def test_a_worker_that_does_not_start_is_not_said_to_be_slow(
    tmp_path, make_run, make_engine, watcher, monkeypatch, timeout
):
    monkeypatch.setattr(local, "START_SECONDS", 0.25)  # importing torch takes longer
    (run,) = plan.make_plan([make_run()], "cpu")
    engine = make_engine(timeout=timeout)
    outcome = run_sweep([run], engine, tmp_path, watcher, total=1)
    assert outcome.failures == {run.run_id: "the worker process did not take up the run within 0.25 s"}
    assert engine.pids() == []


def test_a_run_without_memory_beside_another_gets_the_device_alone(tmp_path, make_run, trouble, make_engine, watcher):
    """It waits for the other to end, and fails only then, with what it needed; the sweep goes on."""
    slow, short, later = plan.make_plan(
        [
            troubled(make_run(num_examples=256), what="slow"),
            troubled(make_run(), what="memory"),
            troubled(make_run(num_examples=16), what="nothing"),
        ],
        "cpu",
    )
    watcher.started = lambda run, worker: watcher.seen.append(("started", run.run_id, len(watcher.progress.active)))
    engine = make_engine(trouble, jobs=2)
    outcome = run_sweep([slow, short, later], engine, tmp_path, watcher, total=3)
    assert outcome.failures == {short.run_id: "out of memory: no 7 GB left"}
    assert set(outcome.records) == {slow.run_id, later.run_id}
    notes = [seen for seen in watcher.seen if seen[0] == "note"]
    assert notes == [("note", f"{short.label}: out of memory beside others on cpu: to be tried there alone")]
    ends = [seen[1] for seen in watcher.seen if seen[0] == "finished"]
    assert ends.index(slow.run_id) < ends.index(short.run_id)
    tries = [seen for seen in watcher.seen if seen[:2] == ("started", short.run_id)]
    assert [active for _, _, active in tries] == [2, 1]


def test_runs_share_a_device_while_what_they_took_fits(tmp_path, make_run, trouble, make_engine, watcher):
    """Readings are made up: 6 GB for one model and 2 GB for another, on a device of 10 GB."""
    large = plan.with_seeds([troubled(make_run(epochs=2), what="slow", takes=6_000_000_000)], 3)
    small = plan.with_seeds([troubled(make_run(num_examples=32), what="slow", takes=2_000_000_000)], 2)
    engine, together = make_engine(trouble, jobs=3, memory={"cpu": 10e9}), []

    def started(run, worker):
        active = watcher.progress.active.values()
        together.append(sorted(active.run.config.model.layers[0].options["takes"] // 10**9 for active in active))

    watcher.started = started
    outcome = run_sweep(plan.make_plan([*large, *small], "cpu"), engine, tmp_path, watcher, total=5)
    assert len(outcome.records) == 5
    assert together[2] == [6, 6, 6]  # on a guess of half a GB each
    # Once known, 6 + 2 GB and two processes' own .7 GB are under 10, and 6 + 6 and 6 + 2 + 2 above.
    assert len(together) == 5
    assert all(takes in ([2], [2, 2], [2, 6]) for takes in together[3:])


def test_a_worker_sees_its_own_gpu_as_the_first(tmp_path, make_run, make_engine, watcher, monkeypatch):
    """Compiled code names its GPU: if each worker had another number, none could use another's cache."""
    spy = tmp_path / "spy.py"
    spy.write_text(
        "import os, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, 'seen').open('a').write("
        "' '.join([os.environ['CUDA_VISIBLE_DEVICES'], os.environ['TORCHINDUCTOR_COMPILE_THREADS']]) + '\\n')\n"
    )
    (run,) = plan.make_plan([make_run()], "cpu")
    for visible, device in ((None, "cuda:2"), ("5,GPU-8a,7", "cuda:1")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        outcome = run_sweep(
            [run], make_engine(experiment=str(spy), device=device, threads=3), tmp_path, watcher, total=1, retries=0
        )
        assert list(outcome.failures) == [run.run_id]  # there is no GPU here
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert (tmp_path / "seen").read_text().split("\n") == ["2 3", "GPU-8a 3", ""]


def test_a_killed_worker_costs_its_epochs_since_the_checkpoint_only(tmp_path, make_run, make_engine, watcher):
    (run,) = plan.make_plan([make_run(epochs=4)], "cpu")
    engine, killed = make_engine(), []
    start = engine.start

    def start_and_interrupt(*arguments):
        start(*arguments)
        os.kill(engine.pids()[0], signal.SIGINT)  # Ctrl-C while it is starting up is not for it to answer

    engine.start = start_and_interrupt

    def kill_once(run, epoch):
        if epoch["epoch"] == 2 and not killed:
            killed.extend(engine.pids())
            os.kill(killed[0], signal.SIGKILL)

    watcher.epoch = kill_once
    outcome = run_sweep([run], engine, tmp_path, watcher, total=1)
    assert outcome.exit is Exit.DONE
    assert len(killed) == 1
    record = outcome.records[run.run_id]
    assert record["resumed"] is True
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / run.run_id / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]


# -- the command, killed and interrupted -------------------------------------------------------------------------


def start(tmp_path, **environment):
    """The command in a process group of its own, as a terminal has it."""
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT)
    command = [sys.executable, "-m", "zoology.run", str(path), "--out", str(tmp_path / "out"), "--jobs", "1"]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--scale", "smoke"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
        cwd=os.path.dirname(os.path.dirname(zoology.__file__)),
    )


def wait_for(condition, seconds=90):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)


def finished(tmp_path):
    return {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/result.json")}


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_sweep_survives_sigkill_of_its_driver_in_the_middle_of_a_result_and_ctrl_c(tmp_path):
    killed = start(tmp_path, KILLED_WRITING_RESULT="2")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    wait_for(lambda: group_is_gone(killed.pid))  # its workers end with it
    first = finished(tmp_path)
    assert len(first) == 1
    (half,) = (tmp_path / "out").glob("*/.result.json.*.tmp")
    assert half.parent.name not in first
    assert (half.parent / "checkpoint.pt").exists()  # its last epoch is not lost

    interrupted = start(tmp_path)
    wait_for(lambda: len(finished(tmp_path)) > len(first))
    os.killpg(interrupted.pid, signal.SIGINT)  # as Ctrl-C does: to the driver and its workers
    said, _ = interrupted.communicate(timeout=60)
    second = finished(tmp_path)
    assert interrupted.returncode == 130, said
    assert f"interrupted: {len(second)} of 6 runs are finished and kept; go on with" in said
    assert f"{tmp_path / 'experiment.py'} --out {tmp_path / 'out'} --jobs 1" in said
    assert "Traceback" not in said
    wait_for(lambda: group_is_gone(interrupted.pid))
    assert len(first) < len(second) < 6

    last = start(tmp_path)
    said, _ = last.communicate(timeout=120)
    assert last.returncode == 0, said
    third = finished(tmp_path)
    assert len(third) == 6
    assert {run_id: third[run_id] for run_id in second} == second  # nothing was done twice
    assert {run_id: second[run_id] for run_id in first} == first
    assert f"{6 - len(second)} to do" in said
    found = store.scan(tmp_path / "out")
    assert (len(found.finished), found.failed, found.broken) == (6, {}, {})
    assert not list((tmp_path / "out").glob("*/checkpoint.pt"))
    assert not list((tmp_path / "out").glob("*/.*.tmp"))
    assert (tmp_path / "out" / "tradeoff.png").stat().st_size > 10_000
