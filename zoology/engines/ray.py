"""A Ray cluster of any size as an engine: every run is a Ray task, and the driver alone writes results.

The only module that imports Ray. Tasks may run on other machines, so nothing goes through a shared disk: epochs
and records come back as messages, and the experiment and --architectures files travel as text. Every node needs this
package installed. Ray finds a place for each run, and another one if its worker or node is lost.
"""

from __future__ import annotations

import hashlib
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoology.engines.local import EpochDone, Event, Finished, Started
from zoology.runner import store
from zoology.runner.plan import PlanError
from zoology.runner.worker import Failure, Setup, attempt

CONNECT_SECONDS = 5.0
OBJECT_STORE_BYTES = 200_000_000  # of a cluster of our own: records are small, and /dev/shm often is too


class RayEngine:
    """Runs on a Ray cluster: as many at once as it has GPUs times `jobs`, or CPUs where there is no GPU.

    `setups` are those of local workers: their device decides whether GPUs are used, their number is the size of a
    cluster started here, where no `address` is given. Raises PlanError without Ray, or for an address where none is.
    """

    def __init__(
        self, setups: Sequence[Setup], *, address: str | None = None, jobs: int = 1, timeout: float | None = None
    ):
        self._ray = ray = _import_ray()
        self._connect(address, len(setups))
        self._setup = setups[0]
        self._files = {path: Path(path).read_text() for path in _paths(self._setup)}
        self._on_gpu = "GPU" in ray.cluster_resources() and (address is not None or setups[0].device != "cpu")
        self._jobs = jobs
        self._timeout = timeout
        resources = {"num_gpus": 1 / jobs, "num_cpus": 1} if self._on_gpu else {"num_cpus": 1}
        # Whether a lost run is tried again is for the driver to say: it counts attempts and writes them down.
        self._task = ray.remote(_execute).options(max_retries=0, **resources)
        # Where the driver is: no other node that is lost takes it along.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        self._refs: dict[Any, str] = {}
        self._deadlines: dict[str, float] = {}

    def _connect(self, address: str | None, cpus: int) -> None:
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        if address is None:
            self._ray.init(address="local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, **quiet)
            return
        _check_answers(address)
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PlanError(f"--address {address}: no Ray cluster answers there ({error})") from error

    @property
    def slots(self) -> int:
        """How many runs the cluster executes at once; it may grow and shrink."""
        found = self._ray.cluster_resources()
        return max(1, int(found.get("GPU", 0) * self._jobs if self._on_gpu else found.get("CPU", 1)))

    @property
    def free(self) -> int:
        """How many more runs can be started now."""
        return max(0, self.slots - len(self._refs))

    @property
    def built(self) -> None:
        """Which worker gets a run is Ray's choice, so no point is preferred."""
        return None

    def fits(self, point_id: str, needs: float) -> bool:
        """Ray gives each run the share of a GPU that `jobs` says, whatever it needs."""
        return True

    def start(self, run_id: str, point_id: str, config_json: str, needs: float) -> None:
        """Hand a run to the cluster."""
        device = "cuda:0" if self._on_gpu else "cpu"  # Ray shows a task the GPU it was given as its only one
        ref = self._task.remote(self._mailbox, self._setup._replace(device=device), self._files, run_id, config_json)
        self._refs[ref] = run_id

    def poll(self, timeout: float) -> list[Event]:
        """What happened, after waiting for at most `timeout` seconds for a run to end."""
        ended, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=timeout) if self._refs else ([], [])
        # Messages are read after the ends: what a run said comes before its end.
        events = [event for event in self._messages() if event.run_id in self._refs.values()]
        for ref in ended:
            run_id = self._refs.pop(ref)
            self._deadlines.pop(run_id, None)
            events.append(Finished(run_id, *self._outcome(ref), device_share=self._share))
        return events + self._give_up_late()

    @property
    def _share(self) -> float:
        return 1 / self._jobs if self._on_gpu else 1.0

    def _messages(self) -> list[Event]:
        events = []
        for kind, run_id, content in self._ray.get(self._mailbox.drain.remote()):
            if kind == "started":
                self._deadlines[run_id] = time.monotonic() + (self._timeout or float("inf"))
                events.append(Started(run_id, content))
            else:
                events.append(EpochDone(run_id, content, device_share=self._share))
        return events

    def _outcome(self, ref: Any) -> tuple[dict[str, Any] | None, Failure | None]:
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.OutOfMemoryError as error:
            return None, Failure("crashed", "the worker was ended by Ray: its node ran out of memory", str(error))
        except self._ray.exceptions.RayTaskError as error:
            return None, Failure("error", f"{type(error.cause).__name__}: {error.cause}", str(error))
        except self._ray.exceptions.RayError as error:
            return None, Failure("crashed", f"the worker or its node was lost ({type(error).__name__})", str(error))

    def _give_up_late(self) -> list[Event]:
        now, events = time.monotonic(), []
        for ref, run_id in list(self._refs.items()):
            if now > self._deadlines.get(run_id, float("inf")):
                self._ray.cancel(ref, force=True)
                del self._refs[ref], self._deadlines[run_id]
                events.append(Finished(run_id, None, Failure("timed out", f"timed out after {self._timeout:g} s")))
        return events

    def stop(self) -> None:
        """Cancel what runs, and leave the cluster; one that was started here ends."""
        for ref in self._refs:
            self._ray.cancel(ref, force=True)
        self._refs = {}
        self._ray.shutdown()


def _import_ray():
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise PlanError("--engine ray: ray is not installed: pip install 'zoology[ray]'") from error
    return ray


def _check_answers(address: str) -> None:
    """Ray tries a dead address for minutes; a socket knows at once."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise PlanError(f"--address {address}: no Ray cluster answers there ({error})") from error


class _Mailbox:
    """An actor that keeps messages until the driver asks for them."""

    def __init__(self):
        self.messages: list[tuple[str, str, Any]] = []

    def put(self, kind: str, run_id: str, content: Any) -> None:
        self.messages.append((kind, run_id, content))

    def drain(self) -> list[tuple[str, str, Any]]:
        messages, self.messages = self.messages, []
        return messages


def _paths(setup: Setup) -> list[str]:
    return [*setup.architectures, *([setup.experiment] if setup.experiment else [])]


def _execute(
    mailbox: Any, setup: Setup, files: dict[str, str], run_id: str, config_json: str
) -> tuple[dict[str, Any] | None, Failure | None]:
    """The Ray task: one run, in a directory of its node's own."""
    import os

    import ray

    home = Path(tempfile.gettempdir(), "zoology-" + hashlib.sha256(setup.directory.encode()).hexdigest()[:12])
    there = {path: str(_write(home, path, text)) for path, text in files.items()}
    setup = setup._replace(
        directory=str(home),
        architectures=tuple(there[path] for path in setup.architectures),
        experiment=setup.experiment and there[setup.experiment],
    )
    ray.get(mailbox.put.remote("started", run_id, os.getpid()))
    # Waited for, so that every epoch is in the mailbox before the task ends.
    outcome = attempt(setup, config_json, lambda epoch: ray.get(mailbox.put.remote("epoch", run_id, epoch)))
    if outcome[0] is not None:
        store.RunFolder(home, run_id).checkpoint.unlink(missing_ok=True)
    return outcome


def _write(home: Path, path: str, text: str) -> Path:
    """A file under its own name, in a folder named after its content."""
    folder = home / hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    store.write_atomically(folder / Path(path).name, text)
    return folder / Path(path).name
