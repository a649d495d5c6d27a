"""Worker processes on a real GPU: compiled once per model and worker, packed by memory, too large for the device."""

import pytest

from zoology.config import DataConfig, Slice
from zoology.engines.local import LocalEngine
from zoology.runner import plan, worker
from zoology.runner.driver import Exit, run_sweep
from zoology.runner.memory import RESERVED, MemoryEstimate
from zoology.tasks import MQAR

pytestmark = pytest.mark.gpu


@pytest.fixture
def sweep(tmp_path, watcher):
    """Run configs on the first GPU, `jobs` at once; returns the outcome and the estimates that were learnt."""

    def run(configs, jobs, **options):
        runs, memory = plan.make_plan(configs, "cuda:0"), MemoryEstimate()
        setups = [worker.Setup("cuda:0", 4, str(tmp_path), (), None, None)] * jobs
        engine = LocalEngine(setups, memory=plan.device_memory(["cuda:0"]))
        outcome = run_sweep(runs, engine, tmp_path, watcher, total=len(runs), memory=memory, **options)
        return runs, outcome, memory

    return run


def test_rates_of_a_model_share_its_compiled_step_and_what_it_takes_is_measured(sweep, make_run):
    configs = [make_run(layers, lr=lr) for layers in (("base_conv", "attention"), ("base_conv", "based"))
               for lr in (1e-3, 3e-3, 1e-2)]  # fmt: skip
    runs, outcome, memory = sweep(configs, 2)
    assert (outcome.exit, outcome.failures) == (Exit.DONE, {})
    for point in {run.point_id for run in runs}:
        of_point = [outcome.records[run.run_id] for run in runs if run.point_id == point]
        built = [record["execution"]["build_seconds"] for record in of_point if not record["execution"]["reused"]]
        # At most one other worker helped with it when it had nothing else to do.
        assert 1 <= len(built) <= 2
        assert min(built) > 0
        assert {record["execution"]["mode"] for record in of_point} == {"compiled graph"}
        for run, record in ((run, outcome.records[run.run_id]) for run in runs if run.point_id == point):
            assert record["peak_memory_bytes"] <= memory.bytes(run)
            assert record["train_seconds"] < record["wall_seconds"]
    print({run.label: (memory.bytes(run), RESERVED * outcome.records[run.run_id]["peak_memory_bytes"]) for run in runs})
    print([(run.label, outcome.records[run.run_id]["execution"]) for run in runs])


def test_a_run_that_is_too_large_for_the_gpu_fails_and_the_others_do_not(sweep, make_run, watcher):
    """The scores of its attention take 275 GB, which no guess foresees: it is tried beside others first, then alone."""
    small = make_run()
    part = Slice(task=MQAR(vocab_size=32, seq_len=2048, num_kv_pairs=4), num_examples=1024, name="huge")
    scores = small.model.layers[1].model_copy(update={"options": {"backend": "reference", "num_heads": 16}})
    huge = small.model_copy(
        update={
            "model": small.model.model_copy(update={"layers": (small.model.layers[0], scores)}),
            "data": DataConfig(
                train=[part], test=[part.model_copy(update={"num_examples": 8})], batch_size=1024, num_validation=8
            ),
        }
    )
    runs, outcome, _ = sweep([huge, small, make_run(lr=1e-3)], 2)
    assert list(outcome.failures) == [runs[0].run_id]
    assert "out of memory with " in outcome.failures[runs[0].run_id]
    assert "Tried to allocate" in outcome.failures[runs[0].run_id]
    assert set(outcome.records) == {run.run_id for run in runs[1:]}
    assert {seen[1].partition(": ")[0] for seen in watcher.seen if seen[0] == "note"} <= {runs[0].label}
