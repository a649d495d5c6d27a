"""The plot: recall accuracy against recurrent memory, from results alone.

python -m zoology.plot DIR
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from zoology import results

# Okabe and Ito's palette (Color Universal Design), black first; yellow is left out: it vanishes on white. Markers and
# line styles repeat with other periods, so that a family is told apart without its colour too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A4B9A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (8, 2)))


class Style(NamedTuple):
    """How one architecture is drawn."""

    color: str
    marker: str
    linestyle: Any


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name, by the order of the names: no two of the first 440 look the same."""
    return {
        name: Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index % len(LINES)])
        for index, name in enumerate(names)
    }


def bits_needed(accuracy: np.ndarray, required_bits: float, answers: int) -> np.ndarray:
    """Bits of state without which a share `accuracy` of the answers cannot be right (Fano's inequality).

    `answers` answers, each one of M = 2^(required_bits / answers) equally likely symbols. A guess that errs with
    probability e leaves at most h(e) + e log2(M - 1) bits open, so each answer has taken at least
    log2(M) - h(e) - e log2(M - 1) bits from the state: nothing at chance, e = 1 - 1/M, and log2(M) at e = 0.
    """
    error = 1 - np.asarray(accuracy, dtype=float)
    bits = required_bits / answers
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -(error * np.log2(error) + (1 - error) * np.log2(1 - error))
    entropy = np.where((error <= 0) | (error >= 1), 0.0, entropy)
    left = entropy + error * (bits + math.log2(1 - 2.0**-bits))
    return answers * np.maximum(bits - left, 0.0)


def bound(part: pd.Series, state_bytes: np.ndarray) -> np.ndarray | None:
    """The highest accuracy on a slice that `state_bytes` of state allow; None where the task has no such bound.

    `part` is a row of the results table: its `required_bits`, `answers` and `vocab_size`.
    """
    bits, answers = part["required_bits"], part["answers"]
    if pd.isna(answers) or not 0 < bits <= answers * math.log2(part["vocab_size"]):
        return None
    # From chance up the bits needed only grow, so the curve can be read the other way round.
    accuracy = np.linspace(2.0 ** -(bits / answers), 1, 4001)
    return np.interp(8 * state_bytes, bits_needed(accuracy, bits, int(answers)), accuracy)


def tradeoff(frame: pd.DataFrame):
    """Draw accuracy against state: the mean over slices, and every slice as a small multiple.

    Lines follow the best accuracy reached with at most that much state; points off the line are other
    configurations. Bars span the seeds. Hollow points: the selected learning rate lies at the edge of its grid.
    Returns the matplotlib figure. Raises ValueError for runs that were tested on different data.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    table, names = results.select(frame), results.slice_names(frame)
    looks = styles(by_name(frame))
    limits = state_limits(frame, table)
    small = names if len(names) > 1 else []
    columns = min(4, max(1, len(small)))
    rows = -(-len(small) // columns)
    with rc_context(RC):
        figure = Figure(figsize=(8.4, 4.1 + 1.75 * rows), layout="constrained")
        top, *bottom = figure.subfigures(2, 1, height_ratios=(4.1, 1.75 * rows)) if small else [figure]
        axis = top.subplots()
        _draw_panel(axis, table[table["slice"] == results.MEAN], looks, 5.0, limits)
        has_bound = draw_bound(axis, frame, names, limits)
        _draw_floor(axis, frame, names)
        longest = int(frame["state_seq_len"].max())
        axis.set_xlabel(f"recurrent state at length {longest:,} (bytes per sequence, all layers)")
        axis.set_ylabel(f"test accuracy, mean of {len(names)} slices" if small else "test accuracy")
        _legend(axis, looks, table, has_bound, _middle_of_gap(frame, table, limits))
        for part in bottom:
            panels = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
            _draw_small_multiples(panels, frame, table, looks, limits, columns)
            part.supylabel("test accuracy", fontsize=8)
            part.supxlabel(f"recurrent state at length {longest:,} (bytes)", fontsize=8)
    return figure


def _draw_small_multiples(panels, frame, table, looks, limits, columns: int) -> None:
    names = results.slice_names(frame)
    for index, panel in enumerate(panels):
        if index >= len(names):
            panel.set_axis_off()
            continue
        _draw_panel(panel, table[table["slice"] == names[index]], looks, 3.0, limits)
        draw_bound(panel, frame, [names[index]], limits)
        _draw_floor(panel, frame, [names[index]])
        panel.set_title(slice_title(frame, names[index]))
        panel.tick_params(labelbottom=index + columns >= len(names))


RC = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "zoology",
}


def by_name(frame: pd.DataFrame) -> list[str]:
    """Architectures in alphabetical order, attention first: it is what the others are measured by."""
    return sorted(frame["architecture"].unique(), key=lambda name: (name != "attention", name))


def frontier(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no point with as much or less state beats, by growing state."""
    points = points.sort_values(["state_bytes", "accuracy"], ascending=[True, False])
    return points[points["accuracy"] > points["accuracy"].cummax().shift(fill_value=-1.0)]


