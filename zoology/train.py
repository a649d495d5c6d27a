"""Training of one run: data, model and optimizer from a `RunConfig`, metrics by epoch, scores at the end."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from zoology.checkpoint import read_checkpoint, write_checkpoint
from zoology.config import DataConfig, RunConfig, Slice
from zoology.data import Labelled, epoch_batches, load_split
from zoology.evaluate import Score
from zoology.loops import EagerLoop, Execution, TrainingDiverged, labelled_loss, learning_rate, score_slices
from zoology.model import LanguageModel
from zoology.precision import check_precision, computing_in
from zoology.turns import turn_on

__all__ = [
    "Epoch",
    "Execution",
    "Outcome",
    "TrainingDiverged",
    "labelled_loss",
    "learning_rate",
    "score_slices",
    "train",
]

log = logging.getLogger("zoology")

_MASK_STREAM = 1 << 32  # added to a run's seed: masks are drawn apart from the order of the batches

Mode = Literal["auto", "eager", "static", "compiled", "pieces", "graph", "pieces graph", "compiled graph"]


class Epoch(NamedTuple):
    """What is known after an epoch; a line of metrics.jsonl also has the run's `device_share` up to then."""

    epoch: int  # 1-based
    lr: float
    loss: float  # mean over the epoch's batches
    validation: dict[str, float]  # accuracy by slice
    validation_accuracy: float  # mean of slices
    train_seconds: float  # `waited_seconds` among them
    examples_per_second: float
    waited_seconds: float | None = None  # for its turn with the device; None if it trained without one


class Outcome(NamedTuple):
    """What a finished run knows about itself."""

    model: LanguageModel
    epochs: list[Epoch]
    selected_epoch: int
    stopped_early: bool
    validation: dict[str, Score]
    test: dict[str, Score]
    train_seconds: float
    examples_per_second: float
    peak_memory_bytes: int | None
    backends: dict[str, list[str]]
    execution: Execution = Execution()
    waited_seconds: float | None = None  # as in Epoch
    resumed: bool = False  # it went on from a checkpoint


def train(
    config: RunConfig,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[Epoch], Any] | None = None,
    load: Callable[[DataConfig, str], list[tuple[Slice, Labelled]]] = load_split,
    checkpoint: Path | str | None = None,
    mode: Mode = "auto",
) -> Outcome:
    """Train and score one run.

    On a CPU the same config gives the same numbers on the same versions and kind of processor; another kind rounds
    otherwise. On a GPU sums of gradients may be added in another order each time. Runs of one config then agree to
    rounding and drift apart from there.

    Args:
        on_epoch: called after each epoch.
        load: may keep datasets that several runs share.
        checkpoint: a file that is replaced after each epoch, before `on_epoch`. If it exists, the run goes on from
            there: first `on_epoch` is called again for every epoch in it, so that whoever writes metrics starts a
            new file. On a CPU a resumed run has the numbers of an uninterrupted one, bit for bit. If it cannot be
            written, the one before stays. The file is left behind at the end: whoever keeps the outcome deletes it
            then.
        mode: "eager" runs operation by operation, "graph" and "compiled graph" replay CUDA graphs of one training
            step and one evaluation batch for each shape (see `zoology.graphs`), "static" and "compiled" are those
            steps without a graph. "pieces" are compiled but for the calls that the compiler refuses.
            "auto" is eager on a CPU and the fastest that works on a GPU; `Outcome.execution` says which it was.

    Raises:
        TrainingDiverged: a loss is not finite.
        ValueError: a precision that the device lacks, or a checkpoint of another run.
    """
    device = torch.device(device)
    check_precision(config.train.precision, device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), computing_in(config.train.precision, device):
        torch.manual_seed(config.seed)
        run = _Run(config, device, load, mode)
        return run.finish(on_epoch or (lambda epoch: None), None if checkpoint is None else Path(checkpoint))


