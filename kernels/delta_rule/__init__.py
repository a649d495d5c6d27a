"""The delta rule: linear attention whose memory is corrected, not only added to, with an optional decay."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.delta_rule.reference import chunk_terms, delta_terms, dplr_terms, step_terms
from kernels.taylor_linear_attention import autocast_inputs, check_qkv, check_scale

__all__ = ["delta_rule", "delta_rule_step", "dplr_delta_rule", "dplr_delta_rule_step"]

BACKENDS = ("auto", "reference", "triton")
MAX_TRITON_WIDTH = 128


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T and o_t = scale * S_t^T q_t, per head.

    Args:
        q, k: [B, T, H, K], of one floating dtype. The rule is stable where beta |k|^2 <= 2: normalise the keys.
        v: [B, T, H, V] of the same dtype.
        beta: [B, T, H], how much of the old value at k_t is replaced.
        g: log decay, at most 0: [B, T, H] (Gated DeltaNet), [B, T, H, K] (Kimi Delta Attention), or None (DeltaNet).
        scale: positive; K^(-1/2) when None.
        initial_state: S_0 [B, H, K, V], any floating dtype; zero when None.
        output_final_state: also return S_T, in the dtype of `initial_state`, or float32 (float64 for float64 inputs).
        backend: "reference" (plain PyTorch), "triton" (g [B, T, H] or None, no fp64, K up to 128), or "auto": triton
            where it supports the input in 16 bits, or in float32 where torch may multiply in TF32.

    Returns:
        o [B, T, H, V] in the dtype of v, and the final state or None. Sums are kept in float32 at least.
        Under autocast q, k and v are first cast to the autocast dtype.

    Raises:
        ValueError: a shape, dtype, device, scale or backend that does not fit.

    Source: DeltaNet arXiv:2406.06484 (WY form, section 3), Gated DeltaNet arXiv:2412.06464 (eq. 10), Kimi Delta
    Attention arXiv:2510.26692 (eq. 1); see `reference.py` for the form that is computed.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v, axes="BTH")
    _check_gates(q, beta, g)
    scale = check_scale(scale, q.shape[-1])
    refusal = triton_refusal(q, v, beta, g, initial_state)
    if refusal is None and g is not None and g.ndim == 4:
        refusal = "there is a decay per key channel; allowed: one per head, g [B, T, H], or None"
    if _choose_backend(backend, refusal, q) == "reference":
        return _run(chunk_terms, delta_terms, (q, k, v, beta, g), scale, initial_state, output_final_state)
    from kernels.delta_rule.triton import delta_rule_triton as run

    return _run_triton(run, (q, k, v, beta, g), scale, initial_state, output_final_state)


def triton_refusal(
    q: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, initial_state: Tensor | None = None
) -> str | None:
    """Why no Triton kernel takes these arguments; None if one does, for `delta_rule` with a decay per head or none."""
    for name, part in (("q", q), ("v", v), ("beta", beta), ("g", g), ("initial_state", initial_state)):
        if part is not None and (found := triton_support.refusal(name, part)):
            return found
    if q.shape[-1] > MAX_TRITON_WIDTH:
        return f"keys have width {q.shape[-1]}; allowed: up to {MAX_TRITON_WIDTH}"
    return None


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`: q k [B, H, K], v [B, H, V], beta [B, H], g [B, H], [B, H, K] or None,
    state [B, H, K, V] -> o [B, H, V], state. Raises ValueError as `delta_rule` does."""
    q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v, axes="BH")
    _check_gates(q, beta, g)
    scale = check_scale(scale, q.shape[-1])
    return _run(step_terms, delta_terms, (q, k, v, beta, g), scale, state, True)


def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, per head.

    Args:
        q, k, a, b, g: [B, T, H, K], of one floating dtype (g may have another); g is the log decay, at most 0.
        v: [B, T, H, V] of the same dtype.
        scale, initial_state, output_final_state, backend: as in `delta_rule`.

    Returns, Raises: as in `delta_rule`.

    Source: RWKV-7, arXiv:2503.14456, eq. 13-17, where a_t = -kappa_t, b_t = kappa_t * (in-context learning rate).
    """
    q, k, v, a, b = autocast_inputs(q, k, v, a, b)
    check_qkv(q, k, v, axes="BTH")
    _check_dplr(q, a, b, g)
    scale = check_scale(scale, q.shape[-1])
    if _choose_backend(backend, triton_refusal(q, v, None, g, initial_state), q) == "reference":
        return _run(chunk_terms, dplr_terms, (q, k, v, a, b, g), scale, initial_state, output_final_state)
    from kernels.delta_rule.triton_channels import dplr_delta_rule_triton as run

    return _run_triton(run, (q, k, v, a, b, g), scale, initial_state, output_final_state)


def dplr_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `dplr_delta_rule`: q k a b g [B, H, K], v [B, H, V], state [B, H, K, V] -> o [B, H, V], state.
    Raises ValueError as `delta_rule` does."""
    q, k, v, a, b = autocast_inputs(q, k, v, a, b)
    check_qkv(q, k, v, axes="BH")
    _check_dplr(q, a, b, g)
    scale = check_scale(scale, q.shape[-1])
    return _run(step_terms, dplr_terms, (q, k, v, a, b, g), scale, state, True)


def _choose_backend(backend: str, refusal: str | None, q: Tensor) -> str:
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend == "auto":
        return "triton" if refusal is None and triton_support.may_round(q) else "reference"
    return backend


def _run_triton(run, inputs, scale, initial_state, output_final_state):
    """Check the state, run the kernels."""
    q, v = inputs[0], inputs[2]
    if initial_state is not None:
        _check_like("state", initial_state, ((q.shape[0], q.shape[2], q.shape[3], v.shape[3]),), q.device)
    with torch.autocast(q.device.type, enabled=False):
        o, state = run(*inputs, initial_state, scale)
    return o, state if output_final_state else None


def _run(form, to_terms, inputs, scale, initial_state, output_final_state):
    """Cast to the accumulation dtype, run one form of the recurrence, cast back."""
    q, v = inputs[0], inputs[2]
    batch, heads, key_dim, value_dim = q.shape[0], q.shape[-2], q.shape[-1], v.shape[-1]
    given = v.dtype if initial_state is None else initial_state.dtype
    acc = torch.promote_types(torch.promote_types(v.dtype, given), torch.float32)
    if initial_state is None:
        state = q.new_zeros(batch, heads, key_dim, value_dim, dtype=acc)
    else:
        _check_like("state", initial_state, ((batch, heads, key_dim, value_dim),), q.device)
        state = initial_state.to(acc)
    with torch.autocast(q.device.type, enabled=False):
        terms = to_terms(*(None if x is None else x.to(acc) for x in inputs), scale)
        o, state = form(terms, state)
    final = state.to(acc if initial_state is None else given) if output_final_state else None
    return o.to(v.dtype), final


def _check_gates(q: Tensor, beta: Tensor, g: Tensor | None) -> None:
    per_head = tuple(q.shape[:-1])
    _check_like("beta", beta, (per_head,), q.device)
    if g is not None:
        _check_like("g", g, (per_head, tuple(q.shape)), q.device)


def _check_dplr(q: Tensor, a: Tensor, b: Tensor, g: Tensor) -> None:
    for name, x in (("a", a), ("b", b), ("g", g)):
        _check_like(name, x, (tuple(q.shape),), q.device)
        if name != "g" and x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: {q.dtype}, that of q")


def _check_like(name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {' or '.join(map(str, shapes))}")
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: a floating dtype")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; allowed: {device}, the device of q")
