"""Precisions side by side: the experiment's runs, and the table from their records."""

import subprocess
import sys
from pathlib import Path

import pytest

from zoology import precision_table, results
from zoology.runner import plan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize(
    ("scale", "widths", "precisions"),
    [
        ("smoke", {"attention": 32, "sliding_window": 32, "based": 32}, ("fp32", "bf16")),
        ("laptop", {"attention": 64, "based": 64, "deltanet": 64}, ("fp32", "bf16")),
        ("paper", {"attention": 128, "based": 64, "deltanet": 64}, ("fp32", "tf32", "bf16")),
    ],
)
def test_the_experiment_has_every_model_in_every_precision_with_three_seeds(scale, widths, precisions):
    runs = plan.load_sweep(EXPERIMENTS / "precision.py", scale)
    whole = {run.run_id for run in plan.load_sweep(EXPERIMENTS / "mqar_sweep.py", scale)}
    assert sorted((run.architecture, run.train.precision, run.seed) for run in runs) == sorted(
        (name, precision, seed) for name in widths for precision in precisions for seed in range(3)
    )
    assert {(run.architecture, run.model.d_model) for run in runs} == set(widths.items())
    assert len({run.train.lr for run in runs}) == 1
    assert {run.run_id for run in runs} & whole == {
        run.run_id for run in runs if (run.train.precision, run.seed) == ("fp32", 0)
    }


def test_the_paper_scale_reports_the_hard_slices():
    run = plan.load_sweep(EXPERIMENTS / "precision.py", "paper")[0]
    assert run.train.epochs == 32
    assert [(part.task.seq_len, part.task.num_kv_pairs) for part in run.data.test[-2:]] == [(512, 128), (1024, 256)]


@pytest.fixture
def records(make_run, make_record):
    """Two slices; in tf32 as in fp32, in bf16 behind on the long one, without a spread that would explain it."""
    accuracies = {"fp32": [0.90, 0.94, 0.92], "tf32": [0.91, 0.89, 0.90], "bf16": [0.80, 0.82, 0.81]}
    return [
        make_record(
            run := make_run(seed=seed, precision=precision), {"short": 1.0, "long": accuracy}, seconds=20.0 * run.seed
        )
        | {"precision": precision, "device_share": 0.5}
        for precision, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_each_precision_has_mean_and_range_and_is_held_against_fp32(records):
    table = precision_table.by_precision(results.from_records(records))
    assert len(table) == 3 * 3
    rows = {(row["precision"], row["slice"]): row for _, row in table.iterrows()}
    exact, tf32, bf16 = (rows[precision, "long"] for precision in ("fp32", "tf32", "bf16"))
    assert (exact["accuracy"], exact["worst"], exact["best"], exact["num_seeds"]) == pytest.approx((0.92, 0.9, 0.94, 3))
    assert exact["behind"] == 0
    assert tf32["behind"] == pytest.approx(0.02)
    assert tf32["within"]  # seeds of fp32 are .04 apart
    assert bf16["behind"] == pytest.approx(0.11)
    assert not bf16["within"]
    assert rows["bf16", "short"]["within"]
    assert rows["bf16", "mean"]["accuracy"] == pytest.approx((1 + 0.81) / 2)
    assert rows["bf16", "mean"]["train_seconds"] == pytest.approx(10.0)


def test_a_precision_that_is_ahead_of_fp32_is_not_behind_it(make_run, make_record):
    """By more than seeds differ, of which there is one each."""
    accuracies = {"fp32": 0.8, "bf16": 0.9}
    records = [
        make_record(make_run(precision=name), {"short": 1.0, "long": value}) | {"precision": name}
        for name, value in accuracies.items()
    ]
    table = precision_table.by_precision(results.from_records(records))
    ahead = table[(table["precision"] == "bf16") & (table["slice"] == "long")].iloc[0]
    assert ahead["behind"] == pytest.approx(-0.1)
    assert ahead["within"]


def test_the_table_is_printed_from_a_directory(records, write_records, capsys, tmp_path):
    directory = write_records(records)
    assert precision_table.main([str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | lr | precision | seeds | mean of slices | short | long | training, s |"
    assert [line.split("|")[3].strip() for line in lines[2:5]] == ["fp32", "tf32", "bf16"]
    assert "| 0.920 (0.900 to 0.940) |" in lines[2]
    assert "| 0.810 (0.800 to 0.820) \\* | 10 |" in lines[4]
    assert precision_table.main([str(tmp_path / "absent")]) == 2
    assert "absent: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        precision_table.main([])
    assert ended.value.code == 2


def test_a_reader_that_stops_early_is_no_error(records, write_records):
    command = [sys.executable, "-m", "zoology.precision_table", str(write_records(records))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
