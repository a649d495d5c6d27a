"""Figures of the published protocols: accuracy beside the published one, learning rates, training time.

Each takes what `zoology.compare.compare` returns, or one part of it, and gives a matplotlib figure. Filled markers are
measured here, hollow ones published, small grey ones published and not run here. A hollow one without a filled one is
in no grid of the papers' code. A white dot: the selected learning rate lies at the edge of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from zoology import plot, results
from zoology.compare import Comparison
from zoology.published import Point


def beside_published(comparison: Comparison):
    """Accuracy against state: the mean over slices with the published points, and the slice that needs most bits.

    Measured points are at the measured state, published ones at the state the field reports; a thin line joins the
    two of one model. Lines follow the best accuracy with at most that much state; bars are 95% intervals over seeds.
    Returns the matplotlib figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    frame, points = comparison.frame, comparison.points
    table, names = results.select(frame), results.slice_names(frame)
    looks = plot.styles(plot.by_name(frame))
    limits = plot.state_limits(frame, table)
    not_here = [*comparison.missing, *comparison.only_published]
    published = [*points["field_bytes"], *(point.field_bytes for point in not_here if point.field_bytes)]
    limits = min(limits[0], min(published) / 1.6), max(limits[1], max(published) * 1.6)
    with rc_context(plot.RC):
        figure = Figure(figsize=(10.8, 5.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_published(left, points, looks)
        _draw_not_here(left, comparison, looks, "field_bytes")
        for axis, name, of_bound in ((left, results.MEAN, names), (right, names[-1], names[-1:])):
            plot.draw_bound(axis, frame, of_bound, limits)
            _draw_measured(axis, table[table["slice"] == name], looks, "state_bytes")
            axis.set(xscale="log", xlim=limits)
        left.set(ylabel="test accuracy", title=f"mean of {len(names)} slices")
        right.set_title(plot.slice_title(frame, names[-1]))
        figure.supxlabel(_state_label(frame), fontsize=9)
        _legend(right, looks, table, published=[comparison], bound=True)
    return figure


def by_width(comparisons: Sequence[Comparison]):
    """Accuracy against d_model, a panel per sequence length, with the published points. Returns the figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    tables = [results.select(comparison.frame) for comparison in comparisons]
    looks = plot.styles(plot.by_name(pd.concat([comparison.frame for comparison in comparisons])))
    with rc_context(plot.RC):
        figure = Figure(figsize=(1.2 + 2.3 * len(comparisons), 3.4), layout="constrained")
        axes = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
        for axis, comparison, table in zip(axes, comparisons, tables):
            widths = comparison.frame.drop_duplicates("point_id").set_index("point_id")["d_model"]
            means = table[table["slice"] == results.MEAN]
            means = means.assign(width=means["point_id"].map(widths))
            _draw_published(axis, comparison.points, looks, "d_model", joined=True)
            _draw_not_here(axis, comparison, looks, "d_model")
            _draw_measured(axis, means, looks, "width", best_only=False)
            published = {point.d_model for point in comparison.missing}
            axis.set(xscale="log", xlabel="d_model", xticks=sorted({*widths, *published}))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_locator(NullLocator())
            part = comparison.frame.iloc[0]
            axis.set_title(f"{part['num_kv_pairs']:.0f} pairs, length {part['seq_len']}")
        axes[0].set_ylabel("test accuracy")
        _legend(axes[-1], looks, pd.concat(tables), published=comparisons, bound=False)
    return figure


def learning_rates(comparisons: Sequence[Comparison]):
    """Validation accuracy against learning rate, a panel per architecture and a line per model, darker with more state.

    Each value is a mean over slices and seeds. The selected rate of each model is marked, hollow at the edge of the
    rates that were run; the axis is as wide as the protocol's grid. Several comparisons get a row each. Returns the
    figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    names = plot.by_name(pd.concat([comparison.frame for comparison in comparisons]))
    looks = plot.styles(names)
    columns = min(6, len(names)) if len(comparisons) == 1 else len(names)
    rows = -(-len(names) // columns) * len(comparisons)
    with rc_context(plot.RC):
        figure = Figure(figsize=(0.6 + 1.65 * columns, 0.6 + 1.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for comparison in comparisons:
            table, runs = results.select(comparison.frame), comparison.frame.drop_duplicates("run_id")
            chosen = table[table["slice"] == results.MEAN].set_index("point_id")
            for name in names:
                axis = next(panels)
                _draw_rates(axis, runs[runs["architecture"] == name], chosen, looks[name])
                at = f", length {comparison.protocol.seq_len}" if len(comparisons) > 1 else ""
                axis.set_title(name + at)
        for axis in panels:
            axis.set_axis_off()
        rates = [
            rate
            for comparison in comparisons
            for rate in (*comparison.protocol.learning_rates, *comparison.frame["lr"])
        ]
        for axis in figure.axes:
            axis.set_xlim(min(rates) / 1.3, max(rates) * 1.3)
            axis.xaxis.set_minor_formatter(NullFormatter())
        figure.supxlabel("learning rate", fontsize=9)
        figure.supylabel("validation accuracy, mean of slices", fontsize=9)
    return figure


def _draw_rates(axis, runs: pd.DataFrame, chosen: pd.DataFrame, look: plot.Style) -> None:
    points = runs.drop_duplicates("point_id").sort_values("state_bytes")["point_id"].tolist()
    for rank, point in enumerate(points):
        curve = runs[runs["point_id"] == point].groupby("lr")["validation_mean"].mean()
        strength = 0.35 + 0.65 * (rank + 1) / len(points)
        axis.plot(curve.index, curve, color=look.color, alpha=strength, lw=1.1, zorder=2)
        rate, edge = chosen.loc[point, "lr"], chosen.loc[point, "lr_at_edge"]
        face = "white" if edge else look.color
        axis.plot(
            [rate],
            [curve[rate]],
            look.marker,
            color=look.color,
            mfc=face,
            ms=_size(look.marker, 4.5),
            mew=0.9,
            zorder=3,
            clip_on=False,
        )
    _style(axis)
    axis.set_xscale("log")


def training_time(comparisons: Sequence[Comparison]):
    """Accuracy against the measured training time of one run, at the selected learning rate. Returns the figure.

    The time is the mean over seeds, and is of training alone: evaluation, data and compilation are not in it. Several
    comparisons get a panel each.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    looks = plot.styles(plot.by_name(pd.concat([comparison.frame for comparison in comparisons])))
    tables = [_with_seconds(comparison.frame) for comparison in comparisons]
    wide = len(comparisons) == 1
    with rc_context(plot.RC):
        size = (7.4, 3.9) if wide else (1.2 + 2.3 * len(comparisons), 3.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
        for axis, comparison, table in zip(axes, comparisons, tables):
            _draw_measured(axis, table, looks, "seconds", lines=False)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_title("" if wide else f"length {comparison.protocol.seq_len}")
        devices = sorted({device for comparison in comparisons for device in comparison.devices})
        figure.supxlabel(f"training time of one run (seconds, {' and '.join(devices)})", fontsize=9)
        axes[0].set_ylabel("test accuracy, mean of slices" if wide else "test accuracy")
        _legend(axes[-1], looks, pd.concat(tables), published=[], bound=False, lines=False)
    return figure


def _with_seconds(frame: pd.DataFrame) -> pd.DataFrame:
    """The selected points, mean over slices, with the mean training time over their seeds, as if alone."""
    table = results.select(frame)
    means = table[table["slice"] == results.MEAN]
    runs = frame.drop_duplicates("run_id")
    seconds = runs.groupby(["point_id", "lr"])["alone_seconds"].mean()
    return means.assign(seconds=[seconds[point, rate] for point, rate in zip(means["point_id"], means["lr"])])


SCALE = {"*": 1.6, "P": 1.3, "X": 1.3}
"""Markers that look smaller than they are."""


def _size(marker: str, size: float) -> float:
    return size * SCALE.get(marker, 1.0)


def _draw_measured(
    axis, table: pd.DataFrame, looks: dict[str, plot.Style], x: str, *, lines: bool = True, best_only: bool = True
) -> None:
    for name, look in looks.items():
        points = table[table["architecture"] == name].sort_values(x)
        if points.empty:
            continue  # an unclipped line without points would be laid out as one at the figure's corner
        if lines:
            line = plot.frontier(points) if best_only else points
            axis.plot(line[x], line["accuracy"], color=look.color, ls=look.linestyle, lw=1.2, zorder=3)
        several = points[points["num_seeds"] > 1]
        axis.vlines(several[x], several["low"], several["high"], color=look.color, lw=1.0, zorder=3)
        axis.plot(
            points[x], points["accuracy"], ls="none", marker=look.marker, ms=_size(look.marker, 5.5), mew=0.5,
            mec="white", color=look.color, zorder=4, clip_on=False,
        )  # fmt: skip
    edge = table[table["lr_at_edge"]]
    if len(edge):
        axis.plot(edge[x], edge["accuracy"], "o", ms=1.8, mew=0, color="white", zorder=5, clip_on=False)
    _style(axis)


def _draw_published(
    axis, points: pd.DataFrame, looks: dict[str, plot.Style], x: str = "field_bytes", *, joined: bool = False
) -> None:
    for name, group in points.groupby("architecture"):
        look = looks[name]
        if joined:
            group = group.sort_values(x)
            axis.plot(group[x], group["published"], color=look.color, lw=0.7, ls=(0, (1, 2)), zorder=2)
        else:
            axis.plot(
                [group[x], group["state_bytes"]], [group["published"], group["accuracy"]], color="0.6", lw=0.6, zorder=1
            )
        _draw_hollow(axis, group[x], group["published"], look)


def _draw_hollow(axis, x: Sequence[float], y: Sequence[float], look: plot.Style) -> None:
    axis.plot(
        x, y, ls="none", marker=look.marker, ms=_size(look.marker, 6.5), mew=0.8, mfc="none", color=look.color,
        zorder=2, clip_on=False,
    )  # fmt: skip


def _draw_not_here(axis, comparison: Comparison, looks: dict[str, plot.Style], x: str) -> None:
    """The published points that have not been run, and those that cannot be: hollow beside others of their kind."""
    known = [point for point in comparison.only_published if point.architecture in looks]
    for point in known:
        _draw_hollow(axis, [getattr(point, x)], [point.accuracy], looks[point.architecture])
    if grey := _grey(comparison, looks):
        axis.plot(*zip(*((getattr(point, x), point.accuracy) for point in grey)), ls="none", **MISSING, zorder=1,
                  clip_on=False)  # fmt: skip


def _grey(comparison: Comparison, looks: dict[str, plot.Style]) -> list[Point]:
    """The published points that are drawn as not run here."""
    return [*comparison.missing, *(point for point in comparison.only_published if point.architecture not in looks)]


MISSING = {"marker": "o", "ms": 3.5, "mew": 0.6, "mfc": "none", "color": "0.72"}


def _style(axis) -> None:
    axis.set(ylim=(-0.02, 1.03), yticks=np.linspace(0, 1, 6))
    axis.grid(True, axis="y", color="0.9", lw=0.6)
    axis.set_axisbelow(True)


def _state_label(frame: pd.DataFrame) -> str:
    longest = int(frame["state_seq_len"].max())
    return f"recurrent state at length {longest:,} (bytes per sequence, all layers)"


def _legend(
    axis, looks, table: pd.DataFrame, *, published: Sequence[Comparison], bound: bool, lines: bool = True
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D(
            [],
            [],
            color=look.color,
            ls=look.linestyle if lines else "none",
            marker=look.marker,
            ms=5,
            lw=1.2,
            label=name,
        )
        for name, look in looks.items()
    ]
    plain = {"color": "0.3", "ls": "none", "marker": "o"}
    if published:
        handles.append(Line2D([], [], **plain, mfc="none", ms=6, label="published"))
    if left := sum(len(_grey(comparison, looks)) for comparison in published):
        label = f"published, not run\nhere ({left})"
        handles.append(Line2D([], [], ls="none", **MISSING, label=label))
    if bound:
        handles.append(Patch(facecolor="0.85", edgecolor="0.45", lw=0.9, label="ruled out by the\ncounting bound"))
    if (table["num_seeds"] > 1).any():
        handles.append(Line2D([], [], color="0.3", ls="none", marker="|", ms=9, label="95% interval"))
    if table["lr_at_edge"].any():
        dotted = plain | {"marker": "o", "ms": 5.5, "mew": 1.6, "mfc": "white"}
        handles.append(Line2D([], [], **dotted, label="learning rate at\nedge of grid"))
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=2.8)
