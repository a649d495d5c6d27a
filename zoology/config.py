"""What a run is: model, data and training, as frozen configs whose hash is the run's identity."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from architectures import registry
from zoology.schema import Schema
from zoology.tasks import AnyTask, dataset_hash

SCHEMA_VERSION = 1
"""Version of run configs and results; raised when an old results directory can no longer be read."""


def as_tuple(value: Any) -> Any:
    """Lists, as JSON has them, become tuples, as frozen configs hold them."""
    return tuple(value) if isinstance(value, list) else value


class LayerConfig(Schema):
    """One sequence mixer of a stack: a registered name and its options (`d_model` comes from the model)."""

    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known(self):
        registry.check_options(self.name, self.options)
        return self


def layer(name: str, **options: Any) -> LayerConfig:
    """`layer("based", feature_dim=16)`: shorthand for a LayerConfig."""
    return LayerConfig(name=name, options=options)


class ModelConfig(Schema):
    """A language model: embedding, `n_layers` pre-norm blocks that repeat `layers` cyclically, tied head.

    `channel_mixer`: "identity" is what the papers ran (a second norm whose output is added as it is), "none"
    leaves the channel half of the block out, "mlp" and "swiglu" have inner width `channel_expand * d_model`.
    `max_positions` > 0 adds learned positions up to that length. `init`: see `zoology.model.initialise`.
    """

    vocab_size: int = Field(ge=2)
    d_model: int = Field(ge=1)
    layers: Annotated[tuple[LayerConfig, ...], BeforeValidator(as_tuple)] = Field(min_length=1)
    n_layers: int = Field(2, ge=1)
    channel_mixer: Literal["identity", "none", "mlp", "swiglu"] = "identity"
    channel_expand: float = Field(4.0, gt=0)
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    max_positions: int = Field(0, ge=0)
    embed_dropout: float = Field(0.1, ge=0, lt=1)
    resid_dropout: float = Field(0.0, ge=0, lt=1)
    init: Literal["paper", "plain", "mixer", "mamba"] = "paper"
    init_std: float = Field(0.02, gt=0)

    def layer_at(self, index: int) -> LayerConfig:
        """The layer at depth `index`, 0-based."""
        return self.layers[index % len(self.layers)]


class Slice(Schema):
    """Examples of one task. Results call them `name`, by default the task's name and the options that were set."""

    task: AnyTask
    num_examples: int = Field(ge=1)
    name: str = ""

    @property
    def label(self) -> str:
        """What results call this slice."""
        if self.name:
            return self.name
        changed = self.task.model_dump(mode="json", exclude_defaults=True, exclude={"vocab_size"})
        return self.task.name + "".join(f" {key}={value}" for key, value in changed.items())


class DataConfig(Schema):
    """Training slices and test slices; validation has the test slices' tasks in a stream of its own.

    Batches are drawn from one slice each. `shuffle` draws a new order of examples and batches each epoch;
    without it every epoch runs through the slices in the order given, as Based's code did.
    """

    train: Annotated[tuple[Slice, ...], BeforeValidator(as_tuple)] = Field(min_length=1)
    test: Annotated[tuple[Slice, ...], BeforeValidator(as_tuple)] = Field(min_length=1)
    num_validation: int | None = Field(None, ge=1)
    batch_size: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)
    shuffle: bool = True

    @model_validator(mode="after")
    def _distinct_labels(self):
        labels = [part.label for part in self.test]
        if len(set(labels)) < len(labels):
            raise ValueError(f"test slices need different names, got {labels}: set Slice.name")
        return self

    def __hash__(self) -> int:
        # By value, also where a task has options that cannot be hashed.
        return hash(self.model_dump_json())

    @property
    def validation(self) -> tuple[Slice, ...]:
        """The test slices with the number of validation examples."""
        return tuple(
            Slice(task=part.task, num_examples=self.num_validation or part.num_examples, name=part.label)
            for part in self.test
        )

    @property
    def max_test_length(self) -> int:
        """The longest test sequence: the length at which state is reported on the main plot."""
        return max(part.task.seq_len for part in self.test)

    def hashes(self) -> dict[str, list[str]]:
        """The hash of every dataset, by split."""
        return {split: list(hashes) for split, hashes in _dataset_hashes(self)}


class MaskedPrefix(Schema):
    """Masked-token loss on a task's prefix, beside the loss on its labels (JRT, arXiv:2407.05483).

    In each training example `share` of the prefix's tokens, at least one, are replaced by `mask_token`; `weight` times
    the mean cross-entropy of the tokens that stood there is added to the loss, whose labels see the masked prefix too.
    """

    weight: float = Field(0.25, gt=0)
    share: float = Field(0.15, gt=0, lt=1)
    mask_token: int = Field(0, ge=0)


