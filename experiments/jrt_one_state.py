"""The order of the data at one state size: a slice of `jrt_set_disjointness.py` that fits into one sitting at a GPU.

    python -m zoology.run experiments/jrt_one_state.py --scale paper --precision tf32

One width, feature dimension and learning rate, two seeds, causal and with a prefix: four runs of 90,000 steps at the
paper scale, as published but for the tests, which end at sets of 256: the lengths that were trained, and one between.
The largest of the published rates: Based with 128 dimensions at 5e-4 memorised its 240,000 examples (see README.md).
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

WIDTH, FEATURE_DIM, RATE = 128, 16, 8e-4
"""Of the published grid. With 48 and 8 Based hardly left the start in 48 epochs (.38 at 4 then 32)."""

TESTS = [
    f"{first} then {second}"
    for short, long in ((4, 32), (4, 128), (16, 256), (4, 256))
    for first, second in ((short, long), (long, short))
]
"""What is tested at the paper scale."""


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale; the smaller scales have one state anyway."""
    whole = load_sweep(Path(__file__).with_name("jrt_set_disjointness.py"), scale)
    if scale != "paper":
        return whole
    return [
        shorter(run)
        for run in whole
        if (run.model.d_model, run.model.layers[1].options["feature_dim"], run.train.lr) == (WIDTH, FEATURE_DIM, RATE)
    ]


def shorter(run: RunConfig) -> RunConfig:
    """The run with the tests of `TESTS` and 500 validation examples of each: long tests take as long as training."""
    test = tuple(part for part in run.data.test if part.name in TESTS)
    data = run.data.model_copy(update={"test": test, "num_validation": 500})
    return run.model_copy(update={"data": data})
