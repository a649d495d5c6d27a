"""Figures and tables of prefill and generation, from the records of `zoology.throughput` alone.

Dashed lines are bounds: what must be moved and multiplied, at the measured ceilings of the device. Hollow markers are
published (`published_speed.json`), on the device that is named there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from zoology import plot, results

PUBLISHED = Path(__file__).with_name("published_speed.json")
CLAIM = 24.0  # of Based over FlashAttention-2 in generation, Based (arXiv:2402.18668)
HEADLINE = {"batch": 128, "length": 64, "new_tokens": 1024}
DASHED = (0, (4, 2))


# -- tables -------------------------------------------------------------------------------------------------


def load(*paths: Path | str) -> dict[str, Any]:
    """`zoology.benchmark.load`: the records of several files as one document."""
    from zoology import benchmark

    return benchmark.load(*paths, key="kind")


@functools.cache
def published() -> pd.DataFrame:
    """The published points, one a row, with their `source`."""
    found = json.loads(PUBLISHED.read_text())
    return pd.DataFrame(found["points"]).assign(source=lambda table: table["source"].map(found["sources"]))


def points(document: dict[str, Any], kind: str) -> pd.DataFrame:
    """One row per point of a kind: the columns of its record, `fits`, percentiles, the `published` speed or time."""
    rows = []
    for record in document["records"]:
        if record["kind"] != kind:
            continue
        row = {key: value for key, value in record.items() if not isinstance(value, dict | list)}
        times = record.get("ms", {"median": np.nan, "low": np.nan, "high": np.nan, "repeats": 0})
        row |= {"fits": "out_of_memory" not in record, "published": _published(record)}
        row |= {"bytes_needed": record.get("out_of_memory", {}).get("bytes_needed")}
        if isinstance(times, dict):
            row |= {"ms": times["median"], "ms_20": times["low"], "ms_80": times["high"], "repeats": times["repeats"]}
        if segments := record.get("segments"):
            row |= {
                "first_ms_per_token": segments[0]["ms_per_token"],
                "last_ms_per_token": segments[-1]["ms_per_token"],
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _published(record: dict[str, Any]) -> float:
    """Tokens/ms, or milliseconds of a kernel, that were published for the point of a record; NaN if none were."""
    for point in published().to_dict("records"):
        keys = [key for key in ("kind", "model", "length", "batch", "new_tokens") if not pd.isna(point[key])]
        if all(point[key] == record.get(key) for key in keys):
            return point["ms" if record["kind"] == "kernel" else "tokens_per_ms"]
    return np.nan


_TIMES = ["tokens_per_ms", "share_of_bound", "ms", "ms_20", "ms_80", "repeats"]


def generation_table(document: dict[str, Any]) -> pd.DataFrame:
    """What was measured of generation: one row per model, batch size and length of the prompt."""
    named = ["model", "batch", "length", "new_tokens", "fits"]
    return points(document, "generation")[[*named, *_TIMES, "first_ms_per_token", "last_ms_per_token", "published"]]


def prefill_table(document: dict[str, Any]) -> pd.DataFrame:
    """What was measured of prefill: one row per model, batch size and length."""
    return points(document, "prefill")[["model", "batch", "length", "fits", *_TIMES, "published"]]


def segments(document: dict[str, Any]) -> pd.DataFrame:
    """One row per generation point and segment: measured and bound milliseconds per token in the middle of it."""
    rows = [
        {key: record[key] for key in ("model", "batch", "length", "new_tokens")}
        | {
            "position": part["from"] + part["tokens"] / 2,
            "ms_per_token": part["ms_per_token"],
            "bound_ms": part["bound"]["ms"],
            "state_bytes_read": part["moved"]["state_bytes_read"],
            "weight_bytes": part["moved"]["weight_bytes"],
        }
        for record in document["records"]
        for part in record.get("segments", ())
    ]
    return pd.DataFrame(rows)


class StepTime:
    """Milliseconds of a step by position: a line through the measured ones if the state grows, else their median."""

    def __init__(self, parts: pd.DataFrame, column: str):
        parts = parts.sort_values("position")
        read, at = parts["state_bytes_read"].to_numpy(), parts["position"].to_numpy()
        self.bytes_per_token = (read[-1] - read[-2]) / (at[-1] - at[-2]) if len(at) > 1 else 0.0
        if self.bytes_per_token > 0:
            self.slope, self.start = np.polyfit(at, parts[column], 1)
        else:
            self.slope, self.start = 0.0, float(parts[column].median())

    def __call__(self, position):
        return self.start + self.slope * np.asarray(position, dtype=float)


def crossings(document: dict[str, Any], fast: str, slow: str, ratio: float = CLAIM) -> pd.DataFrame:
    """By batch: how many times faster `fast` generates than `slow`, and the position from which it is `ratio` times.

    `measured` and `by_bound` are ratios over the whole generation. `from_position` and `from_position_by_bound` solve
    slow(position) = ratio * fast(position) on lines through the segments; `state_bytes` is what `slow` would hold
    there, `fits` whether that and its weights are within the memory of the device.
    """
    parts, table = segments(document), points(document, "generation")
    memory = document["device"].get("memory_bytes")
    rows = []
    for (batch, length), group in table[table["fits"]].groupby(["batch", "length"]):
        by_model = group.drop_duplicates("model", keep="last").set_index("model")
        if not {fast, slow} <= set(by_model.index):
            continue
        row = {"batch": batch, "prompt": length}
        row["measured"] = by_model.loc[slow, "ms"] / by_model.loc[fast, "ms"]
        row["by_bound"] = by_model.loc[slow, "bound_ms"] / by_model.loc[fast, "bound_ms"]
        part = parts[parts["batch"] == batch]
        for column, name in (("ms_per_token", "from_position"), ("bound_ms", "from_position_by_bound")):
            quick, late = (StepTime(part[part["model"] == model], column) for model in (fast, slow))
            row[name] = (ratio * quick.start - late.start) / late.slope if late.slope > 0 else np.inf
        row["state_bytes"] = late.bytes_per_token * row["from_position"]
        weights = part[part["model"] == slow]["weight_bytes"].iloc[0]
        row["fits"] = None if memory is None else bool(row["state_bytes"] + weights <= memory)
        rows.append(row)
    return pd.DataFrame(rows)


def recall(frame: pd.DataFrame, document: dict[str, Any]) -> pd.DataFrame:
    """The selected points of a results frame (mean of slices) with the measured `tokens_per_ms` of each very model.

    One row per point and batch size. Raises ValueError if no point of the frame was timed.
    """
    table = results.select(frame)
    table = table[table["slice"] == results.MEAN]
    timed = points(document, "generation")
    if "point_id" not in timed or not set(timed["point_id"]) & set(table["point_id"]):
        raise ValueError("none of these results was timed: must be records of `zoology.throughput --results` of them")
    timed = timed[timed["fits"]][["point_id", "batch", "tokens_per_ms", "ms", "bound_ms", "share_of_bound"]]
    return table.merge(timed, on="point_id", how="inner")


KERNELS = {
    "matrix products": ("nvjet", "gemm", "cublas", "splitk"),
    "attention": ("flash", "cached_attention", "fmha"),
    "recurrences and convolutions": ("_apply_kernel", "_state_kernel", "_step_kernel", "selective_scan", "conv"),
    "small fused operations": (
        "triton_",
        "_add_norm_kernel",
        "_cache_update_kernel",
        "_note_kernel",
    ),
}
"""What a kernel is, by the first of these that its name has in it; what torch.compile made is called triton_..."""


def time_by_kernel(document: dict[str, Any], kind: str) -> pd.DataFrame:
    """Milliseconds of a profiled point by what its kernels are (rows) and model (columns), as far as they are listed.

    Of generation it is one step. Raises ValueError if no point of the kind was profiled.
    """
    times: dict[str, dict[str, float]] = {}
    for record in document["records"]:
        if record["kind"] != kind or "longest_kernels" not in record:
            continue
        of_model = times.setdefault(record["model"], dict.fromkeys([*KERNELS, "everything else"], 0.0))
        for kernel in record["longest_kernels"]:
            of_model[_what(kernel["name"])] += kernel["ms"]
    if not times:
        raise ValueError(f"no {kind} was profiled: must be records of `zoology.throughput --profile`")
    return pd.DataFrame(times)


def _what(name: str) -> str:
    name = name.lower()
    if name.startswith("triton_"):
        return "small fused operations"
    return next((what for what, parts in KERNELS.items() if any(part in name for part in parts)), "everything else")


# -- tables as Markdown -------------------------------------------------------------------------------------


def generation_page(document: dict[str, Any], fast: str = "based-1.3b", slow: str = "attention-1.3b") -> str:
    """The headline point of every model beside the published one, and the ratio of two."""
    table = points(document, "generation")
    at = table[(table[list(HEADLINE)] == pd.Series(HEADLINE)).all(axis=1) & table["fits"]]
    rows = [
        (
            f"`{row.model}`", f"{row.tokens_per_ms:.1f}", f"{row.share_of_bound:.0%}",
            f"{row.first_ms_per_token:.2f} / {row.last_ms_per_token:.2f}", _gigabytes(row.state_bytes),
            _gigabytes(row.peak_memory_bytes), "-" if np.isnan(row.published) else f"{row.published:.2f}",
        )
        for row in at.itertuples()
    ]  # fmt: skip
    titles = ("model", "tokens/ms", "of its bound", "ms a step, first / last 128", "state, GB", "peak, GB", "published")
    crossed = crossings(document, fast, slow)
    headline = crossed[(crossed["batch"] == HEADLINE["batch"]) & (crossed["prompt"] == HEADLINE["length"])].iloc[0]
    speeds = at.set_index("model")
    told = (
        f"{fast} / {slow}: **{headline['measured']:.1f}x** measured, {headline['by_bound']:.1f}x by the bounds, "
        f"{speeds['published'][fast] / speeds['published'][slow]:.1f}x published."
    )
    return "\n\n".join([_markdown(titles, rows), told])


def ratio_page(document: dict[str, Any], fast: str = "based-1.3b", slow: str = "attention-1.3b") -> str:
    """`crossings` as Markdown: the ratio of two models by batch size and prompt, and from where on it is CLAIM."""
    fits = {True: "fits", False: "does not fit", None: "-"}
    rows = [
        (
            f"{row.batch:,}", f"{row.prompt:,}", f"{row.measured:.1f}x", f"{row.by_bound:.1f}x",
            f"{row.from_position:,.0f}", f"{row.from_position_by_bound:,.0f}",
            f"{_gigabytes(row.state_bytes)} GB, {fits[row.fits]}",
        )
        for row in crossings(document, fast, slow).itertuples()
    ]  # fmt: skip
    titles = ("batch", "prompt", "measured", "by bounds", f"{CLAIM:.0f}x from position", "by bounds", "the cache there")
    return _markdown(titles, rows)


def prefill_page(document: dict[str, Any], batch: int = 1) -> str:
    """Prefill in tokens/ms with the share of the bound, lengths by models, and what was published."""
    table = points(document, "prefill")
    table = table[(table["batch"] == batch) & table["fits"]]
    models = list(dict.fromkeys(table["model"]))
    speeds = table.pivot_table(index="length", columns="model", values=["tokens_per_ms", "share_of_bound", "published"])
    rows = []
    for length in speeds.index:
        told = speeds.loc[length].unstack(0).reindex(models)
        rows.append(
            (
                f"{length:,}",
                *(
                    "-" if np.isnan(row.tokens_per_ms) else f"{row.tokens_per_ms:.0f} ({row.share_of_bound:.0%})"
                    for row in told.itertuples()
                ),
            )
        )
        if told.get("published", pd.Series(dtype=float)).notna().any():
            cells = ("-" if np.isnan(value) else f"{value:.1f}" for value in told["published"])
            rows.append((f"{length:,}, published", *cells))
    return _markdown(("tokens", *(f"`{model}`" for model in models)), rows)


def reading_twice(document: dict[str, Any], length: int = 32_768) -> pd.DataFrame:
    """JRT-RNN and its peers on a text of `length` tokens: one layer, and the prefill of whole models.

    `layer_ms` is of batch 16, `published_ms` the published one; `text_tokens_per_ms` counts the text once, also where a
    model reads it twice, at the largest batch size that fits. The columns `..._faster` are ratios to FlashAttention-2.
    """
    layers = points(document, "kernel").reindex(columns=["model", "length", "ms", "published"])
    layers = layers[layers["length"] == length].set_index("model")
    models = points(document, "prefill")
    rows = []
    for system, (model, passes) in SYSTEMS.items():
        whole = models[(models["model"] == model) & (models["length"] == passes * length) & models["fits"]]
        largest = whole.sort_values("batch").iloc[-1] if len(whole) else {"tokens_per_ms": np.nan, "batch": 0}
        rows.append(
            {
                "system": system,
                "layer_ms": layers["ms"].get(system, np.nan),
                "published_ms": layers["published"].get(system, np.nan),
                "text_tokens_per_ms": largest["tokens_per_ms"] / passes,
                "batch": int(largest["batch"]),
            }
        )
    table = pd.DataFrame(rows).set_index("system")
    first = table.loc["FlashAttention-2"]
    table["layer_faster"] = first["layer_ms"] / table["layer_ms"]
    table["published_faster"] = first["published_ms"] / table["published_ms"]
    table["model_faster"] = table["text_tokens_per_ms"] / first["text_tokens_per_ms"]
    return table.reset_index()


SYSTEMS = {
    "FlashAttention-2": ("attention-1.3b", 1),
    "Based": ("based-1.3b", 1),
    "JRT-Prompt": ("based-1.3b", 2),
    "JRT-RNN": ("jrt-1.3b", 1),
}
"""Rows of the kernel table of "Just read twice": the model that has such a layer, and how often it reads the text."""


def reading_twice_page(document: dict[str, Any]) -> str:
    """`reading_twice` as Markdown."""
    rows = [
        (
            row.system, f"{row.layer_ms:.2f}", f"{row.layer_faster:.1f}x", f"{row.published_ms:.1f}",
            f"{row.published_faster:.1f}x", f"{row.text_tokens_per_ms:.1f} (batch {row.batch})",
            f"{row.model_faster:.1f}x",
        )
        for row in reading_twice(document).itertuples()
    ]  # fmt: skip
    titles = ("system", "layer, ms", "faster", "published, ms", "faster", "whole model, tokens of text/ms", "faster")
    return _markdown(titles, rows)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# -- figures ------------------------------------------------------------------------------------------------


def generation(document: dict[str, Any], batch: int = HEADLINE["batch"], prompt: int = HEADLINE["length"]):
    """Draw tokens/ms by batch, the share of the bound, and the time of a step by position at one batch size.

    Crosses on the lower edge: the batch does not fit. Returns the matplotlib figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    table = points(document, "generation")
    table = table[(table["length"] == prompt)].sort_values("batch")
    looks = _looks(document)
    with rc_context(plot.RC):
        figure = Figure(figsize=(12.4, 3.9), layout="constrained")
        speed, share, step = figure.subplots(1, 3)
        _draw_speed(speed, table, looks, "batch")
        speed.set_title(f"{table['new_tokens'].iloc[0]:,} tokens after a prompt of {prompt:,}")
        _draw_share(share, table, looks, "batch")
        parts = segments(document)
        parts = parts[(parts["batch"] == batch) & (parts["length"] == prompt)]
        for name, look in looks.items():
            mine = parts[parts["model"] == name].sort_values("position")
            step.plot(mine["position"], mine["ms_per_token"], color=look.color, marker=look.marker, ms=3.5, lw=1.3)
            step.plot(mine["position"], mine["bound_ms"], color=look.color, ls=DASHED, lw=0.9)
        step.set(yscale="log", xlabel="position in the sequence (tokens)", ylabel="milliseconds per decode step")
        _plain_ticks(step.yaxis)
        step.set_title(f"time by position, batch {batch}")
        _tidy(step, y=True)
        _legend(step, looks, table)
        figure.suptitle(_machine(document), fontsize=8, color="0.35")
    return figure


