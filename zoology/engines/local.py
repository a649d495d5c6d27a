"""Worker processes of this machine: started once, reused for many runs, replaced when they die.

Each worker has a pipe of its own. The parent keeps no copy of the worker's end, so a worker killed in the middle
of a message is an end of file, never a hang; process pools share a queue and a lock between workers, and do hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from zoology.runner.worker import Failure, Setup, serve

LEAVE_SECONDS = 5.0
START_SECONDS = 300.0  # importing torch from a cold network disk takes minutes, a hang takes for ever


class Started(NamedTuple):
    """A worker took up a run."""

    run_id: str
    worker: int


class EpochDone(NamedTuple):
    """An epoch of a run ended."""

    run_id: str
    epoch: dict[str, Any]


class Finished(NamedTuple):
    """A run ended, with a record or with a failure."""

    run_id: str
    record: dict[str, Any] | None
    failure: Failure | None


class Crowded(NamedTuple):
    """A run found too little memory beside others on its device: fewer run there from now on, and it can try again."""

    run_id: str
    message: str


Event = Started | EpochDone | Finished | Crowded


class LocalEngine:
    """Runs on this machine: one worker per entry of `setups`, `timeout` seconds for each run at most.

    Workers that share a device and run out of memory become fewer; a run fails for lack of memory only when it was
    alone on its device.
    """

    def __init__(self, setups: Sequence[Setup], *, timeout: float | None = None):
        self._workers = [_Worker(index, setup, timeout) for index, setup in enumerate(setups)]

    @property
    def slots(self) -> int:
        """How many runs execute at once."""
        return len(self._workers)

    @property
    def free(self) -> int:
        """How many more runs can be started now."""
        return sum(worker.run_id is None for worker in self._workers)

    @property
    def built(self) -> set[str] | None:
        """Points whose training step a free worker has compiled and need not compile again; None without a GPU."""
        if not any(worker.setup.device.startswith("cuda") for worker in self._workers):
            return None
        return {worker.point_id for worker in self._workers if worker.run_id is None and worker.alive}

    def start(self, run_id: str, point_id: str, config_json: str) -> None:
        """Give a run to a free worker: one that has built its model, or at least has imported torch."""
        free = [worker for worker in self._workers if worker.run_id is None]
        worker = min(free, key=lambda worker: (worker.point_id != point_id, not worker.alive))
        worker.start(run_id, point_id, config_json)

    def poll(self, timeout: float) -> list[Event]:
        """What happened, after waiting for at most `timeout` seconds for something to happen."""
        busy = [worker for worker in self._workers if worker.run_id is not None]
        deadlines = [worker.deadline for worker in busy if worker.deadline is not None]
        limit = min([timeout, *(max(0.0, deadline - time.monotonic()) for deadline in deadlines)])
        wait([handle for worker in busy for handle in (worker.connection, worker.process.sentinel)], limit)
        return [self._relieve(worker, event) for worker in busy for event in worker.events()]

    def _relieve(self, worker: _Worker, event: Event) -> Event:
        """Where memory ran out on a device that several workers share, one worker fewer shares it."""
        if not isinstance(event, Finished) or event.failure is None or event.failure.kind != "out of memory":
            return event
        device = worker.setup.device
        sharing = sum(other.setup.device == device for other in self._workers)
        if sharing == 1:
            return event
        worker.kill()
        self._workers.remove(worker)
        return Crowded(event.run_id, f"out of memory on {device}: {sharing - 1} runs at once there from now on")

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


class _Worker:
    """One worker process and the run it has."""

    def __init__(self, index: int, setup: Setup, timeout: float | None):
        self.index = index
        self.setup = setup
        self.timeout = timeout
        self.run_id: str | None = None
        self.point_id: str | None = None  # of its latest run
        self.deadline: float | None = None
        self.process: Any = None
        self.connection: Any = None
        self.log = Path(setup.directory, "logs", f"worker-{index}.log")
        self._log_start = 0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def start(self, run_id: str, point_id: str, config_json: str) -> None:
        if not self.alive:
            self._spawn()
        self.run_id, self.point_id = run_id, point_id
        self.deadline = time.monotonic() + START_SECONDS
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        # If it died just now, `events` will see that.
        with suppress(OSError):
            self.connection.send((run_id, config_json))

    def _spawn(self) -> None:
        self.kill()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self.setup, str(self.log)), name=f"zoology-worker-{self.index}", daemon=True
        )
        with _interrupts_blocked():
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
            limit = self.timeout if self.timeout is not None else START_SECONDS
            yield self._give_up(run_id, "timed out", f"timed out after {limit:g} s")

    def _receive(self, message: tuple) -> Iterator[Event]:
        kind, *rest = message
        if kind == "started":
            self.deadline = float("inf") if self.timeout is None else time.monotonic() + self.timeout
            yield Started(rest[0], self.index)
        elif kind == "epoch":
            yield EpochDone(*rest)
        elif kind == "done":
            self.run_id = self.deadline = None
            if rest[2] is not None and self.setup.device.startswith("cuda"):
                self.kill()  # after an illegal access nothing runs in that process any more, and a new one is cheap
            yield Finished(*rest)

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
        self.process = self.connection = self.point_id = None


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
