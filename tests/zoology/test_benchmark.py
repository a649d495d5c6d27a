"""The benchmark: measures what it says, counts work as it says, draws what it measured."""

import copy
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from architectures import registry
from zoology import benchmark
from zoology.graphs import MODES, forget_loops
from zoology.loops import EagerLoop

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
BUILD_TIMES = RESULTS / "training" / "build_h200.json"
STEPS = RESULTS / "training" / "steps_h200.json"
SPEED = RESULTS / "throughput" / "models.json"
PLOT = ("--plot", "plot.png")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    options = "--models base_conv+attention@16,base_conv@16 --shapes 16x2,24x4 --batch-size 8 --vocab-size 64 --steps 2"
    arguments = [
        *options.split(),
        "--repeats",
        "2",
        "--mode",
        "static",
        "--device",
        "cpu",
    ]
    arguments += ["--out", str(folder / "records.json"), "--plot", str(folder / "plot.png")]
    benchmark.app(arguments, standalone_mode=False)
    forget_loops()
    return json.loads((folder / "records.json").read_text()), folder


def test_a_record_for_every_model_shape_and_precision(result):
    records = result[0]["records"]
    found = [(r["model"], r["seq_len"], r["num_kv_pairs"], r["precision"]) for r in records]
    shapes = [(16, 2), (24, 4)]
    assert found == [(m, *s, "fp32") for m in ("base_conv+attention@16", "base_conv@16") for s in shapes]
    for record in records:
        step = record["step_ms"]
        assert 0 < step["low"] <= step["median"] <= step["high"]
        assert record["examples_per_second"] == pytest.approx(8e3 / step["median"])
        assert record["baseline_step_ms"]["repeats"] == 2
        assert record["execution"]["mode"] == "static"
        assert record["first_epoch_loss"] == pytest.approx(4.16, abs=0.1)  # log 64
    assert result[0]["versions"]["torch"] == torch.__version__
    assert set(result[0]["ceilings"]) == {"copy", "fp32", "bf16"}


OWN = """
from architectures import register
from architectures.base_conv import BaseConv


@register("own_conv", paper="none")
class OwnConv(BaseConv):
    '''An architecture in a file of its own.'''
"""


