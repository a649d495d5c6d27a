"""What this machine can run: python -m zoology.doctor.

One row for every architecture, precision and backend: whether it is used by `auto`, available, missing, refused, or
failed its parity check, with its errors against the float64 reference. Exits with 1 if a backend failed that `auto`
would have used. Ctrl-C or SIGTERM end it early, with what is known by then and exit code 130.

The first time on a machine nearly all of its time goes into compiling the candidates that libraries tune their kernels
over, on all cores; Triton keeps them, and what it chose, for training as well.
"""

from __future__ import annotations

import faulthandler
import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import architectures
from architectures import backends, parity
from architectures.mixer import SequenceMixer
from zoology.devices import choose_device, num_cores
from zoology.engines.isolated import Died, run_isolated

Status = Literal["used", "available", "missing", "refused", "failed", "untried"]
STYLES = {
    "used": "bold green",
    "available": "green",
    "missing": "yellow",
    "refused": "dim",
    "failed": "bold red",
    "untried": "yellow",
}
STOPPED = 130
"""Exit code of an examination that was ended early."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
CASE_SECONDS = 1800.0
"""After this time a backend hangs: the slowest compiles hundreds of candidates first, many minutes of one core."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Row(NamedTuple):
    """One backend of one architecture in one precision; errors are relative, None where nothing ran."""

    architecture: str
    dtype: str
    backend: str
    status: Status
    output_error: float | None = None
    output_allowed: float | None = None
    gradient_error: float | None = None
    gradient_allowed: float | None = None
    gradient_of: str = ""
    decode_error: float | None = None
    decode_allowed: float | None = None
    reason: str = ""


class Case(NamedTuple):
    """What is tried at a time."""

    architecture: str
    dtype: torch.dtype
    backend: str
    device: str
    d_model: int
    seq_len: int


class Tried(NamedTuple):
    """The row of one backend, whether it passed (None: there was nothing to try), and whether `auto` would ask it."""

    row: Row
    passed: bool | None
    asked: bool = True


class Report(NamedTuple):
    """What `examine` found: the machine, a row for every backend, and what could be installed."""

    machine: dict[str, Any]
    case: dict[str, int]
    rows: list[Row]
    advice: list[str]

    @property
    def failed(self) -> list[Row]:
        """Backends that `auto` would use if they were right."""
        return [row for row in self.rows if row.status == "failed"]

    @property
    def untried(self) -> list[Row]:
        """Backends that were left when the examination was stopped."""
        return [row for row in self.rows if row.status == "untried"]


def examine(
    names: Sequence[str],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    d_model: int = 64,
    seq_len: int = 256,
    jobs: int = 1,
    files: Sequence[Path] = (),
    on_tried: Callable[[Row, int, int], Any] = lambda row, done, total: None,
) -> Report:
    """Try every backend of every named architecture, with default options at this width and length.

    With `jobs` above 1 each is tried in one of as many worker processes, which register the architectures of `files`:
    a backend that kills its process, leaves the GPU unusable or hangs has failed, and the others never notice.
    `on_tried` is called with the row of a backend, how many have been tried, and how many there are.
    A KeyboardInterrupt ends it with the rows there are; the others are "untried".
    """
    cases = []
    for name in names:
        with torch.device("meta"):
            listed = architectures.create(name, d_model=d_model).backends
        cases += [Case(name, dtype, backend, str(device), d_model, seq_len) for dtype in dtypes for backend in listed]
    found: dict[Case, Tried] = {}
    with closing(_try_all(cases, jobs, files)) as tries, suppress(KeyboardInterrupt):
        for case, tried in tries:
            found[case] = tried
            on_tried(tried.row, len(found), len(cases))
    rows = _judged(found.get(case) or Tried(_row(case, "untried"), None) for case in cases)
    absent = {row.backend: row for row in rows if row.status == "missing"}
    advice = []
    for backend, row in absent.items():
        used_by = sorted({row.architecture for row in rows if row.backend == backend})
        advice.append(f"{backend} (for {', '.join(used_by)}): {row.reason}")
    return Report(machine(device), {"d_model": d_model, "seq_len": seq_len}, rows, advice)


