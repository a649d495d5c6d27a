"""The fast loop: one static training step, compiled, recorded as a CUDA graph, and replayed without a host in between.

Everything a step needs is on the device before the epoch starts: the data in small integers, a table of the rows of
every batch, a table of learning rates. A step reads its number from a counter on the device, so that replaying the
same graph goes through the epoch. Shapes are the same at each step: the last, short batch of a slice is filled with
rows that have no labels. (A mixer that adds a penalty averaged over its batch sees the filling in that average.)
Learning rates, seeds, epochs and schedules are data, not code: runs that differ in nothing else share one loop, which
`fetch_loop` keeps.

On a CPU, or with `captured=False`, the same step runs without recording.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import os
import threading
import time
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import Tensor

import kernels
from kernels.linear_cross_entropy import choose_loss_backend
from zoology.config import MaskedPrefix, RunConfig, Slice
from zoology.data import Labelled, compact, hide_tokens
from zoology.devices import num_cores
from zoology.evaluate import Score, summarise
from zoology.loops import KEPT_LOOPS, Batches, Execution, Splits, backends_used, check_losses, epoch_rates
from zoology.model import LanguageModel
from zoology.optimizer import FlatAdamW, Vectors, adamw_update
from zoology.precision import autocast, computing_in
from zoology.tasks import IGNORE_INDEX

log = logging.getLogger("zoology")

PROBED_ROWS = 16
"""Examples of the first pass through a model: as many as kernels are compiled for that take whole batches."""

PREPARED = frozenset({"reference", "triton", "sdpa"})
"""Backends whose kernels two threads may compile and run at once; those of other libraries tune themselves."""

LARGE_ACTIVATIONS = 0.75e9
"""Bytes that the forward pass of a batch may keep for the backward pass before some are computed again instead."""

EVALUATION_BATCHES = 2
"""How many training batches' tokens an evaluation batch has at most. Nothing is kept for a backward pass, so that it
needs little more memory; with fewer sequences, kernels that walk along them leave much of a GPU idle."""


class Resident(NamedTuple):
    """A slice on the device: `Labelled` in small integers, and at each position [N, T] which label it has, or -1."""

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    slots: Tensor


def reside(data: Labelled) -> Resident:
    """The columns of `data` and the inverse of its positions."""
    tokens, positions, targets = (compact(tensor) for tensor in data)
    n, length = tokens.shape
    # Padding labels go to a column of their own, which is then dropped.
    at = positions.long().masked_fill(targets == IGNORE_INDEX, length)
    slots = torch.full((n, length + 1), -1, dtype=positions.dtype, device=tokens.device)
    numbers = torch.arange(positions.shape[1], dtype=positions.dtype, device=tokens.device)
    slots.scatter_(1, at, numbers.expand(n, -1))
    return Resident(tokens, positions, targets, slots[:, :length].contiguous())


class PickLabelled(torch.autograd.Function):
    """x [B, T, D] -> x at positions [B, P]; the gradient reads its own column by `slots` [B, T]: no atomics, no zeros.

    Columns of padding labels must have zero gradient, as labels that a loss ignores have.
    """

    @staticmethod
    def forward(ctx, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slots,) = ctx.saved_tensors
        at = slots.clamp_min(0)[..., None].expand(-1, -1, grad.shape[-1])
        return torch.where((slots >= 0)[..., None], grad.gather(1, at), 0), None, None


def batch_loss(
    model: LanguageModel,
    data: Resident,
    order: Tensor,
    counter: Tensor,
    head: Tensor | None,
    prefix_length: int,
    precision: str,
    masking: MaskedPrefix | None = None,
) -> Tensor:
    """The training loss of batch `counter` [1] of `order` [steps, B]; rows of -1 are filling and count for nothing.

    `head` [V, D] is the embedding in the dtype that logits are computed in, if that is not its own. `masking` hides
    tokens of the prefix, which must be free of labels, at random on the device.
    """
    rows = order.index_select(0, counter)[0].long()
    used = (rows >= 0)[:, None]
    rows = rows.clamp_min(0)
    tokens, positions, slots = (tensor[rows].long() for tensor in (data.tokens, data.positions, data.slots))
    targets, asked = data.targets[rows].long(), positions.shape[1]
    if masking is not None and prefix_length > 0:
        draws = torch.rand(tokens.shape[0], prefix_length, device=tokens.device)
        (tokens, positions, targets), hidden_at = hide_tokens(Labelled(tokens, positions, targets), draws, masking)
        numbers = torch.arange(asked, positions.shape[1], device=tokens.device)
        slots = slots.scatter(1, hidden_at, numbers.expand_as(hidden_at))
    targets = torch.where(used, targets, IGNORE_INDEX)

    def pick(x: Tensor) -> Tensor:
        return PickLabelled.apply(x, positions, slots)

    with autocast(precision, tokens.device):
        hidden = model.hidden(tokens, prefix_length, pick)
    weight = model.embedding.weight
    hidden = hidden.to(weight.dtype if head is None else head.dtype)

    def cross_entropy(columns: slice) -> Tensor:
        h, at = hidden[:, columns].flatten(0, 1), targets[:, columns].flatten()
        return kernels.linear_cross_entropy(h, weight, at, weight_copy=head, ignore_index=IGNORE_INDEX)

    loss = cross_entropy(slice(0, asked))
    if positions.shape[1] > asked:
        loss = loss + masking.weight * cross_entropy(slice(asked, None))
    return loss


def finish_step(
    vectors: list[Vectors],
    grads: list[list[Tensor]],
    scalars: Tensor,
    losses: Tensor,
    counter: Tensor,
    loss: Tensor,
    **options,
) -> None:
    """Update the weights by row `counter` of `scalars` [steps, 3], note the loss, and count."""
    adamw_update(vectors, grads, scalars.index_select(0, counter)[0], **options)
    losses.index_copy_(0, counter, loss.to(losses.dtype)[None])
    counter.add_(1)


class StaticLoop:
    """Training and evaluation of one model on one set of data, at static shapes; see the module's docstring.

    Raises ValueError for what it cannot run, and whatever compiling or recording raises.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, splits: Splits, *, compiled: bool | str, captured: bool
    ):
        started = time.perf_counter()
        self.config, self.device, self.splits = config, device, splits
        self.compiled, self.captured = compiled, captured
        self.precision = config.train.precision
        devices = [device] if device.type == "cuda" else []
        # Products are set up once for all that is built, which threads rely on.
        with torch.random.fork_rng(devices=devices), computing_in(self.precision, device):
            self.model = LanguageModel(config.model).to(device)
            with _many_variants() if compiled == PIECES else contextlib.nullcontext():
                self._build()
        mode = next(name for name, flags in MODES.items() if flags == (compiled, captured))
        hidden = torch.empty(1, config.model.d_model, device=device, dtype=self.compute_dtype)
        with computing_in(self.precision, device):
            backend = choose_loss_backend("auto", hidden)
        self.execution = Execution(mode, backend, "", time.perf_counter() - started)
        self.peak_memory_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

    @property
    def fills_device(self) -> bool:
        """Whether an epoch leaves a GPU no time for other processes."""
        return self.captured

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    # -- building -------------------------------------------------------------------------------------------

    def _build(self) -> None:
        data, device = self.config.data, self.device
        self.parts = [(part, reside(labelled)) for part, labelled in self.splits["train"]]
        for part, resident in self.parts:
            if self.config.train.masked_prefix and bool((resident.slots[:, : part.task.prefix_length] >= 0).any()):
                raise ValueError(f"train.masked_prefix: slice {part.label!r} has labels within its prefix")
        steps = sum(-(-part.tokens.shape[0] // data.batch_size) for _, part in self.parts)
        self.order = torch.zeros(steps, data.batch_size, dtype=torch.int32, device=device)
        self.scalars = torch.zeros(steps, 3, device=device)
        self.losses = torch.zeros(steps, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        # Workers that share a machine keep its GPU busy for each other while they build; one alone has cores to spare.
        prepares = self.compiled and device.type == "cuda" and 2 * torch.get_num_threads() > num_cores()
        with _Beside(device, self._rehearse_losses if prepares else None):
            names = self._probe()
        self.optimizer = FlatAdamW(
            self.model,
            names,
            weight_decay=self.config.train.weight_decay,
            clip_norm=self.config.train.clip_norm,
            low_precision=torch.bfloat16 if self.precision == "bf16" else None,
        )
        self._finish = compile_apart(finish_step, FINISH_OPTIONS) if self.compiled else finish_step
        self.head = self.optimizer.copies.get("embedding.weight")
        self.pool = torch.cuda.graph_pool_handle() if self.captured else None
        self._compiled: dict[tuple, Callable[..., Tensor]] = {}
        self._label_counts: dict[tuple, set[int]] = defaultdict(set)
        for part, resident in self.parts:
            self._label_counts[self._signature(part, resident)].add(resident.positions.shape[1])
        rehearse = None
        if prepares and set().union(*self.backends().values()) <= PREPARED:
            rehearse = functools.partial(self._rehearse_evaluation, copy.deepcopy(self.model))
        with _Beside(device, rehearse) as self._rehearsal:
            self.record_steps()
        # Test slices are scored once a run: recording them would take longer than it saves.
        self._evaluations = {
            split: {
                part.label: Evaluation(self, part, labelled, recorded=self.captured and split == "validation")
                for part, labelled in self.splits[split]
            }
            for split in ("validation", "test")
        }

    def record_steps(self) -> None:
        """Build the training step of every slice; what is compiled already is used again."""
        self._steps = [
            self._record(self._training_step(part, resident), train=True, counter=self.counter, recorded=self.captured)
            for part, resident in self.parts
        ]

    def _probe(self) -> list[str]:
        """Names of the parameters that get a gradient. Runs each length once: every mixer then knows its backend."""
        self.model.train()
        first_few = torch.arange(PROBED_ROWS, dtype=torch.int32, device=self.device)[None]
        most = 0.0
        for part, resident in {part.task.seq_len: (part, resident) for part, resident in self.parts}.values():
            first = first_few[:, : resident.tokens.shape[0]]
            with _counting_kept(first.shape[1], part.task.seq_len) as kept:
                args = (first, self.counter, self._head_copy(), part.task.prefix_length, self.precision)
                loss = batch_loss(self.model, resident, *args)
            loss.backward()
            most = max(most, sum(kept.values()) * self.config.data.batch_size / first.shape[1])
        # In 16 bits memory is short nowhere, and other operations than ours are not to run twice.
        self.recomputes = self.precision != "bf16" and most > LARGE_ACTIVATIONS
        found = dict(self.model.named_parameters())
        for name, parameter in found.items():
            if parameter.dtype != torch.float32:
                raise ValueError(f"parameter {name} is {parameter.dtype}, the static loop keeps float32 weights")
        names = [name for name, parameter in found.items() if parameter.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return names

    def _head_copy(self) -> Tensor | None:
        """The embedding in the dtype that logits are computed in, if that is not its own."""
        weight = self.model.embedding.weight.detach()
        return None if self.compute_dtype == weight.dtype else weight.to(self.compute_dtype)

    @torch.no_grad()
    def _rehearse_losses(self) -> None:
        """The loss once for every number of labels in a batch."""
        weight, head = self.model.embedding.weight.detach(), self._head_copy()
        for rows in sorted({self.config.data.batch_size * data.positions.shape[1] for _, data in self.parts}):
            hidden = torch.zeros(rows, weight.shape[1], device=self.device, dtype=self.compute_dtype)
            targets = torch.zeros(rows, device=self.device, dtype=torch.int64)
            kernels.linear_cross_entropy(hidden, weight, targets, weight_copy=head, ignore_index=IGNORE_INDEX)

    @torch.no_grad()
    def _rehearse_evaluation(self, model: LanguageModel) -> None:
        """Predictions of a twin of the model, once for every length that training does not have."""
        model.eval()
        seen = {part.task.seq_len for part, _ in self.parts}
        for split in ("validation", "test"):
            for part, labelled in self.splits[split]:
                number, length = labelled.tokens.shape
                if length not in seen:
                    seen.add(length)
                    first = torch.arange(self.evaluation_size(number, length), device=self.device)
                    self.predict(labelled.rows(first), part.task.prefix_length, model)

    def evaluation_size(self, number: int, length: int) -> int:
        """Examples of a batch of evaluation, of `number` of this length."""
        longest = max(part.task.seq_len for part, _ in self.parts)
        return max(1, min(EVALUATION_BATCHES * self.config.data.batch_size * longest // length, number))

    def _loss_function(self, part: Slice, resident: Resident) -> Callable[..., Tensor]:
        """The loss of a batch of this slice, compiled once for slices that differ in the number of labels only."""

        def loss_of_batch(*tensors: Tensor | None) -> Tensor:
            *columns, order, counter, head = tensors
            return batch_loss(
                self.model,
                Resident(*columns),
                order,
                counter,
                head,
                prefix_length,
                self.precision,
                self.config.train.masked_prefix,
            )

        key = prefix_length, *_ = self._signature(part, resident)
        if not self.compiled:
            return loss_of_batch
        if key not in self._compiled:
            self._compiled[key] = compile_apart(loss_of_batch, COMPILE_OPTIONS, whole=self.compiled != PIECES)
        if len(self._label_counts[key]) > 1:
            for column in (resident.positions, resident.targets):
                torch._dynamo.maybe_mark_dynamic(column, 1)
        return self._compiled[key]

    def _signature(self, part: Slice, resident: Resident) -> tuple:
        """What slices that share compiled code have in common: length of the prefix, where one matters, and data."""
        reads_prefix = self.model.takes_prefix or self.config.train.masked_prefix is not None
        prefix_length = part.task.prefix_length if reads_prefix else 0
        return (prefix_length, resident.tokens.shape, *(column.dtype for column in resident))

    def _training_step(self, part: Slice, resident: Resident) -> Callable[[], None]:
        compute = self._loss_function(part, resident)

        def step() -> None:
            loss = compute(*resident, self.order, self.counter, self.head)
            grads = torch.autograd.grad(loss, self.optimizer.parameters)
            optimizer, tables = self.optimizer, (self.scalars, self.losses, self.counter)
            with torch.no_grad():
                self._finish(optimizer.vectors, optimizer.group(grads), *tables, loss.detach(), **optimizer.options)

        return step

    def _record(
        self, function: Callable[[], None], *, train: bool, counter: Tensor, recorded: bool
    ) -> Callable[[], None]:
        """`function` as a CUDA graph to replay, after it ran twice; a plain call of it if it is not `recorded`."""

        def run() -> None:
            self.model.train(train)
            with torch.set_grad_enabled(train), computing_in(self.precision, self.device), self._partitioning():
                function()

        if not recorded:
            return run
        stream = _side_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                counter.zero_()
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._rehearsal.wait()  # nothing else may run on the device while a graph is recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            run()
        return graph.replay

    def _partitioning(self) -> contextlib.AbstractContextManager:
        """How the compiler divides a step in forward and backward: with `recomputes`, cheap results are not kept.

        The budget is a share of memory that the compiler satisfies with element-wise operations, if it can.
        """
        if not self.recomputes:
            return contextlib.nullcontext()
        return torch._functorch.config.patch(activation_memory_budget=0.95)

    # -- running --------------------------------------------------------------------------------------------

    def load(self, model: LanguageModel, config: RunConfig) -> None:
        """Start the run `config` from the weights of `model`."""
        self.config = config
        self.restore(model)

    def train_epoch(self, number: int, batches: Batches) -> float:
        """One pass over the batches: their mean loss. The host waits for the device once, at the end."""
        rows = torch.full(self.order.shape, -1, dtype=torch.int32)
        for step, (_, part) in enumerate(batches):
            rows[step, : len(part)] = part
        first = self.optimizer.steps + 1
        rates = epoch_rates(self.config.train, number, len(batches))
        self.order.copy_(rows)
        self.scalars.copy_(torch.tensor([self.optimizer.scalars_at(first + i, rate) for i, rate in enumerate(rates)]))
        self.replay([index for index, _ in batches])
        self.optimizer.steps += len(batches)
        return check_losses(self.losses.cpu(), number, self.config.train)

    def replay(self, slices: list[int]) -> None:
        """The steps of an epoch whose batches, of these slices, are in the tables: launched, not waited for."""
        self.counter.zero_()
        for index in slices:
            self._steps[index]()

    def score(self, split: str) -> dict[str, Score]:
        """Accuracy on every slice of a split."""
        return {label: evaluation.score() for label, evaluation in self._evaluations[split].items()}

    def predict(self, batch: Labelled, prefix_length: int, model: LanguageModel | None = None) -> Tensor:
        """Predicted symbols [B, P]. The head computes in float32 (or TF32), whose logits hardly ever tie."""
        model = self.model if model is None else model

        def pick(x: Tensor) -> Tensor:
            return x.gather(1, batch.positions[..., None].expand(-1, -1, x.shape[-1]))

        with autocast(self.precision, self.device):
            hidden = model.hidden(batch.tokens, prefix_length, pick)
        weight = model.embedding.weight
        symbols = kernels.linear_argmax(hidden.flatten(0, 1).to(weight.dtype), weight)
        return symbols.view(batch.positions.shape)

    @torch.no_grad()
    def restore(self, model: LanguageModel) -> None:
        """Take the weights of `model`; the optimizer starts anew."""
        weights = dict(model.named_parameters())
        self.optimizer.load(weights)
        for name, parameter in self.model.named_parameters():
            if name not in self.optimizer.masters:
                parameter.copy_(weights[name])
        for buffer, value in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)

    def export(self, model: LanguageModel) -> None:
        """Write the current weights, in float32, into `model`."""
        model.load_state_dict(self.model.state_dict() | self.optimizer.masters)

    def backends(self) -> dict[str, list[str]]:
        return backends_used(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer, to go on from here."""
        buffers = [buffer.cpu().clone() for buffer in self.model.buffers()]
        return {"kind": "static", "optimizer": self.optimizer.state_dict(), "buffers": buffers}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for buffer, value in zip(self.model.buffers(), state["buffers"], strict=True):
            buffer.copy_(value)


@contextlib.contextmanager
def _counting_kept(rows: int, length: int):
    """Bytes by storage of what autograd keeps in this block that has an axis of `rows` sequences or of their tokens."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if rows in x.shape or rows * length in x.shape:  # not a weight, nor what is made of weights
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield kept


class _Beside:
    """Runs `function` in a thread of its own for the time of a block, which waits for its end.

    It only prepares what is done again in earnest: there its errors come again, here they are noted.
    """

    def __init__(self, device: torch.device, function: Callable[[], None] | None):
        self._thread = None if function is None else threading.Thread(target=self._run, args=(device, function))

    @staticmethod
    def _run(device: torch.device, function: Callable[[], None]) -> None:
        try:
            # A thread starts out on the first GPU.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                function()
        except Exception:
            log.debug("could not be prepared", exc_info=True)

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> _Beside:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.wait()


@functools.lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that graphs are recorded on: libraries keep a workspace for each that they see."""
    return torch.cuda.Stream(device)


class Evaluation:
    """Scores one slice batch by batch, each example's accuracy in a buffer on the device."""

    def __init__(self, loop: StaticLoop, part: Slice, labelled: Labelled, *, recorded: bool):
        self.loop, self.prefix_length = loop, part.task.prefix_length
        self.data = Labelled(*(compact(tensor) for tensor in labelled))
        self.number, length = self.data.tokens.shape
        size = loop.evaluation_size(self.number, length)
        self.batches = -(-self.number // size)
        device = loop.device
        self.accuracies = torch.zeros(self.batches * size, dtype=torch.float64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.offsets = torch.arange(size, device=device)
        self.run = loop._record(self._batch, train=False, counter=self.counter, recorded=recorded)

    def _batch(self) -> None:
        at = self.counter * len(self.offsets) + self.offsets
        # The last batch repeats the last example; `score` leaves the repetitions out.
        batch = self.data.rows(at.clamp(max=self.number - 1))
        scored = batch.targets != IGNORE_INDEX
        hits = (self.loop.predict(batch, self.prefix_length) == batch.targets) & scored
        self.accuracies.index_copy_(0, at, hits.sum(1, dtype=torch.float64) / scored.sum(1))
        self.counter += 1

    def score(self) -> Score:
        self.counter.zero_()
        for _ in range(self.batches):
            self.run()
        return summarise(self.accuracies[: self.number])


COMPILE_OPTIONS: dict[str, Any] = {"triton.mix_order_reduction": False}
"""Options of the compiler for a loss; those that this version of PyTorch lacks are left out.

Reductions over rows and over columns in one kernel leave partial sums to a second, slow one: 44 of 1,360 us.
"""

FINISH_OPTIONS: dict[str, Any] = {"force_pointwise_cat": True}
"""For the end of a step: gradients are joined within the kernel that uses them."""


def compile_apart(
    function: Callable,
    options: dict[str, Any] | None = None,
    backend: str = "inductor",
    *,
    dynamic: bool = False,
    whole: bool = True,
) -> Callable:
    """`torch.compile` of a function with a code object of its own; `dynamic`: once for all sizes.

    PyTorch keeps compiled variants by code object and gives up on one that has many: here each model and shape is
    one, and what was compiled is freed with the function. If it need not be compiled `whole`, the calls that the
    compiler refuses run as they are, between pieces of compiled code.
    """
    _keep_compiled_code()
    apart = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    apart.__kwdefaults__ = function.__kwdefaults__
    if backend == "inductor":
        known = torch._inductor.config.get_config_copy()
        options = {name: value for name, value in (options or {}).items() if name in known}
    return torch.compile(apart, fullgraph=whole, dynamic=dynamic, backend=backend, options=options or None)


def _warm_compilers() -> None:
    """Start the processes that compile kernels, which takes them seconds: until they are there, nothing is parallel."""
    _keep_compiled_code()
    from torch._inductor import async_compile  # earlier versions of PyTorch start them here

    start = getattr(async_compile, "maybe_warm_pool", None)
    if start is not None:
        start()


def _many_variants():
    """Functions within a model have no code objects of their own: let the compiler keep a variant for each use."""
    return torch._dynamo.config.patch(
        recompile_limit=VARIANTS_OF_PIECES, accumulated_recompile_limit=4 * VARIANTS_OF_PIECES
    )


def _keep_compiled_code() -> None:
    """Let compiled code outlive the machine's next start: in the user's cache folder, unless told otherwise."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(home) / "zoology" / "inductor"))


PIECES = "pieces"
VARIANTS_OF_PIECES = 1 << 10
"""How often the compiler may compile one function of a model that it compiles in pieces: per layer, shape and model."""

# Whether it is compiled, if only in pieces, and whether it is recorded.
MODES: dict[str, tuple[bool | str, bool]] = {
    "compiled graph": (True, True),
    "pieces graph": (PIECES, True),
    "graph": (False, True),
    "pieces": (PIECES, False),
    "compiled": (True, False),
    "static": (False, False),
}
_loops: OrderedDict[str, StaticLoop] = OrderedDict()


def fetch_loop(
    config: RunConfig, device: torch.device, splits: Callable[[], Splits], mode: str
) -> tuple[StaticLoop | None, str]:
    """A static loop for this run, and why it is not faster, or none; kept for the runs that follow.

    `mode` is one of `MODES`, which is built or raises, or "auto": the fastest that can be built, each failure being
    logged; in pieces only what the compiler refuses as a whole. Out of memory is always raised, after giving up the
    loops that are kept.
    """
    key = "\n".join(
        (
            config.model.model_dump_json(),
            config.data.model_dump_json(),
            config.train.model_dump_json(include={"weight_decay", "clip_norm", "precision", "masked_prefix"}),
            f"{device} {mode}",
        )
    )
    if key in _loops:
        _loops.move_to_end(key)
        loop = _loops[key]
        loop.execution = loop.execution._replace(build_seconds=0.0, reused=True)
        return loop, loop.execution.reason
    while len(_loops) >= KEPT_LOOPS:
        _loops.popitem(last=False)
    gc.collect()  # a loop and its steps refer to each other
    wanted = ["compiled graph", "pieces graph", "graph"] if mode == "auto" else [mode]
    if device.type == "cuda" and MODES[wanted[0]][0]:
        _warm_compilers()
    data, started = splits(), time.perf_counter()
    reasons, in_pieces = [], mode != "auto"
    for name in wanted:
        compiled, captured = MODES[name]
        if compiled == PIECES and not in_pieces:
            continue
        try:
            loop = StaticLoop(config, device, data, compiled=compiled, captured=captured)
        except torch.OutOfMemoryError:
            _loops.clear()
            raise
        except Exception as error:
            if mode != "auto":
                raise
            # Where the compiler refuses a call, it may take what is around it.
            in_pieces = isinstance(error, torch._dynamo.exc.Unsupported)
            first_line = str(error).strip().partition("\n")[0]
            reasons.append(f"{name}: {type(error).__name__}: {first_line}")
            log.warning("%s cannot run as a %s, trying without: %s", config.architecture, name, first_line)
            log.debug("", exc_info=True)
            continue
        # What was tried in vain took its time as well: kernels are compiled and tuned in the first attempt.
        loop.execution = loop.execution._replace(reason="; ".join(reasons), build_seconds=time.perf_counter() - started)
        _loops[key] = loop
        return loop, loop.execution.reason
    return None, "; ".join(reasons)


def forget_loops() -> None:
    """Free every loop that is kept, and its memory on the device."""
    _loops.clear()
    gc.collect()
