"""Taylor linear attention behind a non-causal prefix (JRT-RNN)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.prefix_linear_attention.reference import (
    prefix_linear_attention_quadratic,
    prefix_linear_attention_reference,
)
from kernels.taylor_linear_attention import (
    LONGEST_QUADRATIC,
    TaylorState,
    autocast_inputs,
    check_qkv,
    check_scale,
    check_state,
    choose_backend,
)

__all__ = ["prefix_linear_attention"]


def prefix_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_mask: Tensor | None = None,
    scale: float | None = None,
    initial_state: TaylorState | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, TaylorState | None]:
    """Taylor linear attention in which every query also reads all of a prefix, through keys and values of its own.

        o_t = phi(q_t).(S_t + E) / phi(q_t).(z_t + e),
        E = sum_j phi(prefix_k_j) prefix_v_j^T,   e = sum_j phi(prefix_k_j)

    Args:
        q, k: [B, T, H, f]; v: [B, T, H, V]: the whole sequence, prefix included, read causally.
        prefix_k: [B, M, H, f]; prefix_v: [B, M, H, V], M >= 1, same dtype.
        prefix_mask: [B, M] bool, True where the prefix token counts (None: everywhere). A masked token adds nothing.
        scale, initial_state, output_final_state, backend: as in `kernels.taylor_linear_attention`.

    Returns:
        o [B, T, H, V] and None, or the final state, prefix included: decoding goes on from it with
        `taylor_linear_attention_step`.

    Raises:
        ValueError: a shape, dtype, device, scale or backend that does not fit.

    Source: JRT-RNN, arXiv:2407.05483, section 4.
    """
    q, k, v, prefix_k, prefix_v = autocast_inputs(q, k, v, prefix_k, prefix_v)
    check_qkv(q, k, v, axes="BTH")
    check_prefix(q, v, prefix_k, prefix_v, prefix_mask)
    scale = check_scale(scale, q.shape[-1])
    check_state(initial_state, q.shape[0], q.shape[2], q.shape[3], v.shape[3], q.device)
    if choose_backend(backend, q) == "triton":
        from kernels.prefix_linear_attention.triton import prefix_linear_attention_triton as run
    else:
        run = prefix_linear_attention_reference
    longest = LONGEST_QUADRATIC if q.device.type == "cuda" else 128  # on a CPU: one chunk of the causal part
    short = max(q.shape[1], prefix_k.shape[1]) <= longest
    with torch.autocast(q.device.type, enabled=False):
        if run is prefix_linear_attention_reference and short and initial_state is None and not output_final_state:
            o = prefix_linear_attention_quadratic(q, k, v, prefix_k, prefix_v, prefix_mask=prefix_mask, scale=scale)
            return o, None
        return run(
            q,
            k,
            v,
            prefix_k,
            prefix_v,
            prefix_mask=prefix_mask,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )


def check_prefix(q: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_mask: Tensor | None) -> None:
    """prefix_k [B, M, H, f], prefix_v [B, M, H, V] and prefix_mask [B, M] bool fit q and v."""
    b, _, h, f = q.shape
    for name, x, width in (("prefix_k", prefix_k, f), ("prefix_v", prefix_v, v.shape[-1])):
        if x.dim() != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (b, h, width) or x.shape[1] < 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: ({b}, M >= 1, {h}, {width})")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: {q.dtype}, that of q")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; allowed: {q.device}, the device of q")
    length = prefix_k.shape[1]
    if prefix_v.shape[1] != length:
        raise ValueError(f"prefix_v has {prefix_v.shape[1]} tokens; allowed: {length}, as prefix_k has")
    if prefix_mask is None:
        return
    if tuple(prefix_mask.shape) != (b, length) or prefix_mask.dtype != torch.bool:
        raise ValueError(
            f"prefix_mask is {prefix_mask.dtype} of shape {tuple(prefix_mask.shape)}; allowed: bool of ({b}, {length})"
        )
    if prefix_mask.device != q.device:
        raise ValueError(f"prefix_mask is on {prefix_mask.device}; allowed: {q.device}, the device of q")
