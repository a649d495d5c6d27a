"""The experiments of "Just read twice", their figures and their notebook, on records that are made up."""

import json
from pathlib import Path

import matplotlib.colors
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from zoology import plots_jrt, results
from zoology.config import RunConfig
from zoology.runner import plan
from zoology.runner.driver import run_sweep
from zoology.runner.store import to_json, write_atomically

ROOT = Path(__file__).parents[2]
ORDER, PROMPT = ROOT / "experiments" / "jrt_set_disjointness.py", ROOT / "experiments" / "jrt_prompt.py"


def order_accuracy(run, first, second):
    """Made up: the causal model loses .2 when the long set comes first and gains with its state; the other does not."""
    if run.architecture == "prefix_linear_attention":
        return 0.9
    return (0.7 if first < second else 0.5) + 0.001 * run.model.d_model


def passes_accuracies(run):
    more = 0.01 * run.model.layers[1].options.get("feature_dim", 0)
    return {part.label: 0.5 + 0.1 * part.task.num_passes + more for part in run.data.test}


def order_accuracies(run):
    return {part.label: order_accuracy(run, part.task.first_size, part.task.second_size) for part in run.data.test}


@pytest.fixture(scope="module")
def order_records(make_record):
    return [make_record(run, order_accuracies(run)) for run in plan.load_sweep(ORDER, "laptop")]


@pytest.fixture(scope="module")
def passes_records(make_record):
    return [make_record(run, passes_accuracies(run)) for run in plan.load_sweep(PROMPT, "laptop")]


# -- experiments ------------------------------------------------------------------------------------------


def sizes_of(parts):
    return [(part.task.first_size, part.task.second_size) for part in parts]


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_both_orders_are_trained_and_tested_at_equal_state(scale):
    runs = plan.load_sweep(ORDER, scale)
    assert len({run.run_id for run in runs}) == len(runs)
    for run in runs:
        for sizes in (sizes_of(run.data.train), sizes_of(run.data.test)):
            assert len(set(sizes)) == len(sizes)
            assert set(sizes) == {pair[::-1] for pair in sizes}
    grids = {
        name: sorted(
            (run.model.d_model, run.model.layers[1].options["feature_dim"], run.train.lr, run.seed)
            for run in runs
            if run.architecture == name
        )
        for name in ("based", "prefix_linear_attention")
    }
    assert grids["based"] == grids["prefix_linear_attention"] != []
    assert {run.architecture for run in runs} == set(grids)


def test_on_a_laptop_each_model_learns_one_order_and_each_order_has_the_same_models_seeds_and_numbers():
    runs = plan.load_sweep(ORDER, "laptop")
    assert len({run.run_id for run in runs}) == len(runs) == 16
    seen = {(2, 48): [], (48, 2): []}
    for run in runs:
        (asked,) = sizes_of(run.data.test)
        trained = sizes_of(run.data.train)
        assert {first < second for first, second in trained} == {asked[0] < asked[1]}
        assert asked in trained
        numbers = [part.num_examples for part in run.data.train]
        seen[asked].append((run.architecture, run.model.model_dump_json(), run.seed, run.train, numbers))
    assert seen[2, 48] == seen[48, 2]
    assert {name for name, *_ in seen[2, 48]} == {"linear_attention", "prefix_linear_attention"}
    assert {seed for _, _, seed, *_ in seen[2, 48]} == {0, 1, 2, 3}


def test_the_paper_scale_is_the_published_protocol():
    runs = plan.load_sweep(ORDER, "paper")
    assert len(runs) == 5 * 4 * 2 * 3 * 2
    data = runs[0].data
    sizes = [(part.task.first_size, part.task.second_size) for part in data.train]
    assert sizes == [
        (4, 16), (16, 4), (8, 32), (32, 8), (16, 64), (64, 16),
        (4, 128), (128, 4), (16, 256), (256, 16), (4, 256), (256, 4),
    ]  # fmt: skip
    assert {part.num_examples for part in data.train} == {20_000}
    assert {part.num_examples for part in data.test} == {1000}
    assert max(part.task.first_size for part in data.test) == 768
    assert len(data.test) == 20
    assert (data.batch_size, runs[0].train.epochs) == (128, 48)
    assert (runs[0].model.n_layers, runs[0].model.vocab_size) == (4, 2048)
    assert {run.train.lr for run in runs} == {1e-4, 5e-4, 8e-4}
    assert {run.model.layers[1].options["num_heads"] for run in runs} == {2}


