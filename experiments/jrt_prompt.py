"""Reading the context once, twice, three times: JRT-Prompt on MQAR and on set disjointness.

    python -m zoology.run experiments/jrt_prompt.py [--scale smoke|laptop|paper]

From "Just read twice" (arXiv:2407.05483): a model whose state is too small for the context can choose what to keep when
it reads the context again, knowing what came later. The questions are the same ones whatever the number of passes.
Every model is tested with the number of passes that it is trained with. `prefix_linear_attention` reads the context
once, non-causally: what the second pass is to be compared with. `python -m zoology.plots_jrt DIR` draws accuracy
against passes.
"""

from zoology.config import DataConfig, LayerConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.tasks import MQAR, JRTPrompt, SetDisjointness, Task

PASSES = (1, 2, 3)


def sweep(scale: str) -> list[RunConfig]:
    """The runs of a scale."""
    return {"smoke": smoke, "laptop": laptop, "paper": paper}[scale]()


def smoke() -> list[RunConfig]:
    """One small model of either kind on each task, in seconds."""
    mixers = [layer("based", feature_dim=2), layer("prefix_linear_attention", feature_dim=2)]
    tasks = {
        "mqar": [(MQAR(vocab_size=32, seq_len=16, num_kv_pairs=4), 400)],
        "sets": [(sets(32, 6, 2), 400)],
    }
    return [
        run
        for examples in tasks.values()
        for run in runs(examples, examples, mixers, 32, width=16, n_layers=2, rates=[1e-2], epochs=2, batch_size=32)
    ]


def laptop() -> list[RunConfig]:
    """On two cores in minutes: 8 pairs at three states, and sets of 48 and then 2.

    The pairs at one learning rate, which beat 1e-2 on validation for 11 of 12 models and numbers of passes; at 5e-3 two
    passes are far from learned in these few steps. For the sets see `laptop_sets`.
    """
    models = ("based", "prefix_linear_attention")
    for_pairs = [layer(name, feature_dim=feature_dim) for name in models for feature_dim in (1, 2, 4)]
    asked = (MQAR(vocab_size=64, seq_len=32, num_kv_pairs=8), 20_000)
    pairs = [(MQAR(vocab_size=64, seq_len=16, num_kv_pairs=4), 10_000), asked]
    common = {"embed_dropout": 0.0, "schedule": "step", "batch_size": 64}
    return [
        *runs(pairs, [asked], for_pairs, 64, width=32, n_layers=2, epochs=4, rates=[2e-2], **common),
        *laptop_sets(),
    ]


def laptop_sets() -> list[RunConfig]:
    """Sets of 2 and 48 with the long one first, read once by one model, twice by another; four seeds.

    The causal model is that of `jrt_set_disjointness.py` with a third pair of layers, which made it learn sooner: what
    it keeps of 48 tokens is one vector of 24 numbers a layer. To tell the shared token while the long set is read
    again, it has to keep the short one alone; from the long set first it learns to blur that instead. What it needs it
    learns from the short set first, so every model also learns that, read once. The same examples in the same order,
    whatever the number of passes.
    """
    numbers = {4: 41_000, 8: 41_000, 16: 61_000}
    start = slices([(sets(112, 2, long), number) for long, number in (numbers | {48: 61_000}).items()], 1)
    asked = [(sets(112, long, 2), number) for long, number in (numbers | {48: 102_000}).items()]
    causal = layer("linear_attention", feature_map="identity", feature_dim=1)
    prefix = layer("prefix_linear_attention", feature_dim=2)
    return [
        RunConfig(
            architecture=mixer.name,
            model=ModelConfig(
                vocab_size=112,
                d_model=24,
                layers=(layer("base_conv"), mixer),
                n_layers=6,
                embed_dropout=0.0,
                init="mixer",
            ),
            data=DataConfig(
                train=start + slices(asked, num_passes),
                test=slices([(sets(112, 48, 2), 1000)], num_passes),
                num_validation=500,
                batch_size=64,
            ),
            train=TrainConfig(lr=4e-3, epochs=1, schedule="step", clip_norm=0.1, stop_accuracy=None),
            seed=seed,
        )
        for mixer, num_passes, seeds in ((causal, 1, 4), (causal, 2, 4), (prefix, 1, 1))
        for seed in range(8, 8 + seeds)  # others served to find the setting
    ]


