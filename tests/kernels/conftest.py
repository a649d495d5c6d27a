"""What tests of Triton kernels share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def run_interpreted():
    """Runs code that prints "same" in a process of its own: the interpreter is chosen when kernels are defined."""
    pytest.importorskip("triton")

    def run(code: str) -> None:
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        found = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"
        done = subprocess.run([sys.executable, "-c", found], env=env, capture_output=True, text=True, timeout=280)
        assert done.stdout.strip() == "same", done.stderr

    return run


@pytest.fixture
def poisoned():
    """Memory nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
