"""Set disjointness: which token do two sets share?"""

from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from .base import IGNORE_INDEX, Task
from .registry import register
from .samplers import Stream

FIRST_SET, SECOND_SET, ANSWER, NUM_SPECIAL = 1, 2, 3, 4
"""Tokens before the first set, before the second, and of the question; 0 is kept for masking."""


@register("set_disjointness")
class SetDisjointness(Task):
    """Two sets, [1] A [2] B [3]: at [3] the model must give the one token that is in both.

    A has `first_size` tokens and B `second_size`, distinct but for the shared one, which stands at a random place
    of either; they are drawn from [4, V). Whether the longer set comes first decides how much a causal model has
    to carry. Each example splits the vocabulary between A and B anew: with a fixed split the answer would be the
    one token of A's part in B, and A need not be read.
    """

    source: ClassVar[str] = "Just read twice, arXiv:2407.05483; HazyResearch/prefix-linear-attention (7490f22)"
    example: ClassVar[dict] = {"vocab_size": 32, "first_size": 3, "second_size": 6}

    vocab_size: int = Field(2048, ge=NUM_SPECIAL + 2, le=1 << 24)
    first_size: int = Field(4, ge=1)
    second_size: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _fits(self):
        needed = self.first_size + self.second_size
        if needed > (elements := self.vocab_size - NUM_SPECIAL):
            raise ValueError(
                f"first_size={self.first_size} and second_size={self.second_size} draw {needed} tokens, but "
                f"vocab_size={self.vocab_size} has {elements} for them: must be at least {needed + NUM_SPECIAL}"
            )
        return self

    @property
    def seq_len(self) -> int:
        return self.first_size + self.second_size + 3

    @property
    def prefix_length(self) -> int:
        return self.seq_len - 1

    def required_bits(self) -> float:
        """One bit for each token of the set read first; of the smaller set, if the context is read twice.

        The theorem is asymptotic, Omega(max(|A|, |B|)) in the worst order and Omega(min(|A|, |B|)) with a second
        pass; its constant is taken as 1.
        """
        return float(self.first_size)

    def required_bits_after(self, num_passes: int) -> float:
        return float(self.first_size if num_passes == 1 else min(self.first_size, self.second_size))

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.first_size
        tokens = stream.distinct(NUM_SPECIAL, self.vocab_size, n, size + self.second_size)
        place_in_first = stream.integers(0, size, n).astype(np.int64)
        place_in_second = stream.integers(0, self.second_size, n).astype(np.int64)
        rows = np.arange(n)
        shared = tokens[rows, place_in_first]
        tokens[rows, size + place_in_second] = shared

        inputs = np.empty((n, self.seq_len), dtype=np.int64)
        inputs[:, 0] = FIRST_SET
        inputs[:, 1 : 1 + size] = tokens[:, :size]
        inputs[:, 1 + size] = SECOND_SET
        inputs[:, 2 + size : -1] = tokens[:, size:]
        inputs[:, -1] = ANSWER
        labels = np.full_like(inputs, IGNORE_INDEX)
        labels[:, -1] = shared
        return inputs, labels
