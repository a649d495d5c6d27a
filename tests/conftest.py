"""Shared test set-up: one thread per worker, and the `gpu` marker."""

import pytest
import torch


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
