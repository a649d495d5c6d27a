"""Speed and memory of training, against the plain loop of the same models and against what the device could do.

    python -m zoology.benchmark [--models base_conv+attention@128,...] [--shapes 64x4,256x64] [--precisions tf32,bf16]
                                [--architectures FILE] [--jobs 8] [--out FILE.json] [--plot FILE.png]
    python -m zoology.benchmark --draw FILE.json [--draw OTHER.json ...] --plot FILE.png [--out JOINED.json]
    python -m zoology.benchmark --protocol base_conv+attention@128 --precisions bf16 --out FILE.json

A record holds the time of one training step, examples per second, peak memory and the time to build the loop; the same
for the baseline; and a floor. The baseline is what the predecessor does: eager, float32, logits and loss at every
position, PyTorch's AdamW, batches copied from the host. The floor is the larger of two times: the operations of the
step over the rate of matrix products, and the bytes it must move over the bandwidth of a copy, both measured here.
Operations are those of the reference implementation, with the head at labelled positions (three products). Bytes are
28 for each parameter (AdamW reads four numbers and writes three), and the inputs and outputs of all linear layers, read
and written once forward and once backward and read once more for gradients: all else could stay on chip.

With `--jobs`, as many processes build their loops side by side, which takes a compiler's minute each, and measure one
at a time when all are built: nothing else runs on the device while a number is taken.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import architectures
from zoology.config import DataConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer, learning_rates
from zoology.data import gather_labels
from zoology.devices import choose_device, num_cores
from zoology.graphs import MODES, StaticLoop, fetch_loop, forget_loops
from zoology.loops import EagerLoop
from zoology.model import LanguageModel
from zoology.precision import check_precision, computing_in
from zoology.tasks import IGNORE_INDEX, MQAR
from zoology.train import train

MODELS = (
    "base_conv+attention@64,base_conv+attention@128,base_conv+based:feature_dim=16@128,"
    "base_conv+sliding_window:window=64@128,hyena@128,base_conv@128"
)
PROTOCOL_TRAIN = [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)]
PROTOCOL_TEST = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]


class Shape(NamedTuple):
    """Length and pairs of the task, batch size, vocabulary, and steps to time."""

    seq_len: int
    num_kv_pairs: int
    batch_size: int
    vocab_size: int
    steps: int


def parse_model(text: str, vocab_size: int) -> ModelConfig:
    """`base_conv+based:feature_dim=16@128`: two layers repeating these mixers, at width 128."""
    body, _, width = text.partition("@")
    layers = []
    for part in body.split("+"):
        name, *options = part.split(":")
        layers.append(layer(name, **{key: json.loads(value) for key, _, value in (o.partition("=") for o in options)}))
    if not width.isdigit():
        raise ValueError(f"model {text!r}: must be NAME[:OPTION=VALUE][+NAME...]@WIDTH")
    return ModelConfig(vocab_size=vocab_size, d_model=int(width), layers=layers)


def parse_shapes(text: str, batch_size: int, vocab_size: int, steps: int) -> list[Shape]:
    """`64x4,256x64`: lengths and numbers of pairs."""
    shapes = []
    for part in text.split(","):
        length, _, pairs = part.partition("x")
        if not (length.isdigit() and pairs.isdigit()):
            raise ValueError(f"shape {part!r}: must be LENGTHxPAIRS")
        shapes.append(Shape(int(length), int(pairs), batch_size, vocab_size, steps))
    return shapes


def run_config(model: ModelConfig, shape: Shape, precision: str) -> RunConfig:
    """A run of `steps` batches of one slice."""
    task = MQAR(vocab_size=shape.vocab_size, seq_len=shape.seq_len, num_kv_pairs=shape.num_kv_pairs)
    return RunConfig(
        architecture=model.layers[-1].name,
        model=model,
        data=DataConfig(
            train=[Slice(task=task, num_examples=shape.batch_size * shape.steps)],
            test=[Slice(task=task, num_examples=shape.batch_size)],
            batch_size=shape.batch_size,
        ),
        train=TrainConfig(lr=1e-3, precision=precision),
    )


class Timing(NamedTuple):
    """Of one step, in milliseconds, over repeats of an epoch; peak memory in bytes, or None without a GPU."""

    median: float
    low: float
    high: float
    repeats: int
    peak_memory_bytes: int | None


def time_steps(run: Callable[[], Any], steps: int, repeats: int, device: torch.device) -> list[float]:
    """Milliseconds per step of `run`, which does `steps` of them, after one untimed run."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / steps)
        else:
            started = time.perf_counter()
            run()
            times.append((time.perf_counter() - started) * 1e3 / steps)
    return times


