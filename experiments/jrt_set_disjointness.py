"""Recall and the order of the data: set disjointness, the short set first against the long set first.

    python -m zoology.run experiments/jrt_set_disjointness.py [--scale smoke|laptop|paper]

The finding of "Just read twice" (arXiv:2407.05483): a causal recurrent model has to carry the set that it reads first,
so the same two sets are harder with the long one in front, the more so the smaller its state; a model that reads the
context as a non-causal prefix does not mind. At the paper scale `based` is the causal model, `prefix_linear_attention`
the same with a prefix, at the same state; `laptop` says what a laptop can show. `python -m zoology.plots_jrt DIR` draws
accuracy against state by order.
"""

from zoology.config import DataConfig, LayerConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.tasks import SetDisjointness

CAUSAL, PREFIX = "based", "prefix_linear_attention"


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    return {"smoke": smoke, "laptop": laptop, "paper": paper}[scale]()


def smoke() -> list[RunConfig]:
    """Both models and orders in seconds: shows that everything works, and nothing else."""
    sizes = both_orders((2, 6))
    data = DataConfig(train=slices(32, sizes, 800), test=slices(32, sizes, 100), num_validation=100, batch_size=32)
    models = [(name, model(name, 32, d_model=16, feature_dim=2)) for name in (CAUSAL, PREFIX)]
    return runs(models, data, [1e-2], seeds=1, epochs=2, stop_accuracy=None)


def laptop() -> list[RunConfig]:
    """Sets of 2 and 48, four seeds, on two cores in minutes; each model learns one order.

    Trained on both orders at once, a small model settles for what serves both: it compares the short set, whose tokens
    the short convolution (kernel 3, as published) can tell by the marker before them, with the blurred sum of the long
    one. On one order it finds the best that its state allows: with the short set first, to compare every later token
    with the two that it kept. The causal model is linear attention with weights q.k and one key of one number: what it
    keeps of 48 tokens is a vector of 24 numbers a layer. Shorter long sets are there to learn from. One learning rate,
    every example once; a step of the prefix model takes twice as long, so it gets half of the examples.
    """
    causal = layer("linear_attention", feature_map="identity", feature_dim=1)
    prefix = layer("prefix_linear_attention", feature_dim=2)
    numbers = {4: 30_000, 8: 30_000, 16: 54_000, 48: 110_000}
    twice = {long: 2 * number for long, number in numbers.items()}
    return [
        run
        for mixer, examples in ((causal, twice), (prefix, numbers))
        for short_first in (True, False)
        for run in runs(
            [(mixer.name, small(mixer))],
            one_order(examples, short_first),
            [1e-2],
            seeds=4,
            epochs=1,
            schedule="step",
            stop_accuracy=None,
        )
    ]


def small(mixer: LayerConfig) -> ModelConfig:
    """Four layers of 24 dimensions for 112 tokens, as the mixers initialise themselves."""
    layers = (layer("base_conv"), mixer)
    return ModelConfig(vocab_size=112, d_model=24, layers=layers, n_layers=4, embed_dropout=0.0, init="mixer")


def one_order(numbers: dict[int, int], short_first: bool) -> DataConfig:
    """Sets of 2 and of each of these sizes, as many examples of each as given; tested is the longest."""
    sizes = [(2, long) if short_first else (long, 2) for long in numbers]
    train = [slices(112, [pair], number)[0] for pair, number in zip(sizes, numbers.values())]
    return DataConfig(train=tuple(train), test=slices(112, sizes[-1:], 1000), num_validation=500, batch_size=64)


def paper() -> list[RunConfig]:
    """The published grid and sizes (HazyResearch/prefix-linear-attention, 7490f22), 2 heads, 4 layers, 2 seeds.

    The published non-causal model drops the order of all tokens and shares its projections; this one is JRT-RNN, whose
    prefix here is the whole context.
    """
    train = both_orders((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256))
    test = both_orders(
        (1, 32), (4, 32), (4, 128), (16, 256), (4, 256), (16, 512), (4, 512), (8, 768), (16, 768), (4, 768)
    )
    data = DataConfig(train=slices(2048, train, 20_000), test=slices(2048, test, 1000), batch_size=128)
    models = [
        (name, model(name, 2048, d_model=width, feature_dim=feature_dim, num_heads=2, embed_dropout=0.1))
        for width in (36, 48, 64, 96, 128)
        for feature_dim in (4, 8, 16, 24)
        for name in (CAUSAL, PREFIX)
    ]
    return runs(models, data, [1e-4, 5e-4, 8e-4], seeds=2, epochs=48)


def both_orders(*sizes: tuple[int, int]) -> list[tuple[int, int]]:
    """(first, second) sizes, each pair with the short set first and then with the long one first."""
    return [order for short, long in sizes for order in ((short, long), (long, short))]


def slices(vocab_size: int, sizes: list[tuple[int, int]], num_examples: int) -> tuple[Slice, ...]:
    """As many examples of each size."""
    return tuple(
        Slice(
            task=SetDisjointness(vocab_size=vocab_size, first_size=first, second_size=second),
            num_examples=num_examples,
            name=f"{first} then {second}",
        )
        for first, second in sizes
    )


def model(mixer: str, vocab_size: int, *, d_model: int, embed_dropout: float = 0.0, **options: int) -> ModelConfig:
    """Two blocks of a short convolution and the mixer: four layers, no channel mixer, no position embedding."""
    layers = (layer("base_conv"), layer(mixer, **options))
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, layers=layers, n_layers=4, embed_dropout=embed_dropout)


def runs(
    models: list[tuple[str, ModelConfig]], data: DataConfig, rates: list[float], *, seeds: int, **train
) -> list[RunConfig]:
    """Every model at every learning rate and seed."""
    return [
        RunConfig(architecture=name, model=config, data=data, train=TrainConfig(lr=rate, **train), seed=seed)
        for name, config in models
        for rate in rates
        for seed in range(seeds)
    ]
