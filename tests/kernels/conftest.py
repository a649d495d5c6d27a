"""What tests of Triton kernels share."""

import pytest
import torch


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
