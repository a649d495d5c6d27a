"""Fast generation: static states, prefill in chunks, and decoding as replays of one CUDA graph.

A `Decoder` allocates the state of its batch once. A decode step reads the last token, runs the model, picks the next
token and writes it behind the earlier ones, all on the device: replaying the step does not wait for anything. Any
registered mixer runs this way; one whose `step` writes into its state saves a copy of it.

On a CPU, or with `graphs=False`, the same step runs operation by operation.
"""

from __future__ import annotations

import collections
import functools
import logging
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from architectures.mixer import State, check_prefix_length, clone_state, map_state, state_tensors
from zoology.config import LayerConfig, ModelConfig
from zoology.model import Block, LanguageModel, Stack, measured_state
from zoology.step_layers import Rest, StepBlock, add_norm

log = logging.getLogger("zoology")

PREFILL_TOKENS = 1 << 16
"""Tokens, over the whole batch, of a chunk of a prompt, unless told otherwise."""

RECORDED_PROMPTS = 3
"""Shapes of chunks that a decoder keeps a graph of."""

READ_BEFORE_RECORDED = 2
"""How often a chunk of a shape is read before it is recorded. Once is too little: what a mixer notes down the first
time (a backend that runs beside another) is reason enough to compile again, which cannot be done while recording."""

RESERVE_BYTES = 1 << 30
"""Left alone by `check_memory`: kernels, their workspaces, the memory pools' rounding."""


class DoesNotFit(ValueError):
    """A batch or a length needs more memory than there is."""

    def __init__(self, message: str, needed: int, available: int):
        super().__init__(message)
        self.needed, self.available = needed, available


class Needs(NamedTuple):
    """Bytes of a generation: weights, states, the largest chunk's activations, logits."""

    weights: int
    states: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


def memory_needed(
    model_config: ModelConfig,
    batch_size: int,
    max_seq_len: int,
    prefill_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weights: bool = True,
) -> Needs:
    """Bytes to generate with: `prefill_tokens` is the length of one chunk of a prompt. Activations are an estimate."""
    size = dtype.itemsize
    states, parameters = _counts(model_config.model_dump_json(), max_seq_len, dtype)
    inner = {"mlp": 2, "swiglu": 3}.get(model_config.channel_mixer, 0) * model_config.channel_expand
    per_token = (24 + inner) * model_config.d_model * size
    return Needs(
        parameters * size if weights else 0,
        batch_size * states,
        int(batch_size * max(1, prefill_tokens) * per_token),
        2 * 4 * batch_size * model_config.vocab_size,
    )


def check_memory(
    model_config: ModelConfig,
    batch_size: int,
    max_seq_len: int,
    prefill_tokens: int,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weights: bool = True,
) -> Needs:
    """Refuse a generation that cannot fit, before anything is allocated, and return what it needs.

    `prefill_tokens` is the length of the longest chunk of a prompt, `weights` says that the model is not built yet.
    Raises DoesNotFit, a ValueError with `needed` and `available` in bytes, and ValueError for numbers below 1.
    """
    for name, value in (("batch_size", batch_size), ("max_seq_len", max_seq_len)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number >= 1")
    needs = memory_needed(model_config, batch_size, max_seq_len, prefill_tokens, dtype, weights=weights)
    available = available_memory(device)
    if available is not None and needs.total > available:
        parts = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in needs._asdict().items())
        raise DoesNotFit(
            f"batch_size={batch_size}, max_seq_len={max_seq_len} needs {needs.total:,} bytes ({parts}); "
            f"{available:,} bytes are available on {torch.device(device)}",
            needs.total,
            available,
        )
    return needs


