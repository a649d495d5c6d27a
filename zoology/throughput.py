"""Prefill and generation in tokens per millisecond, each system beside the bound of what it must move and multiply.

    python -m zoology.throughput [--models based-1.3b,...] [--batch 1,128] [--length 4096] [--out FILE.json]
    python -m zoology.throughput --results DIR --batch 4096 --out FILE.json     # the models of a results directory
    python -m zoology.throughput --kernels 32768 --out FILE.json                # one layer, as in the table of JRT
    python -m zoology.throughput --draw FILE.json [--draw OTHER.json ...] [--results DIR] [--plot DIR]

A model is a preset, or NAME[:OPTION=VALUE][+NAME...]@WIDTH as in `zoology.benchmark`; PRESET:BACKEND names what its
layers run, PRESET:cudnn is PyTorch's attention by cuDNN's kernel. Weights are random, as are the tokens. Generation is
timed on a prompt's state: `new_tokens` greedy tokens of every sequence, in segments, so that the time per token is seen
to stay or to grow with the position. Prefill goes from an empty state to the logits of the last token. Both are what a
`Decoder` does with shapes that came before, compiled and recorded; times are the median with 20th and 80th percentile.
What cannot fit is recorded as such, with the bytes it needs. A point that FILE.json already holds is not measured
again, and every point is written as soon as it is there.

The bound of a step is the longer of two times: bytes over the bandwidth of a copy, and operations over the rate of a
matrix product, both measured in the same run (`zoology.benchmark.measure_ceilings`); `zoology.bounds` says what counts.
A copy reads as much as it writes; what only reads can be a little faster than that, and so beat its bound.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

import architectures
from architectures.mixer import count_bytes, state_tensors
from zoology import presets, results
from zoology.benchmark import describe, joined, load, measure_ceilings, parse_model, peak_memory
from zoology.bounds import ModelWork, Moved, element_sizes
from zoology.config import ModelConfig
from zoology.devices import choose_device
from zoology.doctor import machine
from zoology.generation import READ_BEFORE_RECORDED, Decoder, DoesNotFit
from zoology.loops import backends_used
from zoology.model import LanguageModel
from zoology.runner import store
from zoology.runner.plan import load_sweep

MODELS = "attention-1.3b,based-1.3b,mamba-1.3b,jrt-1.3b"
SEGMENT = 128  # tokens
PROFILED_STEPS = 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TINY_VOCABULARY = 8192  # of models given as text
CUDNN = {"cudnn": "sdpa"}  # a kernel of a backend that is asked for by its own name


class Subject(NamedTuple):
    """A model to time: how records call it, what it is, and what else records say about it."""

    name: str
    config: ModelConfig
    also: dict[str, Any]
    prompt: int | None = None
    new_tokens: int | None = None

    def attention(self) -> AbstractContextManager:
        """While it runs, PyTorch's attention is cuDNN's, or refused, if the model is called so."""
        if self.also.get("backend") != "cudnn":
            return nullcontext()
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)


class Point(NamedTuple):
    """`kind` "generation" (length: of the prompt) or "prefill" (new_tokens 0)."""

    kind: str
    batch: int
    length: int
    new_tokens: int = 0


class Effort(NamedTuple):
    """At most `repeats` timed runs of a point, no more once `seconds` are spent.

    With `profile` the first point of each kind and model has its longest kernels. Without `compiled` small operations
    are not fused by torch.compile. Of several processes that share the file `lock`, one measures at a time; before that
    each goes through its points once, unmeasured and beside the others, beginning none after `rehearsal` seconds.
    """

    repeats: int = 5
    seconds: float = 5.0
    profile: bool = False
    compiled: bool = True
    lock: Path | None = None
    rehearsal: float = 90.0


# -- clocks -------------------------------------------------------------------------------------------------


class Clock:
    """Marks in the work of a device, and the milliseconds between them; nothing waits before `intervals`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        if self.device.type == "cuda":
            self.marks[-1].synchronize()
            return [first.elapsed_time(last) for first, last in zip(self.marks, self.marks[1:])]
        return [1e3 * (last - first) for first, last in zip(self.marks, self.marks[1:])]


