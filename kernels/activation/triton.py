"""Activations of a channel mixer in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fetch_ahead import PROGRAMS, divided, fetch_ahead, fetched

BLOCK = 1024
WARPS = 4


@triton.jit
def _activation_kernel(
    x_ptr,
    ahead_ptr,
    y_ptr,
    B,
    N,
    ahead_size,
    ahead_bytes,
    BLOCKS,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
):
    """y = silu(a) * b, or gelu(x), for BN of the N outputs of one row; programs beyond the rows only ask."""
    i = tl.program_id(0)
    if AHEAD:
        fetch_ahead(ahead_ptr, ahead_size, ahead_bytes, i, THREADS)
    i_b = (i // BLOCKS).to(tl.int64)
    o_n = (i % BLOCKS) * BN + tl.arange(0, BN)
    m_n = (o_n < N) & (i_b < B)
    if GATED:
        b_a = tl.load(x_ptr + i_b * 2 * N + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_y = tl.load(x_ptr + i_b * 2 * N + N + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_y = b_a * tl.sigmoid(b_a) * b_y
    else:
        b_y = tl.load(x_ptr + i_b * N + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_y = 0.5 * b_y * (1.0 + tl.erf(b_y * 0.7071067811865476))
    tl.store(y_ptr + i_b * N + o_n, b_y.to(y_ptr.dtype.element_ty), mask=m_n)


@torch.library.custom_op("zoology::activation", mutates_args=(), schema="(Tensor x, str kind, Tensor? ahead) -> Tensor")
def activation_op(x, kind, ahead):
    x, gated, size = x.contiguous(), kind == "swiglu", fetched(ahead)
    b, n = x.shape[0], x.shape[1] // (2 if gated else 1)
    blocks = triton.cdiv(n, BLOCK)
    programs = max(b * blocks, PROGRAMS) if size else b * blocks
    y = torch.empty(b, n, device=x.device, dtype=x.dtype)
    _activation_kernel[(programs,)](
        x,
        ahead if size else x,
        y,
        b,
        n,
        size,
        divided(size, programs, 32 * WARPS),
        blocks,
        BN=BLOCK,
        GATED=gated,
        AHEAD=size > 0,
        THREADS=32 * WARPS,
        num_warps=WARPS,
    )
    return y


@activation_op.register_fake
def _(x, kind, ahead):
    return x.new_empty(x.shape[0], x.shape[1] // (2 if kind == "swiglu" else 1))


def activation_triton(x: Tensor, kind: str, ahead: Tensor | None) -> Tensor:
    return torch.ops.zoology.activation(x, kind, ahead)
