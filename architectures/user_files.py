"""Python files of a user: architectures, tasks, experiments."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType


def run_file(path: str | Path, kind: str) -> ModuleType:
    """Run the Python file at `path`, of a `kind` such as "tasks", as a module of its own that can be pickled from.

    Raises ValueError, naming kind and file, if it is missing, is not Python, or raises: then also with the line.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"{kind} file {path} {'is not a file' if path.exists() else 'does not exist'}")
    name = f"zoology_user_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{kind} file {path}: must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{kind} file {path} failed{described(error, path)}") from error
    return module


def described(error: Exception, path: str | Path) -> str:
    """What to say behind "failed": the last line of the user's own file on the way to an error, and the error."""
    own = str(Path(path).resolve())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    return (f" at line {line}: " if line else ": ") + f"{type(error).__name__}: {error}"
