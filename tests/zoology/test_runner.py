"""The plan, the driver and the results directory, without worker processes: runs execute in the test's own."""

import errno
import json
import math
import os
from collections import deque
from pathlib import Path

import pytest
import torch

import architectures
import zoology.runner.store as store
from architectures import backends
from architectures.backends import BackendError
from zoology.config import SCHEMA_VERSION, TrainConfig, layer
from zoology.engines.local import EpochDone, Finished
from zoology.runner import plan, worker
from zoology.runner.driver import Exit, partition, run_sweep
from zoology.runner.plan import PlanError
from zoology.runner.worker import Failure
from zoology.train import train

ONE_LENGTH_AT_A_TIME = Path(__file__).parents[2] / "experiments" / "zoology_figure2.py"


@pytest.fixture
def runs(make_run):
    return plan.make_plan([make_run(lr=lr) for lr in (1e-3, 1e-2, 1e-1)], "cpu")


def sweep(runs, directory, engine, watcher, **options):
    return run_sweep(runs, engine, directory, watcher, total=len(runs), **options)


# -- the files of a run ------------------------------------------------------------------------------------------


def test_a_finished_run_states_everything(results_directory, make_run):
    config = make_run(("base_conv", "based"), lr=1e-2, seed=1)
    record = store.scan(results_directory).finished[config.run_id]
    assert json.loads((results_directory / config.run_id / "config.json").read_text()) == config.model_dump(mode="json")
    assert record["config"] == config.model_dump(mode="json")
    assert record["schema_version"] == SCHEMA_VERSION
    assert (record["run_id"], record["point_id"], record["architecture"]) == (config.run_id, config.point_id, "based")
    hashes = config.data.hashes()
    assert record["train_hashes"] == hashes["train"]
    assert [part["test_hash"] for part in record["slices"]] == hashes["test"]
    assert [part["validation_hash"] for part in record["slices"]] == hashes["validation"]
    assert [part["test"]["num_examples"] for part in record["slices"]] == [40, 30]
    assert [part["validation"]["num_examples"] for part in record["slices"]] == [20, 20]
    assert [part["required_bits"] for part in record["slices"]] == [2 * 4, 4 * 4]
    # base_conv keeps 2 inputs of width 16; Based with 16 features 153 sums of 16 values and of the key.
    assert record["state"]["16"]["elements"] == record["state"]["24"]["elements"] == 2 * 16 + 153 * 17
    assert record["state"]["24"]["bytes"] == 4 * (2 * 16 + 153 * 17)
    assert sum(record["state"]["24"]["fields"].values()) == record["state"]["24"]["elements"]
    assert record["backends"] == {"0.base_conv": ["reference"], "1.based": ["reference"]}
    assert (record["dtype"], record["precision"], record["device"]["type"]) == ("float32", "fp32", "cpu")
    assert {"python", "torch", "triton", "numpy", "zoology"} <= set(record["versions"])
    assert record["epochs"] == record["selected_epoch"] == 1
    assert record["wall_seconds"] >= record["train_seconds"] > 0
    assert record["device_share"] == 1.0
    assert record["peak_memory_bytes"] > 1 << 20
    for part in record["slices"]:
        assert set(part["baselines"]) == {"majority", "position_only", "position_copy"}
        assert all(0 <= accuracy <= 1 for accuracy in part["baselines"].values())


