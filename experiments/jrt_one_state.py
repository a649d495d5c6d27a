"""The order of the data at one state size: a slice of `jrt_set_disjointness.py` that fits into one sitting at a GPU.

    python -m zoology.run experiments/jrt_one_state.py --scale paper

Both seeds of one width and feature dimension, causal and with a prefix. At the paper scale these are 4 runs of 90,000
steps, at the largest of the published learning rates alone: the widths are small, and the other two rates are in the
whole sweep. Run ids are those of the whole sweep, so that one results directory can hold both.
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

STATES = {"smoke": (16, 2), "laptop": (16, 1), "paper": (48, 8)}
"""d_model and feature_dim, by scale: small ones, where the order should matter most."""


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    whole = load_sweep(Path(__file__).with_name("jrt_set_disjointness.py"), scale)
    runs = [run for run in whole if (run.model.d_model, run.model.layers[1].options["feature_dim"]) == STATES[scale]]
    largest = max(run.train.lr for run in runs)
    return [run for run in runs if scale != "paper" or run.train.lr == largest]
