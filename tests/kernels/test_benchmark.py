"""The benchmark's records, without a device: what is refused, printed and drawn."""

import json
from pathlib import Path

import pytest
import torch

from kernels import benchmark

LIMITS = {"copy_tb_per_s": 2.0, "bf16_tflop_per_s": 100.0}


def case(check):
    shape = {"B": 16, "T": 2048}
    return benchmark.Case(
        "taylor_linear_attention", "ours", "forward", shape, torch.bfloat16, 10**9, 10**10, lambda: None, check
    )


def test_a_wrong_implementation_gets_no_row():
    record = benchmark.measure(case(lambda: 0.5), LIMITS)
    assert "ms" not in record
    assert record["refused"] == "error 5.0e-01 in the parity check"
    assert benchmark.line(record).endswith("refused: error 5.0e-01 in the parity check")
    assert "refused" in benchmark.measure(case(lambda: float("nan")), LIMITS)


def test_a_peer_that_breaks_is_named():
    def broken():
        raise RuntimeError("no kernel for this shape")

    assert benchmark.measure(case(broken), LIMITS)["refused"] == "RuntimeError: no kernel for this shape"


def test_rates_and_the_share_of_the_limit(monkeypatch):
    """1 GB at 2 TB/s is .5 ms, 10 GFLOP at 100 TFLOP/s is .1 ms: the larger one is the limit."""
    monkeypatch.setattr(benchmark, "quantiles", lambda run: (2.0, 1.9, 2.2))
    record = benchmark.measure(case(lambda: 1e-3), LIMITS)
    assert record["limit_ms"] == pytest.approx(0.5)
    assert record["share_of_limit"] == pytest.approx(0.25)
    assert record["tb_per_s"] == pytest.approx(0.5)
    assert record["tflop_per_s"] == pytest.approx(5.0)
    assert "25.0% of 0.5000 ms" in benchmark.line(record)


def test_worst_error_covers_gradients():
    """An implementation whose output is right and whose gradient is not."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad

    x = [torch.randn(8)]
    assert benchmark.worst_error(lambda x: x * 2, lambda x: x + x, x) < 1e-6
    assert benchmark.worst_error(Wrong.apply, lambda x: x + x, x) == pytest.approx(0.5)


def test_plot_needs_the_records_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "quantiles", lambda run: (2.0, 1.9, 2.2))
    rows = [benchmark.measure(case(lambda: 0.0)._replace(direction=d), LIMITS) for d in ("forward", "backward")]
    path = tmp_path / "records.json"
    path.write_text(json.dumps({"environment": {"device": "none"}, "ceilings": LIMITS, "rows": rows}))
    benchmark.main(["--draw", str(path), "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["matmul"], "unknown operation 'matmul'; allowed: taylor_linear_attention"),
        (["--draw", "nowhere.json"], "records nowhere.json: No such file or directory"),
        (["--draw", __file__], "test_benchmark.py: not JSON"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "experiments" / "results" / "kernels" / "benchmark.json"


def test_the_committed_page_is_made_from_the_committed_records():
    page = (ROOT / "kernels" / "taylor_linear_attention" / "README.md").read_text()
    runs = [json.loads(path.read_text()) for path in (RECORDS, RECORDS.with_name("other_operations.json"))]
    assert benchmark.write_table(page, *runs) == page


def test_the_table_shows_the_records():
    records = json.loads(RECORDS.read_text())
    records["rows"] = [r for r in records["rows"] if r["implementation"] == "ours"][:1]
    records["rows"][0] |= {"ms": 1.25, "ms_20": 1.0, "ms_80": 1.5, "share_of_limit": 0.25}
    assert "| ours | 1.25 (1 to 1.5) |" in benchmark.table(records)
    assert benchmark.table(records).endswith("| 25.0% |")
    with pytest.raises(ValueError, match="has no <!-- measured -->"):
        benchmark.write_table("nothing", records)