def _draw_panel(axis, table: pd.DataFrame, looks: dict[str, Style], size: float, limits: tuple[float, float]) -> None:
    for name, look in looks.items():
        points = table[table["architecture"] == name].sort_values("state_bytes")
        best = frontier(points)
        axis.plot(best["state_bytes"], best["accuracy"], color=look.color, ls=look.linestyle, lw=1.3, zorder=2)
        several = points[points["num_seeds"] > 1]
        axis.vlines(several["state_bytes"], several["worst"], several["best"], color=look.color, lw=1.0, zorder=2)
        for edge, group in points.groupby("lr_at_edge"):
            axis.plot(
                group["state_bytes"], group["accuracy"], ls="none", marker=look.marker, ms=size, mew=0.9,
                color=look.color, mfc="white" if edge else look.color, zorder=3, clip_on=False,
            )  # fmt: skip
    axis.set(xscale="log", xlim=limits, ylim=(-0.02, 1.03), yticks=np.linspace(0, 1, 6))
    axis.grid(True, axis="y", color="0.9", lw=0.6)
    axis.set_axisbelow(True)


def draw_bound(axis, frame: pd.DataFrame, names: Sequence[str], limits: tuple[float, float]) -> bool:
    """Shade what no model can reach, averaged over the slices; False where a slice has no such bound."""
    parts = frame.drop_duplicates("slice").set_index("slice")
    state = np.geomspace(*limits, 400)
    curves = [bound(parts.loc[name], state) for name in names]
    if any(curve is None for curve in curves):
        return False
    axis.fill_between(state, np.mean(curves, axis=0), 1.0, color="0.85", lw=0, zorder=0)
    axis.plot(state, np.mean(curves, axis=0), color="0.45", lw=0.9, zorder=1)
    return True


def _draw_floor(axis, frame: pd.DataFrame, names: Sequence[str]) -> None:
    """A line at what the best predictor scores that cannot recall, averaged over the slices."""
    floor = results.floors(frame).loc[list(names)].max(axis=1).mean()
    axis.axhline(floor, color="0.45", lw=0.9, ls=(0, (1, 2.5)), zorder=1)


def state_limits(frame: pd.DataFrame, table: pd.DataFrame) -> tuple[float, float]:
    """Wide enough for the points, and for the place where the hardest slice's bound leaves 1."""
    low = min(table["state_bytes"].min(), frame["required_bits"].max() / 8)
    high = table["state_bytes"].max()
    return max(low, 1) / 3, max(high, 2 * low) * 1.6


def slice_title(frame: pd.DataFrame, name: str) -> str:
    """A slice for readers: "16 pairs, length 64" for MQAR whose other options are the defaults, else its name."""
    part = frame[frame["slice"] == name].iloc[0]
    task, *options = name.split(" ")
    if part["task"] == task == "mqar" and {option.split("=")[0] for option in options} <= {"seq_len", "num_kv_pairs"}:
        return f"{int(part['num_kv_pairs'])} pairs, length {int(part['seq_len']):,}"
    return name


