"""The decode step of a short convolution in Triton: one kernel, the memory shifted in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 512, 4


@triton.jit
def _step_kernel(
    x_ptr,
    tail_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    x_bias_ptr,
    gate_bias_ptr,
    y_ptr,
    x_stride,
    gate_stride,
    D,
    W: tl.constexpr,
    BD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """y = act(sum_j w_j x_{t-j} + b) * gate, x and gate with their biases, for BD channels of one sequence.

    What is written was read before.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    p_tail = tail_ptr + i_b * (W - 1) * D + o_d
    b_x = tl.load(x_ptr + i_b * x_stride + o_d, mask=m_d, other=0.0)
    if HAS_X_BIAS:
        b_x = (b_x.to(tl.float32) + tl.load(x_bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)).to(b_x.dtype)
    b_y = b_x.to(tl.float32) * tl.load(weight_ptr + o_d * W, mask=m_d, other=0.0).to(tl.float32)
    for i in tl.static_range(0, W - 1):
        b_t = tl.load(p_tail + i * D, mask=m_d, other=0.0)
        b_y += b_t.to(tl.float32) * tl.load(weight_ptr + o_d * W + (W - 1 - i), mask=m_d, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(p_tail + (i - 1) * D, b_t, mask=m_d)
    if W > 1:
        tl.store(p_tail + (W - 2) * D, b_x, mask=m_d)
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    if SILU:
        b_y = b_y * tl.sigmoid(b_y)
    if HAS_GATE:
        b_g = tl.load(gate_ptr + i_b * gate_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        if HAS_GATE_BIAS:
            b_g += tl.load(gate_bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y *= b_g
    tl.store(y_ptr + i_b * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


@torch.library.custom_op(
    "zoology::convolution_step_",
    mutates_args=("tail",),
    schema="(Tensor x, Tensor(a!) tail, Tensor weight, Tensor? bias, str? activation, Tensor? gate,"
    " Tensor? x_bias, Tensor? gate_bias) -> Tensor",
)
def step_op(x, tail, weight, bias, activation, gate, x_bias, gate_bias):
    # Halves of one projection come as they are: rows may lie apart, entries of a row may not.
    x = x if x.stride(1) == 1 else x.contiguous()
    gate = gate if gate is None or gate.stride(1) == 1 else gate.contiguous()
    (b, d), weight = x.shape, weight.contiguous()
    y = torch.empty(b, d, device=x.device, dtype=x.dtype)
    _step_kernel[(triton.cdiv(d, BLOCK), b)](
        x,
        tail,
        weight,
        x if bias is None else bias,
        x if gate is None else gate,
        x if x_bias is None else x_bias,
        x if gate_bias is None else gate_bias,
        y,
        x.stride(0),
        0 if gate is None else gate.stride(0),
        d,
        W=weight.shape[1],
        BD=BLOCK,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_X_BIAS=x_bias is not None,
        HAS_GATE_BIAS=gate_bias is not None,
        SILU=activation == "silu",
        num_warps=WARPS,
    )
    return y


@step_op.register_fake
def _(x, tail, weight, bias, activation, gate, x_bias, gate_bias):
    return x.new_empty(x.shape)


def convolution_step_triton(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    x_bias: Tensor | None,
    gate_bias: Tensor | None,
) -> Tensor:
    return torch.ops.zoology.convolution_step_(x, tail, weight, bias, activation, gate, x_bias, gate_bias)
