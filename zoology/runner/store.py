"""The results directory: who writes what, so that a kill at any moment leaves nothing half-written.

    DIR/<run id>/config.json     the run's config, written before it starts
    DIR/<run id>/metrics.jsonl   one line per epoch
    DIR/<run id>/result.json     written last and atomically: it exists if and only if the run finished
    DIR/<run id>/error.txt       why a run failed
    DIR/<run id>/checkpoint.pt   its state after the last epoch, until it is finished
    DIR/<run id>/earlier/        result and metrics that a rerun is to replace, until it is finished
    DIR/baselines/, DIR/logs/    scores of predictors that cannot recall, output of the workers

One process, the driver, writes all of them but the checkpoint, baselines and logs.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from pydantic_core import from_json

from zoology.config import SCHEMA_VERSION, RunConfig

RUN_ID = re.compile(r"[0-9a-f]{12}")
REQUIRED = ("run_id", "point_id", "architecture", "config", "slices", "state", "parameters")


class ResultsError(ValueError):
    """A results directory that cannot be used; the message says why and what to do."""


class Scan(NamedTuple):
    """What a results directory holds, by run id."""

    finished: dict[str, dict[str, Any]]  # the parsed result.json
    failed: dict[str, str]  # first line of error.txt
    broken: dict[str, str]  # why result.json cannot be used


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or what it held before, also when the disk fills up."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as the standard has it: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_result(path: Path | str, run_id: str) -> dict[str, Any] | None:
    """A checked result.json, or None if there is none.

    Raises ResultsError for another schema version, and ValueError for a file that is broken or of another run.
    """
    try:
        with open(path, "rb") as file:
            record = from_json(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot be read ({error})") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON, probably truncated ({error})") from None
    if not isinstance(record, dict) or "schema_version" not in record:
        raise ValueError("is not a result of this program: it has no schema_version")
    if record["schema_version"] != SCHEMA_VERSION:
        raise ResultsError(
            f"{path} has schema version {record['schema_version']!r}, this program reads version {SCHEMA_VERSION}: "
            "read it with the version that wrote it, or take another results directory"
        )
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    if record["run_id"] != run_id:
        raise ValueError(f"is the result of run {record['run_id']!r}")
    return record


def scan(directory: Path | str) -> Scan:
    """Read every run of a results directory.

    Raises ResultsError for a directory that cannot be read or holds results of another schema version.
    """
    found = Scan({}, {}, {})
    try:
        entries = sorted(entry.name for entry in os.scandir(directory) if RUN_ID.fullmatch(entry.name))
    except OSError as error:
        raise ResultsError(f"results directory {directory}: {error.strerror or error}") from None
    with no_garbage_collection():
        _read_runs(directory, entries, found)
    return found


def _read_runs(directory: Path | str, run_ids: Iterable[str], found: Scan) -> None:
    for run_id in run_ids:
        folder = os.path.join(directory, run_id)
        try:
            record = read_result(os.path.join(folder, "result.json"), run_id)
        except ResultsError:
            raise
        except ValueError as error:
            found.broken[run_id] = str(error)
            continue
        if record is not None:
            found.finished[run_id] = record
        elif (error_text := _read_error(folder)) is not None:
            found.failed[run_id] = error_text


@contextmanager
def no_garbage_collection():
    """Millions of small objects that all stay: collecting among them takes longer than reading them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_error(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, "error.txt"), encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return None


def open_directory(directory: Path) -> FileLock:
    """Create `directory` if need be, check that it can be written, and lock it against a second sweep.

    The lock goes with the process that holds it, however that ends. Raises ResultsError.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe", suffix=".tmp") as probe:
            probe.write(b"x")
            probe.flush()
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultsError(f"--out {directory}: another sweep is writing there; wait for it, or stop it") from None
    except OSError as error:
        raise ResultsError(f"--out {directory} cannot be written: {error.strerror or error}") from None
    return lock


def set_aside(directory: Path, run_ids: Iterable[str]) -> int:
    """Make runs ones that were never started; returns how many results are kept in earlier/ until they are replaced.

    Raises ResultsError.
    """
    try:
        return sum([RunFolder(directory, run_id).set_aside() for run_id in run_ids])
    except OSError as error:
        raise ResultsError(f"results in {directory} cannot be set aside: {error}") from None


class RunFolder:
    """The files of one run, as the driver writes them."""

    def __init__(self, directory: Path, run_id: str):
        self.path = directory / run_id

    @property
    def checkpoint(self) -> Path:
        """Where the run's worker keeps its state after an epoch."""
        return self.path / "checkpoint.pt"

    @property
    def _earlier(self) -> Path:
        return self.path / "earlier"

    def set_aside(self) -> bool:
        """Make the run one that was never started; a result is kept in earlier/. Returns whether there is one."""
        for path in (self.path / "error.txt", self.checkpoint):
            path.unlink(missing_ok=True)
        if (self.path / "result.json").exists():
            shutil.rmtree(self._earlier, ignore_errors=True)
            self._earlier.mkdir(exist_ok=True)
            for name in ("result.json", "metrics.jsonl"):
                with suppress(FileNotFoundError):
                    os.replace(self.path / name, self._earlier / name)
        return self._earlier.exists()

    def begin(self, config: RunConfig) -> None:
        """Forget the outcome of an earlier attempt, but for its checkpoint and what led to that; write config.json."""
        self.path.mkdir(exist_ok=True)
        for name in ("result.json", "error.txt", *(() if self.checkpoint.exists() else ("metrics.jsonl",))):
            (self.path / name).unlink(missing_ok=True)
        for left in self.path.glob("*.tmp"):
            left.unlink(missing_ok=True)
        write_atomically(self.path / "config.json", to_json(config.model_dump(mode="json"), indent=1) + "\n")

    def add_epoch(self, epoch: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; the first epoch, with which every attempt begins, starts the file anew."""
        with open(self.path / "metrics.jsonl", "w" if epoch["epoch"] == 1 else "a", encoding="utf-8") as file:
            file.write(to_json(epoch) + "\n")

    def epochs(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to one that was cut off."""
        lines: list[dict[str, Any]] = []
        with suppress(OSError, ValueError), open(self.path / "metrics.jsonl", encoding="utf-8") as file:
            lines.extend(json.loads(line) for line in file)
        return lines

    def finish(self, record: dict[str, Any]) -> None:
        """Write result.json, which makes the run finished."""
        write_atomically(self.path / "result.json", to_json(record) + "\n")
        self.checkpoint.unlink(missing_ok=True)
        shutil.rmtree(self._earlier, ignore_errors=True)

    def fail(self, message: str, details: str = "", *, keep_checkpoint: bool = False) -> None:
        """Write error.txt: the reason on the first line, then what is known beyond it."""
        if not keep_checkpoint:
            self.checkpoint.unlink(missing_ok=True)
        first = " ".join(message.split())
        write_atomically(self.path / "error.txt", f"{first}\n\n{details}".rstrip() + "\n")
