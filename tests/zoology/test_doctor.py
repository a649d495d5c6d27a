"""The doctor's table: what auto uses, what is missing, refused or wrong, and the exit code."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import architectures
from architectures import backends, parity, registry
from zoology import doctor

CPU = torch.device("cpu")


def examine(*names, dtypes=(torch.float32,), **case):
    return doctor.examine(names, CPU, dtypes, d_model=8, seq_len=20, **case)


def statuses(report):
    return {(row.architecture, row.backend): row.status for row in report.rows}


def command(*arguments, jobs=1):
    case = ["--device", "cpu", "--d-model", "8", "--seq-len", "20", "--jobs", str(jobs)]
    return CliRunner().invoke(doctor.app, [*case, *arguments])


DEADLY = """
import os
import torch
from architectures import SequenceMixer, backends, register
from typing import NamedTuple

backends.LIBRARIES["deadly"] = None


class Nothing(NamedTuple):
    pass


@register("mortal", paper="none")
class Mortal(SequenceMixer):
    backends = ("deadly", "reference")

    def __init__(self, d_model: int, *, backend: str = "auto"):
        super().__init__(d_model, backend=backend)
        self.scale = torch.nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        if self.backend_for(x) == "deadly":
            os.abort()
        return x * self.scale

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        return Nothing()

    def step(self, x, state):
        return self(x), state