def test_a_record_has_the_numbers_of_a_plain_training_run(results_directory, make_run):
    config = make_run(lr=1e-2, seed=1)
    record, outcome = store.scan(results_directory).finished[config.run_id], train(config)
    for part in record["slices"]:
        score = outcome.test[part["name"]]
        assert (part["test"]["accuracy"], part["test"]["stderr"]) == (score.accuracy, score.stderr)
    (line,) = (results_directory / config.run_id / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == outcome.epochs[0].loss


def test_a_directory_holds_no_leftovers(results_directory, make_run):
    assert {path.name for path in (results_directory / make_run(lr=1e-2).run_id).iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "result.json",
    }
    assert len(list((results_directory / "baselines").iterdir())) == 2  # one of each test slice, for all runs


def test_a_full_disk_leaves_no_half_written_result(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    store.write_atomically(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_atomically(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "old"


def test_a_result_that_cannot_be_written_is_a_failure_and_the_sweep_goes_on(
    tmp_path, runs, in_process_engine, watcher, monkeypatch
):
    write, full = store.write_atomically, runs[0].run_id

    def write_or_fail(path, text):
        if path.name == "result.json" and path.parent.name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(store, "write_atomically", write_or_fail)
    outcome = sweep(runs, tmp_path, in_process_engine(tmp_path), watcher)
    assert outcome.exit is Exit.FAILURES
    assert list(outcome.failures) == [full]
    assert "No space left" in outcome.failures[full]
    assert set(store.scan(tmp_path).finished) == {run.run_id for run in runs[1:]}
    # Its last epoch was kept: the next sweep has little to do for this run.
    assert (tmp_path / full / "checkpoint.pt").exists()


def test_a_run_whose_files_cannot_be_written_keeps_its_checkpoint(
    tmp_path, runs, in_process_engine, watcher, monkeypatch
):
    """Nor do baselines that cannot be kept fail a run."""
    folder = store.RunFolder(tmp_path, runs[0].run_id)
    folder.begin(runs[0].config)
    folder.checkpoint.write_bytes(b"x")
    write = store.write_atomically

    def write_or_fail(path, text):
        if path.parent.name in (runs[0].run_id, "baselines"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(store, "write_atomically", write_or_fail)
    monkeypatch.setattr(worker, "_known_floors", {})
    outcome = sweep(runs, tmp_path, in_process_engine(tmp_path), watcher)
    assert outcome.failures == {
        runs[0].run_id: "cannot write its files: [Errno 28] No space left on device",
    }
    assert folder.checkpoint.read_bytes() == b"x"
    assert set(outcome.records) == {run.run_id for run in runs[1:]}


def test_json_has_no_nan():
    assert store.to_json({"a": [math.nan, 1.5], "b": (math.inf,)}) == '{"a": [null, 1.5], "b": [null]}'


def test_baselines_are_computed_once_for_a_directory(tmp_path, make_run, monkeypatch):
    task = make_run().data.test[0].task
    monkeypatch.setattr(worker, "_known_floors", {})
    computed = []
    monkeypatch.setattr(worker.tasks, "baselines", lambda task, seed: computed.append(seed) or {"majority": 0.125})
    assert worker._floors(task, 0, str(tmp_path)) == worker._floors(task, 0, str(tmp_path)) == {"majority": 0.125}
    monkeypatch.setattr(worker, "_known_floors", {})  # as in another worker
    assert worker._floors(task, 0, str(tmp_path)) == {"majority": 0.125}
    assert computed == [0]
    worker._floors(task, 1, str(tmp_path))
    assert computed == [0, 1]
    (path, _) = sorted((tmp_path / "baselines").iterdir())
    path.write_text("{")
    monkeypatch.setattr(worker, "_known_floors", {})
    assert {worker._floors(task, seed, str(tmp_path))["majority"] for seed in (0, 1)} == {0.125}
    assert len(computed) == 3


# -- what a directory holds --------------------------------------------------------------------------------------


def finish(directory, name, **changes):
    """A minimal result.json."""
    record = {key: {} for key in store.REQUIRED} | {"run_id": name, "schema_version": SCHEMA_VERSION} | changes
    (directory / name).mkdir()
    (directory / name / "result.json").write_text(json.dumps(record))
    return directory / name / "result.json"


def test_broken_results_are_told_from_good_ones(tmp_path):
    good, truncated, foreign, moved, other = ("0" * 11 + digit for digit in "12345")
    finish(tmp_path, good)
    path = finish(tmp_path, truncated)
    path.write_text(path.read_text()[:-20])
    finish(tmp_path, foreign).write_text("[1, 2]")
    finish(tmp_path, moved, run_id=good)
    finish(tmp_path, other).write_text(json.dumps({"schema_version": SCHEMA_VERSION, "run_id": other}))
    (tmp_path / "notes").mkdir()
    found = store.scan(tmp_path)
    assert set(found.finished) == {good}
    assert "truncated" in found.broken[truncated]
    assert "schema_version" in found.broken[foreign]
    assert f"of run '{good}'" in found.broken[moved]
    assert "lacks point_id" in found.broken[other]


def test_another_schema_version_is_refused(tmp_path):
    finish(tmp_path, "0" * 12, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(store.ResultsError, match=f"schema version {SCHEMA_VERSION + 1}, this program reads"):
        store.scan(tmp_path)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(store.ResultsError, match=r"absent: No such file"):
        store.scan(tmp_path / "absent")


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(store.ResultsError, match=r"--out .*out cannot be written: File exists"):
        store.open_directory(tmp_path / "out")


def test_a_directory_without_space_is_refused(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(store.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(store.ResultsError, match="cannot be written: Read-only file system"):
        store.open_directory(tmp_path)


def test_two_sweeps_do_not_share_a_directory(tmp_path):
    with store.open_directory(tmp_path), pytest.raises(store.ResultsError, match="another sweep is writing there"):
        store.open_directory(tmp_path)
    with store.open_directory(tmp_path):
        pass


# -- the driver --------------------------------------------------------------------------------------------------


def test_finished_runs_are_not_done_again(tmp_path, runs, in_process_engine, watcher):
    sweep(runs[:2], tmp_path, in_process_engine(tmp_path), watcher)
    before = {run.run_id: (tmp_path / run.run_id / "result.json").stat().st_mtime_ns for run in runs[:2]}
    todo, failed = partition(runs, store.scan(tmp_path), None)
    assert (todo, failed) == ([runs[2]], [])
    engine = in_process_engine(tmp_path)
    assert sweep(todo, tmp_path, engine, watcher).exit is Exit.DONE
    assert engine.started == [runs[2].run_id]
    assert before == {run_id: (tmp_path / run_id / "result.json").stat().st_mtime_ns for run_id in before}


def test_failed_runs_wait_for_rerun(tmp_path, runs, in_process_engine, watcher):
    failure = Failure("error", "ValueError: no\n  good", "Traceback ...")
    engine = in_process_engine(tmp_path, {runs[1].run_id: [failure]})
    outcome = sweep(runs, tmp_path, engine, watcher)
    assert (outcome.exit, set(outcome.failures)) == (Exit.FAILURES, {runs[1].run_id})
    folder = tmp_path / runs[1].run_id
    assert (folder / "error.txt").read_text() == "ValueError: no good\n\nTraceback ...\n"
    assert not (folder / "result.json").exists()
    found = store.scan(tmp_path)
    assert found.failed == {runs[1].run_id: "ValueError: no good"}
    assert partition(runs, found, None) == ([], [runs[1]])
    assert partition(runs, found, "failed") == ([runs[1]], [])
    assert partition(runs, found, "all") == (runs, [])
    assert sweep([runs[1]], tmp_path, in_process_engine(tmp_path), watcher).exit is Exit.DONE
    assert not (folder / "error.txt").exists()
    assert not store.scan(tmp_path).failed


def test_a_truncated_result_is_done_again_and_others_are_left_alone(tmp_path, runs, in_process_engine, watcher):
    first = sweep(runs, tmp_path, in_process_engine(tmp_path), watcher).records
    path = tmp_path / runs[0].run_id / "result.json"
    path.write_text(path.read_text()[:1000])
    todo, _ = partition(runs, store.scan(tmp_path), None)
    assert todo == [runs[0]]
    again = sweep(todo, tmp_path, in_process_engine(tmp_path), watcher).records[runs[0].run_id]
    assert again["slices"] == first[runs[0].run_id]["slices"]
    assert set(store.scan(tmp_path).finished) == {run.run_id for run in runs}


def test_a_crash_is_tried_again_a_limited_number_of_times(tmp_path, runs, in_process_engine, watcher):
    crash = Failure("crashed", "the worker process was ended by SIGSEGV", "Fatal Python error")
    script = {runs[0].run_id: [crash], runs[1].run_id: [crash, crash]}
    engine = in_process_engine(tmp_path, script)
    outcome = sweep(runs, tmp_path, engine, watcher, retries=1)
    assert outcome.failures == {runs[1].run_id: "the worker process was ended by SIGSEGV (2 attempts)"}
    assert set(outcome.records) == {runs[0].run_id, runs[2].run_id}
    assert engine.started.count(runs[0].run_id) == engine.started.count(runs[1].run_id) == 2


def test_only_crashes_are_tried_again(tmp_path, runs, in_process_engine, watcher):
    script = {runs[0].run_id: [Failure("error", "no")], runs[1].run_id: [Failure("timed out", "slow")]}
    engine = in_process_engine(tmp_path, script)
    assert set(sweep(runs, tmp_path, engine, watcher, retries=3).failures) == set(script)
    assert sorted(engine.started) == sorted(run.run_id for run in runs)


def test_a_loss_that_is_not_finite_fails_the_run_and_names_the_step(tmp_path, make_run, in_process_engine, watcher):
    runs = plan.make_plan([make_run(lr=1e30), make_run()], "cpu")
    outcome = sweep(runs, tmp_path, in_process_engine(tmp_path), watcher)
    assert list(outcome.failures) == [runs[0].run_id]
    message = (tmp_path / runs[0].run_id / "error.txt").read_text()
    assert "epoch 1, step" in message
    assert "lr=1e+30" in message
    assert set(outcome.records) == {runs[1].run_id}


def test_a_stop_keeps_what_is_finished_and_says_why(tmp_path, runs, in_process_engine, watcher):
    engine = in_process_engine(tmp_path)
    outcome = sweep(
        runs, tmp_path, engine, watcher, stop=lambda: Exit.INTERRUPTED if watcher.progress.done == 1 else None
    )
    assert outcome.exit is Exit.INTERRUPTED
    assert engine.stopped
    assert watcher.seen[-1] == ("end",)
    assert len(store.scan(tmp_path).finished) == 1
    todo, failed = partition(runs, store.scan(tmp_path), None)
    assert (len(todo), failed) == (2, [])


def test_a_time_limit_ends_the_sweep_with_its_own_code(tmp_path, runs, in_process_engine, watcher):
    engine = in_process_engine(tmp_path)
    assert sweep(runs, tmp_path, engine, watcher, time_limit=1e-9).exit is Exit.TIME_LIMIT
    assert engine.started == []


def test_beginning_again_forgets_the_attempt_before(tmp_path, make_run):
    run = make_run()
    folder = store.RunFolder(tmp_path, run.run_id)

    def left():
        folder.begin(run)
        return sorted(path.name for path in folder.path.iterdir())

    assert left() == ["config.json"]
    folder.add_epoch({"epoch": 1})
    folder.fail("out of memory")
    for name in (".config.json.x.tmp", "checkpoint.pt", "result.json"):
        (folder.path / name).write_text("")
    assert left() == ["checkpoint.pt", "config.json", "metrics.jsonl"]
    folder.checkpoint.unlink()
    assert left() == ["config.json"]


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(tmp_path, make_run, in_process_engine, watcher):
    (run,) = plan.make_plan([make_run(epochs=3)], "cpu")
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = sweep([run], whole, in_process_engine(whole), watcher).records[run.run_id]
    folder = store.RunFolder(tmp_path, run.run_id)
    folder.begin(run.config)

    class CutOff(Exception):
        pass

    def cut(epoch):
        if epoch.epoch == 2:
            raise CutOff

    with pytest.raises(CutOff):
        train(run.config, checkpoint=folder.checkpoint, on_epoch=cut)
    record = sweep([run], tmp_path, in_process_engine(tmp_path), watcher).records[run.run_id]
    assert (record["resumed"], expected["resumed"]) == (True, False)
    assert record["slices"] == expected["slices"]
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert not folder.checkpoint.exists()


class ToldEngine:
    """Each start of a run is the next of `attempts`: epochs as (train seconds, share) that are reported, and an end.

    Those that begin with the epochs of one before go on from its checkpoint. An end is the share of the whole attempt
    with the record, a Failure, or None where the sweep is stopped.
    """

    slots, free, built = 1, 1, None

    def __init__(self, *attempts):
        self.attempts, self.cut_off = deque(attempts), False

    def fits(self, point_id, needs):
        return True

    def start(self, run_id, point_id, config_json, needs):
        self.run_id = run_id

    def poll(self, timeout):
        *epochs, end = self.attempts.popleft()
        events = [
            EpochDone(self.run_id, {"epoch": number, "train_seconds": seconds}, None, share)
            for number, (seconds, share) in enumerate(epochs, 1)
        ]
        self.cut_off = end is None
        if isinstance(end, Failure):
            events.append(Finished(self.run_id, None, end))
        elif end is not None:
            record = {"wall_seconds": 400.0, "execution": {"build_seconds": 0.0}}
            events.append(Finished(self.run_id, record, None, None, end))
        return events

    def stop(self):
        pass


CRASH = Failure("crashed", "the worker process was ended by SIGSEGV")


@pytest.mark.parametrize("end", [CRASH, None], ids=["crashed", "stopped"])
@pytest.mark.parametrize(
    ("attempts", "share"),
    [
        # 390 s beside three others, then 10 s alone: (390 / 4 + 10) / 400.
        ([[(195.1, 0.2), (194.9, 0.25)], [(195.1, 1.0), (194.9, 1.0), (10.0, 1.0), 1.0]], 0.26875),
        # The second epoch did not get into the checkpoint: what counts is what the first one's share was then.
        ([[(195.0, 0.2), (195.0, 0.25)], [(195.0, 1.0), (193.0, 1.0), (12.0, 1.0), 1.0]], (195 * 0.2 + 205) / 400),
        # Three attempts, one of which ended before it reported anything.
        ([[(100.0, 0.25)], [], [(100.0, 1.0), (100.0, 0.5)], [(100.0, 1.0), (100.0, 1.0), (200.0, 1.0), 1.0]], 0.6875),
        # All that was left was to score.
        ([[(100.0, 0.25)], [(100.0, 1.0), 1.0]], 0.25),
        # The checkpoint was of no use.
        ([[(100.0, 0.25)], [(101.0, 1.0), (99.0, 0.5), 0.5]], 0.5),
    ],
    ids=["resumed", "half", "three", "scored", "anew"],
)
def test_the_share_of_a_resumed_run_is_that_of_all_its_attempts(tmp_path, make_run, watcher, attempts, share, end):
    (run,) = plan.make_plan([make_run(epochs=3)], "cpu")
    *broken, last = attempts
    engine = ToldEngine(*([*epochs, end] for epochs in broken), last)
    folder = store.RunFolder(tmp_path, run.run_id)
    folder.path.mkdir()
    folder.checkpoint.write_bytes(b"x")
    for _ in attempts:
        stop = {"stop": lambda: Exit.INTERRUPTED if engine.cut_off else None}
        outcome = sweep([run], tmp_path, engine, watcher, retries=len(attempts), **stop)
        if not engine.attempts:
            break
        engine.cut_off = False
    record = outcome.records[run.run_id]
    assert record["device_share"] == pytest.approx(share)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, len(last)))
    assert lines[-1]["device_share"] == pytest.approx(share)


def test_metrics_end_where_a_line_was_cut_off(tmp_path, make_run):
    folder = store.RunFolder(tmp_path, make_run().run_id)
    assert folder.epochs() == []
    folder.begin(make_run())
    for number in (1, 2):
        folder.add_epoch({"epoch": number})
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "tr')
    assert folder.epochs() == [{"epoch": 1}, {"epoch": 2}]


def test_a_broken_checkpoint_costs_its_epochs_only(tmp_path, make_run, in_process_engine, watcher):
    (run,) = plan.make_plan([make_run()], "cpu")
    folder = store.RunFolder(tmp_path, run.run_id)
    folder.begin(run.config)
    folder.checkpoint.write_bytes(b"PK half of a file")
    record = sweep([run], tmp_path, in_process_engine(tmp_path), watcher).records[run.run_id]
    assert record["resumed"] is False


def test_a_run_that_could_not_use_its_checkpoint_is_not_said_to_be_resumed(
    tmp_path, make_run, in_process_engine, watcher
):
    (run,) = plan.make_plan([make_run(epochs=2)], "cpu")
    folder = store.RunFolder(tmp_path, run.run_id)
    folder.begin(run.config)
    train(run.config, checkpoint=folder.checkpoint, mode="static")  # another kind of loop than a worker's on a CPU
    record = sweep([run], tmp_path, in_process_engine(tmp_path), watcher).records[run.run_id]
    assert record["resumed"] is False


def test_rerun_all_starts_from_the_first_epoch(tmp_path, make_run, in_process_engine, watcher):
    (run,) = plan.make_plan([make_run()], "cpu")
    folder = store.RunFolder(tmp_path, run.run_id)
    folder.begin(run.config)
    train(run.config, checkpoint=folder.checkpoint)
    assert store.set_aside(tmp_path, [run.run_id]) == 0
    record = sweep([run], tmp_path, in_process_engine(tmp_path), watcher).records[run.run_id]
    assert record["resumed"] is False


def test_a_result_that_is_to_be_replaced_is_kept_until_it_is(tmp_path, make_run):
    run = make_run()
    folder = store.RunFolder(tmp_path, run.run_id)

    def files():
        return {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}

    folder.begin(run)
    folder.add_epoch({"epoch": "first"})
    folder.finish({"run": "first"})
    assert store.set_aside(tmp_path, [run.run_id, "0" * 12]) == 1
    assert files() == {"config.json", "earlier/result.json", "earlier/metrics.jsonl"}
    folder.begin(run)
    folder.add_epoch({"epoch": "second"})
    folder.fail("no more")
    # What broke off has no result: set aside again, it leaves the one before where it is.
    assert store.set_aside(tmp_path, [run.run_id]) == 1
    assert json.loads((folder.path / "earlier" / "result.json").read_text()) == {"run": "first"}
    assert json.loads((folder.path / "earlier" / "metrics.jsonl").read_text()) == {"epoch": "first"}
    folder.begin(run)
    folder.finish({"run": "third"})
    assert files() == {"config.json", "result.json"}


def test_results_that_cannot_be_set_aside_are_left_and_stop_the_sweep(tmp_path, make_run):
    run = make_run()
    folder = store.RunFolder(tmp_path, run.run_id)
    folder.begin(run)
    folder.finish({})
    (folder.path / "earlier").write_text("")
    with pytest.raises(store.ResultsError, match=r"cannot be set aside: .*File exists"):
        store.set_aside(tmp_path, [run.run_id])
    assert (folder.path / "result.json").exists()


@pytest.mark.parametrize("kind", ["crashed", "timed out", "out of memory", "error", "diverged"])
def test_what_came_from_outside_goes_on_where_it_was(tmp_path, make_run, in_process_engine, watcher, kind):
    """What broke a run from inside would break it again."""
    (run,) = plan.make_plan([make_run()], "cpu")
    engine = in_process_engine(tmp_path, {run.run_id: [Failure(kind, "no more")]})
    folder = store.RunFolder(tmp_path, run.run_id)
    folder.path.mkdir()
    folder.checkpoint.write_bytes(b"x")
    assert sweep([run], tmp_path, engine, watcher, retries=0).exit is Exit.FAILURES
    assert folder.checkpoint.exists() is (kind in ("crashed", "timed out", "out of memory"))


def test_an_error_forgets_the_checkpoint_and_a_crash_keeps_it(tmp_path, make_run):
    for kind, kept in (("error", False), ("crash", True)):
        folder = store.RunFolder(tmp_path, make_run().run_id)
        folder.begin(make_run())
        folder.checkpoint.write_bytes(b"x")
        folder.fail(kind, keep_checkpoint=kept)
        assert folder.checkpoint.exists() == kept


def test_a_record_states_the_versions_of_the_libraries_that_backends_need(monkeypatch):
    found = {"triton": "3.6.0", "flash-linear-attention": "0.6.0"}
    monkeypatch.setattr(worker.backends, "installed", found.get)
    assert worker.versions.__wrapped__().items() >= found.items()
    assert "mamba-ssm" not in worker.versions.__wrapped__()


def test_the_longest_runs_start_first(make_run):
    short, long, wide = plan.make_plan([make_run(epochs=1), make_run(epochs=9), make_run(num_examples=128)], "cpu")
    assert plan.longest_first([short, wide, long], lambda run: None) == [long, wide, short]
    seconds = {short.run_id: 3.0, long.run_id: 1.0, wide.run_id: 2.0}
    assert plan.longest_first([short, wide, long], lambda run: seconds[run.run_id]) == [short, wide, long]


def test_architectures_named_first_start_first_whatever_their_length(make_run):
    runs = [make_run(("base_conv", name), epochs=epochs) for name in ("attention", "based") for epochs in (1, 9)]
    planned = plan.ranked(plan.make_plan(runs, "cpu"), plan.choices("based,attention"))
    ordered = plan.longest_first(planned, lambda run: None)
    started = [(run.config.architecture, run.config.train.epochs) for run in ordered]
    assert started == [("based", 9), ("based", 1), ("attention", 9), ("attention", 1)]


def test_where_data_differ_labels_tell():
    runs = plan.load_sweep(ONE_LENGTH_AT_A_TIME, "smoke")
    labels = [run.label for run in plan.make_plan(runs, "cpu")]
    assert labels[0] == "attention d_model=16 seq_len=16 num_kv_pairs=2 lr=0.01 seed=0"
    assert len(set(labels)) == len(labels) == 12
    assert set(plan.data_words(runs[:6]).values()) == {""}  # all of one length


def test_labels_of_a_part_are_those_of_the_whole():
    runs, chosen = plan.load_sweep(ONE_LENGTH_AT_A_TIME, "smoke"), plan.choices("based seq_len=32")
    words = plan.data_words(runs)
    kept = plan.keep_only(runs, chosen, words)
    assert [(run.architecture, run.data.max_test_length) for run in kept] == [("based", 32)]
    (planned,) = plan.ranked(plan.make_plan(kept, "cpu", words=words), chosen)
    assert planned.point == "d_model=16 kernel_size=3 feature_dim=8 seq_len=32 num_kv_pairs=4"


class InstantEngine:
    """Runs end at once, having taken the seconds that `walls` says, by run id."""

    slots, built = 1, None

    def __init__(self, walls):
        self.walls, self.started, self.ended = walls, [], True

    @property
    def free(self):
        return int(self.ended)

    def fits(self, point_id, needs):
        return True

    def start(self, run_id, point_id, config_json, needs):
        self.started.append(run_id)
        self.ended = False

    def poll(self, timeout):
        self.ended = True
        record = {"wall_seconds": self.walls[self.started[-1]], "execution": {"build_seconds": 0.0}}
        return [Finished(self.started[-1], record, None)]

    def stop(self):
        pass


def test_what_is_longest_is_learnt_on_the_way(tmp_path, make_run, watcher):
    """By operations the short attention is longer than the short Based; the first Based that was timed says no."""
    attention, based = ("base_conv", "attention"), ("base_conv", "based")
    runs = plan.make_plan(
        [make_run(based, epochs=9), make_run(attention, epochs=20), make_run(attention, epochs=6), make_run(based)],
        "cpu",
    )
    longest, second, third, last = plan.longest_first(runs, lambda run: None)
    assert [run.config.architecture for run in (longest, second, third, last)] == [
        "attention", "based", "attention", "based",
    ]  # fmt: skip
    rates = {"attention": 1e-9, "based": 1e-7}
    engine = InstantEngine({run.run_id: run.cost * rates[run.config.architecture] for run in runs})
    sweep(runs, tmp_path, engine, watcher)
    assert engine.started == [longest.run_id, second.run_id, last.run_id, third.run_id]


def test_estimates_learn_from_the_point_then_the_architecture_then_any(make_run):
    attention, other_rate, longer, based = plan.make_plan(
        [make_run(), make_run(lr=0.5), make_run(epochs=4), make_run(("base_conv", "based"))], "cpu"
    )
    estimate = plan.Estimate()
    assert estimate.seconds(attention) is None
    estimate.observe(attention, 3.0)
    assert estimate.seconds(other_rate) == 3.0
    assert estimate.seconds(longer) == pytest.approx(12.0)
    assert estimate.seconds(based) == pytest.approx(3.0 * based.cost / attention.cost)


def test_time_left_is_known_after_a_run(tmp_path, runs, in_process_engine, watcher):
    left = []
    watcher.tick = lambda: left.append(watcher.progress.seconds_left())
    sweep(runs, tmp_path, in_process_engine(tmp_path), watcher)
    assert left[0] is None
    finished = [index for index, seen in enumerate(watcher.seen) if seen[0] == "finished"]
    assert all(seconds > 0 for seconds in left[finished[0] + 1 : finished[-1] - 1])


# -- the plan ----------------------------------------------------------------------------------------------------


def experiment(tmp_path, text):
    path = tmp_path / "experiment.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", r"experiment.py failed at line 1: ModuleNotFoundError"),
        ("x = (", r"experiment.py failed at line 1: SyntaxError"),
        ("x = 1", r"defines no function sweep\(scale\)"),
        ("def sweep(scale):\n    return 1 / 0", r"sweep\('smoke'\) failed at line 2: ZeroDivisionError"),
        ("def sweep(scale):\n    return None", r"sweep\('smoke'\) returned NoneType, not a list of RunConfig"),
        ("def sweep(scale):\n    return [{}]", r"sweep\('smoke'\)\[0\] is of type dict, not RunConfig"),
        ("def sweep(scale):\n    return []", r"sweep\('smoke'\) returned an empty list"),
    ],
)
def test_a_bad_experiment_file_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(PlanError, match=message):
        plan.load_sweep(experiment(tmp_path, text), "smoke")


def test_a_missing_experiment_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"absent\.py does not exist"):
        plan.load_sweep(tmp_path / "absent.py", "smoke")


def test_duplicate_runs_are_refused(make_run):
    with pytest.raises(PlanError, match=r"1 runs more than once: attention d_model=16 lr=0.01 seed=0 \(2 times\)"):
        plan.make_plan([make_run(), make_run(lr=1e-3), make_run()], "cpu")


def test_a_model_that_cannot_be_built_stops_the_plan(make_run):
    run = make_run()
    bad = run.model.layers[1].model_copy(update={"options": {"num_heads": 5}})
    run = run.model_copy(update={"model": run.model.model_copy(update={"layers": (bad,)})})
    with pytest.raises(PlanError, match=r"attention \(d_model=16 num_heads=5\): num_heads=5 does not divide"):
        plan.make_plan([make_run(), run], "cpu")


def test_a_mixer_without_a_state_stops_the_plan(make_run, monkeypatch):
    monkeypatch.delattr(architectures.registry.get("attention").cls, "init_state")
    with pytest.raises(PlanError, match=r"attention \(d_model=16\): Attention defines no init_state"):
        plan.make_plan([make_run()], "cpu")


def test_a_mistake_in_a_mixer_stops_the_plan_and_is_located(make_run, monkeypatch):
    def broken(self, d_model, **options):
        self.no_such_attribute  # noqa: B018

    monkeypatch.setattr(architectures.registry.get("attention").cls, "__init__", broken)
    told = r"attention \(d_model=16\): AttributeError: 'Attention' object has no attribute .*test_runner\.py:\d+\)$"
    with pytest.raises(PlanError, match=told):
        plan.make_plan([make_run()], "cpu")


def test_a_backend_that_cannot_run_here_stops_the_plan(make_run):
    run = make_run(("base_conv", "based"))
    named = run.model.layers[1].model_copy(update={"options": {"backend": "triton"}})
    run = run.model_copy(update={"model": run.model.model_copy(update={"layers": (named,)})})
    with pytest.raises(PlanError, match="backend='triton' for Based: needs a CUDA device") as caught:
        plan.make_plan([run], "cpu")
    assert isinstance(caught.value.__cause__, BackendError)


def test_a_backend_is_planned_for_in_the_precision_of_the_run(make_run, monkeypatch):
    """fla's kernels of Kimi Delta Attention do float32 in TF32, which is up to the run."""
    monkeypatch.setattr(plan, "check_precision", lambda *_: None)
    monkeypatch.setattr(backends, "missing", lambda backend: None)

    def planned(precision):
        run = make_run(("base_conv", "kda"), precision=precision)
        named = run.model.layers[1].model_copy(update={"options": {"backend": "fla"}})
        return plan.make_plan(
            [run.model_copy(update={"model": run.model.model_copy(update={"layers": (named,)})})], "cuda"
        )

    before = torch.get_float32_matmul_precision()
    with pytest.raises(PlanError, match=r"backend='fla' for KimiDeltaAttention: .* in TF32: allowed are bfloat16"):
        planned("fp32")
    assert [run.config.train.precision for run in (*planned("tf32"), *planned("bf16"))] == ["tf32", "bf16"]
    assert torch.get_float32_matmul_precision() == before


def test_a_precision_that_the_device_lacks_stops_the_plan(make_run):
    with pytest.raises(PlanError, match=r"train\.precision='tf32'"):
        plan.make_plan([make_run(precision="tf32")], "cpu")


def test_models_with_nothing_to_do_are_not_built(make_run, monkeypatch):
    first, second = make_run(), make_run(("base_conv", "based"))
    done, todo = plan.make_plan([first, second], "cpu", finished={first.run_id})
    assert (done.size, done.cost) == (None, 0.0)
    assert todo.size.parameters > 0


def test_sizes_are_those_of_the_model(make_run):
    (run,) = plan.make_plan([make_run()], "cpu")
    model = train(run.config).model
    assert run.size.parameters == model.num_parameters()
    assert run.size.state_bytes == {length: model.state_bytes(length) for length in (16, 24)}


def test_only_keeps_architectures_and_lists_those_there_are(make_run):
    runs = [make_run(), make_run(("base_conv", "based"))]
    assert plan.keep_only(runs, plan.choices("based")) == [runs[1]]
    with pytest.raises(PlanError, match="--only mamba: not in this sweep, which has attention, based"):
        plan.keep_only(runs, plan.choices("based,mamba"))
    with pytest.raises(PlanError, match="--only names no architecture: this sweep has attention, based"):
        plan.keep_only(runs, plan.choices(", ,"))


def test_only_takes_words_of_labels_and_does_first_what_it_names_first(make_run):
    wide = {"layers": (layer("based", feature_dim=16),)}
    small, other = make_run(("attention", "based")), make_run(("based",), lr=1e-3)
    large = other.model_copy(update={"model": other.model.model_copy(update=wide)})
    runs = [small, other, large, make_run(("attention",), seed=1)]

    def kept(only):
        chosen = plan.choices(only)
        planned = plan.ranked(plan.make_plan(plan.keep_only(runs, chosen), "cpu"), chosen)
        return [runs.index(run.config) for run in sorted(planned, key=lambda run: run.rank)]

    assert kept("based feature_dim=16") == [2]
    assert kept("based lr=0.001,  based") == [1, 2, 0]
    assert kept("attention seed=1,based d_model=16 lr=0.01") == [3, 0]
    in_labels = "d_model=16, feature_dim=16, lr=0.001, lr=0.01, seed=0"
    for only in ("based lr=0.1", "attention,based lr=0.01 feature_dim=16", "based feature_dim=1", "based seed=1"):
        with pytest.raises(PlanError, match=f"no run has all of that; in labels are {in_labels}"):
            kept(only)


def test_seeds_replace_those_of_the_experiment(make_run):
    runs = plan.with_seeds([make_run(seed=4), make_run(seed=5), make_run(lr=1e-3)], 3)
    assert [(run.train.lr, run.seed) for run in runs] == [(lr, seed) for lr in (1e-2, 1e-3) for seed in range(3)]
    with pytest.raises(PlanError, match="--seeds 0: must be at least 1"):
        plan.with_seeds(runs, 0)


def test_the_scale_says_why_and_how_to_take_another():
    assert plan.choose_scale(None, has_gpu=False)[0] == "laptop"
    scale, why = plan.choose_scale(None, has_gpu=True)
    assert scale == "paper"
    assert "there is a GPU" in why
    assert "--scale smoke or --scale laptop" in why
    assert plan.choose_scale("smoke", has_gpu=True)[0] == "smoke"
    assert "made for a GPU" in plan.choose_scale("paper", has_gpu=False)[1]
    assert "made for a GPU" not in plan.choose_scale("paper", has_gpu=True)[1]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), ("10m", 600), ("1.5h", 5400), ("1d", 86400), ("1:30:00", 5400)]
)
def test_durations(text, seconds):
    assert plan.parse_duration(text, "--timeout") == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5", "0", "inf", "nan", "5 apples"])
def test_bad_durations_are_refused(text):
    with pytest.raises(PlanError, match=r"--timeout .*must be a positive time"):
        plan.parse_duration(text, "--timeout")


def test_run_ids_follow_every_part_of_the_config(make_run):
    run = make_run()
    different = [
        make_run(lr=1e-3),
        make_run(seed=1),
        make_run(epochs=2),
        make_run(("base_conv", "based")),
        make_run(num_examples=32),
        run.model_copy(update={"architecture": "another"}),
        run.model_copy(update={"model": run.model.model_copy(update={"d_model": 8})}),
        run.model_copy(update={"data": run.data.model_copy(update={"seed": 7})}),
    ]
    assert len({run.run_id, *(other.run_id for other in different)}) == 1 + len(different)
    assert make_run().run_id == run.run_id
    points = [run.point_id == other.point_id for other in different]
    assert points == [True, True] + [False] * 6
    assert run.point_id == run.model_copy(update={"train": TrainConfig(lr=9.0, epochs=1)}).point_id