def prefill(document: dict[str, Any], batch: int = 1):
    """Draw prefill in tokens/ms by length, and the share of the bound. Returns the matplotlib figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    table = points(document, "prefill")
    table = table[table["batch"] == batch].sort_values("length")
    looks = _looks(document)
    with rc_context(plot.RC):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        speed, share = figure.subplots(1, 2)
        _draw_speed(speed, table, looks, "length")
        speed.set_title(f"prefill, batch {batch}")
        _draw_share(share, table, looks, "length")
        _legend(share, looks, table)
        figure.suptitle(_machine(document), fontsize=8, color="0.35")
    return figure


def ratio(document: dict[str, Any], fast: str = "based-1.3b", slow: str = "attention-1.3b"):
    """Draw how many times faster one model's decode step is than another's, by position, a line per batch size.

    Solid where it was measured (after a longer prompt: diamonds), dotted on the line through the measured times, up to
    where the slower model's state and weights fill the memory of the device (a dot). The horizontal line is the
    published ratio. Returns the figure.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    parts = segments(document)
    parts = parts[parts["model"].isin([fast, slow])]
    both = [batch for batch, group in parts.groupby("batch") if group["model"].nunique() == 2]
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(both), 2)))
    with rc_context(plot.RC):
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        axis = figure.subplots()
        for batch, shade in zip(both, shades):
            mine = parts[parts["batch"] == batch]
            quick, late = (StepTime(mine[mine["model"] == model], "ms_per_token") for model in (fast, slow))
            wide = mine.pivot_table(index=["length", "position"], columns="model", values="ms_per_token").dropna()
            for prompt in wide.index.unique("length")[1:]:
                far = wide.loc[prompt]
                axis.plot(far.index, far[slow] / far[fast], "D", color=shade, mec="white", mew=0.6, ms=6, zorder=4)
            wide = wide.loc[wide.index.unique("length")[0]]
            axis.plot(wide.index, wide[slow] / wide[fast], color=shade, lw=2.2, label=f"batch {batch}", zorder=3)
            last = document["device"].get("memory_bytes", np.inf) - mine["weight_bytes"].max()
            last = last / late.bytes_per_token if late.bytes_per_token > 0 else np.inf
            end = min(last, LONGEST)
            if end > wide.index[-1]:
                at = np.geomspace(wide.index[-1], end, 50)
                axis.plot(at, late(at) / quick(at), color=shade, lw=1.1, ls=(0, (1, 1.5)), zorder=2)
            if last <= LONGEST:
                axis.plot([last], [late(last) / quick(last)], "o", color=shade, ms=5, zorder=3)
        axis.axhline(CLAIM, color="0.45", lw=0.9, ls=DASHED)
        axis.annotate(
            f"published: {CLAIM:.0f}x at batch {HEADLINE['batch']}", (0, CLAIM), xycoords=("axes fraction", "data"),
            xytext=(4, 3), textcoords="offset points", ha="left", fontsize=7.5, color="0.35",
        )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="position in the sequence (tokens)")
        axis.set_ylabel(f"decode step: {slow} / {fast}")
        _plain_ticks(axis.xaxis)
        _plain_ticks(axis.yaxis)
        _tidy(axis, y=True)
        if len(set(parts["length"])) > 1:
            axis.plot([], [], "D", color="0.4", mec="white", ms=6, label="measured after\na long prompt")
        axis.plot([], [], "o", color="0.4", ms=5, label="the memory is full")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=1.8)
        figure.suptitle(_machine(document), fontsize=8, color="0.35")
    return figure


