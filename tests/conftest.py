"""Shared test set-up: one thread per worker, the `gpu` marker, and what tests of several folders need."""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from architectures import backends, parity, registry

# Functions of transformers that are replaced by an installed library's on import.
TORCH_FORMS = ("torch_", "chunk_", "recurrent_", "causal_conv1d_")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _one_thread():
    """The test suite runs in several processes on few cores; more threads only fight for them."""
    torch.set_num_threads(1)


@pytest.fixture
def run_interpreted(request, monkeypatch):
    """Runs code that prints "same" in a process of its own: the interpreter is chosen when kernels are defined.

    Modules beside the test can be imported there.
    """
    pytest.importorskip("triton")
    monkeypatch.setenv("PYTHONPATH", str(request.path.parent), prepend=os.pathsep)

    def run(code: str) -> None:
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
        assert done.stdout.strip() == "same", done.stderr

    return run


@pytest.fixture(scope="session")
def fla_naive():
    """Load a naive reference of fla by its path: importing the whole package takes seconds."""
    root = Path(importlib.util.find_spec("fla").submodule_search_locations[0])

    def load(operation):
        name = f"fla_{operation.replace('/', '_')}_naive"
        spec = importlib.util.spec_from_file_location(name, root / "ops" / operation / "naive.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def transformers_module(monkeypatch):
    """Import a modeling file of transformers with its plain-PyTorch operations, where it would hand over to kernels."""

    def load(model):
        with monkeypatch.context() as patch:
            for optional in ("fla", "causal_conv1d"):
                patch.setitem(sys.modules, optional, None)
            module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        for name, function in vars(module).copy().items():
            if inspect.isfunction(function) and hasattr(function, "__wrapped__") and name.startswith(TORCH_FORMS):
                monkeypatch.setattr(module, name, function.__wrapped__)
        return module

    return load


@pytest.fixture
def fake_backends(monkeypatch):
    """The architectures of fake_backends.py with libraries for their backends; forgotten after the test."""
    monkeypatch.setattr(parity, "_results", {})
    path = Path(__file__).parent / "fake_backends.py"
    names = registry.load_file(path)
    fakes = sys.modules[f"zoology_user_architectures_{path.stem}"]
    absent = backends.Library(("no_such_module",), ("no-such-distribution",), "no-such-extra")
    monkeypatch.setattr(backends, "LIBRARIES", {**backends.LIBRARIES, **fakes.LIBRARIES, "absent": absent})
    yield fakes
    for name in names:
        registry._entries.pop(name)
