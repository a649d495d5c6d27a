"""Published points: what the papers' figures show, and how their code counts state.

The figures are in `published.json`, each point with its source and the precision at which it could be read. The
counts of `FIELD_STATE` serve two ends only: to say beside a measured state what the field reports for it, and to find
the published point that a run repeats. They are never what this suite calls a state.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import architectures
from architectures import registry
from zoology.config import ModelConfig

MEAN = "mean"
FIELD_BYTES_PER_ELEMENT = 4  # the papers' figures are in bytes of float32
_PATH = Path(__file__).with_name("published.json")

FIELD_STATE: dict[str, Callable[[Any, int], int]] = {
    "attention": lambda mixer, length: 2 * mixer.d_model * length,
    "sliding_window": lambda mixer, length: 2 * mixer.d_model * mixer.window,
    "base_conv": lambda mixer, length: mixer.d_model * mixer.conv.kernel_size,
    "long_conv": lambda mixer, length: mixer.d_model * length,
    "hyena": lambda mixer, length: mixer.d_model * length,
    "based": lambda mixer, length: mixer.num_heads * _taylor_features(mixer.feature_dim) * (mixer.head_dim + 1),
    "h3": lambda mixer, length: mixer.d_model * mixer.d_state,
    "mamba": lambda mixer, length: 2 * mixer.d_model * mixer.d_state,
    "mamba2": lambda mixer, length: 2 * mixer.d_model * mixer.d_state,
    "gla": lambda mixer, length: mixer.num_heads * mixer.head_k_dim * mixer.head_v_dim + _gla_convolution(mixer),
    "deltanet": lambda mixer, length: mixer.num_heads * mixer.head_dim * mixer.head_v_dim,
    "gated_deltanet": lambda mixer, length: mixer.num_heads * mixer.head_dim * mixer.head_v_dim,
    "rwkv7": lambda mixer, length: mixer.num_heads * mixer.head_dim * mixer.head_dim,
}
"""Elements of one layer as `state_size` of HazyResearch/zoology (d88d6f5) counts them, from a mixer and a length.

What each leaves out is in the docstring of the architecture: the tails of short convolutions (counted one input too
long in `base_conv`), token shifts, the shift SSM and the factor `head_dim` of H3, an `expand` other than 2 of the
Mambas. Two are not what the release computes: a whole Mamba block counts as None there, so this is its mixer, as in
the figures; and RWKV-7 is corrected to heads * head_dim^2. Architectures that are not here have no published count.
"""


def _taylor_features(feature_dim: int) -> int:
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def _gla_convolution(mixer: Any) -> int:
    return 0 if mixer.conv is None else mixer.conv.weight.numel()


class Protocol(NamedTuple):
    """How a published figure was made. Train and test are (length, pairs, examples); `memory` is its x axis.

    `shuffle` as in DataConfig: the code of HazyResearch/zoology drew a new order of batches each epoch up to 194a712,
    of February 2024, so for Zoology's figure, and none from there on, so for Based's.
    """

    name: str
    title: str
    source: str
    memory: str  # "field_bytes" or "d_model"
    vocab_size: int
    random_non_queries: bool
    shuffle: bool
    train: tuple[tuple[int, int, int], ...]
    test: tuple[tuple[int, int, int], ...]
    batch_size: int
    epochs: int
    learning_rates: tuple[float, ...]

    @property
    def figure(self) -> str:
        """The figure it is of, which may have one for every length."""
        return self.name.removesuffix(f"_{self.seq_len}")

    @property
    def seq_len(self) -> int:
        """The length at which its state is counted."""
        return max(length for length, _, _ in self.test)


class Point(NamedTuple):
    """One published accuracy. `options` are those of the last layer that are known, `layers` repeat to the depth.

    `in_grid` is False for what a figure shows and no grid of its authors' code has: nobody can say how it was trained.
    """

    protocol: str
    architecture: str
    layers: tuple[str, ...]
    d_model: int | None
    options: dict[str, Any]
    field_bytes: int | None
    accuracy: float
    precision: float
    approximate: bool
    source: str
    slice: str = MEAN
    in_grid: bool = True

    @property
    def label(self) -> str:
        """What is known of the model, for tables."""
        known = {"d_model": self.d_model} if self.d_model else {}
        return " ".join(f"{key}={value}" for key, value in (known | self.options).items()) or "unknown"


class Spread(NamedTuple):
    """How far two runs of one published configuration lie apart: `low` to `high`, equal where that is known."""

    low: float
    high: float
    source: str


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(_PATH.read_text(encoding="utf-8"))


@functools.cache
def protocols() -> dict[str, Protocol]:
    """The published protocols, by name."""
    found = {}
    for row in _data()["protocols"]:
        tuples = {key: tuple(map(tuple, row[key])) for key in ("train", "test")}
        found[row["name"]] = Protocol(**row | tuples | {"learning_rates": tuple(row["learning_rates"])})
    return found


def points(protocol: str | None = None) -> list[Point]:
    """The published points, of one protocol or of all, sources spelt out."""
    sources = _data()["sources"]
    return [
        Point(**row | {"layers": tuple(row["layers"]), "source": sources[row["source"]]})
        for row in _data()["points"]
        if protocol in (None, row["protocol"])
    ]


def spread(architecture: str, slice: str = MEAN) -> Spread:
    """What is known of the repeat-to-repeat spread of an architecture's accuracy; `slice` is "mean" or "TxD"."""
    rows = [row for row in _data()["spread"] if row["slice"] == slice] or _of_mean()
    named = [row for row in rows if architecture in row["architectures"]]
    row = (named or [row for row in rows if not row["architectures"]])[0]
    return Spread(row["low"], row["high"], row["source"])


