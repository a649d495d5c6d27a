"""Other models than the released protocol's: do they explain where `zoology_figure2.py` misses the published points?

    python -m zoology.run experiments/zoology_variants.py [--scale smoke|laptop|paper]

The figure was drawn from launches of 25 October to 13 November 2023 (HazyResearch/zoology, 9d086e9,
analysis/d_model.py), and by their times the models changed in between: Hyena and RWKV-4 had two layers with an MLP in
each, 4 d_model wide (d9429b3); the base convolution had four layers, short and long kernels in turns, and no MLP
(8486daf); H3 had two layers and no MLP (174d6cc), which is what the release has of all. The MLP was of tanh there, of
gelu here. These are the runs of the sweep's shortest length but for that.
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

WIDTHS = {"smoke": (16,), "laptop": (32, 64), "paper": (64, 128)}
VARIANTS = {
    "base_conv": {"n_layers": 4},
    "hyena": {"channel_mixer": "mlp", "channel_expand": 4.0},
    "rwkv4": {"channel_mixer": "mlp", "channel_expand": 4.0},
}


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale: smaller widths, at all learning rates."""
    short = load_sweep(Path(__file__).with_name("zoology_figure2_short.py"), scale)
    return [
        run.model_copy(update={"model": run.model.model_copy(update=VARIANTS[run.architecture])})
        for run in short
        if run.architecture in VARIANTS and run.model.d_model in WIDTHS[scale]
    ]
