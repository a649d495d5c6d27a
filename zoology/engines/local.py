"""Worker processes of this machine: started once, reused for many runs, replaced when they die.

Each worker has a pipe of its own. The parent keeps no copy of the worker's end, so a worker killed in the middle
of a message is an end of file, never a hang; process pools share a queue and a lock between workers, and do hang.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from zoology.loops import KEPT_LOOPS
from zoology.runner.worker import Failure, Setup, serve

LEAVE_SECONDS = 5.0
CONTEXT_BYTES = 0.7e9  # what a process takes of a GPU's memory for CUDA itself and for kernels
START_SECONDS = 300.0  # importing torch from a cold network disk takes minutes, a hang takes for ever


class Started(NamedTuple):
    """A worker took up a run."""

    run_id: str
    worker: int


class EpochDone(NamedTuple):
    """An epoch of a run ended; `peak_memory` is what its worker took of a GPU so far, in bytes."""

    run_id: str
    epoch: dict[str, Any]
    peak_memory: int | None = None
    device_share: float = 1.0  # as in Finished, so far


class Finished(NamedTuple):
    """A run ended, with a record or with a failure."""

    run_id: str
    record: dict[str, Any] | None
    failure: Failure | None
    peak_memory: int | None = None
    device_share: float = 1.0  # of its device's time that was its own: others in progress there count as much


class Crowded(NamedTuple):
    """A run found too little memory beside others on its device: it can try again when it has that to itself."""

    run_id: str
    message: str


Event = Started | EpochDone | Finished | Crowded


class LocalEngine:
    """Runs on this machine: one worker per entry of `setups`, `timeout` seconds for each run at most.

    `memory` says how many bytes each GPU has. Runs share one while what they take, as far as it is known, fits; a run
    fails for lack of memory only when it was alone on its device.
    """

    def __init__(
        self, setups: Sequence[Setup], *, timeout: float | None = None, memory: Mapping[str, float] | None = None
    ):
        self._workers = [_Worker(index, setup, timeout) for index, setup in enumerate(setups)]
        self._memory = memory or {}
        self._now = time.monotonic()

    @property
    def slots(self) -> int:
        """How many runs execute at once."""
        return len(self._workers)

    @property
    def free(self) -> int:
        """How many more runs can be started now, if there is memory for them."""
        return sum(worker.run_id is None for worker in self._workers)

    @property
    def built(self) -> set[str] | None:
        """Points whose training step a free worker has compiled and need not compile again; None without a GPU."""
        if not any(worker.setup.device.startswith("cuda") for worker in self._workers):
            return None
        return {point for worker in self._workers if worker.run_id is None and worker.alive for point in worker.points}

    def launch(self) -> None:
        """Start every worker's process now, and not with its first run; threads may use `part`s after that."""
        for worker in self._workers:
            if not worker.alive:
                worker.spawn()

    def part(self, workers: Iterable[int]) -> LocalEngine:
        """Some of the workers, by index, as an engine whose `stop` leaves them running, with what they have built.

        A sweep on a part must not overlap with one on another that shares workers, or shares a GPU's memory.
        """
        found = _Part((), memory=self._memory)
        found._workers = [self._workers[index] for index in workers]
        return found

    def fits(self, point_id: str, needs: float) -> bool:
        """Whether a free worker's device has memory for a run of this point that needs so many bytes."""
        return self._place(point_id, needs) is not None

    def start(self, run_id: str, point_id: str, config_json: str, needs: float) -> None:
        """Give a run that `fits` to a free worker: one that has built its model, else on the least busy device."""
        worker = self._place(point_id, needs)
        self._clock()
        neighbours = [other for other in self._on(worker.setup.device) if other is not worker]
        if not self._has_room(worker.setup.device, needs, neighbours):
            for other in neighbours:
                if other.run_id is None:
                    other.kill()  # what it keeps for later runs of its model is in the way
        if needs == math.inf and point_id not in worker.points:
            worker.kill()
        for other in neighbours:
            other.alone = False
        worker.alone = not any(other.alive for other in neighbours)
        worker.start(run_id, point_id, config_json, needs)

    def _place(self, point_id: str, needs: float) -> _Worker | None:
        """The free worker that is to have a run, if one's device has room, if need be after idle ones are ended."""
        busy: dict[str, list[_Worker]] = {}
        for worker in self._workers:
            if worker.run_id is not None:
                busy.setdefault(worker.setup.device, []).append(worker)
        places = [
            worker
            for worker in self._workers
            if worker.run_id is None and self._has_room(worker.setup.device, needs, busy.get(worker.setup.device, []))
        ]

        def preference(worker: _Worker) -> tuple:
            return point_id not in worker.points, len(busy.get(worker.setup.device, ())), not worker.alive

        return min(places, key=preference, default=None)

    def _has_room(self, device: str, needs: float, neighbours: Sequence[_Worker]) -> bool:
        claims = [claim for worker in neighbours if (claim := worker.claim)]
        if not claims:
            return True  # nobody is there: if that is not enough, nothing is
        total = needs + CONTEXT_BYTES + sum(claims)
        return total < math.inf and total <= self._memory.get(device, math.inf)

    def _on(self, device: str) -> list[_Worker]:
        return [worker for worker in self._workers if worker.setup.device == device]

    def poll(self, timeout: float) -> list[Event]:
        """What happened, after waiting for at most `timeout` seconds for something to happen."""
        self._clock()
        busy = [worker for worker in self._workers if worker.run_id is not None]
        deadlines = [worker.deadline for worker in busy if worker.deadline is not None]
        limit = min([timeout, *(max(0.0, deadline - time.monotonic()) for deadline in deadlines)])
        wait([handle for worker in busy for handle in (worker.connection, worker.process.sentinel)], limit)
        self._clock()
        return [self._relieve(worker, event) for worker in busy for event in worker.events()]

    def _clock(self) -> None:
        """Divide the time since the last call among the runs of each GPU; cores of a CPU are not shared."""
        now = time.monotonic()
        passed, self._now = now - self._now, now
        busy = [worker for worker in self._workers if worker.run_id is not None]
        counts = Counter(worker.setup.device for worker in busy)
        for worker in busy:
            worker.shared += passed / (counts[worker.setup.device] if worker.setup.device.startswith("cuda") else 1)

    def _relieve(self, worker: _Worker, event: Event) -> Event:
        """A run without memory beside others has not failed yet."""
        out_of_memory = isinstance(event, Finished) and event.failure and event.failure.kind == "out of memory"
        if not out_of_memory or worker.alone:
            return event
        worker.kill()
        return Crowded(event.run_id, f"out of memory beside others on {worker.setup.device}: to be tried there alone")

    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [worker.process.pid for worker in self._workers if worker.alive]

    def stop(self) -> None:
        """End all workers; runs in progress are cut off."""
        idle = [worker for worker in self._workers if worker.alive and worker.run_id is None]
        for worker in idle:
            worker.connection.close()  # it returns from its main loop, and cleans up what it started
        limit = time.monotonic() + LEAVE_SECONDS
        for worker in idle:
            worker.process.join(max(0.0, limit - time.monotonic()))
        for worker in self._workers:
            worker.kill()


