"""Does the start of output projections decide the scores? All linear layers alike, as the papers' code had them here.

    python -m zoology.run experiments/initialisation.py [--scale smoke|laptop|paper]

The papers' code starts output projections smaller where it finds them by name, which it does for attention and Hyena
and not for Based, GLA, H3 and the DeltaNets (`zoology.model.initialise`); `mqar_sweep.py` does it for all. These are
the runs of `batch_order.py`, in the papers' order of batches, but for that.
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    return [
        run.model_copy(update={"model": run.model.model_copy(update={"init": "plain"})})
        for run in load_sweep(Path(__file__).with_name("batch_order.py"), scale)
    ]
