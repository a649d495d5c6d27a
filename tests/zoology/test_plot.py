"""The plot: the bound it shows, the data it draws, and whether it can be told apart."""

import math

import matplotlib.colors
import numpy as np
import pandas as pd
import pytest

from zoology import plot, results


def fano(accuracy, symbols):
    """Bits about one of `symbols` equal answers in a guess that is right with probability `accuracy`."""
    error = 1 - accuracy
    entropy = sum(-p * math.log2(p) for p in (error, accuracy) if p > 0)
    return math.log2(symbols) - entropy - (error * math.log2(symbols - 1) if error else 0)


@pytest.mark.parametrize("symbols", [2, 128, 4096])
@pytest.mark.parametrize("answers", [1, 256])
def test_bits_needed_are_those_of_fano(symbols, answers):
    accuracy = np.linspace(1 / symbols, 1, 50)
    expected = [answers * fano(value, symbols) for value in accuracy]
    found = plot.bits_needed(accuracy, answers * math.log2(symbols), answers)
    np.testing.assert_allclose(found, expected, atol=1e-9 * answers)


def part(bits, answers, vocab_size):
    return pd.Series({"required_bits": bits, "answers": answers, "vocab_size": vocab_size})


def test_the_bound_goes_from_chance_to_one():
    # 256 pairs of a vocabulary of 8192, as in the paper's hardest slice: 3072 bits, 384 bytes.
    curve = plot.bound(part(256 * 12, 256, 8192), np.array([0, 96, 192, 383, 384, 10_000.0]))
    assert curve[0] == pytest.approx(1 / 4096)
    assert curve[-1] == curve[-2] == 1
    # 3 and 6 bits of the 12 of each answer; knowing a quarter or half of them outright is possible, a little more
    # may be.
    assert fano(curve[1], 4096) == pytest.approx(3, abs=1e-2)
    assert fano(curve[2], 4096) == pytest.approx(6, abs=1e-2)
    assert 0.25 < curve[1] < 0.35
    assert 0.5 < curve[2] < 0.6
    assert 0.99 < curve[3] < 1
    assert np.all(np.diff(curve) >= 0)


def test_the_bound_is_the_inverse_of_the_bits_needed():
    accuracy = np.linspace(0.01, 1, 200)
    state = plot.bits_needed(accuracy, 16 * 7, 16) / 8
    np.testing.assert_allclose(plot.bound(part(16 * 7, 16, 256), state), accuracy, atol=2e-3)


@pytest.mark.parametrize("row", [part(100, None, 256), part(0, 4, 256), part(100, 1, 256)])
def test_tasks_without_such_a_bound_have_none(row):
    """Questions unknown, nothing to carry, or more bits than the answers have."""
    assert plot.bound(row, np.array([1.0])) is None


def test_styles_differ_and_not_by_colour_alone():
    looks = plot.styles([f"name {index}" for index in range(55)])
    assert len({(look.marker, look.linestyle) for look in looks.values()}) == 55
    assert len(set(looks.values())) == 55


def test_colours_differ_in_the_dark():
    """Neighbours in the legend differ in lightness or in marker; no colour is too light to see on white."""

    def luminance(colour):
        return float(np.dot(matplotlib.colors.to_rgb(colour), (0.2126, 0.7152, 0.0722)))

    assert all(luminance(colour) < 0.75 for colour in plot.COLOURS)
    assert len(set(plot.MARKERS)) == len(plot.MARKERS)


def test_the_frontier_has_the_points_that_nothing_smaller_beats():
    points = pd.DataFrame({"state_bytes": [4, 1, 2, 2, 3, 5], "accuracy": [0.7, 0.1, 0.4, 0.5, 0.3, 0.7]})
    best = plot.frontier(points)
    assert list(zip(best["state_bytes"], best["accuracy"])) == [(1, 0.1), (2, 0.5), (4, 0.7)]


def test_the_figure_draws_the_selected_accuracies(results_directory):
    frame = results.load(results_directory)
    selected = results.select(frame)
    figure = plot.tradeoff(frame)
    axes = [axis for axis in figure.axes if axis.axison]
    assert len(axes) == 1 + 2
    for axis, name in zip(axes, ("mean", "short", "long")):
        marked = {
            (float(x), float(y))
            for line in axis.lines
            if line.get_linestyle() == "None"
            for x, y in zip(*line.get_data())
        }
        rows = selected[selected["slice"] == name]
        assert marked == set(zip(rows["state_bytes"].astype(float), rows["accuracy"]))
        assert axis.get_xscale() == "log"
        floors = results.floors(frame).max(axis=1)
        expected = floors.mean() if name == "mean" else floors[name]
        assert [line.get_ydata()[0] for line in axis.lines if list(line.get_xdata()) == [0, 1]] == [expected]
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels[:2] == ["attention", "based"]
    assert "ruled out by the\ncounting bound" in labels
    assert "range over seeds" in labels
    assert "learning rate at\nedge of grid" in labels  # of two rates each is at the edge


def test_hollow_points_are_those_at_the_edge_of_the_grid(results_directory):
    frame = results.load(results_directory)
    axis = plot.tradeoff(frame[frame["lr"] == 1e-2]).axes[0]
    faces = {line.get_markerfacecolor() for line in axis.lines if line.get_linestyle() == "None"}
    assert "white" not in faces
    axis = plot.tradeoff(frame).axes[0]
    faces = {line.get_markerfacecolor() for line in axis.lines if line.get_linestyle() == "None"}
    assert faces == {"white"}


def test_one_slice_needs_no_small_multiples(results_directory):
    frame = results.load(results_directory)
    figure = plot.tradeoff(frame[frame["slice"] == "long"])
    assert len(figure.axes) == 1
    assert figure.axes[0].get_ylabel() == "test accuracy"


def test_the_command_redraws_the_same_files(results_directory, tmp_path):
    assert plot.main([str(results_directory), "--out", str(tmp_path)]) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"tradeoff.png", "tradeoff.svg"}
    assert first["tradeoff.png"].startswith(b"\x89PNG")
    plot.save_all(results.load(results_directory), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_each_set_of_test_data_gets_a_figure_of_its_own(results_directory, tmp_path):
    frame = results.load(results_directory)
    runs = sorted(frame["run_id"].unique())
    cut = frame[~((frame["run_id"] == runs[0]) & (frame["slice"] == "long"))]
    names = [path.name for path in plot.save_all(cut, tmp_path)]
    assert names == [f"tradeoff-{number}.{kind}" for number in (1, 2) for kind in ("png", "svg")]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert plot.main([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("mqar seq_len=256 num_kv_pairs=16", "16 pairs, length 256"),
        ("mqar seq_len=256 num_kv_pairs=16 num_passes=2", "mqar seq_len=256 num_kv_pairs=16 num_passes=2"),
        ("hard", "hard"),
    ],
)
def test_slice_titles(name, title):
    frame = pd.DataFrame([{"slice": name, "task": "mqar", "seq_len": 256, "num_kv_pairs": 16}])
    assert plot.slice_title(frame, name) == title


@pytest.mark.parametrize(("state_bytes", "middle"), [(8192, 0.5), (16, None)])
def test_the_legend_stands_in_a_wide_gap_or_beside_the_panel(state_bytes, middle):
    """The bound leaves 1 at 8 bytes; of an axis from 1 to 65536 bytes a gap up to 8192 is the middle five eighths."""
    frame, table = pd.DataFrame({"required_bits": [64.0]}), pd.DataFrame({"state_bytes": [state_bytes]})
    found = plot._middle_of_gap(frame, table, (1, 65536))
    assert found == (None if middle is None else pytest.approx(middle))
