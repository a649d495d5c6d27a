"""The sequence-mixer contract: a parallel form for training, a recurrent form for decoding, and a state
whose size is measured, never written by hand.

Axes: B batch, T time, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from architectures import backends

State = Any  # a NamedTuple, possibly nested (plain tuples too), whose leaves are tensors

# Two lengths far apart: axes of a state that agree at both do not depend on the sequence length.
_SHORT, _LONG = 1, 1 << 20


def state_tensors(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (field name, tensor) for every leaf of a state; nested fields are joined with a dot."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    if not isinstance(state, tuple):
        raise TypeError(f"a state is a NamedTuple of tensors, got {type(state).__name__} at {prefix or 'top'!r}")
    for name, value in zip(getattr(state, "_fields", range(len(state))), state):
        yield from state_tensors(value, f"{prefix}.{name}" if prefix else str(name))


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply `function` to every tensor of a state and return a state of the same type."""
    if isinstance(state, Tensor):
        return function(state)
    values = [map_state(function, value) for value in state]
    return type(state)(*values) if hasattr(state, "_fields") else tuple(values)


def clone_state(state: State) -> State:
    """Copy a state, so that it survives the next `step` or `prefill` (those may write into their argument)."""
    return map_state(torch.clone, state)


def count_elements(tensor: Tensor) -> int:
    """Real numbers held by a state tensor: complex entries count twice, a 0-d integer counter not at all."""
    if tensor.ndim == 0 and not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def count_bytes(tensor: Tensor) -> int:
    """Bytes held by a state tensor, 0-d integer counters excepted."""
    return tensor.numel() * tensor.element_size() if count_elements(tensor) else 0


