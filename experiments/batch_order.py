"""Does the order of batches decide the scores? Models trained as Based's code did: every epoch in the order given.

    python -m zoology.run experiments/batch_order.py [--scale smoke|laptop|paper]

`mqar_sweep.py` draws a new order of examples and batches each epoch, as Zoology's code did. That of Based shuffles
nothing (HazyResearch/zoology from 194a712 on), so that every epoch, the last one included, ends with the longest
training sequences and the most pairs, and longer ones still are what the scores differ in. These runs are those of the
sweep but for that.
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

WIDTHS = {"smoke": (32,), "laptop": (64,), "paper": (48, 64, 128)}
FEATURES = {"smoke": (8,), "laptop": (8,), "paper": (8, 16)}
ALSO = {"paper": [("gla", 64), ("deltanet", 64), ("gated_deltanet", 64)]}  # with their smallest width


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale: small states at widths of the sweep, at all its learning rates."""
    whole = load_sweep(Path(__file__).with_name("mqar_sweep.py"), scale)
    return [
        run.model_copy(update={"data": run.data.model_copy(update={"shuffle": False})})
        for run in whole
        if is_small(run, scale)
    ]


def is_small(run: RunConfig, scale: str) -> bool:
    """Whether a run of the sweep is repeated here."""
    if run.architecture == "based":
        features = run.model.layers[-1].options["feature_dim"]
        return run.model.d_model in WIDTHS[scale] and features in FEATURES[scale]
    return (run.architecture, run.model.d_model) in ALSO.get(scale, [])
