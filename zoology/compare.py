"""Results beside the published ones: state, accuracy, difference, and whether that is more than repeats differ by.

python -m zoology.compare DIR --to published [--json]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from zoology import published, results
from zoology.config import ModelConfig
from zoology.published import Point, Protocol
from zoology.runner import store

WITHIN, UNCLEAR, OUTSIDE = "within", "unclear", "outside"
MARKS = {WITHIN: "", UNCLEAR: "?", OUTSIDE: "*"}
LEGEND = {
    OUTSIDE: "further from the published value than repeats of the published run are",
    UNCLEAR: "further than repeats of Based, not further than those of H3 and Hyena; its own are not known",
}
NEAR = (0.03, 0.1)  # differences from the published accuracy that are counted
BUDGETS = [2**exponent for exponent in range(12, 23)]  # bytes at which architectures are put in order


class Comparison(NamedTuple):
    """Runs that are tested as one published figure is, beside it.

    `points`: one row per published point that has been run (see `compare`). `missing`: the published points that have
    not, and `only_published` those among these that no grid of the papers' code has. `unpublished`: models run that the
    figure does not have. `departures`: in what runs differ from the protocol. `unfinished`: models of `frame`, as
    (architecture, model), and why the protocol's learning rates have no result there, as text.
    `left_out`: runs tested on other examples than most. `frame`: the results table of all the others, and `devices`
    what they ran on.
    """

    protocol: Protocol
    points: pd.DataFrame
    frame: pd.DataFrame
    missing: list[Point]
    only_published: list[Point]
    unpublished: list[str]
    departures: list[str]
    unfinished: dict[tuple[str, str], str]
    left_out: int
    devices: list[str]


def compare(records: Iterable[dict[str, Any]], failed: Iterable[tuple[dict[str, Any], str]] = ()) -> list[Comparison]:
    """Records, the contents of result.json files, beside every published figure that some of them repeat.

    `failed` are the configs and messages of runs that have no result (`results.load_failed`).

    A run repeats a point if it is tested on the figure's slices and is the same model (`published.matches`). Where
    several models are, as the figure's best of equal state, the one best on validation is taken. Columns of `points`:
    what identifies the model, `state_bytes` as measured and `field_bytes` as published; `accuracy` with `low`, `high`,
    `num_seeds`; `num_rates`, how many of the protocol's `all_rates` learning rates have a result; `hardest` on the
    slice that needs most bits; `minutes` of computing over all its rates and seeds; `published` with `precision` and
    `approximate`; `difference`; `spread_low` and `spread_high`, what is known of how far repeats lie apart; `verdict`
    (see there).

    Raises ResultsError if no record repeats a published point.
    """
    records, failed = list(records), list(failed)
    by_protocol: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        protocol = published.protocol_of(record["config"])
        if protocol is not None:
            by_protocol.setdefault(protocol.name, []).append(record)
    if not by_protocol:
        raise store.ResultsError(_no_protocol(records))
    found = [
        _compare(published.protocols()[name], by_protocol[name], failed)
        for name in published.protocols()
        if name in by_protocol
    ]
    if all(comparison.points.empty for comparison in found):
        raise store.ResultsError(_no_point(found))
    return [comparison for comparison in found if not comparison.points.empty]


def load(directory: Path | str) -> list[Comparison]:
    """`compare` for a results directory; raises as `results.load` does, too. Every error names the directory."""
    records, failed = results.load_records(directory), results.load_failed(directory)
    try:
        return compare(records, failed)
    except store.ResultsError as error:
        raise store.ResultsError(f"{directory}: {error}") from None


def _compare(protocol: Protocol, records: list[dict[str, Any]], failed: list[tuple[dict[str, Any], str]]) -> Comparison:
    frame = results.from_records(records)
    kept = results.comparable(frame)
    run_ids = set(kept["run_id"])
    records = [record for record in records if record["run_id"] in run_ids]
    configs = {record["point_id"]: record["config"] for record in records}
    models = {point_id: _model(config) for point_id, config in configs.items()}
    away = {point_id: published.departures(config, protocol) for point_id, config in configs.items()}
    selected = results.select(kept)
    means = selected[selected["slice"] == results.MEAN].set_index("point_id")
    hardest = selected[selected["slice"] == results.slice_names(kept)[-1]].set_index("point_id")["accuracy"]
    runs = kept.drop_duplicates("run_id")
    minutes = runs.groupby("point_id")["device_seconds"].sum() / 60
    missing_rates = {
        name: [rate for rate in protocol.learning_rates if not np.isclose(group["lr"], rate, rtol=1e-4).any()]
        for name, group in runs.groupby("point_id")
    }
    rows, missing, only_published, used = [], [], [], set()
    for point in published.points(protocol.name):
        candidates = [
            name for name, model in models.items() if model and published.matches(point, model, protocol.seq_len)
        ]
        if not candidates:
            (missing if point.in_grid else only_published).append(point)
            continue
        best = min(candidates, key=lambda name: (len(away[name]), -means.loc[name, "validation_accuracy"]))
        used.update(candidates)
        extra = {
            "field_bytes": published.field_bytes(models[best], protocol.seq_len),
            "hardest": float(hardest[best]),
            "minutes": float(minutes[best]),
            "num_rates": len(protocol.learning_rates) - len(missing_rates[best]),
            "all_rates": len(protocol.learning_rates),
            "d_model": models[best].d_model,
        }
        rows.append(_row(point, means.loc[best], extra))
    unused = [f"{means.loc[name, 'architecture']} {means.loc[name, 'point']}" for name in models if name not in used]
    counts = Counter(text for record in records for text in away[record["point_id"]])
    said = [
        text + ("" if count == len(records) else f" ({count} of {len(records)} runs)") for text, count in counts.items()
    ]
    labels = {name: (row["architecture"], row["point"]) for name, row in means.iterrows()}
    unfinished = {
        labels[name]: _why_no_result(configs[name], rates, failed) for name, rates in missing_rates.items() if rates
    }
    return Comparison(
        protocol=protocol,
        points=pd.DataFrame(rows),
        frame=kept,
        missing=missing,
        only_published=only_published,
        unpublished=sorted(unused),
        departures=said,
        unfinished=unfinished,
        left_out=frame["run_id"].nunique() - len(run_ids),
        devices=sorted({record["device"]["name"] for record in records}),
    )


def _why_no_result(config: dict[str, Any], rates: list[float], failed: list[tuple[dict[str, Any], str]]) -> str:
    """Learning rates of a model without a result, each with the message of its run if that failed."""
    messages = {
        other["train"]["lr"]: message
        for other, message in failed
        if all(other[key] == config[key] for key in ("architecture", "model", "data"))
        and other["train"] | {"lr": None} == config["train"] | {"lr": None}
    }
    by_reason: dict[str, list[str]] = {}
    for rate in rates:
        reason = f"failed, {messages[rate]}" if rate in messages else "not run"
        by_reason.setdefault(reason, []).append(f"{rate:.3g}")
    return "; ".join(f"{', '.join(names)} {reason}" for reason, names in by_reason.items())


def _model(config: dict[str, Any]) -> ModelConfig | None:
    """The model of a run's config; None if this program cannot build it, such as one from a file that is not loaded."""
    try:
        return ModelConfig(**config["model"])
    except ValueError:
        return None