@pytest.mark.parametrize(("scale", "count"), [("smoke", 2), ("laptop", 16), ("paper", 4)])
def test_one_state_is_part_of_the_whole_sweep(scale, count):
    runs = plan.load_sweep(ORDER.with_name("jrt_one_state.py"), scale)
    whole = plan.load_sweep(ORDER, scale)
    assert len({run.run_id for run in runs}) == len(runs) == count
    assert len({(run.architecture, run.model.model_dump_json()) for run in runs}) == 2
    for run in runs:
        alike = [one for one in whole if (one.model, one.train, one.seed) == (run.model, run.train, run.seed)]
        (same,) = [one for one in alike if one.data.train == run.data.train]
        assert run.data.batch_size == same.data.batch_size
        assert set(run.data.test) <= set(same.data.test)
    tested = {sizes for run in runs for sizes in sizes_of(run.data.test)}
    assert tested == {pair[::-1] for pair in tested}
    assert max(tested) == {"smoke": (6, 2), "laptop": (48, 2), "paper": (768, 16)}[scale]


@pytest.mark.parametrize("scale", plan.SCALES)
def test_every_causal_model_reads_several_times_the_same_questions(scale):
    runs = plan.load_sweep(PROMPT, scale)
    assert len({run.run_id for run in runs}) == len(runs)
    models = {}
    for run in runs:
        tested = {part.task.num_passes for part in run.data.test}
        assert tested <= {part.task.num_passes for part in run.data.train}
        inner = frozenset(part.task.task for part in run.data.test)
        key = (run.architecture, run.model.model_dump_json(), run.train.lr, run.seed, inner)
        models.setdefault(key, []).extend(sorted(tested))
    for (name, *_, inner), numbers in models.items():
        # Three passes over the sets are too long for a laptop.
        most = 2 if scale == "laptop" and min(task.name for task in inner) == "set_disjointness" else 3
        assert numbers == list(range(1, 2 if name == "prefix_linear_attention" else most + 1))
    asked = {type(part.task.task).__name__ for run in runs for part in run.data.test}
    assert asked == {"MQAR", "SetDisjointness"}


def test_on_a_laptop_models_differ_in_how_often_they_read_the_long_set_first_and_in_nothing_else():
    runs = [run for run in plan.load_sweep(PROMPT, "laptop") if run.model.vocab_size == 112]
    by_passes = {}
    for run in runs:
        (asked,) = run.data.test
        assert (asked.task.task.first_size, asked.task.task.second_size) == (48, 2)
        by_passes.setdefault((run.architecture, asked.task.num_passes), []).append(run)
        for part in run.data.train:
            short_first = part.task.task.first_size < part.task.task.second_size
            assert part.task.num_passes == (1 if short_first else asked.task.num_passes)
    assert {key: len(found) for key, found in by_passes.items()} == {
        ("linear_attention", 1): 4,
        ("linear_attention", 2): 4,
        ("prefix_linear_attention", 1): 1,
    }
    for once, twice in zip(by_passes["linear_attention", 1], by_passes["linear_attention", 2]):
        assert (once.model, once.train, once.seed) == (twice.model, twice.train, twice.seed)
        for part, again in zip(once.data.train, twice.data.train, strict=True):
            assert (part.task.task, part.num_examples) == (again.task.task, again.num_examples)
    # The same examples, however often they are read.
    (asked,), (again,) = (by_passes["linear_attention", number][0].data.test for number in (1, 2))
    context = asked.task.task.prefix_length
    once, twice = (part.task.split("test", 4, 0).inputs for part in (asked, again))
    assert twice[:, :context].equal(once[:, :context])
    assert twice[:, context:].equal(once)


