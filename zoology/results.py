"""Results as a table: one row per run and test slice, and what is selected and averaged from it.

This is the one way plots, tables and notebooks get data.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from zoology.config import layer_options_text
from zoology.runner import store

MEAN = "mean"
"""What `select` calls the mean over slices."""

POINT_COLUMNS = ["point_id", "architecture", "point", "state_bytes", "parameters", "lr", "lr_at_edge", "num_seeds"]
"""What identifies a row of `slice_table`."""

# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond 30 the normal one is near enough.
_T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
        2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
        2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)  # fmt: skip


def load(directory: Path | str) -> pd.DataFrame:
    """All finished runs of a results directory, one row per run and test slice.

    `accuracy`, `stderr`, `num_examples` are of the test slice, `validation_accuracy` of its validation twin,
    `validation_mean` the run's mean over slices, by which rates are selected. `state_elements` and `state_bytes`
    are per sequence over all layers at the longest test length, `slice_state_*` at the slice's own length.
    `device_share` is what a run had of its device's time beside others, of one that was resumed in all its attempts by
    their time in training. `alone_seconds` is its time in training as if it had had the device to itself:
    `train_seconds` without the wait for its turns or, where an epoch had no turn and of records that do not tell, that
    share of them. `device_seconds` adds that share of the rest of `wall_seconds`.
    `task_options` is the slice's task as `zoology.tasks.from_config` reads it.

    Raises ResultsError for a directory that cannot be read, holds no finished run, or has another schema version.
    """
    return from_records(load_records(directory))


def load_records(directory: Path | str) -> list[dict[str, Any]]:
    """The contents of every result.json of a results directory; raises as `load` does, and warns of broken ones."""
    found = store.scan(directory)
    if found.broken:
        broken = "; ".join(f"that of run {run_id} {reason}" for run_id, reason in found.broken.items())
        warnings.warn(f"{directory}: results left out: {broken}", stacklevel=2)
    if not found.finished:
        raise store.ResultsError(f"{directory} holds no finished run")
    return list(found.finished.values())


def failures(directory: Path | str) -> pd.DataFrame:
    """Failed runs of a results directory: run_id, error."""
    failed = store.scan(directory).failed
    return pd.DataFrame({"run_id": list(failed), "error": list(failed.values())})


def load_failed(directory: Path | str) -> list[tuple[dict[str, Any], str]]:
    """Config and message of every failed run of a results directory; of those whose config can be read."""
    found = []
    for run_id, message in store.scan(directory).failed.items():
        with suppress(OSError, ValueError):
            found.append((json.loads(Path(directory, run_id, "config.json").read_text(encoding="utf-8")), message))
    return found


def from_records(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """`load` for results that are in memory."""
    with store.no_garbage_collection():
        records = list(records)
        runs = pd.DataFrame([_run_columns(record) for record in records])
        parts = pd.DataFrame(
            [
                _slice_columns(part, record["state"][str(part["seq_len"])])
                for record in records
                for part in record["slices"]
            ]
        )
        times = [len(record["slices"]) for record in records]
        return runs.loc[runs.index.repeat(times)].reset_index(drop=True).join(parts)


def _run_columns(record: dict[str, Any]) -> dict[str, Any]:
    config, slices = record["config"], record["slices"]
    longest = max(part["seq_len"] for part in slices)
    state = record["state"][str(longest)]
    share, waited = record.get("device_share", 1.0), record.get("waited_seconds")
    trained, whole = record["train_seconds"], record["wall_seconds"]
    alone = share * trained if waited is None else trained - waited
    return {
        "run_id": record["run_id"],
        "point_id": record["point_id"],
        "architecture": record["architecture"],
        "point": layer_options_text(config["model"]),
        "d_model": config["model"]["d_model"],
        "lr": config["train"]["lr"],
        "seed": config["seed"],
        "state_seq_len": longest,
        "state_elements": state["elements"],
        "state_bytes": state["bytes"],
        "parameters": record["parameters"],
        "validation_mean": float(np.mean([_number(part["validation"]["accuracy"]) for part in slices])),
        **{
            key: record[key]
            for key in (
                "epochs", "selected_epoch", "stopped_early", "train_seconds", "wall_seconds",
                "examples_per_second", "peak_memory_bytes", "precision", "dtype",
            )
        },
        "device_share": share,
        "alone_seconds": alone,
        "device_seconds": alone + share * (whole - trained),
        "device": record["device"]["type"],
        "backends": " ".join(dict.fromkeys(name for names in record["backends"].values() for name in names)),
        "torch": record["versions"]["torch"],
        "git_commit": (record["git"] or {}).get("commit"),
    }  # fmt: skip


def _slice_columns(part: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    return {
        "slice": part["name"],
        "task": part["task"]["name"],
        "task_options": part["task"],
        "seq_len": part["seq_len"],
        "num_kv_pairs": part["task"].get("num_kv_pairs"),
        "vocab_size": part["task"].get("vocab_size"),
        "accuracy": _number(part["test"]["accuracy"]),
        "stderr": _number(part["test"]["stderr"]),
        "num_examples": part["test"]["num_examples"],
        "validation_accuracy": _number(part["validation"]["accuracy"]),
        "validation_stderr": _number(part["validation"]["stderr"]),
        "slice_state_elements": state["elements"],
        "slice_state_bytes": state["bytes"],
        "required_bits": part["required_bits"],
        "answers": part["answers"],
        **{f"baseline_{name}": value for name, value in part["baselines"].items()},
        "test_hash": part["test_hash"],
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def by_test_data(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """The frame in parts within which all runs were tested on the same data, the shortest tests first.

    Accuracies of different parts cannot be compared. A directory has several where its experiment tests on several
    data sets, or was edited between two sweeps.
    """
    tested = frame.groupby("run_id", sort=False)["test_hash"].agg(lambda hashes: " ".join(sorted(hashes)))
    parts = [part for _, part in frame.groupby(frame["run_id"].map(tested), sort=False)]
    return sorted(parts, key=lambda part: (part["state_seq_len"].max(), part["required_bits"].max()))


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest part of `by_test_data`."""
    return max(by_test_data(frame), key=lambda part: part["run_id"].nunique())


