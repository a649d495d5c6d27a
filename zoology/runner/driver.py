"""The driver: gives runs to an engine, writes their files, and ends in an orderly way however it is ended."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from zoology.engines.local import Crowded, EpochDone, Event, Finished, Started
from zoology.runner import store
from zoology.runner.memory import MemoryEstimate
from zoology.runner.plan import Estimate, PlannedRun, longest_first
from zoology.runner.worker import Failure

WARM_SHARE = 0.25
"""Of the time that building a model takes, what it takes again with the code on the disk: 5 of 20 to 60 s."""


class Exit(IntEnum):
    """Exit codes of a sweep."""

    DONE = 0
    FAILURES = 1
    USAGE = 2
    TIME_LIMIT = 75  # EX_TEMPFAIL: queue systems start the job again
    INTERRUPTED = 130
    TERMINATED = 143


class Engine(Protocol):
    """What the driver asks of an engine; see `zoology.engines.local`."""

    slots: int
    free: int

    @property
    def built(self) -> Collection[str] | None: ...
    def fits(self, point_id: str, needs: float) -> bool: ...
    def start(self, run_id: str, point_id: str, config_json: str, needs: float) -> None: ...
    def poll(self, timeout: float) -> list[Event]: ...
    def stop(self) -> None: ...


class View(Protocol):
    """Who watches a sweep; see `zoology.runner.progress`."""

    def begin(self, progress: Progress) -> None: ...
    def started(self, run: PlannedRun, worker: int) -> None: ...
    def epoch(self, run: PlannedRun, epoch: dict[str, Any]) -> None: ...
    def finished(self, run: PlannedRun, record: dict[str, Any] | None, message: str) -> None: ...
    def note(self, message: str) -> None: ...
    def tick(self) -> None: ...
    def end(self) -> None: ...


class DeviceShare:
    """What a run had of its device's time beside others, over all its attempts.

    Each counts by the training time of the epochs that were kept of it. `before` has the metrics of earlier attempts:
    an epoch that is reported again, by its seconds the very same, comes from a checkpoint.
    """

    def __init__(self, before: Iterable[dict[str, Any]] = ()):
        self._before = {(line.get("epoch"), line.get("train_seconds")): line.get("device_share") for line in before}
        self._seconds = 0.0  # in training so far
        self._kept = (0.0, 0.0)  # of them, those in the checkpoint, and the share of those

    def add(self, epoch: dict[str, Any], share: float) -> float:
        """The run's share up to this epoch, `share` being that of the attempt at hand."""
        self._seconds += epoch["train_seconds"]
        if (kept := self._before.get((epoch["epoch"], epoch["train_seconds"]))) is not None:
            self._kept = (self._seconds, kept)
        return self.total(share)

    def total(self, share: float) -> float:
        """The run's share, `share` being that of the attempt at hand."""
        seconds, kept = self._kept
        return share if seconds == 0 else share + (kept - share) * seconds / self._seconds


@dataclass
class Active:
    """A run in progress."""

    run: PlannedRun
    folder: store.RunFolder
    attempt: int = 1
    worker: int | None = None
    since: float = field(default_factory=time.monotonic)
    epoch: dict[str, Any] | None = None
    share: DeviceShare = field(default_factory=DeviceShare)

    @property
    def fraction(self) -> float:
        """How far it is, in epochs."""
        return 0.0 if self.epoch is None else self.epoch["epoch"] / self.run.config.train.epochs


@dataclass
class Progress:
    """The state of a sweep, for whoever shows it."""

    total: int
    done: int
    failed: int
    pending: deque[PlannedRun]
    active: dict[str, Active]
    estimate: Estimate
    slots: int

    def seconds_left(self) -> float | None:
        """A guess from the runs measured so far, or None while nothing is known."""
        now = time.monotonic()
        running = []
        for active in self.active.values():
            total = self.estimate.seconds(active.run)
            elapsed = now - active.since
            if active.fraction > 0:
                running.append(elapsed / active.fraction * (1 - active.fraction))
            elif total is not None:
                running.append(max(0.0, total - elapsed))
        waiting = [self._seconds(run) for run in self.pending]
        if any(seconds is None for seconds in waiting) or (not running and not waiting):
            return None
        return max([*running, (sum(running) + sum(waiting)) / self.slots])

    def _seconds(self, run: PlannedRun) -> float | None:
        if (known := self.estimate.seconds(run)) is not None:
            return known
        rates = [
            (time.monotonic() - active.since) / active.fraction / max(active.run.cost, 1.0)
            for active in self.active.values()
            if active.fraction > 0
        ]
        return run.cost * sum(rates) / len(rates) if rates else None


