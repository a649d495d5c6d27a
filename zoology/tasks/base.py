"""What a task is: a frozen config plus a pure function of (config, stream, seed)."""

import hashlib
import json
import operator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch

from ..schema import Schema
from .samplers import Stream, stream_key

IGNORE_INDEX = -100
"""The label of positions that are not scored."""

Split = Literal["train", "validation", "test"]

_CHUNK_TOKENS = 1 << 18  # about 2 MB of int64: a chunk stays in cache while it is made


class Batch(NamedTuple):
    """Examples of a task: `inputs` and `labels`, both [N, T] int64.

    The label at a position is what a model should output at that same position, having read the inputs up to
    and including it; positions that are not scored hold IGNORE_INDEX.
    """

    inputs: torch.Tensor
    labels: torch.Tensor


class Task(Schema):
    """A recall task: a frozen, checked config and the examples it stands for.

    A task of your own is one class: declare its options as fields (`vocab_size` and `seq_len` as fields or
    properties), and write `draw` and `required_bits`. `@zoology.tasks.register("name")` gives it a name.

    Raises ValueError for an unknown option or one out of range, naming option, value and what is allowed.
    """

    field_noun: ClassVar[str] = "option"

    name: ClassVar[str] = ""
    """Set by `register`."""
    version: ClassVar[int] = 1
    """To be raised when the same config gives other data; part of the dataset hash."""
    source: ClassVar[str] = ""
    """Where the task comes from: a paper and section, or an address."""
    example: ClassVar[dict] = {}
    """Options of a config small enough to print."""

    @property
    def prefix_length(self) -> int:
        """How many leading positions are context, before the first question; 0 if the task has no such part.

        A prefix model reads these non-causally; a model that does not care ignores it.
        """
        return 0

    def draw(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of `n` examples, [n, seq_len] integers, using no randomness but `stream`'s."""
        raise NotImplementedError(f"{type(self).__name__} does not define draw(stream, n)")

    def required_bits(self) -> float:
        """Bits that a perfect model must carry from the context to the questions (a lower bound)."""
        raise NotImplementedError(f"{type(self).__name__} does not define required_bits()")

    def required_bits_after(self, num_passes: int) -> float:
        """`required_bits` when the context is read `num_passes` times; the same, unless a task knows better."""
        return self.required_bits()

    def sample(self, num_examples: int, seed: int) -> Batch:
        """`num_examples` examples from a stream of their own, apart from the three splits.

        The same bytes on every machine, and the first rows of any longer sample. Raises ValueError for
        num_examples < 1 or seed < 0.
        """
        return self.generate("sample", num_examples, seed)

    def split(self, split: Split, num_examples: int, seed: int) -> Batch:
        """`num_examples` examples of "train", "validation" or "test": disjoint random streams of one seed."""
        if split not in get_args(Split):
            raise ValueError(f"split={split!r}: must be one of {', '.join(get_args(Split))}")
        return self.generate(split, num_examples, seed)

    def options(self) -> dict[str, Any]:
        """The config as JSON-serialisable options, without the task's name."""
        return self.model_dump(mode="json")

    def config(self) -> dict[str, Any]:
        """The config as JSON, `{"name": ..., **options}`: what `zoology.tasks.from_config` reads."""
        return {"name": self.name, **self.options()}

    def replace(self, **changes) -> "Task":
        """The same task with some options changed, checked like a new one."""
        return type(self)(**{field: getattr(self, field) for field in type(self).model_fields} | changes)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the data but stream and seed: name, version and options."""
        options = {
            field: value.identity() if isinstance(value := getattr(self, field), Task) else dumped
            for field, dumped in self.options().items()
        }
        return {"name": self.name or type(self).__qualname__, "version": self.version, "options": options}

    def stream(self, stream: str, seed: int, chunk: int = 0) -> Stream:
        """The random draws behind one chunk of the examples of `stream` (a split, or any other name)."""
        return Stream(stream_key(self.identity(), stream, seed), chunk)

    def generate(self, stream: str, num_examples: int, seed: int) -> Batch:
        """`num_examples` examples of the random stream of that name: what `sample` and `split` call.

        A task made from another task overrides this instead of `draw`.
        """
        num_examples = whole_number("num_examples", num_examples, at_least=1)
        seed = whole_number("seed", seed, at_least=0)
        inputs = torch.empty(num_examples, self.seq_len, dtype=torch.int64)
        labels = torch.empty(num_examples, self.seq_len, dtype=torch.int64)
        in_rows, out_rows = inputs.numpy(), labels.numpy()
        key = stream_key(self.identity(), stream, seed)
        size = max(1, _CHUNK_TOKENS // self.seq_len)

        def fill(chunk: int) -> None:
            rows = slice(chunk * size, min((chunk + 1) * size, num_examples))
            in_rows[rows], out_rows[rows] = self._checked(*self.draw(Stream(key, chunk), rows.stop - rows.start))

        chunks = range(-(-num_examples // size))
        threads = min(len(chunks), torch.get_num_threads())
        if threads == 1:
            for chunk in chunks:
                fill(chunk)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, chunks))
        return Batch(inputs, labels)

    def _checked(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`inputs, labels` as drawn. Raises ValueError where a task breaks its contract."""
        for what, array, lowest in (("inputs", inputs, 0), ("labels", labels, IGNORE_INDEX)):
            if array.ndim != 2 or array.shape[1] != self.seq_len or array.dtype.kind not in "iu":
                raise ValueError(
                    f"{type(self).__name__}.draw: {what} are {array.dtype} {list(array.shape)}: "
                    f"must be integers [n, {self.seq_len}]"
                )
            if array.size and (array.min() < lowest or array.max() >= self.vocab_size):
                raise ValueError(
                    f"{type(self).__name__}.draw: {what} lie in [{array.min()}, {array.max()}]: "
                    f"must be tokens of [0, {self.vocab_size}){' or IGNORE_INDEX' if lowest else ''}"
                )
        return inputs, labels


def dataset_hash(task: Task, stream: str, num_examples: int, seed: int) -> str:
    """32 hex digits that identify a dataset: task, version, options, stream, number of examples and seed."""
    parts = {"task": task.identity(), "stream": stream, "num_examples": num_examples, "seed": seed}
    text = json.dumps([stream_key().hex(), parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def whole_number(name: str, value: Any, at_least: int) -> int:
    """`value` as an int. Raises ValueError unless it is a whole number >= `at_least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < at_least:
        raise ValueError(f"{name}={value!r}: must be a whole number >= {at_least}")
    return number


def require_even(seq_len: int) -> None:
    """Raise ValueError for an odd length: tokens come in pairs."""
    if seq_len % 2:
        raise ValueError(f"seq_len={seq_len}: must be even")
