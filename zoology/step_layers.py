"""A block as decode steps run it: layers that read the same input as one product, and deep products in parts.

A step multiplies a few rows by every weight. How long that takes is decided by how many multiprocessors read weights
at once, and the libraries' products of few rows keep too few of them busy where a matrix is small, or has few columns
and a long sum. Layers that read the mixer's input are joined; a long sum is divided into parts, added up by whatever
reads the result. Both hold for any mixer whose projections are `torch.nn.Linear`.

Axes: B batch, D and N inputs and outputs of a layer, S parts.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.mixer import State, clone_state
from zoology.model import Block, ChannelMixer

NUM_PARTS = (2, 4, 8)
WORTH = 0.95  # of the time of an undivided product: what parts must stay below
MOST_ROWS = 256  # of a product that is divided: more keep the device busy


class Rest(NamedTuple):
    """What is still to be added to the residual stream: the sum of `parts` [S, B, D], and `bias` [D].

    Left to whoever reads it, the addition is one kernel with the norm that follows.
    """

    parts: Tensor
    bias: Tensor | None = None

    def added_to(self, x: Tensor) -> Tensor:
        """x [B, D] -> [B, D] of the same dtype, rounded once."""
        if self.parts.shape[0] == 1 and self.bias is None:
            return x + self.parts[0]
        return total(self.parts, self.bias, x).to(x.dtype)


def total(parts: Tensor, bias: Tensor | None, start: Tensor | None = None) -> Tensor:
    """start + sum of parts [S, ...] + bias, in the dtype of the parts."""
    found, *others = parts.unbind(0)  # one by one: a compiler takes that for element-wise work, and fuses it
    for one in (*others, start, bias):
        found = found if one is None else found + one.to(found.dtype)
    return found


@torch.library.custom_op(
    "zoology::product_in_parts", mutates_args=(), schema="(Tensor x, Tensor weight, int num_parts) -> Tensor"
)
def product_in_parts(x: Tensor, weight: Tensor, num_parts: int) -> Tensor:
    """x [B, D], weight [N, D] -> [S, B, N] in float32 or more, which add up to x W^T."""
    rows = x.unflatten(1, (num_parts, -1)).transpose(0, 1)
    columns = weight.unflatten(1, (num_parts, -1)).permute(1, 2, 0)
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.bmm(rows, columns, out_dtype=torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.bmm(rows.to(wide), columns.to(wide))


@product_in_parts.register_fake
def _(x, weight, num_parts):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(num_parts, x.shape[0], weight.shape[0], dtype=dtype)


@functools.lru_cache(maxsize=256)
def choose_num_parts(rows: int, n: int, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """In how many parts [rows, d] times [n, d] is fastest on this device, by trying: 1 where that is not worth it."""
    allowed = [1, *(parts for parts in NUM_PARTS if d % (8 * parts) == 0)]
    if device.type != "cuda" or dtype.itemsize != 2 or rows > MOST_ROWS or not hasattr(torch.ops.aten.bmm, "dtype"):
        return 1
    # More weights than the cache holds: a step finds none of its own there.
    copies = 2 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // (n * d * dtype.itemsize)
    x, weights = torch.zeros(rows, d, device=device, dtype=dtype), torch.zeros(copies, n, d, device=device, dtype=dtype)
    try:
        product_in_parts(x, weights[0], allowed[-1])
    except RuntimeError:
        return 1  # the library has no such product for this device
    times = {
        parts: _time(lambda weight, parts=parts: _product(x, weight, None, parts), weights.unbind())
        for parts in allowed
    }
    best = min(times, key=times.get)
    return best if times[best] < WORTH * times[1] else 1


def _time(run, weights: tuple[Tensor, ...]) -> float:
    """Milliseconds of `run` for all the weights, without the host: the shortest of a few replays of a graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(weights[0])
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    return min(first.elapsed_time(last) for first, last in itertools.pairwise(marks))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, num_parts: int) -> tuple[Tensor, Tensor | None]:
    """Parts [S, B, N] of x W^T + b, and the bias if it is not in them."""
    if num_parts == 1:
        return F.linear(x, weight, bias)[None], None
    return product_in_parts(x, weight, num_parts), bias


class StandIn(nn.Module):
    """What takes the place of a linear layer for a number of rows, and has its weights."""

    def __init__(self, layer: nn.Linear, rows: int):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.num_parts = choose_num_parts(rows, *layer.weight.shape, layer.weight.dtype, layer.weight.device)


