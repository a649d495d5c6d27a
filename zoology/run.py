"""Run a sweep: python -m zoology.run experiments/mqar_sweep.py."""

from __future__ import annotations

import contextlib
import gc
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import architectures
from zoology.config import RunConfig
from zoology.devices import num_cores, resolve_devices
from zoology.loggers import LoggedView, make_loggers
from zoology.runner import plan, progress, store
from zoology.runner.driver import Exit, Signals, SweepOutcome, partition, run_sweep
from zoology.runner.memory import RESERVED, MemoryEstimate
from zoology.runner.plan import PlanError, PlannedRun


class Scale(str, Enum):
    smoke = "smoke"
    laptop = "laptop"
    paper = "paper"


class EngineName(str, Enum):
    local = "local"
    ray = "ray"


class Precision(str, Enum):
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


class Rerun(str, Enum):
    failed = "failed"
    all = "all"


JOBS_PER_GPU = 4
"""Compiling a model takes as long as training it at several rates: while some compile, others keep the GPU busy.

Together they train as fast as one alone, no faster: more are of no use.
"""

CORES_PER_JOB = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="file that defines sweep(scale) -> list[RunConfig]")],
    scale: Annotated[Scale | None, typer.Option(help="default: laptop without a GPU, paper with one")] = None,
    out: Annotated[Path | None, typer.Option(help="results directory; default: results/<experiment>-<scale>")] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="architectures to run, in this order, separated by commas; words of a run's label narrow one: "
            "'gla,based d_model=64 lr=0.01'"
        ),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="worker processes here, or a Ray cluster")] = EngineName.local,
    address: Annotated[str | None, typer.Option(help="address of the Ray cluster; default: one of its own")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help=f"runs at once per GPU, memory permitting; default: up to {JOBS_PER_GPU}; without a GPU 1 per core"
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="seeds 0 to N-1 instead of the experiment's own")] = None,
    best_seeds: Annotated[
        int | None, typer.Option(help="also seeds 0 to N-1 at the best learning rate, for models that are done")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="instead of that of the experiment's runs")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,
    rerun: Annotated[Rerun | None, typer.Option(help="do failed runs, or all, again")] = None,
    architecture_files: Annotated[
        list[Path] | None, typer.Option("--architectures", help="file that registers architectures; can be repeated")
    ] = None,
    time_limit: Annotated[str | None, typer.Option(help="end cleanly after this time (90, 45s, 10m, 2h)")] = None,
    timeout: Annotated[str | None, typer.Option(help="give up a run after this time")] = None,
    retries: Annotated[int, typer.Option(help="further attempts for a run whose worker died")] = 1,
    log: Annotated[str | None, typer.Option(help="loggers beside the results: wandb, tensorboard")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or a list such as cuda:0,cuda:1")] = "auto",
) -> None:
    """Train every run of an experiment that has no result yet, then draw accuracy against state."""
    raise typer.Exit(sweep(locals_to_options(locals())))


