"""A block as decode steps run it: few products, and long sums in parts.

A step multiplies a few rows by every weight. How long that takes is decided by how many multiprocessors read weights
at once, and the libraries' products of few rows keep too few of them busy where a matrix is small, or has few columns
and a long sum. Layers that read the mixer's input are joined. Long sums are divided into parts; those of the layer that
a mixer, or a channel mixer, ends with are added up by the norm that follows. Both hold for any mixer whose projections
are `torch.nn.Linear`.

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
from zoology.model import Block, ChannelMixer, activate

NUM_PARTS = (2, 4, 8)
WORTH = 0.95  # of the time of an undivided product: what parts must stay below that a norm adds up,
WORTH_ALONE = 0.75  # and parts that nothing else adds up
MOST_ROWS = 256  # of a product that is divided: more keep the device busy


class Rest(NamedTuple):
    """What is still to be added to the residual stream: the sum of `parts` [S, B, D], and `bias` [D].

    Left to whoever reads it, the addition is one kernel with the norm that follows.
    """

    parts: Tensor
    bias: Tensor | None = None


def add_norm(norm: nn.Module, x: Tensor, rest: Rest) -> tuple[Tensor, Tensor]:
    """x + rest [B, D], rounded once, and its norm."""
    if type(norm) is nn.RMSNorm and norm.weight is not None:
        return kernels.add_norm(x, rest.parts, norm.weight, bias=rest.bias, eps=norm.eps)
    whole = rest.parts.shape[0] == 1 and rest.bias is None
    x = x + rest.parts[0] if whole else total(rest.parts, rest.bias, x).to(x.dtype)
    return x, norm(x)


def total(parts: Tensor, bias: Tensor | None, start: Tensor | None = None) -> Tensor:
    """start + sum of parts [S, ...] + bias, in float32 at least."""
    wide = torch.promote_types(parts.dtype, torch.float32)
    found, *others = parts.to(wide).unbind(0)  # one by one: a compiler takes that for element-wise work, and fuses it
    for one in (*others, start, bias):
        found = found if one is None else found + one.to(found.dtype)
    return found


@torch.library.custom_op(
    "zoology::product_in_parts", mutates_args=(), schema="(Tensor x, Tensor weight, int num_parts) -> Tensor"
)
def product_in_parts(x: Tensor, weight: Tensor, num_parts: int) -> Tensor:
    """x [B, D], weight [N, D] -> [S, B, N], which add up to x W^T."""
    # An operator: a compiler that saw the products would make one of them again.
    return torch.bmm(
        x.unflatten(1, (num_parts, -1)).transpose(0, 1), weight.unflatten(1, (num_parts, -1)).permute(1, 2, 0)
    )


@product_in_parts.register_fake
def _(x, weight, num_parts):
    return x.new_empty(num_parts, x.shape[0], weight.shape[0])


@functools.lru_cache(maxsize=256)
def choose_num_parts(rows: int, n: int, d: int, dtype: torch.dtype, device: torch.device, worth: float = WORTH) -> int:
    """In how many parts [rows, d] times [n, d] is fastest on this device, by trying: 1 where that is not worth it."""
    allowed = [1, *(parts for parts in NUM_PARTS if d % (8 * parts) == 0)]
    if device.type != "cuda" or dtype.itemsize != 2 or rows > MOST_ROWS:
        return 1
    # More weights than the cache holds: a step finds none of its own there.
    copies = 2 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // (n * d * dtype.itemsize)
    x, weights = torch.zeros(rows, d, device=device, dtype=dtype), torch.zeros(copies, n, d, device=device, dtype=dtype)
    times = {parts: _time(functools.partial(_product, x, parts), weights.unbind()) for parts in allowed}
    best = min(times, key=times.get)
    return best if times[best] < worth * times[1] else 1


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


class StandIn(nn.Module):
    """What takes the place of a linear layer for a number of rows, and has its weights."""

    worth = WORTH_ALONE

    def __init__(self, layer: nn.Linear, rows: int):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight
        self.num_parts = choose_num_parts(rows, *weight.shape, weight.dtype, weight.device, self.worth)


class StepLinear(StandIn):
    """A linear layer [..., D] -> [..., N]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.num_parts == 1:
            return F.linear(x, self.weight, self.bias)
        return total(self.parts(x.flatten(0, -2)), self.bias).to(x.dtype).unflatten(0, x.shape[:-1])

    def parts(self, x: Tensor) -> Tensor:
        """[B, D] -> [S, B, N], which add up to the output without its bias."""
        if self.num_parts == 1:
            return F.linear(x, self.weight)[None]
        return product_in_parts(x, self.weight, self.num_parts)


