"""What decoding must move and multiply: counts of one step of a model, and the time they take at a machine's ceilings.

Nothing is written down by hand for an architecture. Each kind of layer is built once, on the CPU, as its reference:

- the weights that a step reads are those that its operations touch; the tied embedding is read whole, by the head;
- the state read at position p is what `init_state(1, p)` holds: of a KV cache the filled part, of a window min(p,
  window) rows, of a recurrent state all of it; what a step writes are the elements that it changes;
- operations are those of the step's products at position p (`torch.utils.flop_counter`), element-wise ones left out.

A parallel form may move less and multiply more or less than that; as a bound, prefill has to read the weights and
write the state once, and is taken to multiply as often as the steps it stands for (causal attention: half a square).

Axes: B batch, D model width, T tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from architectures.mixer import State, clone_state, count_elements, state_tensors
from zoology.config import ModelConfig
from zoology.model import Block

FIRST_TOKENS = 8  # before the step whose changes are counted, where a step changes as many after twice as many
PREFIX_TOKENS = 64


class Moved(NamedTuple):
    """Of one decode step for a whole batch, or of one prefill: bytes, and operations of products."""

    weight_bytes: float
    state_bytes_read: float
    state_bytes_written: float
    operations: float

    def milliseconds(self, ceilings: Mapping[str, float], precision: str) -> dict[str, float]:
        """The time at the `ceilings` of `zoology.benchmark`, by bytes and by operations; `ms` is the longer."""
        moved = self.weight_bytes + self.state_bytes_read + self.state_bytes_written
        by_bytes, by_operations = 1e3 * moved / ceilings["copy"], 1e3 * self.operations / ceilings[precision]
        return {"bandwidth_ms": by_bytes, "operations_ms": by_operations, "ms": max(by_bytes, by_operations)}


class LayerWork:
    """Counts of one layer for one sequence, by its reference on the CPU, in float64: no change is rounded away."""

    def __init__(self, config: ModelConfig, index: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block = Block(config, index).double().requires_grad_(False).eval()
        self.block.mixer.force_backend("reference")
        self.token = torch.randn(1, config.d_model, generator=torch.Generator().manual_seed(0)).double()
        self.few, self.weights = self._step_after(FIRST_TOKENS)
        self.grows = self._step_after(2 * FIRST_TOKENS)[0] != self.few
        self.prefix_weights, self.prefix_operations = self._prefix(config.d_model)

    def read(self, position: int) -> dict[str, int]:
        """Elements of every state field once `position` tokens are held."""
        return _elements(self.block.mixer.init_state(1, position, device="meta"))

    def written(self, position: int) -> dict[str, int]:
        """Elements of every state field that the step which brings its state to `position` tokens changes."""
        return self._step_after(position - 1)[0] if self.grows else self.few

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the layer's counts are kept
    def operations(self, position: int) -> int:
        """Operations of the products that each sequence adds to the step that brings its state to `position` tokens.

        What a batch shares, as the filters of long convolutions, depends on weights alone and could be kept.
        """
        one, two = (self._operations(batch, position) for batch in (1, 2))
        return two - one

    def _operations(self, batch: int, position: int) -> int:
        state = self.block.mixer.init_state(batch, position)
        return _operations(lambda: self.block.step(self.token.expand(batch, -1), state))

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _step_after(self, tokens: int) -> tuple[dict[str, int], int]:
        """Elements of every state field that a step changes after so many tokens, and of the weights that it reads."""
        state = self.block.mixer.init_state(1, max(tokens + 1, 4 * FIRST_TOKENS))
        if tokens:
            x = torch.randn(1, tokens, self.token.shape[1], generator=torch.Generator().manual_seed(1)).double()
            _, state = self.block.prefill(x, state)
        before = clone_state(state)
        with _Touched() as touched:
            _, after = self.block.step(self.token, state)
        changed = {
            name: int((old != new).sum()) * (2 if new.is_complex() else 1) if count_elements(new) else 0
            for (name, old), (_, new) in zip(state_tensors(before), state_tensors(after))
        }
        return changed, touched.elements(self.block)

    def _prefix(self, d_model: int) -> tuple[int, float]:
        """Weights that only reading a prefix needs, and operations that each of its tokens adds."""
        if not self.block.mixer.takes_prefix:
            return 0, 0.0
        x = self.token.expand(1, PREFIX_TOKENS, d_model)
        added = _operations(lambda: self.block(x, PREFIX_TOKENS)) - _operations(lambda: self.block(x))
        with _Touched() as touched:
            self.block(x, PREFIX_TOKENS)
        return touched.elements(self.block) - self.weights, added / PREFIX_TOKENS


class ModelWork:
    """Counts of a model of `config`, layers of one kind counted once."""

    def __init__(self, config: ModelConfig):
        kinds: dict[Any, int] = {}
        self.of_layer = [kinds.setdefault(config.layer_at(i).model_dump_json(), i) for i in range(config.n_layers)]
        self.layers = {index: LayerWork(config, index) for index in kinds.values()}
        self.head = config.vocab_size * config.d_model

    def step(self, batch: int, position: int, weight_bytes: int, state_bytes: Mapping[str, int]) -> Moved:
        """The step that brings `batch` sequences to `position` tokens.

        `weight_bytes` is the size of a weight, `state_bytes` that of an element by field, as `element_sizes` gives it.
        """
        read, written = (
            batch * self._bytes(count, position, state_bytes) for count in (LayerWork.read, LayerWork.written)
        )
        operations = 2 * self.head + sum(self.layers[kind].operations(position) for kind in self.of_layer)
        return Moved(weight_bytes * (self.head + self._sum("weights")), read, written, batch * operations)

    def _bytes(
        self, count: Callable[[LayerWork, int], dict[str, int]], position: int, state_bytes: Mapping[str, int]
    ) -> int:
        """Of the elements that `count` finds in a layer's state at `position`, over all layers."""
        return sum(
            number * state_bytes[f"{index}.{name}"]
            for index, kind in enumerate(self.of_layer)
            for name, number in count(self.layers[kind], position).items()
        )

    def prefill(
        self, batch: int, length: int, weight_bytes: int, state_bytes: Mapping[str, int], prefix_length: int = 0
    ) -> Moved:
        """`length` tokens from an empty state to the logits of the last one, the first `prefix_length` as a prefix."""
        held = batch * self._bytes(LayerWork.read, length, state_bytes)
        weights = self.head + self._sum("weights") + (self._sum("prefix_weights") if prefix_length else 0)
        operations = prefix_length * self._sum("prefix_operations") + 2 * self.head
        operations += sum(self._summed_operations(self.layers[kind], length) for kind in self.of_layer)
        return Moved(weight_bytes * weights, 0, held, batch * operations)

    def _summed_operations(self, layer: LayerWork, length: int) -> float:
        """Operations of the steps 1 to `length`: between powers of two straight lines, or several where they bend."""
        at = sorted({min(2**power, length) for power in range(length.bit_length() + 1)})
        return layer.operations(at[0]) + sum(_summed(layer.operations, *ends) for ends in itertools.pairwise(at))

    def _sum(self, name: str) -> float:
        return sum(getattr(self.layers[kind], name) for kind in self.of_layer)


