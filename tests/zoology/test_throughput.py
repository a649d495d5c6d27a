"""The throughput command on tiny models, and its figures and tables from made-up records."""

import json
import re
import shutil
import threading
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from typer.testing import CliRunner

from zoology import plots_throughput, presets, results, throughput
from zoology.model import LanguageModel
from zoology.runner.plan import load_sweep

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STEPS = EXPERIMENTS / "results" / "training" / "steps_h200.json"
MODELS = ["base_conv+attention@16", "base_conv+based:feature_dim=4@16"]
HUGE = 10**9


def run(*arguments):
    throughput.app([*map(str, arguments)], standalone_mode=False)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Records of two tiny models, and the file they are in."""
    path = tmp_path_factory.mktemp("throughput") / "records.json"
    tiny = ["--device", "cpu", "--repeats", 2, "--seconds", 600, "--prompt", 8, "--new-tokens", 130]
    tiny += ["--models", ",".join(MODELS)]
    run(*tiny, "--batch", f"2,{HUGE}", "--length", "16,2x32", "--out", path)
    return json.loads(path.read_text()), path, tiny


def record(document, kind, model, **wanted):
    (found,) = [
        r for r in document["records"] if (r["kind"], r["model"]) == (kind, model) and wanted.items() <= r.items()
    ]
    return found


def test_every_point_is_timed_beside_its_bound(timed):
    document, _, _ = timed
    assert len(document["records"]) == 2 * 4
    for found in document["records"]:
        if found["batch"] == HUGE:
            continue
        ms, tokens = found["ms"], found["batch"] * (found["new_tokens"] or found["length"])
        assert 0 < ms["low"] <= ms["median"] <= ms["high"]
        assert (ms["repeats"], found["dtype"], found["peak_memory_bytes"]) == (2, "fp32", None)
        assert found["tokens_per_ms"] == pytest.approx(tokens / ms["median"])
        assert found["share_of_bound"] == pytest.approx(found["bound_ms"] / ms["median"])
    assert document["command"].startswith("python -m zoology.throughput ")
    assert document["versions"]["torch"] == torch.__version__


def test_the_bound_is_made_of_the_tensors_that_move(timed):
    """A step at position p of [base_conv, attention] at width 16, by hand, in float32."""
    document, _, _ = timed
    found = record(document, "generation", MODELS[0], batch=2)
    (subject,) = throughput.subjects([MODELS[0]])
    model = LanguageModel(subject.config)
    final_norm = 2 * 16
    assert [part["tokens"] for part in found["segments"]] == [128, 2]
    for part, position in zip(found["segments"], (8 + 64, 136 + 1)):
        assert part["moved"]["weight_bytes"] == 4 * (model.num_parameters() - final_norm)
        assert part["moved"]["state_bytes_read"] == 2 * 4 * 16 * (2 * position + 2)
        assert part["moved"]["state_bytes_written"] == 2 * 4 * 16 * (2 + 2)
        moved = sum(part["moved"][key] for key in ("weight_bytes", "state_bytes_read", "state_bytes_written"))
        assert part["bound"]["bandwidth_ms"] == pytest.approx(1e3 * moved / document["ceilings"]["copy"])
        operations = 1e3 * part["moved"]["operations"] / document["ceilings"]["fp32"]
        assert part["bound"]["ms"] == pytest.approx(max(operations, part["bound"]["bandwidth_ms"]))
    assert found["bound_ms"] == pytest.approx(sum(p["tokens"] * p["bound"]["ms"] for p in found["segments"]))
    assert found["ms"]["median"] == pytest.approx(sum(p["tokens"] * p["ms_per_token"] for p in found["segments"]))
    assert found["state_bytes"] == 2 * model.state_bytes(8 + 130)
    assert found["backends"] == {"base_conv": ["reference"], "attention": ["sdpa"]}


def test_points_are_measured_in_turns(timed):
    document, _, _ = timed
    found = [(r["model"], r["kind"], r["batch"], r["length"]) for r in document["records"]]
    in_turns = [("generation", 2, 8), ("prefill", 1, 16), ("generation", HUGE, 8), ("prefill", 2, 32)]
    assert found == [(model, *point) for model in MODELS for point in in_turns]


def test_one_measures_while_none_gets_ready(tmp_path):
    """Two that get ready hold the lock together; who measures waits for both, and they wait for it."""
    lock, done = tmp_path / "lock", []

    def measure():
        with throughput.locked(lock, alone=True):
            done.append("measured")

    with throughput.locked(lock, alone=False), throughput.locked(lock, alone=False):
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join(0.2)
        done.append("ready")
    thread.join(10)
    assert done == ["ready", "measured"]


def test_a_process_gets_ready_once_and_then_measures_by_itself(tmp_path, monkeypatch):
    """Were it to get ready again between two points, each of several would wait for the slowest every time."""
    lock, held, rehearsed = tmp_path / "lock", [], []
    original = throughput.locked
    monkeypatch.setattr(throughput, "locked", lambda lock, alone: held.append(alone) or original(lock, alone=alone))
    get_ready = throughput.Bench._get_ready
    monkeypatch.setattr(throughput.Bench, "_get_ready", lambda *a: rehearsed.append(held[-1]) or get_ready(*a))
    tiny = ["--device", "cpu", "--repeats", 1, "--prompt", 4, "--new-tokens", 2, "--models", MODELS[0]]
    run(*tiny, "--batch", f"2,{HUGE}", "--length", "8", "--lock", lock, "--out", tmp_path / "records.json")
    assert held == [False, True, True, True]
    assert rehearsed == [False, False, False, True, True]  # the first point is ready, and kept
    document = json.loads((tmp_path / "records.json").read_text())
    assert ["out_of_memory" in found for found in document["records"]] == [False, False, True]


def test_a_preset_by_the_kernel_of_its_attention():
    (subject,) = throughput.subjects(["attention-1.3b:cudnn"])
    assert (subject.name, subject.also["backend"]) == ("attention-1.3b:cudnn", "cudnn")
    assert {spec.options["backend"] for spec in subject.config.layers} == {"sdpa"}
    (plain,) = throughput.subjects(["attention-1.3b"])
    assert "backend" not in plain.also
    flash = torch.backends.cuda.flash_sdp_enabled()
    with plain.attention():
        assert torch.backends.cuda.flash_sdp_enabled() == flash
    with subject.attention():
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(ValueError, match="no layer has the backend 'cudnn'; allowed: mamba-ssm, reference"):
        throughput.subjects(["mamba-1.3b:cudnn"])


def test_what_cannot_fit_is_recorded_with_its_bytes(timed):
    document, _, _ = timed
    (subject,) = throughput.subjects([MODELS[1]])
    lost = record(document, "generation", MODELS[1], batch=HUGE)["out_of_memory"]
    assert lost["bytes_needed"] > HUGE * LanguageModel(subject.config).state_bytes(138) > lost["bytes_available"] > 0
    table = plots_throughput.points(document, "generation")
    assert dict(zip(table["batch"], table["fits"])) == {2: True, HUGE: False}


def test_only_what_is_missing_is_measured(timed):
    document, path, tiny = timed
    run(*tiny, "--batch", "2,3", "--length", "", "--out", path)
    again = json.loads(path.read_text())["records"]
    assert again[: len(document["records"])] == document["records"]
    assert [(r["model"], r["batch"]) for r in again[len(document["records"]) :]] == [(name, 3) for name in MODELS]


def test_another_run_into_a_file_keeps_what_it_was_measured_with(tmp_path, monkeypatch):
    path, speeds = tmp_path / "records.json", iter([1e9, 2e9, 4e9])
    monkeypatch.setattr(throughput, "measure_ceilings", lambda _: {"copy": next(speeds), "fp32": 1e12, "bf16": 1e12})
    tiny = ["--device", "cpu", "--repeats", 1, "--models", MODELS[0], "--batch", "", "--out", path]
    run(*tiny, "--length", "16")
    run(*tiny, "--length", "16,32")
    run(*tiny, "--length", "16,32", "--dtype", "bf16")  # other points than those in float32
    document = json.loads(path.read_text())
    found = [(one["length"], one["dtype"], one.get("run", 0)) for one in document["records"]]
    assert found == [(16, "fp32", 0), (32, "fp32", 1), (16, "bf16", 2), (32, "bf16", 2)]
    assert [one["ceilings"]["copy"] for one in (document, *document["later_runs"])] == [1e9, 2e9, 4e9]
    for one in document["records"]:
        moved, speed = one["moved"], 1e9 * 2 ** one.get("run", 0)
        total = moved["weight_bytes"] + moved["state_bytes_read"] + moved["state_bytes_written"]
        assert one["bound"]["bandwidth_ms"] == pytest.approx(1e3 * total / speed)
    run(*tiny, "--length", "16,32", "--dtype", "bf16")
    assert json.loads(path.read_text()) == document
    run("--draw", path, "--draw", path, "--plot", tmp_path, "--out", tmp_path / "joined.json")
    twice = json.loads((tmp_path / "joined.json").read_text())
    assert twice == document | {"records": document["records"] * 2}


def test_figures_are_drawn_from_the_records_alone(timed, tmp_path):
    _, path, _ = timed
    run("--draw", path, "--plot", tmp_path, "--out", tmp_path / "joined.json")
    assert {file.name for file in tmp_path.glob("*.png")} == {"generation.png", "prefill.png"}
    assert json.loads((tmp_path / "joined.json").read_text()) == json.loads(path.read_text())


def test_presets_are_cut_short_for_a_try():
    (subject,) = throughput.subjects(["based-360m"], n_layers=3)
    assert subject.config.layers == presets.config("based-360m").layers
    assert (subject.config.n_layers, subject.also) == (3, {"layers": 3})


def test_the_longest_operators_are_listed():
    a = torch.randn(64, 64)
    found = throughput.longest_kernels(lambda: [a @ a for _ in range(6)], torch.device("cpu"), steps=3)
    assert any(kernel["name"] == "aten::mm" and kernel["calls"] == 2 for kernel in found)
    assert 0.5 < sum(kernel["share"] for kernel in found) <= 1 + 1e-9


@pytest.mark.gpu
def test_a_fixed_state_decodes_in_the_same_time_everywhere(tmp_path):
    """Three layers of Based, 512 tokens in four segments: the last takes as long as the first, none beats the bound."""
    path = tmp_path / "records.json"
    tiny = ["--n-layers", 3, "--batch", 64, "--new-tokens", 512, "--length", 512, "--repeats", 3, "--no-compiled"]
    run("--models", "based-360m", *tiny, "--out", path)
    document = json.loads(path.read_text())
    parts = record(document, "generation", "based-360m")["segments"]
    assert parts[-1]["ms_per_token"] == pytest.approx(parts[0]["ms_per_token"], rel=0.05)
    assert all(found["share_of_bound"] < 1.05 for found in document["records"])
    assert all(found["peak_memory_bytes"] > found["state_bytes"] for found in document["records"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "based"], "unknown preset 'based': .*Known presets are attention-360m, "),
        (["--batch", "1,-2"], "--batch '1,-2': must be whole numbers above 0, separated by commas"),
        (["--length", "many"], "--length 'many': must be LENGTH or BATCHxLENGTH, whole numbers above 0, by commas"),
        (["--length", "0x16"], "--length '0x16': must be LENGTH or BATCHxLENGTH"),
        (["--results", EXPERIMENTS / "mqar_sweep.py", "--scale", "smoke", "--only", "elephant"], "has no elephant"),
        (["--dtype", "int8"], "--dtype 'int8': must be one of bf16, fp32"),
        (["--results", "nowhere"], "results directory nowhere: No such file"),
        (["--draw", "nowhere.json", "--plot", "."], r"records nowhere\.json: No such file"),
        (["--draw", STEPS, "--plot", "."], r"steps_h200\.json: some have no 'kind': another command made them"),
        (["--draw", "nowhere.json"], "--draw: needs --plot, or --out to join records"),
        (["--device", "gpu"], "--device gpu: no device of torch; allowed are auto, cpu, cuda"),
        (["--kernels", "64"], "--kernels: needs a CUDA device and Triton"),
    ],
)
def test_bad_options_are_named(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = CliRunner().invoke(throughput.app, ["--device", "cpu", *map(str, arguments)])
    assert said.exit_code == 2
    assert re.search(message, said.output)


# -- accuracy, state and speed ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recalled(results_directory, tmp_path_factory):
    """The models of a results directory, timed."""
    path = tmp_path_factory.mktemp("recall") / "records.json"
    run("--results", results_directory, "--device", "cpu", "--batch", "4", "--repeats", 1, "--out", path)
    return results.load(results_directory), json.loads(path.read_text())


def test_every_trained_model_is_timed_at_its_longest_test(recalled):
    frame, document = recalled
    assert {r["point_id"] for r in document["records"]} == set(frame["point_id"])
    assert {(r["length"], r["new_tokens"], r["batch"]) for r in document["records"]} == {(21, 3, 4)}
    for found in document["records"]:
        of_point = frame[frame["point_id"] == found["point_id"]].iloc[0]
        assert found["state_bytes"] == 4 * of_point["state_bytes"]
        assert found["parameters"] == of_point["parameters"]


def test_the_models_of_an_experiment_file_are_those_its_results_will_have():
    file = EXPERIMENTS / "mqar_sweep.py"
    found = {subject.also["point_id"]: subject for subject in throughput.trained(file, "smoke")}
    runs = {run.point_id: run for run in load_sweep(file, "smoke")}
    assert found.keys() == runs.keys()
    for point, subject in found.items():
        assert subject.config == runs[point].model
        assert subject.prompt + subject.new_tokens == runs[point].data.max_test_length


def test_only_the_architectures_that_are_asked_for_have_to_be_known(results_directory, tmp_path):
    """Results of somebody else's mixer, whose file is not at hand."""
    directory = shutil.copytree(results_directory, tmp_path / "results")
    for path in directory.glob("*/result.json"):
        record = json.loads(path.read_text())
        if record["architecture"] == "based":
            path.write_text(path.read_text().replace('"based"', '"theirs"'))
    (subject,) = throughput.trained(directory, "paper", "attention")
    assert subject.also["architecture"] == "attention"
    with pytest.raises(ValueError, match=r"unknown architecture 'theirs': .*--architectures FILE"):
        throughput.trained(directory, "paper")


