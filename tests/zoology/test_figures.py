"""Figures, notebooks and the README's section beside the published figures, from made-up records."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from zoology import compare, figures, plot, published, results, results_page

ROOT = Path(__file__).parents[2]


def kept(run):
    """Enough of the grid for every part of the figures: five architectures, two widths."""
    return run.architecture in ("attention", "based", "h3", "hyena", "rwkv4", "retnet") and run.model.d_model in (
        64,
        128,
    )


def accuracy(run):
    """Grows with width, falls with the number of pairs, best at the third rate; at the last for retnet."""
    rates = (0.01, 0.00215443) if run.architecture != "retnet" else (0.0316228,)
    top = (0.3 if run.train.lr in rates else 0.2) + run.model.d_model / 320
    return {part.label: top - 0.001 * part.task.num_kv_pairs + 0.01 * run.seed for part in run.data.test}


@pytest.fixture(scope="module")
def made_up(paper_runs, make_record):
    """Records by experiment file."""

    def records(file):
        runs = [run for run in paper_runs(file) if kept(run)]
        again = [run for run in runs if run.train.lr in (0.01, 0.00215443) and run.architecture != "retnet"]
        runs += [run.model_copy(update={"seed": 1}) for run in again]
        return [make_record(run, accuracy(run), seconds=60.0 + run.model.d_model) for run in runs]

    return {file: records(file) for file in ("mqar_sweep.py", "zoology_figure2.py")}


@pytest.fixture(scope="module")
def based(made_up):
    (comparison,) = compare.compare(made_up["mqar_sweep.py"])
    return comparison


@pytest.fixture(scope="module")
def zoology(made_up):
    return compare.compare(made_up["zoology_figure2.py"])


def marked(axis, marker, *, hollow):
    """The points drawn with a marker, as {(x, y)}: hollow or filled."""
    lines = [line for line in axis.lines if line.get_marker() == marker and line.get_linestyle() == "None"]
    lines = [line for line in lines if (line.get_markerfacecolor() == "none") == hollow and line.get_markersize() > 2]
    return {(float(x), round(float(y), 6)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata())}


def in_grey(axis):
    """The published points drawn as not run."""
    lines = [line for line in axis.lines if line.get_color() == figures.MISSING["color"]]
    return {(int(x), round(float(y), 6)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata())}


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_measured_and_published_points_stand_at_their_own_state(based):
    figure = figures.beside_published(based)
    mean, hard = figure.axes
    # In the order of the names: attention (o), based (s), h3 (^), hyena (D), retnet (v).
    assert marked(mean, "^", hollow=True) == {(8_192, 0.189), (32_768, 0.248), (2_097_152, 0.279)}
    pairs = [4, 8, 16, 32, 64, 128, 256]
    tops = {24_064: 0.3 + 64 / 320 + 0.005, 97_280: 0.3 + 128 / 320 + 0.005}
    assert marked(mean, "^", hollow=False) == {
        (state, round(top - 0.001 * float(np.mean(pairs)), 6)) for state, top in tops.items()
    }
    assert marked(hard, "^", hollow=False) == {(state, round(top - 0.256, 6)) for state, top in tops.items()}
    assert marked(hard, "^", hollow=True) == set()
    assert (525_056, 1.0) in marked(mean, "o", hollow=True)
    assert {x for x, _ in marked(mean, "v", hollow=False)} == {16_896, 66_560}
    assert (mean.get_title(), hard.get_title()) == ("mean of 7 slices", "256 pairs, length 1,024")
    low, high = mean.get_xlim()
    assert low < 384 < 2_097_152 / 4 < high


def test_published_points_that_were_not_run_are_grey(based, zoology):
    mean, hard = figures.beside_published(based).axes
    ran = {(row["field_bytes"], row["published"]) for _, row in based.points.iterrows()}
    everything = {(point.field_bytes, point.accuracy) for point in published.points("based_figure2")}
    outside = {(160_356, 0.991), (579_780, 1.0), (2_097_152, 0.279)}
    assert in_grey(mean) == everything - ran - outside
    assert (67_072, 0.515) in in_grey(mean)
    assert outside - marked(mean, "s", hollow=True) == {(2_097_152, 0.279)} <= marked(mean, "^", hollow=True)
    assert in_grey(hard) == set()
    low, high = mean.get_xlim()
    assert all(low < x < high for x, _ in everything)
    grey = [in_grey(axis) for axis in figures.by_width(zoology).axes]
    assert {x for points in grey for x, _ in points} == {64, 128, 256, 512}
    assert (512, 0.87) in grey[0]
    assert list(figures.by_width(zoology).axes[0].get_xticks()) == [64, 128, 256, 512]


def test_a_whole_figure_has_no_grey_points(paper_runs, make_record):
    runs = [run for run in paper_runs("zoology_figure2.py") if (run.train.lr, run.data.max_test_length) == (0.01, 128)]
    comparisons = compare.compare([make_record(run, 0.5) for run in runs])
    (axis,) = figures.by_width(comparisons).axes
    assert in_grey(axis) == set()
    assert not any("not run" in text for text in texts(axis.get_legend()))


def test_intervals_bound_and_edges_are_drawn_and_explained(based):
    mean, hard = figures.beside_published(based).axes
    assert texts(hard.get_legend()) == [
        "attention", "based", "h3", "hyena", "retnet", "published", "published, not run\nhere (35)",
        "ruled out by the\ncounting bound", "95% interval", "learning rate at\nedge of grid",
    ]  # fmt: skip
    spans = [segment for collection in hard.collections for segment in getattr(collection, "get_segments", list)()]
    half = 12.7062 * 0.005
    spread = 0.3 + 64 / 320 + 0.005 - 0.256
    assert any(
        segment[0][0] == 24_064 and segment[:, 1] == pytest.approx([spread - half, spread + half]) for segment in spans
    )
    (dots,) = [line for line in hard.lines if line.get_color() == "white"]
    assert set(dots.get_xdata()) == {16_896, 66_560}
    assert len(mean.patches) + len([c for c in mean.collections if "Fill" in type(c).__name__]) == 1


def test_learning_rates_show_every_model_and_the_selected_rate(based):
    figure = figures.learning_rates([based])
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["attention", "based", "h3", "hyena", "retnet"]
    curves = [line for line in panels["based"].lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 4]
    assert len(curves) == 6
    assert all(np.argmax(line.get_ydata()) == 2 for line in curves)
    (low, high) = (line for line in panels["retnet"].lines if len(line.get_xdata()) == 1)
    assert list(low.get_xdata()) == list(high.get_xdata()) == [0.0316228]
    assert low.get_markerfacecolor() == "white"
    alphas = [line.get_alpha() for line in curves]
    assert alphas == sorted(alphas)


def test_the_table_of_slices_names_them_as_the_figures_do(based):
    bare, table = results.slice_table(based.frame), plot.slice_table(based.frame)
    pairs = ["4 pairs, length 64", "8 pairs, length 64", "16 pairs, length 64", "32 pairs, length 128"]
    pairs += ["64 pairs, length 256", "128 pairs, length 512", "256 pairs, length 1,024"]
    assert list(table.columns) == [*bare.columns[:-8], "mean", *pairs]
    assert table[pairs[-1]].tolist() == [round(value, 3) for value in bare["mqar seq_len=1024 num_kv_pairs=256"]]


def test_learning_rates_that_were_not_run_have_their_place(paper_runs, make_record):
    runs = [run for run in paper_runs("mqar_sweep.py") if run.architecture == "h3" and 0.002 < run.train.lr < 0.02]
    (comparison,) = compare.compare([make_record(run, 0.5) for run in runs])
    (axis,) = figures.learning_rates([comparison]).axes
    low, high = axis.get_xlim()
    assert low < 0.001 < 0.0316228 < high
    assert set(axis.xaxis.get_minor_formatter().format_ticks([0.002, 0.003])) == {""}


def test_several_lengths_get_a_row_each(zoology):
    figure = figures.learning_rates(zoology)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        f"{name}, length {length}"
        for length in (64, 128, 256, 512)
        for name in ("attention", "based", "h3", "hyena", "rwkv4")
    ]


def test_training_time_is_the_mean_over_the_seeds_of_the_selected_rate(based, zoology):
    (axis,) = figures.training_time([based]).axes
    assert {x for x, _ in marked(axis, "^", hollow=False)} == {60.0 + 64, 60.0 + 128}
    figure = figures.training_time(zoology)
    assert [axis.get_title() for axis in figure.axes] == [f"length {length}" for length in (64, 128, 256, 512)]
    assert figure.get_supxlabel() == "training time of one run (seconds, made up)"


def test_by_width(zoology):
    figure = figures.by_width(zoology)
    assert [axis.get_title() for axis in figure.axes] == [
        "4 pairs, length 64", "8 pairs, length 128", "16 pairs, length 256", "64 pairs, length 512",
    ]  # fmt: skip
    assert marked(figure.axes[2], "^", hollow=True) == {(64, 0.08), (128, 0.643)}
    assert marked(figure.axes[2], "^", hollow=False) == {(64, 0.5 + 0.005 - 0.016), (128, 0.7 + 0.005 - 0.016)}


def test_a_figure_is_the_same_twice(based, tmp_path):
    from zoology.plot import save_figure

    first, second = (
        [path.read_bytes() for path in save_figure(figures.training_time([based]), tmp_path, name)]
        for name in ("first", "second")
    )
    assert first == second


def outputs_of(name):
    """What a notebook shows, cell by cell."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize(
    ("name", "file", "pictures"),
    [("based_figure2", "mqar_sweep.py", 3), ("zoology_figure2", "zoology_figure2.py", 4)],
)
def test_the_notebooks_run(name, file, pictures, made_up, write_records, monkeypatch):
    monkeypatch.setenv("ZOOLOGY_RESULTS", str(write_records(made_up[file])))
    outputs = outputs_of(name)
    drawn = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == pictures
    assert min(map(len, drawn)) > 20_000
    text = "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")
    order = "differs from the protocol in order of batches: a new one each epoch instead of the same each epoch"
    assert (order in text) == (name == "based_figure2")
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert "published" in tables[0]


