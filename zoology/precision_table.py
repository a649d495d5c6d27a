"""Accuracy by precision, from the records of a sweep that ran in several: python -m zoology.precision_table DIR."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from zoology import results
from zoology.precision import PRECISIONS
from zoology.printing import exit_code_of

HARDEST = 2
"""How many slices have a column of their own, beside the mean of all."""

EXACT = PRECISIONS[0]


def by_precision(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per model, learning rate, precision and slice, the mean of slices being one: what the seeds reached.

    `accuracy` is their mean, `worst` and `best` their range, `behind` by how much the mean is below that of fp32 (NaN
    without fp32), `within` whether that is no more than seeds of fp32 or of this precision differ among themselves;
    `train_seconds` is the mean time in training, as if alone on the device. `frame` is that of `results.load`. Raises
    ValueError for runs that were tested on different data.
    """
    if (number := len(results.by_test_data(frame))) > 1:
        raise ValueError(f"the runs were tested on {number} different data sets: take one part of by_test_data(frame)")
    means = frame.groupby("run_id", as_index=False)["accuracy"].mean().assign(slice=results.MEAN)
    runs = frame.drop_duplicates("run_id").drop(columns=["accuracy", "slice"])
    every = pd.concat([runs.merge(means, on="run_id"), frame])
    model = ["architecture", "point", "lr"]
    rows = []
    for key, group in every.groupby([*model, "slice"], sort=False):
        seeds = {name: part["accuracy"] for name, part in group.groupby("precision")}
        exact = seeds.get(EXACT)
        for precision in (name for name in PRECISIONS if name in seeds):
            found = seeds[precision]
            behind = float("nan") if exact is None else exact.mean() - found.mean()
            spread = max(float(part.max() - part.min()) for part in (found, exact) if part is not None)
            rows.append(
                dict(zip([*model, "slice"], key))
                | {"precision": precision, "accuracy": found.mean(), "worst": found.min(), "best": found.max()}
                | {"num_seeds": len(found), "behind": behind, "within": bool(behind <= spread)}
                | {"train_seconds": group.loc[group["precision"] == precision, "alone_seconds"].mean()}
            )
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """The table for people: the mean of slices and the hardest of them, each mean (worst to best of the seeds).

    A star marks what is further behind fp32 than seeds differ.
    """
    found = by_precision(frame)
    columns = [results.MEAN, *results.slice_names(frame)[-HARDEST:]]
    lines = [
        "| " + " | ".join(["model", "lr", "precision", "seeds", *map(_title, columns), "training, s"]) + " |",
        "|" + "---|" * (len(columns) + 5),
    ]
    for (architecture, point, lr, precision), group in found.groupby(
        ["architecture", "point", "lr", "precision"], sort=False
    ):
        by_slice = group.set_index("slice")
        cells = [_cell(by_slice.loc[column]) for column in columns]
        first = group.iloc[0]
        facts = [f"{architecture} {point}", f"{lr:g}", precision, str(first["num_seeds"])]
        lines.append("| " + " | ".join([*facts, *cells, f"{first['train_seconds']:.0f}"]) + " |")
    return "\n".join([*lines, "", f"\\* behind {EXACT} by more than seeds differ."])


def _title(column: str) -> str:
    return "mean of slices" if column == results.MEAN else column


def _cell(row: pd.Series) -> str:
    star = "" if row["within"] or pd.isna(row["behind"]) else " \\*"
    return f"{row['accuracy']:.3f} ({row['worst']:.3f} to {row['best']:.3f}){star}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a results directory; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m zoology.precision_table",
        description="Accuracy by precision, of a sweep that ran in several: a table in Markdown.",
    )
    parser.add_argument("directory", type=Path, help="results directory")
    directory = parser.parse_args(arguments).directory
    try:
        table = markdown(results.comparable(results.load(directory)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return exit_code_of(lambda: print(table))


if __name__ == "__main__":
    sys.exit(main())
