"""Figures of "Just read twice" (arXiv:2407.05483): recall by the order of the data, and by how often it is read.

python -m zoology.plots_jrt DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from zoology import plot, results
from zoology.tasks import JRTPrompt, SetDisjointness, Task, from_config

SHORT_FIRST, LONG_FIRST = "short set first", "long set first"


def order_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy at the selected learning rate by model, pair of set sizes and order.

    One row per model, `short` and `long`: test accuracy with the "short set first", the "long set first", and their
    `difference`; a row for each set of test data that the model was given. Raises ValueError if the frame has no set
    disjointness in both orders.
    """
    index = ["architecture", "point", "state_bytes", "short", "long"]
    table = _ordered(frame)
    table = table.assign(test_data=table.groupby([*index, "order"]).cumcount())
    wide = table.pivot(index=[*index, "test_data"], columns="order", values="accuracy")
    wide["difference"] = wide[SHORT_FIRST] - wide[LONG_FIRST]
    return wide.rename_axis(columns=None).reset_index().drop(columns="test_data")


def order_by_run(frame: pd.DataFrame, longest: int | None = None) -> pd.DataFrame:
    """Mean accuracy over the pairs of set sizes that a run was tested on in both orders: the measure of the paper.

    One row per run, whatever its learning rate: test accuracy with the "short set first", the "long set first", and
    their `difference`. With `longest` only pairs whose longer set has at most so many tokens count. Raises ValueError
    if no run was tested in both orders.
    """
    parts = [_both_orders(run) for _, run in frame.groupby("run_id", sort=False)]
    table = pd.concat(parts, ignore_index=True)
    if longest is not None:
        table = table[table["long"] <= longest]
    if table.empty:
        within = "" if longest is None else f" within longest={longest}"
        raise ValueError(f"no run was tested on a pair of set sizes in both orders{within}")
    index = ["architecture", "point", "state_bytes", "lr", "epochs", "seed", "run_id"]
    wide = table.pivot_table(index=index, columns="order", values="accuracy", aggfunc="mean")
    wide["difference"] = wide[SHORT_FIRST] - wide[LONG_FIRST]
    return wide.rename_axis(columns=None).reset_index().drop(columns="run_id")


def order(frame: pd.DataFrame):
    """Draw accuracy against state, a panel per pair of set sizes: filled, the short set first; hollow, the long one.

    The dotted line is a guess among the tokens of the short set. Bars are the range over seeds. Returns the
    matplotlib figure; raises ValueError as `order_table` does.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullLocator

    table = _ordered(frame)
    states = sorted(table["state_bytes"].unique())
    looks = plot.styles(plot.by_name(frame))
    pairs = sorted(set(zip(table["short"], table["long"])), key=lambda pair: (pair[1], pair[0]))
    columns = min(5, len(pairs))
    rows = -(-len(pairs) // columns)
    with rc_context(plot.RC):
        figure = Figure(figsize=(2.6 + 2.4 * columns, 0.7 + 2.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axis in axes.flat[len(pairs) :]:
            axis.set_axis_off()
        for axis, (short, long) in zip(axes.flat, pairs):
            part = table[(table["short"] == short) & (table["long"] == long)]
            for name, look in looks.items():
                for which, filled in ((SHORT_FIRST, True), (LONG_FIRST, False)):
                    points = part[(part["architecture"] == name) & (part["order"] == which)]
                    best = points.sort_values("accuracy").drop_duplicates("state_bytes", keep="last")
                    _line(axis, best.sort_values("state_bytes"), "state_bytes", look, filled)
            axis.axhline(1 / short, color="0.45", lw=0.9, ls=":")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.xaxis.set_minor_locator(NullLocator())
            if len(states) == 1:  # left to itself, a logarithmic axis of one value ends beside it
                axis.set_xlim(states[0] / 2, states[0] * 2)
            if len(states) <= 3:  # powers of two may all lie beside the points of so few
                axis.xaxis.set_major_locator(FixedLocator(states))
            axis.set(ylim=(-0.02, 1.03), title=f"sets of {short} and {long}")
            axis.grid(True, axis="y", color="0.9", lw=0.6)
        figure.supxlabel("recurrent state (bytes per sequence, all layers)", fontsize=9)
        figure.supylabel("test accuracy", fontsize=9)
        handles = [
            Line2D([], [], color=look.color, marker=look.marker, ms=5, mfc=look.color if filled else "white",
                   ls="-" if filled else "--", lw=1.3, label=f"{name}, {which}")
            for name, look in looks.items()
            for which, filled in ((SHORT_FIRST, True), (LONG_FIRST, False))
        ]  # fmt: skip
        handles.append(Line2D([], [], color="0.45", lw=0.9, ls=":", label="guess among the short set"))
        figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=2.8)
    return figure


def passes_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy at the selected learning rate by model and question (rows), and number of passes (columns).

    Raises ValueError if no slice of the frame is a `jrt_prompt`.
    """
    index = ["question", "architecture", "point", "state_bytes"]
    wide = _passed(frame).pivot(index=index, columns="num_passes", values="accuracy")
    return wide.rename(columns=lambda number: f"{number} passes" if number > 1 else "1 pass").reset_index()


