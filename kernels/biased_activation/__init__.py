"""What stands between the two layers of a channel mixer: the first one's bias, and the activation."""

from __future__ import annotations

from torch import Tensor

from kernels import triton_support
from kernels.biased_activation.reference import biased_activation_reference

__all__ = ["biased_activation"]

BACKENDS = ("auto", "reference", "triton")
ACTIVATIONS = ("gelu", "swiglu")


def biased_activation(parts: Tensor, bias: Tensor, *, activation: str, backend: str = "auto") -> Tensor:
    """gelu(h), or silu(g) * u with [g, u] = h, for h = sum of parts + bias of the few rows of a decode step.

    Args:
        parts: [S, B, N], S >= 1, a product without its bias, or the parts of its sum; bias: [N].
        activation: "gelu", or "swiglu" for an even N.
        backend: "reference" (plain PyTorch), "triton" (no gradient), or "auto": triton where it supports the input.

    Returns:
        [B, N], or [B, N / 2], in the dtype of the parts: computed in float32 at least, and rounded once.

    Raises:
        ValueError: a shape, activation or backend that does not fit.

    Source: Shazeer, arXiv:2002.05202, eq. 5 and 6, with biases.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if parts.dim() != 3 or parts.shape[0] < 1 or bias.shape != parts.shape[2:]:
        raise ValueError(
            f"parts have shape {tuple(parts.shape)} and bias {tuple(bias.shape)}; allowed: [S, B, N] and [N]"
        )
    if activation == "swiglu" and bias.shape[0] % 2:
        raise ValueError(f"there are {bias.shape[0]} columns; allowed for 'swiglu': an even number")
    refusal = triton_support.refusal("parts", parts) or triton_support.gradient_refusal([parts, bias])
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend == "reference" or refusal:
        return biased_activation_reference(parts, bias, activation)
    from kernels.biased_activation import triton as impl

    return impl.biased_activation_triton(parts, bias, activation)
