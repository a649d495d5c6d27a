"""From an experiment file to a checked list of runs: everything that can be refused is refused before the first run."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from architectures.mixer import SequenceMixer
from architectures.user_files import described, run_file
from zoology.config import DataConfig, ModelConfig, RunConfig, layer_options_text
from zoology.model import LanguageModel
from zoology.precision import check_precision, computing_in

SCALES = ("smoke", "laptop", "paper")


class PlanError(ValueError):
    """A plan that cannot be run; the message says what to change."""


class Size(NamedTuple):
    """What a model weighs, counted without memory."""

    parameters: int
    mixer_parameters: int
    state_elements: dict[int, int]  # by sequence length
    state_bytes: dict[int, int]


class PlannedRun(NamedTuple):
    """A run, with what is known before it starts."""

    run_id: str
    point_id: str
    config: RunConfig
    label: str  # architecture, the options and data that distinguish its points, learning rate, seed
    size: Size | None  # None for a model that has nothing left to do
    rank: int = 0  # lower ranks start first

    @property
    def cost(self) -> float:
        """Floating-point operations, roughly."""
        return 0.0 if self.size is None else _cost(self.config, self.size)

    @property
    def point(self) -> str:
        """What distinguishes its point among those of its architecture."""
        return self.label.split(" ", 1)[1].rsplit(" lr=", 1)[0]


def choose_scale(requested: str | None, has_gpu: bool) -> tuple[str, str]:
    """The scale of a sweep, and one line that says why it was taken and how to take another."""
    others = " or ".join(f"--scale {name}" for name in SCALES)
    if requested is not None:
        slow = "; it is made for a GPU, and this takes the CPU" if requested == "paper" and not has_gpu else ""
        return requested, f"scale {requested}: as asked for{slow}"
    scale, why = ("paper", "there is a GPU") if has_gpu else ("laptop", "there is no GPU")
    return scale, f"scale {scale}: the default because {why}; take another with {others}"


def load_module(path: Path | str) -> ModuleType:
    """Import an experiment file under a name of its own. Raises PlanError if it is missing or raises."""
    try:
        return run_file(path, "experiment")
    except ValueError as error:
        raise PlanError(str(error)) from error


def load_sweep(path: Path | str, scale: str) -> list[RunConfig]:
    """The runs of an experiment file at a scale. Raises PlanError unless `sweep(scale)` gives a list of RunConfig."""
    sweep = getattr(load_module(path), "sweep", None)
    if not callable(sweep):
        raise PlanError(f"experiment file {path} defines no function sweep(scale) -> list[RunConfig]")
    call = f"experiment file {path}: sweep({scale!r})"
    try:
        runs = sweep(scale)
    except Exception as error:
        raise PlanError(f"{call} failed{described(error, path)}") from error
    if not isinstance(runs, (list, tuple)):
        raise PlanError(f"{call} returned {type(runs).__name__}, not a list of RunConfig")
    for index, run in enumerate(runs):
        if not isinstance(run, RunConfig):
            raise PlanError(f"{call}[{index}] is of type {type(run).__name__}, not RunConfig")
    if not runs:
        raise PlanError(f"{call} returned an empty list: there is nothing to run")
    return list(runs)


class Choice(NamedTuple):
    """Part of --only: an architecture, and words that the label of a run must have, such as d_model=64 or lr=0.01."""

    architecture: str
    words: frozenset[str]

    def takes(self, label: str) -> bool:
        name, *words = label.split()
        return name == self.architecture and self.words.issubset(words)


def choices(only: str) -> list[Choice]:
    """--only "based,mamba d_state=8 lr=0.01": what it names, in its order."""
    parts = [part.split() for part in only.split(",")]
    return [Choice(name, frozenset(words)) for name, *words in filter(None, parts)]


def keep_only(
    runs: Sequence[RunConfig], chosen: Sequence[Choice], words: Mapping[DataConfig, str] | None = None
) -> list[RunConfig]:
    """The runs that a choice takes; `words` are those of the whole sweep's data, by default of these runs'.

    Raises PlanError without any choice, or for one that takes no run.
    """
    known = sorted({run.architecture for run in runs})
    if not chosen:
        raise PlanError(f"--only names no architecture: this sweep has {', '.join(known)}")
    unknown = [choice.architecture for choice in chosen if choice.architecture not in known]
    if unknown:
        raise PlanError(f"--only {','.join(unknown)}: not in this sweep, which has {', '.join(known)}")
    labels = _labels(runs, [run.point_id for run in runs], words)
    for choice in chosen:
        if not any(map(choice.takes, labels)):
            told = " ".join((choice.architecture, *sorted(choice.words)))
            there = {word for name, *rest in map(str.split, labels) if name == choice.architecture for word in rest}
            raise PlanError(f"--only {told!r}: no run has all of that; in labels are {', '.join(sorted(there))}")
    return [run for run, label in zip(runs, labels) if any(choice.takes(label) for choice in chosen)]


def ranked(runs: Iterable[PlannedRun], chosen: Sequence[Choice]) -> list[PlannedRun]:
    """The runs, those that an earlier choice takes to start first."""

    def first(label: str) -> int:
        return next(rank for rank, choice in enumerate(chosen) if choice.takes(label))

    return [run._replace(rank=first(run.label)) for run in runs]


def data_words(runs: Iterable[RunConfig]) -> dict[DataConfig, str]:
    """What distinguishes the data of a sweep's runs, as labels have it: "seq_len=64"; nothing where all have the same.

    Of a task's options those that all test slices share, and the length of the longest.
    """
    traits = {data: _traits(data) for data in {id(run.data): run.data for run in runs}.values()}
    keys = [key for key in dict.fromkeys(chain(*traits.values())) if len({of.get(key) for of in traits.values()}) > 1]
    return {data: " ".join(f"{key}={of[key]}" for key in keys if key in of) for data, of in traits.items()}


def _traits(data: DataConfig) -> dict[str, str]:
    options = [part.task.model_dump(mode="json") for part in data.test]
    shared = {key: value for key, value in options[0].items() if all(of.get(key) == value for of in options)}
    traits = shared | {"seq_len": data.max_test_length, "shuffle": data.shuffle}
    return {key: "".join(str(value).split()) for key, value in traits.items()}


def _labels(
    runs: Sequence[RunConfig], point_ids: Sequence[str], words: Mapping[DataConfig, str] | None = None
) -> list[str]:
    """Of each run: its architecture, the options and data that distinguish its points, learning rate and seed."""
    words = data_words(runs) if words is None else words
    names: dict[str, str] = {}
    labels = []
    for run, point in zip(runs, point_ids):
        if point not in names:
            names[point] = f"{run.architecture} {point_label(run.model)} {words[run.data]}".rstrip()
        labels.append(f"{names[point]} lr={run.train.lr:g} seed={run.seed}")
    return labels


def with_seeds(runs: Sequence[RunConfig], count: int) -> list[RunConfig]:
    """Every run with the seeds 0 to count - 1, instead of those the experiment gave it."""
    if count < 1:
        raise PlanError(f"--seeds {count}: must be at least 1")
    bare = {run.model_copy(update={"seed": 0}).run_id: run for run in runs}
    return [run.model_copy(update={"seed": seed}) for run in bare.values() for seed in range(count)]


def with_precision(runs: Sequence[RunConfig], precision: str) -> list[RunConfig]:
    """Every run in this precision, instead of that which the experiment gave it."""
    changed = [
        run.model_copy(update={"train": run.train.model_copy(update={"precision": precision})})
        if run.train.precision != precision
        else run
        for run in runs
    ]
    return list({run.run_id: run for run in changed}.values())


def make_plan(
    runs: Sequence[RunConfig],
    device: str,
    finished: Collection[str] = (),
    words: Mapping[DataConfig, str] | None = None,
) -> list[PlannedRun]:
    """Check every run for this device and say what it will cost, in the order given.

    Models all of whose runs are in `finished`, by run id, are not built. `words` are those of the whole sweep's data,
    by default of these runs'.

    Raises PlanError for runs that are there twice, for models that cannot be built, and for named backends and
    precisions that this device refuses.
    """
    run_ids, point_ids = [run.run_id for run in runs], [run.point_id for run in runs]
    to_do = {point for run_id, point in zip(run_ids, point_ids) if run_id not in finished}
    sizes: dict[str, Size | None] = {}
    planned = []
    for run, run_id, point, label in zip(runs, run_ids, point_ids, _labels(runs, point_ids, words)):
        if point not in sizes:
            sizes[point] = _measure(run, device) if point in to_do else None
        planned.append(PlannedRun(run_id, point, run, label, sizes[point]))
    _refuse_duplicates(planned)
    return planned


def _refuse_duplicates(planned: Sequence[PlannedRun]) -> None:
    counts = Counter(run.run_id for run in planned)
    twice = {run.run_id: run.label for run in planned if counts[run.run_id] > 1}
    if twice:
        listed = "; ".join(f"{label} ({counts[run_id]} times)" for run_id, label in list(twice.items())[:5])
        raise PlanError(f"the sweep has {len(twice)} runs more than once: {listed}")


def _measure(run: RunConfig, device: str) -> Size:
    """Build the model without memory, check its backends, and count its parameters and state."""
    lengths = sorted({part.task.seq_len for part in (*run.data.train, *run.data.test)})
    try:
        check_precision(run.train.precision, device)
        with torch.device("meta"):
            model = LanguageModel(run.model)
        _check_backends(model, run, lengths, device)
        embedding = run.model.d_model * (run.model.vocab_size + run.model.max_positions)
        return Size(
            model.num_parameters(),
            model.num_parameters() - embedding,
            {length: model.state_size(length) for length in lengths},
            {length: model.state_bytes(length) for length in lengths},
        )
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise PlanError(f"{run.architecture} ({point_label(run.model)}): {error}") from error
    except Exception as error:  # a mistake in a mixer: where it is, as the command shows no traceback
        frames = traceback.extract_tb(error.__traceback__)
        place = [frame for frame in frames if "site-packages" not in frame.filename][-1]
        told = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        raise PlanError(f"{run.architecture} ({point_label(run.model)}): {told}") from error


def _check_backends(model: LanguageModel, run: RunConfig, lengths: Iterable[int], device: str) -> None:
    """A backend that was named runs or is refused here, before the first run."""
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    named = [m for m in model.modules() if isinstance(m, SequenceMixer) and m.backend != "auto"]
    with computing_in(run.train.precision, device):
        for module in named:
            for length in lengths:
                module.resolve_backend(device, dtype, length)


def _cost(run: RunConfig, size: Size) -> float:
    """Operations of a training run: what orders runs and predicts the time left, not a measurement.

    A token costs a multiplication per mixer parameter and per state element, a label one per entry of the head.
    """
    total = 0.0
    for part in run.data.train:
        length = part.task.seq_len
        labels = getattr(part.task, "num_questions", length)
        head = labels * run.model.d_model * run.model.vocab_size
        total += part.num_examples * (length * (size.mixer_parameters + size.state_elements[length]) + head)
    return 6.0 * run.train.epochs * total


def point_label(model: ModelConfig) -> str:
    """What distinguishes a model among those of its architecture: width and the options of its layers."""
    return layer_options_text(model.model_dump(mode="json"))


def longest_first(runs: Iterable[PlannedRun], seconds: Callable[[PlannedRun], float | None]) -> list[PlannedRun]:
    """Order runs by rank, the longest of a rank first: by measured seconds where known for all, else by cost."""
    runs = list(runs)
    times = [seconds(run) for run in runs]
    weights = [run.cost for run in runs] if None in times else times
    order = sorted(range(len(runs)), key=lambda index: (runs[index].rank, -weights[index]))
    return [runs[index] for index in order]


class Estimate:
    """Seconds that runs will take, from those that were measured on the way."""

    def __init__(self):
        self._by_point: dict[str, list[float]] = {}
        self._rates: dict[str, list[float]] = {}

    def observe(self, run: PlannedRun, seconds: float) -> None:
        """Learn from a finished run."""
        self._by_point.setdefault(run.point_id, []).append(seconds)
        if run.size is None:
            return
        for key in (run.config.architecture, ""):
            self._rates.setdefault(key, []).append(seconds / max(run.cost, 1.0))

    def seconds(self, run: PlannedRun) -> float | None:
        """What `run` will take: as its siblings did, else by cost as its architecture did, else as any did."""
        if known := self._by_point.get(run.point_id):
            return sum(known) / len(known)
        rates = self._rates.get(run.config.architecture) or self._rates.get("")
        return None if not rates else run.cost * sum(rates) / len(rates)


def parse_duration(text: str | None, option: str) -> float | None:
    """Seconds from "90", "45s", "10m", "2h", "1d" or "hh:mm:ss". Raises PlanError naming the option."""
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        if ":" in text:
            seconds = 0.0
            for part in text.split(":"):
                seconds = 60 * seconds + float(part)
        elif text and text[-1] in units:
            seconds = float(text[:-1]) * units[text[-1]]
        else:
            seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise PlanError(f"{option} {text!r}: must be a positive time such as 90, 45s, 10m, 2h or 1:30:00")
    return seconds


def device_memory(devices: Iterable[str]) -> dict[str, float]:
    """Bytes that runs may share, by GPU: nine tenths of what there is, for memory is not divided without waste."""
    return {
        device: 0.9 * torch.cuda.get_device_properties(device).total_memory
        for device in devices
        if device.startswith("cuda")
    }


def summary(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Counts for one line about a plan."""
    return {
        "runs": len(runs),
        "points": len({run.point_id for run in runs}),
        "architectures": len({run.config.architecture for run in runs}),
    }