def select(frame: pd.DataFrame) -> pd.DataFrame:
    """The best learning rate of every point, and its test accuracy: one row per point and slice, and one for "mean".

    The rate is the one with the highest validation accuracy, averaged over slices and seeds; rates compete only
    if as many seeds finished as for the rate with most, and of equals the smaller rate wins. Test accuracies are
    reported for that rate: `accuracy` is the mean over seeds, `half` half the width of its 95% interval by Student's
    t, `low` and `high` that interval clipped to [0, 1] (all three NaN for one seed), `worst` and `best` the range of
    the seeds. `lr_at_edge` says that a rate beyond the grid might have been better: the selected one is the smallest
    or largest of several.

    Raises ValueError for runs that were tested on different data: see `by_test_data`.
    """
    if (number := len(by_test_data(frame))) > 1:
        raise ValueError(f"the runs were tested on {number} different data sets: take one part of by_test_data(frame)")
    runs = frame.drop_duplicates("run_id")
    chosen = {point: _best_rate(group) for point, group in runs.groupby("point_id", sort=False)}
    kept = frame[frame["lr"] == frame["point_id"].map(chosen)]
    means = kept.groupby(["point_id", "seed"], sort=False, as_index=False).agg(
        accuracy=("accuracy", "mean"), validation_accuracy=("validation_accuracy", "mean")
    )
    means = kept.drop_duplicates(["point_id", "seed"]).drop(columns=["accuracy", "validation_accuracy"]).merge(means)
    means = means.assign(slice=MEAN, seq_len=means["state_seq_len"], slice_state_bytes=means["state_bytes"])
    rates = runs.groupby("point_id")["lr"].agg(["min", "max", "nunique"])
    rows = []
    for (point, _), group in pd.concat([means, kept]).groupby(["point_id", "slice"], sort=False):
        first, grid, rate = group.iloc[0], rates.loc[point], chosen[point]
        rows.append(
            {
                key: first[key]
                for key in (
                    "point_id", "architecture", "point", "slice", "seq_len", "state_bytes", "state_elements",
                    "state_seq_len", "slice_state_bytes", "parameters", "lr",
                )
            }
            | {"lr_at_edge": bool(grid["nunique"] > 1 and rate in (grid["min"], grid["max"]))}
            | {"validation_accuracy": group["validation_accuracy"].mean()}
            | spread(group["accuracy"])
        )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.sort_values(["architecture", "state_bytes", "point_id"], kind="stable").reset_index(drop=True)


def _best_rate(runs: pd.DataFrame) -> float:
    by_rate = runs.groupby("lr")["validation_mean"].agg(["mean", "count"]).sort_index()
    complete = by_rate[by_rate["count"] == by_rate["count"].max()]
    return float(complete["mean"].idxmax())


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean over seeds, number of seeds, half the width of the 95% t-interval, the interval clipped to [0, 1], range."""
    values = np.asarray(list(values), dtype=float)
    count, mean = len(values), float(values.mean())
    half = math.nan
    if count > 1:
        quantile = _T95[count - 2] if count - 2 < len(_T95) else 1.96
        half = quantile * float(values.std(ddof=1)) / math.sqrt(count)
    return {
        "accuracy": mean,
        "num_seeds": count,
        "half": half,
        "low": max(0.0, mean - half) if count > 1 else math.nan,
        "high": min(1.0, mean + half) if count > 1 else math.nan,
        "worst": float(values.min()),
        "best": float(values.max()),
    }


def slice_names(frame: pd.DataFrame) -> list[str]:
    """Test slices in the order of their difficulty: required bits, then length."""
    parts = frame.drop_duplicates("slice").sort_values(["required_bits", "seq_len", "slice"], kind="stable")
    return list(parts["slice"])


def slice_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy by point (rows) and slice (columns, "mean" first), at the selected learning rate."""
    table = select(frame)
    points = table.loc[table["slice"] == MEAN, POINT_COLUMNS]
    wide = table.pivot(index="point_id", columns="slice", values="accuracy")[[MEAN, *slice_names(frame)]]
    return points.join(wide, on="point_id").drop(columns="point_id").reset_index(drop=True)


def floors(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of predictors that cannot recall (`zoology.tasks.baselines`), one row per slice."""
    columns = [name for name in frame.columns if name.startswith("baseline_")]
    table = frame.drop_duplicates("slice").set_index("slice").loc[slice_names(frame), columns]
    return table.rename(columns=lambda name: name.removeprefix("baseline_"))