def available_memory(device: torch.device | str) -> int | None:
    """Bytes that can still be allocated on a device; None where that is not known."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free + cached - RESERVE_BYTES)
    try:
        with open("/proc/meminfo") as lines:
            kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return 1024 * kib
    except (OSError, StopIteration):
        return None


@functools.lru_cache(maxsize=256)
def _counts(config_json: str, max_seq_len: int, dtype: torch.dtype) -> tuple[int, int]:
    """(state bytes of one sequence, parameters), counted on a model without memory."""
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.model_validate_json(config_json)).to(dtype)
    return model.state_bytes(max_seq_len), model.num_parameters()


# -- one step ---------------------------------------------------------------------------------------------------


def advance(block: StepBlock, x: Tensor, rest: Rest, state: State, keep_position: bool = True) -> tuple[Tensor, Rest]:
    """One token through a block, its state updated in place: the input is x + rest, and so is the output.

    `keep_position` leaves positions to the caller.
    """
    x, rest, new = block.mix(x, rest, state)
    write_state(state, new, keep_position)
    return block.mix_channels(x, rest)


def read(
    block: Block, x: Tensor, delta: Tensor, state: State, prefix_length: int, empty: bool, keep_position: bool
) -> tuple[Tensor, Tensor]:
    """A chunk [B, T, D] through a block, in the same way; `empty` says that nothing is in the state yet.

    That the last addition is left to whoever reads the output lets it be one kernel with the norm that follows.
    """
    x = x + delta
    fill = block.mixer.prefill_empty if empty else block.mixer.prefill
    prefix = {"prefix_length": prefix_length} if block.mixer.takes_prefix else {}
    y, new = fill(block.norm(x), state, **prefix)
    write_state(state, new, keep_position)
    return mix_channels(block, x, y)


def mix_channels(block: Block, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The channel half of a block after x + y, its own addition left out."""
    if block.channel_norm is None:
        return x, y
    x = x + y
    return x, block.channel_mixer(block.channel_norm(x))


class Fused:
    """A function compiled when it is first called; where the compiler refuses, that is logged and it runs as it is."""

    def __init__(self, function: Callable, what: str, *, dynamic: bool = False):
        from zoology.graphs import compile_apart

        self.plain, self.what = function, what
        # The kernels of a step read rows without gaps: what the compiler fills up for its own would be copied for them.
        options = None if dynamic else {"comprehensive_padding": False}
        self.compiled: Callable | None = compile_apart(function, options, dynamic=dynamic)

    def __call__(self, *arguments):
        if self.compiled is not None:
            try:
                return self.compiled(*arguments)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                reason = str(error).strip().partition("\n")[0]
                log.warning("%s runs uncompiled: %s: %s", self.what, type(error).__name__, reason)
                self.compiled = None
        return self.plain(*arguments)


def write_state(state: State, new: State, keep_position: bool) -> None:
    """Copy what `new` holds into the tensors of `state`; tensors that are the same stay."""
    for (_, old), (_, value) in zip(state_tensors(state), state_tensors(new)):
        if old is not value and not (keep_position and is_position(old)):
            old.copy_(value)


def is_position(tensor: Tensor) -> bool:
    """Whether a leaf of a state is the number of tokens seen: the one 0-d integer that mixers may have."""
    return tensor.ndim == 0 and not tensor.is_floating_point()


def _counters(state: State) -> list[int]:
    return [int(tensor) for _, tensor in state_tensors(state) if is_position(tensor)]


def finish(model: LanguageModel, x: Tensor, rest: Rest) -> Tensor:
    """x + rest, the output of the last block [B, D] -> logits [B, V]."""
    return model.head(add_norm(model.norm, x, rest)[1])


