"""What a sweep shows while it runs: a live table on a terminal, one line per finished run elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zoology.runner.driver import Progress, View
from zoology.runner.plan import PlannedRun


def make_view(console: Console) -> View:
    """A live view on a terminal, plain lines elsewhere."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def time_left(seconds: float | None) -> str:
    """What is left, for people; None where nothing is known to tell it from."""
    return "time left unknown" if seconds is None else f"{duration(seconds)} left"


class PlainView:
    """One line when a run ends."""

    def __init__(self, console: Console):
        self.console = console

    def begin(self, progress: Progress) -> None:
        self.progress = progress

    def started(self, run: PlannedRun, worker: int) -> None:
        pass

    def epoch(self, run: PlannedRun, epoch: dict[str, Any]) -> None:
        pass

    def finished(self, run: PlannedRun, record: dict[str, Any] | None, message: str) -> None:
        progress = self.progress
        if record is None:
            said = f"FAILED: {message}"
        else:
            accuracies = [part["validation"]["accuracy"] for part in record["slices"]]
            mean = sum(accuracies) / len(accuracies)
            how = record["execution"]
            built = how["build_seconds"]
            said = f"validation {mean:.3f}, {record['epochs']} epochs, {duration(record['wall_seconds'])}"
            said += f", {duration(built)} of them to compile" if built >= 1 else ""
            said += f"; ran {how['mode']} because of {how['reason']}" if how["reason"] else ""
        width = len(str(progress.total))
        left = f"; {time_left(progress.seconds_left())}" if progress.pending or progress.active else ""
        self._print(f"[{progress.done:{width}}/{progress.total}] {run.label}: {said}{left}")

    def note(self, message: str) -> None:
        self._print(message)

    def tick(self) -> None:
        pass

    def end(self) -> None:
        pass

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveView(PlainView):
    """A progress bar, and one line per worker: its run, epoch, validation accuracy and time."""

    def begin(self, progress: Progress) -> None:
        super().begin(progress)
        self.since = time.monotonic()
        # Drawn from `tick` alone: a refresh thread would read the sweep's state while it changes.
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.live.start()
        self._drawn = 0.0

    def tick(self) -> None:
        if time.monotonic() - self._drawn > 0.25:
            self.live.update(self._render(), refresh=True)
            self._drawn = time.monotonic()

    def end(self) -> None:
        self.live.stop()

    def _render(self) -> Group:
        progress = self.progress
        head = Table.grid(padding=(0, 2))
        failed = f", {progress.failed} failed" if progress.failed else ""
        head.add_row(
            ProgressBar(total=progress.total, completed=progress.done, width=30),
            Text(f"{progress.done}/{progress.total} runs{failed}"),
            Text(f"{duration(time.monotonic() - self.since)} so far, {time_left(progress.seconds_left())}"),
        )
        rows = Table(box=None, pad_edge=False)
        for title in ("worker", "run", "epoch", "validation", ""):
            rows.add_column(title, justify="left" if title == "run" else "right")
        for active in sorted(progress.active.values(), key=lambda active: (active.worker is None, active.worker)):
            epoch = active.epoch or {"epoch": 0}
            accuracy = epoch.get("validation_accuracy")
            rows.add_row(
                "" if active.worker is None else str(active.worker),
                Text(active.run.label),
                f"{epoch['epoch']}/{active.run.config.train.epochs}",
                "" if accuracy is None else f"{accuracy:.3f}",
                "starting" if active.worker is None else duration(time.monotonic() - active.since),
            )
        return Group(head, rows)
