"""Processes that train on the same GPU use it in turns, an epoch each.

A GPU does not run the work of two processes side by side, but by slices of milliseconds. Recorded steps fill it without
that, and the slices cost a step 8 to 10% of its time. Who has no turn builds a model, draws batches or writes; under
MPS, where processes do run side by side, there are no turns.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from pathlib import Path

import torch

PATIENCE = 60.0
"""Seconds to wait for a turn: a process that hangs keeps the others no longer."""

PAUSE = 0.002
"""Seconds between two questions whether the GPU is free."""


class Turn:
    """A context that one process at a time is in, of those that name the same file; it can be entered again.

    As it is entered it says whether it is: who runs out of patience goes on without a turn, beside whoever has it.
    It ends with the process, however that ends.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # processes that this one starts do not get it

    def __enter__(self) -> bool:
        import fcntl

        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(PAUSE)
            else:
                return True
        return False

    def __exit__(self, *_) -> None:
        import fcntl

        fcntl.flock(self._file, fcntl.LOCK_UN)


@functools.lru_cache
def turn_on(device: torch.device) -> Turn | None:
    """The turn of a GPU of this machine; None for other devices, under MPS, and where there are no such locks."""
    if device.type != "cuda" or os.name != "posix" or under_mps():
        return None
    name = torch.cuda.get_device_properties(device).uuid
    try:
        return Turn(Path(tempfile.gettempdir(), f"zoology-{os.getuid()}", f"gpu-{name}.lock"))
    except OSError:
        return None


def under_mps() -> bool:
    """Whether there is an NVIDIA MPS daemon that CUDA connects to."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps", "control").exists()
