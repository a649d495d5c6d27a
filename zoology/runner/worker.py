"""What runs inside a worker: one run at a time, from a config as JSON to a record as JSON."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import architectures
import zoology
from architectures import backends
from zoology import tasks
from zoology.checkpoint import read_checkpoint
from zoology.config import SCHEMA_VERSION, DataConfig, RunConfig
from zoology.data import load_split
from zoology.evaluate import Score
from zoology.runner import store
from zoology.runner.plan import load_module
from zoology.train import Outcome, TrainingDiverged, train


class Setup(NamedTuple):
    """What a worker needs to know once; sent to it as it starts."""

    device: str
    threads: int
    directory: str  # the results directory, for cached baselines
    architectures: tuple[str, ...]  # files of --architectures
    experiment: str | None  # its file, which may register tasks and architectures too
    git: dict[str, Any] | None


class Failure(NamedTuple):
    """Why a run has no result."""

    kind: str  # "diverged", "out of memory", "error", "crashed", "timed out"
    message: str
    details: str = ""


class Memory(NamedTuple):
    """Bytes that a worker's process took from the memory of its GPU, beside what CUDA itself needs for a process."""

    peak: int  # at most, since its latest run started
    held: int  # now


def prepare(setup: Setup) -> None:
    """Threads and registrations of a fresh worker."""
    torch.set_num_threads(setup.threads)
    for path in setup.architectures:
        _load_architectures(path)
    if setup.experiment is not None:
        _load_experiment(setup.experiment)


_load_architectures = functools.cache(architectures.load_file)
_load_experiment = functools.cache(load_module)