def _of_mean() -> list[dict[str, Any]]:
    return [row for row in _data()["spread"] if row["slice"] == MEAN]


def field_elements(model: ModelConfig, seq_len: int) -> int | None:
    """State elements of a model at length `seq_len`, over all layers, as the field counts them; None if it does not."""
    counts = [
        _layer_elements(spec.name, model.d_model, json.dumps(spec.options, sort_keys=True), seq_len)
        for spec in map(model.layer_at, range(model.n_layers))
    ]
    return None if None in counts else sum(counts)


@functools.lru_cache(maxsize=4096)
def _layer_elements(name: str, d_model: int, options: str, seq_len: int) -> int | None:
    if name not in FIELD_STATE:
        return None
    with torch.device("meta"):
        mixer = architectures.create(name, d_model=d_model, **json.loads(options))
    return FIELD_STATE[name](mixer, seq_len)


def field_bytes(model: ModelConfig, seq_len: int) -> int | None:
    """`field_elements` in the bytes of the papers' figures, 4 an element whatever dtype ran."""
    elements = field_elements(model, seq_len)
    return None if elements is None else FIELD_BYTES_PER_ELEMENT * elements


def matches(point: Point, model: ModelConfig, seq_len: int) -> bool:
    """Whether `model` is a model of that published point: same layers, known options, and state as the field counts."""
    names = tuple(model.layer_at(index).name for index in range(model.n_layers))
    if names != point.layers or point.d_model not in (None, model.d_model):
        return False
    last = model.layer_at(model.n_layers - 1)
    defaults = {key: option.default for key, option in registry.options(last.name).items()}
    if any((defaults | last.options).get(key) != value for key, value in point.options.items()):
        return False
    return point.field_bytes is None or field_bytes(model, seq_len) == point.field_bytes


def protocol_of(config: dict[str, Any]) -> Protocol | None:
    """The published protocol that tests on the slices of a run's config (as JSON), whatever it trains on."""
    tested = _layout(config["data"]["test"])
    for protocol in protocols().values():
        shared = {"vocab_size": protocol.vocab_size, "random_non_queries": protocol.random_non_queries}
        wanted = [_SLICE | shared | {"seq_len": length, "num_kv_pairs": pairs} for length, pairs, _ in protocol.test]
        if sorted(map(_key, wanted)) == sorted(_key(task) for task, _ in tested):
            return protocol
    return None


_SLICE = {"name": "mqar", "num_passes": 1, "power_a": 0.01, "filler": "any"}


def _layout(slices: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    return [(part["task"], part["num_examples"]) for part in slices]


def _key(task: dict[str, Any]) -> str:
    return json.dumps({key: task.get(key) for key in (*_SLICE, *_VARIED)}, sort_keys=True)


_VARIED = ("vocab_size", "random_non_queries", "seq_len", "num_kv_pairs")


def departures(config: dict[str, Any], protocol: Protocol) -> list[str]:
    """In what a run, its config as JSON, departs from the protocol it is tested by; learning rate and seed apart."""
    data, train = config["data"], config["train"]
    named = {
        "epochs": (train["epochs"], protocol.epochs),
        "batch size": (data["batch_size"], protocol.batch_size),
        "training slices": (_rows(data["train"]), _said(protocol.train)),
        "test slices": (_rows(data["test"]), _said(protocol.test)),
        "precision": (train["precision"], "fp32"),
        "order of batches": (_ORDER[data["shuffle"]], _ORDER[protocol.shuffle]),
    }
    if (theirs := INITIALISATION.get(config["architecture"])) is not None:
        own = registry.get(config["architecture"]).cls.keep_init
        named["initialisation"] = (_START["mixer" if own else config["model"]["init"]], _START[theirs])
        papers = 0.0 if theirs == "mamba" else 0.1
        named["dropout after the embedding"] = (config["model"]["embed_dropout"], papers)
    return [f"{name}: {ours} instead of {theirs}" for name, (ours, theirs) in named.items() if ours != theirs]


INITIALISATION = {
    **dict.fromkeys(("attention", "sliding_window", "hyena"), "paper"),
    **dict.fromkeys(("based", "gla", "deltanet", "gated_deltanet", "h3", "rwkv7"), "plain"),
    **dict.fromkeys(("mamba", "mamba2"), "mamba"),
}
"""`ModelConfig.init` that does what the papers' code did to an architecture (`zoology.model.initialise`).

Not here is what the values do not differ for. Blocks of Mamba have no dropout there, either.
"""

_START = {
    "paper": "smaller output projections",
    "plain": "all linear layers alike",
    "mixer": "the mixer's own",
    "mamba": "that of Mamba's code",
}

_ORDER = {True: "a new one each epoch", False: "the same each epoch"}


def _rows(slices: list[dict[str, Any]]) -> str:
    return _said(sorted((task.get("seq_len"), task.get("num_kv_pairs"), number) for task, number in _layout(slices)))


def _said(rows) -> str:
    return ", ".join(f"{length}x{pairs} ({number})" for length, pairs, number in sorted(rows))
