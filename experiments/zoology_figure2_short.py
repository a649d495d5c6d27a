"""The shortest length of Zoology, Fig. 2 alone: the cheapest piece of `zoology_figure2.py` that gives whole curves.

    python -m zoology.run experiments/zoology_figure2_short.py [--scale smoke|laptop|paper] [--out DIR]

At the paper's scale the tokens of an epoch double from length to length, so that length 64 costs about 1/15 of the
sweep, 128 2/15, 256 4/15 and 512 8/15. The runs are those of the whole sweep: with the same `--out` either goes on
from what the other has done.
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale that train and test on its shortest length."""
    runs = load_sweep(Path(__file__).with_name("zoology_figure2.py"), scale)
    shortest = min(run.data.max_test_length for run in runs)
    return [run for run in runs if run.data.max_test_length == shortest]