class SequenceMixer(nn.Module):
    """Base class of every architecture: maps [B, T, D] to [B, T, D], causally, with an explicit decode state.

    A subclass defines `init_state` and `step`, and `prefill` and `forward` where a parallel form is faster. Rules
    that the tests check for each:

    - `step` reads parameters, `x` and `state`, nothing else, and returns a state of the same shapes.
    - State tensors have the batch as their first axis; the only exception is a 0-d integer position.
    - `step` and `prefill` may write into the tensors of the state they were given: use the returned
      state from then on, and `clone_state` to keep an earlier one.
    - Memory that grows with the sequence is allocated at `max_seq_len` by `init_state`.

    Class attribute `backends` lists the implementations, fastest first; `reference` is always among them.

    A mixer with `takes_prefix = True` can read the first tokens of a sequence non-causally: its `forward` and
    `prefill` take `prefix_length`, a Python int (0: causal throughout), the same for all sequences of a batch.
    """

    backends: ClassVar[tuple[str, ...]] = ("reference",)
    keep_init: ClassVar[bool] = False  # True: a model shell leaves this mixer's initialisation as it is
    takes_prefix: ClassVar[bool] = False  # True: `forward` and `prefill` have the argument `prefix_length`

    def __init__(self, d_model: int, *, backend: str = "auto"):
        super().__init__()
        if not isinstance(d_model, int) or d_model < 1:
            raise ValueError(f"d_model must be a positive integer, got {d_model!r}")
        allowed = ("auto", *self.backends)
        if backend not in allowed:
            raise ValueError(f"backend={backend!r} is not one of {', '.join(allowed)} for {type(self).__name__}")
        self.d_model = d_model
        self.backend = backend
        self._resolved: dict[tuple, str] = {}
        self._refused: dict[str, str] = {}
        self._beside: list[str] = []
        self._forced: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Parallel form: x [B, T, D] -> [B, T, D]. By default `prefill` from an empty state."""
        self.check_input(x)
        return self.prefill(x, self.init_state(x.shape[0], x.shape[1], device=x.device))[0]

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> State:
        """Empty state for `batch_size` sequences of at most `max_seq_len` tokens."""
        raise NotImplementedError(f"{type(self).__name__} defines no init_state(batch_size, max_seq_len, ...) -> state")

    def empty_state(self, x: Tensor) -> State:
        """An empty state for x [B, T, D], of its dtype. Raises ValueError as `check_input` does."""
        self.check_input(x)
        return self.init_state(x.shape[0], x.shape[1], device=x.device, dtype=x.dtype)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Parallel form from a state on: x [B, T, D], state -> [B, T, D], state after the T tokens.

        By default one `step` after the other: right, but slow.
        """
        outputs = []
        for token in x.unbind(1):
            y, state = self.step(token, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    def prefill_empty(self, x: Tensor, state: State, **prefix: int) -> tuple[Tensor, State]:
        """`prefill` of a state that the caller knows to be empty: subclasses that gain by not reading it override this.

        Whether it is empty stands on the device alone, and asking the device would wait for it.
        """
        return self.prefill(x, state, **prefix)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, D], state -> [B, D], state."""
        raise NotImplementedError(f"{type(self).__name__} defines no step(x, state) -> output, state")

    def state_size(self, seq_len: int) -> int:
        """Real numbers carried per sequence between two tokens at length `seq_len`, counted on the tensors."""
        return sum(self.state_fields(seq_len).values())

    def state_fields(self, seq_len: int) -> dict[str, int]:
        """Elements of each state field for one sequence of length `seq_len`, an int of at least 0.

        Raises ValueError for another length, and TypeError for a state that is no NamedTuple.
        """
        if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 0:
            raise ValueError(f"seq_len={seq_len!r}: must be a whole number >= 0")
        state = self.init_state(1, seq_len, device="meta")
        if not isinstance(state, tuple):
            raise TypeError(
                f"{type(self).__name__}.init_state must return a NamedTuple of tensors, got {type(state).__name__}"
            )
        return {name: count_elements(tensor) for name, tensor in state_tensors(state)}

    def state_bytes(self, seq_len: int, dtype: torch.dtype | None = None) -> int:
        """Bytes carried per sequence at length `seq_len`, in the dtype the state is kept in."""
        state = self.init_state(1, seq_len, device="meta", dtype=dtype)
        return sum(count_bytes(tensor) for _, tensor in state_tensors(state))

    def like_parameters(self, device=None, dtype=None) -> dict[str, Any]:
        """Device and dtype for new state tensors: those given, else those of the parameters."""
        parameter = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        return {"device": parameter.device if device is None else device, "dtype": dtype or parameter.dtype}

    def like_sums(self, device=None, dtype=None) -> dict[str, Any]:
        """`like_parameters` for sums over a whole sequence: float32 beside 16-bit parameters, unless a dtype is given.

        Nothing decays there, and bfloat16 cannot count beyond 256.
        """
        like = self.like_parameters(device, dtype)
        if dtype is None and like["dtype"].itemsize == 2:
            like["dtype"] = torch.float32
        return like

    # -- checks ---------------------------------------------------------------------------------------------

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is [B, T, D] of a floating dtype.

        Many a mixer would take [T, D] for T sequences of one token.
        """
        if x.ndim != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [B, T, {self.d_model}]")
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}; allowed: a floating dtype (a mixer reads embeddings, not tokens)")

    def check_state(self, x: Tensor, state: State) -> None:
        """Refuse a state of another architecture, configuration, batch size, device or dtype.

        Raises ValueError naming the field and what was expected. Reads shapes only: no device synchronisation.
        """
        template, lengths = self._state_template()
        if type(state) is not type(template):
            raise ValueError(
                f"{type(self).__name__} expects a state of type {type(template).__name__}, "
                f"got {type(state).__name__}: use its own init_state()"
            )
        for (name, tensor), (_, short), (_, long) in zip(
            state_tensors(state), state_tensors(template), state_tensors(lengths)
        ):
            if short.ndim == 0:
                continue
            wanted = [x.shape[0]] + [s if s == g else None for s, g in zip(short.shape[1:], long.shape[1:])]
            fits = tensor.ndim == len(wanted) and all(w in (None, n) for w, n in zip(wanted, tensor.shape))
            if not fits:
                shown = ", ".join("any" if w is None else str(w) for w in wanted)
                raise ValueError(f"state field {name!r} has shape {tuple(tensor.shape)}, expected [{shown}]")
            if tensor.device != x.device:
                raise ValueError(f"state field {name!r} is on {tensor.device}, the input on {x.device}")
            dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
            low = x.dtype in (torch.bfloat16, torch.float16)
            if dtype.is_floating_point and dtype != x.dtype and not (low and dtype == torch.float32):
                raise ValueError(
                    f"state field {name!r} is {tensor.dtype}, the input {x.dtype}: "
                    "allowed are the input's dtype, or float32 beside a 16-bit input"
                )

    def _state_template(self) -> tuple[State, State]:
        if "_template" not in self.__dict__:
            self._template = tuple(self.init_state(1, n, device="meta") for n in (_SHORT, _LONG))
        return self._template

    # -- backends -------------------------------------------------------------------------------------------

    def unsupported(self, backend: str, *, device: torch.device, dtype: torch.dtype, seq_len: int) -> str | None:
        """Why `backend` cannot run this shape, dtype or device; None if it can. Subclasses override it."""
        return None

    def resolve_backend(self, device: torch.device | str, dtype: torch.dtype, seq_len: int) -> str:
        """The backend that runs x [B, seq_len, D] of `dtype` on `device`; `seq_len` 1 also stands for `step`.

        A named backend is returned, or refused with the reason (`BackendError`); `auto` takes the first of `backends`
        that is installed, supports the case, and passed its parity check. The answer is kept: asked for before,
        that is a look-up, which torch.compile can trace and a CUDA graph capture.
        """
        device = torch.device(device)
        key = (device.type, dtype, seq_len)
        if key not in self._resolved:
            # A parity check is no part of a graph. (As a decorator, `disable` would import the compiler here and now.)
            resolve = torch.compiler.disable(self._resolve) if torch.compiler.is_compiling() else self._resolve
            resolve(key, device)
        return self._resolved[key]

    def _resolve(self, key: tuple, device: torch.device) -> None:
        self._resolved[key], refused = backends.resolve(self, device, *key[1:])
        self._refused.update(refused)

    def backends_used(self) -> list[str]:
        """The backends that ran since construction, in order of first use; `reference` where there is no choice."""
        return list(dict.fromkeys([*self._resolved.values(), *self._beside])) or ["reference"]

    def backends_refused(self) -> dict[str, str]:
        """Why `auto` passed over backends that come before the ones it used."""
        return dict(self._refused)

    def ran_beside(self, backend: str) -> str:
        """Record, and return, a backend that does what the resolved one has no kernel for."""
        if backend not in self._beside:
            self._beside.append(backend)
        return backend

    def pin_backend(self, backend: str | None) -> str | None:
        """Run `backend` without looking it up, None: look up again -> what was pinned before.

        For code that is compiled for any length, which no table of lengths answers: resolve, pin, run, pin None.
        """
        before, self._forced = self._forced, backend
        return before

    def force_backend(self, backend: str) -> None:
        """Run `backend` from now on and ask nothing: for parity checks, of a copy that is thrown away.

        `auto` stays `auto`: what it would run beside the backend runs beside it here too. The reference runs alone.
        """
        for module in self.modules():
            if isinstance(module, SequenceMixer):
                taken = backend if backend in module.backends else "reference"
                if taken == "reference" or module.backend != "auto":
                    module.backend = taken
                module._resolved, module._forced = {}, taken

    def backend_for(self, x: Tensor) -> str:
        """`resolve_backend` for the tensor at hand, in the dtype autocast would compute with."""
        if self._forced is not None:
            return self._forced
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return self.resolve_backend(x.device, dtype, x.shape[1] if x.ndim == 3 else 1)