def _try_all(cases: list[Case], jobs: int, files: Sequence[Path]) -> Iterator[tuple[Case, Tried]]:
    if jobs == 1:
        yield from ((case, try_backend(case)) for case in cases)
        return
    # What compiles and tunes most kernels starts first; references need no compiler and fill up the end.
    tuned = ("fla", "mamba-ssm")
    order = sorted(cases, key=lambda c: (c.backend == "reference", c.backend not in tuned or c.dtype.itemsize > 2))
    threads = max(1, num_cores() // jobs)
    calls = run_isolated(
        try_backend,
        [(case,) for case in order],
        jobs=jobs,
        initializer=_start_worker,
        initargs=(threads, tuple(map(str, files))),
        timeout=CASE_SECONDS,
    )
    for index, answer in calls:
        case = order[index]
        if isinstance(answer, Died):
            answer = Tried(_row(case, "failed")._replace(reason=answer.reason), False)
        yield case, answer


def _start_worker(threads: int, files: Sequence[str]) -> None:
    faulthandler.enable()
    torch.set_num_threads(threads)
    for path in files:
        architectures.load_file(path)


def try_backend(case: Case) -> Tried:
    """What became of one backend, tried as `auto` would run it, or as one that is named where `auto` leaves it out."""
    device = torch.device(case.device)
    mixer = _mixer(case.architecture, case.d_model, device)
    row = _row(case, "available")
    # `auto` may leave to others what a backend can do.
    passed_over = backends.refusal(mixer, case.backend, device, case.dtype, case.seq_len)
    reason = passed_over
    if passed_over is not None:
        mixer.backend = case.backend
        reason = backends.refusal(mixer, case.backend, device, case.dtype, case.seq_len)
    if reason is not None:
        status = "missing" if reason == backends.missing(case.backend) else "refused"
        return Tried(row._replace(status=status, reason=reason), None)
    try:
        row, passed = _measured(row, mixer, device, case.dtype, case.seq_len)
    except Exception as error:
        row, passed = row._replace(reason=f"{type(error).__name__}: {error}"), False
    if passed_over is not None:
        row = row._replace(reason="; ".join(filter(None, [f"auto takes another: {passed_over}", row.reason])))
    return Tried(row, passed, passed_over is None)


def _row(case: Case, status: Status) -> Row:
    return Row(case.architecture, _short(case.dtype), case.backend, status)


def _mixer(name: str, d_model: int, device: torch.device) -> SequenceMixer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return architectures.create(name, d_model=d_model).to(device)


def _judged(found: Iterable[Tried]) -> list[Row]:
    """Statuses of rows that come fastest first: `auto` uses the first of an architecture and dtype that passed."""
    rows, taken = [], set()
    for row, passed, asked in found:
        group = (row.architecture, row.dtype)
        wanted = asked and group not in taken
        if passed is None:
            status = row.status
            if wanted and status == "untried":
                taken.add(group)  # what `auto` would use is not known
        elif not passed:
            # What nobody asks for costs nobody anything when it fails, but it is still no backend to name.
            status = "failed" if wanted else "refused"
        else:
            status = "used" if wanted else "available"
            if wanted:
                taken.add(group)
        rows.append(row._replace(status=status))
    return rows


def _measured(
    row: Row, mixer: SequenceMixer, device: torch.device, dtype: torch.dtype, seq_len: int
) -> tuple[Row, bool]:
    if row.backend == "reference":
        found = parity.errors(mixer, row.backend, device, dtype, seq_len)
        worst = max(found.gradients, key=found.gradients.get, default="")
        decoded = parity.errors(mixer, row.backend, device, dtype, 1).output
        row = row._replace(output_error=found.output, gradient_error=found.gradients.get(worst), gradient_of=worst)
        return row._replace(decode_error=decoded), True
    trained = parity.check(mixer, row.backend, device, dtype, seq_len)
    row = row._replace(
        output_error=_number(trained.output),
        output_allowed=_number(trained.output_allowed),
        gradient_error=_number(trained.gradient),
        gradient_allowed=_number(trained.gradient_allowed),
        gradient_of=trained.gradient_name,
        reason="" if trained.passed else str(trained),
    )
    if reason := backends.refusal(mixer, row.backend, device, dtype, 1):
        return row._replace(reason=row.reason or f"decodes with another backend: {reason}"), trained.passed
    decoded = parity.check(mixer, row.backend, device, dtype, 1)
    row = row._replace(decode_error=_number(decoded.output), decode_allowed=_number(decoded.output_allowed))
    if not decoded.passed:
        row = row._replace(reason="; ".join(filter(None, [row.reason, f"decoding: {decoded}"])))
    return row, trained.passed and decoded.passed


def machine(device: torch.device) -> dict[str, Any]:
    """Device, and the versions of whatever a backend may need (None: not installed)."""
    distributions = ["torch"]
    for library in backends.LIBRARIES.values():
        distributions += library.distributions if library else ()
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {name: backends.installed(name) for name in dict.fromkeys(distributions)},
    }