@contextmanager
def locked(lock: Path | None, *, alone: bool) -> Iterator[None]:
    """Hold the file `lock`: several processes may get ready side by side, and one measures while none does.

    Who measures waits until nobody gets ready: that is why it is done once and not before every point.
    """
    if lock is None:
        yield
        return
    import fcntl

    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a child that was forked meanwhile holds it too


def repeated(run: Callable[[], list[float]], effort: Effort) -> list[list[float]]:
    """Results of `run`, once at least, as often as the effort allows."""
    started, found = time.perf_counter(), [run()]
    while len(found) < effort.repeats and time.perf_counter() - started < effort.seconds:
        found.append(run())
    return found


def spread(times: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and number of times."""
    low, high = np.percentile(times, [20, 80])
    return {"median": statistics.median(times), "low": float(low), "high": float(high), "repeats": len(times)}


def longest_kernels(
    run: Callable[[], Any], device: torch.device, steps: int = 1, count: int = 40
) -> list[dict[str, Any]]:
    """The kernels (on a CPU the operators) that take longest in one of the `steps` of `run`: name, calls, ms, share."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [(getattr(event, key) / 1e3 / steps, event) for event in profiler.key_averages()]
    total = sum(ms for ms, _ in found)
    found.sort(key=lambda pair: -pair[0])
    return [
        {"name": event.key[:120], "calls": event.count / steps, "ms": ms, "share": ms / total}
        for ms, event in found[:count]
        if ms > 0
    ]


# -- one point ----------------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """A point that can be timed: `run` gives the milliseconds of its parts, `first` what is done before them."""

    decoder: Decoder
    first: Callable[[], Any]
    run: Callable[[], list[float]]


class Bench:
    """One model on its device, and its counts. `ceilings` of the machine are measured when they are first needed."""

    def __init__(
        self, subject: Subject, device: torch.device, dtype: torch.dtype, ceilings: dict[str, float], effort: Effort
    ):
        self.subject, self.device, self.dtype, self.ceilings, self.effort = subject, device, dtype, ceilings, effort
        self.model: LanguageModel = presets.build_config(subject.config, device=device, dtype=dtype)
        self.profiled: set[str] = set()
        self.work = ModelWork(subject.config)
        self.kept: tuple[Point, Ready] | None = None

    def rehearse(self, points: list[Point], until: float) -> None:
        """Do the work of the points once in small, beginning none after `until`: what has to be compiled is then there.

        What points have to move is counted as well. The first point is kept as it is, ready to be measured.
        """
        for point in points:
            if time.perf_counter() > until:
                return
            try:
                with torch.no_grad():
                    ready = self._get_ready(point)
                    self._moved(point, element_sizes(ready.decoder.state.layers))
                if self.kept is None:
                    self.kept = point, ready
                del ready
            except (DoesNotFit, torch.cuda.OutOfMemoryError):
                pass  # beside others; it is seen again when it is measured
            free_memory(self.device)

    def measure(self, point: Point) -> dict[str, Any]:
        """The record of a point: its times beside its bound, or that it does not fit."""
        record = {"kind": point.kind, "model": self.subject.name, "batch": point.batch, "length": point.length}
        record |= {"new_tokens": point.new_tokens, "dtype": _name(self.dtype), **self.subject.also}
        record |= {"parameters": self.model.num_parameters()}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with locked(self.effort.lock, alone=True), torch.no_grad():
            try:
                kept, self.kept = self.kept, None
                measured = self._measured(point, kept[1] if kept and kept[0] == point else self._get_ready(point))
                del kept
            except (DoesNotFit, torch.cuda.OutOfMemoryError) as error:
                measured = {"out_of_memory": _memory_error(error)}
            free_memory(self.device)  # before the next one measures, which that would disturb
        return record | measured

    def _get_ready(self, point: Point) -> Ready:
        ready = self._generation(point) if point.kind == "generation" else self._prefill(point)
        given = ready.first()
        if point.kind == "generation":
            ready.decoder.decode(given, min(point.new_tokens, PROFILED_STEPS))
        else:
            for _ in range(READ_BEFORE_RECORDED + 1):  # what comes again is recorded as a graph
                ready.run()
        return ready

    def _generation(self, point: Point) -> Ready:
        fused = "auto" if self.effort.compiled else False
        # Nothing but steps is timed; and a decoder that nothing came before was seen to be the fastest.
        plain = {"record_prompts": False, "compile_prompts": False}
        decoder = Decoder(self.model, point.batch, point.length + point.new_tokens, compiled=fused, **plain)
        prompt = self._tokens(point.batch, point.length)

        def first() -> Tensor:
            decoder.reset()
            return self._read(decoder, prompt).argmax(-1)

        def run() -> list[float]:
            tokens, clock = first(), Clock(self.device)
            clock.mark()
            for size in _segments(point):
                tokens = decoder.decode(tokens, size)[:, -1]
                clock.mark()
            return clock.intervals()

        return Ready(decoder, first, run)

    def _prefill(self, point: Point) -> Ready:
        fused = self.effort.compiled and self.device.type == "cuda"
        decoder = Decoder(self.model, point.batch, point.length, graphs=False, compiled=fused)
        tokens = self._tokens(point.batch, point.length)

        def run() -> list[float]:
            decoder.reset()
            clock = Clock(self.device)
            clock.mark()
            self._read(decoder, tokens)
            clock.mark()
            return clock.intervals()

        return Ready(decoder, lambda: None, run)

    def _read(self, decoder: Decoder, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        for block in self.model.blocks:  # a backend's parity check is not of the kernel that is asked for here
            for part in {min(length, decoder.chunk_size), length % decoder.chunk_size or 1}:
                block.mixer.resolve_backend(self.device, self.dtype, part)
        with self.subject.attention():
            return decoder.prefill(tokens, self._prefix_length(length))

    def _measured(self, point: Point, ready: Ready) -> dict[str, Any]:
        times = repeated(ready.run, self.effort)
        peak = peak_memory(self.device)
        if not self.ceilings:  # not before: a step was seen to be 4% slower then
            self.ceilings.update(measure_ceilings(self.device))
        parts = [self._bound(moved) for moved in self._moved(point, element_sizes(ready.decoder.state.layers))]
        taken = [sum(one) for one in times]
        if point.kind == "generation":
            sizes, at = _segments(point), point.length
            for size, part, of_part in zip(sizes, parts, zip(*times)):
                part |= {"from": at, "tokens": size, "ms_per_token": statistics.median(of_part) / size}
                at += size
            record = {"bound_ms": sum(part["tokens"] * part["bound"]["ms"] for part in parts), "segments": parts}
            steps = min(point.new_tokens, PROFILED_STEPS)
            profiled = self._profiled(
                point.kind, steps, lambda tokens: ready.decoder.decode(tokens, steps), ready.first
            )
        else:
            record = {
                "prefix_length": self._prefix_length(point.length),
                "bound_ms": parts[0]["bound"]["ms"],
                **parts[0],
            }
            profiled = self._profiled(point.kind, 1, lambda _: ready.run())
        tokens = point.batch * (point.new_tokens or point.length)
        record |= {"ms": spread(taken), "tokens_per_ms": tokens / statistics.median(taken)}
        record["share_of_bound"] = record["bound_ms"] / record["ms"]["median"]
        return record | {"peak_memory_bytes": peak} | self._machine(ready.decoder) | profiled

    def _moved(self, point: Point, state_bytes: dict[str, int]) -> list[Moved]:
        """What the middle step of every segment has to move, or the whole prompt."""
        weight_bytes, at, found = self.model.embedding.weight.element_size(), point.length, []
        if point.kind == "prefill":
            prefix_length = self._prefix_length(point.length)
            return [self.work.prefill(point.batch, point.length, weight_bytes, state_bytes, prefix_length)]
        for size in _segments(point):
            found.append(self.work.step(point.batch, at + (size + 1) // 2, weight_bytes, state_bytes))
            at += size
        return found

    def _profiled(
        self, kind: str, steps: int, run: Callable[[Any], Any], before: Callable[[], Any] = lambda: None
    ) -> dict[str, Any]:
        """The longest kernels of a step of `run`, which is given what `before` returns, if they are asked for."""
        if not self.effort.profile or kind in self.profiled:
            return {}
        self.profiled.add(kind)
        given = before()
        return {"longest_kernels": longest_kernels(lambda: run(given), self.device, steps)}

    def _tokens(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = (batch, length)
        return torch.randint(self.subject.config.vocab_size, size, generator=generator).to(self.device)

    def _prefix_length(self, length: int) -> int:
        """A model that takes a prefix reads all it is given as one."""
        return length if self.model.takes_prefix else 0

    def _bound(self, moved: Moved) -> dict[str, Any]:
        return {"moved": moved._asdict(), "bound": moved.milliseconds(self.ceilings, _name(self.dtype))}

    def _machine(self, decoder: Decoder) -> dict[str, Any]:
        used: dict[str, list[str]] = {}
        for key, names in backends_used(self.model).items():
            found = used.setdefault(key.split(".", 1)[1], [])
            found += [name for name in names if name not in found]
        return {
            "state_bytes": sum(count_bytes(tensor) for _, tensor in state_tensors(decoder.state)),
            "backends": used,
            "execution": {
                name: getattr(decoder, name)
                for name in ("graphs", "compiled", "record_prompts", "compile_prompts", "chunk_size")
            },
        }


def _segments(point: Point) -> list[int]:
    """Tokens of the parts that a generation is timed in."""
    return [min(SEGMENT, point.new_tokens - done) for done in range(0, point.new_tokens, SEGMENT)]


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)


def _memory_error(error: Exception) -> dict[str, Any]:
    """What was known before anything was allocated; of an error while running, its message."""
    return {
        "bytes_needed": getattr(error, "needed", None),
        "bytes_available": getattr(error, "available", None),
        "message": str(error).split("\n")[0][:300],
    }


def free_memory(device: torch.device) -> None:
    """Give back what the last point held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- all points ---------------------------------------------------------------------------------------------


def subjects(models: list[str], n_layers: int | None = None, vocab_size: int = TINY_VOCABULARY) -> list[Subject]:
    """Presets by name, PRESET or PRESET:BACKEND, and models as text.

    Raises ValueError for unknown presets, listing the known ones, and for a backend that no layer has.
    """
    found = []
    for name in models:
        preset, _, backend = name.partition(":") if "@" not in name else (name, "", "")
        config = parse_model(name, vocab_size) if "@" in name else presets.config(preset)
        if backend:
            plain = config
            config = presets.with_backend(config, CUDNN.get(backend, backend))
            if config == plain:
                known = {name for spec in plain.layers for name in architectures.registry.get(spec.name).cls.backends}
                raise ValueError(f"{name!r}: no layer has the backend {backend!r}; allowed: {', '.join(sorted(known))}")
        if n_layers is not None:
            config = ModelConfig(
                **{key: getattr(config, key) for key in ModelConfig.model_fields} | {"n_layers": n_layers}
            )
        found.append(Subject(name, config, {"layers": config.n_layers} | ({"backend": backend} if backend else {})))
    return found


def trained(source: Path, scale: str, only: str = "") -> list[Subject]:
    """Every model of a results directory, or of an experiment file at a scale; rates and seeds make no other model.

    `only` names architectures, separated by commas.

    Generation is timed over the last eighth of the longest test, at the state that accuracy is drawn against.
    """
    if source.is_file():
        found = [
            (run.architecture, run.point_id, run.model, run.data.max_test_length) for run in load_sweep(source, scale)
        ]
    else:
        found = [
            (record["architecture"], record["point_id"], record["config"]["model"], _longest(record))
            for record in results.load_records(source)
        ]
    known = {architecture for architecture, *_ in found}
    wanted = set(only.split(",")) if only else known
    if absent := wanted - known:
        raise ValueError(f"--only {only!r}: {source} has no {', '.join(sorted(absent))}")
    chosen = {(one[0], one[1]): one for one in found if one[0] in wanted}
    return [_trained(*one) for _, one in sorted(chosen.items())]


def _longest(record: dict[str, Any]) -> int:
    return max(part["seq_len"] for part in record["slices"])


def _trained(architecture: str, point_id: str, model: ModelConfig | dict[str, Any], length: int) -> Subject:
    config = ModelConfig.model_validate(model)
    new = max(1, length // 8)
    also = {"architecture": architecture, "point_id": point_id, "layers": config.n_layers}
    return Subject(f"{architecture} {point_id}", config, also, length - new, new)


def points(
    subject: Subject, batches: list[int], prompt: int, new_tokens: int, prompts: list[tuple[int, int]]
) -> Iterator[Point]:
    """Generation at every batch size and prefill of every (batch size, length), in turns."""
    generation = [
        Point("generation", batch, subject.prompt or prompt, subject.new_tokens or new_tokens) for batch in batches
    ]
    prefill = [Point("prefill", batch, length) for batch, length in prompts]
    for pair in zip_longest(generation, prefill):
        yield from filter(None, pair)


def kernel_records(length: int, ceilings: dict[str, float], lock: Path | None) -> Iterator[dict[str, Any]]:
    """One layer of batch 16 at `length` tokens, as in the kernel table of "Just read twice" (arXiv:2407.05483).

    The cases are those of `kernels.benchmark`, parity checks included. JRT-Prompt is Based on twice the tokens; JRT-RNN
    reads all its tokens as a prefix. Raises ValueError without a GPU.
    """
    from kernels import benchmark

    if not torch.cuda.is_available() or not benchmark.installed("triton"):
        raise ValueError("--kernels: needs a CUDA device and Triton")
    flash = "softmax, flash-attn" if benchmark.installed("flash_attn") else "softmax, SDPA flash"
    for system, cases, wanted in (
        ("Based", benchmark.taylor_cases([length]), {"implementation": "ours"}),
        ("JRT-Prompt", benchmark.taylor_cases([2 * length]), {"implementation": "ours"}),
        ("JRT-RNN", benchmark.prefix_cases([length]), {"M": length}),
        ("FlashAttention-2", benchmark.taylor_cases([length]), {"implementation": flash}),
    ):
        case = next(c for c in cases if c.direction == "forward" and wanted.items() <= _told(c).items())
        with locked(lock, alone=True):
            case.check()
            if not ceilings:
                ceilings.update(measure_ceilings(torch.device("cuda")))
            limits = {"copy_tb_per_s": ceilings["copy"] / 1e12, "bf16_tflop_per_s": ceilings["bf16"] / 1e12}
            measured = benchmark.measure(case, limits)
        yield {"kind": "kernel", "model": system, "length": length, **measured}


def _told(case: Any) -> dict[str, Any]:
    return {"implementation": case.implementation, **case.shape}


class Records:
    """A document that is written whenever a record is added, and knows which points it holds."""

    def __init__(self, document: dict[str, Any], path: Path | None, report: Callable[[str], Any]):
        self.document, self.path, self.report = document, path, report
        self._run: dict[str, int] = {}
        if path is not None and path.is_file():
            self.document = joined([load(path, key="kind"), document])
            self._run = {"run": len(self.document["later_runs"])}

    def holds(self, subject: Subject, point: Point, dtype: str, compiled: bool) -> bool:
        asked = {"model": subject.name, **point._asdict(), "layers": subject.config.n_layers, "dtype": dtype}
        return any(
            asked.items() <= record.items() and record.get("execution", {}).get("compiled", compiled) == compiled
            for record in self.document["records"]
        )

    def add(self, record: dict[str, Any]) -> None:
        self.document["records"].append(record | self._run)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            store.write_atomically(self.path, json.dumps(self.document, indent=1) + "\n")
        self.report(line(record))


def line(record: dict[str, Any]) -> str:
    """One row of the log."""
    if record["kind"] == "kernel":
        took = f"{record['ms']:9.3f} ms" if "ms" in record else f"refused: {record['refused']}"
        return f"{'layer':11} {record['model']:28} {record['shape']} {took}"
    start = f"{record['kind']:11} {record['model']:28} batch {record['batch']:5} length {record['length']:6}"
    if "out_of_memory" in record:
        return f"{start} out of memory: {record['out_of_memory']['message']}"
    ms = record["ms"]
    text = (
        f"{start} {record['tokens_per_ms']:9.2f} tokens/ms  {ms['median']:9.2f} ms ({ms['low']:.2f}-{ms['high']:.2f}, "
        f"{ms['repeats']} times) {record['share_of_bound']:6.1%} of bound"
    )
    if record["kind"] == "generation":
        parts = record["segments"]
        text += f"  ms/token {parts[0]['ms_per_token']:.3f} first, {parts[-1]['ms_per_token']:.3f} last"
    if record["peak_memory_bytes"] is not None:
        text += f"  {record['peak_memory_bytes'] / 1e9:.1f} GB"
    return text


# -- command line -------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def command(
    models: Annotated[
        str, typer.Option(help="PRESET, PRESET:BACKEND or NAME[:OPTION=VALUE][+NAME...]@WIDTH, by commas")
    ] = MODELS,
    batch: Annotated[str, typer.Option(help="batch sizes of generation; empty: none")] = "1,8,32,128,512,1024",
    length: Annotated[
        str, typer.Option(help="lengths of prefill, LENGTH or BATCHxLENGTH; empty: none")
    ] = "4096,2048,8192,16384,32768",
    prompt: Annotated[int, typer.Option(min=1, help="tokens before generation")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 1024,
    n_layers: Annotated[int, typer.Option(min=0, help="cut models to so many layers; 0: do not")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32; default: bf16 on a GPU")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of a point, at most")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="no further run once a point has taken so long")] = 5.0,
    profile: Annotated[bool, typer.Option(help="add the longest kernels of the first points")] = False,
    compiled: Annotated[bool, typer.Option(help="fuse small operations by torch.compile")] = True,
    lock: Annotated[Path | None, typer.Option(help="file that several benchmarks of one machine share")] = None,
    rehearsal: Annotated[float, typer.Option(min=0, help="seconds to get ready beside the others")] = 90.0,
    architectures_file: Annotated[
        list[Path] | None, typer.Option("--architectures", help="file of your own architectures (again to add)")
    ] = None,
    results_of: Annotated[
        Path | None, typer.Option("--results", help="time the models of these results, or of an experiment file")
    ] = None,
    scale: Annotated[str, typer.Option(help="of that experiment file")] = "paper",
    only: Annotated[str, typer.Option(help="of these architectures only, by commas")] = "",
    kernels: Annotated[int, typer.Option(min=0, help="time one layer at this length")] = 0,
    out: Annotated[Path | None, typer.Option(help="raw records, JSON; measures what is missing there")] = None,
    draw_from: Annotated[
        list[Path] | None, typer.Option("--draw", help="join these records (again to add), measure nothing")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="folder for the figures of the records")] = None,
) -> None:
    """Time prefill and generation of whole language models, beside the bound of what must be moved and multiplied."""
    try:
        where = choose_device(device)
        chosen = dtype or ("bf16" if where.type == "cuda" else "fp32")
        if chosen not in DTYPES:
            raise ValueError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
        if draw_from:
            if out is None and plot is None:
                raise ValueError("--draw: needs --plot, or --out to join records")
            document = load(*draw_from, key="kind")
        else:
            for path in architectures_file or ():
                architectures.load_file(path)
            asked = trained(results_of, scale, only) if results_of else subjects(models.split(","), n_layers or None)
            effort = Effort(repeats, seconds, profile, compiled, lock, rehearsal)
            document = _measure(
                [] if kernels else asked, where, DTYPES[chosen], effort, out, kernels,
                lambda subject: points(
                    subject, _numbers("--batch", batch), prompt, new_tokens, [] if results_of else _prompts(length)
                ),
            )  # fmt: skip
        if draw_from and out is not None:
            store.write_atomically(out, json.dumps(document, indent=1) + "\n")
        if plot is not None:
            from zoology import plots_throughput

            of_results = results_of is not None and results_of.is_dir()
            frame = results.comparable(results.load(results_of)) if of_results else None
            plot.mkdir(parents=True, exist_ok=True)
            print("\n".join(map(str, plots_throughput.save_all(document, plot, frame))))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _measure(
    asked: list[Subject], device: torch.device, dtype: torch.dtype, effort: Effort, out: Path | None, kernels: int,
    points_of: Callable[[Subject], Iterator[Point]],
) -> dict[str, Any]:  # fmt: skip
    planned = [(subject, list(points_of(subject))) for subject in asked]
    found = describe(device, "zoology.throughput")
    found["versions"] |= {name: version for name, version in machine(device)["versions"].items() if version}
    if device.type == "cuda":
        found["device"]["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    found |= {"ceilings": {}, "records": []}
    records = Records(found, out, lambda text: print(text, flush=True))
    if kernels:
        for record in kernel_records(kernels, found["ceilings"], effort.lock):
            records.add(record)
    settings = _name(dtype), effort.compiled and device.type == "cuda"
    missing = [(one, [p for p in wanted if not records.holds(one, p, *settings)]) for one, wanted in planned]
    missing = [(one, wanted) for one, wanted in missing if wanted]
    for bench, wanted in _benches(missing, device, dtype, found["ceilings"], effort):
        for point in wanted:
            records.add(bench.measure(point))
        del bench
        free_memory(device)
    return records.document


def _benches(
    planned: list[tuple[Subject, list[Point]]], device: torch.device, dtype: torch.dtype,
    ceilings: dict[str, float], effort: Effort,
) -> Iterator[tuple[Bench, list[Point]]]:  # fmt: skip
    """One model after the other; with a lock all of them at once, rehearsed, so that nothing is left to get ready."""

    def build(subject: Subject) -> Bench:
        return Bench(subject, device, dtype, ceilings, effort)

    if effort.lock is None:
        for subject, wanted in planned:
            yield build(subject), wanted
        return
    with locked(effort.lock, alone=False):
        until = time.perf_counter() + effort.rehearsal
        ready = [(build(subject), wanted) for subject, wanted in planned]
        for bench, wanted in ready:
            bench.rehearse(wanted, until)
    yield from ready


def _numbers(option: str, text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text!r}: must be whole numbers above 0, separated by commas")
    return [int(part) for part in parts]


def _prompts(text: str) -> list[tuple[int, int]]:
    """`4096,16x32768`: one prompt of 4,096 tokens, and 16 of 32,768."""
    pairs = [part.rpartition("x") for part in text.split(",") if part]
    if not all((b or "1").isdigit() and (b or "1") != "0" and n.isdigit() and int(n) > 0 for b, _, n in pairs):
        raise ValueError(f"--length {text!r}: must be LENGTH or BATCHxLENGTH, whole numbers above 0, by commas")
    return [(int(batch or 1), int(length)) for batch, _, length in pairs]


def main() -> None:
    """The command line."""
    app(prog_name="python -m zoology.throughput")


if __name__ == "__main__":
    main()
