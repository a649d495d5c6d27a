"""Multi-query associative recall (MQAR), and the published benchmark's own examples of it."""

import math
from typing import ClassVar

import numpy as np
import torch

from .base import IGNORE_INDEX, Batch, whole_number
from .recall import Context, RecallTask, draw_pairs, interleave
from .registry import register
from .samplers import Stream


@register("mqar")
class MQAR(RecallTask):
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

    def required_bits(self) -> float:
        """num_kv_pairs * log2(vocab_size / 2): one value of each key; more passes need no more."""
        return self.num_kv_pairs * math.log2(self.vocab_size - self.vocab_size // 2)

    def draw_context(self, stream: Stream, n: int) -> Context:
        keys, values = draw_pairs(stream, n, self.vocab_size, self.num_kv_pairs)
        return Context(interleave(keys, values), keys[..., None], values, keys)


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

    Raises ValueError as MQAR does, for vocab_size <= seq_len, and for a seed outside [0, 2^32).
    """
    MQAR(vocab_size=vocab_size, seq_len=seq_len, num_kv_pairs=num_kv_pairs, power_a=power_a)
    if vocab_size <= seq_len:
        raise ValueError(f"vocab_size={vocab_size}: must exceed seq_len={seq_len}, as the published code demands")
    num_examples = whole_number("num_examples", num_examples, at_least=1)
    if whole_number("seed", seed, at_least=0) >= 1 << 32:
        raise ValueError(f"seed={seed}: must be below 2^32")
    random = np.random.RandomState(seed)
    half, context = vocab_size // 2, 2 * num_kv_pairs
    slots = (seq_len - context) // 2
    weights = power_a * np.arange(1, slots + 1) ** (power_a - 1)
    weights /= weights.sum()

    keys, values, slot = (np.empty((num_examples, num_kv_pairs), dtype=np.int64) for _ in range(3))
    # Whole permutations are what the published draws consume, though only their heads are used.
    for rows, size in ((keys, half - 1), (values, vocab_size - half)):
        for row in rows:
            row[:] = random.permutation(size)[:num_kv_pairs]
    keys += 1
    values += half
    for row in slot:
        row[:] = random.choice(slots, size=num_kv_pairs, replace=False, p=weights)

    inputs = np.zeros((num_examples, seq_len), dtype=np.int64)
    labels = np.full((num_examples, seq_len), IGNORE_INDEX, dtype=np.int64)
    inputs[:, :context] = interleave(keys, values)
    np.put_along_axis(inputs, context + 2 * slot, keys, axis=1)
    np.put_along_axis(labels, context + 2 * slot, values, axis=1)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))
