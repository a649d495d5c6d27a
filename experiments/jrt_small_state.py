"""The order of the data at a state that cannot hold the long set, chosen by a rule before the prefix model runs.

    python -m zoology.run experiments/jrt_small_state.py --scale paper --precision tf32 \
        --architectures experiments/own_weight.py

The published sizes, examples and batches of `jrt_set_disjointness.py`, 128 dimensions, for 16 epochs in place of 48:
what fits into the time on a GPU that there was (of four runs at f 16 three had learned the task after 9). The rates
are up to twice the published ones, and no output projection is shrunk at the start, as in the published code
(`init="plain"`), both to learn sooner.

Why f = 8: two heads of 8 have 90 Taylor features, so 4 to 16 tokens can be kept apart and 256 cannot; with f = 16 they
have 306, and both orders were learned alike (`jrt_one_state.py`). `CANDIDATES` are causal models, of Based and of the
published code's form (`own_weight.py`), one seed each. `choice` takes the one whose validation accuracy on the pairs
of up to 256 that are tested is the most ahead with the short set first, of those that learned (.7 or more that way)
and are not done (under .985 either way). `chosen(i)` are two seeds of it and of its form with a prefix; seed 1 and all
tests are unseen by the choice.
"""

import os
from pathlib import Path

from zoology.config import RunConfig, layer
from zoology.runner.plan import load_sweep

EPOCHS = 16
CANDIDATES = (("own_weight", 8, 8e-4), ("own_weight", 8, 1.6e-3), ("own_weight", 16, 1.2e-3), ("based", 8, 1.2e-3))
"""Mixer, feature dimension, learning rate."""
WITH_PREFIX = {"own_weight": "own_weight_prefix", "based": "prefix_linear_attention"}
LEARNED_PAIRS = ((4, 32), (4, 128), (16, 256), (4, 256))


def sweep(scale: str) -> list[RunConfig]:
    """The candidates; with the environment variable JRT_CHOSEN=i the runs of candidate i."""
    index = os.environ.get("JRT_CHOSEN")
    return candidates(scale) if index is None else chosen(int(index), scale)


def candidates(scale: str = "paper") -> list[RunConfig]:
    """Every causal model, seed 0."""
    return [run(*candidate, seed=0, scale=scale) for candidate in CANDIDATES]


def chosen(index: int, scale: str = "paper") -> list[RunConfig]:
    """Causal and with a prefix, two seeds."""
    mixer, feature_dim, rate = CANDIDATES[index]
    return [run(name, feature_dim, rate, seed, scale) for name in (mixer, WITH_PREFIX[mixer]) for seed in (0, 1)]


def run(mixer: str, feature_dim: int, rate: float, seed: int, scale: str) -> RunConfig:
    """One run with these choices; below the paper scale on the sizes and width of the other experiment's scale."""
    whole = load_sweep(Path(__file__).with_name("jrt_one_state.py"), scale)[0]
    layers = (layer("base_conv"), layer(mixer, feature_dim=feature_dim, num_heads=2))
    model = whole.model.model_copy(update={"layers": layers, "init": "plain"})
    epochs = EPOCHS if scale == "paper" else whole.train.epochs
    train = whole.train.model_copy(update={"lr": rate, "epochs": epochs})
    return whole.model_copy(update={"architecture": mixer, "model": model, "train": train, "seed": seed})


def choice(validations: list[dict[str, float]]) -> int | None:
    """The index of the state to run, by the last validation accuracies of each candidate; None if none will do."""
    ahead = {}
    for index, accuracy in enumerate(validations):
        short, long = (
            sum(accuracy.get(f"{a} then {b}", 0.0) for a, b in pairs) / len(pairs)
            for pairs in (LEARNED_PAIRS, [(b, a) for a, b in LEARNED_PAIRS])
        )
        if short >= 0.7 and min(short, long) < 0.985:
            ahead[index] = short - long
    return max(ahead, key=ahead.get) if ahead else None
