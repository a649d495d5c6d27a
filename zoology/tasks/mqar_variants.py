"""Variants of MQAR: overwritten keys, forgotten keys, two hops, two-token keys, nothing but questions, longer ones."""

import math
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from .base import IGNORE_INDEX, Task, whole_number
from .recall import Context, RecallTask, draw_pairs, interleave
from .registry import register
from .samplers import Stream

FORGOTTEN = 1
"""Stands for a value: "this key has none any more"."""


@register("last_value_mqar")
class LastValueMQAR(RecallTask):
    """MQAR in which some keys are given a second value after all pairs: the last value wins.

    The context is the D pairs, then num_updates pairs of randomly chosen keys with new values. All D + num_updates
    values are distinct. Every key is asked.
    """

    source: ClassVar[str] = "forgetting_mqar in HazyResearch/zoology (d88d6f5)"
    example: ClassVar[dict] = {
        "vocab_size": 20,
        "seq_len": 20,
        "num_kv_pairs": 3,
        "num_updates": 2,
        "random_non_queries": False,
    }

    num_updates: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _updates_fit(self):
        if self.num_updates > self.num_kv_pairs:
            raise ValueError(f"num_updates={self.num_updates}: must be at most num_kv_pairs={self.num_kv_pairs}")
        return self

    def check_vocabulary(self) -> None:
        super().check_vocabulary()
        values, needed = self.vocab_size - self.vocab_size // 2, self.num_kv_pairs + self.num_updates
        if needed > values:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {values} values for num_kv_pairs + num_updates = {needed}: "
                f"must be at least {2 * needed - 1}"
            )

    @property
    def context_length(self) -> int:
        return 2 * (self.num_kv_pairs + self.num_updates)

    def required_bits(self) -> float:
        """num_kv_pairs * log2(vocab_size / 2): the last value of each key."""
        return self.num_kv_pairs * math.log2(self.vocab_size - self.vocab_size // 2)

    def draw_context(self, stream: Stream, n: int) -> Context:
        pairs, half = self.num_kv_pairs, self.vocab_size // 2
        keys = stream.distinct(1, half, n, pairs)
        values = stream.distinct(half, self.vocab_size, n, pairs + self.num_updates)
        return updated(stream, keys, values[:, :pairs], values[:, pairs:])


@register("forgetting_mqar")
class ForgettingMQAR(RecallTask):
    """MQAR in which some keys lose their value after all pairs: asked for one of these, the answer is token 1.

    The context is the D pairs, then num_forgotten randomly chosen keys, each followed by token 1 in place of a
    value. Keys are tokens of [2, V/2). Every key is asked.
    """

    source: ClassVar[str] = "Zoology; a variant of forgetting_mqar in HazyResearch/zoology (d88d6f5)"
    example: ClassVar[dict] = {
        "vocab_size": 20,
        "seq_len": 20,
        "num_kv_pairs": 3,
        "num_forgotten": 2,
        "random_non_queries": False,
    }

    num_forgotten: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _forgotten_fit(self):
        if self.num_forgotten > self.num_kv_pairs:
            raise ValueError(f"num_forgotten={self.num_forgotten}: must be at most num_kv_pairs={self.num_kv_pairs}")
        return self

    def check_vocabulary(self) -> None:
        if self.num_kv_pairs > (available := self.vocab_size // 2 - 2):
            raise ValueError(
                f"vocab_size={self.vocab_size} leaves vocab_size // 2 - 2 = {available} keys for "
                f"num_kv_pairs={self.num_kv_pairs}: vocab_size must be at least {2 * (self.num_kv_pairs + 2)}"
            )

    @property
    def context_length(self) -> int:
        return 2 * (self.num_kv_pairs + self.num_forgotten)

    def required_bits(self) -> float:
        """log2 of num_kv_pairs choose num_forgotten, and log2(vocab_size / 2) for each key that keeps its value."""
        kept = self.num_kv_pairs - self.num_forgotten
        which = math.log2(math.comb(self.num_kv_pairs, self.num_forgotten))
        return which + kept * math.log2(self.vocab_size - self.vocab_size // 2)

    def draw_context(self, stream: Stream, n: int) -> Context:
        half = self.vocab_size // 2
        keys = stream.distinct(FORGOTTEN + 1, half, n, self.num_kv_pairs)
        values = stream.distinct(half, self.vocab_size, n, self.num_kv_pairs)
        return updated(stream, keys, values, np.full((n, self.num_forgotten), FORGOTTEN))


def updated(stream: Stream, keys: np.ndarray, values: np.ndarray, later: np.ndarray) -> Context:
    """The pairs `keys, values` [n, D], then `later` [n, U] as values of U of the keys, chosen at random."""
    chosen = stream.permutation(keys.shape[1], len(keys), later.shape[1])
    tokens = np.hstack([interleave(keys, values), interleave(np.take_along_axis(keys, chosen, 1), later)])
    answers = values.copy()
    np.put_along_axis(answers, chosen, later, axis=1)
    return Context(tokens, keys[..., None], answers, keys)


@register("two_hop_mqar")
class TwoHopMQAR(RecallTask):
    """Recall in two hops: the context says a -> b and b -> v, the question is a, the answer is v.

    D chains of distinct tokens: a from the first third of the vocabulary (without token 0), b from the second, v
    from the rest. The 2 D pairs stand in random order, so the second hop may be read before the first.
    """

    source: ClassVar[str] = "Zoology; a composition of two MQAR look-ups"
    example: ClassVar[dict] = {"vocab_size": 24, "seq_len": 12, "num_kv_pairs": 2, "random_non_queries": False}

    def check_vocabulary(self) -> None:
        check_thirds(self.vocab_size, self.num_kv_pairs, "num_kv_pairs")

    @property
    def context_length(self) -> int:
        return 4 * self.num_kv_pairs

    def required_bits(self) -> float:
        """num_kv_pairs * log2(vocab_size / 3): the final value of each first key."""
        return self.num_kv_pairs * math.log2(self.vocab_size - 2 * (self.vocab_size // 3))

    def draw_context(self, stream: Stream, n: int) -> Context:
        pairs, third = self.num_kv_pairs, self.vocab_size // 3
        first = stream.distinct(1, third, n, pairs)
        middle = stream.distinct(third, 2 * third, n, pairs)
        last = stream.distinct(2 * third, self.vocab_size, n, pairs)
        order = stream.permutation(2 * pairs, n)
        keys, values = np.hstack([first, middle]), np.hstack([middle, last])
        tokens = interleave(np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1))
        return Context(tokens, first[..., None], last, keys)


@register("compound_key_mqar")
class CompoundKeyMQAR(RecallTask):
    """MQAR whose keys are two tokens, neither of which decides the value alone.

    sqrt(D) first tokens (of the first third of the vocabulary, without token 0) and sqrt(D) second tokens (of the
    second third) combine to D = num_kv_pairs keys in random order, with distinct values from the rest. A question
    is both tokens, in a slot of three; the answer is due at the second.
    """

    source: ClassVar[str] = "compositional_mqar in HazyResearch/zoology (d88d6f5)"
    example: ClassVar[dict] = {"vocab_size": 24, "seq_len": 24, "random_non_queries": False}

    @model_validator(mode="after")
    def _is_a_grid(self):
        if math.isqrt(self.num_kv_pairs) ** 2 != self.num_kv_pairs:
            raise ValueError(f"num_kv_pairs={self.num_kv_pairs}: must be a square (1, 4, 9, 16, ...)")
        return self

    def check_vocabulary(self) -> None:
        check_thirds(self.vocab_size, math.isqrt(self.num_kv_pairs), "sqrt(num_kv_pairs)")
        if self.num_kv_pairs > (values := self.vocab_size - 2 * (self.vocab_size // 3)):
            raise ValueError(
                f"vocab_size={self.vocab_size} has {values} values for num_kv_pairs={self.num_kv_pairs}: must be "
                f"at least {3 * self.num_kv_pairs - 2}"
            )

    @property
    def question_length(self) -> int:
        return 2

    @property
    def context_length(self) -> int:
        return 3 * self.num_kv_pairs

    def required_bits(self) -> float:
        """num_kv_pairs * log2(vocab_size / 3): one value of each pair of tokens."""
        return self.num_kv_pairs * math.log2(self.vocab_size - 2 * (self.vocab_size // 3))

    def draw_context(self, stream: Stream, n: int) -> Context:
        third, side = self.vocab_size // 3, math.isqrt(self.num_kv_pairs)
        first = stream.distinct(1, third, n, side)
        second = stream.distinct(third, 2 * third, n, side)
        values = stream.distinct(2 * third, self.vocab_size, n, self.num_kv_pairs)
        cell = stream.permutation(self.num_kv_pairs, n)
        left, right = np.take_along_axis(first, cell // side, 1), np.take_along_axis(second, cell % side, 1)
        return Context(interleave(left, right, values), np.stack([left, right], axis=2), values, first)


def check_thirds(vocab_size: int, needed: int, what: str) -> None:
    """Raises ValueError unless the first third of the vocabulary, without token 0, has `needed` tokens."""
    if needed > (available := vocab_size // 3 - 1):
        raise ValueError(
            f"vocab_size={vocab_size} leaves vocab_size // 3 - 1 = {available} keys for {what}={needed}: "
            f"must be at least {3 * (needed + 1)}"
        )


@register("dense_mqar")
class DenseMQAR(Task):
    """MQAR in which every position after the context is a question, about a key drawn with replacement.

    No filler and no empty slots: the same recall with the most labels a sequence can hold, and questions that lie
    at every distance.
    """

    source: ClassVar[str] = "Zoology; MQAR (arXiv:2312.04927) without gaps"
    example: ClassVar[dict] = {"vocab_size": 16, "seq_len": 12, "num_kv_pairs": 3}

    vocab_size: int = Field(8192, ge=4, le=1 << 24)
    seq_len: int = Field(64, ge=3)
    num_kv_pairs: int = Field(4, ge=1)
    num_passes: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _fits(self):
        RecallTask.check_vocabulary(self)
        if self.seq_len <= self.prefix_length:
            raise ValueError(
                f"num_kv_pairs={self.num_kv_pairs} with num_passes={self.num_passes} needs {self.prefix_length} "
                f"positions of context, but seq_len={self.seq_len}: must be at least {self.prefix_length + 1}"
            )
        return self

    @property
    def prefix_length(self) -> int:
        return 2 * self.num_kv_pairs * self.num_passes

    def required_bits(self) -> float:
        """num_kv_pairs * log2(vocab_size / 2): one value of each key."""
        return self.num_kv_pairs * math.log2(self.vocab_size - self.vocab_size // 2)

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        keys, values = draw_pairs(stream, n, self.vocab_size, self.num_kv_pairs)
        asked = stream.integers(0, self.num_kv_pairs, n, self.seq_len - self.prefix_length).astype(np.int64)
        context = np.tile(interleave(keys, values), self.num_passes)
        inputs = np.hstack([context, np.take_along_axis(keys, asked, 1)])
        return inputs, np.hstack([np.full_like(context, IGNORE_INDEX), np.take_along_axis(values, asked, 1)])


def longer_than_train(task: Task, factors: tuple[int, ...] = (1, 2, 4, 8), grow: str = "filler") -> list[Task]:
    """`task` at `factors` times its length, to be tested on by a model trained at factor 1.

    grow="filler" keeps the number of pairs, so that only distances grow; grow="pairs" multiplies num_kv_pairs as
    well, so that what is to be carried grows too. Raises ValueError for another `grow`, a factor < 1, or a task
    without the option that grows.
    """
    growing = {"filler": ("seq_len",), "pairs": ("seq_len", "num_kv_pairs")}
    if grow not in growing:
        raise ValueError(f"grow={grow!r}: must be one of {', '.join(growing)}")
    for option in growing[grow]:
        if option not in type(task).model_fields:
            raise ValueError(f"task={task!r}: must have the option {option} to be made longer with grow={grow!r}")
    factors = [whole_number("factors", factor, at_least=1) for factor in factors]
    return [task.replace(**{option: factor * getattr(task, option) for option in growing[grow]}) for factor in factors]