def test_recall_and_speed_stand_at_the_same_models(recalled):
    frame, document = recalled
    table = plots_throughput.recall(frame, document)
    selected = results.select(frame)
    means = selected[selected["slice"] == results.MEAN].set_index("point_id")["accuracy"]
    speeds = {r["point_id"]: r["tokens_per_ms"] for r in document["records"]}
    assert {row.point_id: (row.accuracy, row.tokens_per_ms) for row in table.itertuples()} == {
        point: (means[point], speed) for point, speed in speeds.items()
    }
    left, right = plots_throughput.recall_and_speed(frame, document).axes
    drawn = {(float(x), float(y)) for line in right.lines for x, y in line.get_xydata() if line.get_marker() in "os"}
    assert {(speed, means[point]) for point, speed in speeds.items()} <= drawn
    dots = [c for c in left.collections if len(c.get_offsets())]
    states = frame.groupby("point_id")["state_bytes"].first()
    assert {tuple(c.get_offsets()[0]) for c in dots} == {(states[point], means[point]) for point in speeds}
    fastest = max(speeds, key=speeds.get)
    areas = {float(c.get_offsets()[0][0]): float(c.get_sizes()[0]) for c in dots}
    assert areas[float(states[fastest])] == max(areas.values()) == 160


def test_recall_and_speed_are_drawn_from_the_command_line(recalled, results_directory, tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(recalled[1]))
    run("--draw", tmp_path / "records.json", "--results", results_directory, "--plot", tmp_path)
    assert {file.name for file in tmp_path.glob("*.png")} == {"recall_and_speed.png"}