def longest_kernels(
    run: Callable[[], Any], steps: int, device: torch.device, number: int = 20
) -> dict[str, Any] | None:
    """Kernels of one step of `run`, which does `steps`: how many, their microseconds, and the longest by name."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    rows = [
        {"name": event.key[:90], "count": event.count / steps, "us": event.device_time_total / steps}
        for event in profile.key_averages()
    ]
    rows.sort(key=lambda row: -row["us"])
    return {"count": sum(r["count"] for r in rows), "us": sum(r["us"] for r in rows), "longest": rows[:20]}


def timing(times: list[float], peak: int | None) -> dict[str, Any]:
    return Timing(statistics.median(times), min(times), max(times), len(times), peak)._asdict()


def peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def measure_baseline(model: ModelConfig, shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    """The plain loop: eager, float32, head and loss everywhere."""
    config = run_config(model, shape, "fp32")
    steps = min(shape.steps, 8)
    examples = config.data.train[0].task.sample(shape.batch_size * steps, seed=0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    model = LanguageModel(config.model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def epoch() -> None:
        for inputs, labels in zip(examples.inputs.split(shape.batch_size), examples.labels.split(shape.batch_size)):
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(inputs)
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX).backward()
            optimizer.step()

    with computing_in("fp32", device):
        times = time_steps(epoch, steps, repeats, device)
    return timing(times, peak_memory(device))


def build(config: RunConfig, shape: Shape, device: torch.device, mode: str) -> StaticLoop | EagerLoop:
    """The loop that `train` would take, or the one that is named, at the start of a run."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    task = config.data.train[0].task

    def splits():
        sizes = {"train": shape.batch_size * shape.steps, "validation": shape.batch_size, "test": shape.batch_size}
        return {
            split: [(Slice(task=task, num_examples=n), gather_labels(task.split(split, n, 0)).to(device))]
            for split, n in sizes.items()
        }

    torch.manual_seed(0)
    model = LanguageModel(config.model).to(device)
    eager = mode == "eager" or (mode == "auto" and device.type != "cuda")
    loop, reason = (None, "") if eager else fetch_loop(config, device, splits, mode)
    if loop is None:
        loop = EagerLoop(config, model, splits(), torch.Generator())
        loop.execution = loop.execution._replace(reason=reason)
    else:
        loop.load(model, config)
    forget_loops()
    return loop


