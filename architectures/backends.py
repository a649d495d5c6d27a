"""Which implementation runs: names, the libraries they need, and how one is chosen or refused."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from architectures.mixer import SequenceMixer


class Library(NamedTuple):
    """What a backend needs beyond torch: the module to import and the extra of this project that installs it."""

    module: str
    extra: str


LIBRARIES: dict[str, Library | None] = {
    "reference": None,
    "sdpa": None,
    "triton": Library("triton", "gpu"),
    "flash-attn": Library("flash_attn", "flash-attn"),
    "mamba-ssm": Library("mamba_ssm", "mamba"),
    "fla": Library("fla", "fla"),
}
NEEDS_CUDA = frozenset({"triton", "flash-attn", "mamba-ssm", "fla"})


class BackendError(ValueError):
    """A named backend cannot be used here; the message says why and what would help."""


def missing(backend: str) -> str | None:
    """Why the library behind `backend` cannot be imported on this machine, or None."""
    library = LIBRARIES[backend]
    if library is None or importlib.util.find_spec(library.module) is not None:
        return None
    return f"{library.module} is not installed: pip install 'zoology[{library.extra}]'"


def refusal(
    mixer: SequenceMixer, backend: str, device: torch.device, dtype: torch.dtype, seq_len: int
) -> str | None:
    """Why `backend` cannot run this mixer on this input, or None if it can."""
    if reason := missing(backend):
        return reason
    if backend in NEEDS_CUDA and device.type != "cuda":
        return f"needs a CUDA device, the input is on {device.type!r}"
    return mixer.unsupported(backend, device=device, dtype=dtype, seq_len=seq_len)


def resolve(mixer: SequenceMixer, device: torch.device, dtype: torch.dtype, seq_len: int) -> str:
    """The backend for this mixer and input; raises BackendError if the one that was named cannot run it."""
    if mixer.backend != "auto":
        if reason := refusal(mixer, mixer.backend, device, dtype, seq_len):
            raise BackendError(f"backend={mixer.backend!r} for {type(mixer).__name__}: {reason}")
        return mixer.backend
    for backend in mixer.backends:
        if refusal(mixer, backend, device, dtype, seq_len) is None:
            return backend
    raise AssertionError(f"{type(mixer).__name__} lists no backend that always runs: add 'reference'")
