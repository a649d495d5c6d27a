"""Softmax attention of one new token over a cache of keys and values: the step of attention when it decodes."""

from __future__ import annotations

from torch import Tensor

from kernels import triton_support
from kernels.cached_attention.reference import cached_attention_reference

__all__ = ["cached_attention", "triton_refusal"]

BACKENDS = ("auto", "reference", "triton")
MAX_HEAD_DIM = 256


def cached_attention(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(scale * q.k) v over the slots of a cache that are in use; each slot is read once.

    Args:
        q: [B, H, K], the queries of the newest token.
        keys, values: [B, S, H, K] of the dtype of q; slots hold tokens in any order, the newest one among them.
        position: [] integer on the device of q, where the newest token stands in its sequence, counted from 0: the
            first min(position + 1, S) slots are read. It is read on the device: nothing waits for it.
        scale: K^(-1/2) when None.
        backend: "reference" (plain PyTorch), "triton" (no gradient), or "auto": triton where it supports the input.

    Returns:
        o [B, H, K] in the dtype of the values, summed in float32 at least.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit.

    Source: Attention Is All You Need, arXiv:1706.03762, eq. 1; the division of the cache among programs is that of
    flash-decoding (Dao et al. 2023).
    """
    _check(q, keys, values, position)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    refusal = triton_refusal(q, keys) or triton_support.gradient_refusal([q, keys, values])
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend == "reference" or refusal:
        return cached_attention_reference(q, keys, values, position, scale=scale)
    from kernels.cached_attention import triton as impl

    return impl.cached_attention_triton(q, keys, values, position, scale=scale)


def triton_refusal(q: Tensor, keys: Tensor) -> str | None:
    """Why the Triton kernel does not take this input; None if it does."""
    if found := triton_support.refusal("q", q):
        return found
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head width is {q.shape[-1]}; allowed: up to {MAX_HEAD_DIM}"
    if not keys.is_contiguous():
        return "the cache is not contiguous"
    return None


def _check(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q has shape {tuple(q.shape)} and dtype {q.dtype}; allowed: [B, H, width], floating")
    b, h, k = q.shape
    if keys.dim() != 4 or (keys.shape[0], *keys.shape[2:]) != (b, h, k):
        raise ValueError(f"keys has shape {tuple(keys.shape)}; allowed: ({b}, S, {h}, {k})")
    if values.shape != keys.shape:
        raise ValueError(f"values has shape {tuple(values.shape)}; allowed: {tuple(keys.shape)}, that of keys")
    for name, x in (("keys", keys), ("values", values)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; allowed: {q.dtype} on {q.device}, as q is")
    if position.dim() != 0 or position.is_floating_point() or position.device != q.device:
        raise ValueError(
            f"position has shape {tuple(position.shape)} and dtype {position.dtype} on {position.device}; "
            f"allowed: an integer tensor without axes on {q.device}"
        )
