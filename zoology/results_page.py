"""The README's results beside the published figures, generated from committed records.

`python -m zoology.results_page README.md` draws the figures of every directory of FIGURES that holds records, writes a
page beside these records (the table, what differs and why) and rewrites the README's section in place. Without records
there is neither.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from zoology import compare, figures, plot, published, tables
from zoology.compare import Comparison
from zoology.runner import store

START, END = "<!-- results -->", "<!-- end results -->"
BEFORE = "## Layout"  # where the section goes when there is none yet


class Figure(NamedTuple):
    """A published figure that this repository repeats: its records, and what made them."""

    directory: str  # relative to the README
    experiment: str
    title: str


FIGURES = (
    Figure("experiments/results/based_figure2", "experiments/mqar_sweep.py", "Based, Fig. 2"),
    Figure("experiments/results/zoology_figure2", "experiments/zoology_figure2.py", "Zoology, Fig. 2"),
)


def section(root: Path) -> str:
    """The section, of every figure that has records under `root`, the folder of the README; "" if none has."""
    parts = []
    for figure in FIGURES:
        comparisons = _comparisons(root / figure.directory)
        if comparisons:
            parts.append(_part(figure, comparisons))
    if not parts:
        return ""
    return "\n\n".join([f"{START}\n## Beside the published figures", *parts, END])


def pages(root: Path) -> dict[Path, str]:
    """The page of every figure that has records under `root`, by where it belongs: a README beside these records."""
    found = {}
    for figure in FIGURES:
        directory = root / figure.directory
        if comparisons := _comparisons(directory):
            found[directory / "README.md"] = _page(figure, comparisons, _written(directory))
    return found


def _comparisons(directory: Path) -> list[Comparison]:
    """What is committed of a figure; nothing where there are no records."""
    if not directory.is_dir() or not store.scan(directory).finished:
        return []
    return compare.load(directory)


NOTES = "NOTES.md"
"""What people write about a figure's results, beside its records: its page takes it over after the table."""


def _written(directory: Path) -> str:
    path = directory / NOTES
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _part(figure: Figure, comparisons: Sequence[Comparison]) -> str:
    """What the README says of a figure."""
    lines = [
        f"{comparison.protocol.title}, {line}" if len(comparisons) > 1 else line
        for comparison in comparisons
        for line in compare.headline(comparison)
    ]
    table = f"[The table, what differs and why]({figure.directory}/README.md)."
    picture = _picture(figure, comparisons, "")
    return "\n\n".join([f"### {figure.title}", _how_far(comparisons), "\n".join(_items(lines)), table, picture])


def _page(figure: Figure, comparisons: Sequence[Comparison], written: str) -> str:
    """All there is to say of a figure, to stand beside its records."""
    made = f"<!-- Made by `python -m zoology.results_page README.md` from the records and {NOTES}: edit that. -->"
    picture = _picture(figure, comparisons, figure.directory)
    blocks = [f"# {figure.title}, beside the published", made, _how_far(comparisons), picture]
    for comparison in comparisons:
        block = [markdown_table(comparison), "\n".join(_items(compare.notes(comparison)))]
        if len(comparisons) > 1:
            block = [f"<details><summary>{comparison.protocol.title}</summary>", *block, "</details>"]
        blocks += block
    return "\n\n".join([*blocks, *filter(None, [written])]) + "\n"


def _picture(figure: Figure, comparisons: Sequence[Comparison], folder: str) -> str:
    """The picture and its caption, linked from `folder`, which is relative to that of the README."""

    def link(path: str) -> str:
        return os.path.relpath(path, folder or ".").replace(os.sep, "/")

    notebook = f"notebooks/{Path(figure.directory).name}.ipynb"
    command = f"python -m zoology.run {figure.experiment} --scale paper{_precision(comparisons)}"
    return (
        f"![{figure.title}, measured and published]({link(f'{figure.directory}/beside_published.png')})\n\n"
        f"*Filled markers are measured here, hollow ones published (grey: not run here); `{command}`, drawn from the "
        f"raw records in [{figure.directory}]({link(figure.directory)}), as is the table of `python -m zoology.compare "
        f"{figure.directory}`. [One figure]({link(f'{figure.directory}/learning_rates.png')}) has what the learning "
        f"rate decides, [{notebook}]({link(notebook)}) every slice and training times as well.*"
    )


