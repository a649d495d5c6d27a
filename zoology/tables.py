"""The README's tables, generated from registries and records: `python -m zoology.tables README.md` rewrites them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import architectures
from zoology import tasks

D_MODEL, SEQ_LEN = 64, 1024


def architecture_table() -> str:
    """One row per architecture: paper, what it is, options with defaults, measured state, backends."""
    lines = [
        f"| architecture | what it is | options (defaults) | state at d_model {D_MODEL}, length {SEQ_LEN} | backends |",
        "|---|---|---|---|---|",
    ]
    for name in architectures.names():
        told = architectures.describe(name, d_model=D_MODEL, seq_len=SEQ_LEN)
        options = [f"`{key}={o.default!r}`" for key, o in told.options.items() if key not in _COMMON_OPTIONS]
        fields = " + ".join(f"{field} {count:,}" for field, count in told.state.items() if count)
        state = f"{sum(told.state.values()):,} = {fields}" if "+" in fields else fields
        summary = told.summary.replace("|", "\\|")
        cells = (f"`{name}`", f"{summary} ({told.paper})", ", ".join(options) or "-", state, ", ".join(told.backends))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def task_table() -> str:
    """One row per task: definition, an example line, required bits, source."""
    lines = ["| task | definition | example (`token>label`) | required bits | source |", "|---|---|---|---|---|"]
    for name in tasks.names():
        told = tasks.describe(name)
        cells = (f"`{name}`", told["definition"], f"`{told['example']}`", told["required_bits"], told["source"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def of_throughput(page: str) -> Callable[[], str]:
    """A table of `zoology.plots_throughput`, from the committed records of the 1.3B models."""

    def table() -> str:
        from zoology import plots_throughput

        return getattr(plots_throughput, page)(plots_throughput.load(THROUGHPUT))

    return table


def batch_order_table() -> str:
    """The published points that were also trained in the papers' order of batches, by either order."""
    from zoology import compare

    ordered, new = (compare.load(RESULTS / name)[0].points for name in ("batch_order", "based_figure2"))
    pairs = ordered.merge(new, on=["architecture", "point"], suffixes=("", "_new"), validate="one_to_one")
    orders = "the same order each epoch | difference | a new one each epoch | difference"
    lines = [f"| architecture | model | published | {orders} |", "|---|---|" + "---:|" * 5]
    for _, row in pairs.iterrows():
        cells = [f"`{row['architecture']}`", row["point"], f"{row['published']:.3f}"]
        for order in ("", "_new"):
            accuracy, worst, best = (row[f"{name}{order}"] for name in ("accuracy", "worst", "best"))
            seeds = f"{row[f'num_seeds{order}']} seeds, {worst:.3f} to {best:.3f}" if best > worst else "one seed"
            cells += [f"{accuracy:.3f} ({seeds})", f"{row[f'difference{order}']:+.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


RESULTS = Path(__file__).parents[1] / "experiments" / "results"
THROUGHPUT = RESULTS / "throughput" / "models.json"
TABLES: dict[str, Callable[[], str]] = {
    "architectures": architecture_table,
    "tasks": task_table,
    "batch_order": batch_order_table,
    "generation": of_throughput("generation_page"),
    "ratio": of_throughput("ratio_page"),
    "prefill": of_throughput("prefill_page"),
    "reading_twice": of_throughput("reading_twice_page"),
}
_COMMON_OPTIONS = frozenset({"d_model", "backend", "layer_idx", "n_layers"})


def replace_tables(text: str) -> str:
    """`text` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew for every known NAME.

    Raises ValueError for a marker with an unknown name, and where there is none.
    """

    def fresh(match: re.Match) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}: there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    text, count = re.subn(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fresh, text, flags=re.DOTALL)
    if not count:
        raise ValueError(f"nothing between <!-- table: NAME --> and <!-- end -->; names are {', '.join(TABLES)}")
    return text


def rewrite(arguments: Sequence[str] | None, prog: str, what: str, replace: Callable[[str, Path], str]) -> int:
    """A command that makes generated parts of Markdown files anew: `replace(text, folder)` gives the new text."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=f"Make {what} of these files anew.")
    parser.add_argument("files", nargs="+", type=Path, help="Markdown files, such as README.md")
    for path in parser.parse_args(arguments).files:
        try:
            path.write_text(replace(path.read_text(encoding="utf-8"), path.parent), encoding="utf-8")
        except (OSError, ValueError) as error:
            print(f"error: {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return rewrite(arguments, "zoology.tables", "the generated tables", lambda text, folder: replace_tables(text))


if __name__ == "__main__":
    raise SystemExit(main())
