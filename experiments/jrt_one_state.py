"""The order of the data at one state size: a slice of `jrt_set_disjointness.py` that fits into one sitting at a GPU.

    python -m zoology.run experiments/jrt_one_state.py --scale paper

All learning rates and seeds of one width and feature dimension, causal and with a prefix: 12 runs of 90,000 steps at
the paper scale. On an H200 a causal run trained for 90 s, after half a minute to three minutes of compiling; at the
largest rate the prefix model diverged with both seeds. Run ids are those of the whole sweep, so that one results
directory can hold both.
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

STATES = {"smoke": (16, 2), "laptop": (16, 1), "paper": (48, 8)}
"""d_model and feature_dim, by scale: small ones, where the order should matter most."""


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    whole = load_sweep(Path(__file__).with_name("jrt_set_disjointness.py"), scale)
    return [run for run in whole if (run.model.d_model, run.model.layers[1].options["feature_dim"]) == STATES[scale]]
