"""Multi-query associative recall (MQAR)."""

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from .base import IGNORE_INDEX, Batch, Task, whole_number
from .registry import register
from .samplers import Stream, power_law_handicaps


@register("mqar")
class MQAR(Task):
    """Key-value pairs, then each key once more: there the model must give the key's value.

    Tokens [1, V/2) are keys and [V/2, V) values; the D keys of an example are distinct, its values too. The
    pairs fill the first 2 D num_passes positions. The rest has S = (T - 2 D num_passes) / 2 slots of two
    positions; a key is asked at the first position of a slot, slot i = 1..S being drawn with weight
    i^(power_a - 1), without replacement. Every other position holds filler: token 0, or (random_non_queries)
    any token, or (filler="distinct") any token but the example's keys, so that no filler asks a question that
    is not scored.
    """

    source: ClassVar[str] = "Zoology, arXiv:2312.04927, sec. 4; num_passes: JRT, arXiv:2407.05483"
    example: ClassVar[dict] = {
        "vocab_size": 16,
        "seq_len": 16,
        "num_kv_pairs": 3,
        "random_non_queries": False,
    }

    vocab_size: int = Field(8192, ge=4, le=1 << 24)
    seq_len: int = Field(64, ge=4)
    num_kv_pairs: int = Field(4, ge=1)
    num_passes: int = Field(1, ge=1)
    power_a: float = Field(0.01, gt=0, le=10, allow_inf_nan=False)
    random_non_queries: bool = True
    filler: Literal["any", "distinct"] = "any"

    @model_validator(mode="after")
    def _fits(self):
        check_layout(self.seq_len, self.num_kv_pairs, self.num_passes)
        check_vocabulary(self.vocab_size, self.num_kv_pairs)
        if self.filler == "distinct" and not self.random_non_queries:
            raise ValueError("filler='distinct' with random_non_queries=False: without random filler it must be 'any'")
        return self

    @property
    def prefix_length(self) -> int:
        return 2 * self.num_kv_pairs * self.num_passes

    def required_bits(self) -> float:
        """num_kv_pairs * log2(vocab_size / 2): one value of each key; more passes need no more."""
        return self.num_kv_pairs * math.log2(self.vocab_size - self.vocab_size // 2)

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        keys, values = draw_pairs(stream, n, self.vocab_size, self.num_kv_pairs)
        slots = (self.seq_len - self.prefix_length) // 2
        asked = stream.race(power_law_handicaps(slots, self.power_a), n, self.num_kv_pairs)
        if not self.random_non_queries:
            inputs = np.zeros((n, self.seq_len), dtype=np.int64)
        elif self.filler == "any":
            inputs = stream.integers(0, self.vocab_size, n, self.seq_len).astype(np.int64)
        else:
            inputs = draw_filler_without(stream, keys, self.vocab_size, self.seq_len)
        context = inputs[:, : self.prefix_length].reshape(n, self.num_passes, self.num_kv_pairs, 2)
        context[..., 0] = keys[:, None]
        context[..., 1] = values[:, None]
        return ask(inputs, keys, values, self.prefix_length + 2 * asked)


def check_layout(seq_len: int, num_kv_pairs: int, num_passes: int = 1) -> None:
    """Raises ValueError unless the pairs, `num_passes` times, and a two-token slot for each question fit."""
    if seq_len % 2:
        raise ValueError(f"seq_len={seq_len}: must be even")
    if seq_len < (needed := 2 * num_kv_pairs * (num_passes + 1)):
        fits = seq_len // (2 * (num_passes + 1))
        raise ValueError(
            f"num_kv_pairs={num_kv_pairs} with num_passes={num_passes} needs "
            f"2 * num_kv_pairs * (num_passes + 1) = {needed} positions, but seq_len={seq_len}: "
            f"seq_len must be at least {needed}, or num_kv_pairs at most {fits}"
        )


def check_vocabulary(vocab_size: int, num_kv_pairs: int) -> None:
    """Raises ValueError unless there are as many keys as pairs."""
    if num_kv_pairs > (available := vocab_size // 2 - 1):
        raise ValueError(
            f"vocab_size={vocab_size} leaves vocab_size // 2 - 1 = {available} keys for "
            f"num_kv_pairs={num_kv_pairs}: vocab_size must be at least {2 * (num_kv_pairs + 1)}"
        )


def draw_pairs(stream: Stream, n: int, vocab_size: int, num_kv_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys of [1, V/2) and distinct values of [V/2, V), both [n, num_kv_pairs] int64."""
    keys = stream.distinct(1, vocab_size // 2, n, num_kv_pairs)
    return keys, stream.distinct(vocab_size // 2, vocab_size, n, num_kv_pairs)


def draw_filler_without(stream: Stream, keys: np.ndarray, vocab_size: int, seq_len: int) -> np.ndarray:
    """Uniform tokens of [0, V) that are none of the row's `keys` [n, D], [n, seq_len] int64."""
    n, num_keys = keys.shape
    rank = stream.integers(0, vocab_size - num_keys, n, seq_len).astype(np.int64)
    # The r-th token that is no key is r + #{j : key_(j) - j <= r}, keys sorted. Offsets keep the rows apart.
    row = np.arange(n)[:, None]
    free_before = (np.sort(keys, axis=1) - np.arange(num_keys) + row * vocab_size).ravel()
    passed = np.searchsorted(free_before, (rank + row * vocab_size).ravel(), side="right")
    return rank + passed.reshape(n, seq_len) - row * num_keys


def ask(inputs: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray):
    """`inputs` with `keys` written at `positions` (all [n, D]), and labels that hold `values` there."""
    labels = np.full(inputs.shape, IGNORE_INDEX, dtype=np.int64)
    np.put_along_axis(inputs, positions, keys, axis=1)
    np.put_along_axis(labels, positions, values, axis=1)
    return inputs, labels


def predecessor_mqar(
    vocab_size: int,
    num_examples: int,
    seq_len: int,
    seed: int,
    num_kv_pairs: int,
    power_a: float = 0.01,
) -> Batch:
    """The published benchmark's own examples, bit for bit: `inputs` and `labels`, [num_examples, seq_len] int64.

    The data of `multiquery_ar` in HazyResearch/zoology (d88d6f5) for random_non_queries=False and one pass: a
    Mersenne Twister seeded with `seed` draws, row by row, first all keys, then all values (each the head of a
    permutation of its half of the vocabulary), then all slots. With random filler the published data come from
    whatever state the global generator of PyTorch is in, and cannot be reproduced from a seed.

    Raises ValueError as MQAR does, for vocab_size <= seq_len, and for seed outside [0, 2^32).
    """
    MQAR(vocab_size=vocab_size, seq_len=seq_len, num_kv_pairs=num_kv_pairs, power_a=power_a)
    if vocab_size <= seq_len:
        raise ValueError(f"vocab_size={vocab_size}: must exceed seq_len={seq_len}, as the published code demands")
    num_examples = whole_number("num_examples", num_examples, at_least=1)
    if whole_number("seed", seed, at_least=0) >= 1 << 32:
        raise ValueError(f"seed={seed}: must be below 2^32")
    random = np.random.RandomState(seed)
    half, context = vocab_size // 2, 2 * num_kv_pairs
    shape = (num_examples, num_kv_pairs)
    slots = (seq_len - context) // 2
    weights = power_a * np.arange(1, slots + 1) ** (power_a - 1)
    weights /= weights.sum()

    keys, values, asked = np.empty(shape, int), np.empty(shape, int), np.empty(shape, int)
    # Whole permutations are what the published draws consume, though only their heads are used.
    for rows, size in ((keys, half - 1), (values, vocab_size - half)):
        for row in rows:
            row[:] = random.permutation(size)[:num_kv_pairs]
    keys += 1
    values += half
    for row in asked:
        row[:] = random.choice(slots, size=num_kv_pairs, replace=False, p=weights)

    inputs = np.zeros((num_examples, seq_len), dtype=np.int64)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    inputs, labels = ask(inputs, keys, values, context + 2 * asked)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))