"""


def test_one_row_for_every_backend_with_what_became_of_it(fake_backends):
    report = examine("fake_right", "fake_absent", "fake_refusing", "fake_wrong_gradient", "fake_wrong_step")
    assert statuses(report) == {
        ("fake_right", "right"): "used",
        ("fake_right", "reference"): "available",
        ("fake_absent", "absent"): "missing",
        ("fake_absent", "reference"): "used",
        ("fake_refusing", "refusing"): "refused",
        ("fake_refusing", "reference"): "used",
        ("fake_wrong_gradient", "wrong-gradient"): "failed",
        ("fake_wrong_gradient", "reference"): "used",
        ("fake_wrong_step", "wrong-step"): "failed",
        ("fake_wrong_step", "reference"): "used",
    }
    why = {row.backend: row.reason for row in report.rows}
    assert why["absent"] == "no_such_module not installed: pip install 'zoology[no-such-extra]'"
    assert why["refusing"] == "d_model=8; allowed: multiples of 64"
    assert "gradient error of logit 1.0e-02" in why["wrong-gradient"]
    assert why["wrong-step"].startswith("decoding: output error")
    assert [row.backend for row in report.failed] == ["wrong-gradient", "wrong-step"]
    assert report.advice == [
        "absent (for fake_absent): no_such_module not installed: pip install 'zoology[no-such-extra]'"
    ]


def test_the_table_says_what_auto_does(fake_backends):
    for name in ("fake_all", "attention", "fake_raising"):
        mixer = architectures.create(name, d_model=8)
        used = [row.backend for row in examine(name).rows if row.status == "used"]
        # The doctor tries both forms of a backend; auto resolves training and decoding apart.
        assert used == [mixer.resolve_backend(CPU, torch.float32, 1)]


def test_errors_are_those_of_the_parity_check(fake_backends):
    row = examine("fake_right").rows[0]
    mixer = architectures.create("fake_right", d_model=8)
    trained = parity.check(mixer, "right", CPU, torch.float32, 20)
    decoded = parity.check(mixer, "right", CPU, torch.float32, 1)
    assert (row.output_error, row.output_allowed) == (trained.output, trained.output_allowed)
    assert (row.gradient_error, row.gradient_allowed) == (trained.gradient, trained.gradient_allowed)
    assert (row.decode_error, row.decode_allowed) == (decoded.output, decoded.output_allowed)
    reference = examine("fake_right").rows[1]
    assert 0 < reference.output_error < 1e-6
    assert 0 < reference.gradient_error < 1e-5
    assert reference.output_allowed is None


def test_what_fails_behind_the_one_that_is_used_harms_nobody(fake_backends, monkeypatch):
    monkeypatch.setattr(fake_backends.All, "backends", ("right", "wrong-gradient", "reference"))
    report = examine("fake_all")
    assert [row.status for row in report.rows] == ["used", "refused", "available"]
    assert "parity" in report.rows[1].reason or "gradient error" in report.rows[1].reason
    assert report.failed == []


@pytest.mark.parametrize(("slow", "status"), [("right", "available"), ("wrong-gradient", "refused")])
def test_what_auto_leaves_to_others_is_tried_all_the_same(fake_backends, monkeypatch, slow, status):
    def unsupported(mixer, backend, **case):
        return "slow here" if backend == slow and mixer.backend == "auto" else None

    monkeypatch.setattr(fake_backends.All, "backends", (slow, "wrong-step", "reference"))
    monkeypatch.setattr(fake_backends.All, "unsupported", unsupported)
    report = examine("fake_all")
    first = report.rows[0]
    assert [row.status for row in report.rows] == [status, "failed", "used"]
    assert first.reason.startswith("auto takes another: slow here")
    assert first.output_error > 0
    assert [row.backend for row in report.failed] == ["wrong-step"]


@pytest.mark.parametrize(
    ("only", "code"),
    [
        ("fake_right", 0),
        ("fake_absent,fake_refusing", 0),
        ("fake_wrong_gradient", 1),
        ("fake_wrong_step", 1),
        ("fake_right,fake_raising", 1),
    ],
)
def test_exit_code(fake_backends, only, code):
    result = command("--only", only, "--dtypes", "float32")
    assert result.exit_code == code, result.output
    assert ("FAILED" in result.output) == bool(code)


def test_json_holds_what_the_table_shows(fake_backends):
    result = command("--only", "fake_all,fake_right", "--json")
    told = json.loads(result.stdout, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert result.exit_code == 1
    assert told["passed"] is False
    assert told["case"] == {"d_model": 8, "seq_len": 20}
    assert {row["dtype"] for row in told["rows"]} == {"float32", "bfloat16"}
    found = {(r["architecture"], r["dtype"], r["backend"]): r for r in told["rows"]}
    assert found["fake_all", "float32", "raising"]["status"] == "failed"
    assert found["fake_all", "float32", "raising"]["output_error"] is None
    assert found["fake_all", "float32", "wrong-gradient"]["gradient_of"] == "logit"
    assert found["fake_right", "bfloat16", "right"]["status"] == "used"
    assert told["machine"]["versions"]["torch"] == backends.installed("torch")
    assert set(told["machine"]["versions"]) >= {"triton", "flash-attn", "mamba-ssm", "causal-conv1d", "fla-core"}
    assert json.loads(command("--only", "fake_right", "--json").stdout)["passed"] is True


def test_the_table_is_readable(fake_backends):
    text = command("--only", "fake_wrong_gradient,fake_absent", "--dtypes", "float32").stdout
    assert "Could be installed:" in text
    assert "pip install 'zoology[no-such-extra]'" in text
    header = next(line for line in text.splitlines() if "architecture" in line)
    assert header.replace("┃", " ").split() == [
        "architecture", "dtype", "backend", "status", "output", "gradient", "decoding", "why",
    ]  # fmt: skip
    line = next(line for line in text.splitlines() if "wrong-gradient" in line and "│" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:4] == ["fake_wrong_gradient", "float32", "wrong-gradient", "failed"]
    assert cells[5].startswith("1e-02 (")


def test_a_backend_that_kills_its_process_has_failed_and_the_others_never_notice(tmp_path, monkeypatch):
    path = tmp_path / "mortal.py"
    path.write_text(DEADLY)
    monkeypatch.setattr(backends, "LIBRARIES", dict(backends.LIBRARIES))
    try:
        arguments = ("--only", "mortal,attention", "--dtypes", "float32", "--architectures", str(path))
        result = command(*arguments, "--json", jobs=2)
        alone = command(*arguments[:1], "attention", *arguments[2:4], "--json")
    finally:
        registry._entries.pop("mortal")
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    found = {(row["architecture"], row["backend"]): (row["status"], row["reason"]) for row in told["rows"]}
    assert found["mortal", "deadly"] == ("failed", "its process died")
    assert found["mortal", "reference"] == ("used", "")
    # As without worker processes, in the same order; how a process divides its sums among threads is its own affair.
    said = ("architecture", "dtype", "backend", "status", "reason")
    here, beside = (
        [[row[key] for key in said] for row in rows] for rows in (told["rows"], json.loads(alone.stdout)["rows"])
    )
    assert [row for row in here if row[0] == "attention"] == beside
    assert [row["architecture"] for row in told["rows"][:2]] == ["mortal", "mortal"]
    assert [line.partition("]")[0] for line in result.stderr.splitlines() if line.startswith("[")] == [
        f"[{done}/5" for done in range(1, 6)
    ]


@pytest.mark.parametrize("jobs", [1, 2])
def test_stopped_early_it_tells_what_it_knows(tmp_path, jobs):
    """What auto would use is not known where the faster backend was not tried."""
    path = tmp_path / "endless.py"
    path.write_text(DEADLY.replace("os.abort()", "import time; time.sleep(600)"))
    files = ["--architectures", str(path), "--only", "base_conv,mortal", "--dtypes", "float32"]
    case = ["--device", "cpu", "--d-model", "8", "--seq-len", "20", "--jobs", str(jobs)]
    command = [sys.executable, "-m", "zoology.doctor", "--json", *files, *case]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    tried = 1 if jobs == 1 else 2  # alone it does not get past the endless one
    for _ in range(tried):
        assert started.stderr.readline().startswith("[")
    time.sleep(0.5)
    started.send_signal(signal.SIGTERM)
    told = json.loads(started.communicate(timeout=60)[0])
    assert started.returncode == 130
    assert told["passed"] is False
    found = {(row["architecture"], row["backend"]): row["status"] for row in told["rows"]}
    assert found["base_conv", "reference"] == "used"
    assert found["mortal", "deadly"] == "untried"
    assert found["mortal", "reference"] == ("untried" if jobs == 1 else "available")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--only", "atention"], "unknown architecture 'atention': did you mean 'attention'"),
        (["--only", ","], "--only ,: names no architecture; there are attention, base_conv"),
        (["--dtypes", "float8"], "--dtypes float8: must be one of float32, bfloat16"),
        (["--architectures", "none.py"], "does not exist"),
        (["--seq-len", "1"], "--seq-len 1: must be at least 2"),
        (["--device", "gpu"], "--device gpu: no device of torch; allowed are auto, cpu, cuda"),
        (["--device", "hpu"], "--device hpu: this torch"),
    ],
)
def test_bad_input_is_explained(arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_device_that_is_not_there_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    result = CliRunner().invoke(doctor.app, ["--device", "cuda:2"])
    assert result.exit_code == 2
    assert "--device cuda:2: torch sees 2 CUDA devices here" in result.stderr


def test_every_architecture_is_well_here():
    """All of the zoo, small: nothing that auto uses on this machine is wrong."""
    report = examine(*architectures.names(), dtypes=(torch.float32,))
    assert report.failed == []
    used = [row.architecture for row in report.rows if row.status == "used"]
    assert used == architectures.names()


def test_the_records_of_a_gpu_have_every_backend_and_the_readme_their_number():
    """One run was stopped with two rows to go: the other file has these."""
    root = Path(__file__).parents[2]
    rows = {}
    for name in ("h200.json", "h200_gla_rwkv6.json"):
        record = json.loads((root / "experiments" / "results" / "doctor" / name).read_text())
        rows |= {(row["architecture"], row["dtype"], row["backend"]): row for row in record["rows"]}
    assert sorted(rows) == sorted(
        (name, dtype, backend)
        for name in architectures.names()
        for dtype in ("float32", "bfloat16")
        for backend in registry.get(name).cls.backends
    )
    assert {row["status"] for row in rows.values()} <= {"used", "available", "refused"}
    used = [group[:2] for group, row in rows.items() if row["status"] == "used"]
    assert len(used) == len(set(used)) == 2 * len(architectures.names())
    measured = [row for row in rows.values() if row["output_allowed"] is not None]
    assert all(row["output_error"] <= row["output_allowed"] for row in measured)
    assert all(row["gradient_error"] <= row["gradient_allowed"] for row in measured)
    assert f"{len(rows)} rows, none failed" in (root / "README.md").read_text()


@pytest.mark.gpu
def test_gpu_nothing_that_auto_uses_is_wrong():
    report = doctor.examine(architectures.names(), torch.device("cuda"), [torch.float32, torch.bfloat16], jobs=8)
    assert [str(row) for row in report.failed] == []
