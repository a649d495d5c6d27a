"""Published points: the field's counts give the published bytes, and every point of the grids is found by its run."""

from collections import Counter
from pathlib import Path

import pytest

from zoology import published
from zoology.config import ModelConfig, layer
from zoology.runner.plan import load_sweep


def model(d_model, *layers, n_layers=2):
    return ModelConfig(vocab_size=8192, d_model=d_model, layers=layers, n_layers=n_layers)


CONV = layer("base_conv")
ORDER = "order of batches: a new one each epoch instead of the same each epoch"
ALIKE = "initialisation: smaller output projections instead of all linear layers alike"
OWN = "initialisation: the mixer's own instead of all linear layers alike"
STARTS = {name: [ALIKE] for name in ("based", "gla", "deltanet", "gated_deltanet", "h3")} | {"rwkv7": [OWN]}

# Bytes from the figures at length 1024, and the models of the Based protocol that have them.
BYTES = [
    (525_056, model(64, CONV, layer("attention"))),
    (1_050_112, model(128, CONV, layer("attention"))),
    *(
        (count, model(128, CONV, layer("sliding_window", window=window)))
        for window, count in [
            (8, 9_728), (16, 17_920), (32, 34_304), (64, 67_072), (128, 132_608), (256, 263_680), (512, 525_824),
        ]
    ),
    *(
        (count, model(width, CONV, layer("based", feature_dim=feature_dim)))
        for width, feature_dim, count in [
            (48, 8, 9_396), (64, 8, 12_468), (128, 8, 24_756), (48, 16, 30_564), (64, 16, 40_548), (48, 24, 64_276),
            (128, 16, 80_484), (64, 24, 85_268), (128, 24, 169_236), (256, 16, 160_356), (256, 32, 579_780),
        ]
    ),
    *(
        (count, model(width, layer("mamba", d_state=d_state)))
        for width, d_state, count in [(64, 16, 16_384), (64, 24, 24_576), (128, 24, 49_152), (256, 24, 98_304)]
    ),
    *(
        (count, model(width, layer("mamba2", d_state=d_state)))
        for width, d_state, count in [
            (64, 8, 8_192), (128, 8, 16_384), (64, 24, 24_576), (256, 8, 32_768), (128, 24, 49_152),
            (256, 16, 65_536), (256, 24, 98_304),
        ]
    ),
    *(
        (count, model(width, layer("h3", d_state=width // 4, head_dim=2)))
        for width, count in [(64, 8_192), (128, 32_768), (256, 131_072)]
    ),
    *(
        (count, model(width, layer("hyena")))
        for width, count in [(64, 524_288), (128, 1_048_576), (256, 2_097_152)]
    ),
    *(
        (count, model(width, CONV, layer("gla", num_heads=2)))
        for width, count in [(64, 4_864), (128, 17_920), (256, 68_608)]
    ),
    *(
        (count, model(width, CONV, layer("deltanet", num_heads=2)))
        for width, count in [(64, 8_960), (128, 34_304), (256, 134_144)]
    ),
    *(
        (count, model(width, CONV, layer("gated_deltanet", num_heads=2, use_gate=False)))
        for width, count in [(64, 17_152), (128, 67_072), (256, 265_216)]
    ),
    *(
        (count, model(width, CONV, layer("rwkv7", head_dim=64)))
        for width, count in [(64, 17_152), (128, 34_304), (256, 68_608)]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("count", "config"), BYTES, ids=lambda value: str(value) if isinstance(value, int) else "")
def test_the_fields_count_gives_the_published_bytes(count, config):
    assert published.field_bytes(config, 1024) == count


def test_the_table_of_counts_covers_the_published_points():
    assert {point.field_bytes for point in published.points("based_figure2")} <= {count for count, _ in BYTES}
    used = {name for point in published.points() for name in point.layers}
    assert used - set(published.FIELD_STATE) == {"rwkv4"}
    assert set(published.FIELD_STATE) <= used


def test_a_long_convolution_counts_its_history_and_a_short_one_of_gla_its_inputs():
    assert published.field_elements(model(64, CONV, layer("long_conv")), 256) == 3 * 64 + 256 * 64
    assert published.field_elements(model(64, layer("gla", num_heads=2, use_short_conv=True), n_layers=1), 1) == (
        32 * 32 + 4 * (32 + 32 + 64)
    )


def test_an_architecture_without_a_published_count_has_none():
    assert published.field_bytes(model(64, layer("retnet")), 1024) is None
    assert published.field_bytes(model(64, CONV, layer("rwkv4")), 1024) is None


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("attention", [(525_056, 1.0), (1_050_112, 1.0)]),
        ("sliding_window", [(9_728, 0.081), (17_920, 0.145), (34_304, 0.310), (67_072, 0.515), (132_608, 0.656),
                            (263_680, 0.797), (525_824, 0.936)]),
        ("based", [(9_396, 0.667), (12_468, 0.719), (24_756, 0.840), (30_564, 0.836), (40_548, 0.912),
                   (64_276, 0.856), (80_484, 0.985), (85_268, 0.970), (160_356, 0.991), (169_236, 0.991),
                   (579_780, 1.0)]),
        ("mamba", [(16_384, 0.70), (24_576, 0.697), (49_152, 0.758), (98_304, 0.85)]),
        ("mamba2", [(8_192, 0.520), (16_384, 0.690), (24_576, 0.728), (32_768, 0.784), (49_152, 0.796),
                    (65_536, 0.832), (98_304, 0.844)]),
        ("h3", [(8_192, 0.189), (32_768, 0.248), (131_072, 0.247), (2_097_152, 0.279)]),
        ("hyena", [(524_288, 0.185), (1_048_576, 0.304), (2_097_152, 0.409)]),
        ("gla", [(4_864, 0.532), (17_920, 0.771), (68_608, 0.950)]),
        ("deltanet", [(8_960, 0.793), (34_304, 0.963), (134_144, 0.995)]),
        ("gated_deltanet", [(17_152, 0.890), (67_072, 0.988), (265_216, 0.994)]),
        ("rwkv7", [(17_152, 0.815), (34_304, 0.915), (68_608, 0.981)]),
    ],
)  # fmt: skip
def test_points_of_based(architecture, wanted):
    points = [point for point in published.points("based_figure2") if point.architecture == architecture]
    assert [(point.field_bytes, point.accuracy) for point in points] == wanted


def test_approximate_values_are_flagged_and_every_point_has_a_source():
    approximate = [(point.architecture, point.field_bytes) for point in published.points() if point.approximate]
    assert approximate == [("mamba", 16_384), ("mamba", 98_304)]
    assert all("read off" in point.source or "centres" in point.source or "corrected" in point.source
               for point in published.points())  # fmt: skip
    assert {point.precision for point in published.points()} == {0.002, 0.003, 0.01}


@pytest.mark.parametrize(
    ("length", "architecture", "wanted"),
    [
        (64, "hyena", [0.52, 0.75, 0.845, 0.87]),
        (64, "rwkv4", [0.76, 0.94, 0.97, 0.985]),
        (64, "h3", [0.93, 0.99, 0.98, 0.98]),
        (64, "base_conv", [0.70, 0.945, 0.965, 1.0]),
        (256, "hyena", [0.05, 0.134, 0.536, 0.69]),
        (256, "rwkv4", [0.05, 0.06, 0.676, 0.795]),
        (256, "h3", [0.08, 0.643, 0.625, 0.67]),
        (512, "attention", [1.0] * 4),
    ],
)
def test_points_of_zoology(length, architecture, wanted):
    points = [p for p in published.points(f"zoology_figure2_{length}") if p.architecture == architecture]
    assert [point.accuracy for point in points] == wanted
    assert [point.d_model for point in points] == [64, 128, 256, 512]


def test_spreads():
    assert published.spread("based")[:2] == (0.02, 0.02)
    assert published.spread("h3")[:2] == published.spread("hyena")[:2] == (0.1, 0.1)
    assert published.spread("gla")[:2] == (0.02, 0.1)
    assert published.spread("based", "1024x256")[:2] == (0.03, 0.03)
    assert published.spread("based", "64x4") == published.spread("based")


def test_what_no_grid_of_the_papers_code_has_is_flagged():
    outside = {(point.architecture, point.field_bytes) for point in published.points() if not point.in_grid}
    assert outside == {("based", 160_356), ("based", 579_780), ("h3", 2_097_152)}


@pytest.mark.parametrize(
    ("file", "figure"), [("mqar_sweep.py", "based_figure2"), ("zoology_figure2.py", "zoology_figure2")]
)
def test_the_paper_scales_have_every_point_and_keep_to_the_protocol(file, figure, paper_runs):
    runs, found, missing = paper_runs(file), set(), set()
    by_data = {}
    for run in runs:
        by_data.setdefault(id(run.data), (run, {}))[1][id(run.model)] = run.model
    for run, models in by_data.values():
        config = run.model_dump(mode="json")
        protocol = published.protocol_of(config)
        found.add(protocol.name)
        for other in {id(other.model): other for other in runs if other.data is run.data}.values():
            told = published.departures(other.model_dump(mode="json"), protocol)
            order = [ORDER] if figure == "based_figure2" else []
            assert told == [*order, *STARTS.get(other.architecture, [])]
        rates = {other.train.lr for other in runs if other.data is run.data}
        assert sorted(rates) == list(protocol.learning_rates)
        for point in published.points(protocol.name):
            if not any(published.matches(point, model, protocol.seq_len) for model in models.values()):
                missing.add(point.field_bytes)
    assert found == {name for name in published.protocols() if name.startswith(figure)}
    assert missing == {point.field_bytes for point in published.points(figure) if not point.in_grid}


def test_the_order_of_batches_is_all_that_its_experiment_changes(paper_runs):
    runs, sweep = paper_runs("batch_order.py"), paper_runs("mqar_sweep.py")
    protocol = published.protocols()["based_figure2"]
    told = [published.departures(run.model_dump(mode="json"), protocol) for run in runs]
    assert told == [[ALIKE]] * 36
    assert {run.train.lr for run in runs} == set(protocol.learning_rates)
    shuffled = [run.model_copy(update={"data": run.data.model_copy(update={"shuffle": True})}) for run in runs]
    assert {run.run_id for run in shuffled} <= {run.run_id for run in sweep}


def test_the_initialisation_is_all_that_its_experiment_changes_of_the_order_of_batches(paper_runs):
    runs, ordered = paper_runs("initialisation.py"), paper_runs("batch_order.py")
    assert {run.model.init for run in runs} == {"plain"}
    protocol = published.protocols()["based_figure2"]
    assert not any(published.departures(run.model_dump(mode="json"), protocol) for run in runs)
    papers = [run.model_copy(update={"model": run.model.model_copy(update={"init": "paper"})}) for run in runs]
    assert [run.run_id for run in papers] == [run.run_id for run in ordered]


@pytest.mark.parametrize(("scale", "length"), [("paper", 64), ("laptop", 16), ("smoke", 16)])
def test_the_short_piece_of_zoology_is_of_the_whole_sweep(scale, length):
    folder = Path(__file__).parents[2] / "experiments"
    whole, piece = (load_sweep(folder / file, scale) for file in ("zoology_figure2.py", "zoology_figure2_short.py"))
    wanted = [run.run_id for run in whole if {part.task.seq_len for part in run.data.train} == {length}]
    assert [run.run_id for run in piece] == wanted
    assert len(wanted) == len(whole) / {"paper": 4, "laptop": 2, "smoke": 2}[scale]


@pytest.mark.parametrize(("scale", "number"), [("paper", 56), ("laptop", 28), ("smoke", 7)])
def test_the_variants_of_zoology_differ_from_its_short_piece_in_what_they_say(scale, number):
    folder = Path(__file__).parents[2] / "experiments"
    variants, short = (
        load_sweep(folder / f"{file}.py", scale) for file in ("zoology_variants", "zoology_figure2_short")
    )
    batch = short[0].data.batch_size
    told = Counter(
        (run.architecture, run.model.n_layers, run.model.channel_mixer, run.data.batch_size, run.train.weight_decay)
        for run in variants
    )
    kinds = (
        ("base_conv", 4, "identity", batch, 0.1), ("hyena", 2, "mlp", batch, 0.1), ("rwkv4", 2, "mlp", batch, 0.1),
        ("base_conv", 8, "none", 2 * batch, 0.01), ("h3", 4, "none", 2 * batch, 0.01),
        ("hyena", 2, "mlp", 2 * batch, 0.01), ("rwkv4", 2, "mlp", 2 * batch, 0.01),
    )  # fmt: skip
    assert told == dict.fromkeys(kinds, number / 7)
    convolutions = next(run.model for run in variants if run.model.n_layers == 8)
    assert [convolutions.layer_at(index).name for index in range(8)] == (["base_conv"] * 2 + ["long_conv"] * 2) * 2
    rest = {(run.architecture, run.model.d_model, run.train.lr, run.train.epochs, run.data.test) for run in short}
    assert {
        (run.architecture, run.model.d_model, run.train.lr, run.train.epochs, run.data.test) for run in variants
    } < rest


def test_another_model_is_no_match():
    point = next(p for p in published.points("based_figure2") if p.architecture == "deltanet")
    assert published.matches(point, model(64, CONV, layer("deltanet", num_heads=2)), 1024)
    for other in (
        model(64, CONV, layer("deltanet", num_heads=2, use_gate=True)),
        model(64, CONV, layer("deltanet", num_heads=4)),
        model(64, layer("deltanet", num_heads=2), CONV),
        model(64, CONV, layer("deltanet", num_heads=2), n_layers=4),
        model(128, CONV, layer("deltanet", num_heads=2)),
        model(64, layer("base_conv", kernel_size=4), layer("deltanet", num_heads=2)),
    ):
        assert not published.matches(point, other, 1024)


def test_other_test_data_are_of_no_protocol(make_run, paper_runs):
    assert published.protocol_of(make_run().model_dump(mode="json")) is None
    config = paper_runs("mqar_sweep.py")[0].model_dump(mode="json")
    config["data"]["test"][3]["task"]["filler"] = "distinct"
    assert published.protocol_of(config) is None
    config["data"]["test"].pop()
    assert published.protocol_of(config) is None


def test_departures_are_named(paper_runs):
    config = paper_runs("mqar_sweep.py")[0].model_dump(mode="json")
    config["train"] |= {"epochs": 8, "precision": "bf16"}
    config["data"] |= {"shuffle": False, "train": config["data"]["train"][:1]}
    assert published.departures(config, published.protocols()["based_figure2"]) == [
        "epochs: 8 instead of 32",
        "training slices: 64x4 (100000) instead of 64x4 (100000), 128x8 (20000), 256x16 (20000), 256x32 (20000), "
        "256x64 (20000)",
        "precision: bf16 instead of fp32",
    ]


def test_each_figure_has_its_own_order_of_batches(paper_runs):
    for file, name, shuffled in (
        ("mqar_sweep.py", "based_figure2", False),
        ("zoology_figure2.py", "zoology_figure2_64", True),
    ):
        protocol, config = published.protocols()[name], paper_runs(file)[0].model_dump(mode="json")
        config["data"]["shuffle"] = shuffled
        assert published.departures(config, protocol) == []
        config["data"]["shuffle"] = not shuffled
        said = {True: "a new one each epoch", False: "the same each epoch"}
        assert published.departures(config, protocol) == [
            f"order of batches: {said[not shuffled]} instead of {said[shuffled]}"
        ]
    shuffled = {protocol.figure: protocol.shuffle for protocol in published.protocols().values()}
    assert shuffled == {"based_figure2": False, "zoology_figure2": True}


def test_the_start_and_the_dropout_of_mamba_are_compared_with_those_of_its_own_blocks(paper_runs):
    config = next(run for run in paper_runs("mqar_sweep.py") if run.architecture == "mamba").model_dump(mode="json")
    config["model"] |= {"init": "paper", "embed_dropout": 0.1}
    assert published.departures(config, published.protocols()["based_figure2"]) == [
        ORDER,
        "initialisation: smaller output projections instead of that of Mamba's code",
        "dropout after the embedding: 0.1 instead of 0.0",
    ]


def test_the_laptop_scales_are_of_no_protocol():
    folder = Path(__file__).parents[2] / "experiments"
    for file in ("mqar_sweep.py", "zoology_figure2.py"):
        assert {published.protocol_of(run.model_dump(mode="json")) for run in load_sweep(folder / file, "laptop")} == {
            None
        }