def check_prefix_length(prefix_length: int, seq_len: int) -> None:
    """Raise ValueError unless a prefix of that length fits a sequence, or a first part of one, of `seq_len` tokens."""
    if isinstance(prefix_length, bool) or not isinstance(prefix_length, int) or prefix_length < 0:
        raise ValueError(f"prefix_length={prefix_length!r}: must be a whole number >= 0")
    if prefix_length > seq_len:
        raise ValueError(
            f"prefix_length={prefix_length}: there are {seq_len} tokens, and a prefix must come whole, in one call"
        )


def require_at_least(least: int, **options: float | None) -> None:
    """Raise ValueError unless every option, by name, is None or a finite number of at least `least`."""
    for name, value in options.items():
        if value is not None and not least <= value < math.inf:
            finite = " and finite" if isinstance(value, float) else ""
            raise ValueError(f"{name} must be at least {least}{finite}, got {value}")


def require_positive(**options: float) -> None:
    """Raise ValueError unless every option, by name, is a positive finite number."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def expanded_width(width: int, factor: float, *, name: str, of: str) -> int:
    """`width` times `factor`. Raises ValueError unless that is a positive integer, but for rounding."""
    product = width * factor
    if not (math.isfinite(product) and product > 0 and math.isclose(round(product), product)):
        raise ValueError(f"{name}={factor} times {of}={width} is {product}; allowed: a positive integer")
    return round(product)


def depth_and_height(layer_idx: int, n_layers: int) -> tuple[float, float]:
    """How far through a model its layer `layer_idx` lies: from 0 at the first to 1 at the last, and from 1 to 1 / n.

    The initialisations of RWKV depend on both. Raises ValueError unless 0 <= layer_idx < n_layers.
    """
    if not 0 <= layer_idx < n_layers:
        raise ValueError(f"layer_idx={layer_idx} must lie in [0, n_layers={n_layers})")
    return layer_idx / max(1, n_layers - 1), 1 - layer_idx / n_layers


def divide_heads(d_model: int, num_heads: int, *, name: str = "num_heads") -> int:
    """Width of one head. Raises ValueError unless `num_heads` divides `d_model`."""
    if num_heads < 1 or d_model % num_heads:
        divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
        raise ValueError(f"{name}={num_heads} does not divide d_model={d_model}: allowed are {divisors}")
    return d_model // num_heads


def default_num_heads(d_model: int, head_dim: int) -> int:
    """The number of heads that comes closest to width `head_dim` and divides `d_model`."""
    divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
    return min(divisors, key=lambda n: (abs(math.log(d_model / n / head_dim)), n))
