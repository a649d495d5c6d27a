"""The recurrences of this project on the Triton kernels of flash-linear-attention (github.com/fla-org).

Each function takes what the function of the same name in `kernels` takes, for a whole sequence [B, T, H, ...] or for
one token [B, H, ...]. fla has two forms: a chunked one, whose matrix products are 16-bit or TF32, and a recurrent one
in float32. The recurrent one runs for float32 inputs and for single tokens, where it has the gradient that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from architectures import backends
from kernels.taylor_linear_attention import autocast_inputs

MIN_CHUNKED_WIDTH, MAX_WIDTH = 16, 256
NO_RECURRENT_GRADIENT = frozenset({"gated_delta_rule", "kda", "dplr_delta_rule"})
# Measured on an H200 with fla 0.6.0: 1.8e-6 at 160 tokens, more than four times what the reference is off by.
INEXACT_FLOAT32_GRADIENT = frozenset({"rwkv6"})


def refusal(
    backend: str,
    operation: str,
    key_width: int,
    value_width: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
) -> str | None:
    """Why fla cannot run `operation` on heads of these widths, or None; None also where `backend` is another.

    Operations: gla, retention, rwkv6, delta_rule, and those of NO_RECURRENT_GRADIENT. Versions are read from metadata:
    nothing is imported.
    """
    if backend != "fla":
        return None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the dtype is {dtype}; allowed: bfloat16, float16, float32"
    widths = {"key": key_width, "value": value_width}
    for what, width in widths.items():
        if width > MAX_WIDTH:
            return f"heads have {what}s of width {width}; allowed: up to {MAX_WIDTH}"
    # Measured on an H200 with fla 0.6.0 and Triton 3.6: the gradient of retention's keys is off by 450% whenever tuning
    # takes 4 warps for the kernel that fla issue 640 is about, chunk_bwd_kernel_dqkwg; it is right with 2.
    if operation == "retention" and dtype != torch.float32 and (triton := _wrong_backward(device)):
        return (
            f"its backward pass is wrong on Hopper GPUs with Triton {triton} (known for 3.4.0 <= Triton < 3.7.1, "
            "fla issue 640): upgrade Triton"
        )
    if dtype == torch.float32 and not backends.tf32_allowed():
        why = ""
        if operation in NO_RECURRENT_GRADIENT:
            why = "its kernels with a gradient multiply float32 in TF32"
        elif operation in INEXACT_FLOAT32_GRADIENT:
            why = "its gradient of the decay loses more of float32 than rounding does"
        if why:
            return f"{why}: allowed are bfloat16, float16, or float32 after torch.set_float32_matmul_precision('high')"
    if dtype == torch.float32 and operation not in NO_RECURRENT_GRADIENT:
        return None
    for what, width in widths.items():
        if width < MIN_CHUNKED_WIDTH or width % 2:
            return f"heads have {what}s of width {width}; allowed in {dtype}: even, at least {MIN_CHUNKED_WIDTH}"
    return None


def _wrong_backward(device: torch.device) -> str | None:
    """The installed Triton where it compiles fla's chunk_bwd_kernel_dqkwg wrongly for `device`, else None."""
    triton = backends.installed("triton") if backends.is_hopper(device) else None
    return triton if triton and (3, 4, 0) <= backends.version_tuple(triton) < (3, 7, 1) else None


def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, *, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`kernels.linear_recurrence` with a decay per key channel, g like q (with it a `bonus`), or g [H], constant."""
    q, k, v = autocast_inputs(q, k, v)
    if g.ndim == 1:
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

        tensors, constants = {"q": q, "k": k, "v": v}, {"g_gamma": g.float().contiguous()}
        return _run(chunk_simple_gla, fused_recurrent_simple_gla, tensors, constants, state, scale=1.0)
    if bonus is not None:
        from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6

        tensors, constants = {"r": q, "k": k, "v": v, "w": g.float()}, {"u": bonus.to(q.dtype)}
        return _run(chunk_rwkv6, fused_recurrent_rwkv6, tensors, constants, state, scale=1.0)
    from fla.ops.gla import chunk_gla, fused_recurrent_gla

    def recurrent(*, g, **rest):
        return fused_recurrent_gla(gk=g, **rest)

    return _run(chunk_gla, recurrent, {"q": q, "k": k, "v": v, "g": g.float()}, {}, state, scale=1.0)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.delta_rule`, scaled by K^(-1/2): g None, per head, or per key channel.

    Where fla's gradient for a decay per head is wrong (its issue 640) the decay of a head is given to each of the
    head's key channels, whose kernels are others.
    """
    q, k, v = autocast_inputs(q, k, v)
    scale = q.shape[-1] ** -0.5
    tensors = {"q": q, "k": k, "v": v, "beta": beta.to(q.dtype)}
    if g is None:
        from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule

        def recurrent(*, initial_state, **rest):
            # Its backward pass does not compile for a state that wants no gradient (0.6.0).
            if backends.wants_grad(*(rest[name] for name in tensors)) and not initial_state.requires_grad:
                initial_state = initial_state.detach().requires_grad_()
            return fused_recurrent_delta_rule(initial_state=initial_state, **rest)

        return _run(chunk_delta_rule, recurrent, tensors, {}, state, scale=scale)
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    if g.ndim == beta.ndim and backends.wants_grad(*tensors.values(), g, state) and _wrong_backward(q.device):
        g = g.unsqueeze(-1).expand_as(k)
    tensors["beta"], tensors["g"] = beta.float(), g.float()
    if g.ndim == beta.ndim:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        recurrent = fused_recurrent_gated_delta_rule
        return _run(chunk_gated_delta_rule, recurrent, tensors, {}, state, scale=scale, recurrent_gradient=False)
    from fla.ops.kda import chunk_kda

    def per_channel(*, g, **rest):
        return fused_recurrent_gated_delta_rule(gk=g, **rest)

    return _run(chunk_kda, per_channel, tensors, {}, state, scale=scale, recurrent_gradient=False)


def dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernels.dplr_delta_rule` with scale 1, as RWKV-7 has it."""
    from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7

    q, k, v, a, b = autocast_inputs(q, k, v, a, b)
    tensors = {"r": q, "w": g.float(), "k": k, "v": v, "a": a, "b": b}
    return _run(chunk_rwkv7, fused_recurrent_rwkv7, tensors, {}, state, scale=1.0, recurrent_gradient=False)


def _run(
    chunked: Callable,
    recurrent: Callable,
    tensors: dict[str, Tensor],
    constants: dict[str, Tensor],
    state: Tensor,
    *,
    scale: float,
    recurrent_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose the form, add and take off the time axis of a single token, keep the state's dtype."""
    v = tensors["v"]
    one_token = v.ndim == 3
    if one_token:
        tensors = {name: tensor.unsqueeze(1) for name, tensor in tensors.items()}
    wants_grad = backends.wants_grad(*tensors.values(), *constants.values(), state)
    single = tensors["v"].shape[1] == 1
    if recurrent_gradient:
        run = recurrent if single or v.dtype == torch.float32 else chunked
    else:
        run = recurrent if single and not wants_grad else chunked
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with torch.autocast(v.device.type, enabled=False):
        o, final = run(
            **tensors, **constants, scale=scale, initial_state=state.float().contiguous(), output_final_state=True
        )
    return o.squeeze(1).to(v.dtype) if one_token else o.to(v.dtype), final.to(state.dtype)