def locals_to_options(values: dict[str, Any]) -> dict[str, Any]:
    """Options as plain values: enums by name."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}


def sweep(options: dict[str, Any]) -> int:
    """What the command does; returns its exit code."""
    console, errors = make_console(), Console(stderr=True)
    try:
        devices = resolve_devices(options["device"])
        scale, why = plan.choose_scale(options["scale"], devices != ["cpu"])
        every = all_runs(options, scale)
        chosen = None if options["only"] is None else plan.choices(options["only"])
        words = plan.data_words(every)
        configs = every if chosen is None else plan.keep_only(every, chosen, words)
        directory = options["out"] or Path("results", f"{options['experiment'].stem}-{scale}")
        limits = {
            key: plan.parse_duration(options[key], f"--{key.replace('_', '-')}") for key in ("time_limit", "timeout")
        }
        if options["address"] is not None and options["engine"] != "ray":
            raise PlanError(f"--address {options['address']}: is that of a Ray cluster, and needs --engine ray")
        if options["retries"] < 0:
            raise PlanError(f"--retries {options['retries']}: must be 0 or more")
        setups, loggers = worker_setups(options, devices, directory), make_loggers(options["log"], directory)
        _say(console, why)
        if options["dry_run"]:
            console.print(plan_table(plan.make_plan(configs, devices[0], words=words)))
            return Exit.DONE
        with store.open_directory(directory), Signals() as stop:
            found = store.scan(directory)
            gc.freeze()  # nor will the collector go through what was read, as long as this process lives
            if options["best_seeds"] is not None:
                lost = () if options["rerun"] else found.failed
                configs = with_best_seeds(every, found.finished, options["best_seeds"], lost)
                configs = configs if chosen is None else plan.keep_only(configs, chosen, words)
            finished = () if options["rerun"] == "all" else found.finished
            runs = plan.make_plan(configs, devices[0], finished, words)
            runs = runs if chosen is None else plan.ranked(runs, chosen)
            points = {run.point_id for run in every}
            return execute(console, options, runs, found, directory, setups, loggers, limits, points, stop)
    except ValueError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
        return Exit.USAGE


def make_console() -> Console:
    """Standard output; into a file or a pipe, lines may be long."""
    return Console() if sys.stdout.isatty() else Console(width=400)


def all_runs(options: dict[str, Any], scale: str) -> list[RunConfig]:
    """The runs of the sweep, those that --only leaves out too. Raises ValueError."""
    for path in options["architecture_files"] or ():
        architectures.load_file(path)
    runs: list[RunConfig] = plan.load_sweep(options["experiment"], scale)
    if options["precision"] is not None:
        runs = plan.with_precision(runs, options["precision"])
    return runs if options["seeds"] is None else plan.with_seeds(runs, options["seeds"])


def with_best_seeds(
    runs: list[RunConfig], finished: dict[str, dict[str, Any]], count: int, failed: Collection[str] = ()
) -> list[RunConfig]:
    """The runs, and seeds 0 to count - 1 at the selected learning rate of every model that has no run left to do.

    Runs in `failed`, by id, will not be done: a rate that diverged is not the best one.
    """
    from zoology import results

    if count < 1:
        raise PlanError(f"--best-seeds {count}: must be at least 1")
    points: dict[str, list[RunConfig]] = {}
    for config in runs:
        points.setdefault(config.point_id, []).append(config)
    known, added = {config.run_id for config in runs}, []
    for configs in points.values():
        done = [config for config in configs if config.run_id in finished]
        if done and all(config.run_id in finished or config.run_id in failed for config in configs):
            best = results.select(results.from_records(finished[config.run_id] for config in done))["lr"].iloc[0]
            chosen = next(config for config in configs if config.train.lr == best)
            added += [chosen.model_copy(update={"seed": seed}) for seed in range(count)]
    return [*runs, *(config for config in added if config.run_id not in known)]


def worker_setups(options: dict[str, Any], devices: Sequence[str], directory: Path) -> list[Any]:
    """One per worker. Raises PlanError for a number of jobs that is not positive."""
    from zoology.runner.worker import Setup

    cores = num_cores()
    jobs = options["jobs"]
    if jobs is not None and jobs < 1:
        raise PlanError(f"--jobs {jobs}: must be at least 1")
    on_cpu = devices == ["cpu"]
    default = cores if on_cpu else max(1, min(JOBS_PER_GPU, cores // (CORES_PER_JOB * len(devices))))
    places = [device for _ in range(jobs or default) for device in devices]
    # Threads of several workers on the same cores wait for each other: 2 where there is 1 core cost 20 times the time.
    threads = 1 if on_cpu else max(1, cores // len(places))
    shared = {
        "threads": threads,
        "directory": str(directory.resolve()),
        "architectures": tuple(str(path.resolve()) for path in options["architecture_files"] or ()),
        "experiment": str(options["experiment"].resolve()),
        "git": git_commit(),
    }
    return [Setup(device=device, **shared) for device in places]


def execute(
    console: Console,
    options: dict[str, Any],
    runs: list[PlannedRun],
    found: store.Scan,
    directory: Path,
    setups: list[Any],
    loggers: list[Any],
    limits: dict[str, float | None],
    points: set[str],
    stop: Signals,
) -> int:
    """Run what is missing and report."""
    todo, left_failed = partition(runs, found, options["rerun"])
    for run_id, reason in found.broken.items():
        _say(console, f"result of run {run_id} {reason}: it will be done again", style="yellow")
    estimate, memory = known_from(runs, found.finished)
    setups = setups[: max(1, len(todo))]
    _say(console, overview(runs, todo, left_failed, setups, directory))
    # All of them before the first run starts: those that this sweep does not get to are missing then, not done.
    if options["rerun"] == "all" and (kept := store.set_aside(directory, [run.run_id for run in todo])):
        _say(console, f"{kept} earlier results are kept in <run id>/earlier until their runs are finished again")
    outcome = SweepOutcome(Exit.DONE, {}, {})
    view = progress.make_view(console)
    if todo:
        outcome = run_sweep(
            todo,
            make_engine(options, setups, limits["timeout"]),
            directory,
            LoggedView(view, loggers) if loggers else view,
            total=len(runs),
            done=len(runs) - len(todo),
            estimate=estimate,
            memory=memory,
            retries=options["retries"],
            time_limit=limits["time_limit"],
            stop=stop,
        )
    for planned in todo:
        found.finished.pop(planned.run_id, None)
    records = found.finished | outcome.records
    failed = {run.run_id: found.failed[run.run_id] for run in left_failed} | outcome.failures
    return report(console, runs, directory, records, failed, outcome.exit, points=points, redraw=bool(todo))


def known_from(runs: list[PlannedRun], finished: dict[str, dict[str, Any]]) -> tuple[plan.Estimate, MemoryEstimate]:
    """What the finished runs say about time and memory."""
    estimate, memory = plan.Estimate(), MemoryEstimate()
    for planned in runs:
        if (record := finished.get(planned.run_id)) is not None:
            estimate.observe(planned, record["wall_seconds"])
            if record["device"]["type"] == "cuda" and (peak := record["peak_memory_bytes"]):
                memory.observe(planned, RESERVED * peak, whole=True)
    return estimate, memory


def make_engine(options: dict[str, Any], setups: list[Any], timeout: float | None):
    """The engine that was asked for."""
    if options["engine"] == "ray":
        from zoology.engines.ray import RayEngine

        return RayEngine(setups, address=options["address"], jobs=options["jobs"] or 1, timeout=timeout)
    from zoology.engines.local import LocalEngine

    return LocalEngine(setups, timeout=timeout, memory=plan.device_memory({setup.device for setup in setups}))


def overview(runs, todo, left_failed, setups, directory) -> str:
    """One line about what is about to happen."""
    counts = plan.summary(runs)
    where: dict[str, int] = {}
    for setup in setups:
        where[setup.device] = where.get(setup.device, 0) + 1
    workers = ", ".join(f"{count} on {device}" for device, count in where.items())
    kept = f", {len(left_failed)} failed before (--rerun failed tries them again)" if left_failed else ""
    return (
        f"{counts['runs']} runs of {counts['points']} models of {counts['architectures']} architectures: "
        f"{len(todo)} to do{kept}; {workers} at once; results in {directory}"
    )


def report(
    console: Console,
    runs: list[PlannedRun],
    directory: Path,
    records: dict[str, dict[str, Any]],
    failed: dict[str, str],
    how: Exit,
    *,
    points: set[str],
    redraw: bool,
) -> int:
    """Table and plot of the models in `points`, failures, and how to go on."""
    from zoology import plot, results

    if how in (Exit.INTERRUPTED, Exit.TERMINATED):
        # Whoever stops a sweep wants the prompt, not a plot.
        return _how_to_go_on(console, runs, directory, records, "interrupted", how)
    shown = [record for record in records.values() if record["point_id"] in points]
    if other := len(records) - len(shown):
        _say(console, f"{other} finished runs in {directory} are of models outside this sweep: not in table and plot")
    if shown:
        frame = results.from_records(shown)
        for part in results.by_test_data(frame):
            selected = results.select(part)
            table, hidden = results_table(part, selected, console.width)
            console.print(table)
            if hidden:
                _say(console, f"left out for want of width, the figure has them: slices easier than these, {hidden}")
            if selected["lr_at_edge"].any():
                _say(console, "* the best learning rate lies at the edge of its grid: a better one may lie beyond")
        figures = sorted(directory.glob("tradeoff*.[ps][nv]g"))
        if redraw or not figures:
            try:
                figures = plot.save_all(frame, directory)
            except OSError as error:
                _say(console, f"the plot cannot be written: {error}", style="red")
        for path in figures:
            _say(console, str(path))
    labels = {run.run_id: run.label for run in runs}
    if failed:
        _say(console, f"{len(failed)} runs failed:", style="red")
        for run_id, message in failed.items():
            _say(console, f"  {labels[run_id]}: {message} ({directory / run_id / 'error.txt'})", style="red")
    if how is Exit.TIME_LIMIT:
        return _how_to_go_on(console, runs, directory, records, "the time limit was reached", how)
    return Exit.FAILURES if how is Exit.DONE and failed else how


def _how_to_go_on(console: Console, runs, directory: Path, records: dict[str, Any], why: str, how: Exit) -> int:
    finished = sum(run.run_id in records for run in runs)
    _say(console, f"{why}: {finished} of {len(runs)} runs are finished and kept; go on with\n  {command_line()}")
    _say(console, f"see what there is with\n  {shlex.join(['python', '-m', 'zoology.plot', str(directory)])}")
    return how


def command_line() -> str:
    """The command that goes on with this sweep: what `--rerun all` is to replace was set aside and is missing now."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--rerun=all"]
    for index in range(len(arguments) - 1, 0, -1):
        if arguments[index - 1 : index + 1] == ["--rerun", "all"]:
            del arguments[index - 1 : index + 1]
    return shlex.join(["python", "-m", "zoology.run", *arguments])


