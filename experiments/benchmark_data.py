"""Time and memory of generating all data of the Based protocol: 180,000 training and 7,000 test examples.

    python experiments/benchmark_data.py [--threads N] [--repeats N] [--json FILE]

The published generator takes 45 s and 6 GB on one core; the target is 2 s and 1.5 GB on two cores.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time

import numpy as np
import torch

from zoology.tasks import MQAR, dataset_hash

TRAIN = [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)]
TEST = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
DATASETS = [("train", *row) for row in TRAIN] + [("test", *row, 1000) for row in TEST]


def generate() -> tuple[list, list[dict]]:
    """Every dataset, kept in memory as a run keeps them, and one record (seconds, hash) of each."""
    batches, records = [], []
    for split, seq_len, num_kv_pairs, num_examples in DATASETS:
        task = MQAR(vocab_size=8192, seq_len=seq_len, num_kv_pairs=num_kv_pairs)
        start = time.perf_counter()
        batches.append(task.split(split, num_examples, seed=0))
        seconds = time.perf_counter() - start
        record = {"split": split, "seq_len": seq_len, "num_kv_pairs": num_kv_pairs, "examples": num_examples}
        record |= {"seconds": seconds, "hash": dataset_hash(task, split, num_examples, 0)}
        records.append(record)
    return batches, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats; the slowest is reported (default: 3)")
    parser.add_argument("--json", help="write the record to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        _, records = generate()
        runs.append({"seconds": time.perf_counter() - start, "datasets": records})
    runs.sort(key=lambda run: run["seconds"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "seconds": [run["seconds"] for run in runs],
        "peak_gigabytes": peak / (1e9 if sys.platform == "darwin" else 1e6),
        "threads": options.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
        "datasets": runs[-1]["datasets"],
    }
    for row in result["datasets"]:
        print(
            f"{row['split']:<6} T={row['seq_len']:<5} D={row['num_kv_pairs']:<4} {row['examples']:>7,} examples "
            f"{row['seconds']:7.3f} s {row['examples'] / row['seconds']:>10,.0f} examples/s"
        )
    times = ", ".join(f"{seconds:.2f}" for seconds in result["seconds"])
    print(f"in all {times} s over {options.repeats} repeats; peak memory {result['peak_gigabytes']:.2f} GB")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
