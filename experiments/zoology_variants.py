"""Other models than the released protocol's: do they explain where `zoology_figure2.py` misses the published points?

    python -m zoology.run experiments/zoology_variants.py [--scale smoke|laptop|paper]

The figure was drawn from launches of 25 October to 13 November 2023 (HazyResearch/zoology, 9d086e9,
analysis/d_model.py), and by the minutes they started in they were not of what was released later. Hyena and RWKV-4
(0a76ef2, d9429b3) had two layers and in each an MLP, 4 d_model wide. The base convolution (8486daf) had four layers,
and every layer's channel mixer was its mixer once more, up to 7aebb50, "Fix state mixer issue": eight, of kernels 3,
3, long, long, 3, 3, long, long. H3 (174d6cc) had four in its two layers. Batches were of 1024 where the release has
512, the weight decay .01.

LAUNCHED is all of that, but for the MLP, which was of tanh there and is of gelu here; RELEASED changes one thing alone.
The rest is as in the sweep's shortest length.
"""

from pathlib import Path
from typing import Any

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep

WIDTHS = {"smoke": (16,), "laptop": (32, 64), "paper": (64, 128)}
MLP = {"channel_mixer": "mlp", "channel_expand": 4.0}
RELEASED: dict[str, dict[str, Any]] = {"base_conv": {"n_layers": 4}, "hyena": MLP, "rwkv4": MLP}
LAUNCHED: dict[str, dict[str, Any]] = {
    "base_conv": {"n_layers": 8, "channel_mixer": "none"},
    "h3": {"n_layers": 4, "channel_mixer": "none"},
    "hyena": MLP,
    "rwkv4": MLP,
}


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale: smaller widths, at all learning rates."""
    short = load_sweep(Path(__file__).with_name("zoology_figure2_short.py"), scale)
    runs = [run for run in short if run.model.d_model in WIDTHS[scale]]
    return [
        *(with_model(run, RELEASED[run.architecture]) for run in runs if run.architecture in RELEASED),
        *(launched(run) for run in runs if run.architecture in LAUNCHED),
    ]


def launched(run: RunConfig) -> RunConfig:
    """A run as it was launched: mixers in pairs, twice the batch, a tenth of the weight decay."""
    run = with_model(run, LAUNCHED[run.architecture])
    if run.architecture == "base_conv":
        short, long = run.model.layers
        run = with_model(run, {"layers": (short, short, long, long)})
    data = run.data.model_copy(update={"batch_size": 2 * run.data.batch_size})
    train = run.train.model_copy(update={"weight_decay": run.train.weight_decay / 10})
    return run.model_copy(update={"data": data, "train": train})


def with_model(run: RunConfig, update: dict[str, Any]) -> RunConfig:
    """The run of another model."""
    return run.model_copy(update={"model": run.model.model_copy(update=update)})