LONGEST = 131_072  # tokens: as far as ratios are drawn


def recall_and_speed(frame: pd.DataFrame, document: dict[str, Any], batch: int | None = None):
    """Draw recall accuracy against state and against measured decode throughput, the same models in both panels.

    Left: area of a marker by the tokens/ms of its model. Right: these tokens/ms are the horizontal axis. `batch` is the
    largest one that was timed unless given. Returns the matplotlib figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    table = recall(frame, document)
    batch = int(table["batch"].max()) if batch is None else batch
    table = table[table["batch"] == batch]
    looks = plot.styles(plot.by_name(frame))
    area = _areas(table["tokens_per_ms"])
    with rc_context(plot.RC):
        figure = Figure(figsize=(10.4, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for name, look in looks.items():
            mine = table[table["architecture"] == name].sort_values("state_bytes")
            if mine.empty:
                continue
            best = plot.frontier(mine)
            left.plot(best["state_bytes"], best["accuracy"], color=look.color, ls=look.linestyle, lw=1.1, zorder=2)
            left.scatter(
                mine["state_bytes"], mine["accuracy"], s=area(mine["tokens_per_ms"]), marker=look.marker,
                color=look.color, edgecolor="white", lw=0.6, zorder=3, clip_on=False,
            )  # fmt: skip
            right.plot(
                mine["tokens_per_ms"], mine["accuracy"], ls="none", marker=look.marker, ms=6, mec="white", mew=0.5,
                color=look.color, zorder=3, clip_on=False,
            )  # fmt: skip
        longest = int(frame["state_seq_len"].max())
        left.set(xscale="log", xlabel=f"recurrent state at length {longest:,} (bytes per sequence, as trained)")
        left.set_ylabel(f"test accuracy, mean of {len(results.slice_names(frame))} slices")
        right.set(
            xscale="log", xlabel=f"generation of the same models (tokens/ms, batch {batch:,}, {_dtype(document)})"
        )
        fastest = table.sort_values("tokens_per_ms", ascending=False)
        reached = fastest[fastest["accuracy"] > fastest["accuracy"].cummax().shift(fill_value=-1.0)]
        right.step(reached["tokens_per_ms"], reached["accuracy"], where="pre", color="0.6", lw=0.9, zorder=1)
        for axis in (left, right):
            axis.set(ylim=(-0.02, 1.03), yticks=np.linspace(0, 1, 6))
            _plain_ticks(axis.xaxis)
            _tidy(axis)
        _recall_legend(right, looks, table, area)
        figure.suptitle(_machine(document), fontsize=8, color="0.35")
    return figure


def _areas(speeds: pd.Series):
    """Marker areas between 18 and 160 square points, straight lines in the logarithm of the speed."""
    low, high = np.log(speeds.min()), np.log(speeds.max())
    return lambda values: 18 + 142 * (np.log(values) - low) / max(high - low, 1e-9)


def _recall_legend(axis, looks, table: pd.DataFrame, area) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.color, marker=look.marker, ms=5, ls=look.linestyle, lw=1.1, label=name)
        for name, look in looks.items()
        if name in set(table["architecture"])
    ]
    shown = np.geomspace(table["tokens_per_ms"].min(), table["tokens_per_ms"].max(), 3)
    handles += [
        Line2D(
            [], [], color="0.6", marker="o", ls="none", ms=float(np.sqrt(area(speed))), label=f"{speed:,.0f} tokens/ms"
        )
        for speed in shown
    ]
    handles.append(Line2D([], [], color="0.6", lw=0.9, label="best at that speed\nor faster"))
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=2.6)


# -- what the figures share ---------------------------------------------------------------------------------


def _looks(document: dict[str, Any]) -> dict[str, plot.Style]:
    """The same look for a model in every figure."""
    return plot.styles(list(dict.fromkeys(r["model"] for r in document["records"] if r["kind"] != "kernel")))


def _draw_speed(axis, table: pd.DataFrame, looks: dict[str, plot.Style], x: str) -> None:
    tokens = table["batch"] * table["new_tokens"].where(table["new_tokens"] > 0, table["length"])
    table = table.assign(bound=tokens / table["bound_ms"])
    for name, look in looks.items():
        mine = table[(table["model"] == name) & table["fits"]]
        known = mine[mine["published"].notna()]
        axis.plot(mine[x], mine["bound"], color=look.color, ls=DASHED, lw=0.9, zorder=2)
        axis.plot(mine[x], mine["tokens_per_ms"], color=look.color, marker=look.marker, ms=4.5, lw=1.3, zorder=3)
        axis.plot(
            known[x], known["published"], ls="none", marker=look.marker, ms=7, mfc="none", mew=1.1, color=look.color,
            zorder=4,
        )  # fmt: skip
        for value in table[(table["model"] == name) & ~table["fits"]][x]:
            axis.plot(
                [value], [0.0], "x", color=look.color, ms=6, mew=1.3, clip_on=False,
                transform=axis.get_xaxis_transform(), zorder=5,
            )  # fmt: skip
    axis.set(xscale="log", yscale="log", ylabel="tokens per millisecond")
    _plain_ticks(axis.yaxis)
    _sizes(axis, table[x], x)
    _tidy(axis, y=True)


def _draw_share(axis, table: pd.DataFrame, looks: dict[str, plot.Style], x: str) -> None:
    for name, look in looks.items():
        mine = table[(table["model"] == name) & table["fits"]]
        axis.plot(mine[x], 100 * mine["share_of_bound"], color=look.color, marker=look.marker, ms=4.5, lw=1.3)
    axis.set(xscale="log", ylim=(0, 105), ylabel="share of the bound (%)", title="speed reached, of the bound")
    _sizes(axis, table[x], x)
    _tidy(axis)


def _sizes(axis, values: pd.Series, x: str) -> None:
    from matplotlib.ticker import NullLocator

    known = sorted(values.unique())
    axis.set_xticks(known, [f"{value}" for value in known], fontsize=7)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("batch size" if x == "batch" else "tokens of the prompt")


def _plain_ticks(axis) -> None:
    """Of a logarithmic axis: 1, 2, 5 and their tenfolds, written out."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    low, high = axis.get_view_interval()
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if high > 100 and low >= 1 else "{x:g}"))