def test_results_that_were_not_timed_are_refused(recalled, timed, results_directory, tmp_path):
    frame, _ = recalled
    with pytest.raises(ValueError, match=r"none of these results was timed: must be records of `zoology\.throughput"):
        plots_throughput.recall(frame, timed[0])
    arguments = ["--draw", timed[1], "--results", results_directory, "--plot", tmp_path]
    said = CliRunner().invoke(throughput.app, [str(argument) for argument in arguments])
    assert said.exit_code == 2
    assert "none of these results was timed" in said.output


# -- made-up records ----------------------------------------------------------------------------------------

NAMES = ("attention-1.3b", "based-1.3b")
WEIGHTS, PER_TOKEN = 2.6e9, 240e3  # bytes; the latter of each sequence's cache


def made_up(model, batch, *, prompt=64, new_tokens=1024, share=0.5):
    """A generation record whose attention takes 1 + batch * position / 10^4 ms a step, and Based 2 ms."""
    segments = []
    for start in range(prompt, prompt + new_tokens, 128):
        at = start + 64
        read = batch * PER_TOKEN * at if model == NAMES[0] else batch * 1e7
        ms = 1 + batch * at / 1e4 if model == NAMES[0] else 2.0
        moved = {"weight_bytes": WEIGHTS, "state_bytes_read": read, "state_bytes_written": 0.0, "operations": 1.0}
        bound = {"bandwidth_ms": share * ms, "operations_ms": 0.0, "ms": share * ms}
        segments.append({"from": start, "tokens": 128, "ms_per_token": ms, "moved": moved, "bound": bound})
    ms = sum(part["tokens"] * part["ms_per_token"] for part in segments)
    return {
        "kind": "generation", "model": model, "batch": batch, "length": prompt, "new_tokens": new_tokens,
        "dtype": "bf16", "ms": {"median": ms, "low": 0.99 * ms, "high": 1.02 * ms, "repeats": 3},
        "tokens_per_ms": batch * new_tokens / ms,
        "bound_ms": share * ms, "share_of_bound": share, "segments": segments, "state_bytes": 1, "peak_memory_bytes": 1,
    }  # fmt: skip


