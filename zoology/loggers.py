"""Optional loggers beside the results directory: Weights & Biases, TensorBoard. Results never depend on them.

Each is told of epochs and results by the driver, and imported only here, when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoology.runner.driver import Progress, View
from zoology.runner.plan import PlanError, PlannedRun


class TensorBoard:
    """Scalars of every run under DIR/tensorboard/<run id>."""

    def __init__(self, directory: Path):
        module = _import("torch.utils.tensorboard", "tensorboard")
        self.directory, self._make, self._writers = directory / "tensorboard", module.SummaryWriter, {}

    def epoch(self, run: PlannedRun, epoch: dict[str, Any]) -> None:
        writer = self._writers.get(run.run_id) or self._make(str(self.directory / run.run_id))
        self._writers[run.run_id] = writer
        for name, value in _scalars(epoch).items():
            writer.add_scalar(name, value, epoch["epoch"])

    def finished(self, run: PlannedRun, record: dict[str, Any] | None) -> None:
        if (writer := self._writers.pop(run.run_id, None)) is not None:
            for part in (record or {}).get("slices", ()):
                writer.add_scalar(f"test/{part['name']}", part["test"]["accuracy"], record["epochs"])
            writer.close()


class WandB:
    """A Weights & Biases run for every run; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, directory: Path):
        self._wandb, self.directory, self._open = _import("wandb", "wandb"), directory, {}

    def epoch(self, run: PlannedRun, epoch: dict[str, Any]) -> None:
        if run.run_id not in self._open:
            self._open[run.run_id] = self._wandb.init(
                project="zoology",
                id=run.run_id,
                name=run.label,
                group=run.config.architecture,
                config=run.config.model_dump(mode="json"),
                dir=str(self.directory),
                reinit="create_new",
                resume="allow",
                settings={"silent": True},
            )
        self._open[run.run_id].log(_scalars(epoch), step=epoch["epoch"])

    def finished(self, run: PlannedRun, record: dict[str, Any] | None) -> None:
        if (opened := self._open.pop(run.run_id, None)) is not None:
            for part in (record or {}).get("slices", ()):
                opened.summary[f"test/{part['name']}"] = part["test"]["accuracy"]
            opened.finish(exit_code=0 if record else 1)


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}


def make_loggers(names: str | None, directory: Path) -> list[Any]:
    """Loggers from "wandb,tensorboard". Raises PlanError for an unknown name or a library that is missing."""
    wanted = [name for name in (names or "").split(",") if name]
    unknown = [name for name in wanted if name not in LOGGERS]
    if unknown:
        raise PlanError(f"--log {','.join(unknown)}: must be among {', '.join(LOGGERS)}")
    return [LOGGERS[name](directory) for name in wanted]


class LoggedView:
    """A view that tells loggers too. A logger that raises is dropped with a note: the sweep goes on."""

    def __init__(self, view: View, loggers: Sequence[Any]):
        self._view, self._loggers = view, list(loggers)

    def begin(self, progress: Progress) -> None:
        self._view.begin(progress)

    def started(self, run: PlannedRun, worker: int) -> None:
        self._view.started(run, worker)

    def epoch(self, run: PlannedRun, epoch: dict[str, Any]) -> None:
        self._view.epoch(run, epoch)
        self._tell("epoch", run, epoch)

    def finished(self, run: PlannedRun, record: dict[str, Any] | None, message: str) -> None:
        self._view.finished(run, record, message)
        self._tell("finished", run, record)

    def note(self, message: str) -> None:
        self._view.note(message)

    def tick(self) -> None:
        self._view.tick()

    def end(self) -> None:
        self._view.end()

    def _tell(self, what: str, *content: Any) -> None:
        for logger in list(self._loggers):
            try:
                getattr(logger, what)(*content)
            except Exception as error:
                self._loggers.remove(logger)
                self._view.note(f"{type(logger).__name__} is left out from here on: {type(error).__name__}: {error}")


def _scalars(epoch: dict[str, Any]) -> dict[str, float]:
    """The numbers of an epoch, by the names they are logged under."""
    named = {key: epoch[key] for key in ("loss", "lr", "validation_accuracy", "examples_per_second")}
    return named | {f"validation/{name}": accuracy for name, accuracy in epoch["validation"].items()}


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlanError(f"--log {package}: it is not installed: pip install 'zoology[loggers]'") from error