class SweepOutcome(NamedTuple):
    """How a sweep ended."""

    exit: Exit
    records: dict[str, dict[str, Any]]  # new results, by run id
    failures: dict[str, str]  # new failures, by run id


def run_sweep(
    runs: Iterable[PlannedRun],
    engine: Engine,
    directory: Path,
    view: View,
    *,
    total: int,
    done: int = 0,
    estimate: Estimate | None = None,
    memory: MemoryEstimate | None = None,
    retries: int = 1,
    time_limit: float | None = None,
    stop: Callable[[], Exit | None] = lambda: None,
) -> SweepOutcome:
    """Execute `runs`, longest first, and write their files.

    Args:
        total, done: size of the whole plan and how much of it is done already, for the view.
        estimate, memory: what is known of times and memory from earlier runs.
        retries: how often a run is tried again whose worker died.
        time_limit: seconds after which runs in progress are given up and the sweep ends with Exit.TIME_LIMIT.
        stop: asked several times a second for a reason to end now, such as `Signals`.

    However it ends, what is finished stays, and the next call with the runs that are left goes on.
    """
    estimate = estimate or Estimate()
    pending = deque(longest_first(runs, estimate.seconds))
    progress = Progress(total, done, 0, pending, {}, estimate, engine.slots)
    sweep = _Sweep(engine, directory, view, progress, memory or MemoryEstimate(), retries)
    deadline = float("inf") if time_limit is None else time.monotonic() + time_limit
    view.begin(progress)
    try:
        reason = sweep.loop(lambda: stop() or (Exit.TIME_LIMIT if time.monotonic() >= deadline else None))
    finally:
        engine.stop()
        view.end()
    if reason is Exit.DONE and sweep.failures:
        reason = Exit.FAILURES
    return SweepOutcome(reason, sweep.records, sweep.failures)


class Signals:
    """Turns Ctrl-C and SIGTERM into a reason to stop, so that no file is left half-way; the second ends at once."""

    def __init__(self):
        self.reason: Exit | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> Exit | None:
        return self.reason

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self.reason is not None:
            raise KeyboardInterrupt
        self.reason = Exit.INTERRUPTED if number == signal.SIGINT else Exit.TERMINATED