def slice_table(frame: pd.DataFrame) -> pd.DataFrame:
    """`results.slice_table` with slices as readers know them (`slice_title`), rounded."""
    titles = {name: slice_title(frame, name) for name in results.slice_names(frame)}
    return results.slice_table(frame).rename(columns=titles).round(3)


def _middle_of_gap(frame: pd.DataFrame, table: pd.DataFrame, limits: tuple[float, float]) -> float | None:
    """Where, in shares of the axis, the middle lies between the bound and the points; None if a legend does not fit."""
    low, high = np.log(limits)
    ends = (frame["required_bits"].max() / 8, table["state_bytes"].min())
    left, right = ((np.log(end) - low) / (high - low) for end in ends)
    return (left + right) / 2 if right - left > LEGEND_WIDTH else None


LEGEND_WIDTH = 0.3  # share of the main panel


def _legend(axis, looks: dict[str, Style], table: pd.DataFrame, has_bound: bool, gap: float | None) -> None:
    """In the gap between bound and points if that is wide enough, else beside the panel: never on data."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=look.color, ls=look.linestyle, marker=look.marker, ms=5, lw=1.3, label=name)
        for name, look in looks.items()
    ]
    if has_bound:
        handles.append(Patch(facecolor="0.85", edgecolor="0.45", lw=0.9, label="ruled out by the\ncounting bound"))
    handles.append(Line2D([], [], color="0.45", lw=0.9, ls=(0, (1, 2.5)), label="best without recall"))
    if table["lr_at_edge"].any():
        label = "learning rate at\nedge of grid"
        handles.append(Line2D([], [], color="0.3", ls="none", marker="o", mfc="white", ms=5, label=label))
    if (table["num_seeds"] > 1).any():
        handles.append(Line2D([], [], color="0.3", ls="none", marker="|", ms=9, label="range over seeds"))
    place = ("center left", (1.01, 0.5)) if gap is None else ("center", (gap, 0.45))
    axis.legend(handles=handles, loc=place[0], bbox_to_anchor=place[1], frameon=False, handlelength=2.8)


def save(frame: pd.DataFrame, directory: Path | str, stem: str = "tradeoff") -> list[Path]:
    """Write `stem`.png and `stem`.svg; the same results give the same bytes."""
    return save_figure(tradeoff(frame), directory, stem)


def save_all(frame: pd.DataFrame, directory: Path | str) -> list[Path]:
    """`save`, once for each set of test data: tradeoff, or tradeoff-1, tradeoff-2, ..."""
    parts = results.by_test_data(frame)
    stems = ["tradeoff"] if len(parts) == 1 else [f"tradeoff-{number}" for number in range(1, len(parts) + 1)]
    return [path for part, stem in zip(parts, stems) for path in save(part, directory, stem)]


def save_figure(figure, directory: Path | str, stem: str) -> list[Path]:
    """Write a figure as .png and .svg, each at once or not at all."""
    from matplotlib import rc_context

    paths = [Path(directory, f"{stem}.{kind}") for kind in ("png", "svg")]
    with rc_context(RC):
        for path, metadata in zip(paths, ({}, {"Date": None})):
            temporary = path.with_suffix(f".tmp{path.suffix}")
            figure.savefig(temporary, dpi=200, metadata=metadata)
            temporary.replace(path)
    return paths


def draw_command(
    module: str,
    draws: str,
    draw: Callable[[pd.DataFrame, Path], list[Path]],
    arguments: Sequence[str] | None = None,
) -> int:
    """`python -m MODULE DIR [--out DIR]`: load a results directory, `draw` it, print the files; the exit code."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"Draw {draws} from results alone.")
    parser.add_argument("directory", help="results directory")
    parser.add_argument("--out", help="where to write the figures (default: the results directory)")
    options = parser.parse_args(arguments)
    try:
        target = Path(options.out or options.directory)
        frame = results.load(options.directory)
        target.mkdir(parents=True, exist_ok=True)
        paths = draw(frame, target)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m zoology.plot DIR [--out DIR]`: draw the figure of a results directory."""
    return draw_command("zoology.plot", "accuracy against recurrent state", save_all, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
