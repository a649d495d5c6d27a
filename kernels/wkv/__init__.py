"""The WKV operation of RWKV-4: an average of the values with weights that decay."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.wkv.reference import WKVState, naive_wkv, wkv_reference, wkv_step_reference

__all__ = ["WKVState", "naive_wkv", "wkv", "wkv_step"]


def wkv(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, *, initial_state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """The average of the values so far, token i weighing e^{k_i - (t-1-i) decay} and the current one e^{bonus + k_t}.

    Args:
        k, v: [B, T, D], log weights and values, bf16, fp16, fp32 or fp64.
        decay: [D], the log weight lost per token, at least 0 (not checked); bonus: [D]. Any floating dtypes.
        initial_state: memory of the tokens before, any floating dtype; empty when None.

    Returns:
        o [B, T, D] in the dtype of v, and the memory after the last token, in the dtype of `initial_state`, or float32
        (float64 for float64 k) without one. Computed in float32 at least.

    Raises:
        ValueError: a shape, dtype or device that does not fit.

    Source: RWKV, arXiv:2305.13048, eq. 16; the form of the state is described in `reference.py`.
    """
    _check(k, v, decay, bonus, initial_state, axes="BTD", name="initial_state")
    with torch.autocast(k.device.type, enabled=False):
        return wkv_reference(k, v, decay, bonus, initial_state=initial_state)


def wkv_step(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: WKVState) -> tuple[Tensor, WKVState]:
    """One token of `wkv`: k v [B, D], decay bonus [D] -> o [B, D], computed before the state is rounded, and the state.

    Raises ValueError as `wkv` does.
    """
    if state is None:
        raise ValueError("state is None; allowed: a WKVState, WKVState.empty(...) before the first token")
    _check(k, v, decay, bonus, state, axes="BD", name="state")
    with torch.autocast(k.device.type, enabled=False):
        return wkv_step_reference(k, v, decay, bonus, state)


def _check(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: WKVState | None, *, axes: str, name: str) -> None:
    if k.ndim != len(axes) or 0 in k.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; allowed: [{', '.join(axes)}], every axis at least 1")
    width, memory = (k.shape[-1],), (k.shape[0], k.shape[-1])
    parts = [("v", v, tuple(k.shape)), ("decay", decay, width), ("bonus", bonus, width)]
    if state is not None:
        if not isinstance(state, WKVState):
            raise ValueError(f"{name} is a {type(state).__name__}; allowed: a WKVState")
        parts += [(f"{name}.{field}", x, memory) for field, x in zip(state._fields, state)]
    for label, x, wanted in [("k", k, tuple(k.shape)), *parts]:
        if tuple(x.shape) != wanted:
            raise ValueError(f"{label} has shape {tuple(x.shape)}; allowed: {wanted}")
        if not x.is_floating_point():
            raise ValueError(f"{label} has dtype {x.dtype}; allowed: a floating dtype")
        if x.device != k.device:
            raise ValueError(f"{label} is on {x.device}; allowed: {k.device}, the device of k")
