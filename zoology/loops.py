"""How batches become updates: the plain loop over an eager model, which is the specification of the fast one.

A loop is built from a config, a device, a model whose weights it starts from, and the splits on that device. It
offers `train_epoch(number, batches)`, `score(split)`, `export(model)`, `state_dict()` and `load_state_dict()`; what
runs draw at random besides dropout comes from outside, as lists of batches.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoology.config import RunConfig, Slice, TrainConfig
from zoology.data import Labelled, mask_prefix
from zoology.evaluate import Score, score
from zoology.model import LanguageModel
from zoology.precision import autocast
from zoology.tasks import IGNORE_INDEX

Splits = dict[str, list[tuple[Slice, Labelled]]]
Batches = list[tuple[int, Tensor]]  # (slice, rows) by step

KEPT_LOOPS = 2
"""How many built loops a process keeps for later runs; each holds its graphs' memory."""


class TrainingDiverged(RuntimeError):
    """The loss stopped being a number; the message names epoch and step."""


class Execution(NamedTuple):
    """How the steps of a run were executed, and what was given up for what reason."""

    mode: Literal["eager", "static", "compiled", "pieces", "graph", "pieces graph", "compiled graph"] = "eager"
    loss: str = "reference"  # backend of the linear cross-entropy
    reason: str = ""  # why nothing faster ran, where something faster was tried
    build_seconds: float = 0.0  # all attempts: tracing, compiling, recording; 0 if an earlier run built it
    reused: bool = False  # built by an earlier run of this process


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


def epoch_rates(config: TrainConfig, number: int, steps: int) -> list[float]:
    """The learning rate of every step of epoch `number` (1-based)."""
    done = [number - 1 + (step / steps if config.schedule == "step" else 0) for step in range(steps)]
    return [learning_rate(config, progress / config.epochs) for progress in done]


def check_losses(losses: Tensor, number: int, config: TrainConfig) -> float:
    """Mean of an epoch's losses [steps]; raises TrainingDiverged naming epoch and step if one is not finite."""
    broken = (~losses.isfinite()).nonzero()
    if len(broken):
        step = int(broken[0])
        raise TrainingDiverged(
            f"the loss is {float(losses[step])} at epoch {number}, step {step + 1} of {len(losses)} "
            f"(lr={config.lr}): a smaller learning rate or train.clip_norm may help"
        )
    return float(losses.mean())


class EagerLoop:
    """One operation after the other, as PyTorch runs them: any device, any architecture."""

    fills_device = False  # a GPU waits for the host, and has time for others meanwhile

    def __init__(self, config: RunConfig, model: LanguageModel, splits: Splits, masks: torch.Generator):
        self.config, self.model, self.splits, self.masks = config, model, splits, masks
        self.device = model.embedding.weight.device
        self.execution = Execution()
        train = config.train
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, weight_decay=train.weight_decay)

    def train_epoch(self, number: int, batches: Batches) -> float:
        """One pass over the batches: their mean loss."""
        config, model = self.config.train, self.model
        model.train()
        losses = torch.zeros(len(batches), device=self.device)
        rates = epoch_rates(config, number, len(batches))
        for step, (index, rows) in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = rates[step]
            part, data = self.splits["train"][index]
            with autocast(config.precision, self.device):
                loss = self._loss(part, data.rows(rows.to(self.device)))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            self.optimizer.step()
            losses[step] = loss.detach()
        # One look at the losses an epoch: asking at each step would make a GPU wait for the host.
        return check_losses(losses, number, config)

    def _loss(self, part: Slice, batch: Labelled) -> Tensor:
        """The training loss of a batch of one slice."""
        prefix_length, masking = part.task.prefix_length, self.config.train.masked_prefix
        if masking is None or prefix_length == 0:
            return labelled_loss(self.model, batch, prefix_length)
        masked = mask_prefix(batch, prefix_length, masking, self.masks)
        added = masked.positions.shape[1] - batch.positions.shape[1]
        return labelled_loss(self.model, masked, prefix_length, num_masked=added, masked_weight=masking.weight)

    def score(self, split: str) -> dict[str, Score]:
        """Accuracy on every slice of a split."""
        with autocast(self.config.train.precision, self.device):
            return score_slices(self.model, self.splits[split], self.config.data.batch_size)

    def export(self, model: LanguageModel) -> None:
        """Write the current weights into `model`, which may be the one that is trained."""
        if model is not self.model:
            model.load_state_dict(self.model.state_dict())

    def restore(self, model: LanguageModel) -> None:
        """Take the weights of `model`."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    def backends(self) -> dict[str, list[str]]:
        return backends_used(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer, to go on from here."""
        return {"kind": "eager", "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


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


def backends_used(model: LanguageModel) -> dict[str, list[str]]:
    """The backends of every layer that ran, keys like `1.based`."""
    return {
        f"{index}.{model.config.layer_at(index).name}": block.mixer.backends_used()
        for index, block in enumerate(model.blocks)
    }
