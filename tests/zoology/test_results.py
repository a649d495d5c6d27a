"""The table of results, and what is selected from it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import architectures
from architectures import registry
from zoology import results
from zoology.config import SCHEMA_VERSION, RunConfig
from zoology.runner.store import ResultsError

ROOT = Path(__file__).parents[2]


def table(rows):
    """A results table from (point, rate, seed, {slice: (validation, test)})."""
    return pd.DataFrame(
        {
            "run_id": f"{point}-{rate}-{seed}",
            "point_id": point,
            "architecture": point[0],
            "point": point,
            "lr": rate,
            "seed": seed,
            "state_seq_len": 64,
            "state_elements": 10,
            "state_bytes": 40 * int(point[1:]),
            "slice_state_bytes": 40,
            "parameters": 5,
            "validation_mean": np.mean([validation for validation, _ in slices.values()]),
            "slice": name,
            "seq_len": 64,
            "required_bits": 8 * len(name),
            "accuracy": test,
            "validation_accuracy": validation,
            "test_hash": name,
        }
        for point, rate, seed, slices in rows
        for name, (validation, test) in slices.items()
    )


def one(selected, point, name=results.MEAN):
    (row,) = selected[(selected["point_id"] == point) & (selected["slice"] == name)].to_dict("records")
    return row


# -- loading -----------------------------------------------------------------------------------------------------


def test_one_row_for_each_run_and_slice(results_directory, make_run):
    frame = results.load(results_directory)
    assert len(frame) == 8 * 2
    config = make_run(("base_conv", "based"), lr=1e-2, seed=1)
    rows = frame[frame["run_id"] == config.run_id].set_index("slice")
    assert list(rows.index) == ["short", "long"]
    record = json.loads((results_directory / config.run_id / "result.json").read_text())
    for part in record["slices"]:
        row = rows.loc[part["name"]]
        assert (row["accuracy"], row["stderr"]) == (part["test"]["accuracy"], part["test"]["stderr"])
        assert (row["num_examples"], row["seq_len"]) == (part["test"]["num_examples"], part["seq_len"])
        assert row["validation_accuracy"] == part["validation"]["accuracy"]
        assert row["baseline_position_copy"] == part["baselines"]["position_copy"]
        assert row["required_bits"] == 4 * part["task"]["num_kv_pairs"]
    mean = np.mean([part["validation"]["accuracy"] for part in record["slices"]])
    assert rows["validation_mean"].tolist() == [mean, mean]
    assert rows["architecture"].tolist() == ["based"] * 2
    assert rows["lr"].tolist() == [1e-2] * 2
    assert rows["state_bytes"].tolist() == [4 * (2 * 16 + 153 * 17)] * 2
    assert rows["backends"].tolist() == ["reference"] * 2


def test_time_on_a_shared_device_counts_by_its_share(results_directory):
    record = results.load_records(results_directory)[0] | {"wall_seconds": 100.0}
    before = {key: value for key, value in record.items() if key != "device_share"}
    frame = results.from_records([record | {"device_share": 0.25}, before])
    assert frame["device_seconds"].tolist() == [25.0, 25.0, 100.0, 100.0]


def test_time_as_if_alone_leaves_the_wait_for_turns_out(results_directory):
    times = {"train_seconds": 80.0, "wall_seconds": 100.0, "device_share": 0.25}
    record = results.load_records(results_directory)[0] | times
    told = record | {"waited_seconds": 70.0}
    without_turns = record | {"waited_seconds": None}
    older = {key: value for key, value in record.items() if key != "waited_seconds"}
    frame = results.from_records([told, without_turns, older])
    assert frame["alone_seconds"].tolist()[::2] == [10.0, 20.0, 20.0]  # a row for each of two slices
    assert frame["device_seconds"].tolist()[::2] == [15.0, 25.0, 25.0]


def test_state_that_grows_is_reported_at_both_lengths(results_directory, make_run):
    frame = results.load(results_directory)
    rows = frame[frame["run_id"] == make_run(lr=1e-2).run_id].set_index("slice")
    tail = 4 * 2 * 16
    assert rows["state_bytes"].tolist() == [tail + 4 * 2 * 24 * 16] * 2
    assert rows["slice_state_bytes"].to_dict() == {"short": tail + 4 * 2 * 16 * 16, "long": tail + 4 * 2 * 24 * 16}


def test_directories_without_results_are_refused(tmp_path):
    with pytest.raises(ResultsError, match="holds no finished run"):
        results.load(tmp_path)
    with pytest.raises(ResultsError, match="No such file"):
        results.load(tmp_path / "absent")


def test_another_schema_version_is_refused(results_directory, tmp_path):
    directory = shutil.copytree(results_directory, tmp_path / "copy")
    path = next(directory.glob("*/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(ResultsError, match="schema version"):
        results.load(directory)


def test_a_truncated_result_is_left_out(results_directory, tmp_path):
    directory = shutil.copytree(results_directory, tmp_path / "copy")
    path = next(directory.glob("*/result.json"))
    path.write_text(path.read_text()[:100])
    (directory / ("f" * 12)).mkdir()
    (directory / ("f" * 12) / "error.txt").write_text("ValueError: no\n\nTraceback\n")
    with pytest.warns(UserWarning, match=f"left out: that of run {path.parent.name} is not valid JSON"):
        frame = results.load(directory)
    assert frame["run_id"].nunique() == 7
    assert path.parent.name not in set(frame["run_id"])
    assert results.failures(directory).to_dict("records") == [{"run_id": "f" * 12, "error": "ValueError: no"}]


# -- selection ---------------------------------------------------------------------------------------------------


def test_rates_are_selected_on_validation_and_reported_on_test():
    frame = table(
        [
            ("a1", 0.1, 0, {"x": (0.5, 0.9), "yy": (0.5, 0.9)}),
            ("a1", 0.2, 0, {"x": (0.9, 0.3), "yy": (0.3, 0.1)}),  # best validation mean, worst test
            ("a1", 0.3, 0, {"x": (0.8, 0.9), "yy": (0.3, 0.9)}),
        ]
    )
    selected = results.select(frame)
    assert one(selected, "a1")["lr"] == 0.2
    assert one(selected, "a1")["accuracy"] == pytest.approx(0.2)
    assert one(selected, "a1")["validation_accuracy"] == pytest.approx(0.6)
    assert (one(selected, "a1", "x")["accuracy"], one(selected, "a1", "yy")["accuracy"]) == (0.3, 0.1)


def test_seeds_are_averaged_before_a_rate_is_selected():
    rows = [("a1", 0.1, seed, {"x": (value, value)}) for seed, value in enumerate((0.4, 0.5, 0.6))]
    rows += [("a1", 0.2, seed, {"x": (value, value)}) for seed, value in enumerate((0.9, 0.1, 0.1))]
    row = one(results.select(table(rows)), "a1")
    assert (row["lr"], row["num_seeds"]) == (0.1, 3)
    assert (row["accuracy"], row["worst"], row["best"]) == (pytest.approx(0.5), 0.4, 0.6)


def test_a_rate_with_fewer_seeds_does_not_compete():
    rows = [("a1", 0.1, seed, {"x": (0.4, 0.4)}) for seed in range(3)] + [("a1", 0.2, 0, {"x": (0.9, 0.9)})]
    assert one(results.select(table(rows)), "a1")["lr"] == 0.1


def test_of_equal_rates_the_smaller_one_is_taken():
    rows = [("a1", rate, 0, {"x": (0.5, 0.5)}) for rate in (0.3, 0.1, 0.2)]
    assert one(results.select(table(rows)), "a1")["lr"] == 0.1


@pytest.mark.parametrize(
    ("rates", "best", "at_edge"),
    [((1, 2, 3), 2, False), ((1, 2, 3), 1, True), ((1, 2, 3), 3, True), ((1, 2), 1, True), ((1,), 1, False)],
)
def test_a_rate_at_the_edge_of_its_grid_is_flagged(rates, best, at_edge):
    rows = [("a1", float(rate), 0, {"x": (float(rate == best), 0.5)}) for rate in rates]
    # The grid of another point is no grid of this one.
    rows += [("b1", rate, 0, {"x": (0.5, 0.5)}) for rate in (0.01, 100.0)]
    assert one(results.select(table(rows)), "a1")["lr_at_edge"] is at_edge


def test_points_are_ordered_by_architecture_and_state():
    rows = [(point, 0.1, 0, {"x": (0.5, 0.5)}) for point in ("b2", "a3", "b1", "a2")]
    assert results.select(table(rows))["point_id"].drop_duplicates().tolist() == ["a2", "a3", "b1", "b2"]


def test_runs_on_different_data_are_not_averaged():
    frame = table([("a1", 0.1, 0, {"x": (0.5, 0.5)}), ("a2", 0.1, 0, {"x": (0.5, 0.5), "yy": (0.5, 0.5)})])
    with pytest.raises(ValueError, match="2 different data sets"):
        results.select(frame)
    parts = results.by_test_data(frame)
    assert [part["point_id"].unique().tolist() for part in parts] == [["a1"], ["a2"]]
    assert [len(results.select(part)) for part in parts] == [2, 3]


@pytest.mark.parametrize("count", [2, 3, 10, 31, 60])
def test_the_interval_is_that_of_student(count):
    values = np.random.default_rng(0).uniform(0.4, 0.6, count)
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    found = results.spread(values)
    assert found["low"] == pytest.approx(max(low, 0), abs=1e-3 if count > 31 else 1e-5)
    assert found["high"] == pytest.approx(min(high, 1), abs=1e-3 if count > 31 else 1e-5)
    assert found["half"] == pytest.approx((high - low) / 2, abs=1e-3 if count > 31 else 1e-5)
    assert found["accuracy"] == pytest.approx(values.mean())


def test_one_seed_has_no_interval():
    found = results.spread([0.25])
    assert (found["accuracy"], found["worst"], found["best"], found["num_seeds"]) == (0.25, 0.25, 0.25, 1)
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])
    assert math.isnan(found["half"])


def test_intervals_end_at_0_and_1():
    assert results.spread([0.0, 1.0])["low"] == 0.0
    assert results.spread([0.0, 1.0])["high"] == 1.0
    assert results.spread([0.0, 1.0])["half"] == pytest.approx(12.7062 * 0.5)


def test_slices_are_ordered_by_what_they_demand():
    frame = table([("a1", 0.1, 0, {"zzz": (0.5, 0.5), "x": (0.5, 0.5), "yy": (0.5, 0.5)})])
    frame["seq_len"] = frame["slice"].map({"x": 64, "yy": 32, "zzz": 16})
    assert results.slice_names(frame) == ["x", "yy", "zzz"]
    assert results.slice_names(frame.assign(required_bits=1.0)) == ["zzz", "yy", "x"]


def test_the_slice_table_has_a_row_for_each_point(results_directory):
    frame = results.load(results_directory)
    wide = results.slice_table(frame)
    selected = results.select(frame)
    assert wide["architecture"].tolist() == ["attention", "based"]
    for architecture, row in wide.set_index("architecture").iterrows():
        for name in ("mean", "short", "long"):
            expected = selected[(selected["architecture"] == architecture) & (selected["slice"] == name)]
            assert row[name] == expected["accuracy"].item()
        assert row["mean"] == pytest.approx((row["short"] + row["long"]) / 2)
        assert row["num_seeds"] == 2


COMMITTED = sorted({path.parents[1] for path in (ROOT / "experiments" / "results").glob("*/*/result.json")})


@pytest.fixture
def architectures_of_experiments():
    """What `--architectures` registers for the experiments that have mixers of their own."""
    added = architectures.load_file(ROOT / "experiments" / "own_weight.py")
    yield
    for name in added:
        registry._entries.pop(name, None)


@pytest.mark.parametrize("directory", COMMITTED, ids=lambda path: path.name)
def test_committed_records_still_have_the_identity_of_their_runs(directory, architectures_of_experiments):
    """Else a sweep that goes on from them would do them again."""
    records = results.load_records(directory)
    assert len(records) == len(list(directory.glob("*/result.json")))
    for record in records:
        config = RunConfig(**record["config"])
        assert (config.run_id, config.point_id) == (record["run_id"], record["point_id"])
        assert config.model_dump(mode="json") == record["config"]
