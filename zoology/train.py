"""Training of one run: data, model and optimizer from a `RunConfig`, metrics by epoch, scores at the end."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoology.config import DataConfig, RunConfig, Slice, TrainConfig
from zoology.data import Labelled, epoch_batches, load_split, mask_prefix
from zoology.evaluate import Score, score
from zoology.model import LanguageModel
from zoology.tasks import IGNORE_INDEX

_MASK_STREAM = 1 << 32  # added to a run's seed: masks are drawn apart from the order of the batches


class TrainingDiverged(RuntimeError):
    """The loss stopped being a number; the message names epoch and step."""


class Epoch(NamedTuple):
    """What is known after an epoch: one line of metrics.jsonl."""

    epoch: int  # 1-based
    lr: float
    loss: float  # mean over the epoch's batches
    validation: dict[str, float]  # accuracy by slice
    validation_accuracy: float  # mean of slices
    train_seconds: float
    examples_per_second: float


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


def labelled_loss(
    model: LanguageModel, batch: Labelled, prefix_length: int = 0, *, num_masked: int = 0, masked_weight: float = 0.0
) -> Tensor:
    """Mean cross-entropy over the labels of a batch; head and softmax run at labelled positions only.

    Equal, gradients included, to the cross-entropy of `model(tokens)` against dense labels. The last `num_masked`
    columns of labels are those of `mask_prefix`: a mean of their own, which counts `masked_weight` times.
    """
    logits = model.labelled_logits(batch.tokens, batch.positions, prefix_length)
    asked = batch.targets.shape[1] - num_masked
    loss = _cross_entropy(logits[:, :asked], batch.targets[:, :asked])
    if num_masked:
        loss = loss + masked_weight * _cross_entropy(logits[:, asked:], batch.targets[:, asked:])
    return loss


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Cosine from `lr` at progress 0 to `min_lr` at progress 1, or constant."""
    if config.schedule == "constant":
        return config.lr
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


def train(
    config: RunConfig,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[Epoch], Any] | None = None,
    load: Callable[[DataConfig, str], list[tuple[Slice, Labelled]]] = load_split,
) -> Outcome:
    """Train and score one run. The same config gives the same numbers on the same device and versions.

    `on_epoch` is called after each epoch; `load` may keep datasets that several runs share. Raises
    TrainingDiverged at a loss that is not finite.
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        return _train(config, device, on_epoch or (lambda epoch: None), load)


def _train(
    config: RunConfig,
    device: torch.device,
    on_epoch: Callable[[Epoch], Any],
    load: Callable[[DataConfig, str], list[tuple[Slice, Labelled]]],
) -> Outcome:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = LanguageModel(config.model).to(device)
    splits = {
        split: [(part, data.to(device)) for part, data in load(config.data, split)]
        for split in ("train", "validation", "test")
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay)
    order = torch.Generator().manual_seed(config.seed)
    masks = torch.Generator().manual_seed(config.seed + _MASK_STREAM)
    epochs: list[Epoch] = []
    best: tuple[float, int, dict] | None = None
    stopped_early = False
    for number in range(1, config.train.epochs + 1):
        started = time.perf_counter()
        loss, examples = _train_epoch(model, optimizer, splits["train"], config, number, order, masks)
        seconds = time.perf_counter() - started
        scores = score_slices(model, splits["validation"], config.data.batch_size)
        accuracies = {label: result.accuracy for label, result in scores.items()}
        mean = sum(accuracies.values()) / len(accuracies)
        rate = learning_rate(config.train, (number - 1) / config.train.epochs)
        epochs.append(Epoch(number, rate, loss, accuracies, mean, seconds, examples / seconds))
        on_epoch(epochs[-1])
        if config.train.select == "best" and (best is None or mean > best[0]):
            best = (mean, number, copy.deepcopy(model.state_dict()))
        if config.train.stop_accuracy is not None and mean > config.train.stop_accuracy:
            stopped_early = number < config.train.epochs
            break
    if best is not None:
        model.load_state_dict(best[2])
    batch_size = config.data.batch_size
    total = sum(epoch.train_seconds for epoch in epochs)
    return Outcome(
        model=model,
        epochs=epochs,
        selected_epoch=best[1] if best else len(epochs),
        stopped_early=stopped_early,
        validation=score_slices(model, splits["validation"], batch_size),
        test=score_slices(model, splits["test"], batch_size),
        train_seconds=total,
        examples_per_second=len(epochs) * examples / total,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        backends={
            f"{index}.{config.model.layer_at(index).name}": block.mixer.backends_used()
            for index, block in enumerate(model.blocks)
        },
    )


def _train_epoch(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    parts: list[tuple[Slice, Labelled]],
    config: RunConfig,
    number: int,
    order: torch.Generator,
    masks: torch.Generator,
) -> tuple[float, int]:
    """One pass over the training slices: mean loss and the number of examples seen."""
    model.train()
    sizes = [data.tokens.shape[0] for _, data in parts]
    batches = list(epoch_batches(sizes, config.data.batch_size, shuffle=config.data.shuffle, generator=order))
    device = parts[0][1].tokens.device
    losses = torch.zeros(len(batches), device=device)
    for step, (index, rows) in enumerate(batches):
        done = number - 1 + (step / len(batches) if config.train.schedule == "step" else 0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, done / config.train.epochs)
        part, data = parts[index]
        loss = _batch_loss(model, part, data.rows(rows.to(device)), config.train, masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        losses[step] = loss.detach()
    # One look at the losses an epoch: asking at each step would make a GPU wait for the host.
    broken = (~losses.isfinite()).nonzero()
    if len(broken):
        step = int(broken[0])
        raise TrainingDiverged(
            f"the loss is {float(losses[step])} at epoch {number}, step {step + 1} of {len(batches)} "
            f"(lr={config.train.lr}): a smaller learning rate or train.clip_norm may help"
        )
    return float(losses.mean()), sum(sizes)


def _batch_loss(
    model: LanguageModel, part: Slice, batch: Labelled, config: TrainConfig, masks: torch.Generator
) -> Tensor:
    """The training loss of a batch of one slice."""
    prefix_length, masking = part.task.prefix_length, config.masked_prefix
    if masking is None or prefix_length == 0:
        return labelled_loss(model, batch, prefix_length)
    masked = mask_prefix(batch, prefix_length, masking, masks)
    added = masked.positions.shape[1] - batch.positions.shape[1]
    return labelled_loss(model, masked, prefix_length, num_masked=added, masked_weight=masking.weight)


@torch.no_grad()
def score_slices(model: LanguageModel, parts: list[tuple[Slice, Labelled]], batch_size: int) -> dict[str, Score]:
    """Accuracy on every slice, in evaluation mode."""
    model.eval()

    def predict(batch: Labelled, prefix_length: int) -> Tensor:
        return model.labelled_logits(batch.tokens, batch.positions, prefix_length).argmax(-1)

    return {
        part.label: score(partial(predict, prefix_length=part.task.prefix_length), data, batch_size)
        for part, data in parts
    }