@pytest.mark.parametrize("path", [ORDER, PROMPT], ids=lambda path: path.stem)
def test_smoke_runs_and_is_drawn(path, tmp_path, in_process_engine, watcher):
    planned = plan.make_plan(plan.load_sweep(path, "smoke"), "cpu")
    outcome = run_sweep(planned, in_process_engine(tmp_path), tmp_path, watcher, total=len(planned))
    assert not outcome.failures
    assert len(outcome.records) == len(planned)
    assert plots_jrt.main([str(tmp_path)]) == 0
    (figure,) = tmp_path.glob("*.png")
    assert figure.stem == {"jrt_prompt": "passes", "jrt_set_disjointness": "order"}[path.stem]


# -- tables and figures -----------------------------------------------------------------------------------


def test_the_order_table_has_what_was_put_in(order_records):
    table = plots_jrt.order_table(results.from_records(order_records)).set_index("architecture")
    assert set(zip(table["short"], table["long"])) == {(2, 48)}
    columns = [plots_jrt.SHORT_FIRST, plots_jrt.LONG_FIRST, "difference"]
    np.testing.assert_allclose(table.loc["linear_attention", columns].astype(float), [0.724, 0.524, 0.2])
    np.testing.assert_allclose(table.loc["prefix_linear_attention", columns].astype(float), [0.9, 0.9, 0], atol=1e-12)


