"""Accuracy on recall tasks: of the suite's own models, and of any callable from token ids to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoology.data import Labelled, gather_labels
from zoology.tasks import IGNORE_INDEX, Task


class Score(NamedTuple):
    """Accuracy over examples (each the mean over its labels), its standard error, and how many there were."""

    accuracy: float
    stderr: float
    num_examples: int


def score(predict: Callable[[Labelled], Tensor], data: Labelled, batch_size: int) -> Score:
    """Score `predict`, which maps a batch of examples to predicted symbols [B, P], on all of `data`."""
    correct = []
    for rows in torch.arange(data.tokens.shape[0], device=data.tokens.device).split(batch_size):
        batch = data.rows(rows)
        scored = batch.targets != IGNORE_INDEX
        hits = (predict(batch) == batch.targets) & scored
        correct.append(hits.sum(1, dtype=torch.float64) / scored.sum(1))
    return summarise(torch.cat(correct))


def summarise(per_example: Tensor) -> Score:
    """Mean, standard error and number of the accuracies of examples [N]."""
    per_example = per_example.cpu()
    number = per_example.numel()
    spread = float(per_example.std()) / number**0.5 if number > 1 else float("nan")
    return Score(float(per_example.mean()), spread, number)


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Any],
    task: Task,
    num_examples: int,
    seed: int,
    *,
    alignment: Literal["same", "next"] = "same",
    split: str = "test",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Score:
    """Score any model on a task, without training.

    Args:
        model: maps tokens [B, T] int64 to logits [B, T, V], or to an object with such a `logits`. One with a true
            attribute `takes_prefix` is also given `prefix_length=task.prefix_length`.
        alignment: "same" scores the logits at a label's own position (in MQAR the key being asked, so this also
            suits a causal language model, whose logits there are for the token that follows); "next" scores the
            logits one position earlier, for tasks whose labels sit on the answer tokens themselves.
        split, seed, num_examples: which examples, as in `Task.split`.
        batch_size: examples per call of the model.
        device: where tokens are when the model gets them; the model must be there already.

    Returns:
        Accuracy, standard error over examples, number of examples.

    Raises:
        ValueError: an unknown alignment, logits of the wrong shape, "next" with a label at position 0, or a batch_size
            below 1.
    """
    if alignment not in ("same", "next"):
        raise ValueError(f"alignment={alignment!r}: must be 'same' or 'next'")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    data = gather_labels(task.split(split, num_examples, seed)).to(device)
    shift = 1 if alignment == "next" else 0
    if bool(((data.positions < shift) & (data.targets != IGNORE_INDEX)).any()):
        raise ValueError("alignment='next': a label at position 0 has no token before it")

    prefix = {"prefix_length": task.prefix_length} if getattr(model, "takes_prefix", False) else {}

    def predict(batch: Labelled) -> Tensor:
        output = model(batch.tokens, **prefix)
        logits = getattr(output, "logits", output)
        expected = (*batch.tokens.shape, task.vocab_size)
        if logits.ndim != 3 or logits.shape[:2] != expected[:2] or logits.shape[2] < expected[2]:
            raise ValueError(f"the model returned logits of shape {list(logits.shape)}, expected {list(expected)}")
        at = (batch.positions - shift).clamp_min(0)
        return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1])).argmax(-1)

    was_training = isinstance(model, nn.Module) and model.training
    if was_training:
        model.eval()
    try:
        return score(predict, data, batch_size)
    finally:
        if was_training:
            model.train()
