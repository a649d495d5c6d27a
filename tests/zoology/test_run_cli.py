"""The command line of a sweep: what it prints, what it refuses, and its exit codes."""

import io
import json
import pickle
import re
import shutil
import sys
import time
from collections import deque
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from zoology import __main__, results, run
from zoology.config import SCHEMA_VERSION
from zoology.loops import Execution
from zoology.runner import plan, progress
from zoology.runner.driver import Exit, Progress, run_sweep
from zoology.runner.worker import Failure

EXPERIMENT = """
from zoology.config import DataConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.tasks import MQAR


def sweep(scale):
    if scale == "paper":
        raise RuntimeError("too large")
    task = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2)
    data = DataConfig(train=[Slice(task=task, num_examples=32)], test=[Slice(task=task, num_examples=20)])
    return [
        RunConfig(
            architecture=name,
            model=ModelConfig(vocab_size=32, d_model=16, layers=[layer("base_conv"), layer(name)]),
            data=data,
            train=TrainConfig(lr=lr, epochs=1),
        )
        for name in ("attention", "based")
        for lr in (1e-3, 1e-2)
    ]
"""

PICKLED = """
import pickle
from pathlib import Path


def sweep(scale):
    return pickle.loads(Path({path!r}).read_bytes())
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def engines(monkeypatch, in_process_engine):
    """Runs execute in this process; the engines that were made, and failures to script, by run id."""
    made, script = [], {}

    def make(options, setups, timeout):
        made.append(in_process_engine(setups[0].directory, script))
        made[-1].setups, made[-1].timeout = setups, timeout
        return made[-1]

    monkeypatch.setattr(run, "make_engine", make)
    make.made, make.script = made, script
    return make


@pytest.fixture
def command(experiment, tmp_path, engines):
    """Call the command on the experiment; the result's `output` has stdout and stderr, lines joined."""

    def call(*arguments, path=experiment, out=tmp_path / "out"):
        return CliRunner().invoke(run.app, [str(path), "--out", str(out), "--device", "cpu", *map(str, arguments)])

    return call


