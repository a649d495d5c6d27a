"""A block as decode steps run it: few products, long sums in parts, and weights asked for before they are read.

A step multiplies a few rows by every weight. How long that takes is decided by how many multiprocessors read weights
at once, and from when on. Layers that read the mixer's input are joined; the long sum of the layer that a mixer, or a
channel mixer, ends with is divided into parts, which the norm that follows adds up. Norms and activations ask for the
weights of the product that comes next. All of this holds for any mixer whose projections are `torch.nn.Linear`.

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

import kernels
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


def add_norm(norm: nn.Module, x: Tensor, rest: Rest, ahead: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + rest [B, D], rounded once, and its norm; `ahead` is what is read next, see `kernels.add_norm`."""
    if type(norm) is nn.RMSNorm and norm.weight is not None:
        return kernels.add_norm(x, rest.parts, norm.weight, bias=rest.bias, eps=norm.eps, ahead=ahead)
    x = total(rest.parts, rest.bias, x).to(x.dtype)
    return x, norm(x)


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
    times = {parts: _time(functools.partial(_product, x, parts), weights.unbind()) for parts in allowed}
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


def _product(x: Tensor, num_parts: int, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if num_parts == 1 else product_in_parts(x, weight, num_parts)


class LastLinear(nn.Module):
    """A linear layer [B, D] that a block, or its mixer, ends with: its output is left as a `Rest`, and what is
    returned stands for it.
    """

    def __init__(self, layer: nn.Linear, rows: int):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.num_parts = choose_num_parts(rows, *layer.weight.shape, layer.weight.dtype, layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        self.rest = self.of(x)
        self.stands_for_it = x.new_empty(x.shape[0], self.out_features)
        return self.stands_for_it

    def of(self, x: Tensor) -> Rest:
        if self.num_parts == 1:
            return Rest(F.linear(x, self.weight, self.bias)[None])
        return Rest(product_in_parts(x, self.weight, self.num_parts), self.bias)

    def taken(self, y: Tensor) -> Rest:
        """The output, after a step returned `y`."""
        assert y is self.stands_for_it, "a mixer's step ends otherwise than it did when it was looked at"
        rest, self.rest, self.stands_for_it = self.rest, None, None
        return rest


class Joined(nn.Module):
    """Linear layers of one input, as one product: `read` it, then each of the `columns` has its layer's output.

    Weights are copied; `refresh` copies them again.
    """

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.sources = [[layer.weight for layer in layers], [layer.bias for layer in layers]]
        if layers[0].bias is None:
            self.sources.pop()
        joined = [torch.cat(parts).detach() for parts in self.sources]
        self.register_buffer("weight", joined[0], persistent=False)
        self.register_buffer("bias", joined[1] if len(joined) > 1 else None, persistent=False)
        self.sizes = [layer.out_features for layer in layers]
        self.outputs: tuple[Tensor, ...] | None = None

    def read(self, x: Tensor) -> None:
        self.outputs = F.linear(x, self.weight, self.bias).split(self.sizes, -1)

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
        first, last = input_and_output(block, state)
        self.joined = Joined(first) if len(first) > 1 else None
        self.last = None if last is None else LastLinear(last, rows)
        replaced: dict[nn.Linear, nn.Module] = {} if last is None else {last: self.last}
        if self.joined is not None:
            replaced |= {layer: Columns(layer, self.joined, index) for index, layer in enumerate(first)}
        self.first = [self.joined or layer for layer in first[:1]]  # a list: no submodule a second time
        self.norm, self.channel_norm = block.norm, block.channel_norm
        self.mixer = with_layers(block.mixer, replaced)
        self.kind, self.fc1, self.fc2 = None, None, None
        self.channel_mixer = block.channel_mixer
        if type(block.channel_mixer) is ChannelMixer:
            self.kind = "swiglu" if block.channel_mixer.gated else "gelu"
            self.fc1, self.fc2 = block.channel_mixer.fc1, LastLinear(block.channel_mixer.fc2, rows)
            self.channel_mixer = None

    def mix(self, x: Tensor, rest: Rest, state: State) -> tuple[Tensor, Rest, State]:
        """The input x + rest -> itself, the mixer's output, and its new state."""
        ahead = self.first[0].weight if self.first else None
        x, normed = add_norm(self.norm, x, rest, ahead)
        if self.joined is not None:
            self.joined.read(normed)
        y, state = self.mixer.step(normed, state)
        if self.joined is not None:
            self.joined.outputs = None
        return x, Rest(y[None]) if self.last is None else self.last.taken(y), state

    def mix_channels(self, x: Tensor, rest: Rest) -> tuple[Tensor, Rest]:
        """The channel half of the block after x + rest, its own addition left out."""
        if self.channel_norm is None:
            return x, rest
        x, normed = add_norm(self.channel_norm, x, rest, None if self.fc1 is None else self.fc1.weight)
        if self.kind is None:
            return x, Rest(self.channel_mixer(normed)[None])
        return x, self.fc2.of(kernels.activation(self.fc1(normed), self.kind, ahead=self.fc2.weight))

    def no_rest(self, x: Tensor) -> Rest:
        """Nothing to add to x [B, D], in the shapes that this block leaves."""
        last = self.last if self.channel_norm is None else self.fc2
        if last is None or last.num_parts == 1:
            return Rest(torch.zeros_like(x)[None])
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if last.bias is None else torch.zeros_like(last.bias)
        return Rest(torch.zeros(last.num_parts, *x.shape, dtype=dtype, device=x.device), bias)


@torch.no_grad()
def input_and_output(block: Block, state: State) -> tuple[list[nn.Linear], nn.Linear | None]:
    """The linear layers that read the very input of the mixer's step and nothing else, and the one whose output it is.

    Found by one step. The former are in the order of their first call; only those of the first one's dtype, and with a
    bias if it has one. The latter is called once, and is none of them.
    """
    x = next(block.parameters()).new_zeros(1, block.mixer.d_model)
    found: dict[nn.Linear, bool] = {}
    outputs: dict[nn.Linear, list[Tensor]] = {}

    def note(layer: nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> None:
        same = given[0].data_ptr() == x.data_ptr() and given[0].numel() == x.numel()
        found[layer] = found.get(layer, True) and same
        outputs.setdefault(layer, []).append(output)

    hooks = [layer.register_forward_hook(note) for layer in block.mixer.modules() if type(layer) is nn.Linear]
    try:
        y, _ = block.mixer.step(x, clone_state(state))
    finally:
        for hook in hooks:
            hook.remove()
    layers = [layer for layer, same in found.items() if same]
    first = [
        layer
        for layer in layers
        if layer.weight.dtype == layers[0].weight.dtype and (layer.bias is None) == (layers[0].bias is None)
    ]
    last = next((layer for layer, made in outputs.items() if len(made) == 1 and made[0] is y), None)
    return first, None if last in first else last


def with_layers(module: nn.Module, replaced: dict[nn.Linear, nn.Module]) -> nn.Module:
    """The same module, all it holds shared, with other linear layers."""
    if module in replaced:
        return replaced[module]
    children = {name: with_layers(child, replaced) for name, child in module.named_children()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = module._modules | children
    return twin
