"""What MQAR and its variants share: a context of keys and values, then questions about it among filler."""

from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from .base import IGNORE_INDEX, Task, require_even
from .samplers import Stream, power_law_handicaps


class Context(NamedTuple):
    """What `n` examples say and ask: int64 arrays."""

    tokens: np.ndarray  # [n, C] one pass over the context
    questions: np.ndarray  # [n, Q, L] the tokens of each question
    answers: np.ndarray  # [n, Q] what is to be answered at the last token of each question
    keys: np.ndarray  # [n, K] the different tokens that filler may not repeat when it is distinct


class RecallTask(Task):
    """A context, `num_passes` times, then each question once, at random places among filler.

    With questions of L tokens the part after the context has S slots of L + 1 positions; a question stands at
    the start of its slot. Slots are drawn with weight i^(power_a - 1), i = 1..S, without replacement, and are
    given to the questions in the order in which they are drawn. Other positions hold filler: token 0, or
    (random_non_queries) any token, or (filler="distinct") any token but the context's keys, so that filler asks
    nothing.

    A variant sets `question_length` and defines `context_length`, `num_questions`, `draw_context` and
    `required_bits`.
    """

    vocab_size: int = Field(8192, ge=4, le=1 << 24)
    seq_len: int = Field(64, ge=4)
    num_kv_pairs: int = Field(4, ge=1)
    num_passes: int = Field(1, ge=1)
    power_a: float = Field(0.01, gt=0, le=10, allow_inf_nan=False)
    random_non_queries: bool = True
    filler: Literal["any", "distinct"] = "any"

    @model_validator(mode="after")
    def _fits(self):
        self.check_vocabulary()
        slot = self.question_length + 1
        needed = self.prefix_length + self.num_questions * slot
        require_even(self.seq_len)
        if self.seq_len < needed:
            raise ValueError(
                f"num_kv_pairs={self.num_kv_pairs} with num_passes={self.num_passes} needs {self.num_passes} * "
                f"{self.context_length} positions of context and {self.num_questions} * {slot} of questions, but "
                f"seq_len={self.seq_len}: seq_len must be at least {needed + needed % 2}, or num_kv_pairs smaller"
            )
        if self.filler == "distinct" and not self.random_non_queries:
            raise ValueError("filler='distinct' with random_non_queries=False: must be 'any' without random filler")
        return self

    def check_vocabulary(self) -> None:
        """Raises ValueError unless the vocabulary has as many keys, [1, V/2), as there are pairs."""
        if self.num_kv_pairs > (available := self.vocab_size // 2 - 1):
            raise ValueError(
                f"vocab_size={self.vocab_size} leaves vocab_size // 2 - 1 = {available} keys for "
                f"num_kv_pairs={self.num_kv_pairs}: vocab_size must be at least {2 * (self.num_kv_pairs + 1)}"
            )

    @property
    def question_length(self) -> int:
        """Tokens of a question."""
        return 1

    @property
    def context_length(self) -> int:
        """Positions of one pass over the context."""
        return 2 * self.num_kv_pairs

    @property
    def num_questions(self) -> int:
        return self.num_kv_pairs

    @property
    def prefix_length(self) -> int:
        return self.context_length * self.num_passes

    def draw_context(self, stream: Stream, n: int) -> Context:
        """What `n` examples say and ask."""
        raise NotImplementedError(f"{type(self).__name__} does not define draw_context(stream, n)")

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        context = self.draw_context(stream, n)
        length = self.question_length
        slots = (self.seq_len - self.prefix_length) // (length + 1)
        slot = stream.race(power_law_handicaps(slots, self.power_a), n, self.num_questions)
        first = self.prefix_length + (length + 1) * slot
        if not self.random_non_queries:
            inputs = np.zeros((n, self.seq_len), dtype=np.int64)
        elif self.filler == "any":
            inputs = stream.integers(0, self.vocab_size, n, self.seq_len).astype(np.int64)
        else:
            inputs = draw_without(stream, context.keys, self.vocab_size, self.seq_len)
        inputs[:, : self.prefix_length] = np.tile(context.tokens, self.num_passes)
        labels = np.full((n, self.seq_len), IGNORE_INDEX, dtype=np.int64)
        for i in range(length):
            np.put_along_axis(inputs, first + i, context.questions[..., i], axis=1)
        np.put_along_axis(labels, first + length - 1, context.answers, axis=1)
        return inputs, labels


def interleave(*columns: np.ndarray) -> np.ndarray:
    """[n, D] arrays a, b, ... as [n, D * len(columns)]: a_1 b_1 ... a_2 b_2 ..."""
    return np.stack(columns, axis=2).reshape(len(columns[0]), -1)


def draw_pairs(stream: Stream, n: int, vocab_size: int, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys of [1, V/2) and distinct values of [V/2, V), both [n, num_pairs] int64."""
    keys = stream.distinct(1, vocab_size // 2, n, num_pairs)
    return keys, stream.distinct(vocab_size // 2, vocab_size, n, num_pairs)


def draw_without(stream: Stream, tokens: np.ndarray, vocab_size: int, seq_len: int) -> np.ndarray:
    """Uniform tokens of [0, V) that are none of the row's different `tokens` [n, K]; [n, seq_len] int64."""
    n, count = tokens.shape
    rank = stream.integers(0, vocab_size - count, n, seq_len).astype(np.int64)
    # The r-th token left is r + #{j : token_j - j <= r}, tokens sorted. Offsets keep the rows apart.
    row = np.arange(n)[:, None]
    left_before = (np.sort(tokens, axis=1) - np.arange(count) + row * vocab_size).ravel()
    passed = np.searchsorted(left_before, (rank + row * vocab_size).ravel(), side="right")
    return rank + passed.reshape(n, seq_len) - row * count