def passes(frame: pd.DataFrame):
    """Draw accuracy against the number of passes, a panel per question, a line per model, heavier with more state.

    Bars are the range over seeds. Returns the matplotlib figure; raises ValueError as `passes_table` does.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    table = _passed(frame)
    looks = plot.styles(plot.by_name(frame))
    questions = list(dict.fromkeys(table["question"]))
    sizes = sorted(table["state_bytes"].unique())
    with rc_context(plot.RC):
        figure = Figure(figsize=(2.8 + 2.5 * len(questions), 3.2), layout="constrained")
        axes = figure.subplots(1, len(questions), sharex=True, sharey=True, squeeze=False)[0]
        drawn = {}
        for axis, question in zip(axes, questions):
            part = table[table["question"] == question]
            for (name, point, state), points in part.groupby(["architecture", "point", "state_bytes"], sort=False):
                width = 0.8 + 1.6 * (sizes.index(state) + 1) / len(sizes)
                _line(axis, points.sort_values("num_passes"), "num_passes", looks[name], True, width)
                drawn[name, state, point] = width
            axis.set(ylim=(-0.02, 1.03), title=question)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(True, axis="y", color="0.9", lw=0.6)
        figure.supxlabel("times the context is read", fontsize=9)
        figure.supylabel("test accuracy", fontsize=9)
        handles = [
            Line2D([], [], color=looks[name].color, marker=looks[name].marker, ms=5, lw=width,
                   label=f"{name}, {state:,} bytes")
            for (name, state, _), width in sorted(drawn.items())
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=2.8)
    return figure


def figures(frame: pd.DataFrame) -> dict[str, object]:
    """The figures that a frame has data for, by file name: "passes" and "order". Raises ValueError for neither."""
    tasks = [from_config(options) for options in frame["task_options"]]
    if any(isinstance(task, JRTPrompt) for task in tasks):
        return {"passes": passes(frame)}
    if any(isinstance(task, SetDisjointness) for task in tasks):
        return {"order": order(frame)}
    raise ValueError("there is neither set disjointness nor jrt_prompt among the test slices: nothing to draw here")


def _line(axis, points: pd.DataFrame, x: str, look: plot.Style, filled: bool, width: float = 1.3) -> None:
    face = look.color if filled else "white"
    style = {"color": look.color, "marker": look.marker, "ms": 5, "mfc": face, "ls": "-" if filled else "--"}
    axis.plot(points[x], points["accuracy"], lw=width, clip_on=False, zorder=3, **style)
    several = points[points["num_seeds"] > 1]
    axis.vlines(several[x], several["worst"], several["best"], color=look.color, lw=1.0, zorder=2)


def _selected(frame: pd.DataFrame) -> pd.DataFrame:
    """`results.select` for every set of test data, with the task of each slice."""
    rows = []
    for part in results.by_test_data(frame):
        options = part.drop_duplicates("slice").set_index("slice")["task_options"]
        table = results.select(part)
        table = table[table["slice"] != results.MEAN]
        rows.append(table.assign(task=[from_config(options[name]) for name in table["slice"]]))
    return pd.concat(rows, ignore_index=True)


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    table = _both_orders(_selected(frame))
    if table.empty:
        raise ValueError("no pair of set sizes was tested in both orders: must have set disjointness slices of both")
    return table


def _both_orders(table: pd.DataFrame) -> pd.DataFrame:
    """The slices of set disjointness whose pair of sizes is there in both orders, with `short`, `long` and `order`."""
    tasks = table["task"] if "task_options" not in table else table["task_options"].map(from_config)
    kept = [isinstance(task, SetDisjointness) and task.first_size != task.second_size for task in tasks]
    sizes = [(task.first_size, task.second_size) for task in tasks[kept]]
    table = table[kept].assign(
        short=[min(pair) for pair in sizes],
        long=[max(pair) for pair in sizes],
        order=[SHORT_FIRST if first < second else LONG_FIRST for first, second in sizes],
    )
    return table[table.groupby(["short", "long"])["order"].transform("nunique") == 2]


def _passed(frame: pd.DataFrame) -> pd.DataFrame:
    table = _selected(frame)
    table = table[[isinstance(task, JRTPrompt) for task in table["task"]]]
    if table.empty:
        raise ValueError("no test slice is a jrt_prompt: must have some, num_passes=1 among them")
    return table.assign(
        question=[_question(task.task) for task in table["task"]],
        num_passes=[task.num_passes for task in table["task"]],
    )


def _question(task: Task) -> str:
    """What is asked, for readers."""
    if isinstance(task, SetDisjointness):
        return f"sets of {task.first_size}, then {task.second_size}"
    pairs = getattr(task, "num_kv_pairs", None)
    return task.name if pairs is None else f"{task.name}, {pairs} pairs"


def save_all(frame: pd.DataFrame, directory: Path) -> list[Path]:
    """Write every figure that the results have data for."""
    return [path for stem, figure in figures(frame).items() for path in plot.save_figure(figure, directory, stem)]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m zoology.plots_jrt DIR [--out DIR]`: draw what the results directory has data for."""
    return plot.draw_command("zoology.plots_jrt", "reading order and reading twice", save_all, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