def _row(point: Point, ours: pd.Series, extra: dict[str, Any]) -> dict[str, Any]:
    spread = published.spread(point.architecture, point.slice)
    difference = float(ours["accuracy"]) - point.accuracy
    kept = ("point", "state_bytes", "lr", "lr_at_edge", "accuracy", "low", "high", "worst", "best", "num_seeds")
    return (
        {"point_id": ours.name, "architecture": point.architecture}
        | {key: ours[key] for key in kept}
        | extra
        | {
            "published": point.accuracy,
            "precision": point.precision,
            "approximate": point.approximate,
            "difference": difference,
            "spread_low": spread.low,
            "spread_high": spread.high,
            "verdict": verdict(
                difference, point.precision, spread, ours["accuracy"] - ours["worst"], ours["best"] - ours["accuracy"]
            ),
            "source": point.source,
            "spread_source": spread.source,
        }
    )


def verdict(difference: float, precision: float, spread: published.Spread, below: float = 0, above: float = 0) -> str:
    """Whether a difference is "within" the known spread, "outside" of it, or "unclear" where the spread is a range.

    The reading's `precision` is forgiven. A published value between the worst and the best of our own seeds, which lie
    `below` and `above` their mean, is within: repeats here differ by more than that.
    """
    excess = abs(difference) - precision - 1e-9
    if excess <= max(spread.low, below if difference > 0 else above):
        return WITHIN
    return UNCLEAR if excess <= spread.high else OUTSIDE