def test_loops_built_side_by_side_are_measured_in_turn(tmp_path, monkeypatch):
    """Each process knows the architectures of the user's own file."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    path = tmp_path / "own_conv.py"
    path.write_text(OWN)
    shape = benchmark.Shape(16, 2, 8, 64, 3)
    todo = benchmark.cases(["own_conv@8"], [shape], ["fp32", "bf16"])
    options = {"repeats": 2, "mode": "eager", "jobs": 2, "files": [str(path)], "report": str}
    result = benchmark.benchmark(todo, torch.device("cpu"), **options)
    one, two = result["records"]
    assert (one["precision"], two["precision"]) == ("fp32", "bf16")
    assert one["baseline_step_ms"] == two["baseline_step_ms"]
    assert one["first_epoch_loss"] == pytest.approx(two["first_epoch_loss"], abs=1e-3)


def test_what_cannot_be_built_keeps_nobody_waiting():
    shape, called = benchmark.Shape(16, 2, 8, 64, 3), []
    (case,) = benchmark.cases(["none@8"], [shape], ["fp32"])
    with pytest.raises(ValueError, match="'none'"):
        benchmark.measure_case(case, torch.device("cpu"), 1, "eager", lambda: called.append(True))
    assert called == [True]


def test_the_plot_is_drawn_from_the_records_alone(result):
    document, folder = result
    again = folder / "figures" / "again.png"
    benchmark.app(["--draw", str(folder / "records.json"), "--plot", str(again)], standalone_mode=False)
    assert again.read_bytes() == (folder / "plot.png").read_bytes()
    slower = copy.deepcopy(document)
    slower["records"][0]["step_ms"]["median"] *= 2
    benchmark.draw(slower, again)
    assert again.read_bytes() != (folder / "plot.png").read_bytes()


def test_joined_records_know_their_run():
    device = {"device": {"name": "one"}}
    first = device | {"at": "1st", "records": [{"ms": 1}]}
    later = [{"at": "1st"}, {"at": "3rd"}]
    other = device | {
        "at": "2nd",
        "later_runs": later,
        "records": [{"ms": 2}, {"ms": 3, "run": 1}, {"ms": 4, "run": 2}],
    }
    document = benchmark.joined([first, other])
    assert document["records"] == [{"ms": 1}, {"ms": 2, "run": 1}, {"ms": 3}, {"ms": 4, "run": 2}]
    assert (document["at"], document["later_runs"]) == ("1st", [{"at": "2nd"}, {"at": "3rd"}])


def test_results_of_one_device_are_joined(result, tmp_path):
    document, folder = result
    both = ["--draw", str(folder / "records.json")] * 2
    benchmark.app([*both, "--out", str(tmp_path / "joined.json")], standalone_mode=False)
    joined = json.loads((tmp_path / "joined.json").read_text())
    assert joined["records"] == document["records"] * 2
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document | {"device": {"type": "cpu", "name": "another"}}))
    with pytest.raises(ValueError, match=r"different devices cannot be joined: .*another"):
        benchmark.load(tmp_path / "joined.json", other)


def test_work_is_counted_by_hand():
    """One base convolution: a D x D layer is the only product, beside the head."""
    batch, length, pairs, width, vocabulary = 8, 16, 2, 16, 64
    shape = benchmark.Shape(length, pairs, batch, vocabulary, 1)
    model = benchmark.parse_model("base_conv@16", vocabulary).model_copy(update={"n_layers": 1})
    work = benchmark.count_work(model, shape, "bf16")
    linear = 2 * batch * length * width * width
    head = 2 * batch * pairs * vocabulary * width
    assert work["operations"] == 3 * (linear + head)
    norms, bias, kernel = 3 * 2 * width, 2 * width, 3 * width
    parameters = vocabulary * width + width * width + norms + bias + kernel
    assert work["bytes"] == 28 * parameters + 5 * (2 * batch * length * width) * 2
    ceilings = {"copy": 1e9, "bf16": 1e12}
    assert benchmark.floor(work, ceilings, "bf16")["ms"] == pytest.approx(work["bytes"] / 1e6)
    assert benchmark.floor(work, ceilings | {"bf16": 1e6}, "bf16")["ms"] == pytest.approx(work["operations"] / 1e3)


def test_the_protocol_runs_every_learning_rate_to_its_end():
    done = benchmark.protocol(
        "base_conv@8", "fp32", torch.device("cpu"), epochs=1, rates=2, share=2e-4, vocab_size=1024, batch_size=8
    )
    assert [run["lr"] for run in done["runs"]] == [1e-3, 0.0316228]
    assert all(len(run["losses"]) == 1 and len(run["test"]) == 7 for run in done["runs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "attention"], "model 'attention': must be NAME"),
        (["--shapes", "64"], "shape '64': must be LENGTHxPAIRS"),
        (["--mode", "fast"], f"--mode 'fast': must be one of auto, eager, {', '.join(MODES)}"),
        (["--mode", "pieces graph"], "--mode 'pieces graph': CUDA graphs need a CUDA device, this is cpu"),
        (["--precisions", "tf32"], "a mode of NVIDIA tensor cores"),
        (["--out", f"{__file__}/records.json"], "File exists"),
        (["--plot", f"{__file__}/plot.png"], "File exists"),
        (["--draw", str(STEPS), "--plot", "plot.xyz"], "Format 'xyz' is not supported"),
        (["--architectures", "absent.py"], "absent.py does not exist"),
        (["--device", "gpu"], "--device gpu: no device of torch; allowed are auto, cpu, cuda"),
        (["--draw", "nowhere.json", *PLOT], "records nowhere.json: No such file or directory"),
        (["--draw", __file__, *PLOT], "not JSON"),
        (
            ["--draw", str(BUILD_TIMES), *PLOT],
            "build_h200.json: must hold what --out wrote, with 'device' and 'records'",
        ),
        (
            ["--draw", str(SPEED), *PLOT],
            "models.json: some have no 'step_ms': another command made them",
        ),
        (["--draw", str(BUILD_TIMES)], "--draw: needs --plot, or --out to join records"),
    ],
)
def test_bad_options_are_named(arguments, message):
    said = CliRunner().invoke(benchmark.app, ["--device", "cpu", *arguments])
    assert said.exit_code == 2
    assert message in said.output


def test_auto_is_what_training_takes_on_a_cpu(capsys):
    """Without a GPU that is the eager loop: nothing else is tried, and nothing is told to have failed."""
    shape = benchmark.Shape(16, 2, 4, 64, 2)
    config = benchmark.run_config(benchmark.parse_model("base_conv@16", 64), shape, "fp32")
    loop = benchmark.build(config, shape, torch.device("cpu"), "auto")
    assert isinstance(loop, EagerLoop)
    assert loop.execution.reason == ""
    assert capsys.readouterr().err == ""
