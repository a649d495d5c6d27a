"""The order of the data at one state size: a slice of `jrt_set_disjointness.py` that fits into one sitting at a GPU.

    python -m zoology.run experiments/jrt_one_state.py --scale paper --precision tf32

One width, feature dimension and learning rate, two seeds, causal and with a prefix: four runs of 90,000 steps at the
paper scale, as published but for the tests, which end at sets of 256: the lengths that were trained, and one between.
The largest of the published rates: Based with 128 dimensions at 5e-4 memorised its 240,000 examples (see README.md).
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

STATES = {"smoke": (16, 2), "laptop": (16, 1), "paper": (128, 16)}
"""d_model and feature_dim, by scale. At the paper scale 48 and 8 hardly left the start (Based .38 at 4 then 32)."""

RATES = {"smoke": 1e-2, "laptop": 5e-3, "paper": 8e-4}

TESTS = [
    f"{first} then {second}"
    for short, long in ((4, 32), (4, 128), (16, 256), (4, 256))
    for first, second in ((short, long), (long, short))
]
"""What the paper scale is tested on."""


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    whole = load_sweep(Path(__file__).with_name("jrt_set_disjointness.py"), scale)
    runs = [
        run
        for run in whole
        if (run.model.d_model, run.model.layers[1].options["feature_dim"]) == STATES[scale]
        and run.train.lr == RATES[scale]
    ]
    return [shorter(run) for run in runs] if scale == "paper" else runs


def shorter(run: RunConfig) -> RunConfig:
    """The run with the tests of `TESTS` and 500 validation examples of each: long tests take as long as training."""
    test = tuple(part for part in run.data.test if part.name in TESTS)
    data = run.data.model_copy(update={"test": test, "num_validation": 500})
    return run.model_copy(update={"data": data})
