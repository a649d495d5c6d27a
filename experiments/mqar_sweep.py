"""Recall against recurrent memory on MQAR: the protocol of Based (arXiv:2402.18668), Fig. 2, at three scales.

    python -m zoology.run experiments/mqar_sweep.py [--scale smoke|laptop|paper]

`smoke` shows in a minute that everything works, `laptop` shows the tradeoff in minutes without a GPU, `paper` is the
published grid.
"""

from zoology.config import DataConfig, LayerConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer, learning_rates
from zoology.tasks import MQAR


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    return {"smoke": smoke, "laptop": laptop, "paper": paper}[scale]()


def smoke() -> list[RunConfig]:
    """Two small widths of each architecture, on short sequences."""
    data = DataConfig(
        train=slices(128, [(32, 2, 2000)]),
        test=slices(128, [(32, 2, 200), (32, 4, 200)]),
        num_validation=200,
        batch_size=64,
    )
    models = {
        "attention": [model(128, 32, layer("attention"))],
        "sliding_window": [model(128, 32, layer("sliding_window", window=window)) for window in (4, 16)],
        "based": [model(128, 32, layer("base_conv"), layer("based", feature_dim=dim)) for dim in (4, 8)],
    }
    return runs(models, data, rates=[3e-3, 1e-2], epochs=4)


def laptop() -> list[RunConfig]:
    """The picture in minutes, on two cores."""
    data = DataConfig(
        train=slices(512, [(64, 4, 6000), (64, 8, 6000)]),
        test=slices(512, [(64, 4, 500), (64, 8, 500), (64, 16, 500)]),
        num_validation=300,
        batch_size=64,
    )
    models = {
        "attention": [model(512, 64, base_conv(), layer("attention"))],
        "sliding_window": [
            model(512, 64, base_conv(), layer("sliding_window", window=window)) for window in (4, 8, 16, 32)
        ],
        "based": [model(512, 64, base_conv(), layer("based", feature_dim=dim)) for dim in (2, 4, 8, 16)],
    }
    return runs(models, data, rates=[3e-3, 1e-2], epochs=8)


def paper() -> list[RunConfig]:
    """The grid of Based, Fig. 2, with the later architectures of its authors' repository."""
    size = 8192
    data = DataConfig(
        train=slices(
            size, [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)]
        ),
        test=slices(
            size,
            [
                (64, 4, 1000),
                (64, 8, 1000),
                (64, 16, 1000),
                (128, 32, 1000),
                (256, 64, 1000),
                (512, 128, 1000),
                (1024, 256, 1000),
            ],
        ),
        batch_size=256,
    )
    return runs(paper_models(size), data, rates=learning_rates(-3, -1.5, 4), epochs=32)


def paper_models(size: int) -> dict[str, list[ModelConfig]]:
    """Attention and its like follow a short convolution; recurrences with one of their own, H3 and Hyena stand alone."""
    widths = (64, 128, 256)
    return {
        "attention": [model(size, d, base_conv(), layer("attention")) for d in (64, 128)],
        "sliding_window": [
            model(size, 128, base_conv(), layer("sliding_window", window=window))
            for window in (8, 16, 32, 64, 128, 256, 512, 1024)
        ],
        "based": [
            model(size, d, base_conv(), layer("based", feature_dim=dim)) for d in (48, 64, 128) for dim in (8, 16, 24)
        ],
    }


def base_conv() -> LayerConfig:
    """The short convolution of the protocol."""
    return layer("base_conv", kernel_size=3)


def model(vocab_size: int, d_model: int, *layers: LayerConfig) -> ModelConfig:
    """Two layers, no channel mixer, no position embedding."""
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, layers=layers, n_layers=2)


def slices(vocab_size: int, rows: list[tuple[int, int, int]]) -> tuple[Slice, ...]:
    """(length, pairs, examples) as slices."""
    return tuple(
        Slice(task=MQAR(vocab_size=vocab_size, seq_len=length, num_kv_pairs=pairs), num_examples=number)
        for length, pairs, number in rows
    )


def runs(models: dict[str, list[ModelConfig]], data: DataConfig, rates: list[float], epochs: int) -> list[RunConfig]:
    """Every model at every learning rate."""
    return [
        RunConfig(architecture=name, model=config, data=data, train=TrainConfig(lr=rate, epochs=epochs))
        for name, configs in models.items()
        for config in configs
        for rate in rates
    ]