def order(points: pd.DataFrame, memory: str) -> list[dict[str, Any]]:
    """Architectures by accuracy at equal memory, published and ours, from the `points` of a comparison.

    `memory` is "field_bytes", "state_bytes" or "d_model". At a budget of bytes an architecture counts with its best
    point that fits, published and ours alike; at a width with that width. `reversed` lists the pairs that the figure
    orders by more than the least spread and that come out the other way round: architectures, both differences, and
    whether the published one is `clear`, more than the spread may be.
    """
    rows, before = [], None
    budgets = sorted(points["d_model"].unique()) if memory == "d_model" else BUDGETS
    for budget in budgets:
        fits = points[points[memory] == budget] if memory == "d_model" else points[points[memory] <= budget]
        best = {
            name: (
                group["published"].max(),
                group["accuracy"].max(),
                group["spread_low"].max(),
                group["spread_high"].max(),
            )
            for name, group in fits.groupby("architecture")
        }
        if len(best) > 1 and best != before:
            rows.append({"budget": int(budget)} | _ranked(best))
        before = best
    return rows


def _ranked(best: dict[str, tuple[float, float, float, float]]) -> dict[str, Any]:
    ranking = {
        kind: sorted(((name, float(values[index])) for name, values in best.items()), key=lambda pair: -pair[1])
        for index, kind in enumerate(("published", "ours"))
    }
    swapped, decided = [], 0
    for (first, of_first), (second, of_second) in combinations(best.items(), 2):
        theirs, ours = of_first[0] - of_second[0], of_first[1] - of_second[1]
        if abs(theirs) <= max(of_first[2], of_second[2]) + 1e-9:
            continue
        decided += 1
        if theirs * ours < 0:
            pair = [first, second] if theirs > 0 else [second, first]
            clear = abs(theirs) > max(of_first[3], of_second[3])
            swapped.append({"pair": pair, "published": abs(theirs), "ours": -abs(ours), "clear": bool(clear)})
    return ranking | {"decided": decided, "reversed": swapped}


def to_json(comparisons: Sequence[Comparison]) -> str:
    """Everything `compare` found, as JSON."""
    return store.to_json(
        [
            {
                "protocol": comparison.protocol.name,
                "title": comparison.protocol.title,
                "source": comparison.protocol.source,
                "departures": comparison.departures,
                "unfinished": {" ".join(model): why for model, why in comparison.unfinished.items()},
                "left_out": comparison.left_out,
                "cost": cost(comparison),
                "points": comparison.points.to_dict("records"),
                "order": {memory: order(comparison.points, memory) for memory in _memories(comparison)},
                "missing": [point._asdict() for point in comparison.missing],
                "only_published": [point._asdict() for point in comparison.only_published],
                "unpublished": comparison.unpublished,
            }
            for comparison in comparisons
        ],
        indent=1,
    )


def _memories(comparison: Comparison) -> list[str]:
    return ["d_model"] if comparison.protocol.memory == "d_model" else ["field_bytes", "state_bytes"]


def _no_protocol(records: list[dict[str, Any]]) -> str:
    figures = "; ".join(
        f"{p.title} tests on {_tests(p.test)} with {p.vocab_size} tokens" for p in published.protocols().values()
    )
    tested = {
        (part["task"].get("seq_len"), part["task"].get("num_kv_pairs"), part["task"].get("vocab_size"))
        for record in records
        for part in record["config"]["data"]["test"]
    }
    ours = ", ".join(f"{length}x{pairs} with {size}" for length, pairs, size in sorted(tested, key=str)[:8])
    return (
        f"none of the {len(records)} runs is tested as a published figure is: {figures} (length x pairs); "
        f"these are tested on {ours}"
    )


def _no_point(found: list[Comparison]) -> str:
    ran = sorted({name for comparison in found for name in comparison.unpublished})
    every = (point for comparison in found for point in published.points(comparison.protocol.name))
    there = sorted({f"{point.architecture} {point.label}" for point in every})
    figures = ", ".join(comparison.protocol.title for comparison in found)
    return f"no model of the runs is in {figures}: run were {'; '.join(ran[:8])}; published are {'; '.join(there)}"


def _tests(rows: Iterable[tuple[int, int, int]]) -> str:
    return ", ".join(f"{length}x{pairs}" for length, pairs, _ in rows)


TITLES = (
    "architecture", "model", "state bytes", "field's", "accuracy", "95% interval", "rates", "seeds", "hardest slice",
    "published", "difference", "",
)  # fmt: skip