def paper() -> list[RunConfig]:
    """The MQAR of Based (arXiv:2402.18668), Fig. 2, and the set disjointness of "Just read twice".

    Two blocks of a short convolution and the mixer for set disjointness, one for MQAR, as in the protocols.
    """
    mixers = [
        *(layer("based", feature_dim=feature_dim) for feature_dim in (8, 16, 24)),
        *(layer("gated_deltanet", num_heads=heads, use_gate=False) for heads in (2, 4)),
        *(layer("mamba2", d_state=d_state) for d_state in (8, 16)),
        *(layer("prefix_linear_attention", feature_dim=feature_dim) for feature_dim in (8, 16, 24)),
    ]
    pairs = [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)]
    asked = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128)]
    sizes = [(4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256)]
    return [
        *runs(
            [(MQAR(vocab_size=8192, seq_len=length, num_kv_pairs=n), number) for length, n, number in pairs],
            [(MQAR(vocab_size=8192, seq_len=length, num_kv_pairs=n), 1000) for length, n in asked],
            mixers, 8192, width=64, n_layers=2, rates=[1e-3, 3.16228e-3, 1e-2], epochs=32, batch_size=256,
        ),
        *runs(
            [(sets(2048, *order), 20_000) for pair in sizes for order in (pair, pair[::-1])],
            [(sets(2048, *order), 1000) for pair in [*sizes, (4, 512), (4, 768)] for order in (pair, pair[::-1])],
            mixers, 2048, width=64, n_layers=4, rates=[1e-4, 5e-4, 8e-4], epochs=48, batch_size=128,
        ),
    ]  # fmt: skip


def sets(vocab_size: int, first: int, second: int) -> Task:
    """Set disjointness of these sizes."""
    return SetDisjointness(vocab_size=vocab_size, first_size=first, second_size=second)


def runs(
    train: list[tuple[Task, int]],
    test: list[tuple[Task, int]],
    mixers: list[LayerConfig],
    vocab_size: int,
    *,
    width: int,
    n_layers: int,
    rates: list[float],
    batch_size: int,
    embed_dropout: float = 0.1,
    seeds: int = 1,
    **options,
) -> list[RunConfig]:
    """Every mixer behind a short convolution, at every number of passes; a prefix is read once."""
    return [
        RunConfig(
            architecture=mixer.name,
            model=ModelConfig(
                vocab_size=vocab_size,
                d_model=width,
                layers=(layer("base_conv"), mixer),
                n_layers=n_layers,
                embed_dropout=embed_dropout,
            ),
            data=DataConfig(
                train=slices(train, num_passes),
                test=slices([(task, min(number, 1000)) for task, number in test], num_passes),
                num_validation=500,
                batch_size=batch_size,
            ),
            train=TrainConfig(lr=rate, stop_accuracy=None, **options),
            seed=seed,
        )
        for mixer in mixers
        for num_passes in (PASSES if mixer.name != "prefix_linear_attention" else (1,))
        for rate in rates
        for seed in range(seeds)
    ]


def slices(tasks: list[tuple[Task, int]], num_passes: int) -> tuple[Slice, ...]:
    """(task, examples) as slices whose context is read several times."""
    return tuple(
        Slice(
            task=JRTPrompt(task=task, num_passes=num_passes),
            num_examples=number,
            name=f"{Slice(task=task, num_examples=1).label} read {num_passes}x",
        )
        for task, number in tasks
    )
