"""The order of the data at one state size: the part of `jrt_set_disjointness.py` that a GPU does in minutes.

    python -m zoology.run experiments/jrt_one_state.py --scale paper --precision tf32

One width, feature dimension and learning rate, two seeds, causal and with a prefix: four runs of 90,000 steps at the
paper scale, as published, tests of sets of up to 768 included, but for 256 validation examples of each size: long
sequences take long, and nothing is selected by them. The largest of the published rates: at 5e-4 Based with 128
dimensions memorised its 240,000 examples, and 48 dimensions with f 8 hardly left the start (README of its records).
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

WIDTH, FEATURE_DIM, RATE = 128, 16, 8e-4
"""Of the published grid."""


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale; the smaller scales have one state anyway."""
    whole = load_sweep(Path(__file__).with_name("jrt_set_disjointness.py"), scale)
    if scale != "paper":
        return whole
    return [
        fewer_validated(run)
        for run in whole
        if (run.model.d_model, run.model.layers[1].options["feature_dim"], run.train.lr) == (WIDTH, FEATURE_DIM, RATE)
    ]


def fewer_validated(run: RunConfig) -> RunConfig:
    """The run with 256 validation examples of each size."""
    return run.model_copy(update={"data": run.data.model_copy(update={"num_validation": 256})})
