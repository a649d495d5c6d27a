"""Where Triton kernels run at all: what every operation asks before it asks about its own shapes."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def refusal(name: str, x: Tensor) -> str | None:
    """Why no Triton kernel takes x, the argument `name`, by its device and dtype; None if one may."""
    if not INSTALLED:
        return "Triton is not installed (pip install 'zoology[gpu]')"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"{name} is on {x.device}; allowed: a CUDA device (or any, with TRITON_INTERPRET=1)"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{name} has dtype {x.dtype}; allowed: bfloat16, float16, float32"
    return None


def gradient_refusal(tensors: list[Tensor]) -> str | None:
    """Why a kernel without a gradient does not take these tensors; None if it does."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "it has no gradient; allowed: no_grad"
    return None


def check_backend(backend: str, backends: tuple[str, ...], refusal: str | None) -> None:
    """Raise ValueError where `backend` is none of an operation's, or is Triton and there is a `refusal`."""
    if backend not in backends:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(backends)}")
    if backend == "triton" and refusal:
        raise ValueError(f"backend='triton' cannot run here: {refusal}")


def may_round(x: Tensor) -> bool:
    """Whether products of x may be of 16 bits or TF32. The compiler cannot trace it: a mixer names its backend."""
    return x.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"


def rows_apart(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, D] and how far apart its rows lie: columns of a wider tensor stay where they are, all else is copied."""
    row = x.stride(1)
    if x.stride(2) == 1 and row >= x.shape[2] and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * row):
        return x, row
    return x.contiguous(), x.shape[2]
