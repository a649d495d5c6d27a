"""What a token brings to attention over a cache: rotary embedding, and its key and value written into their slot."""

from __future__ import annotations

from torch import Tensor

from kernels import triton_support
from kernels.cache_update.reference import cache_update_reference

__all__ = ["cache_update", "triton_refusal"]

BACKENDS = ("auto", "reference", "triton")


def cache_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    turned: int = 0,
    base: float = 10000.0,
    backend: str = "auto",
) -> Tensor:
    """The newest token of every sequence joins a cache: its key and value are written into slot position mod S.

    Args:
        q, k, v: [B, H, K] of one dtype, rows apart or not.
        keys, values: [B, S, H, K'], K' >= K, of that dtype; written to. Entries beyond K are zero.
        position: [] integer on their device, where the token stands, counted from 0. It is read on the device.
        turned: entries of each head of q and k that have a rotary position embedding, even; angles
            position * base^(-2 i / turned) are made in float64.
        backend: "reference" (plain PyTorch), "triton" (no gradient), or "auto": triton where it supports the input.

    Returns:
        q [B, H, K'], turned like the key.

    Raises:
        ValueError: a shape, dtype or backend that does not fit.

    Source: RoFormer, arXiv:2104.09864, eq. 34, with the halves of an entry pair as in GPT-NeoX.
    """
    _check(q, k, v, keys, values, position, turned)
    refusal = triton_refusal(q, k, v, keys, values)
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend == "reference" or refusal:
        return cache_update_reference(q, k, v, keys, values, position, turned, base)
    from kernels.cache_update import triton as impl

    return impl.cache_update_triton(q, k, v, keys, values, position, turned, base)


def triton_refusal(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why the Triton kernel does not take this input; None if it does."""
    if found := triton_support.refusal("q", q):
        return found
    if not (keys.is_contiguous() and values.is_contiguous()):
        return "the cache is not contiguous"
    return triton_support.gradient_refusal([q, k, v, keys, values])


def _check(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, turned: int) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q has shape {tuple(q.shape)} and dtype {q.dtype}; allowed: [B, H, width], floating")
    b, h, width = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {tuple(q.shape)}, that of q")
    if keys.dim() != 4 or (keys.shape[0], keys.shape[2]) != (b, h) or keys.shape[3] < width:
        raise ValueError(f"keys has shape {tuple(keys.shape)}; allowed: ({b}, S, {h}, {width} or more)")
    if values.shape != keys.shape:
        raise ValueError(f"values has shape {tuple(values.shape)}; allowed: {tuple(keys.shape)}, that of keys")
    for name, x in (("k", k), ("v", v), ("keys", keys), ("values", values)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; allowed: {q.dtype} on {q.device}, as q is")
    if position.dim() != 0 or position.is_floating_point() or position.device != q.device:
        raise ValueError(
            f"position has shape {tuple(position.shape)} and dtype {position.dtype} on {position.device}; "
            f"allowed: an integer tensor without axes on {q.device}"
        )
    if isinstance(turned, bool) or not isinstance(turned, int) or not 0 <= turned <= width or turned % 2:
        raise ValueError(f"turned={turned!r}: must be an even number from 0 to {width}")