def render(report: Report, console: Console) -> None:
    """The report as tables for people."""
    facts = report.machine
    versions = ", ".join(f"{name} {version or '-'}" for name, version in facts["versions"].items())
    capability = f" (compute capability {facts['compute_capability']})" if facts["compute_capability"] else ""
    console.print(f"{facts['device']}{capability}, CUDA {facts['cuda'] or '-'}, Python {facts['python']}", markup=False)
    console.print(versions, markup=False, highlight=False)
    case = report.case
    table = Table(
        title=f"Backends at d_model {case['d_model']}, length {case['seq_len']}; errors (allowed) against float64, "
        f"at {min(case['seq_len'], parity.LENGTH)} tokens",
        title_justify="left",
    )
    for column in ("architecture", "dtype", "backend", "status", "output", "gradient", "decoding"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", overflow="fold")
    before = None
    for row in report.rows:
        group = (row.architecture, row.dtype)
        table.add_row(
            "" if before and row.architecture == before[0] else row.architecture,
            "" if group == before else row.dtype,
            row.backend,
            f"[{STYLES[row.status]}]{row.status}[/]",
            _figure(row.output_error, row.output_allowed),
            _figure(row.gradient_error, row.gradient_allowed),
            _figure(row.decode_error, row.decode_allowed),
            escape(row.reason),
        )
        before = group
    console.print(table)
    if report.advice:
        console.print("Could be installed:", *(f"  {line}" for line in report.advice), sep="\n", markup=False)
    for row in report.failed:
        line = f"FAILED {row.architecture} {row.dtype} {row.backend}: {row.reason}"
        console.print(line, style="bold red", markup=False, soft_wrap=True)
    if report.untried:
        console.print(f"Stopped before {len(report.untried)} of {len(report.rows)} were tried.", style="bold yellow")


def _figure(error: float | None, allowed: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.0e}" if allowed is None else f"{error:.0e} ({allowed:.0e})"


def _number(value: float) -> float | None:
    """JSON has no NaN, which is what a backend that raised is off by."""
    return value if value == value else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _progress() -> Iterator[Callable[[Row, int, int], None]]:
    """What to call with each row that was tried: a bar on a terminal, lines elsewhere, on standard error."""
    console, started = Console(stderr=True), time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        def on_tried(row: Row, done: int, total: int) -> None:
            what = f"{row.architecture} {row.dtype} {row.backend}"
            if console.is_terminal:
                bar.update(task, completed=done, total=total, description=what)
            else:
                print(f"[{done}/{total}] {time.monotonic() - started:.0f} s: {what}", file=sys.stderr, flush=True)

        yield on_tried


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    only: Annotated[str | None, typer.Option(help="architectures to try, separated by commas")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtypes: Annotated[str | None, typer.Option(help=f"from {', '.join(DTYPES)}; default: float32,bfloat16")] = None,
    d_model: Annotated[int, typer.Option(help="width to try")] = 64,
    seq_len: Annotated[int, typer.Option(help="length to try")] = 256,
    jobs: Annotated[
        int | None, typer.Option(help="processes; default: one per core, 2 to 16; 1: all in this process")
    ] = None,
    architecture_files: Annotated[
        list[Path] | None, typer.Option("--architectures", help="file that registers architectures; can be repeated")
    ] = None,
) -> None:
    """Try every backend of every architecture on this machine, outputs and gradients against the float64 reference."""
    try:
        for path in architecture_files or []:
            architectures.load_file(path)
        names = architectures.names() if only is None else [name for name in only.split(",") if name]
        if not names:
            raise ValueError(f"--only {only}: names no architecture; there are {', '.join(architectures.names())}")
        wanted = dtypes.split(",") if dtypes else ["float32", "bfloat16"]
        for name in wanted:
            if name not in DTYPES:
                raise ValueError(f"--dtypes {name}: must be one of {', '.join(DTYPES)}")
        chosen = [DTYPES[name] for name in wanted]
        if jobs is not None and jobs < 1:
            raise ValueError(f"--jobs {jobs}: must be at least 1")
        if seq_len < 2:
            raise ValueError(f"--seq-len {seq_len}: must be at least 2")
        with _sigterm_like_ctrl_c(), _progress() as on_tried:
            report = examine(
                names,
                choose_device(device),
                chosen,
                d_model=d_model,
                seq_len=seq_len,
                jobs=jobs or min(max(2, num_cores()), 16),
                files=architecture_files or (),
                on_tried=on_tried,
            )
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        rows = [row._asdict() for row in report.rows]
        print(json.dumps({**report._asdict(), "rows": rows, "passed": not (report.failed or report.untried)}, indent=1))
    else:
        # A table that is cut off at 80 columns, as of a log file, says nothing.
        console = Console()
        render(report, console if console.is_terminal else Console(width=160))
    raise typer.Exit(1 if report.failed else STOPPED if report.untried else 0)


def main() -> None:
    """The command line."""
    app(prog_name="python -m zoology.doctor")


if __name__ == "__main__":
    main()
