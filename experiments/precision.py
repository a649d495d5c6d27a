"""Does arithmetic in fewer bits recall less? Architectures of `mqar_sweep.py` in each precision, three seeds.

    python -m zoology.run experiments/precision.py [--scale smoke|laptop|paper]
    python -m zoology.precision_table results/precision-paper

All at one learning rate of the sweep's grid, so that precisions are compared and not selections. TF32 is a mode of
NVIDIA's tensor cores: the scales for a laptop leave it out. Run ids in float32 are those of the sweep, so that one
results directory can hold both.
"""

from pathlib import Path

from zoology.config import RunConfig
from zoology.runner.plan import load_sweep, with_precision, with_seeds

SEEDS = 3

MEMBERS = {
    "smoke": {"attention": {}, "sliding_window": {"window": 16}, "based": {"feature_dim": 8}},
    "laptop": {"attention": {}, "based": {"feature_dim": 4}, "deltanet": {"head_dim": 32}},
    "paper": {"attention": {}, "based": {"feature_dim": 16}, "sliding_window": {"window": 64}, "deltanet": {}},
}
"""Softmax, over all and over few tokens, a sum of features with a normaliser, and the delta rule, which corrects its
state and does not only add to it."""

WIDTH = {"smoke": 32, "laptop": 64, "paper": 128}
RATE = {"smoke": 1e-2, "laptop": 1e-2, "paper": 3.16228e-3}


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    whole = load_sweep(Path(__file__).with_name("mqar_sweep.py"), scale)
    members = with_seeds([run for run in whole if _chosen(run, scale)], SEEDS)
    precisions = ("fp32", "tf32", "bf16") if scale == "paper" else ("fp32", "bf16")
    return [run for precision in precisions for run in with_precision(members, precision)]


def _chosen(run: RunConfig, scale: str) -> bool:
    wanted = MEMBERS[scale].get(run.architecture)
    options = run.model.layers[-1].options
    return (
        wanted is not None
        and (run.model.d_model, run.train.lr) == (WIDTH[scale], RATE[scale])
        and all(options[name] == value for name, value in wanted.items())
    )