def plan_table(runs: list[PlannedRun]) -> Table:
    """What would run: one line per model."""
    table = Table(box=None, pad_edge=False, title=f"{len(runs)} runs", title_justify="left")
    for title in ("architecture", "model", "learning rates", "seeds", "epochs"):
        table.add_column(title, overflow="fold")
    for title in ("parameters", "state bytes", "share of work"):
        table.add_column(title, justify="right")
    points: dict[str, list[PlannedRun]] = {}
    for planned in runs:
        points.setdefault(planned.point_id, []).append(planned)
    total = sum(planned.cost for planned in runs)
    for group in points.values():
        first = group[0]
        table.add_row(
            first.config.architecture,
            first.point,
            " ".join(f"{rate:g}" for rate in sorted({planned.config.train.lr for planned in group})),
            " ".join(str(seed) for seed in sorted({planned.config.seed for planned in group})),
            str(first.config.train.epochs),
            f"{first.size.parameters:,}",
            f"{first.size.state_bytes[first.config.data.max_test_length]:,}",
            f"{sum(planned.cost for planned in group) / total:.1%}",
        )
    return table


def results_table(frame, selected, width: int) -> tuple[Table, int]:
    """Test accuracy by point, at the best learning rate; a star marks a rate at the edge of its grid.

    Of several slices the hardest are shown, as many as `width` columns of text hold; also returns how many are not.
    """
    from zoology import plot, results

    names = results.slice_names(frame)
    names = [] if len(names) == 1 else names
    rows = []
    for _, group in selected.groupby("point_id", sort=False):
        by_slice = group.set_index("slice")
        mean = by_slice.loc[results.MEAN]
        half = f" ±{mean['half']:.3f}" if mean["num_seeds"] > 1 else ""
        facts = (
            mean["architecture"],
            mean["point"],
            f"{mean['state_bytes']:,}",
            f"{mean['lr']:g}{'*' if mean['lr_at_edge'] else ' '}",
            f"{mean['accuracy']:.3f}{half}",
        )
        rows.append([*facts, *(f"{by_slice.loc[name, 'accuracy']:.3f}" for name in names)])
    slices = [plot.slice_title(frame, name).replace(", length ", "\nat ") for name in names]
    titles = ["architecture", "model", "state bytes", "lr", "accuracy", *slices]
    hidden = _num_hidden([titles, *rows], len(slices), width)
    first = len(titles) - len(slices)
    shown = [*range(first), *range(first + hidden, len(titles))]
    table = Table(box=None, pad_edge=False)
    for index in shown:
        wraps = titles[index] == "model"
        table.add_column(titles[index], justify="right" if index > 1 else "left", overflow="fold", no_wrap=not wraps)
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    return table, hidden


def _num_hidden(rows: list[list[str]], num_slices: int, width: int) -> int:
    """How many of a table's columns of slices, which are its last, must go for it to fit; one of them stays."""
    gap, model = 2, 24  # between columns; and for the second one, which wraps
    widths = [gap + max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows)]
    widths[1] = min(widths[1], gap + model)
    first = len(widths) - num_slices
    hidden = 0
    while hidden < num_slices - 1 and sum(widths) - gap - sum(widths[first : first + hidden]) > width:
        hidden += 1
    return hidden


def git_commit() -> dict[str, Any] | None:
    """Commit of the source tree this program runs from, and whether tracked files differ from it; None without git."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", "run.py")  # an installed package may lie in somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    return None


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return app(arguments, standalone_mode=True)


if __name__ == "__main__":
    main()