class LastLinear(StandIn):
    """A linear layer [B, D] that a mixer ends with: it leaves its output as `Rest`, and returns what stands for it."""

    worth = WORTH

    def __init__(self, layer: nn.Linear, rows: int):
        super().__init__(layer, rows)
        self.left: tuple[Rest, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.num_parts == 1:
            rest = Rest(F.linear(x, self.weight, self.bias)[None])
        else:
            rest = Rest(product_in_parts(x, self.weight, self.num_parts), self.bias)
        self.left = rest, rest.parts[0]
        return self.left[1]


class StepChannelMixer(nn.Module):
    """A `ChannelMixer` [B, D] whose last layer leaves its output as `Rest`.

    The bias of the first layer is left to the activation, which has time: the product takes longer with it.
    """

    def __init__(self, mixer: ChannelMixer, rows: int):
        super().__init__()
        self.fc1, self.fc2 = StepLinear(mixer.fc1, rows), LastLinear(mixer.fc2, rows)
        self.gated = mixer.gated

    def forward(self, x: Tensor) -> Tensor:
        hidden = total(self.fc1.parts(x), self.fc1.bias)
        return self.fc2(activate(hidden, self.gated).to(x.dtype))


def rest_of(y: Tensor, last: LastLinear | None) -> Rest:
    """What is left to add after a mixer returned y [B, D], which stands for more if the mixer has a `LastLinear`."""
    if last is None:
        return Rest(y[None])
    (rest, stands_for_it), last.left = last.left, None
    if y is not stands_for_it:
        raise RuntimeError("a mixer's step ends otherwise than it did when it was looked at")
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
        self.norm, self.channel_norm = block.norm, block.channel_norm
        self.mixer = with_layers(block.mixer, replaced, rows)
        self.channel_mixer, self.channel_last = block.channel_mixer, None
        if type(block.channel_mixer) is ChannelMixer:
            self.channel_mixer = StepChannelMixer(block.channel_mixer, rows)
            self.channel_last = self.channel_mixer.fc2

    def mix(self, x: Tensor, rest: Rest, state: State) -> tuple[Tensor, Rest, State]:
        """The input x + rest -> itself, the mixer's output, and its new state."""
        x, normed = add_norm(self.norm, x, rest)
        if self.joined is not None:
            self.joined.read(normed)
        y, state = self.mixer.step(normed, state)
        if self.joined is not None:
            self.joined.outputs = None
        return x, rest_of(y, self.last), state

    def mix_channels(self, x: Tensor, rest: Rest) -> tuple[Tensor, Rest]:
        """The channel half of the block after x + rest, its own addition left out."""
        if self.channel_norm is None:
            return x, rest
        x, normed = add_norm(self.channel_norm, x, rest)
        return x, rest_of(self.channel_mixer(normed), self.channel_last)

    def no_rest(self, x: Tensor) -> Rest:
        """Nothing to add to x [B, D], in the shapes that this block leaves."""
        last = self.last if self.channel_norm is None else self.channel_last
        if last is None or last.num_parts == 1:
            return Rest(torch.zeros_like(x)[None])
        bias = None if last.bias is None else torch.zeros_like(last.bias)
        return Rest(x.new_zeros(last.num_parts, *x.shape), bias)


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
        same = given[0].data_ptr() == x.data_ptr() and given[0].shape[-1] == x.numel()  # all of it, no head of it
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