def _summed(count: Callable[[int], float], low: int, high: int) -> float:
    """The sum of `count` over low + 1 to high, by straight lines that hold in the middle."""
    first, last, middle = count(low), count(high), (low + high) // 2
    if high - low > 1 and (high - low) * (count(middle) - first) != (middle - low) * (last - first):
        return _summed(count, low, middle) + _summed(count, middle, high)
    return (high - low) * (first + last) / 2 + (last - first) / 2


def element_sizes(layers: tuple[State, ...]) -> dict[str, int]:
    """Bytes of one real number of every field of a model's live state, keys like `0.kv`."""
    return {
        f"{index}.{name}": tensor.element_size() // (2 if tensor.is_complex() else 1)
        for index, state in enumerate(layers)
        for name, tensor in state_tensors(state)
    }


class _Touched(TorchDispatchMode):
    """Remembers the storages that operations were given."""

    def __init__(self):
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        self.storages.update(leaf.untyped_storage().data_ptr() for leaf in given if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))

    def elements(self, module: nn.Module) -> int:
        """Of the parameters of `module` that were touched."""
        return sum(p.numel() for p in module.parameters() if p.untyped_storage().data_ptr() in self.storages)


def _elements(state: State) -> dict[str, int]:
    return {name: count_elements(tensor) for name, tensor in state_tensors(state)}


def _operations(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
