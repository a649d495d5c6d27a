"""The scans of Mamba and Mamba-2 and their short convolution on the kernels of mamba-ssm and causal-conv1d.

Everything here wants CUDA tensors. The decode kernels have no gradient and write the new state over the old one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from architectures import backends
from architectures.layers import ShortConvolution
from kernels.taylor_linear_attention import autocast_inputs

CHUNK_SIZE = 64
MAX_STATE = 256


def refusal(
    backend: str,
    conv: ShortConvolution,
    d_state: int,
    *,
    chunked: bool,
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
) -> str | None:
    """Why the kernels cannot run a block with this convolution, or None; None also where `backend` is another.

    `chunked` scans (Mamba-2) are made of matrix products.
    """
    if backend != "mamba-ssm":
        return None
    channels, d_conv = conv.weight.shape
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the dtype is {dtype}; allowed: bfloat16, float16, float32"
    if channels % 8:
        return f"the short convolution has {channels} channels; allowed: multiples of 8"
    if not 2 <= d_conv <= 4:
        return f"d_conv={d_conv}; allowed: 2, 3, 4"
    if d_state > MAX_STATE:
        return f"d_state={d_state}; allowed: up to {MAX_STATE}"
    if chunked and dtype == torch.float32 and not backends.tf32_allowed():
        return (
            "its kernels multiply float32 in TF32: allowed are bfloat16, float16, or float32 after "
            "torch.set_float32_matmul_precision('high')"
        )
    return None


def short_convolution(conv: ShortConvolution, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """`conv.prefill` of x [B, T, D], or `conv.step` of one token [B, D]."""
    # The kernel's last weight is that of the current token, the module's first one is.
    weight, bias, size = conv.weight.flip(-1), conv.bias, conv.kernel_size
    (x,) = autocast_inputs(x)
    if x.ndim == 2:
        if tail.dtype != x.dtype or backends.wants_grad(x, weight, tail):
            return conv.step(x, tail)
        return _convolution_step(x, tail, weight, bias, conv.activation), tail
    from causal_conv1d import causal_conv1d_fn

    before = tail.to(x.dtype).contiguous()
    y = causal_conv1d_fn(
        x.contiguous().transpose(1, 2),
        weight,
        bias,
        initial_states=before.transpose(1, 2),
        activation=conv.activation,
    )
    after = x if x.shape[1] >= size - 1 else torch.cat([before, x], dim=1)
    return y.transpose(1, 2), after[:, after.shape[1] - (size - 1) :].to(tail.dtype)


def gated_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """(`kernels.selective_scan` + D x) silu(z) from an empty state on, dt [B, E, T] before its bias and softplus.

    The last state has no gradient.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C, z = autocast_inputs(x, dt, B, C, z)
    x, B, C, z = (part.transpose(1, 2).contiguous() for part in (x, B, C, z))
    rest = {"D": D.float(), "z": z, "delta_bias": dt_bias.float()}
    with torch.autocast(x.device.type, enabled=False):
        y, last = selective_scan_fn(
            x, dt.to(x.dtype), A.float(), B, C, **rest, delta_softplus=True, return_last_state=True
        )
    return y.transpose(1, 2), last


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, D: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernels.selective_scan` + D x from `state` on, with dt before its softplus; no gradient through the state.

    The kernel starts from nothing: what an earlier state adds is added here, as the scan is linear in it.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C = autocast_inputs(x, dt, B, C)
    dt, B, C, A = dt.to(x.dtype), B.to(x.dtype), C.to(x.dtype), A.float()
    channels_first = [part.transpose(1, 2).contiguous() for part in (x, dt, B, C)]
    with torch.autocast(x.device.type, enabled=False):
        y, last = selective_scan_fn(
            channels_first[0],
            channels_first[1],
            A,
            channels_first[2],
            channels_first[3],
            delta_softplus=True,
            return_last_state=True,
        )
        y = y.transpose(1, 2)
        elapsed, before = F.softplus(dt.float()).cumsum(1), state.float()
        extra = torch.zeros_like(elapsed)
        for n in range(A.shape[1]):
            extra = extra + torch.exp(elapsed * A[:, n]) * before[:, None, :, n] * C[:, :, n, None]
        last = last + torch.exp(elapsed[:, -1, :, None] * A) * before
        return (y + extra + D.float() * x).to(x.dtype), last.to(state.dtype)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """(`kernels.selective_scan_step` + D x) silu(z), dt [B, D] before its bias and softplus; writes into `state`."""
    x, dt, B, C, z = autocast_inputs(x, dt, B, C, z)
    return _scan_step(x, dt, A, B, C, D, dt_bias, z, state), state


def read_prompt(
    x: Tensor, z: Tensor, conv: ShortConvolution, project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], **scan
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's convolution and gated scan from empty states on, everything channels first and without a gradient.

    x z [B, E, T], `project` gives dt [B, E, T], B and C [B, N, T] of the convolved x -> y [B, E, T], the states of scan
    and convolution. Nothing is transposed on the way.
    """
    size = conv.kernel_size
    tail = F.pad(x, (max(0, size - 1 - x.shape[2]), 0))[:, :, -(size - 1) :].transpose(1, 2)
    x = _convolution(x, conv.weight.flip(-1), conv.bias, conv.activation)
    y, last = _scan(x, *project(x), scan["A"], scan["D"].float(), scan["dt_bias"].float(), z)
    return y, last, tail


# Operators, so that what has no gradient can be compiled.
@torch.library.custom_op(
    "zoology::mamba_ssm_convolution",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, str? activation) -> Tensor",
)
def _convolution(x, weight, bias, activation):
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x, weight, bias, activation=activation).contiguous()


@_convolution.register_fake
def _(x, weight, bias, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "zoology::mamba_ssm_scan",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor B, Tensor C, Tensor A, Tensor D, Tensor dt_bias, Tensor z)"
    " -> (Tensor, Tensor)",
)
def _scan(x, dt, B, C, A, D, dt_bias, z):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y, last = selective_scan_fn(
        x, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
    )
    return y.contiguous(), last.contiguous()


@_scan.register_fake
def _(x, dt, B, C, A, D, dt_bias, z):
    last = x.new_empty(x.shape[0], x.shape[1], A.shape[1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), last


@torch.library.custom_op(
    "zoology::mamba_ssm_convolution_step",
    mutates_args=("tail",),
    schema="(Tensor x, Tensor(a!) tail, Tensor weight, Tensor? bias, str? activation) -> Tensor",
)
def _convolution_step(x, tail, weight, bias, activation):
    from causal_conv1d import causal_conv1d_update

    return causal_conv1d_update(x.contiguous(), tail.transpose(1, 2), weight, bias, activation=activation)


@_convolution_step.register_fake
def _(x, tail, weight, bias, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "zoology::mamba_ssm_scan_step",
    mutates_args=("state",),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias, Tensor z, Tensor(a!) state)"
    " -> Tensor",
)
def _scan_step(x, dt, A, B, C, D, dt_bias, z, state):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    # The kernel's launcher cannot leave out D and the bias (2.3.2).
    return selective_state_update(state, x.contiguous(), dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)


@_scan_step.register_fake
def _(x, dt, A, B, C, D, dt_bias, z, state):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """SSD of x [B, T, H, P] or one token [B, H, P]: dt [..., H] before bias and softplus, A [H], B C [..., G, N],
    state [B, H, N, P]. A token without a gradient is written into `state`."""
    x, dt, B, C = autocast_inputs(x, dt, B, C)
    if x.ndim == 4:
        return _chunk_scan(x, dt, A, B, C, dt_bias, state)
    if backends.wants_grad(x, dt, A, B, C, dt_bias, state):
        x, dt, B, C = (part.unsqueeze(1) for part in (x, dt, B, C))
        y, state = _chunk_scan(x, dt, A, B, C, dt_bias, state)
        return y.squeeze(1), state
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    heads, width, entries = state.shape[1], state.shape[3], state.shape[2]
    y = selective_state_update(
        state.transpose(-1, -2),
        x,
        dt.unsqueeze(-1).expand(-1, -1, width),
        A[:, None, None].expand(heads, width, entries),
        B,
        C,
        D=torch.zeros_like(dt_bias)[:, None].expand(heads, width),
        dt_bias=dt_bias[:, None].expand(heads, width),
        dt_softplus=True,
    )
    return y, state


def _chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    with torch.autocast(x.device.type, enabled=False):
        y, last = mamba_chunk_scan_combined(
            x.contiguous(),
            dt.contiguous(),
            A,
            B.contiguous(),
            C.contiguous(),
            chunk_size=CHUNK_SIZE,
            dt_bias=dt_bias,
            initial_states=state.transpose(-1, -2).to(x.dtype).contiguous(),
            dt_softplus=True,
            return_final_states=True,
        )
    return y.to(x.dtype), last.transpose(-1, -2).to(state.dtype)
