"""How a sweep scales over the GPUs of a machine: the same work for each, first on one of them, then on all.

    python experiments/benchmark_scaling.py [--jobs N] [--epochs N] [--precision bf16] [--json FILE]

The work of a GPU: attention and Based, d_model 128, on the data of Based, Fig. 2, with a seed of the GPU's own, at
four learning rates. Every run has all its epochs. Workers are started, and build what they train, in a sweep of one
epoch before; training, validation, scoring and files count. What to look at is the ratio of runs per second: the
target on four GPUs is 3.5.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from zoology.config import RunConfig
from zoology.engines.local import LocalEngine
from zoology.run import JOBS_PER_GPU, git_commit, known_from, worker_setups
from zoology.runner import plan
from zoology.runner.driver import run_sweep
from zoology.runner.progress import PlainView
from zoology.runner.worker import versions

MEMBERS = {"paper": {"attention": (128, {}), "based": (128, {"feature_dim": 16})},
           "smoke": {"attention": (32, {}), "based": (32, {"feature_dim": 8})}}  # fmt: skip
SWEEP = Path(__file__).with_name("mqar_sweep.py")


class KeptWorkers(LocalEngine):
    """Workers that outlive a sweep. All start here: that changes the environment, which several threads must not."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for worker in self._workers:
            worker._spawn()

    def on(self, devices: list[str]) -> KeptWorkers:
        """Those on some devices."""
        some = copy.copy(self)
        some._workers = [worker for worker in self._workers if worker.setup.device in devices]
        return some

    def stop(self) -> None:
        """Called at the end of a sweep."""

    def end(self) -> None:
        super().stop()


def work(scale: str, seeds: list[int], epochs: int, precision: str) -> list[RunConfig]:
    """The members of the sweep at all learning rates, with each seed."""
    found = []
    for run in plan.load_sweep(SWEEP, scale):
        width, options = MEMBERS[scale].get(run.architecture, (0, {}))
        if run.model.d_model == width and options.items() <= run.model.layers[-1].options.items():
            train = run.train.model_copy(update={"epochs": epochs, "stop_accuracy": None})
            for seed in seeds:
                found.append(run.model_copy(update={"seed": seed, "train": train}))
    return plan.with_precision(found, precision)


def timed(configs: list[RunConfig], engine: KeptWorkers, devices: list[str], folder: Path) -> dict:
    """Seconds of a sweep on these devices, and of its runs; raises RuntimeError if one failed."""
    runs, engine = plan.make_plan(configs, devices[0]), engine.on(devices)
    estimate, memory = known_from(runs, {})
    start = time.perf_counter()
    outcome = run_sweep(runs, engine, folder, PlainView(Console()), total=len(runs), estimate=estimate, memory=memory)
    seconds = time.perf_counter() - start
    if outcome.failures:
        raise RuntimeError(f"{len(outcome.failures)} runs failed: {next(iter(outcome.failures.values()))}")
    records = outcome.records.values()
    return {
        "devices": devices,
        "device": next(iter(records))["device"]["name"],
        "workers": engine.slots,
        "runs": len(runs),
        "seconds": seconds,
        "runs_per_second": len(runs) / seconds,
        "train_seconds": [record["train_seconds"] for record in records],
        "wall_seconds": [record["wall_seconds"] for record in records],
        "build_seconds": [record["execution"]["build_seconds"] for record in records],
        "modes": sorted({record["execution"]["mode"] for record in records}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="as of zoology.run (default: all GPUs)")
    parser.add_argument("--scale", default="paper", choices=sorted(MEMBERS))
    parser.add_argument(
        "--jobs", type=int, default=JOBS_PER_GPU, help=f"runs at once per GPU (default: {JOBS_PER_GPU})"
    )
    parser.add_argument("--epochs", type=int, default=8, help="epochs of every run (default: 8)")
    parser.add_argument("--precision", default="bf16", help="fp32, tf32 or bf16 (default: bf16)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args()
    devices = plan.resolve_devices(options.device)

    result = {
        "cores": len(os.sched_getaffinity(0)),
        "jobs": options.jobs,
        "epochs": options.epochs,
        "precision": options.precision,
        "versions": versions(),
        "git": git_commit(),
    }
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        needs = {"jobs": options.jobs, "architecture_files": None, "experiment": SWEEP}
        engine = KeptWorkers(worker_setups(needs, devices, folder), memory=plan.device_memory(devices))

        def keep(name: str, configs: list[RunConfig], where: list[str]) -> dict:
            print(f"{name}: {len(where)} devices", flush=True)
            found = result[name] = timed(configs, engine, where, folder)
            print(f"{name}: {found['runs']} runs in {found['seconds']:.1f} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
            return found

        def sweep(seeds: list[int], epochs: int) -> list[RunConfig]:
            return work(options.scale, seeds, epochs, options.precision)

        try:

            def build(index: int) -> None:
                first = {run.architecture: run for run in sweep([100 + index], 1)}
                timed(list(first.values()), engine, [devices[index]], folder)

            with ThreadPoolExecutor() as pool:  # each GPU for itself: in one sweep a model would be built by one worker
                list(pool.map(build, range(len(devices))))
            one = keep("one", sweep([10], options.epochs), devices[:1])
            several = keep("all", sweep(list(range(len(devices))), options.epochs), devices)
        finally:
            engine.end()
    result["ratio"] = several["runs_per_second"] / one["runs_per_second"]
    print(f"{len(devices)} devices have {result['ratio']:.2f} times the throughput of one", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