def _precision(comparisons: Sequence[Comparison]) -> str:
    """The option that all runs were made with, if it is not the experiment's own precision and one for all."""
    names = {name for comparison in comparisons for name in comparison.frame["precision"]}
    return f" --precision {names.pop()}" if len(names) == 1 and "fp32" not in names else ""


def _how_far(comparisons: Sequence[Comparison]) -> str:
    """How much of the published figure has been run, of its panels without any run as well."""
    ran = sum(len(comparison.points) for comparison in comparisons)
    total = ran + sum(len(comparison.missing) for comparison in comparisons)
    runs = sum(comparison.frame["run_id"].nunique() for comparison in comparisons)
    whole = sum(int((part.points["num_rates"] == part.points["all_rates"]).sum()) for part in comparisons)
    rates = "" if whole == ran else f", {whole} of them at every learning rate"
    nothing = compare.not_begun(comparisons)
    total += sum(point.in_grid for protocol in nothing for point in published.points(protocol.name))
    if ran == total:
        return f"All {total} published points have been run{rates}, in {runs} runs."
    left = f" Nothing yet: {'; '.join(protocol.title for protocol in nothing)}." if nothing else ""
    return f"**{ran} of {total} published points have been run so far**{rates}, in {runs} runs.{left}"


def _items(lines: Sequence[str]) -> list[str]:
    """Notes as a list, what is indented one level below."""
    return [f"  - {line.strip()}" if line.startswith(" ") else "- " + line.replace("* ", "\\* ", 1) for line in lines]


def markdown_table(comparison: Comparison) -> str:
    """One row per published point that was run, with the minutes of computing that all its rates and seeds took."""
    titles = ("architecture", "model", "state bytes, measured", "as the field counts", *compare.TITLES[4:-1], "minutes")
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for _, row in comparison.points.iterrows()]
    return "\n".join(lines)


def _cells(row: pd.Series) -> list[str]:
    *cells, difference, mark = compare.cells(row)
    cells = [cell or "-" for cell in cells]
    cells[0] = f"`{cells[0]}`"
    return [*cells, f"{difference} {mark}".strip().replace("*", "\\*"), f"{row['minutes']:.1f}"]


def replace_section(text: str, root: Path) -> str:
    """`text` with today's section in place of the one it has, or before "## Layout".

    Where there are no records it comes back without one. Raises ValueError for a text that has neither the markers nor
    that heading.
    """
    bare = re.sub(rf"{START}\n.*?{END}\n\n", "", text, flags=re.DOTALL)
    new = section(root)
    if not new:
        return bare
    if text == bare and f"\n{BEFORE}\n" not in text:
        raise ValueError(f"no place for the results: the text needs the heading {BEFORE!r} or {START!r} to {END!r}")
    if text == bare:
        return text.replace(f"\n{BEFORE}\n", f"\n{new}\n\n{BEFORE}\n", 1)
    return re.sub(rf"{START}\n.*?{END}", lambda _: new, text, count=1, flags=re.DOTALL)


def draw(root: Path) -> list[Path]:
    """Write the figures of every directory that has records, beside these."""
    paths = []
    for figure in FIGURES:
        directory = root / figure.directory
        if comparisons := _comparisons(directory):
            by_state = comparisons[0].protocol.memory == "field_bytes"
            main_figure = figures.beside_published(comparisons[0]) if by_state else figures.by_width(comparisons)
            paths += plot.save_figure(main_figure, directory, "beside_published")
            paths += plot.save_figure(figures.learning_rates(comparisons), directory, "learning_rates")
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def anew(text: str, folder: Path) -> str:
        drawn = draw(folder)
        if not drawn:
            print(f"no records in {' or '.join(str(folder / figure.directory) for figure in FIGURES)}")
        for path in drawn:
            print(path)
        for path, page in pages(folder).items():
            path.write_text(page, encoding="utf-8")
            print(path)
        return replace_section(text, folder)

    return tables.rewrite(arguments, "zoology.results_page", "figures and results beside the published ones", anew)


if __name__ == "__main__":
    raise SystemExit(main())
