"""What this machine can run: python -m zoology.doctor.

One row for every architecture, precision and backend: whether it is used by `auto`, available, missing, refused, or
failed its parity check, with its errors against the float64 reference. Exits with 1 if a backend failed that `auto`
would have used.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import architectures
from architectures import backends, parity
from architectures.mixer import SequenceMixer

Status = Literal["used", "available", "missing", "refused", "failed"]
STYLES = {"used": "bold green", "available": "green", "missing": "yellow", "refused": "dim", "failed": "bold red"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

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


def examine(
    names: Sequence[str], device: torch.device, dtypes: Sequence[torch.dtype], *, d_model: int = 64, seq_len: int = 256
) -> Report:
    """Try every backend of every named architecture, with default options at this width and length."""
    rows = []
    for name in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mixer = architectures.create(name, d_model=d_model).to(device)
        for dtype in dtypes:
            rows += examine_mixer(name, mixer, device, dtype, seq_len)
    absent = {row.backend: row for row in rows if row.status == "missing"}
    advice = []
    for backend, row in absent.items():
        used_by = sorted({row.architecture for row in rows if row.backend == backend})
        advice.append(f"{backend} (for {', '.join(used_by)}): {row.reason}")
    return Report(machine(device), {"d_model": d_model, "seq_len": seq_len}, rows, advice)


def examine_mixer(name: str, mixer: SequenceMixer, device: torch.device, dtype: torch.dtype, seq_len: int) -> list[Row]:
    """A row for every backend of one mixer, fastest first. Those after the one that `auto` takes are tried as well."""
    rows: list[Row] = []
    taken = False
    for backend in mixer.backends:
        row = Row(name, _short(dtype), backend, "available")
        reason = backends.refusal(mixer, backend, device, dtype, seq_len)
        if reason is not None:
            status = "missing" if reason == backends.missing(backend) else "refused"
            rows.append(row._replace(status=status, reason=reason))
            continue
        row, passed = _measured(row, mixer, device, dtype, seq_len)
        if not passed:
            # Once a faster one is taken a failure costs nobody anything, but it is still no backend to name.
            status = "refused" if taken else "failed"
        else:
            status = "available" if taken else "used"
            taken = True
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
        title=f"Backends at d_model {case['d_model']}, length {case['seq_len']}; errors (allowed) against float64",
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


def _figure(error: float | None, allowed: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.0e}" if allowed is None else f"{error:.0e} ({allowed:.0e})"


def _number(value: float) -> float | None:
    """JSON has no NaN, which is what a backend that raised is off by."""
    return value if value == value else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_device(text: str) -> torch.device:
    """The device of `--device`: "auto" is the GPU if there is one. Raises ValueError if there is none such."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(text)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {text}: torch sees no CUDA device here")
    return device


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    only: Annotated[str | None, typer.Option(help="architectures to try, separated by commas")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtypes: Annotated[str | None, typer.Option(help=f"from {', '.join(DTYPES)}; default: float32,bfloat16")] = None,
    d_model: Annotated[int, typer.Option(help="width to try")] = 64,
    seq_len: Annotated[int, typer.Option(help="length to try")] = 256,
    architecture_files: Annotated[
        list[Path] | None, typer.Option("--architectures", help="file that registers architectures; can be repeated")
    ] = None,
) -> None:
    """Try every backend of every architecture on this machine, outputs and gradients against the float64 reference."""
    try:
        for path in architecture_files or []:
            architectures.load_file(path)
        names = only.split(",") if only else architectures.names()
        wanted = dtypes.split(",") if dtypes else ["float32", "bfloat16"]
        for name in wanted:
            if name not in DTYPES:
                raise ValueError(f"--dtypes {name}: must be one of {', '.join(DTYPES)}")
        chosen = [DTYPES[name] for name in wanted]
        report = examine(names, choose_device(device), chosen, d_model=d_model, seq_len=seq_len)
    except (ValueError, ImportError) as error:
        print(f"zoology.doctor: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        rows = [row._asdict() for row in report.rows]
        print(json.dumps({**report._asdict(), "rows": rows, "passed": not report.failed}, indent=1))
    else:
        # A table that is cut off at 80 columns, as of a log file, says nothing.
        console = Console()
        render(report, console if console.is_terminal else Console(width=160))
    raise typer.Exit(1 if report.failed else 0)


def main() -> None:
    """The command line."""
    app(prog_name="python -m zoology.doctor")


if __name__ == "__main__":
    main()