def show(comparison: Comparison, console) -> None:
    """Print a comparison: the table of points, the order of architectures, and what is not in them."""
    from rich.table import Table

    protocol = comparison.protocol
    table = Table(box=None, pad_edge=False, title=f"{protocol.title} ({protocol.source})", title_justify="left")
    for index, title in enumerate(TITLES):
        table.add_column(title, justify="left" if index < 2 else "right", overflow="fold" if index == 1 else "ellipsis")
    for _, row in comparison.points.iterrows():
        table.add_row(*cells(row))
    console.print(table)
    for line in notes(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()


def tables(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """The tables of `show` as one DataFrame of text, by figure."""
    parts = {
        comparison.protocol.title: pd.DataFrame(
            [cells(row) for _, row in comparison.points.iterrows()], columns=list(TITLES)
        )
        for comparison in comparisons
    }
    return pd.concat(parts, names=["figure", "point"]).droplevel("point")


def all_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """The notes of several figures, each under its title, and what else belongs to these figures and has no run."""
    lines = [line for comparison in comparisons for line in (comparison.protocol.title, *notes(comparison), "")]
    nothing = "; ".join(protocol.title for protocol in not_begun(comparisons))
    return [*lines, f"not run at all, and in no picture: {nothing}"] if nothing else lines


def not_begun(comparisons: Sequence[Comparison]) -> list[Protocol]:
    """The protocols of the same figures of which nothing has been run."""
    begun = {comparison.protocol.name for comparison in comparisons}
    of_figures = {comparison.protocol.figure for comparison in comparisons}
    return [
        protocol
        for protocol in published.protocols().values()
        if protocol.figure in of_figures and protocol.name not in begun
    ]


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table needs to know, one line each."""
    points, lines = comparison.points, []
    lines += [f"{MARKS[kind]} {text}" for kind, text in LEGEND.items() if (points["verdict"] == kind).any()]
    counts = points["verdict"].value_counts()
    verdicts = ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in MARKS)
    whole = int((points["num_rates"] == points["all_rates"]).sum())
    rates = "" if whole == len(points) else f", {whole} of them at every learning rate"
    total = len(points) + len(comparison.missing)
    lines.append(f"{len(points)} of {total} published points run{rates}: {verdicts} the known spread")
    lines.append(_near_line(points))
    lines += _spread_lines(points)
    lines += [f"differs from the protocol in {text}" for text in comparison.departures]
    for summary, *pairs in _orders(comparison):
        lines += [summary, *(f"  {pair}" for pair in pairs)]
    lines.append(f"cost: {cost(comparison)}")
    lines += _unfinished_lines(comparison)
    if comparison.missing:
        lines.append("not run: " + not_run(comparison))
    if comparison.only_published:
        only = "; ".join(map(_said, comparison.only_published))
        lines.append(f"published only, in no grid of the papers' code: {only}")
    if comparison.unpublished:
        lines.append("not published: " + "; ".join(comparison.unpublished))
    if comparison.left_out:
        lines.append(f"left out: {comparison.left_out} runs that were tested on other examples")
    return lines


def headline(comparison: Comparison) -> list[str]:
    """Of `notes` what the figure comes to: how near the points are, and how many pairs are in the published order."""
    return [_near_line(comparison.points), *(summary for summary, *_ in _orders(comparison))]


def _near_line(points: pd.DataFrame) -> str:
    near = [f"{(points['difference'].abs() <= limit + 1e-9).sum()} within {limit}" for limit in NEAR]
    return f"of the published accuracy: {', '.join(near)}"


def _orders(comparison: Comparison) -> Iterator[list[str]]:
    """By each measure of memory under which some pair is decided: how many are as published, and those that are not."""
    for memory in _memories(comparison):
        if any(row["decided"] for row in order(comparison.points, memory)):
            summary, *pairs = order_lines(comparison.points, memory)
            yield [f"order at equal {_memory_name(memory)}: {summary}", *pairs]


def _spread_lines(points: pd.DataFrame) -> list[str]:
    """What is known of the spread of the architectures that were run, and from where."""
    lines = []
    for (low, high, source), group in points.groupby(["spread_low", "spread_high", "spread_source"], sort=False):
        size = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        lines.append(f"known spread of {', '.join(dict.fromkeys(group['architecture']))}: {size} ({source})")
    return lines


def cost(comparison: Comparison) -> str:
    """Runs and minutes of computing of a comparison, with evaluation and compilation, as text."""
    runs = comparison.frame.drop_duplicates("run_id")
    return f"{len(runs)} runs, {runs['device_seconds'].sum() / 60:,.1f} minutes on {' and '.join(comparison.devices)}"


def cells(row: pd.Series) -> tuple[str, ...]:
    """One point as text, in the columns of `show`."""
    return (
        row["architecture"],
        row["point"],
        f"{row['state_bytes']:,}",
        "" if pd.isna(row["field_bytes"]) else f"{int(row['field_bytes']):,}",
        f"{row['accuracy']:.3f}",
        "" if pd.isna(row["low"]) else f"{row['low']:.3f}-{row['high']:.3f}",
        f"{row['num_rates']} of {row['all_rates']}",
        str(row["num_seeds"]),
        f"{row['hardest']:.3f}",
        f"{'~' if row['approximate'] else ''}{row['published']:.3f}",
        f"{round(row['difference'], 3) + 0.0:+.3f}",
        MARKS[row["verdict"]],
    )


def order_lines(points: pd.DataFrame, memory: str) -> list[str]:
    """How many pairs of architectures come out in the published order at equal memory, and each that does not.

    What is so at several budgets, as nothing better fits into the larger ones, is one line.
    """
    rows = order(points, memory)
    decided, where = sum(row["decided"] for row in rows), {}
    for row in rows:
        for pair in row["reversed"]:
            first, second = pair["pair"]
            doubt = "" if pair["clear"] else ", which may be within the spread"
            said = f"{first} is {-pair['ours']:.3f} below {second}, published {pair['published']:.3f} above{doubt}"
            where.setdefault(said, []).append(row["budget"])
    lines = [f"{decided - sum(map(len, where.values()))} of {decided} pairs that the figure decides, as published"]
    for said, budgets in where.items():
        if memory == "d_model":
            lines += [f"at d_model {width} {said}" for width in budgets]
        else:
            span = " to ".join(f"{budget:,}" for budget in sorted({budgets[0], budgets[-1]}))
            lines.append(f"at {span} bytes {said}")
    return lines


def _unfinished_lines(comparison: Comparison) -> list[str]:
    """Learning rates without a result, one line for all models that lack the same for the same reason."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for (architecture, model), why in comparison.unfinished.items():
        by_reason.setdefault(why, {}).setdefault(architecture, []).append(model)
    counts = comparison.frame.drop_duplicates("point_id")["architecture"].value_counts().to_dict()
    return [f"learning rates without a result: {why} ({_models(found, counts)})" for why, found in by_reason.items()]


def _models(found: dict[str, list[str]], counts: dict[str, int]) -> str:
    """Models by architecture, as text; `counts` are the models that each architecture has in all."""
    if sum(map(len, found.values())) == sum(counts.values()):
        return "every model"
    return "; ".join(
        f"every {name}" if len(models) == counts[name] > 1 else "; ".join(f"{name} {model}" for model in models)
        for name, models in found.items()
    )


def not_run(comparison: Comparison) -> str:
    """The published points that have not been run, as text; an architecture of which none has been by its name."""
    ran, left = set(comparison.points["architecture"]), {}
    for point in comparison.missing:
        left.setdefault(point.architecture, []).append(point)
    return "; ".join(
        "; ".join(map(_said, points)) if name in ran or len(points) == 1 else f"{name}, all {len(points)} points"
        for name, points in left.items()
    )


def _memory_name(memory: str) -> str:
    return {"field_bytes": "memory as the field counts it", "state_bytes": "measured memory", "d_model": "width"}[
        memory
    ]


def _said(point: Point) -> str:
    size = f"{point.field_bytes:,} bytes" if point.field_bytes else ""
    return " ".join(filter(None, (point.architecture, point.label if point.label != "unknown" else "", size)))


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m zoology.compare DIR --to published [--json]`: print results beside the published ones."""
    import argparse
    import sys

    from rich.console import Console

    from zoology.printing import exit_code_of

    parser = argparse.ArgumentParser(prog="python -m zoology.compare", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="results directory")
    parser.add_argument("--to", choices=["published"], default="published", help="what to compare with")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    try:
        comparisons = load(options.directory)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def write() -> None:
        if options.json:
            print(to_json(comparisons))
        else:
            console = Console() if sys.stdout.isatty() else Console(width=200)
            for comparison in comparisons:
                show(comparison, console)

    return exit_code_of(write)


if __name__ == "__main__":
    raise SystemExit(main())
