"""The layers that experiments bring along."""

from pathlib import Path

import pytest

from architectures import registry

OWN_WEIGHT = Path(__file__).parents[2] / "experiments" / "own_weight.py"


@pytest.fixture
def own_weight():
    """The layers of experiments/own_weight.py, registered for one test: others list what is registered."""
    registry.load_file(OWN_WEIGHT)
    yield
    for name in [name for name in registry._entries if name.startswith(("own_weight", "dense_base_conv"))]:
        del registry._entries[name]
