"""Parity of a backend with the reference: outputs and all gradients of a small random case, against float64.

What a backend may be off by is not written down anywhere: it is a small factor times what the reference itself is off
by when it runs in the same precision.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kernels.triton_tuning import compiled_side_by_side

if TYPE_CHECKING:
    from architectures.mixer import SequenceMixer

logger = logging.getLogger("architectures")

FACTOR = 4.0
"""A backend's error may be this many times the reference's own error in that precision, or rounding of one entry."""
NUMBERS = 8
"""A gradient is compared by this many numbers or more. Rounding alone makes one error FACTOR times the other in 1 of
17 comparisons of two numbers, as in D of Mamba-2 with two heads, and in 1 of 2,700 of eight (F distribution)."""
BATCH, LENGTH, DECODED = 2, 160, 4
"""Size of the case: at most LENGTH tokens (two and a half chunks of 64); of a decode case, DECODED are single steps."""
CHUNK = 64
PERTURBATION = 0.1
"""Every parameter is moved by this much, so that none that starts at zero hides a path through the mixer."""


class Errors(NamedTuple):
    """Root-mean-square errors of one run, relative to the float64 run: of the output and of every gradient."""

    output: float
    gradients: dict[str, float]


class Parity(NamedTuple):
    """What a check found. `output` and `gradient` are relative errors, beside what was allowed for each."""

    output: float
    output_allowed: float
    gradient: float
    gradient_allowed: float
    gradient_name: str  # the tensor whose error is the largest share of what it may be ("x" is the input)
    crash: str = ""

    @property
    def passed(self) -> bool:
        """Whether both errors are finite and within what is allowed."""
        within = self.output <= self.output_allowed and self.gradient <= self.gradient_allowed
        return not self.crash and within

    def __str__(self) -> str:
        if self.crash:
            return self.crash
        return (
            f"output error {self.output:.1e} (allowed {self.output_allowed:.1e}), gradient error of "
            f"{self.gradient_name} {self.gradient:.1e} (allowed {self.gradient_allowed:.1e})"
        )


_results: dict[tuple, Parity] = {}


def check(mixer: SequenceMixer, backend: str, device: torch.device, dtype: torch.dtype, seq_len: int) -> Parity:
    """Compare `backend` with the float64 reference on a random case of this mixer's shapes, once per process.

    `seq_len` 1 stands for decoding: prefill, then single steps, without gradients. The case has its own parameters,
    those of `mixer` moved at random, and its own random numbers: neither the mixer nor a global generator changes.
    For a mixer that takes one, half of the case is a prefix. A backend that raises has failed. Results are kept by
    architecture, backend (as named, or as `auto` would run it), shapes and options, dtype and device.
    """
    key = _key(mixer, backend, device, dtype, seq_len)
    if key not in _results:
        with _apart(device):
            _results[key] = _compare(mixer, backend, device, dtype, seq_len)
        logger.info("parity of %s %s on %s, %s: %s", type(mixer).__name__, backend, device, dtype, _results[key])
    return _results[key]


def stand_in(seq_len: int) -> int:
    """A short length for a check of `seq_len`, with as much behind the last whole chunk.

    Kernels are compiled apart for sequences of whole chunks: training on those does not wait for kernels of others.
    """
    return seq_len if seq_len <= LENGTH else 2 * CHUNK + seq_len % CHUNK


def known(mixer: SequenceMixer, backend: str, device: torch.device, dtype: torch.dtype, seq_len: int) -> Parity | None:
    """The result of `check` if there is one already; nothing is run."""
    return _results.get(_key(mixer, backend, device, dtype, seq_len))


def errors(mixer: SequenceMixer, backend: str, device: torch.device, dtype: torch.dtype, seq_len: int) -> Errors:
    """Errors of `backend` on the case of `check`, not compared with anything and not kept."""
    with _apart(device):
        case = _Case(mixer, device, dtype, seq_len)
        return case.errors(backend, dtype, case.run("reference", torch.float64))


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off (a backward pass on a CPU would see it), whatever the caller is in the middle of."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=False):
        yield


def _compare(mixer: SequenceMixer, backend: str, device: torch.device, dtype: torch.dtype, seq_len: int) -> Parity:
    case = _Case(mixer, device, dtype, seq_len)
    exact = case.run("reference", torch.float64)
    reference = case.own_errors(exact)
    try:
        with compiled_side_by_side(device):
            found = case.errors(backend, dtype, exact)
    except Exception as error:  # a kernel that does not compile or refuses the shape is what the check is for
        nan = float("nan")
        return Parity(nan, nan, nan, nan, "", f"{type(error).__name__}: {str(error).strip()[:500] or 'no message'}")
    rounding = torch.finfo(dtype).eps

    def allowed(error: float) -> float:
        return FACTOR * max(error, rounding)

    budgets = {name: allowed(max(error, reference.output)) for name, error in reference.gradients.items()}
    # "not within" instead of a ratio: NaN must come out on top.
    worst = max(budgets, key=lambda name: _share(found.gradients[name], budgets[name]), default="")
    return Parity(
        found.output,
        allowed(reference.output),
        found.gradients.get(worst, 0.0),
        budgets.get(worst, 0.0),
        worst,
    )


def _share(error: float, allowed: float) -> float:
    return error / allowed if error == error else float("inf")


class _Case:
    """A mixer's twin with random parameters, and draws of an input and a random direction to differentiate along.

    One draw, or as many as give NUMBERS numbers of the smallest gradient.
    """

    def __init__(self, mixer: SequenceMixer, device: torch.device, dtype: torch.dtype, seq_len: int):
        generator = torch.Generator().manual_seed(0)

        def draw(shape) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.mixer = copy.deepcopy(mixer).train().to(device)
        self.device, self.dtype, self.decode = device, dtype, seq_len == 1
        # Where errors are measured; Apple's GPUs have no float64.
        self.home = torch.device("cpu") if device.type == "mps" else device
        # 16-bit inputs to float32 parameters are autocast: that is how such a mixer is trained.
        self.kept = next((p.dtype for p in self.mixer.parameters() if p.is_floating_point()), dtype)
        self.autocast = dtype in (torch.bfloat16, torch.float16) and self.kept == torch.float32
        with torch.no_grad():
            for parameter in self.mixer.parameters():
                parameter.grad = None
                parameter.requires_grad_(not self.decode)
                parameter.add_((PERTURBATION * draw(parameter.shape)).to(parameter))
        length = min(LENGTH, 16 if self.decode else seq_len)
        shape = (BATCH, length, mixer.d_model)
        self.prefix = {"prefix_length": length // 2} if mixer.takes_prefix else {}
        # Rounded once, so that every precision starts from the same numbers.
        kept = self.kept if self.autocast else dtype
        self.draws = [(draw(shape).to(kept).to(device), draw(shape).to(self.home)) for _ in range(self._num_draws())]

    def _num_draws(self) -> int:
        smallest = min((p.numel() for p in self.mixer.parameters() if p.requires_grad and p.numel()), default=NUMBERS)
        return -(-NUMBERS // smallest)

    def run(self, backend: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs and gradients in float64 of all draws, by `backend` in `dtype`."""
        outputs, gradients = zip(*(self._run(backend, dtype, x, along) for x, along in self.draws))
        return torch.stack(outputs), {name: torch.stack([each[name] for each in gradients]) for name in gradients[0]}

    def run_token_by_token(self, dtype: torch.dtype) -> Tensor:
        """Outputs in float64 of all draws by the reference in `dtype`, as one batch: steps are slow, not large."""
        twin, autocast, x = self._prepared("reference", dtype, torch.cat([x for x, _ in self.draws]))
        with autocast:
            outputs = self._decode(twin, x, x.shape[1])
        return self._at_home(outputs).unflatten(0, (len(self.draws), BATCH))

    def _run(self, backend: str, dtype: torch.dtype, x: Tensor, direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        twin, autocast, x = self._prepared(backend, dtype, x)
        with autocast:
            if self.decode:
                return self._at_home(self._decode(twin, x, DECODED)), {}
            y = twin(x.requires_grad_(), **self.prefix)
        y = self._at_home(y)
        (y * direction).sum().backward()
        named = {"x": x, **dict(twin.named_parameters())}
        gradients = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in named.items()}
        return y.detach(), {name: self._at_home(gradient) for name, gradient in gradients.items()}

    def _prepared(self, backend: str, dtype: torch.dtype, x: Tensor) -> tuple[SequenceMixer, torch.autocast, Tensor]:
        """A twin for `backend`, the autocast to run it under, and x, in `dtype` or in what autocast starts from."""
        twin = copy.deepcopy(self.mixer)
        twin.force_backend(backend)
        autocast = self.autocast and dtype == self.dtype
        keep = self.kept if autocast else dtype
        device = self.home if dtype == torch.float64 else self.device
        context = torch.autocast(device.type, dtype if autocast else torch.bfloat16, enabled=autocast)
        return twin.to(device).to(keep), context, x.detach().to(device).to(keep)

    def _at_home(self, x: Tensor) -> Tensor:
        return x.to(self.home).double()

    @torch.no_grad()
    def _decode(self, twin: SequenceMixer, x: Tensor, steps: int) -> Tensor:
        """Outputs for x [B, T, D], the last `steps` of them from single steps and those before from `prefill`."""
        state, outputs = twin.init_state(*x.shape[:2], device=x.device), []
        steps = min(steps, x.shape[1] - self.prefix.get("prefix_length", 0))
        if steps < x.shape[1]:
            y, state = twin.prefill(x[:, : x.shape[1] - steps], state, **self.prefix)
            outputs.append(y)
        for token in x[:, x.shape[1] - steps :].unbind(1):
            y, state = twin.step(token, state)
            outputs.append(y.unsqueeze(1))
        return torch.cat(outputs, 1)

    def errors(self, backend: str, dtype: torch.dtype, exact: tuple[Tensor, dict[str, Tensor]]) -> Errors:
        output, gradients = self.run(backend, dtype)
        exact_output, exact_gradients = exact
        # Some gradients are zero but for rounding (that of a key bias under softmax): no error is relative to those.
        typical = _rms(torch.cat([g.flatten() for g in exact_gradients.values()])) if exact_gradients else 0.0
        return Errors(
            _relative(output, exact_output),
            {name: _relative(gradients[name], g, 1e-3 * typical) for name, g in exact_gradients.items()},
        )

    def own_errors(self, exact: tuple[Tensor, dict[str, Tensor]]) -> Errors:
        """What the reference is off by in the precision of the case: its parallel form, or token by token if worse."""
        # Nothing here is more exact than float64: its error is that of float32, shorter by the mantissas' difference.
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        shrink = torch.finfo(self.dtype).eps / torch.finfo(dtype).eps
        output, gradients = self.errors("reference", dtype, exact)
        output = max(output, _relative(self.run_token_by_token(dtype), exact[0]))
        return Errors(output * shrink, {name: error * shrink for name, error in gradients.items()})


def _relative(x: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    return _rms(x - exact) / max(_rms(exact), floor, 1e-30)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _key(mixer: SequenceMixer, backend: str, device: torch.device, dtype: torch.dtype, seq_len: int) -> tuple:
    cls = type(mixer)
    options = tuple(_options(mixer))
    parameters = tuple((name, tuple(p.shape), p.dtype) for name, p in mixer.named_parameters())
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    precision = torch.get_float32_matmul_precision()
    return (
        cls.__module__,
        cls.__qualname__,
        backend,
        mixer.backend == "auto",
        options,
        parameters,
        kind,
        dtype,
        precision,
        min(seq_len, LENGTH),
    )


def _options(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Plain values that a mixer and its parts hold: heads, windows, flags."""
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, (int, float, str, type(None))) and key not in ("training", "backend"):
                yield f"{name}.{key}", value