def measure(
    loop: StaticLoop | EagerLoop, config: RunConfig, shape: Shape, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Time of a step of the loop, what it ran, and its longest kernels."""
    rows = torch.randperm(shape.batch_size * shape.steps, generator=torch.Generator().manual_seed(0))
    batches = [(0, part) for part in rows.split(shape.batch_size)]

    def epoch(steps: int = shape.steps) -> None:
        if isinstance(loop, StaticLoop):
            loop.replay([0] * steps)
        else:
            loop.train_epoch(1, batches[:steps])

    with computing_in(config.train.precision, device):
        first_loss = loop.train_epoch(1, batches)
        build_peak = peak_memory(device)
        times = time_steps(epoch, shape.steps, repeats, device)
        record = {"step_ms": timing(times, step_memory(loop, device)), "first_epoch_loss": first_loss}
        few = min(4, shape.steps)
        kernels = longest_kernels(partial(epoch, few), few, device)
    record |= {"backends": loop.backends(), "execution": loop.execution._asdict(), "kernels": kernels}
    return record | {"build_peak_memory_bytes": build_peak}


def step_memory(loop: StaticLoop | EagerLoop, device: torch.device) -> int | None:
    """Peak bytes of a training step with all that stays on the device; not what tuning kernels took, when it was built.

    A replay of a graph allocates nothing that is counted: the step is recorded once more.
    """
    if isinstance(loop, StaticLoop) and loop.captured:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        loop.record_steps()
    return peak_memory(device)


def count_work(model: ModelConfig, shape: Shape, precision: str) -> dict[str, float]:
    """Operations and bytes of one step as the module's docstring counts them, on a batch of two."""
    layers = [spec.model_copy(update={"options": spec.options | {"backend": "reference"}}) for spec in model.layers]
    network = LanguageModel(model.model_copy(update={"layers": tuple(layers)}))
    seen = []

    def remember(module, inputs, output):
        seen.append(inputs[0].numel() + output.numel())

    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(remember)
    tokens = torch.randint(model.vocab_size, (2, shape.seq_len))
    with FlopCounterMode(display=False) as counter:
        network.hidden(tokens).sum().backward()
    parameters, rows = network.num_parameters(), shape.batch_size * shape.num_kv_pairs
    width = 2 if precision == "bf16" else 4
    return {
        "operations": counter.get_total_flops() * shape.batch_size / 2 + 6.0 * rows * model.vocab_size * model.d_model,
        "bytes": 28.0 * parameters + 5.0 * sum(seen) * width * shape.batch_size / 2,
    }


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy (read + write), operations per second of a matrix product in each precision."""
    cuda = device.type == "cuda"
    number, size = (1 << 28, 8192) if cuda else (1 << 22, 256)
    source = torch.randn(number, device=device)
    target = torch.empty_like(source)
    seconds = min(time_steps(partial(target.copy_, source), 1, 5, device)) / 1e3
    ceilings = {"copy": 8 * number / seconds}
    del source, target
    for precision in ("fp32", "tf32", "bf16") if cuda else ("fp32", "bf16"):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        with computing_in(precision, device):
            seconds = min(time_steps(partial(torch.mm, a, b), 1, 5, device)) / 1e3
        ceilings[precision] = 2 * size**3 / seconds
    return ceilings


def floor(work: dict[str, float], ceilings: dict[str, float], precision: str) -> dict[str, float]:
    """The work with the time it takes at the ceilings, in milliseconds."""
    by_operations, by_bytes = work["operations"] / ceilings[precision], work["bytes"] / ceilings["copy"]
    return work | {"ms": 1e3 * max(by_operations, by_bytes)}


def describe(device: torch.device, module: str = "zoology.benchmark") -> dict[str, Any]:
    """Where and with what the numbers of `python -m MODULE` came about."""
    from zoology.run import git_commit
    from zoology.runner.worker import versions

    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return {
        "device": {"type": device.type, "name": name},
        "versions": versions() | {"cuda": torch.version.cuda},
        "git": git_commit(),
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Case(NamedTuple):
    """One record to be; `baseline` says whether to measure the plain loop too, which all precisions share."""

    model: str
    shape: Shape
    precision: str
    baseline: bool


def cases(models: list[str], shapes: list[Shape], precisions: list[str]) -> list[Case]:
    return [Case(m, s, p, p == precisions[0]) for m, s, p in product(models, shapes, precisions)]


def measure_case(
    case: Case, device: torch.device, repeats: int, mode: str, ready: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """A record without its floor. Between building and measuring `ready` is called, which may wait."""
    text, shape, precision, with_baseline = case
    try:
        model = parse_model(text, shape.vocab_size)
        config = run_config(model, shape, precision)
        work = count_work(model, shape, precision)
        loop = build(config, shape, device, mode)
    finally:
        ready()
    record = {"model": text, "precision": precision, **shape._asdict()}
    record |= measure(loop, config, shape, device, repeats)
    del loop
    record["baseline_step_ms"] = measure_baseline(model, shape, device, repeats) if with_baseline else None
    return record | {"work": work}


_together: dict[str, Any] = {}


def _join(barrier, turn, files: Sequence[str]) -> None:
    _together.update(barrier=barrier, turn=turn)
    for path in files:
        architectures.load_file(path)


def _measure_in_turn(case: Case, device: str, repeats: int, mode: str) -> dict[str, Any]:
    """`measure_case` in a process that waits until all have built, and then for its turn."""

    def ready() -> None:
        _together["barrier"].wait()
        _together["turn"].acquire()

    try:
        return measure_case(case, torch.device(device), repeats, mode, ready)
    finally:
        _together["turn"].release()


def measure_together(
    todo: list[Case], device: torch.device, repeats: int, mode: str, files: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Records of the cases, each built in a process of its own, which loads `files`, side by side; measured alone."""
    context = multiprocessing.get_context("spawn")
    together = (context.Barrier(len(todo)), context.Lock(), files)
    with ProcessPoolExecutor(len(todo), context, initializer=_join, initargs=together) as pool:
        futures = [pool.submit(_measure_in_turn, case, str(device), repeats, mode) for case in todo]
        return [future.result() for future in futures]


def benchmark(
    todo: list[Case],
    device: torch.device,
    *,
    repeats: int = 5,
    mode: str = "auto",
    jobs: int = 1,
    files: Sequence[str] = (),
    report: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """All records of the cases, with the machine they hold for; `files` register architectures, in this process too."""
    for path in files:
        architectures.load_file(path)
    for case in todo:
        check_precision(case.precision, device)
        parse_model(case.model, case.shape.vocab_size)
    ceilings = measure_ceilings(device)
    result = describe(device) | {"ceilings": ceilings, "records": []}
    baselines = {}
    for start in range(0, len(todo), jobs):
        wave = todo[start : start + jobs]
        if jobs > 1:
            measured = measure_together(wave, device, repeats, mode, files)
        else:
            measured = [measure_case(case, device, repeats, mode) for case in wave]
        for record in measured:
            key = (record["model"], record["seq_len"], record["num_kv_pairs"])
            record["baseline_step_ms"] = baselines.setdefault(key, record["baseline_step_ms"])
            record["floor"] = floor(record.pop("work"), ceilings, record["precision"])
            record["examples_per_second"] = 1e3 * record["batch_size"] / record["step_ms"]["median"]
            result["records"].append(record)
            report(line(record))
    return result


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    step, base = record["step_ms"], record["baseline_step_ms"]
    memory = "" if step["peak_memory_bytes"] is None else f" {step['peak_memory_bytes'] / 1e9:5.2f} GB"
    shape = f"{record['seq_len']}x{record['num_kv_pairs']}"
    execution = record["execution"]
    plain = ""
    if base is not None:
        plain = f"plain {base['median']:6.2f} ms ({base['median'] / step['median']:4.1f}x)  "
    return (
        f"{record['model']:42} {shape:8} {record['precision']:4} {step['median']:7.3f} ms{memory} "
        f"{record['examples_per_second']:10,.0f}/s  {plain}floor {record['floor']['ms']:6.3f} ms "
        f"({100 * record['floor']['ms'] / step['median']:3.0f}%)  {execution['mode']}, {execution['loss']}, "
        f"built in {execution['build_seconds']:.1f} s {execution['reason'][:200]}"
    )


def protocol_run(
    text: str,
    precision: str,
    rate: float,
    *,
    epochs: int = 32,
    share: float = 1.0,
    vocab_size: int = 8192,
    batch_size: int = 256,
) -> RunConfig:
    """A run of the Based protocol (arXiv:2402.18668) without early stopping, on `share` of the examples."""

    def task(length: int, pairs: int) -> MQAR:
        return MQAR(vocab_size=vocab_size, seq_len=length, num_kv_pairs=pairs)

    train_slices = [Slice(task=task(t, d), num_examples=max(1, int(n * share))) for t, d, n in PROTOCOL_TRAIN]
    test_slices = [Slice(task=task(t, d), num_examples=max(1, int(1000 * share))) for t, d in PROTOCOL_TEST]
    return RunConfig(
        architecture=text,
        model=parse_model(text, vocab_size),
        data=DataConfig(train=train_slices, test=test_slices, batch_size=batch_size),
        train=TrainConfig(lr=rate, epochs=epochs, precision=precision, stop_accuracy=None),
    )


def protocol(
    text: str, precision: str, device: torch.device, *, epochs: int = 32, rates: int = 4, **options
) -> dict[str, Any]:
    """One model of the protocol: `rates` learning rates of `epochs` epochs, none cut short.

    Times include data, compilation, evaluation and scoring.
    """
    started, runs = time.perf_counter(), []
    for rate in learning_rates(-3, -1.5, rates):
        runs.append(measure_run(protocol_run(text, precision, rate, epochs=epochs, **options), device))
    total = time.perf_counter() - started
    result = describe(device) | {
        "protocol": {"model": text, "precision": precision, "epochs": epochs, "seconds": total} | options,
        "runs": runs,
    }
    print(extrapolation([result]), flush=True)
    return result


def measure_run(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Times, losses and scores of one run."""
    begun = time.perf_counter()
    outcome = train(config, device=device)
    run = {
        "lr": config.train.lr,
        "wall_seconds": time.perf_counter() - begun,
        "train_seconds": outcome.train_seconds,
        "examples_per_second": outcome.examples_per_second,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "execution": outcome.execution._asdict(),
        "losses": [epoch.loss for epoch in outcome.epochs],
        "validation": [epoch.validation_accuracy for epoch in outcome.epochs],
        "test": {label: score.accuracy for label, score in outcome.test.items()},
    }
    mean = statistics.mean(run["test"].values())
    print(f"lr {run['lr']:g}: {run['wall_seconds']:.1f} s, test accuracy {mean:.4f}", flush=True)
    return run


def extrapolation(results: list[dict[str, Any]], models: int = 43) -> str:
    """What `models` models like those of these protocol records take, one after the other on one such device."""
    lines = []
    for result in results:
        done, build = result["protocol"], sum(run["execution"]["build_seconds"] for run in result["runs"])
        lines.append(
            f"{done['model']} {done['precision']}: {done['seconds']:.1f} s for {len(result['runs'])} learning rates of "
            f"{done['epochs']} epochs, of which {build:.1f} s built the loop"
        )
    mean = statistics.mean(result["protocol"]["seconds"] for result in results)
    return "\n".join(
        [*lines, f"{models} such models: {models * mean / 60:.0f} minutes on one {results[0]['device']['name']}"]
    )


def load(*paths: Path | str, key: str = "step_ms") -> dict[str, Any]:
    """The records of several files of one device as one: those of a command all of whose records have `key`.

    Raises ValueError for files of several devices, of no records, or of another command.
    """
    return joined([_read(Path(path), key) for path in paths])


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"records {path}: {getattr(error, 'strerror', None) or 'not JSON'}") from None
    if not isinstance(result, dict) or not {"device", "records"} <= result.keys():
        raise ValueError(f"records {path}: must hold what --out wrote, with 'device' and 'records'")
    if not all(key in record for record in result["records"]):
        raise ValueError(f"records {path}: some have no {key!r}: another command made them")
    return result


OF_A_RUN = ("versions", "git", "command", "at", "ceilings")


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of one device as one; raises ValueError for results of several.

    What is `OF_A_RUN` stands in the document for the first run, and in `later_runs`[n - 1] for records with `run`: n.
    """
    devices = {result["device"]["name"] for result in results}
    if len(devices) > 1:
        raise ValueError(f"results of different devices cannot be joined: {', '.join(sorted(devices))}")
    runs, records = [], []
    for result in results:
        own = [{key: result[key] for key in OF_A_RUN if key in result}, *result.get("later_runs", [])]
        runs += [run for run in own if run not in runs]
        for record in result["records"]:
            place = runs.index(own[record.get("run", 0)])
            bare = {key: value for key, value in record.items() if key != "run"}
            records.append(bare | ({"run": place} if place else {}))
    later = {"later_runs": runs[1:]} if len(runs) > 1 else {}
    return results[0] | later | {"records": records}


def draw(result: dict[str, Any], path: Path) -> None:
    """Step times as bars: the plain loop, each precision, its floor as a mark; what was not measured is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from zoology.plot import COLOURS

    records = result["records"]
    shapes = sorted({(record["seq_len"], record["num_kv_pairs"]) for record in records})
    precisions = list(dict.fromkeys(record["precision"] for record in records))
    models = list(dict.fromkeys(record["model"] for record in records))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 1.2 + 0.75 * len(models)), squeeze=False)
    height = 0.8 / (1 + len(precisions))
    for axis, shape in zip(axes[0], shapes):
        found = {(r["model"], r["precision"]): r for r in records if (r["seq_len"], r["num_kv_pairs"]) == shape}
        at = np.arange(len(models))
        plain = {m: r["baseline_step_ms"]["median"] for (m, _), r in found.items() if r["baseline_step_ms"]}
        if plain:
            times = [plain.get(m, np.nan) for m in models]
            axis.barh(at, times, height, color="#BBBBBB", label="plain loop, float32")
        for index, precision in enumerate(precisions, 1):
            chosen = [found.get((model, precision)) for model in models]
            times = [r["step_ms"]["median"] if r else np.nan for r in chosen]
            floors = [r["floor"]["ms"] if r else np.nan for r in chosen]
            y = at + index * height
            axis.barh(y, times, height, color=COLOURS[index], label=precision)
            axis.plot(floors, y, "k|", markersize=9, label="floor" if index == len(precisions) else None)
        axis.set_yticks(at + height * len(precisions) / 2, models if axis is axes[0][0] else [""] * len(models))
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("milliseconds per training step")
        axis.set_title(f"T = {shape[0]}, {shape[1]} pairs, batch {records[0]['batch_size']}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(result["device"]["name"])
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def command(
    models: Annotated[str, typer.Option(help="NAME[:OPTION=VALUE][+NAME...]@WIDTH, separated by commas")] = MODELS,
    shapes: Annotated[str, typer.Option(help="LENGTHxPAIRS, separated by commas")] = "64x4,256x64",
    precisions: Annotated[str, typer.Option(help="of fp32, tf32 and bf16, separated by commas")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="examples per step")] = 256,
    vocab_size: Annotated[int, typer.Option(min=2, help="of the task and the model")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="steps per timed repeat")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="timed repeats, after one that is not")] = 5,
    mode: Annotated[str, typer.Option(help=f"auto, eager, {', '.join(MODES)}")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="processes that build side by side; they measure in turn")] = 1,
    architecture_files: Annotated[
        list[Path] | None, typer.Option("--architectures", help="file that registers architectures; can be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="raw records, JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="figure of the records")] = None,
    draw_from: Annotated[
        list[Path] | None, typer.Option("--draw", help="join these records (again to add), measure nothing")
    ] = None,
    protocol_of: Annotated[str, typer.Option("--protocol", help="time the Based protocol on this model")] = "",
    epochs: Annotated[int, typer.Option(min=1, help="of the protocol")] = 32,
) -> None:
    """Time a training step of each model: beside the plain loop of the field, and beside what the device could do."""
    try:
        where, files = choose_device(device), [str(path) for path in architecture_files or ()]
        for path in (out, plot):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        chosen = precisions.split(",") if precisions else (["tf32", "bf16"] if where.type == "cuda" else ["fp32"])
        if draw_from:
            if out is None and plot is None:
                raise ValueError("--draw: needs --plot, or --out to join records")
            result = load(*draw_from)
        elif protocol_of:
            for path in files:
                architectures.load_file(path)
            torch.set_num_threads(num_cores())  # as a sweep with one worker
            result = protocol(protocol_of, chosen[0], where, epochs=epochs)
        else:
            if mode not in ("auto", "eager", *MODES):
                raise ValueError(f"--mode {mode!r}: must be one of auto, eager, {', '.join(MODES)}")
            if "graph" in mode and where.type != "cuda":
                raise ValueError(f"--mode {mode!r}: CUDA graphs need a CUDA device, this is {where}")
            asked = parse_shapes(shapes, batch_size, vocab_size, steps)
            todo = cases(models.split(","), asked, chosen)
            result = benchmark(todo, where, repeats=repeats, mode=mode, jobs=jobs, files=files)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n")
        if plot is not None and "records" in result:
            draw(result, plot)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def main() -> None:
    """The command line."""
    app(prog_name="python -m zoology.benchmark")


if __name__ == "__main__":
    main()
