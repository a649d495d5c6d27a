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
def close_when_interpreted(run_interpreted):
    """Runs a test module's `close_to_float64` on its SHAPES in float32, and on those numbered `half` in float16 too."""

    def run(module: str, half: tuple[int, ...]) -> None:
        run_interpreted(f"""
import torch

import {module} as t

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
for case in t.SHAPES:
    t.close_to_float64(case, torch.float32, "cpu")
for number in {half}:
    t.close_to_float64(t.SHAPES[number], torch.float16, "cpu")
print("same")
""")

    return run


@pytest.fixture
def poisoned():
    """Memory nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
