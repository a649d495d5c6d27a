"""More seeds where they count, and sweeps whose runs are tested on different data."""

import pytest
from rich.console import Console

from zoology import results
from zoology.run import report, with_best_seeds
from zoology.runner.driver import Exit
from zoology.runner.plan import PlanError, make_plan


@pytest.fixture
def runs(make_run):
    return [make_run(("attention",), lr=rate) for rate in (1e-3, 1e-2)] + [make_run(("base_conv",), lr=1e-3)]


def finished(make_record, runs, accuracies):
    return {run.run_id: make_record(run, value) for run, value in zip(runs, accuracies)}


def test_seeds_are_added_at_the_best_rate(runs, make_record):
    more = with_best_seeds(runs, finished(make_record, runs, [0.9, 0.4, 0.5]), 3)
    added = [(run.architecture, run.train.lr, run.seed) for run in more[3:]]
    assert more[:3] == runs
    assert added == [("attention", 1e-3, 1), ("attention", 1e-3, 2), ("base_conv", 1e-3, 1), ("base_conv", 1e-3, 2)]


def test_a_model_with_a_rate_to_do_gets_no_more_seeds_yet(runs, make_record):
    more = with_best_seeds(runs, finished(make_record, runs, [0.9]), 3)
    assert more == runs


def test_a_rate_that_failed_is_not_waited_for(runs, make_record):
    done = finished(make_record, [runs[1], runs[2]], [0.4, 0.5])
    assert with_best_seeds(runs, done, 2, failed=[runs[2].run_id])[3:] == [runs[2].model_copy(update={"seed": 1})]
    added = with_best_seeds(runs, done, 2, failed=[runs[0].run_id])[3:]
    assert [(run.architecture, run.train.lr, run.seed) for run in added] == [
        ("attention", 1e-2, 1), ("base_conv", 1e-3, 1),
    ]  # fmt: skip
    assert with_best_seeds(runs, {}, 2, failed=[run.run_id for run in runs]) == runs


def test_added_seeds_do_not_change_the_choice(runs, make_record):
    done = finished(make_record, runs, [0.9, 0.4, 0.5])
    more = with_best_seeds(runs, done, 3)
    done |= finished(make_record, more[3:], [0.1] * 4)
    assert with_best_seeds(runs, done, 3) == more
    (row,) = (
        results.select(results.from_records(done.values()))
        .query("architecture == 'attention' & slice == 'mean'")
        .itertuples()
    )
    assert (row.lr, row.num_seeds, row.accuracy) == (1e-3, 3, pytest.approx((0.9 + 0.1 + 0.1) / 3))


def test_a_wrong_number_is_refused(runs):
    with pytest.raises(PlanError, match="--best-seeds 0: must be at least 1"):
        with_best_seeds(runs, {}, 0)


def test_each_set_of_test_data_gets_a_table_and_a_figure(runs, make_record, tmp_path):
    longer = [run.model_copy(update={"data": run.data.model_copy(update={"test": run.data.test[1:]})}) for run in runs]
    plan = make_plan([*runs, *longer], "cpu")
    done = finished(make_record, [*runs, *longer], [0.9, 0.4, 0.5, 0.6, 0.7, 0.8])
    parts = results.by_test_data(results.from_records(done.values()))
    assert [part["run_id"].nunique() for part in parts] == [3, 3]
    console = Console(width=200, record=True, quiet=True)
    points = {run.point_id for run in plan}
    assert report(console, plan, tmp_path, done, {}, Exit.DONE, points=points, redraw=True) == Exit.DONE
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"tradeoff-{index}.{kind}" for index in (1, 2) for kind in ("png", "svg")
    ]
