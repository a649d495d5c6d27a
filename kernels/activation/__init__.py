"""What stands between the two products of a channel mixer."""

from __future__ import annotations

from torch import Tensor

from kernels import triton_support
from kernels.activation.reference import activation_reference

__all__ = ["activation"]

BACKENDS = ("auto", "reference", "triton")
KINDS = ("swiglu", "gelu")


def activation(x: Tensor, kind: str, *, ahead: Tensor | None = None, backend: str = "auto") -> Tensor:
    """silu(a) * b of the halves a, b of each row ("swiglu"), or gelu(x), for the few rows of a decode step.

    Args:
        x: [B, N]; N even for "swiglu".
        kind: "swiglu" or "gelu", the exact one.
        ahead: a tensor that is read next; triton asks for it to come into the L2 cache, nothing else is done with it.
        backend: "reference" (plain PyTorch), "triton" (no gradient), or "auto": triton where it supports the input.

    Returns:
        [B, N / 2] or [B, N] in the dtype of x, computed in float32 by triton.

    Raises:
        ValueError: a shape, kind or backend that does not fit.

    Source: SwiGLU: arXiv:2002.05202, eq. 6; GELU: arXiv:1606.08415.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")
    if x.dim() != 2 or (kind == "swiglu" and x.shape[1] % 2):
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [B, N], N even for 'swiglu'")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    refusal = triton_support.refusal("x", x) or triton_support.gradient_refusal([x])
    if backend == "triton" and refusal:
        raise ValueError(f"backend='triton' cannot run here: {refusal}")
    if backend == "reference" or refusal:
        return activation_reference(x, kind)
    from kernels.activation import triton as impl

    return impl.activation_triton(x, kind, ahead)