@pytest.mark.parametrize("figure", results_page.FIGURES, ids=lambda figure: Path(figure.directory).name)
def test_the_notebooks_show_the_records_of_this_repository(figure, monkeypatch):
    monkeypatch.delenv("ZOOLOGY_RESULTS", raising=False)
    comparisons = compare.load(ROOT / figure.directory)
    several = comparisons[0].protocol.name != comparisons[0].protocol.figure
    outputs = outputs_of(Path(figure.directory).name)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3 + several
    printed = [output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    notes = compare.all_notes(comparisons) if several else compare.notes(comparisons[0])
    assert "".join(printed) == "\n".join(notes) + "\n"
    table = next(output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    names = {name for comparison in comparisons for name in comparison.points["architecture"]}
    assert all(f"<td>{name}</td>" in table for name in names)
    assert table.count("<tr>") == 1 + sum(len(comparison.points) for comparison in comparisons)


def test_notes_say_of_what_nothing_was_run(zoology, based):
    title = published.protocols()["zoology_figure2_512"].title
    assert compare.all_notes(zoology[:3])[-1] == f"not run at all, and in no picture: {title}"
    assert compare.all_notes(zoology)[-1] == ""
    assert compare.all_notes([based]) == [based.protocol.title, *compare.notes(based), ""]


# -- the README's section -----------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path, made_up):
    """A repository with some records of the first figure, and a README without a section."""
    for record in made_up["mqar_sweep.py"]:
        folder = tmp_path / results_page.FIGURES[0].directory / record["run_id"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(results.store.to_json(record))
    (tmp_path / "README.md").write_text("# Title\n\ntext\n\n## Layout\n\nmore\n")
    return tmp_path


def test_the_readme_has_the_section_of_its_records():
    text = (ROOT / "README.md").read_text()
    assert results_page.replace_section(text, ROOT) == text
    pages = results_page.pages(ROOT)
    assert list(pages) == [ROOT / figure.directory / "README.md" for figure in results_page.FIGURES]
    assert {path: path.read_text() for path in pages} == pages


def test_without_records_there_is_no_section(tmp_path, capsys):
    text = "# Title\n\n## Layout\n"
    assert results_page.replace_section(text, tmp_path) == text
    filled = text.replace("## Layout", "<!-- results -->\nold\n<!-- end results -->\n\n## Layout")
    assert results_page.replace_section(filled, tmp_path) == text
    assert results_page.pages(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert results_page.main([str(tmp_path / "README.md")]) == 0
    directories = " or ".join(str(tmp_path / figure.directory) for figure in results_page.FIGURES)
    assert capsys.readouterr().out == f"no records in {directories}\n"


def test_the_section_is_written_once_and_then_replaced(root):
    readme = root / "README.md"
    results_page.main([str(readme)])
    first = readme.read_text()
    assert first.startswith("# Title\n\ntext\n\n<!-- results -->\n## Beside the published figures\n")
    assert first.endswith("<!-- end results -->\n\n## Layout\n\nmore\n")
    assert results_page.replace_section(first.replace("12 of 47", "13 of 47"), root) == first
    drawn = {path.name for path in (root / results_page.FIGURES[0].directory).glob("*.png")}
    assert drawn == {"beside_published.png", "learning_rates.png"}
    assert "`python -m zoology.run experiments/mqar_sweep.py --scale paper`" in first
    pictures = [line.split("(")[1][:-1] for line in first.splitlines() if line.startswith("![")]
    assert pictures == ["experiments/results/based_figure2/beside_published.png"]
    assert (root / pictures[0]).is_file()
    page = root / results_page.FIGURES[0].directory / "README.md"
    assert "](experiments/results/based_figure2/README.md)" in first
    assert "](beside_published.png)" in page.read_text()
    assert "](../../../notebooks/based_figure2.ipynb)" in page.read_text()


def test_section_and_page_say_how_far_it_is_and_the_page_takes_over_what_was_written(root, made_up):
    bare, runs = (root / "README.md").read_text(), len(made_up["mqar_sweep.py"])
    far = f"**12 of 47 published points have been run so far**, in {runs} runs."
    assert far in results_page.replace_section(bare, root)
    (root / results_page.FIGURES[0].directory / results_page.NOTES).write_text("Why they differ.\n")
    (page,) = results_page.pages(root).values()
    assert far in page
    assert page.endswith("\n\nWhy they differ.\n")
    assert "Why they differ." not in results_page.replace_section(bare, root)


def test_the_section_has_the_headlines_of_the_notes(based, zoology):
    headline = compare.headline(based)
    assert [line for line in compare.notes(based) if line in headline] == headline
    assert [line.split(":")[0] for line in headline] == [
        "of the published accuracy", "order at equal memory as the field counts it", "order at equal measured memory",
    ]  # fmt: skip
    for line in headline:
        assert f"\n- {line}\n" in results_page._part(results_page.FIGURES[0], [based])
    assert "\n- Zoology, Fig. 2, length 64, of the published" in results_page._part(results_page.FIGURES[1], zoology)


def test_the_section_counts_lengths_of_which_nothing_was_run(zoology):
    whole = sum(len(published.points(f"zoology_figure2_{length}")) for length in (64, 128, 256, 512))
    ran = [len(comparison.points) for comparison in zoology]
    runs = [comparison.frame["run_id"].nunique() for comparison in zoology]
    text = results_page._part(results_page.FIGURES[1], zoology[:1])
    assert f"**{ran[0]} of {whole} published points have been run so far**, in {runs[0]} runs. Nothing yet" in text
    assert (
        text.count(
            "Nothing yet: Zoology, Fig. 2, length 128; Zoology, Fig. 2, length 256; Zoology, Fig. 2, length 512."
        )
        == 1
    )
    text = results_page._part(results_page.FIGURES[1], zoology)
    assert f"**{sum(ran)} of {whole} published points have been run so far**, in {sum(runs)} runs.\n" in text


def test_the_section_names_the_precision_of_all_runs(paper_runs, make_record):
    (run,) = [run for run in paper_runs("mqar_sweep.py") if run.architecture == "attention"][:1]
    record, other = make_record(run, 0.9), make_record(run.model_copy(update={"seed": 1}), 0.9)
    for precisions, option in ((("bf16", "bf16"), " --precision bf16"), (("fp32", "bf16"), ""), (("fp32", "fp32"), "")):
        records = [part | {"precision": precision} for part, precision in zip((record, other), precisions)]
        text = results_page._part(results_page.FIGURES[0], compare.compare(records))
        assert f"experiments/mqar_sweep.py --scale paper{option}`" in text


def test_several_lengths_are_folded(zoology):
    text = results_page._page(results_page.FIGURES[1], zoology, "")
    assert [line for line in text.splitlines() if line.startswith("<details>")] == [
        f"<details><summary>Zoology, Fig. 2, length {length}</summary>" for length in (64, 128, 256, 512)
    ]
    assert text.count("| `attention` |") == 8


def test_the_table_has_state_measured_and_counted_accuracy_and_cost(based):
    (line,) = [line for line in results_page.markdown_table(based).splitlines() if "8,192" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "`h3`", "d_model=64 d_state=16 head_dim=2", "24,064", "8,192", "0.432",
        "0.369-0.496", "4 of 4", "2", "0.249", "0.189", "+0.243 \\*", f"{5 * 124 / 60:.1f}",
    ]  # fmt: skip


def test_a_text_without_a_place_is_refused(root):
    with pytest.raises(ValueError, match="no place for the results: the text needs the heading '## Layout'"):
        results_page.replace_section("# Title\n", root)
