"""Which implementation runs: names, the libraries they need, and how one is chosen or refused."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import re
from typing import TYPE_CHECKING, NamedTuple

import torch

from architectures import parity

if TYPE_CHECKING:
    from architectures.mixer import SequenceMixer

logger = logging.getLogger("architectures")


class Library(NamedTuple):
    """What a backend needs beyond torch: modules to import, the distributions they come in, and our extra for them."""

    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    extra: str


LIBRARIES: dict[str, Library | None] = {
    "reference": None,
    "sdpa": None,
    "triton": Library(("triton",), ("triton",), "gpu"),
    "flash-attn": Library(("flash_attn",), ("flash-attn",), "flash-attn"),
    "mamba-ssm": Library(("mamba_ssm", "causal_conv1d"), ("mamba-ssm", "causal-conv1d"), "mamba"),
    "fla": Library(("fla",), ("flash-linear-attention", "fla-core"), "fla"),
}
NEEDS_CUDA = frozenset({"triton", "flash-attn", "mamba-ssm", "fla"})


class BackendError(ValueError):
    """A named backend cannot be used here; the message says why and what would help."""


def missing(backend: str) -> str | None:
    """Why the library behind `backend` cannot be imported on this machine, or None."""
    library = LIBRARIES[backend]
    absent = [name for name in library.modules if importlib.util.find_spec(name) is None] if library else []
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed: pip install 'zoology[{library.extra}]'"


def refusal(mixer: SequenceMixer, backend: str, device: torch.device, dtype: torch.dtype, seq_len: int) -> str | None:
    """Why `backend` cannot run this mixer on this input, or None if it can. Nothing is run or imported to find out."""
    reason = missing(backend)
    if backend in NEEDS_CUDA and device.type != "cuda":
        return f"needs a CUDA device, the input is on {device.type!r}" + (f"; {reason}" if reason else "")
    if reason:
        return reason
    return mixer.unsupported(backend, device=device, dtype=dtype, seq_len=seq_len)


def failure(mixer: SequenceMixer, backend: str, device: torch.device, dtype: torch.dtype, seq_len: int) -> str | None:
    """What the parity check of `backend` found wrong, with the error figures, or None.

    The reference is what others are checked against, and a mixer without memory on `device` (a plan builds them on
    the meta device) has nothing to check. Both pass. Inside a CUDA graph capture nothing can be checked: there a
    case that was not resolved before is refused.
    """
    on_device = all(parameter.device.type == device.type for parameter in mixer.parameters())
    if backend == "reference" or not on_device:
        return None
    # A backend that is wrong in training is not used for single tokens either, whose check has no gradients.
    for length in (parity.stand_in(seq_len),) if seq_len > 1 else (parity.LENGTH, 1):
        if parity.known(mixer, backend, device, dtype, length) is None and _capturing(device):
            return "its parity check cannot run inside a CUDA graph capture: call resolve_backend before"
        result = parity.check(mixer, backend, device, dtype, length)
        if not result.passed:
            return f"parity check failed: {result}"
    return None


def resolve(mixer: SequenceMixer, device: torch.device, dtype: torch.dtype, seq_len: int) -> tuple[str, dict[str, str]]:
    """The backend for this mixer and input, and why faster ones were passed over.

    Raises BackendError if the one that was named cannot run, or gives wrong numbers.
    """
    case = (device, dtype, seq_len)
    if mixer.backend != "auto":
        if reason := refusal(mixer, mixer.backend, *case) or failure(mixer, mixer.backend, *case):
            raise BackendError(f"backend={mixer.backend!r} for {type(mixer).__name__}: {reason}")
        return mixer.backend, {}
    refused: dict[str, str] = {}
    for backend in mixer.backends:
        reason = refusal(mixer, backend, *case)
        level = logging.INFO
        if reason is None:
            reason, level = failure(mixer, backend, *case), logging.WARNING
        if reason is None:
            return backend, refused
        refused[backend] = reason
        logger.log(level, "%s on %s, %s: backend %s refused: %s", type(mixer).__name__, device, dtype, backend, reason)
    raise AssertionError(f"{type(mixer).__name__} lists no backend that always runs: add 'reference'")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# -- what adapters ask about the machine ------------------------------------------------------------------------


@functools.cache
def installed(distribution: str) -> str | None:
    """The version of an installed distribution, from its metadata: nothing is imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_tuple(version: str) -> tuple[int, ...]:
    """(3, 7, 1) from "3.7.1", "3.7.1+cu130" or "3.7.1.post2"."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version).group().split(".")))[:3]


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is an NVIDIA GPU of compute capability 9."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def tf32_allowed() -> bool:
    """Whether torch may multiply float32 matrices in TF32 here, that is, at about 1e-3 of relative error."""
    return torch.get_float32_matmul_precision() != "highest"


def wants_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