def lost(model, batch):
    keys = ("kind", "model", "batch", "length", "new_tokens", "dtype")
    kept = {key: made_up(model, 1)[key] for key in keys} | {"batch": batch}
    return kept | {"out_of_memory": {"bytes_needed": 10**12, "bytes_available": 10**11, "message": "too much"}}


def prefilled(model, length, tokens_per_ms, batch=1):
    ms = batch * length / tokens_per_ms
    return {
        "kind": "prefill", "model": model, "batch": batch, "length": length, "new_tokens": 0, "dtype": "bf16",
        "ms": {"median": ms, "low": ms, "high": ms, "repeats": 3}, "tokens_per_ms": tokens_per_ms,
        "bound_ms": 0.4 * ms, "share_of_bound": 0.4, "state_bytes": 1, "peak_memory_bytes": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def document():
    records = [made_up(model, batch) for model in NAMES for batch in (1, 128, 512)]
    records += [lost(NAMES[0], 1024), made_up(NAMES[1], 1024)]
    records += [prefilled(NAMES[0], n, 200.0 - n / 1000) for n in (2048, 4096)]
    records[-1]["longest_kernels"] = [{"name": "nvjet", "calls": 1.0, "ms": 12.5, "share": 1.0}]
    records += [prefilled(NAMES[1], n, 220.0) for n in (2048, 4096)]
    kernel = {"kind": "kernel", "dtype": "bfloat16", "ms_20": 1.0, "ms_80": 1.0, "share_of_limit": 0.5}
    layers = (
        ("Based", 32768, 2.5),
        ("JRT-RNN", 32768, 2.0),
        ("JRT-Prompt", 65536, 5.0),
        ("FlashAttention-2", 32768, 90.0),
    )
    for name, length, ms in layers:
        records.append({**kernel, "model": name, "length": 32768, "shape": {"B": 16, "T": length}, "ms": ms})
    long = (
        (NAMES[0], 32768, 50.0, 4),
        (NAMES[1], 32768, 200.0, 16),
        (NAMES[1], 65536, 210.0, 16),
        ("jrt-1.3b", 32768, 180.0, 16),
    )
    records += [prefilled(*point) for point in long] + [prefilled(NAMES[0], 32768, 60.0, 2)]
    device = {"type": "cuda", "name": "made up", "memory_bytes": 1.5e11}
    return {"device": device, "versions": {"torch": "2"}, "git": None, "ceilings": {}, "records": records}


def test_the_ratio_crosses_the_claim_where_the_lines_do(document):
    table = plots_throughput.crossings(document, NAMES[1], NAMES[0]).set_index("batch")
    assert list(table.index) == [1, 128, 512]
    for batch in (1, 128, 512):
        mean = 1 + batch * (64 + 512) / 1e4
        assert table.loc[batch, "measured"] == pytest.approx(mean / 2)
        assert table.loc[batch, "by_bound"] == pytest.approx(mean / 2)
        position = (24 * 2 - 1) * 1e4 / batch
        assert table.loc[batch, "from_position"] == pytest.approx(position)
        assert table.loc[batch, "from_position_by_bound"] == pytest.approx(position)
        assert table.loc[batch, "state_bytes"] == pytest.approx(batch * PER_TOKEN * position)
    assert list(table["fits"]) == [47e4 * PER_TOKEN + WEIGHTS <= 1.5e11] * 3
    near = plots_throughput.crossings(document, NAMES[1], NAMES[0], ratio=2.0)
    assert list(near["from_position"]) == pytest.approx([3e4, 3e4 / 128, 3e4 / 512])


def test_a_state_that_stays_gives_no_slope(document):
    parts = plots_throughput.segments(document)
    parts = parts[(parts["batch"] == 128) & (parts["model"] == NAMES[1])]
    noisy = parts.assign(ms_per_token=parts["ms_per_token"] + np.linspace(0, 0.1, len(parts)))
    step = plots_throughput.StepTime(noisy, "ms_per_token")
    assert step(10) == step(10**6) == pytest.approx(2.05)


def test_published_speeds_stand_beside_the_points_they_are_of(document):
    table = plots_throughput.points(document, "generation").set_index(["model", "batch"])["published"]
    assert table[NAMES[0], 128] == 0.99
    assert table[NAMES[1], 128] == 24.28
    assert table.isna().sum() == len(table) - 2
    prefill = plots_throughput.points(document, "prefill").set_index(["model", "length"])["published"]
    assert (prefill[NAMES[0], 4096], prefill[NAMES[1], 4096]) == (103.5, 161.7)
    assert prefill.notna().sum() == 2
    kernels = plots_throughput.points(document, "kernel").set_index("model")["published"]
    assert kernels.to_dict() == {"Based": 4.5, "JRT-RNN": 5.6, "JRT-Prompt": 9.0, "FlashAttention-2": 107.8}


def curve(axis, marker):
    (line,) = [line for line in axis.lines if line.get_marker() == marker and line.get_linestyle() == "-"]
    return {float(x): float(y) for x, y in line.get_xydata()}


def test_the_generation_figure_shows_speeds_bounds_and_what_does_not_fit(document):
    speed, share, step = plots_throughput.generation(document).axes
    table = plots_throughput.points(document, "generation").set_index(["model", "batch"])
    assert curve(speed, "o") == pytest.approx({b: table.loc[(NAMES[0], b), "tokens_per_ms"] for b in (1, 128, 512)})
    bounds = [line for line in speed.lines if line.get_marker() == "None" and len(line.get_xdata()) == 3]
    assert bounds[0].get_ydata() == pytest.approx(2 * np.array(list(curve(speed, "o").values())))
    crosses = {float(x) for line in speed.lines if line.get_marker() == "x" for x in line.get_xdata()}
    assert crosses == {1024}
    hollow = [line for line in speed.lines if line.get_markerfacecolor() == "none"]
    assert {tuple(point) for line in hollow for point in line.get_xydata()} == {(128, 0.99), (128, 24.28)}
    assert set(curve(share, "s").values()) == {50.0}
    assert curve(step, "s") == {64 + 64 + 128 * i: 2.0 for i in range(8)}
    labels = [text.get_text() for text in step.get_legend().get_texts()]
    assert labels == [*NAMES, "bound of bytes\nand operations", "published (H100)", "does not fit"]


def test_the_ratio_figure_ends_where_the_memory_does(document):
    (axis,) = plots_throughput.ratio(document).axes
    solid = {line.get_label(): line for line in axis.lines if line.get_label().startswith("batch")}
    assert list(solid) == ["batch 1", "batch 128", "batch 512"]
    at, y = solid["batch 128"].get_xydata()[0]
    assert (at, y) == (128, pytest.approx((1 + 128 * 128 / 1e4) / 2))
    ends = [line.get_xydata()[0] for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    full = (1.5e11 - WEIGHTS) / PER_TOKEN
    assert sorted(x for x, _ in ends) == pytest.approx([full / 512, full / 128])
    assert all(y == pytest.approx((1 + full / 1e4) / 2) for _, y in ends)


def test_a_long_prompt_is_a_point_of_its_own(document):
    far = [made_up(name, 128, prompt=3000, new_tokens=128) for name in NAMES]
    longer = document | {"records": document["records"] + far}
    (axis,) = plots_throughput.ratio(longer).axes
    (point,) = [line.get_xydata() for line in axis.lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert point.tolist() == [[3064, pytest.approx((1 + 128 * 3064 / 1e4) / 2)]]
    table = plots_throughput.crossings(longer, NAMES[1], NAMES[0]).set_index(["batch", "prompt"])
    assert table.loc[(128, 3000), "measured"] == pytest.approx((1 + 128 * 3064 / 1e4) / 2)
    assert table.loc[(128, 3000), "from_position"] == pytest.approx(47e4 / 128)


def test_the_prefill_figure_is_a_line_for_each_model(document):
    speed, share = plots_throughput.prefill(document).axes
    assert curve(speed, "o") == pytest.approx({2048: 200 - 2.048, 4096: 200 - 4.096})
    assert curve(share, "s") == pytest.approx({2048: 40, 4096: 40})


def test_the_time_of_a_step_by_kernel(document):
    kernels = {"nvjet_tst_1": 1.0, "splitKreduce": 0.5, "flash_fwd": 2.0, "_step_kernel": 0.25, "copy": 4.0}
    kernels["triton_red_fused_flash"] = 0.125
    listed = [{"name": name, "calls": 1.0, "ms": ms, "share": 0.1} for name, ms in kernels.items()]
    profiled = document | {"records": [made_up(NAMES[1], 128) | {"longest_kernels": listed}]}
    assert plots_throughput.time_by_kernel(profiled, "generation")[NAMES[1]].to_dict() == {
        "matrix products": 1.5, "attention": 2.0, "recurrences and convolutions": 0.25,
        "small fused operations": 0.125, "everything else": 4.0,
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"no prefill was profiled: must be records of `zoology\.throughput --profile`"
    ):
        plots_throughput.time_by_kernel(profiled, "prefill")
    assert plots_throughput.time_by_kernel(document, "prefill")[NAMES[0]]["matrix products"] == 12.5


# -- tables -------------------------------------------------------------------------------------------------


def cells(text, start):
    """The cells of the Markdown rows that begin with a text."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_page_of_generation_has_every_number(document):
    text = plots_throughput.generation_page(document)
    mean = 1 + 128 * 576 / 1e4
    first, last = 1 + 128 * 128 / 1e4, 1 + 128 * 1024 / 1e4
    assert cells(text, f"`{NAMES[0]}`") == [
        [f"`{NAMES[0]}`", f"{128 / mean:.1f}", "50%", f"{first:.2f} / {last:.2f}", "0.0", "0.0", "0.99"]
    ]
    assert (
        f"based-1.3b / attention-1.3b: **{mean / 2:.1f}x** measured, {mean / 2:.1f}x by the bounds, 24.5x published."
        in text
    )
    assert cells(text, "128") == []


def test_the_page_of_ratios_has_every_batch_size(document):
    text, mean = plots_throughput.ratio_page(document), 1 + 128 * 576 / 1e4
    assert cells(text, "128") == [
        ["128", "64", f"{mean / 2:.1f}x", f"{mean / 2:.1f}x", "3,672", "3,672", "112.8 GB, fits"]
    ]
    assert cells(text, "1,024") == []


def test_the_page_of_prefill_has_lengths_by_models(document):
    text = plots_throughput.prefill_page(document)
    assert cells(text, "4,096") == [["4,096", "196 (40%)", "220 (40%)"]]
    assert cells(text, "4,096, published") == [["4,096, published", "103.5", "161.7"]]
    assert cells(text, "2,048, published") == []


def test_a_text_that_is_read_twice_counts_once(document):
    """Attention at the largest batch that fits, Based on twice the tokens, JRT-RNN."""
    table = plots_throughput.reading_twice(document).set_index("system")
    assert table["batch"].to_dict() == {"FlashAttention-2": 4, "Based": 16, "JRT-Prompt": 16, "JRT-RNN": 16}
    assert table["text_tokens_per_ms"].to_dict() == pytest.approx(
        {"FlashAttention-2": 50.0, "Based": 200.0, "JRT-Prompt": 105.0, "JRT-RNN": 180.0}
    )
    assert table["model_faster"]["JRT-RNN"] == pytest.approx(3.6)
    assert table["layer_faster"]["JRT-RNN"] == pytest.approx(45.0)
    assert table["published_faster"]["JRT-RNN"] == pytest.approx(107.8 / 5.6)
    models = document | {"records": [r for r in document["records"] if r["kind"] != "kernel"]}
    alone = plots_throughput.reading_twice(models).set_index("system")
    assert alone["layer_ms"].isna().all()
    assert alone["model_faster"]["JRT-RNN"] == pytest.approx(3.6)
    text = plots_throughput.reading_twice_page(document)
    assert cells(text, "JRT-RNN") == [["JRT-RNN", "2.00", "45.0x", "5.6", "19.2x", "180.0 (batch 16)", "3.6x"]]


def test_the_notebook_runs(document, recalled, results_directory, tmp_path, monkeypatch):
    _, timed = recalled
    (tmp_path / "models.json").write_text(json.dumps(document))
    (tmp_path / "recall.json").write_text(json.dumps(timed))
    monkeypatch.setenv("ZOOLOGY_THROUGHPUT", str(tmp_path))
    monkeypatch.setenv("ZOOLOGY_RESULTS", str(results_directory))
    path = EXPERIMENTS.parent / "notebooks" / "throughput.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    drawn = [output["data"]["image/png"] for (output,) in outputs[1:] if "image/png" in output["data"]]
    assert len(drawn) == 4
    assert min(map(len, drawn)) > 20_000
    tables = [output["data"]["text/plain"] for (output,) in outputs[1:] if "image/png" not in output["data"]]
    words = ("24.28", "3671.8", "161.7", "12.5", "JRT-RNN", "attention")
    assert [word in table for word, table in zip(words, tables)] == [True] * 6
