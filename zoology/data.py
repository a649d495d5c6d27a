"""Datasets in memory, and batches of them: tokens, and the positions and symbols of their labels only.

Axes: N examples, T time, P labelled positions per example (the most of any example; shorter rows are padded).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zoology.config import DataConfig, MaskedPrefix, Slice
from zoology.tasks import IGNORE_INDEX, Batch


class Labelled(NamedTuple):
    """Examples with their labels gathered: tokens [N, T], positions [N, P], targets [N, P].

    Rows with fewer than P labels are padded with position 0 and target IGNORE_INDEX. Kept in 16 bits where the
    numbers fit, else in 32: a quarter or half of the memory on the device.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor

    def rows(self, index: Tensor | slice) -> Labelled:
        """Some examples, as the int64 that indexing and losses want."""
        return Labelled(*(tensor[index].long() for tensor in self))

    def to(self, device: torch.device | str) -> Labelled:
        """A copy on `device`."""
        return Labelled(*(tensor.to(device) for tensor in self))


def gather_labels(batch: Batch) -> Labelled:
    """Where the labels are and what they are. Raises ValueError for a batch in which an example has no label."""
    labelled = batch.labels != IGNORE_INDEX
    counts = labelled.sum(1)
    if int(counts.min()) == 0:
        raise ValueError(f"example {int(counts.argmin())} has no label: every label is {IGNORE_INDEX}")
    width = int(counts.max())
    # A stable sort of "not labelled" brings each row's labelled positions to its front, in order.
    positions = torch.argsort(~labelled, dim=1, stable=True)[:, :width]
    targets = batch.labels.gather(1, positions)
    positions = positions.masked_fill(targets == IGNORE_INDEX, 0)
    return Labelled(compact(batch.inputs), compact(positions), compact(targets))


def compact(numbers: Tensor) -> Tensor:
    """Integers in the smallest of int16 and int32 that holds them; unchanged if they are in it already."""
    if numbers.dtype == torch.int16:
        return numbers
    low, high = torch.aminmax(numbers)
    limits = torch.iinfo(torch.int16)
    return numbers.to(torch.int16 if limits.min <= int(low) and int(high) <= limits.max else torch.int32)


def load_split(config: DataConfig, split: str) -> list[tuple[Slice, Labelled]]:
    """Generate every slice of "train", "validation" or "test"."""
    parts = getattr(config, split)
    return [(part, gather_labels(part.task.split(split, part.num_examples, config.seed))) for part in parts]


def mask_prefix(batch: Labelled, prefix_length: int, masking: MaskedPrefix, generator: torch.Generator) -> Labelled:
    """Hide a share of the first `prefix_length` tokens and ask for them: their places and tokens become further labels.

    The number K of hidden tokens is the same in each row, round(share * prefix_length) and at least 1, so that shapes
    do not depend on the draw (the published code flips a coin for each token). Returns masked tokens [N, T], positions
    and targets [N, P + K], the last K columns being those of the hidden tokens. `generator` is one of the CPU.
    """
    draws = torch.rand(batch.tokens.shape[0], prefix_length, generator=generator)
    return hide_tokens(batch, draws.to(batch.tokens.device), masking)[0]


def hide_tokens(batch: Labelled, draws: Tensor, masking: MaskedPrefix) -> tuple[Labelled, Tensor]:
    """`mask_prefix` by given draws [N, prefix_length], the smallest of which are hidden; also their places [N, K]."""
    hidden = draws.argsort(dim=1)[:, : max(1, round(masking.share * draws.shape[1]))]
    masked = Labelled(
        batch.tokens.scatter(1, hidden, masking.mask_token),
        torch.cat([batch.positions, hidden], dim=1),
        torch.cat([batch.targets, batch.tokens.gather(1, hidden)], dim=1),
    )
    return masked, hidden


def epoch_batches(
    sizes: list[int], batch_size: int, *, shuffle: bool, generator: torch.Generator
) -> Iterator[tuple[int, Tensor]]:
    """One epoch over slices of `sizes` examples: (slice, row indices) for each batch.

    Every row comes once; the last batch of a slice may be short. Shuffled, rows are permuted within their slice
    and the batches of all slices among each other.
    """
    batches = []
    for index, size in enumerate(sizes):
        rows = torch.randperm(size, generator=generator) if shuffle else torch.arange(size)
        batches += [(index, part) for part in rows.split(batch_size)]
    order = torch.randperm(len(batches), generator=generator).tolist() if shuffle else range(len(batches))
    yield from (batches[position] for position in order)
