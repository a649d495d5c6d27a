"""Does the order of batches decide the scores? Based, trained as the papers' code did: every epoch in the order given.

    python -m zoology.run experiments/batch_order.py [--scale smoke|laptop|paper]

`mqar_sweep.py` draws a new order of examples and batches each epoch. The papers' code shuffled nothing, so that every
epoch, the last one included, ended with the longest training sequences and the most pairs, and longer ones still are
what the scores differ in. These runs are those of the sweep but for that.
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

WIDTHS = {"smoke": (32,), "laptop": (64,), "paper": (64, 128)}
FEATURES = {"smoke": (8,), "laptop": (8,), "paper": (8, 16)}


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale: small states of Based at widths of the sweep, at all its learning rates."""
    whole = load_sweep(Path(__file__).with_name("mqar_sweep.py"), scale)
    return [
        run.model_copy(update={"data": run.data.model_copy(update={"shuffle": False})})
        for run in whole
        if run.architecture == "based"
        and run.model.d_model in WIDTHS[scale]
        and run.model.layers[-1].options["feature_dim"] in FEATURES[scale]
    ]