def test_a_sweep_from_nothing_to_the_plot_and_again(command, tmp_path, engines):
    first = command("--jobs", 3)
    assert first.exit_code == 0, first.output
    assert "scale laptop: the default because there is no GPU; take another with --scale smoke" in first.output
    assert "4 runs of 2 models of 2 architectures: 4 to do; 3 on cpu at once" in first.output
    assert "[4/4]" in first.output
    assert re.search(r"attention +d_model=16 +2,176 +0\.\d+\* +[01]\.\d\d\d", first.output)
    assert "* the best learning rate lies at the edge of its grid: a better one may lie beyond" in first.output
    assert {"tradeoff.png", "tradeoff.svg", "baselines"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert engines.made[0].setups[0].threads == 1

    drawn = (tmp_path / "out" / "tradeoff.png").stat().st_mtime_ns
    second = command()
    assert second.exit_code == 0
    assert "4 runs of 2 models of 2 architectures: 0 to do" in second.output
    assert len(engines.made) == 1
    assert (tmp_path / "out" / "tradeoff.png").stat().st_mtime_ns == drawn
    assert second.output.splitlines()[-6:] == first.output.splitlines()[-6:]  # the same table


def test_failures_are_listed_at_the_end_and_tried_again_when_asked(command, tmp_path, engines, experiment):
    bad = plan.load_sweep(experiment, "smoke")[1].run_id
    engines.script[bad] = [Failure("error", "ValueError: too bad", "Traceback")]
    first = command("--scale", "smoke")
    assert first.exit_code == Exit.FAILURES
    ending = first.output[first.output.index("1 runs failed:") :]
    assert "attention d_model=16 lr=0.01 seed=0: ValueError: too bad" in ending
    assert f"{bad}/error.txt" in ending

    engines.script.clear()
    again = command("--scale", "smoke")
    assert again.exit_code == Exit.FAILURES
    assert "0 to do, 1 failed before (--rerun failed tries them again)" in again.output
    assert "1 runs failed:" in again.output

    repaired = command("--scale", "smoke", "--rerun", "failed")
    assert repaired.exit_code == 0
    assert "1 to do" in repaired.output
    assert engines.made[-1].started == [bad]


def test_only_seeds_and_rerun_all(command, engines):
    assert command("--only", "based", "--seeds", 2).exit_code == 0
    assert len(engines.made[-1].started) == 4
    assert command("--only", "based").exit_code == 0  # seed 0 is there already
    assert len(engines.made) == 1
    assert command("--only", "based", "--rerun", "all").exit_code == 0
    assert len(engines.made[-1].started) == 2
    # Seed 1, which this command did not ask for, still counts for the models of the sweep.
    assert "±" in command("--only", "based").output


def test_what_only_names_first_is_done_first(command, engines, experiment):
    attention, based = (
        [run.run_id for run in plan.load_sweep(experiment, "smoke")[part]] for part in (slice(2), slice(2, 4))
    )
    assert command("--only", "based,attention").exit_code == 0
    assert engines.made[-1].started == [*based, *attention]
    assert command("--only", "attention,based", "--rerun", "all").exit_code == 0
    assert engines.made[-1].started == [*attention, *based]


def test_only_takes_words_of_the_data(command, engines):
    path = Path(__file__).parents[2] / "experiments" / "zoology_figure2.py"
    said = command("--scale", "smoke", "--only", "attention seq_len=32", path=path)
    assert said.exit_code == 0, said.output
    assert "attention d_model=16 seq_len=32 num_kv_pairs=4 lr=0.01 seed=0" in said.output
    assert len(engines.made[-1].started) == 1


def test_seeds_at_the_best_rate_wait_for_rates_that_only_leaves_out(command, engines, tmp_path):
    def started(*arguments):
        said = command(*arguments)
        assert said.exit_code == 0, said.output
        configs = [(tmp_path / "out" / run_id / "config.json").read_text() for run_id in engines.made[-1].started]
        return [(config["train"]["lr"], config["seed"]) for config in map(json.loads, configs)]

    assert started("--only", "based lr=0.001", "--best-seeds", 2) == [(1e-3, 0)]
    assert started("--only", "based lr=0.01", "--best-seeds", 2) == [(1e-2, 0)]
    [(best, seed)] = started("--only", "based", "--best-seeds", 2)
    assert seed == 1
    shutil.rmtree(tmp_path / "out" / engines.made[-1].started[0])
    (worse,) = {1e-3, 1e-2} - {best}
    assert (
        "1 runs of 1 models of 1 architectures: 0 to do"
        in command("--only", f"based lr={worse:g}", "--best-seeds", 2).output
    )
    assert started("--only", f"based lr={best:g}", "--best-seeds", 2) == [(best, 1)]


def test_the_precision_of_the_command_is_part_of_the_runs(command, engines, tmp_path, experiment):
    assert command("--only", "based").exit_code == 0
    said = command("--only", "based", "--precision", "bf16")
    assert said.exit_code == 0
    assert "2 runs of 1 models of 1 architectures: 2 to do" in said.output  # those in float32 are other runs
    written = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/result.json")]
    assert sorted((record["precision"], record["config"]["train"]["lr"]) for record in written) == [
        ("bf16", 1e-3), ("bf16", 1e-2), ("fp32", 1e-3), ("fp32", 1e-2),
    ]  # fmt: skip
    before = [run.run_id for run in plan.load_sweep(experiment, "smoke")]
    assert [run.run_id for run in plan.with_precision(plan.load_sweep(experiment, "smoke"), "fp32")] == before
    assert "0 to do" in command("--only", "based", "--precision", "fp32").output
    refused = command("--precision", "tf32")
    assert refused.exit_code == Exit.USAGE
    assert "train.precision='tf32': a mode of NVIDIA tensor cores" in refused.output


def test_a_truncated_result_is_reported_and_done_again(command, tmp_path, engines):
    command()
    path = sorted((tmp_path / "out").glob("*/result.json"))[0]
    path.write_text(path.read_text()[:200])
    said = command()
    assert said.exit_code == 0
    assert f"result of run {path.parent.name} is not valid JSON, probably truncated" in said.output
    assert engines.made[-1].started == [path.parent.name]
    assert json.loads(path.read_text())["run_id"] == path.parent.name


def test_runs_of_other_models_are_kept_out_of_table_and_plot(command, experiment):
    command()
    experiment.write_text(EXPERIMENT.replace("d_model=16", "d_model=8"))
    said = command()
    assert "4 finished runs in" in said.output
    assert "outside this sweep" in said.output
    assert "d_model=16" not in said.output[said.output.index("architecture  ") :]


@pytest.mark.parametrize(
    ("count", "times"), [(400, 20), pytest.param(10_000, 4, marks=pytest.mark.slow)], ids=["some", "ten thousand"]
)
def test_a_plan_that_is_done_resumes_in_seconds(
    command, experiment, tmp_path, paper_runs, make_record, write_records, engines, count, times
):
    """In time of this process, which others on the machine hardly change; less imports, which take 1.5 s.

    Reading the results alone sets the measure, as seconds differ by the machine: at most so many times that.
    """
    runs = plan.with_seeds(paper_runs("mqar_sweep.py"), -(-count // 100))[:count]
    experiment.write_text(PICKLED.format(path=str(tmp_path / "runs.pickle")))
    (tmp_path / "runs.pickle").write_bytes(pickle.dumps(runs))
    directory = write_records([make_record(config, 0.5) for config in runs])
    (directory / "tradeoff.png").touch()
    assert command("--scale", "smoke", "--dry-run", out=directory).exit_code == 0  # what is imported when it is needed
    before = time.process_time()
    said = command("--scale", "smoke", out=directory)
    taken = time.process_time() - before
    assert said.exit_code == 0
    assert f"{count} runs of " in said.output
    assert ": 0 to do; " in said.output
    assert not engines.made
    before = time.process_time()
    assert len([json.loads(path.read_bytes()) for path in directory.glob("*/result.json")]) == count
    assert taken < times * (time.process_time() - before)


def test_a_dry_run_shows_the_plan_and_writes_nothing(command, tmp_path):
    said = command("--dry-run", "--seeds", 3)
    assert said.exit_code == 0
    assert not (tmp_path / "out").exists()
    assert "12 runs" in said.output
    assert re.search(r"attention +d_model=16 +0\.001 0\.01 +0 1 2 +1 +[\d,]+ +2,176 +\d\d\.\d%", said.output)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", said.output)]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_a_time_limit_has_its_own_exit_code_and_says_how_to_go_on(command, monkeypatch, tmp_path, experiment):
    monkeypatch.setattr(sys, "argv", ["run.py", str(experiment), "--rerun", "all", "--time-limit", "1e-6"])
    said = command("--time-limit", "1e-6")
    assert said.exit_code == 75
    assert "the time limit was reached: 0 of 4 runs are finished and kept; go on with" in said.output
    assert f"python -m zoology.run {experiment} --time-limit 1e-6" in said.output.replace("\n", "")


def test_a_rerun_of_all_that_is_cut_off_is_gone_on_with_and_loses_nothing(
    command, monkeypatch, tmp_path, experiment, engines
):
    out, runs = tmp_path / "out", [run.run_id for run in plan.load_sweep(experiment, "smoke")]
    engines.script[runs[3]] = [Failure("error", "ValueError: too bad", "Traceback")]
    assert command().exit_code == Exit.FAILURES
    engines.script.clear()
    old = {run_id: (out / run_id / "result.json").read_text() for run_id in runs[:3]}

    def cut_off(todo, engine, *arguments, **options):
        """End as the second run has started."""
        stop = {"stop": lambda: Exit.TIME_LIMIT if len(engine.started) == 2 else None}
        return run_sweep(todo, engine, *arguments, **options | stop)

    monkeypatch.setattr(run, "run_sweep", cut_off)
    monkeypatch.setattr(sys, "argv", ["run.py", str(experiment), "--rerun", "all"])
    said = command("--rerun", "all")
    assert said.exit_code == Exit.TIME_LIMIT
    assert "4 to do" in said.output
    assert "3 earlier results are kept in <run id>/earlier until their runs are finished again" in said.output
    assert "1 of 4 runs are finished and kept; go on with" in said.output
    assert said.output.rstrip().splitlines()[-3].strip() == f"python -m zoology.run {experiment}"
    (done,) = (path.parent.name for path in out.glob("*/result.json"))
    kept = {path.parents[1].name: path.read_text() for path in out.glob("*/earlier/result.json")}
    assert kept == {run_id: text for run_id, text in old.items() if run_id != done}

    monkeypatch.setattr(run, "run_sweep", run_sweep)
    said = command()
    assert said.exit_code == 0, said.output
    assert "3 to do;" in said.output
    assert sorted(engines.made[-1].started) == sorted({*runs} - {done})
    assert not list(out.glob("*/earlier"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mamba"], "--only mamba: not in this sweep, which has attention, based"),
        (["--scale", "paper"], "failed at line 8: RuntimeError: too large"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--retries", "-1"], "--retries -1: must be 0 or more"),
        (["--address", "there:6379"], "--address there:6379: is that of a Ray cluster, and needs --engine ray"),
        (["--time-limit", "soon"], "--time-limit 'soon': must be a positive time"),
        (["--timeout", "-1"], "--timeout '-1': must be a positive time"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees 0 CUDA devices here"),
        (["--architectures", "absent.py"], "absent.py does not exist"),
        (["--only", ""], "--only names no architecture: this sweep has attention, based"),
        (["--log", "wanb"], "--log wanb: must be among tensorboard, wandb"),
        (["--scale", "huge"], "'huge' is not one of"),
        (["--rerun", "some"], "'some' is not one of"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_bad_options_are_refused_before_anything_runs(command, tmp_path, arguments, message, dry):
    said = command(*arguments, *dry)
    assert said.exit_code == Exit.USAGE
    assert message in " ".join(said.output.replace("│", " ").split())
    assert "scale laptop" not in said.output
    assert not list(tmp_path.glob("out/*/config.json"))


def test_a_missing_experiment_is_refused(command, tmp_path):
    said = command(path=tmp_path / "absent.py")
    assert said.exit_code == Exit.USAGE
    assert "absent.py does not exist" in said.output


def test_an_unwritable_directory_is_refused(command, tmp_path, engines):
    (tmp_path / "file").write_text("")
    said = command(out=tmp_path / "file" / "out")
    assert said.exit_code == Exit.USAGE
    assert "cannot be written" in said.output
    assert not engines.made


def test_results_of_another_schema_version_are_refused(command, tmp_path, engines):
    command()
    path = next((tmp_path / "out").glob("*/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    said = command()
    assert said.exit_code == Exit.USAGE
    assert "take another results directory" in said.output
    assert len(engines.made) == 1


def test_jobs_are_per_gpu_and_threads_are_shared(tmp_path, experiment, monkeypatch):
    options = {"jobs": 2, "architecture_files": None, "experiment": experiment}
    monkeypatch.setattr(run, "num_cores", lambda: 16)
    setups = run.worker_setups(options, ["cuda:0", "cuda:1"], tmp_path)
    assert [setup.device for setup in setups] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert {setup.threads for setup in setups} == {4}
    default = options | {"jobs": None}
    gpus = [f"cuda:{index}" for index in range(8)]
    counts = [len(run.worker_setups(default, gpus[:number], tmp_path)) for number in (1, 2, 4, 8)]
    assert counts == [4, 8, 8, 8]  # 4 for each GPU, and at least two cores for each run
    monkeypatch.setattr(run, "num_cores", lambda: 1)
    assert len(run.worker_setups(default, gpus[:2], tmp_path)) == 2
    monkeypatch.setattr(run, "num_cores", lambda: 16)
    on_cpu = run.worker_setups(options | {"jobs": None}, ["cpu"], tmp_path)
    assert (len(on_cpu), {setup.threads for setup in on_cpu}) == (16, {1})


def test_the_commit_is_that_of_the_source_tree(tmp_path, monkeypatch):
    found = run.git_commit()
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"])
    assert isinstance(found["dirty"], bool)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run.git_commit() is None


# -- what is shown while it runs ---------------------------------------------------------------------------------


def test_the_live_view_has_a_line_for_each_worker(tmp_path, make_run, in_process_engine):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    view = progress.make_view(console)
    assert isinstance(view, progress.LiveView)
    frames = []
    tick = view.tick

    def draw_now():
        view._drawn = 0.0
        tick()
        with console.capture() as capture:
            console.print(view._render())
        frames.append(capture.get())

    view.tick = draw_now
    runs = plan.make_plan([make_run(epochs=2), make_run(lr=1e-3)], "cpu")
    failing = {runs[1].run_id: [Failure("error", "ValueError: no")]}
    run_sweep(runs, in_process_engine(tmp_path, failing), tmp_path, view, total=2)
    assert "0/2 runs" in frames[0]
    assert re.search(r"0 +attention d_model=16 lr=0.01 seed=0 +0/2", frames[0])
    assert any(re.search(r"lr=0.01 seed=0 +1/2 +0\.\d\d\d", frame) for frame in frames)
    assert "1/2 runs" in frames[-2]
    assert "2/2 runs, 1 failed" in frames[-1]
    text = console.file.getvalue()
    assert "[1/2] attention d_model=16 lr=0.01 seed=0: validation 0." in text
    assert "[2/2] attention d_model=16 lr=0.001 seed=0: FAILED: ValueError: no" in text


def test_without_a_terminal_lines_are_plain():
    assert type(progress.make_view(Console(file=io.StringIO()))) is progress.PlainView


@pytest.mark.parametrize(("width", "shown"), [(400, 7), (120, 6), (80, 2), (20, 1)])
def test_the_hardest_slices_stay_where_the_table_is_narrow(make_record, paper_runs, width, shown):
    config = paper_runs("mqar_sweep.py")[0]
    names = [part.label for part in config.data.test]
    tested = {name: 0.1 * number for number, name in enumerate(names, 1)}
    frame = results.from_records([make_record(config, tested)])
    table, hidden = run.results_table(frame, results.select(frame), width)
    console = Console(width=400, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert hidden == 7 - shown
    # What is printed are the last ones of seven, and nothing is cut.
    assert re.findall(r"0\.\d00\b", text)[1:] == [f"{0.1 * number:.3f}" for number in range(8 - shown, 8)]
    assert "256 pairs" in text
    assert ("4 pairs" in text.replace("64 pairs", "")) == (shown == 7)
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width


def test_what_a_mean_is_sure_to_is_half_its_interval_however_near_it_is_to_1(make_record, make_run):
    records = [make_record(make_run(seed=seed), accuracy) for seed, accuracy in enumerate((0.99, 0.98, 0.95))]
    frame = results.from_records(records)
    console = Console(width=400, file=io.StringIO())
    console.print(run.results_table(frame, results.select(frame), 400)[0])
    assert re.findall(r"0\.973 ±(\S+)", console.file.getvalue()) == ["0.052"]  # 4.3027 times .0208 by the root of 3


def test_a_line_tells_the_time_to_compile_and_why_nothing_faster_ran(make_run, make_record):
    (run,) = plan.make_plan([make_run()], "cpu")
    view = progress.PlainView(Console(file=io.StringIO()))
    view.begin(Progress(3, 1, 0, deque(), {}, plan.Estimate(), 1))
    why = "compiled graph: RuntimeError: cannot be captured"
    for execution in ({"build_seconds": 24.3}, {}, {"mode": "graph", "reason": why}):
        record = make_record(run.config, 0.5, seconds=61.0)
        view.finished(run, record | {"execution": Execution(**execution)._asdict()}, "")
    said, compiled = "validation 0.500, 1 epochs, 1 min 01 s", ", 24 s of them to compile"
    endings = [line.partition(": ")[2] for line in view.console.file.getvalue().splitlines()]
    assert endings == [said + compiled, said, f"{said}; ran graph because of {why}"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3661, "1 h 01 min"), (90_000, "25 h 00 min")],
)
def test_durations_for_people(seconds, text):
    assert progress.duration(seconds) == text
    assert progress.time_left(seconds) == f"{text} left"


def test_what_is_left_may_be_unknown():
    assert progress.time_left(None) == "time left unknown"


# -- python -m zoology -------------------------------------------------------------------------------------------


def test_commands_by_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zoology"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0
    assert "run a sweep" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["zoology", "rum"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2
    assert "no command 'rum'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["zoology", "plot", "/absent"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2
    assert "/absent" in capsys.readouterr().err