def _tidy(axis, y: bool = False) -> None:
    axis.grid(True, axis="y", which="both" if y else "major", color="0.92", lw=0.6)
    axis.set_axisbelow(True)


def _legend(axis, looks: dict[str, plot.Style], table: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D

    drawn = {name: look for name, look in looks.items() if name in set(table["model"])}
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, ms=5, lw=1.3, label=name) for name, look in drawn.items()
    ]
    handles.append(Line2D([], [], color="0.4", ls=DASHED, lw=0.9, label="bound of bytes\nand operations"))
    if table["published"].notna().any():
        handles.append(Line2D([], [], color="0.4", ls="none", marker="o", mfc="none", ms=7, label="published (H100)"))
    if not table["fits"].all():
        handles.append(Line2D([], [], color="0.4", ls="none", marker="x", ms=6, mew=1.3, label="does not fit"))
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=2.4)


def _dtype(document: dict[str, Any]) -> str:
    return " and ".join(dict.fromkeys(r["dtype"] for r in document["records"] if r["kind"] == "generation"))


def _machine(document: dict[str, Any]) -> str:
    return f"{document['device']['name']}, torch {document['versions']['torch']}, {_dtype(document) or 'bf16'}"


def figures(document: dict[str, Any], frame: pd.DataFrame | None = None) -> dict[str, Any]:
    """The figures that the records have data for, by file name; with a results frame, its models' recall and speed."""
    named = [record for record in document["records"] if "point_id" not in record]
    timed = {key: [r for r in named if r["kind"] == key and "ms" in r] for key in ("generation", "prefill")}
    of_models = document | {"records": named}
    found: dict[str, Any] = {}
    if timed["generation"]:
        first = timed["generation"][0]
        batches = [record["batch"] for record in timed["generation"]]
        batch = HEADLINE["batch"] if HEADLINE["batch"] in batches else max(batches)
        found["generation"] = generation(of_models, batch, first["length"])
    if timed["prefill"]:
        found["prefill"] = prefill(of_models, min(record["batch"] for record in timed["prefill"]))
    if {"based-1.3b", "attention-1.3b"} <= {record["model"] for record in timed["generation"]}:
        found["ratio"] = ratio(of_models)
    if frame is not None:
        found["recall_and_speed"] = recall_and_speed(frame, document)
    return found


def save_all(document: dict[str, Any], directory: Path, frame: pd.DataFrame | None = None) -> list[Path]:
    """Write every figure that the records have data for."""
    drawn = figures(document, frame)
    return [path for stem, figure in drawn.items() for path in plot.save_figure(figure, directory, stem)]