class StepLinear(StandIn):
    """A linear layer [..., D] -> [..., N]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.num_parts == 1:
            return F.linear(x, self.weight, self.bias)
        parts, bias = _product(x.flatten(0, -2), self.weight, self.bias, self.num_parts)
        return total(parts, bias).to(x.dtype).unflatten(0, x.shape[:-1])


class LastLinear(StandIn):
    """The last linear layer of a block, [B, D] -> `Rest`."""

    def forward(self, x: Tensor) -> Rest:
        return Rest(*_product(x, self.weight, self.bias, self.num_parts))


class Joined(nn.Module):
    """Linear layers of one input, as one product: `read` it, then each of the `columns` has its layer's output.

    Weights are copied; `refresh` copies them again.
    """

    def __init__(self, layers: list[nn.Linear], rows: int):
        super().__init__()
        self.sources = [[layer.weight for layer in layers], [layer.bias for layer in layers]]
        if layers[0].bias is None:
            self.sources.pop()
        joined = [torch.cat(parts).detach() for parts in self.sources]
        self.register_buffer("weight", joined[0], persistent=False)
        self.register_buffer("bias", joined[1] if len(joined) > 1 else None, persistent=False)
        self.sizes = [layer.out_features for layer in layers]
        self.num_parts = choose_num_parts(rows, *self.weight.shape, self.weight.dtype, self.weight.device)
        self.outputs: tuple[Tensor, ...] | None = None

    def read(self, x: Tensor) -> None:
        parts, bias = _product(x, self.weight, self.bias, self.num_parts)
        # Whatever kernel reads a part finds it in one piece, and need not copy it.
        self.outputs = tuple(one.contiguous() for one in total(parts, bias).to(x.dtype).split(self.sizes, -1))

    @torch.no_grad()
    def refresh(self) -> None:
        for joined, parts in zip((self.weight, self.bias), self.sources):
            torch._foreach_copy_(joined.split(self.sizes), parts)


class Columns(nn.Module):
    """The output of one of the layers that are joined, whose input was read before; it has that layer's weights."""

    def __init__(self, layer: nn.Linear, joined: Joined, index: int):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.__dict__["joined"] = joined  # no submodule: it belongs to the block
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.joined.outputs[self.index].unflatten(0, x.shape[:-1])


class StepBlock(nn.Module):
    """The parts of a `Block` that a step needs; what is not a linear layer is the block's own."""

    def __init__(self, block: Block, state: State, rows: int):
        """`state` is an empty one for one sequence; it is left as it is. `rows` is the batch size."""
        super().__init__()
        layers = read_input(block, state)
        self.joined = Joined(layers, rows) if len(layers) > 1 else None
        replaced = {layer: Columns(layer, self.joined, index) for index, layer in enumerate(layers) if self.joined}
        self.norm, self.channel_norm = block.norm, block.channel_norm
        self.mixer = with_layers(block.mixer, replaced, rows)
        last = {block.channel_mixer.fc2: LastLinear(block.channel_mixer.fc2, rows)} if self._has_last(block) else {}
        self.channel_mixer = with_layers(block.channel_mixer, last, rows)

    @staticmethod
    def _has_last(block: Block) -> bool:
        return type(block.channel_mixer) is ChannelMixer

    def mix(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`mixer.step`."""
        if self.joined is None:
            return self.mixer.step(x, state)
        self.joined.read(x)
        y, state = self.mixer.step(x, state)
        self.joined.outputs = None
        return y, state

    def mix_channels(self, x: Tensor, y: Tensor) -> tuple[Tensor, Rest]:
        """The channel half of the block after x + y, its own addition left out."""
        if self.channel_norm is None:
            return x, Rest(y[None])
        x = x + y
        y = self.channel_mixer(self.channel_norm(x))
        return x, y if isinstance(y, Rest) else Rest(y[None])

    def no_rest(self, x: Tensor) -> Rest:
        """Nothing to add to x [B, D], in the shapes that `mix_channels` leaves."""
        last = getattr(self.channel_mixer, "fc2", None)
        if not isinstance(last, LastLinear) or last.num_parts == 1:
            return Rest(torch.zeros_like(x)[None])
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if last.bias is None else torch.zeros_like(last.bias)
        return Rest(torch.zeros(last.num_parts, *x.shape, dtype=dtype, device=x.device), bias)


@torch.no_grad()
def read_input(block: Block, state: State) -> list[nn.Linear]:
    """The linear layers that read the very input of the mixer's step and nothing else, found by one step.

    In the order of their first call; only those of the first one's dtype, and with a bias if it has one.
    """
    x = next(block.parameters()).new_zeros(1, block.mixer.d_model)
    found: dict[nn.Linear, bool] = {}

    def note(layer: nn.Linear, given: tuple[Tensor, ...]) -> None:
        same = given[0].data_ptr() == x.data_ptr() and given[0].numel() == x.numel()
        found[layer] = found.get(layer, True) and same

    hooks = [layer.register_forward_pre_hook(note) for layer in block.mixer.modules() if type(layer) is nn.Linear]
    try:
        block.mixer.step(x, clone_state(state))
    finally:
        for hook in hooks:
            hook.remove()
    layers = [layer for layer, same in found.items() if same]
    return [
        layer
        for layer in layers
        if layer.weight.dtype == layers[0].weight.dtype and (layer.bias is None) == (layers[0].bias is None)
    ]


def with_layers(module: nn.Module, replaced: dict[nn.Linear, nn.Module], rows: int) -> nn.Module:
    """The same module, all it holds shared, with other linear layers."""
    if module in replaced:
        return replaced[module]
    if type(module) is nn.Linear:
        return StepLinear(module, rows)
    children = {name: with_layers(child, replaced, rows) for name, child in module.named_children()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = module._modules | children
    return twin