class _Sweep:
    def __init__(
        self,
        engine: Engine,
        directory: Path,
        view: View,
        progress: Progress,
        memory: MemoryEstimate,
        retries: int,
    ):
        self.engine = engine
        self.directory = directory
        self.view = view
        self.progress = progress
        self.memory = memory
        self.retries = retries
        self.records: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.timed: set[str] = set()  # architectures of which a run finished here
        self.run_seconds: dict[str, float] = {}  # by point: of its quickest run here, less what building it took
        self.rebuild_seconds: float | None = None  # what it takes at least to build a model whose code is on the disk

    def loop(self, stop: Callable[[], Exit | None]) -> Exit:
        progress = self.progress
        while progress.pending or progress.active:
            if (reason := stop()) is not None:
                return reason
            while progress.pending and self.engine.free and (run := self._next()) is not None:
                self._start(run)
            for event in self.engine.poll(0.2):
                self._handle(event)
            self.view.tick()
        return Exit.DONE

    def _next(self) -> PlannedRun | None:
        """The longest run that fits into memory beside those in progress; None if all have to wait.

        Where models are compiled, a run of a model that a free worker has goes first, then of one that nobody is at
        work on, then of one that another worker has compiled: its code is on the disk then. At the end of a sweep that
        is left to the others if they are done with it before it would be built once more.
        """
        pending, built = self.progress.pending, self.engine.built
        if built is None:
            choices = iter(range(len(pending)))
        else:
            at_work = {active.run.point_id for active in self.progress.active.values()}
            choices = itertools.chain(
                (index for index, run in enumerate(pending) if run.point_id in built),
                (index for index, run in enumerate(pending) if run.point_id not in at_work),
                self._to_be_built_again(),
            )
        refused: set[str] = set()
        for index in choices:
            run = pending[index]
            if run.point_id in refused:
                continue
            if self.engine.fits(run.point_id, self.memory.bytes(run)):
                del pending[index]
                return run
            refused.add(run.point_id)
        return None

    def _to_be_built_again(self) -> Iterator[int]:
        """Pending runs of models that another worker has compiled, where that one is busy with them for long.

        That is for longer than a build from the disk takes, as far as that is known.
        """
        progress, waiting = self.progress, Counter()
        workers = Counter(active.run.point_id for active in progress.active.values())
        compiled = {active.run.point_id for active in progress.active.values() if active.epoch is not None}
        compiled.update(point for point in workers if point in self.run_seconds)
        for run in progress.pending:
            if run.point_id in compiled:
                waiting[run.point_id] += self.run_seconds.get(run.point_id, math.inf)
        worth = {point for point, seconds in waiting.items() if seconds > (self.rebuild_seconds or 0) * workers[point]}
        yield from (index for index, run in enumerate(progress.pending) if run.point_id in worth)

    def _start(self, run: PlannedRun) -> None:
        folder = store.RunFolder(self.directory, run.run_id)
        active = self.progress.active[run.run_id] = Active(run, folder)
        try:
            folder.begin(run.config)
        except OSError as error:
            self._fail(run.run_id, Failure("crashed", f"cannot write its files: {error}"))
            return
        self._give(active)

    def _give(self, active: Active) -> None:
        run, active.share = active.run, DeviceShare(active.folder.epochs())
        self.engine.start(run.run_id, run.point_id, run.config.model_dump_json(), self.memory.bytes(run))

    def _handle(self, event: Event) -> None:
        active = self.progress.active[event.run_id]
        if isinstance(event, Started):
            active.worker, active.since = event.worker, time.monotonic()
            self.view.started(active.run, event.worker)
        elif isinstance(event, EpochDone):
            active.epoch = event.epoch
            if event.peak_memory is not None:
                self.memory.observe(active.run, event.peak_memory, whole=False)
            # On a full disk it is the result that decides whether the run is kept.
            with suppress(OSError):
                share = active.share.add(event.epoch, event.device_share)
                active.folder.add_epoch(event.epoch | {"device_share": share})
            self.view.epoch(active.run, event.epoch)
        elif isinstance(event, Crowded):
            self.memory.crowded(active.run)
            self.progress.pending.appendleft(self.progress.active.pop(event.run_id).run)
            self.view.note(f"{active.run.label}: {event.message}")
        elif event.record is not None:
            self._finish(active, event)
        elif event.failure.kind == "crashed" and active.attempt <= self.retries:
            self._retry(active)
        else:
            tries = f" ({active.attempt} attempts)" if active.attempt > 1 else ""
            self._fail(event.run_id, event.failure._replace(message=event.failure.message + tries))

    def _finish(self, active: Active, event: Finished) -> None:
        record = event.record | {"device_share": active.share.total(event.device_share)}
        try:
            active.folder.finish(record)
        except OSError as error:
            self._fail(event.run_id, Failure("crashed", f"finished, but its result cannot be written: {error}"))
            return
        self.records[event.run_id] = record
        self._learn_build(active.run.point_id, record["wall_seconds"], record["execution"]["build_seconds"])
        self._learn_seconds(active.run, record["wall_seconds"])
        if event.peak_memory is not None:
            self.memory.observe(active.run, event.peak_memory, whole=True)
        self._leave(active, record, "")

    def _learn_build(self, point_id: str, wall: float, build: float) -> None:
        if build > 0:
            again = build * (1 if point_id in self.run_seconds else WARM_SHARE)
            self.rebuild_seconds = min(again, self.rebuild_seconds or again)
        self.run_seconds[point_id] = min(wall - build, self.run_seconds.get(point_id, math.inf))

    def _learn_seconds(self, run: PlannedRun, seconds: float) -> None:
        """What is longest is known better once an architecture was timed: its operations say little about that."""
        estimate, pending = self.progress.estimate, self.progress.pending
        estimate.observe(run, seconds)
        if run.config.architecture not in self.timed:
            self.timed.add(run.config.architecture)
            ordered = longest_first(pending, estimate.seconds)
            pending.clear()
            pending.extend(ordered)

    def _retry(self, active: Active) -> None:
        active.attempt += 1
        active.epoch, active.worker, active.since = None, None, time.monotonic()
        self._give(active)

    def _fail(self, run_id: str, failure: Failure) -> None:
        active = self.progress.active[run_id]
        self.failures[run_id] = failure.message
        # What broke the run from inside would break it again; what came from outside may be gone next time.
        keep = failure.kind in ("crashed", "timed out", "out of memory")
        # Where it cannot be written, the list of failures at the end still has it.
        with suppress(OSError):
            active.folder.fail(failure.message, failure.details, keep_checkpoint=keep)
        self.progress.failed += 1
        self._leave(active, None, failure.message)

    def _leave(self, active: Active, record: dict[str, Any] | None, message: str) -> None:
        del self.progress.active[active.run.run_id]
        self.progress.done += 1
        self.view.finished(active.run, record, message)


def partition(
    runs: Sequence[PlannedRun], found: store.Scan, rerun: str | None
) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """What is still to do, and the failed runs that are left alone; `rerun` is None, "failed" or "all"."""
    todo, failed = [], []
    for run in runs:
        if rerun == "all":
            todo.append(run)
        elif run.run_id in found.finished:
            continue
        elif run.run_id in found.failed and rerun != "failed":
            failed.append(run)
        else:
            todo.append(run)
    return todo, failed
