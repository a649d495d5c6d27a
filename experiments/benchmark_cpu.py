"""What the suite costs on a CPU: all data of the Based protocol, one training step, and every architecture.

    python experiments/benchmark_cpu.py [--threads N] [--repeats N] [--json FILE]

Data: 180,000 training and 7,000 test examples; the published generator takes 45 s and 6 GB on one core, the target is
2 s and 1.5 GB on two. Step: attention, d_model 128, T 64, batch 32, V 8192; the head at labelled positions only
against the head at every position with an attention mask made in Python at each call, as the published code has it.
The target is a factor of 3. Architectures: forward and backward of one mixer on (32, 256, 64) in float32, target 0.5 s.
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
from torch.nn import functional as F

import architectures
from zoology.config import ModelConfig, layer
from zoology.data import gather_labels
from zoology.model import LanguageModel
from zoology.tasks import IGNORE_INDEX, MQAR, dataset_hash
from zoology.train import labelled_loss

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


def published_loss(model: LanguageModel, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over dense labels with logits, and predictions from them, at every position."""
    logits = model(inputs)
    logits.argmax(-1)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)


def training_step_milliseconds(repeats: int = 15) -> dict[str, float]:
    """Median time of forward, backward and AdamW with the head "labelled" and "everywhere" (and explicit masks).

    The two take turns, so that a machine that is slow for a while is slow for both.
    """
    batch = MQAR(vocab_size=8192, seq_len=64, num_kv_pairs=4).sample(32, seed=0)
    labelled = gather_labels(batch).rows(slice(None))
    models, optimizers = {}, {}
    # The reference backend builds its mask at each call.
    for head, backend in (("labelled", "auto"), ("everywhere", "reference")):
        torch.manual_seed(0)
        mixers = [layer("base_conv"), layer("attention", backend=backend)]
        models[head] = LanguageModel(ModelConfig(vocab_size=8192, d_model=128, layers=mixers))
        optimizers[head] = torch.optim.AdamW(models[head].parameters(), lr=1e-3)
    times = {head: [] for head in models}
    for _ in range(repeats + 2):
        for head, model in models.items():
            start = time.perf_counter()
            loss = labelled_loss(model, labelled) if head == "labelled" else published_loss(model, *batch)
            optimizers[head].zero_grad()
            loss.backward()
            optimizers[head].step()
            times[head].append(1e3 * (time.perf_counter() - start))
    return {head: float(np.median(values[2:])) for head, values in times.items()}


def mixer_seconds(repeats: int = 5) -> dict[str, float]:
    """Median time of forward and backward of every architecture, x [32, 256, 64], reference backend, defaults."""
    medians = {}
    for name in architectures.names():
        torch.manual_seed(0)
        mixer, x = architectures.create(name, d_model=64, backend="reference"), torch.randn(32, 256, 64)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            mixer(x).square().sum().backward()
            times.append(time.perf_counter() - start)
        medians[name] = float(np.median(times[1:]))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats; the slowest is reported (default: 3)")
    parser.add_argument("--json", help="write the record to this file")
    options = parser.parse_args()
    for name in ("threads", "repeats"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} {value}: must be 1 or more")
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
        "step_milliseconds": training_step_milliseconds(),
        "mixer_seconds": mixer_seconds(),
    }
    for row in result["datasets"]:
        print(
            f"{row['split']:<6} T={row['seq_len']:<5} D={row['num_kv_pairs']:<4} {row['examples']:>7,} examples "
            f"{row['seconds']:7.3f} s {row['examples'] / row['seconds']:>10,.0f} examples/s"
        )
    times = ", ".join(f"{seconds:.2f}" for seconds in result["seconds"])
    print(f"in all {times} s over {options.repeats} repeats; peak memory {result['peak_gigabytes']:.2f} GB")
    labelled, everywhere = result["step_milliseconds"].values()
    print(f"training step: {labelled:.1f} ms, head everywhere {everywhere:.1f} ms: {everywhere / labelled:.1f} times")
    for name, seconds in sorted(result["mixer_seconds"].items(), key=lambda item: item[1]):
        print(f"{name:<34} {seconds:6.3f} s")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