class _Part(LocalEngine):
    """Workers that belong to another engine."""

    def stop(self) -> None:
        """Leave them running."""


class _Worker:
    """One worker process and the run it has."""

    def __init__(self, index: int, setup: Setup, timeout: float | None):
        self.index = index
        self.setup = setup
        self.timeout = timeout
        self.run_id: str | None = None
        self.points: list[str] = []  # of its latest runs: those whose training steps it keeps
        self.started = False  # its process took up the run
        self.deadline: float | None = None
        self.needs = 0.0  # bytes, of its run
        self.held = 0.0  # bytes, kept after it
        self.alone = True  # on its device, ever since its run started
        self.since = 0.0  # when its run started
        self.shared = 0.0  # seconds since then, each divided by the number of runs on the device
        self.process: Any = None
        self.connection: Any = None
        self.log = Path(setup.directory, "logs", f"worker-{index}.log")
        self._log_start = 0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    @property
    def share(self) -> float:
        """Of its device's time since its run started, what was that run's own."""
        return min(1.0, self.shared / max(time.monotonic() - self.since, 1e-9))

    @property
    def claim(self) -> float:
        """Bytes of its device that are not for others: 0 if there is no process."""
        if self.run_id is None:
            return CONTEXT_BYTES + self.held if self.alive else 0.0
        return CONTEXT_BYTES + max(self.needs, self.held)

    def start(self, run_id: str, point_id: str, config_json: str, needs: float) -> None:
        if not self.alive:
            self.spawn()
        self.run_id, self.needs = run_id, needs
        self.points = [*(point for point in self.points if point != point_id), point_id][-KEPT_LOOPS:]
        self.since, self.shared = time.monotonic(), 0.0
        self.started, self.deadline = False, time.monotonic() + START_SECONDS
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        # If it died just now, `events` will see that.
        with suppress(OSError):
            self.connection.send((run_id, config_json))

    def spawn(self) -> None:
        self.kill()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        setup, surroundings = _on_its_own_gpu(self.setup)
        self.process = context.Process(
            target=serve, args=(theirs, setup, str(self.log)), name=f"zoology-worker-{self.index}", daemon=True
        )
        with _interrupts_blocked(), _environment(surroundings):
            self.process.start()
        theirs.close()

    def events(self) -> Iterator[Event]:
        """What the worker said, or that it died, or took too long."""
        run_id = self.run_id
        # Whether it lives is asked before its messages are read: what it said before it died comes first.
        alive = self.alive
        try:
            while self.run_id is not None and self.connection.poll():
                yield from self._receive(self.connection.recv())
        except (EOFError, OSError):
            alive = False
        if self.run_id is None:
            return
        if not alive:
            yield self._give_up(run_id, "crashed", self._how_it_died())
        elif time.monotonic() > self.deadline:
            late = f"the worker process did not take up the run within {START_SECONDS:g} s"
            message = f"timed out after {self.timeout:g} s" if self.started else late
            yield self._give_up(run_id, "timed out", message)

    def _receive(self, message: tuple) -> Iterator[Event]:
        kind, *rest = message
        if kind == "started":
            self.started = True
            self.deadline = float("inf") if self.timeout is None else time.monotonic() + self.timeout
            yield Started(rest[0], self.index)
        elif kind == "epoch":
            run_id, epoch, memory = rest
            self.needs = max(self.needs, memory.peak if memory else 0)
            yield EpochDone(run_id, epoch, memory and memory.peak, self.share)
        elif kind == "done":
            run_id, record, failure, memory = rest
            self.run_id = self.deadline = None
            self.held = memory.held if memory else 0.0
            # After an illegal access nothing runs in that process any more; a loss that is not finite harms nobody.
            if failure is not None and failure.kind != "diverged" and self.setup.device.startswith("cuda"):
                self.kill()
            yield Finished(run_id, record, failure, memory and memory.peak, self.share)

    def _give_up(self, run_id: str, kind: str, message: str) -> Finished:
        self.kill()
        self.run_id = self.deadline = None
        return Finished(run_id, None, Failure(kind, message, self._log_tail()))

    def _how_it_died(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            return f"the worker process was ended by {name}{hint}"
        return f"the worker process ended with exit code {code}"

    def _log_tail(self) -> str:
        """What the worker printed since the run started, its end if that is long."""
        try:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                file.seek(self._log_start)
                return file.read()[-8000:]
        except OSError:
            return ""

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process.close()
            self.connection.close()
        self.process = self.connection = None
        self.points = []
        self.held = 0.0


def _on_its_own_gpu(setup: Setup) -> tuple[Setup, dict[str, str]]:
    """The setup of a worker that sees one GPU only, and its environment.

    Compiled code names the GPU it runs on: where that is the first for every worker, all share one cache on the disk.
    """
    if not setup.device.startswith("cuda"):
        return setup, {}
    index, visible = int(setup.device.partition(":")[2] or 0), os.environ.get("CUDA_VISIBLE_DEVICES")
    surroundings = {"CUDA_VISIBLE_DEVICES": visible.split(",")[index].strip() if visible else str(index)}
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        surroundings["TORCHINDUCTOR_COMPILE_THREADS"] = str(setup.threads)
    return setup._replace(device="cuda:0"), surroundings


@contextmanager
def _environment(changes: Mapping[str, str]):
    """Start a process with these variables changed."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_blocked():
    """Start a process that Ctrl-C cannot hit before it has said that it ignores it."""
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # its own start, which the first process would cause, unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
