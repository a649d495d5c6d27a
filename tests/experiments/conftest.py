"""The layers that experiments bring along."""

from pathlib import Path

import pytest
import torch

from architectures import registry
from zoology.model import LanguageModel
from zoology.runner import plan

OWN_WEIGHT = Path(__file__).parents[2] / "experiments" / "own_weight.py"


@pytest.fixture
def own_weight():
    """The layers of experiments/own_weight.py, registered for one test: others list what is registered."""
    registry.load_file(OWN_WEIGHT)
    yield
    for name in [name for name in registry._entries if name.startswith(("own_weight", "dense_base_conv"))]:
        del registry._entries[name]


@pytest.fixture
def check_gradients():
    """Of a batch of a run's first training slice every parameter of its model has a finite gradient, not all zero."""

    def check(run) -> None:
        (task, *_) = [part.task for part in run.data.train]
        model = LanguageModel(run.model)
        batch = task.split("train", 4, 0)
        tokens = torch.as_tensor(batch.inputs)
        prefix = {"prefix_length": task.prefix_length} if model.takes_prefix else {}
        loss = torch.nn.functional.cross_entropy(model(tokens, **prefix)[:, -1], torch.as_tensor(batch.labels[:, -1]))
        loss.backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())

    return check


@pytest.fixture
def planned_ids():
    """Ids of an experiment's runs at the paper scale in tf32: the precision is the command line's."""

    def ids(experiment: Path) -> set[str]:
        return {run.run_id for run in plan.with_precision(plan.load_sweep(experiment, "paper"), "tf32")}

    return ids