def attempt(
    setup: Setup, config_json: str, on_epoch: Callable[[dict[str, Any]], Any]
) -> tuple[dict[str, Any] | None, Failure | None]:
    """`execute`, with whatever it raises turned into a Failure."""
    try:
        prepare(setup)
        return execute(setup, RunConfig(**json.loads(config_json)), on_epoch), None
    except TrainingDiverged as error:
        return None, Failure("diverged", str(error))
    except MemoryError as error:
        return None, Failure("out of memory", f"out of memory: {error}", traceback.format_exc())
    except torch.OutOfMemoryError as error:
        memory = read_memory(setup.device)
        taken = f" with {memory.peak / 1e9:.1f} GB taken" if memory else ""
        return None, Failure("out of memory", f"out of memory{taken}: {error}", traceback.format_exc())
    except (Exception, SystemExit) as error:
        return None, Failure("error", f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        # The next run finds the memory of this one free. On a CPU the collector does that in its own time.
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()


def execute(setup: Setup, config: RunConfig, on_epoch: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Train one run and return its record: the content of result.json."""
    started = time.perf_counter()
    checkpoint = store.RunFolder(Path(setup.directory), config.run_id).checkpoint
    _delete_unreadable(checkpoint, config.run_id)
    floors = {part.label: _floors(part.task, config.data.seed, setup.directory) for part in config.data.test}
    reset_peak = _reset_peak_memory()
    outcome = train(
        config,
        device=setup.device,
        on_epoch=lambda epoch: on_epoch(epoch._asdict()),
        load=lambda data, split: _load_split(data, split, setup.device),
        checkpoint=checkpoint,
    )
    peak = outcome.peak_memory_bytes if outcome.peak_memory_bytes is not None or not reset_peak else _peak_memory()
    return record(setup, config, outcome, floors) | {
        "peak_memory_bytes": peak,
        # Of a resumed run, at least what is known of its earlier attempts.
        "wall_seconds": max(time.perf_counter() - started, outcome.train_seconds),
        "resumed": outcome.resumed,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _delete_unreadable(checkpoint: Path, run_id: str) -> None:
    """A run whose checkpoint cannot be read starts anew."""
    try:
        read_checkpoint(checkpoint, run_id)
    except ValueError:
        checkpoint.unlink(missing_ok=True)


# Three splits of the config at hand and of the one before: runs of a sweep share their data.
@functools.lru_cache(maxsize=6)
def _load_split(config: DataConfig, split: str, device: str) -> list:
    return [(part, data.to(device)) for part, data in load_split(config, split)]


def _floors(task: tasks.Task, seed: int, directory: str) -> dict[str, float]:
    """Baselines of a task, computed once for all runs and workers of a results directory."""
    identity = json.dumps([task.identity(), seed], sort_keys=True)
    path = Path(directory, "baselines", hashlib.sha256(identity.encode()).hexdigest()[:16] + ".json")
    if identity not in _known_floors:
        try:
            _known_floors[identity] = json.loads(path.read_text())["accuracy"]
        except (OSError, ValueError, KeyError):
            _known_floors[identity] = tasks.baselines(task, seed=seed)
    if not path.exists():
        content = {"task": task.config(), "seed": seed, "accuracy": _known_floors[identity]}
        # On a full disk the next worker computes them again.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            store.write_atomically(path, store.to_json(content))
    return _known_floors[identity]


_known_floors: dict[str, dict[str, float]] = {}


def record(setup: Setup, config: RunConfig, outcome: Outcome, floors: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Everything a result states but times and memory."""
    model, hashes = outcome.model, config.data.hashes()
    lengths = sorted({part.task.seq_len for part in config.data.test})
    state = {
        str(length): {
            "elements": model.state_size(length),
            "bytes": model.state_bytes(length),
            "fields": model.state_fields(length),
        }
        for length in lengths
    }
    slices = [
        {
            "name": part.label,
            "task": part.task.config(),
            "seq_len": part.task.seq_len,
            "required_bits": part.task.required_bits(),
            "answers": getattr(part.task, "num_questions", None),
            "validation": _score(outcome.validation[part.label]),
            "test": _score(outcome.test[part.label]),
            "baselines": floors[part.label],
            "validation_hash": hashes["validation"][index],
            "test_hash": hashes["test"][index],
        }
        for index, part in enumerate(config.data.test)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": config.run_id,
        "point_id": config.point_id,
        "architecture": config.architecture,
        "config": config.model_dump(mode="json"),
        "train_hashes": hashes["train"],
        "slices": slices,
        "state": state,
        "parameters": model.num_parameters(),
        "device": _device(setup.device),
        "threads": torch.get_num_threads(),
        "precision": config.train.precision,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backends": outcome.backends,
        "execution": outcome.execution._asdict(),
        "versions": versions(),
        "git": setup.git,
        "train_seconds": outcome.train_seconds,
        "waited_seconds": outcome.waited_seconds,
        "examples_per_second": outcome.examples_per_second,
        "epochs": len(outcome.epochs),
        "selected_epoch": outcome.selected_epoch,
        "stopped_early": outcome.stopped_early,
    }


def _score(score: Score) -> dict[str, Any]:
    return {"accuracy": score.accuracy, "stderr": score.stderr, "num_examples": score.num_examples}


def _device(device: str) -> dict[str, str]:
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or platform.machine()
    return {"type": kind, "name": name}


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers: of backends' libraries, those that are installed."""
    libraries = [name for library in backends.LIBRARIES.values() if library for name in library.distributions]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": backends.installed("triton"),
        "numpy": np.__version__,
        "zoology": zoology.__version__,
    } | {name: version for name in libraries if (version := backends.installed(name))}


def read_memory(device: str) -> Memory | None:
    """What this process holds of its GPU; None on a CPU, and where the GPU does not answer any more."""
    if torch.device(device).type != "cuda":
        return None
    try:
        return Memory(torch.cuda.max_memory_reserved(device), torch.cuda.memory_reserved(device))
    except RuntimeError:
        return None


def _reset_peak_memory() -> bool:
    """Forget the process's peak memory of earlier runs, where the system allows it (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _peak_memory() -> int | None:
    """Peak resident memory of this process in bytes."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def serve(connection, setup: Setup, log: str) -> None:
    """Main loop of a worker process: takes (run id, config), sends messages until the driver hangs up.

    Messages are ("ready",), ("started", run id), ("epoch", run id, epoch, memory) and ("done", run id, record, failure,
    memory), with the `Memory` of its device.
    """
    import faulthandler
    import multiprocessing
    import signal
    import threading

    # Ctrl-C reaches the whole process group; what it means is the driver's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _redirect_output(log)
    faulthandler.enable()

    def leave_with_driver() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_driver, daemon=True).start()
    connection.send(("ready",))
    while True:
        try:
            run_id, config_json = connection.recv()
        except EOFError:
            return
        connection.send(("started", run_id))

        def on_epoch(epoch: dict[str, Any], run_id: str = run_id) -> None:
            connection.send(("epoch", run_id, epoch, read_memory(setup.device)))

        result, failure = attempt(setup, config_json, on_epoch)
        connection.send(("done", run_id, result, failure, read_memory(setup.device)))


def _redirect_output(log: str) -> None:
    """Send what the run, or a library, prints to a file: the terminal belongs to the progress display."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
