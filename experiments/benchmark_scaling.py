"""How a sweep scales over the GPUs of a machine: the same work for each, first on one of them, then on all.

    python experiments/benchmark_scaling.py [--jobs N] [--rates N] [--epochs N] [--precision bf16] [--json FILE]

The work of a GPU: Based, d_model 128, on the data of Based, Fig. 2, with a seed of the GPU's own, at several learning
rates. Every run has all its epochs. Every worker has started and built the model before: a run that builds within the
clock is an error. Training, validation, scoring and files count. What to look at is the ratio of runs per second: the
target on four GPUs is 3.5.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from zoology.config import RunConfig
from zoology.devices import resolve_devices
from zoology.engines.local import LocalEngine
from zoology.run import JOBS_PER_GPU, git_commit, known_from, worker_setups
from zoology.runner import plan
from zoology.runner.driver import run_sweep
from zoology.runner.progress import PlainView
from zoology.runner.worker import versions

MODELS = {"paper": (128, {"feature_dim": 16}), "smoke": (32, {"feature_dim": 8})}
SWEEP = Path(__file__).with_name("mqar_sweep.py")


def work(scale: str, seeds: list[int], rates: int, epochs: int, precision: str) -> list[RunConfig]:
    """The model of the sweep that is trained here, with each seed at `rates` learning rates."""
    width, options = MODELS[scale]
    run = next(
        run
        for run in plan.load_sweep(SWEEP, scale)
        if (run.architecture, run.model.d_model) == ("based", width)
        and options.items() <= run.model.layers[-1].options.items()
    )
    found = []
    for seed in seeds:
        for index in range(rates):
            lr = 1e-3 * 10 ** (index / rates)
            train = run.train.model_copy(update={"lr": lr, "epochs": epochs, "stop_accuracy": None})
            found.append(run.model_copy(update={"seed": seed, "train": train}))
    return plan.with_precision(found, precision)


def timed(configs: list[RunConfig], engine: LocalEngine, devices: list[str], folder: Path) -> dict:
    """Seconds of a sweep on the workers of these devices, and of its runs; raises RuntimeError if one failed."""
    runs = plan.make_plan(configs, devices[0])
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
    parser.add_argument("--scale", default="paper", choices=sorted(MODELS))
    parser.add_argument(
        "--jobs", type=int, default=JOBS_PER_GPU, help=f"runs at once per GPU (default: {JOBS_PER_GPU})"
    )
    parser.add_argument("--rates", type=int, default=8, help="runs of each GPU (default: 8)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of every run (default: 8)")
    parser.add_argument("--precision", default="bf16", help="fp32, tf32 or bf16 (default: bf16)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args()
    devices = resolve_devices(options.device)
    if devices == ["cpu"] and options.scale == "paper":
        parser.error("--scale paper is made for GPUs, this takes the CPU; --scale smoke tries the program")

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
        setups = worker_setups(needs, devices, folder)
        engine = LocalEngine(setups, memory=plan.device_memory(devices))

        def on(where: list[str]) -> LocalEngine:
            return engine.part(index for index, setup in enumerate(setups) if setup.device in where)

        def sweep(seeds: list[int], rates: int, epochs: int) -> list[RunConfig]:
            return work(options.scale, seeds, rates, epochs, options.precision)

        def keep(name: str, seeds: list[int], where: list[str]) -> dict:
            print(f"{name}: {len(where)} devices", flush=True)
            found = result[name] = timed(sweep(seeds, options.rates, options.epochs), on(where), where, folder)
            print(f"{name}: {found['runs']} runs in {found['seconds']:.1f} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
            if any(found["build_seconds"]):
                raise RuntimeError(f"{name}: models were built within the clock, for {found['build_seconds']} seconds")
            return found

        try:
            engine.launch()

            def build(index: int) -> None:
                timed(sweep([1000 + index], 1, 1), engine.part([index]), [setups[index].device], folder)

            with ThreadPoolExecutor(len(setups)) as pool:  # each worker for itself, or the first would do all of it
                list(pool.map(build, range(len(setups))))
            one = keep("one", [100], devices[:1])
            several = keep("all", list(range(len(devices))), devices)
        finally:
            engine.stop()
    result["ratio"] = several["runs_per_second"] / one["runs_per_second"]
    print(f"{len(devices)} devices have {result['ratio']:.2f} times the throughput of one", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