class _Run:
    """The state of a run between epochs."""

    def __init__(self, config: RunConfig, device: torch.device, load: Callable, mode: Mode):
        self.config, self.device = config, device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.model = LanguageModel(config.model).to(device)
        self.order = torch.Generator().manual_seed(config.seed)
        self.masks = torch.Generator().manual_seed(config.seed + _MASK_STREAM)
        self.loop = self._make_loop(load, mode)
        self.sizes = [data.tokens.shape[0] for _, data in self.loop.splits["train"]]
        self.turn = turn_on(device) if self.loop.fills_device else None
        self.epochs: list[Epoch] = []
        self.best: tuple[float, int, dict] | None = None
        self.scores: dict[str, Score] | None = None  # on validation, of the current weights
        self.resumed = False
        self.told = False  # that a checkpoint could not be written

    def _make_loop(self, load: Callable, mode: Mode):
        def splits():
            return {
                split: [(part, data.to(self.device)) for part, data in load(self.config.data, split)]
                for split in ("train", "validation", "test")
            }

        reason = ""
        if mode not in ("auto", "eager") or (mode == "auto" and self.device.type == "cuda"):
            from zoology.graphs import fetch_loop

            loop, reason = fetch_loop(self.config, self.device, splits, mode)
            if loop is not None:
                loop.load(self.model, self.config)
                return loop
        loop = EagerLoop(self.config, self.model, splits(), self.masks)
        loop.execution = loop.execution._replace(reason=reason)
        return loop

    @property
    def done(self) -> bool:
        """Whether training is over."""
        return len(self.epochs) == self.config.train.epochs or self._good_enough()

    def _good_enough(self) -> bool:
        threshold = self.config.train.stop_accuracy
        return threshold is not None and bool(self.epochs) and self.epochs[-1].validation_accuracy > threshold

    def finish(self, on_epoch: Callable[[Epoch], Any], checkpoint: Path | None) -> Outcome:
        """Train to the end and score."""
        if checkpoint is not None:
            self._resume(checkpoint)
            for epoch in self.epochs:
                on_epoch(epoch)
        while not self.done:
            self._train_epoch()
            if checkpoint is not None:
                self._keep(checkpoint)
            on_epoch(self.epochs[-1])
        if self.best is not None:
            self.model.load_state_dict(self.best[2])
            self.loop.restore(self.model)
            self.scores = None
        return self._outcome()

    def _train_epoch(self) -> None:
        config, number = self.config, len(self.epochs) + 1
        started = time.perf_counter()
        shuffle, size = config.data.shuffle, config.data.batch_size
        batches = list(epoch_batches(self.sizes, size, shuffle=shuffle, generator=self.order))
        asked = time.perf_counter()
        with self.turn or contextlib.nullcontext(False) as alone:
            waited = time.perf_counter() - asked if alone else None
            loss = self.loop.train_epoch(number, batches)
            seconds = time.perf_counter() - started
            self.scores = self.loop.score("validation")
        accuracies = {label: result.accuracy for label, result in self.scores.items()}
        mean = sum(accuracies.values()) / len(accuracies)
        rate = learning_rate(config.train, (number - 1) / config.train.epochs)
        self.epochs.append(Epoch(number, rate, loss, accuracies, mean, seconds, sum(self.sizes) / seconds, waited))
        if config.train.select == "best" and (self.best is None or mean > self.best[0]):
            self.loop.export(self.model)
            self.best = (mean, number, copy.deepcopy(self.model.state_dict()))

    def _outcome(self) -> Outcome:
        validation = self.loop.score("validation") if self.scores is None else self.scores
        test = self.loop.score("test")
        self.loop.export(self.model)
        total = sum(epoch.train_seconds for epoch in self.epochs)
        waits = [epoch.waited_seconds for epoch in self.epochs]
        peak = None
        if self.device.type == "cuda":
            peak = max(torch.cuda.max_memory_allocated(self.device), getattr(self.loop, "peak_memory_bytes", 0))
        return Outcome(
            model=self.model,
            epochs=self.epochs,
            selected_epoch=self.best[1] if self.best else len(self.epochs),
            stopped_early=len(self.epochs) < self.config.train.epochs,
            validation=validation,
            test=test,
            train_seconds=total,
            examples_per_second=len(self.epochs) * sum(self.sizes) / total,
            peak_memory_bytes=peak,
            backends=self.loop.backends(),
            execution=self.loop.execution,
            waited_seconds=None if None in waits else sum(waits),
            resumed=self.resumed,
        )

    # -- checkpoints ----------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "epochs": [epoch._asdict() for epoch in self.epochs],
            "best": self.best,
            "loop": self.loop.state_dict(),
            "order": self.order.get_state(),
            "masks": self.masks.get_state(),
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _keep(self, path: Path) -> None:
        """Write a checkpoint; on a full disk the run goes on with the one before, and tries again after each epoch."""
        try:
            write_checkpoint(path, self.config.run_id, self._state())
        except OSError as error:
            if not self.told:
                log.warning("checkpoint %s cannot be written, training goes on without a newer one: %s", path, error)
            self.told = True

    def _resume(self, path: Path) -> None:
        state = read_checkpoint(path, self.config.run_id)
        if state is None:
            return
        kind = self.loop.state_dict()["kind"]
        if state["loop"]["kind"] != kind or (state["device_random"] is None) != (self.device.type == "cpu"):
            log.warning("checkpoint %s was written on another kind of device or loop: starting anew", path)
            return
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.best = None if state["best"] is None else tuple(state["best"])
        self.loop.load_state_dict(state["loop"])
        self.order.set_state(state["order"])
        self.masks.set_state(state["masks"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_random"], self.device)
        self.resumed = True
