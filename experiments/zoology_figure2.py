"""Recall against model width, one sequence length at a time: the protocol of Zoology (arXiv:2312.04927), Fig. 2.

    python -m zoology.run experiments/zoology_figure2.py [--scale smoke|laptop|paper]

Every run is trained and tested on one length and number of pairs. `smoke` shows in a minute that everything works,
`laptop` trains every architecture for minutes without a GPU, `paper` is the published grid.
"""

from zoology.config import DataConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer, learning_rates
from zoology.tasks import MQAR


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    return {"smoke": smoke, "laptop": laptop, "paper": paper}[scale]()


def smoke() -> list[RunConfig]:
    """One small width on two short lengths."""
    return [
        run
        for length, pairs in ((16, 2), (32, 4))
        for run in runs(128, length, pairs, widths=[16], train=1000, test=200, batch=64, rates=[1e-2], epochs=3)
    ]


def laptop() -> list[RunConfig]:
    """Two short lengths and two widths with a vocabulary of 64, in minutes on two cores.

    Only what learns from little data gets beyond guessing among the values of the context (one over the number of
    pairs): attention without a convolution before it takes the steps of the paper scale.
    """
    return [
        run
        for length, pairs in ((16, 2), (32, 4))
        for run in runs(
            64, length, pairs, widths=[32, 64], train=4000, test=500, batch=32, rates=[3e-3, 1e-2], epochs=8
        )
    ]


def paper() -> list[RunConfig]:
    """The published grid: 6 architectures, 4 widths, 4 lengths, 4 learning rates, 64 epochs."""
    return [
        run
        for length, pairs, batch in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
        for run in runs(
            8192, length, pairs, widths=[64, 128, 256, 512], train=100_000, test=3000, batch=batch,
            rates=learning_rates(-4, -2, 4), epochs=64,
        )
    ]  # fmt: skip


def runs(
    size: int, length: int, pairs: int, *, widths: list[int], train: int, test: int, batch: int, rates: list[float],
    epochs: int,
) -> list[RunConfig]:  # fmt: skip
    """Every architecture at every width and learning rate, on one length; filler is the token 0."""
    task = MQAR(vocab_size=size, seq_len=length, num_kv_pairs=pairs, random_non_queries=False)
    data = DataConfig(
        train=(Slice(task=task, num_examples=train),), test=(Slice(task=task, num_examples=test),), batch_size=batch
    )
    return [
        RunConfig(architecture=name, model=model, data=data, train=TrainConfig(lr=rate, epochs=epochs))
        for width in widths
        for name, model in models(size, width, length).items()
        for rate in rates
    ]


def models(size: int, width: int, length: int) -> dict[str, ModelConfig]:
    """Two layers of each mixer, filters and states sized by the sequence; attention alone is given positions.

    H3 with a state of the sequence's length can do what Hyena can. The base convolution is short in the first layer
    and long in the second; Based follows a short convolution.
    """
    stacks = {
        "attention": [layer("attention")],
        "hyena": [layer("hyena", filter_len=length)],
        "rwkv4": [layer("rwkv4")],
        "h3": [layer("h3", d_state=length, head_dim=2)],
        "base_conv": [layer("base_conv", kernel_size=3), layer("long_conv", filter="implicit", filter_len=length)],
        "based": [layer("base_conv", kernel_size=3), layer("based", feature_dim=8)],
    }
    return {
        name: ModelConfig(
            vocab_size=size,
            d_model=width,
            layers=stack,
            n_layers=2,
            max_positions=length if name == "attention" else 0,
        )
        for name, stack in stacks.items()
    }
