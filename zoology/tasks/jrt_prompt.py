"""JRT-Prompt: any task, with its context given several times."""

from typing import ClassVar

import torch
from pydantic import Field, model_validator

from .base import IGNORE_INDEX, Batch, Task
from .registry import AnyTask, register
from .set_disjointness import SetDisjointness


@register("jrt_prompt")
class JRTPrompt(Task):
    """The examples of another task, their context read num_passes times before the questions.

    For a stream and seed the examples are those of `task` itself, whatever num_passes is, so accuracies at different
    num_passes are about the same questions. MQAR's own num_passes makes sequences of the same form from draws of
    its own.
    """

    source: ClassVar[str] = "Just read twice, arXiv:2407.05483"
    example: ClassVar[dict] = {"task": SetDisjointness(vocab_size=32, first_size=2, second_size=4)}

    task: AnyTask = Field(default_factory=SetDisjointness)
    num_passes: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _has_a_context(self):
        if self.task.prefix_length == 0:
            raise ValueError(f"task={self.task!r}: must have a context to repeat (prefix_length > 0)")
        return self

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    @property
    def seq_len(self) -> int:
        return self.task.seq_len + (self.num_passes - 1) * self.task.prefix_length

    @property
    def prefix_length(self) -> int:
        return self.num_passes * self.task.prefix_length

    def required_bits(self) -> float:
        """What the task requires when its context is read num_passes times."""
        return self.task.required_bits_after(self.num_passes)

    def required_bits_after(self, num_passes: int) -> float:
        return self.task.required_bits_after(num_passes * self.num_passes)

    def generate(self, stream: str, num_examples: int, seed: int) -> Batch:
        inputs, labels = self.task.generate(stream, num_examples, seed)
        length, extra = self.task.prefix_length, self.num_passes - 1
        unscored = torch.full((len(labels), extra * length), IGNORE_INDEX)
        return Batch(
            torch.cat([inputs[:, :length].repeat(1, extra), inputs], dim=1),
            torch.cat([unscored, labels], dim=1),
        )