def lines_of(axis):
    """(colour, filled, x, y) of every line that has markers."""
    return [
        (line.get_color(), line.get_markerfacecolor() != "white", list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.lines
        if line.get_marker() not in ("None", "", None)
    ]


def test_the_order_figure_draws_it(order_records):
    frame = results.from_records(order_records)
    figure = plots_jrt.order(frame)
    looks = plots_jrt.plot.styles(plots_jrt.plot.by_name(frame))
    assert len({matplotlib.colors.to_hex(look.color) for look in looks.values()}) == 2
    states = {name: sorted(part["state_bytes"].unique()) for name, part in frame.groupby("architecture")}
    assert states == {"linear_attention": [584], "prefix_linear_attention": [1584]}
    (axis,) = figure.axes
    assert axis.get_title() == "sets of 2 and 48"
    drawn = {(colour, filled): (x, y) for colour, filled, x, y in lines_of(axis)}
    colours = {name: look.color for name, look in looks.items()}
    assert set(drawn) == {(colour, filled) for colour in colours.values() for filled in (True, False)}
    for name, colour in colours.items():
        assert drawn[colour, True][0] == drawn[colour, False][0] == states[name]
    causal, prefix = colours["linear_attention"], colours["prefix_linear_attention"]
    np.testing.assert_allclose(np.subtract(drawn[causal, True][1], drawn[causal, False][1]), 0.2)
    np.testing.assert_allclose(drawn[prefix, True][1], 0.9)
    (guess,) = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert set(guess.get_ydata()) == {0.5}
    figure.canvas.draw()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["584", "1,584"]


def test_of_models_with_equal_state_the_best_is_drawn_with_the_range_of_its_seeds(make_record):
    runs = [run for run in plan.load_sweep(ORDER, "laptop") if run.architecture == "linear_attention"]
    others = [run.model_copy(update={"model": run.model.model_copy(update={"embed_dropout": 0.2})}) for run in runs]
    ranks = {seed: rank for rank, seed in enumerate(sorted({run.seed for run in runs}))}
    records = [
        make_record(
            run, {label: value + 0.01 * ranks[run.seed] - lost for label, value in order_accuracies(run).items()}
        )
        for lost, part in ((0, runs), (0.3, others))
        for run in part
    ]
    (axis,) = plots_jrt.order(results.from_records(records)).axes
    means = {filled: y for _, filled, _, y in lines_of(axis)}
    np.testing.assert_allclose([means[True], means[False]], [[0.724 + 0.015], [0.524 + 0.015]])
    bars = [segment[:, 1] for lines in axis.collections for segment in lines.get_segments()]
    np.testing.assert_allclose(sorted(map(tuple, bars)), [(0.524, 0.554), (0.724, 0.754)])


def test_one_state_lies_within_every_panel(make_record):
    runs = [run for run in plan.load_sweep(ORDER, "paper") if (run.model.d_model, run.train.lr) == (36, 5e-4)]
    runs = [run for run in runs if run.model.layers[1].options["feature_dim"] == 4 and run.seed == 0]
    frame = results.from_records([make_record(run, order_accuracies(run)) for run in runs])
    (state,) = frame["state_bytes"].unique()
    figure = plots_jrt.order(frame)
    figure.canvas.draw()
    assert len(figure.axes) == 10
    for axis in figure.axes:
        assert axis.get_xlim() == (state / 2, state * 2)
        assert list(axis.get_xticks()) == [state]
        for _, _, x, y in lines_of(axis):
            (at,) = axis.transAxes.inverted().transform(axis.transData.transform(list(zip(x, y))))
            assert 0.4 < at[0] < 0.6
            assert 0 < at[1] < 1


def test_the_passes_table_and_figure_have_what_was_put_in(passes_records):
    frame = results.from_records(passes_records)
    table = plots_jrt.passes_table(frame).set_index(["question", "architecture", "point"])
    questions = {"mqar, 8 pairs", "sets of 48, then 2"}
    assert set(table.index.get_level_values("question")) == questions
    row = table.loc["mqar, 8 pairs", "based", "d_model=32 feature_dim=4"]
    np.testing.assert_allclose(row[["1 pass", "2 passes", "3 passes"]].astype(float), [0.64, 0.74, 0.84])
    for question in questions:
        width, feature_dim = (32, 1) if question.startswith("mqar") else (24, 2)
        prefix = table.loc[question, "prefix_linear_attention", f"d_model={width} feature_dim={feature_dim}"]
        assert prefix["1 pass"] == pytest.approx(0.6 + 0.01 * feature_dim)
        assert np.isnan(prefix["2 passes"])
    figure = plots_jrt.passes(frame)
    looks = plots_jrt.plot.styles(plots_jrt.plot.by_name(frame))
    for axis in figure.axes:
        pairs = axis.get_title().startswith("mqar")
        passes, name, states = ([1, 2, 3], "based", (1, 2, 4)) if pairs else ([1, 2], "linear_attention", (1,))
        curves = sorted(y for colour, _, x, y in lines_of(axis) if colour == looks[name].color and x == passes)
        np.testing.assert_allclose(curves, [[0.5 + 0.1 * number + 0.01 * f for number in passes] for f in states])


def test_the_selected_learning_rate_is_drawn(make_record):
    """Of several rates the one best on validation counts, though here the others are better on test."""
    runs = [run for run in plan.load_sweep(ORDER, "paper") if run.model.d_model == 36 and run.seed == 0]
    records = [
        make_record(run, order_accuracies(run), validation=0.9)
        if run.train.lr == 5e-4
        else make_record(run, 0.99, validation=0.5)
        for run in runs
    ]
    table = plots_jrt.order_table(results.from_records(records))
    assert len(table) == 2 * 4 * 10
    np.testing.assert_allclose(table[table["architecture"] == "based"]["difference"], 0.2)


def test_a_run_is_measured_by_its_means_over_the_pairs_that_it_was_tested_on(make_record, order_records):
    def accuracies(run, lost):
        """With the long set first `lost` less, and nothing right at all beyond 256 tokens."""
        sizes = {part.label: (part.task.first_size, part.task.second_size) for part in run.data.test}
        return {
            label: 0.9 if first < second else 0.9 - lost if first <= 256 else 0.0
            for label, (first, second) in sizes.items()
        }

    runs = [run for run in plan.load_sweep(ORDER, "paper") if (run.model.d_model, run.train.lr) == (36, 5e-4)]
    runs = [run for run in runs if run.model.layers[1].options["feature_dim"] == 4 and run.architecture == "based"]
    frame = results.from_records([make_record(run, accuracies(run, 0.1 * run.seed)) for run in runs])
    table = plots_jrt.order_by_run(frame).set_index("seed")
    assert list(table.index) == [0, 1]
    # Ten pairs, of which five have a longer set of 512 or 768.
    np.testing.assert_allclose(table[plots_jrt.SHORT_FIRST], 0.9)
    np.testing.assert_allclose(table[plots_jrt.LONG_FIRST], [0.45, 0.4])
    np.testing.assert_allclose(table["difference"], [0.45, 0.5])
    np.testing.assert_allclose(plots_jrt.order_by_run(frame, longest=256)["difference"], [0, 0.1], atol=1e-12)
    with pytest.raises(ValueError, match="no run was tested on a pair of set sizes in both orders within longest=16"):
        plots_jrt.order_by_run(frame, longest=16)
    with pytest.raises(ValueError, match=r"no run was tested on a pair of set sizes in both orders$"):
        plots_jrt.order_by_run(results.from_records(order_records))


def test_one_model_with_two_sets_of_test_data_has_rows_for_each(make_record):
    (run, *_) = plan.load_sweep(ORDER, "smoke")
    more = run.model_copy(update={"data": run.data.model_copy(update={"num_validation": 200}), "seed": 1})
    fewer = [part.model_copy(update={"num_examples": 50}) for part in run.data.test]
    more = more.model_copy(update={"data": more.data.model_copy(update={"test": tuple(fewer)})})
    records = [make_record(one, order_accuracies(one)) for one in (run, more)]
    table = plots_jrt.order_table(results.from_records(records))
    assert list(zip(table["short"], table["long"])) == [(2, 6), (2, 6)]
    np.testing.assert_allclose(table["difference"], 0.2)


def test_what_cannot_be_drawn_is_said(order_records, passes_records, results_directory, tmp_path, capsys):
    by_order, by_passes = results.from_records(order_records), results.from_records(passes_records)
    with pytest.raises(ValueError, match="must have some, num_passes=1 among them"):
        plots_jrt.passes(by_order)
    with pytest.raises(ValueError, match="must have set disjointness slices of both"):
        plots_jrt.order(by_passes)
    one_order = by_order[[options["first_size"] == 2 for options in by_order["task_options"]]]
    with pytest.raises(ValueError, match="no pair of set sizes was tested in both orders"):
        plots_jrt.order_table(one_order)
    assert plots_jrt.main([str(results_directory), "--out", str(tmp_path)]) == 2
    assert "neither set disjointness nor jrt_prompt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- notebook and committed records -----------------------------------------------------------------------


def write(records, directory):
    for record in records:
        folder = directory / record["run_id"]
        folder.mkdir(parents=True)
        write_atomically(folder / "config.json", to_json(record["config"]))
        write_atomically(folder / "result.json", to_json(record))
    return directory


def test_the_notebook_draws_both_figures(order_records, passes_records, make_record, tmp_path, monkeypatch):
    paper = [run for run in plan.load_sweep(ORDER, "paper") if run.model.d_model == 36][:4]
    for name, half in (("ONE_STATE", paper[::2]), ("SMALL_STATE", paper[1::2])):
        written = write([make_record(run, order_accuracies(run)) for run in half], tmp_path / name)
        monkeypatch.setenv(f"ZOOLOGY_JRT_{name}", str(written))
    monkeypatch.setenv("ZOOLOGY_JRT_ORDER", str(write(order_records, tmp_path / "order")))
    monkeypatch.setenv("ZOOLOGY_JRT_PASSES", str(write(passes_records, tmp_path / "passes")))
    notebook = nbformat.read(ROOT / "notebooks" / "jrt.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    for figure in (outputs[1], outputs[3]):
        assert len(figure[0]["data"]["image/png"]) > 20_000
    order, passes = (outputs[index][0]["data"]["text/plain"] for index in (2, 4))
    assert all(word in order for word in ("short set first", "long set first", "difference"))
    for by_run in (outputs[5], outputs[6]):
        assert by_run[0]["data"]["text/plain"].count("0.2") == 4
    assert all(word in passes for word in ("1 pass", "2 passes", "3 passes", "sets of 48, then 2", "mqar, 8 pairs"))


@pytest.mark.parametrize("path", [ORDER, PROMPT], ids=lambda path: path.stem)
def test_the_committed_records_are_those_of_the_laptop_scale(path):
    """Every run that the experiment plans has its record, and a further record differs in its seed only."""
    records = results.load_records(ROOT / "experiments" / "results" / path.stem)
    planned = {run.run_id: run for run in plan.load_sweep(path, "laptop")}
    seeds = {run.seed for run in planned.values()}
    for record in records:
        run = RunConfig.model_validate_json(json.dumps(record["config"]))
        assert run.run_id == record["run_id"]
        assert any(run.model_copy(update={"seed": seed}).run_id in planned for seed in seeds)
    assert set(planned) <= {record["run_id"] for record in records}
