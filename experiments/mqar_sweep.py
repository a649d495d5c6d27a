"""Recall against recurrent memory on MQAR: the protocol of Based (arXiv:2402.18668), Fig. 2, at three scales.

    python -m zoology.run experiments/mqar_sweep.py [--scale smoke|laptop|paper]

`smoke` shows in a minute that everything works, `laptop` shows the tradeoff in minutes without a GPU, `paper` is the
published grid.
"""

import architectures
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
        **added(128, 32),
    }
    return runs(models, data, rates=[3e-3, 1e-2], epochs=4)


def laptop() -> list[RunConfig]:
    """The picture in minutes, on two cores: the protocol's shape with a vocabulary of 256 and sequences of 64.

    Left out for time, not for principle: mamba, mamba2, h3, hyena, long_conv, rwkv4, rwkv6, rwkv7, retnet, kda,
    gated_deltanet, linear_attention with its feature maps, input_dependent_sparse_attention and
    prefix_linear_attention, more sizes, and more seeds (`--seeds N`). To add one, add a line to `recurrent`. Rates
    are centred on where each family learns at this scale.
    """
    size = 256
    data = DataConfig(
        train=slices(size, [(64, 4, 4000), (64, 8, 4000), (64, 16, 4000)]),
        test=slices(size, [(64, 4, 500), (64, 8, 500), (64, 16, 500)]),
        num_validation=300,
        batch_size=64,
    )
    softmax = {
        "attention": [model(size, 64, base_conv(), layer("attention"))],
        "sliding_window": [
            model(size, 64, base_conv(), layer("sliding_window", window=window)) for window in (16, 32, 48)
        ],
    }
    recurrent = {
        "based": [model(size, 64, base_conv(), layer("based", feature_dim=dim)) for dim in (2, 4, 8, 16)],
        "gla": [model(size, 64, base_conv(), layer("gla"))],
        "deltanet": [model(size, 64, base_conv(), layer("deltanet", num_heads=1, head_dim=dim)) for dim in (16, 32)],
        **added(size, 64),
    }
    return [
        *runs(softmax, data, rates=[2.5e-3, 5e-3, 1e-2], epochs=6),
        *runs(recurrent, data, rates=[5e-3, 1e-2, 2e-2], epochs=6),
    ]


def paper() -> list[RunConfig]:
    """The grid of Based, Fig. 2, with the later architectures of its authors' repository, and RetNet.

    Left out, as the papers have no grid of them here: rwkv4, rwkv6, kda, long_conv, linear_attention with its feature
    maps, input_dependent_sparse_attention and prefix_linear_attention. To add one, add a line to `paper_models`.
    """
    size = 8192
    train = [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)]
    test = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    data = DataConfig(
        train=slices(size, train),
        test=slices(size, [(length, pairs, 1000) for length, pairs in test]),
        batch_size=256,
    )
    return runs(paper_models(size) | added(size, 64, 128), data, rates=learning_rates(-3, -1.5, 4), epochs=32)


def paper_models(size: int) -> dict[str, list[ModelConfig]]:
    """Attention and linear attentions follow a short convolution; Mamba, H3 and Hyena bring one of their own.

    Mamba's blocks have RMSNorm, no channel half, no dropout after the embedding and an initialisation of their own, as
    in the papers' code.
    """
    widths = (64, 128, 256)
    delta = {"num_heads": 2, "use_gate": False, "conv_size": 4}
    ranks = {"decay_low_rank_dim": 16, "a_low_rank_dim": 16, "gate_low_rank_dim": 64}
    return {
        "attention": [model(size, d, base_conv(), layer("attention")) for d in (64, 128)],
        "sliding_window": [
            model(size, 128, base_conv(), layer("sliding_window", window=window))
            for window in (8, 16, 32, 64, 128, 256, 512, 1024)
        ],
        "based": [
            model(size, d, base_conv(), layer("based", feature_dim=dim)) for d in (48, 64, 128) for dim in (8, 16, 24)
        ],
        "mamba": [mamba_model(size, d, layer("mamba", d_state=state)) for d in widths for state in (8, 16, 24)],
        "mamba2": [mamba_model(size, d, layer("mamba2", d_state=state)) for d in widths for state in (8, 16, 24)],
        "hyena": [model(size, d, layer("hyena", filter_len=1024)) for d in widths],
        "h3": [model(size, d, layer("h3", d_state=d // 4, head_dim=2)) for d in widths],
        "rwkv7": [model(size, d, base_conv(), layer("rwkv7", head_dim=64, **ranks)) for d in widths],
        "deltanet": [model(size, d, base_conv(), layer("deltanet", **delta)) for d in widths],
        "gated_deltanet": [model(size, d, base_conv(), layer("gated_deltanet", **delta)) for d in widths],
        "gla": [model(size, d, base_conv(), layer("gla", num_heads=2)) for d in widths],
        "retnet": [model(size, d, base_conv(), layer("retnet", num_heads=2)) for d in widths],
    }


def added(vocab_size: int, *widths: int) -> dict[str, list[ModelConfig]]:
    """Architectures that are no built-ins (`--architectures FILE`, installed packages), with their defaults."""
    return {
        name: [model(vocab_size, d, base_conv(), layer(name)) for d in widths] for name in architectures.added_names()
    }


def base_conv() -> LayerConfig:
    """The short convolution of the protocol, kernel 3."""
    return layer("base_conv")


def model(vocab_size: int, d_model: int, *layers: LayerConfig) -> ModelConfig:
    """Two layers, no channel mixer, no position embedding."""
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, layers=layers, n_layers=2)


def mamba_model(vocab_size: int, d_model: int, mixer: LayerConfig) -> ModelConfig:
    """Two blocks of Mamba's own kind: its initialisation, and no dropout."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        layers=(mixer,),
        n_layers=2,
        norm="rmsnorm",
        channel_mixer="none",
        embed_dropout=0.0,
        init="mamba",
    )


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
