"""A run's state after an epoch, in one file that is either the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

VERSION = 1


def write_checkpoint(path: Path, run_id: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` atomically: a kill at any moment leaves a whole one.

    It is not forced to the disk, which would take longer than a short epoch: when the machine loses power the file may
    be lost, which `read_checkpoint` notices. Raises OSError if it cannot be written; the one before is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, "run_id": run_id, "torch": str(torch.__version__)} | state, file)
        os.replace(temporary, path)
    except RuntimeError as error:
        # Of a write that failed torch says "unexpected pos" as it closes its archive.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, run_id: str) -> dict[str, Any] | None:
    """The state at `path`, on the CPU, or None if there is no file.

    Raises ValueError for a file that is no checkpoint, or one of another run or version.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = (state["version"], state["run_id"])
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read ({type(error).__name__}): delete it") from error
    if found != (VERSION, run_id):
        raise ValueError(
            f"checkpoint {path} is of run {found[1]}, version {found[0]}: allowed is run {run_id}, version {VERSION}"
        )
    return state