class TrainConfig(Schema):
    """AdamW with cosine decay to `min_lr` and no warm-up, as in the papers.

    `schedule` moves the learning rate once per epoch or once per step. Training stops early once mean
    validation accuracy exceeds `stop_accuracy`. The last epoch is the one scored (`select="last"`), or the one
    best on validation (`select="best"`). `masked_prefix` adds a loss on tasks that have a prefix.
    """

    lr: float = Field(gt=0)
    epochs: int = Field(32, ge=1)
    weight_decay: float = Field(0.1, ge=0)
    schedule: Literal["epoch", "step", "constant"] = "epoch"
    min_lr: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    stop_accuracy: float | None = Field(0.99, gt=0, le=1)
    select: Literal["last", "best"] = "last"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    masked_prefix: MaskedPrefix | None = None


class RunConfig(Schema):
    """One training run. `architecture` is the name its points carry on plots and in `--only`.

    That is the mixer under test, or a name of your own; not that of an architecture which the model is without.
    """

    architecture: str = Field(min_length=1)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self):
        mixers = [spec.name for spec in self.model.layers]
        if self.architecture not in mixers and self.architecture in registry.names():
            raise ValueError(
                f"architecture={self.architecture!r}: the model has none; must be one of its layers, "
                f"{', '.join(dict.fromkeys(mixers))}, or a name that no architecture has"
            )
        needed = max(part.task.vocab_size for part in (*self.data.train, *self.data.test))
        if self.model.vocab_size < needed:
            raise ValueError(f"model.vocab_size={self.model.vocab_size}: the tasks need at least {needed}")
        longest = max(part.task.seq_len for part in (*self.data.train, *self.data.test))
        if 0 < self.model.max_positions < longest:
            raise ValueError(f"model.max_positions={self.model.max_positions}: must be 0 or at least {longest}")
        if (masked := self.train.masked_prefix) is not None:
            if masked.mask_token >= self.model.vocab_size:
                raise ValueError(
                    f"train.masked_prefix.mask_token={masked.mask_token}: must be below "
                    f"model.vocab_size={self.model.vocab_size}"
                )
            if all(part.task.prefix_length == 0 for part in self.data.train):
                raise ValueError("train.masked_prefix: no training task has a prefix to mask; must be None")
        return self

    @property
    def run_id(self) -> str:
        """12 hex digits that identify the run: the hash of its whole config, the tasks' versions included."""
        return self._identity(self.train.model_dump(mode="json"), self.seed)

    @property
    def point_id(self) -> str:
        """12 hex digits shared by the runs that differ in learning rate and seed only."""
        return self._identity(self.train.model_dump(mode="json", exclude={"lr"}))

    def _identity(self, *parts: Any) -> str:
        shared = (_shared_digest(_Same(self.model)), _shared_digest(_Same(self.data)))
        return _digest(SCHEMA_VERSION, self.architecture, *shared, *parts)


def layer_options_text(model: dict[str, Any]) -> str:
    """What distinguishes a model, a ModelConfig as JSON, on tables: its width and the options of its layers."""
    parts = [f"d_model={model['d_model']}"]
    for spec in model["layers"]:
        parts += [f"{key}={value}" for key, value in spec["options"].items()]
    return " ".join(dict.fromkeys(parts))


def learning_rates(low: float, high: float, count: int) -> list[float]:
    """`count` learning rates, evenly spaced in log10 from 10^low to 10^high, rounded to six digits."""
    return [float(f"{rate:.6g}") for rate in np.logspace(low, high, count)]


class _Same:
    """A cache key that stands for one frozen config: comparing identities is cheaper than comparing contents."""

    def __init__(self, config: ModelConfig | DataConfig):
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.config is other.config


@functools.lru_cache(maxsize=4096)
def _shared_digest(same: _Same) -> str:
    """The hash of a part that many runs share, the hashes of its datasets included."""
    config = same.config
    return _digest(config.model_dump(mode="json"), config.hashes() if isinstance(config, DataConfig) else None)


@functools.lru_cache(maxsize=64)
def _dataset_hashes(config: DataConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
    splits = (("train", config.train), ("validation", config.validation), ("test", config.test))
    return tuple(
        (split, tuple(dataset_hash(part.task, split, part.num_examples, config.seed) for part in parts))
        for split, parts in splits
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