def scores(logits: Tensor, temperature: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Logits [B, V] -> [B, V], whose largest is the next token: the most likely one, or drawn at `temperature` [].

    A draw is the index of the largest p_i / e_i with e_i exponential: the same as from a multinomial, without waiting.
    """
    if temperature is None:
        return logits
    weights = torch.softmax(logits.float() / temperature, -1)
    return weights.div_(torch.empty_like(weights).exponential_(generator=generator))


_fused: weakref.WeakKeyDictionary[LanguageModel, dict] = weakref.WeakKeyDictionary()
"""What was compiled for a model, as long as the model lives."""


class Functions(NamedTuple):
    """What runs a layer: a step, and a chunk of a prompt."""

    advance: Callable
    read: Callable


class Decoder:
    """Generation with one model for one batch size, in states that are allocated once.

    Args:
        model: in eval mode, on the device that it will run on.
        batch_size, max_seq_len: sequences side by side, and the tokens that each may reach, prompt included.
        chunk_size: tokens of a prompt that are read at once; None: 2^16 over the whole batch.
        graphs: whether decode steps are recorded as CUDA graphs; "auto": on a CUDA device.
        compiled: whether the small operations of a step are fused by torch.compile; "auto": where graphs are used. It
            costs up to a minute once per machine and model.
        record_prompts: whether chunks of a prompt are recorded too, when their shape comes for the third time; the
            memory of their activations is then kept. "auto": on a CUDA device.
        compile_prompts: whether what reads a prompt is compiled too; "auto": where steps are.

    Raises DoesNotFit, before anything is allocated, if the states cannot fit, and ValueError for other bad numbers.

    `state` is the `Stack` of states, `position` [] the number of tokens in it; `logits` [B, V] are those that the last
    step of `decode` picked from.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        max_seq_len: int,
        *,
        chunk_size: int | None = None,
        graphs: bool | str = "auto",
        compiled: bool | str = "auto",
        record_prompts: bool | str = "auto",
        compile_prompts: bool | str = "auto",
    ):
        parameter = model.embedding.weight
        self.model, self.batch_size, self.max_seq_len = model, batch_size, max_seq_len
        self.device, dtype = parameter.device, parameter.dtype
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size={chunk_size!r}: must be a whole number >= 1, or None")
        switches = {"graphs": graphs, "compiled": compiled, "record_prompts": record_prompts}
        for name, value in (switches | {"compile_prompts": compile_prompts}).items():
            if value not in (True, False, "auto"):
                raise ValueError(f"{name}={value!r}: must be True, False or 'auto'")
            if value is True and "compile" not in name and self.device.type != "cuda":
                raise ValueError(f"{name}=True: needs a CUDA device, the model is on {self.device}")
        self.graphs = self.device.type == "cuda" if graphs == "auto" else graphs
        self.compiled = self.graphs if compiled == "auto" else compiled
        self.compile_prompts = self.compiled if compile_prompts == "auto" else compile_prompts
        self.record_prompts = self.device.type == "cuda" if record_prompts == "auto" else record_prompts
        check_memory(model.config, batch_size, max_seq_len, 1, self.device, dtype=dtype, weights=False)
        self.chunk_size = chunk_size or max(1, min(max_seq_len, PREFILL_TOKENS // batch_size))
        self._zero = torch.zeros(batch_size, model.config.d_model, device=self.device, dtype=dtype)
        self._template = model.init_state(1, min(2, max_seq_len), device=self.device)
        stack = model.init_state(batch_size, max_seq_len, device=self.device)
        self.position = stack.position
        self._counts_itself = self._probe()
        self._steps = [StepBlock(*of, batch_size) for of in zip(model.blocks, self._template.layers)]
        self._no_rest = self._steps[0].no_rest(self._zero)
        self.state = self._share_position(stack)
        self.seen = 0
        integers = {"dtype": torch.int64, "device": self.device}
        self.token = torch.zeros(batch_size, **integers)
        self.made = torch.zeros(max_seq_len, batch_size, **integers)
        self.count = torch.zeros(1, **integers)
        self.temperature = torch.ones((), device=self.device)
        self.generator = torch.Generator(self.device)
        self.logits: Tensor | None = None
        self._chunk_bytes: dict[int, int] = {}
        self._times_read: collections.Counter[tuple[int, int, bool]] = collections.Counter()
        self._prompts: dict[tuple[int, int, bool], tuple[Tensor, torch.cuda.CUDAGraph, Tensor]] = {}
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = None
        self._functions, self._finish = self._choose_functions()
        if self.graphs:
            self._warm_up()

    def state_bytes(self) -> int:
        """Bytes of all states of the batch, as they lie in memory."""
        return measured_state(self.state)[1]

    def reset(self) -> None:
        """Forget all tokens: every state as it was at the start."""
        for (_, tensor), (_, first) in zip(state_tensors(self.state), state_tensors(self._template)):
            if tensor.ndim == 0:
                tensor.copy_(first)
            elif tensor.shape[1:] == first.shape[1:]:
                tensor.copy_(first.expand_as(tensor))
            else:
                tensor.zero_()  # memory that grows with the sequence: what is not in use is not read
        self.seen = 0

    @torch.no_grad()
    def prefill(self, tokens: Tensor, prefix_length: int = 0) -> Tensor:
        """Read tokens [B, T], after those read before -> logits [B, V] of the last one.

        Chunks of `chunk_size` bound the memory; a prefix (`prefix_length` > 0) is read whole, with the first chunk.
        Raises ValueError for a shape, length or prefix that does not fit, DoesNotFit for a chunk too large.
        """
        if tokens.ndim != 2 or tokens.shape[0] != self.batch_size or tokens.shape[1] < 1:
            raise ValueError(f"tokens have shape {list(tokens.shape)}: must be [{self.batch_size}, at least 1]")
        length = tokens.shape[1]
        check_prefix_length(prefix_length, length)
        self._check_room(length)
        if not self.model.takes_prefix:
            prefix_length = 0
        first = min(length, max(self.chunk_size, prefix_length))
        self._check_chunk(first)  # no later one is longer
        last = self._read(tokens[:, :first], prefix_length)
        for start in range(first, length, self.chunk_size):
            last = self._read(tokens[:, start : start + self.chunk_size], 0)
        return self.model.head(self.model.norm(last))

    @torch.no_grad()
    def decode(self, tokens: Tensor, steps: int, *, temperature: float = 0.0, seed: int | None = None) -> Tensor:
        """Read tokens [B], the newest ones, and generate `steps` tokens after them -> [B, steps].

        Greedy at `temperature` 0, else drawn; `seed` starts the stream of draws anew, None goes on with it. Nothing
        waits for the device. Raises ValueError for a shape, a number or a length that does not fit.
        """
        if tokens.shape != (self.batch_size,):
            raise ValueError(f"tokens have shape {list(tokens.shape)}: must be [{self.batch_size}]")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: must be a whole number >= 1")
        check_temperature(temperature)
        self._check_room(steps)
        if seed is not None:
            self.generator.manual_seed(seed)
        sampled = temperature > 0
        if sampled:
            self.temperature.fill_(temperature)
        for block in self._steps:
            if block.joined is not None:
                block.joined.refresh()  # the model's weights may have changed
        self.token.copy_(tokens)
        self.count.zero_()
        if self.graphs and sampled not in self._graphs:
            recorded = self._record(functools.partial(self._step, sampled), self.generator if sampled else None)
            self.graphs = recorded is not None
            self._graphs[sampled] = recorded
        if self.graphs:
            graph, self.logits = self._graphs[sampled]
            for _ in range(steps):
                graph.replay()
        else:
            for _ in range(steps):
                self.logits = self._step(sampled)
        self.seen += steps
        return self.made[:steps].T.clone()

    def pick(self, logits: Tensor, *, temperature: float = 0.0, seed: int | None = None) -> Tensor:
        """The next tokens [B] of logits [B, V], from the same stream of draws as `decode`."""
        check_temperature(temperature)
        if seed is not None:
            self.generator.manual_seed(seed)
        self.temperature.fill_(max(temperature, 0.0))
        return scores(logits, self.temperature if temperature > 0 else None, self.generator).argmax(-1)

    # -- inside ---------------------------------------------------------------------------------------------

    def _check_room(self, length: int) -> None:
        if self.seen + length > self.max_seq_len:
            raise ValueError(
                f"the decoder holds max_seq_len={self.max_seq_len} tokens, {self.seen} are in it, {length} more came"
            )

    def _check_chunk(self, length: int) -> None:
        if length not in self._chunk_bytes:
            dtype = self._zero.dtype
            needs = memory_needed(self.model.config, self.batch_size, 1, length, dtype, weights=False)
            self._chunk_bytes[length] = needs.activations
        needed, available = self._chunk_bytes[length], available_memory(self.device)
        if available is not None and needed > available:
            raise DoesNotFit(
                f"a prefill of {self.batch_size} x {length} tokens at once needs about {needed:,} bytes; "
                f"{available:,} bytes are available on {self.device}: lower chunk_size",
                needed,
                available,
            )

    def _read(self, tokens: Tensor, prefix_length: int) -> Tensor:
        """A chunk of a prompt, the state updated in place -> [B, D], what the last block gives for the last token.

        A chunk of a shape that was read twice is recorded as a graph: what the host would do for every layer takes
        longer than the device needs for a few thousand tokens.
        """
        shape = (tokens.shape[1], prefix_length, self.seen == 0)
        if shape in self._prompts:
            buffer, graph, last = self._prompts[shape]
            buffer.copy_(tokens)
            graph.replay()
            last = last.clone()
        elif self.record_prompts and self._times_read[shape] >= READ_BEFORE_RECORDED:
            last = self._record_prompt(tokens, *shape)
        else:
            self._times_read[shape] += 1
            last = self._run_blocks(tokens, *shape[1:])
        self.seen += tokens.shape[1]
        return last

    def _record_prompt(self, tokens: Tensor, length: int, prefix_length: int, empty: bool) -> Tensor:
        """Record a chunk of this shape, forgetting the oldest of several, and read this one."""
        while len(self._prompts) >= RECORDED_PROMPTS:
            self._prompts.pop(next(iter(self._prompts)))
        buffer = tokens.clone()
        recorded = self._record(functools.partial(self._run_blocks, buffer, prefix_length, empty))
        if recorded is None:
            self.record_prompts = False
            return self._run_blocks(tokens, prefix_length, empty)
        self._prompts[length, prefix_length, empty] = buffer, *recorded
        recorded[0].replay()
        return recorded[1].clone()

    def _run_blocks(self, tokens: Tensor, prefix_length: int, empty: bool) -> Tensor:
        x = self.model.embed(tokens, self.position)
        delta = torch.zeros_like(x)
        for index, (block, state) in enumerate(zip(self.model.blocks, self.state.layers)):
            x, delta = self._read_block(index, block, x, delta, state, prefix_length, empty)
        self.position.add_(tokens.shape[1])
        return x[:, -1] + delta[:, -1]

    def _read_block(
        self, index: int, block: Block, x: Tensor, delta: Tensor, state: State, prefix_length: int, empty: bool
    ) -> tuple[Tensor, Tensor]:
        arguments = (block, x, delta, state, prefix_length, empty, index not in self._counts_itself)
        function = self._functions[index].read
        if function is read:
            return read(*arguments)
        mixer = block.mixer
        before = mixer.pin_backend(mixer.backend_for(x))
        try:
            return function(*arguments)
        finally:
            mixer.pin_backend(before)

    def _step(self, sampled: bool) -> Tensor:
        """Read `token`, write the next one there and into `made` -> logits: nothing but operations on the device."""
        x, rest = self.model.embed(self.token[:, None], self.position)[:, 0], self._no_rest
        for index, (block, state) in enumerate(zip(self._steps, self.state.layers)):
            x, rest = self._functions[index].advance(block, x, rest, state, index not in self._counts_itself)
        logits = self._finish(self.model, x, rest)
        drawn = scores(logits, self.temperature if sampled else None, self.generator if sampled else None)
        kernels.next_token(drawn, self.token, self.made, self.count)
        self.count.add_(1)
        self.position.add_(1)
        return logits

    @torch.no_grad()
    def _probe(self) -> set[int]:
        """The layers whose 0-d integers are not simply the number of tokens seen, found by two steps of each by itself.

        The steps also let every mixer choose, and check, its backend before anything is compiled or recorded.
        """
        x, own = self._zero[:1], set()
        for index, (block, state) in enumerate(zip(self.model.blocks, self._template.layers)):
            first = clone_state(state)
            _, second = block.mixer.step(x, first)
            seen = [_counters(part) for part in (state, first, second)]
            if self.max_seq_len > 1:
                seen.append(_counters(block.mixer.step(x, second)[1]))
            if any(counts != (0, 0, 1, 2)[: len(counts)] for counts in zip(*seen)):
                own.add(index)
        return own

    def _share_position(self, stack: Stack) -> Stack:
        """Most layers count the same tokens: one counter for all of them is one kernel less for each."""
        layers = tuple(
            state
            if index in self._counts_itself
            else map_state(lambda tensor: stack.position if is_position(tensor) else tensor, state)
            for index, state in enumerate(stack.layers)
        )
        return Stack(layers, stack.position)

    def _choose_functions(self) -> tuple[list[Functions], Callable]:
        """What runs each layer, compiled once for each kind of layer, and the head; a model's decoders share them."""
        specs = [self.model.config.layer_at(index) for index in range(len(self.model.blocks))]
        if not self.compiled and not self.compile_prompts:
            return [Functions(advance, read)] * len(specs), finish
        known = _fused.setdefault(self.model, {})

        def fused(function: Callable, key: str, what: str, dynamic: bool) -> Fused:
            # One code object for each batch size: the compiler gives up on one that has many variants.
            at = (function, key, None if dynamic else self.batch_size)
            if at not in known:
                known[at] = Fused(function, what, dynamic=dynamic)
            return known[at]

        def step(spec: LayerConfig) -> Callable:
            return fused(advance, spec.model_dump_json(), f"a step of {spec.name}", dynamic=False)

        def prompt(spec: LayerConfig) -> Callable:
            return fused(read, spec.model_dump_json(), f"prefill of {spec.name}", dynamic=True)

        functions = [
            Functions(step(spec) if self.compiled else advance, prompt(spec) if self.compile_prompts else read)
            for spec in specs
        ]
        return functions, fused(finish, "", "the head", dynamic=False) if self.compiled else finish

    @torch.no_grad()
    def _warm_up(self) -> None:
        """Run a step, so that kernels are chosen and compiled before anything is recorded, and forget it."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for sampled in (False, True):
                self._step(sampled)
                self.reset()
                self.count.zero_()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    @torch.no_grad()
    def _record(
        self, run: Callable[[], Tensor], generator: torch.Generator | None = None
    ) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """A graph of `run` and where it leaves its result; None, and a warning, where something waits for the device.

        All graphs share their memory: none needs what another left, but for the results.
        """
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        if not (self._prompts or any(self._graphs.values())):
            # A pool ends with the last graph in it, also with one that failed.
            self._pool = torch.cuda.graph_pool_handle()
        drawn_from = [torch.cuda.default_generators[self.device.index]]
        drawn_from += [] if generator is None else [generator]
        before = [one.get_state() for one in drawn_from]
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = run()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("generation runs without CUDA graphs: %s: %s", type(error).__name__, reason)
            # A recording that fails leaves them believing that it goes on, and they refuse to draw.
            for one, state in zip(drawn_from, before):
                fresh = torch.Generator(one.device)
                fresh.set_state(state)
                one.graphsafe_set_state(fresh.graphsafe_get_state())
            return None
        return graph, result


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is a finite number, at least 0."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature!r}: must be a finite number >= 0")
