"""The six MAD tasks (mechanistic architecture design), with their published settings.

MAD shifts its labels: what it scores at a position is the token that comes next. Here the label of a position is
that next token, and the last token of a sequence stays in the inputs, unscored, so that sequences have the length
their setting names. With training=True, labels are as MAD trains on: every next token, not only the answers.
"""

import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from .base import IGNORE_INDEX, Task, require_even
from .registry import register
from .samplers import Stream, first_occurrence, stream_key

SOURCE = "MAD, arXiv:2403.17844; athms/mad-lab (0f49a45)"


class MADTask(Task):
    """A MAD task: fields default to its published baseline, `changes` are the published difficulties."""

    source: ClassVar[str] = SOURCE
    changes: ClassVar[dict[str, list]] = {}
    """Option to the values it takes, one at a time, the others at their defaults."""
    num_train_examples: ClassVar[list[int]] = [12_800, 6_400, 3_200, 1_600, 800]
    """Sizes of the training set, the baseline's first; the others are difficulties too."""

    @classmethod
    def published(cls) -> Iterator[tuple["MADTask", int]]:
        """Every published setting: the task and the number of its training examples, the baseline first."""
        baseline, *fewer = cls.num_train_examples
        yield cls(), baseline
        for option, values in cls.changes.items():
            for value in values:
                yield cls(**{option: value}), baseline
        for count in fewer:
            yield cls(), count


