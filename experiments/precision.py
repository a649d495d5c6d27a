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
    "smoke": {"attention": (32, {}), "sliding_window": (32, {"window": 16}), "based": (32, {"feature_dim": 8})},
    "laptop": {"attention": (64, {}), "based": (64, {"feature_dim": 4}), "deltanet": (64, {"head_dim": 32})},
    "paper": {"attention": (128, {}), "based": (64, {"feature_dim": 16}), "deltanet": (64, {})},
}
"""Width and options of softmax over all tokens, a sum of features with a normaliser, and the delta rule, which corrects
its state and does not only add to it. The paper's last two reach part of their hardest slices: there a loss would show.
"""

RATE = {"smoke": 1e-2, "laptop": 1e-2, "paper": 3.16228e-3}


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    whole = load_sweep(Path(__file__).with_name("mqar_sweep.py"), scale)
    members = with_seeds([run for run in whole if _chosen(run, scale)], SEEDS)
    precisions = ("fp32", "tf32", "bf16") if scale == "paper" else ("fp32", "bf16")
    return [run for precision in precisions for run in with_precision(members, precision)]


def _chosen(run: RunConfig, scale: str) -> bool:
    if run.architecture not in MEMBERS[scale]:
        return False
    width, wanted = MEMBERS[scale][run.architecture]
    options = run.model.layers[-1].options
    return (run.model.d_model, run.train.lr) == (width, RATE[scale]) and wanted.items() <= options.items()