class InContextRecallTask(MADTask):
    """Pairs from a small alphabet, among noise: the value of a key that was seen before is asked."""

    vocab_size: int = Field(16, ge=2, le=1 << 24)
    seq_len: int = Field(128, ge=4)
    noise_vocab_size: int = Field(0, ge=0)
    frac_noise: float = Field(0.0, ge=0, lt=1)
    training: bool = False

    @model_validator(mode="after")
    def _fits(self):
        require_even(self.seq_len)
        if self.vocab_size - self.noise_vocab_size < 2:
            raise ValueError(
                f"vocab_size={self.vocab_size}: must exceed noise_vocab_size={self.noise_vocab_size} by at least 2, "
                "a key and a value"
            )
        if self.frac_noise and not self.noise_vocab_size:
            raise ValueError(f"frac_noise={self.frac_noise} with noise_vocab_size=0: needs tokens to be noise")
        return self

    @property
    def num_keys(self) -> int:
        return (self.vocab_size - self.noise_vocab_size) // 2

    @property
    def num_values(self) -> int:
        return self.vocab_size - self.noise_vocab_size - self.num_keys

    def required_bits(self) -> float:
        """log2 of the number of values, for each different key that is expected before the last question."""
        other = 1 - (1 - self.frac_noise) / self.num_keys
        never = (1 - 1 / self.num_keys) * other ** (self.seq_len // 2 - 2)
        return self.num_keys * (1 - never) * math.log2(self.num_values)

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        slots = self.seq_len // 2
        rows = np.arange(n)
        key = stream.integers(0, self.num_keys, n, slots).astype(np.int64)
        noise = stream.bernoulli(self.frac_noise, n, slots)
        noise[rows, stream.integers(0, slots - 1, n)] = False  # one pair at least comes before the last question
        noise[:, -1] = False
        # The last question is about a key drawn from those that were seen, each as likely.
        seen = np.zeros((n, self.num_keys), dtype=bool)
        row, slot = np.nonzero(~noise[:, :-1])
        seen[row, key[row, slot]] = True
        key[:, -1] = stream.pick(seen)
        # A noise slot holds a code of its own, so that it repeats nothing.
        first = first_occurrence(np.where(noise, self.num_keys + np.arange(slots), key))
        value = stream.integers(0, self.num_values, n, slots).astype(np.int64)
        value = np.take_along_axis(value, first, 1) + self.num_keys
        inputs = np.stack([key, value], axis=2)
        if self.frac_noise:
            low, high = self.vocab_size - self.noise_vocab_size, self.vocab_size
            inputs = np.where(noise[..., None], stream.integers(low, high, n, slots, 2), inputs)
        inputs = inputs.reshape(n, self.seq_len)
        if self.training:
            return inputs, next_tokens(inputs)
        labels = np.full_like(inputs, IGNORE_INDEX)
        labels[:, 0::2] = np.where(first < np.arange(slots), value, IGNORE_INDEX)
        return inputs, labels


@register("mad_in_context_recall")
class MADInContextRecall(InContextRecallTask):
    """Key-value pairs, keys drawn again and again: each time after the first the model must give the key's value.

    The first half of the vocabulary are keys, the second values; a key keeps a random value for the whole example.
    The last pair repeats a key that was seen.
    """

    example: ClassVar[dict] = {"vocab_size": 8, "seq_len": 16}
    changes: ClassVar[dict] = {"vocab_size": [32, 64, 128], "seq_len": [256, 512, 1024]}


@register("mad_noisy_recall")
class MADNoisyRecall(InContextRecallTask):
    """In-context recall in which a share of the pairs is replaced by two tokens of a vocabulary of noise.

    The last noise_vocab_size tokens are noise; a pair is noise with probability frac_noise, but the last, and one
    more at least, is not.
    """

    example: ClassVar[dict] = {"vocab_size": 12, "noise_vocab_size": 4, "seq_len": 16, "frac_noise": 0.4}
    changes: ClassVar[dict] = {
        "vocab_size": [48, 80, 144],
        "seq_len": [256, 512, 1024],
        "frac_noise": [0.4, 0.6, 0.8],
    }

    vocab_size: int = Field(32, ge=2, le=1 << 24)
    noise_vocab_size: int = Field(16, ge=0)
    frac_noise: float = Field(0.2, ge=0, lt=1)


@register("mad_fuzzy_recall")
class MADFuzzyRecall(MADTask):
    """In-context recall in which keys are key_length tokens and values 1 to value_length, different within each.

    The last token of the vocabulary pads the sequence on the left; of the others the first half make keys, the
    second values. As many pairs as surely fit are followed by one more of the keys, drawn from the pairs before.
    Every token of a value is scored if its key was seen before. With training=True keys have 1 to key_length
    tokens.
    """

    example: ClassVar[dict] = {"vocab_size": 10, "seq_len": 24, "key_length": 2, "value_length": 2}
    changes: ClassVar[dict] = {"vocab_size": [32, 64, 128], "seq_len": [256, 512, 1024]}

    vocab_size: int = Field(16, ge=3, le=1 << 24)
    seq_len: int = Field(128, ge=4)
    key_length: int = Field(3, ge=1)
    value_length: int = Field(3, ge=1)
    training: bool = False

    @model_validator(mode="after")
    def _fits(self):
        if self.num_keys < self.key_length or self.num_values < self.value_length:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {self.num_keys} key and {self.num_values} value tokens for "
                f"key_length={self.key_length} and value_length={self.value_length}: must be at least "
                f"{max(2 * self.key_length + 1, 2 * self.value_length)}"
            )
        if self.seq_len < 2 * (pair := self.key_length + self.value_length):
            raise ValueError(f"seq_len={self.seq_len}: must be at least 2 * (key_length + value_length) = {2 * pair}")
        return self

    @property
    def num_keys(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def num_values(self) -> int:
        return self.vocab_size - 1 - self.num_keys

    def required_bits(self) -> float:
        """Bits of a value (its length and tokens), for each of the fewest pairs that come before the last."""
        lengths = range(1, self.value_length + 1)
        tokens = sum(math.log2(math.perm(self.num_values, length)) for length in lengths) / self.value_length
        pairs = self.seq_len // (self.key_length + self.value_length) - 1
        return min(pairs, math.perm(self.num_keys, self.key_length)) * (math.log2(self.value_length) + tokens)

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        room = self.seq_len - self.key_length - self.value_length
        shortest_key = 1 if self.training else self.key_length
        most = room // (shortest_key + 1)  # pairs before the last, if all are as short as can be
        column = np.arange(most)
        key_size = stream.integers(shortest_key, self.key_length + 1, n, most).astype(np.int64)
        value_size = stream.integers(1, self.value_length + 1, n, most).astype(np.int64)
        keys = stream.distinct(0, self.num_keys, n * most, self.key_length).reshape(n, most, -1)
        values = stream.distinct(0, self.num_values, n * most, self.value_length).reshape(n, most, -1)
        keys[np.arange(self.key_length) >= key_size[..., None]] = -1

        code = keys[..., 0]
        for i in range(1, self.key_length):
            code = first_occurrence(code) * (self.num_keys + 1) + keys[..., i] + 1
        first = first_occurrence(code)
        value_size = np.take_along_axis(value_size, first, 1)
        values = np.take_along_axis(values, first[..., None], 1) + self.num_keys
        count = (np.cumsum(key_size + value_size, axis=1) <= room).sum(1)
        asked = stream.below(count)[:, None]

        def with_last(array):
            """`array` of all pairs, and after them that of the pair asked last."""
            index = asked.reshape(n, *[1] * (array.ndim - 1))
            return np.concatenate([array, np.take_along_axis(array, index, 1)], axis=1)

        repeated = with_last(first < column)
        repeated[:, -1] = True
        present = np.hstack([column < count[:, None], np.ones((n, 1), dtype=bool)])
        key_size = np.where(present, with_last(key_size), 0)
        value_size = np.where(present, with_last(value_size), 0)
        end = np.cumsum(key_size + value_size, axis=1)
        start = end - key_size - value_size + self.seq_len - end[:, -1:]

        inputs = np.full((n, self.seq_len), self.vocab_size - 1)
        labels = np.full((n, self.seq_len), IGNORE_INDEX)
        keys, values = with_last(keys), with_last(values)
        for i in range(self.key_length):
            row, pair = np.nonzero(i < key_size)
            inputs[row, start[row, pair] + i] = keys[row, pair, i]
        start += key_size
        for i in range(self.value_length):
            row, pair = np.nonzero(i < value_size)
            inputs[row, start[row, pair] + i] = values[row, pair, i]
            row, pair = np.nonzero((i < value_size) & repeated)
            labels[row, start[row, pair] + i - 1] = values[row, pair, i]
        return inputs, next_tokens(inputs) if self.training else labels


@register("mad_memorization")
class MADMemorization(MADTask):
    """Keys of a fixed dictionary, each followed by a place-holder: there the model must give the key's value.

    The same keys have the same values in every example, split and seed (map_seed makes another dictionary), so
    this measures what the weights hold, not the state. The last token of the vocabulary is the place-holder; of the
    others the first half are keys and the second values, no two keys sharing a value.
    """

    example: ClassVar[dict] = {"vocab_size": 9, "seq_len": 12}
    changes: ClassVar[dict] = {"vocab_size": [512, 1024, 2048, 4096, 8192]}
    num_train_examples: ClassVar[list[int]] = [256]

    vocab_size: int = Field(256, ge=3, le=1 << 24)
    seq_len: int = Field(32, ge=2)
    map_seed: int = Field(12345, ge=0)

    @model_validator(mode="after")
    def _fits(self):
        require_even(self.seq_len)
        return self

    @property
    def num_keys(self) -> int:
        return (self.vocab_size - 1) // 2

    def required_bits(self) -> float:
        """log2 of the number of keys: the key just read. The dictionary belongs in the weights."""
        return math.log2(self.num_keys)

    def dictionary(self) -> np.ndarray:
        """The value of each key, [num_keys] int64; a function of name, version, vocab_size and map_seed alone."""
        key = stream_key(self.name, self.version, "dictionary", self.vocab_size, self.map_seed)
        return Stream(key).distinct(self.num_keys, self.vocab_size - 1, 1, self.num_keys)[0]

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.full((n, self.seq_len), self.vocab_size - 1)
        inputs[:, 0::2] = stream.integers(0, self.num_keys, n, self.seq_len // 2)
        labels = np.full_like(inputs, IGNORE_INDEX)
        labels[:, 1::2] = self.dictionary()[inputs[:, 0::2]]
        return inputs, labels


@register("mad_compression")
class MADCompression(MADTask):
    """Random tokens, then compression tokens: at the i-th of these the model must give the i-th token.

    The last token of the vocabulary is the compression token; it fills the second half of the sequence. MAD decodes
    all tokens with a network of its own from what the model holds at one compression token after 31, 63, 127 or
    255; here the model itself writes them out, so that any causal model can be scored. Recurrent models carry the
    same state over the same gap; attention may look back, which MAD's decoder does not allow.
    """

    example: ClassVar[dict] = {"vocab_size": 8, "seq_len": 12}
    changes: ClassVar[dict] = {"vocab_size": [32, 64, 128], "seq_len": [126, 254, 510]}

    vocab_size: int = Field(16, ge=2, le=1 << 24)
    seq_len: int = Field(62, ge=2)

    @model_validator(mode="after")
    def _fits(self):
        require_even(self.seq_len)
        return self

    @property
    def prefix_length(self) -> int:
        return self.seq_len // 2

    def required_bits(self) -> float:
        """seq_len / 2 * log2(vocab_size - 1): every token."""
        return self.seq_len // 2 * math.log2(self.vocab_size - 1)

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = stream.integers(0, self.vocab_size - 1, n, self.seq_len // 2).astype(np.int64)
        inputs = np.hstack([tokens, np.full_like(tokens, self.vocab_size - 1)])
        return inputs, np.hstack([np.full_like(tokens, IGNORE_INDEX), tokens])


@register("mad_selective_copying")
class MADSelectiveCopying(MADTask):
    """Tokens scattered among blanks, a copy token, then blanks: there the model must give the tokens in order.

    The last token of the vocabulary is the copy token, the one before it the blank; num_tokens others are drawn
    with replacement. Each of the blanks before the copy token stands before a token drawn at random.
    """

    example: ClassVar[dict] = {"vocab_size": 8, "seq_len": 16, "num_tokens": 4}
    changes: ClassVar[dict] = {
        "vocab_size": [32, 64, 128],
        "seq_len": [512, 1024],
        "num_tokens": [32, 64, 96],
    }

    vocab_size: int = Field(16, ge=3, le=1 << 24)
    seq_len: int = Field(256, ge=4)
    num_tokens: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _fits(self):
        if self.seq_len < (needed := 2 * self.num_tokens + 2):
            raise ValueError(
                f"num_tokens={self.num_tokens} needs 2 * num_tokens + 2 = {needed} positions, but "
                f"seq_len={self.seq_len}: seq_len must be at least {needed}, or num_tokens at most "
                f"{(self.seq_len - 2) // 2}"
            )
        return self

    @property
    def prefix_length(self) -> int:
        return self.seq_len - self.num_tokens - 1

    def required_bits(self) -> float:
        """num_tokens * log2(vocab_size - 2): every token, in order."""
        return self.num_tokens * math.log2(self.vocab_size - 2)

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        count, blanks = self.num_tokens, self.prefix_length - self.num_tokens
        tokens = stream.integers(0, self.vocab_size - 2, n, count).astype(np.int64)
        before = np.sort(stream.integers(0, count, n, blanks), axis=1)
        # Token j comes after j tokens and the blanks before tokens 0..j; rows are kept apart by offsets.
        row = np.arange(n)[:, None]
        passed = np.searchsorted((before + row * count).ravel(), (np.arange(count) + row * count).ravel(), side="right")
        place = np.arange(count) + passed.reshape(n, count) - row * blanks
        inputs = np.full((n, self.seq_len), self.vocab_size - 2)
        np.put_along_axis(inputs, place, tokens, axis=1)
        inputs[:, self.prefix_length] = self.vocab_size - 1
        labels = np.full_like(inputs, IGNORE_INDEX)
        labels[:, -count:] = tokens
        return inputs, labels


def next_tokens(inputs: np.ndarray) -> np.ndarray:
    """Labels that hold the next token of `inputs` [n, T] at every position but the last."""
    labels = np.full_like(inputs, IGNORE_INDEX)
    labels[:, :-1] = inputs[:, 1:]
    return labels
