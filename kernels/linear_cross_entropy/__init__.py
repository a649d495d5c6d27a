"""Mean cross-entropy of a linear head, loss and gradients at once, without all logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton_support
from kernels.linear_cross_entropy.reference import (
    linear_argmax_chunked,
    linear_cross_entropy_chunked,
    linear_cross_entropy_reference,
    softmax_gradient,
)

__all__ = ["linear_argmax", "linear_cross_entropy"]

MAX_TRITON_WIDTH = 256
BACKENDS = ("auto", "reference", "chunked", "triton")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weight_copy: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Mean over the counted rows of logsumexp(W h) - (W h)[target], for logits W h in the dtype of `hidden`.

    Args:
        hidden: [N, D], floating.
        weight: [V, D], floating; receives the gradient, summed in its own dtype, float32 at least.
        targets: [N], integers of [0, V), or `ignore_index` for rows that do not count.
        weight_copy: [V, D], the weight in the dtype of `hidden`, if there is one already: saves a cast.
        backend: "reference" (all logits, plain PyTorch), "chunked" (a few rows of logits at a time), "triton"
            (no logits in memory; D <= 256; float32 only where its products may round to TF32), or "auto": triton,
            else chunked on a GPU, else reference.

    Returns:
        The loss, [] float32 (float64 for float64 inputs). NaN when no row counts. The gradient is computed with
        the loss, so a loss that is differentiated must be differentiated once.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit.

    Source: the gradient dh = sum_v softmax(W h)_v W_v - W_target is softmax attention of h over the rows of W, so
    it is accumulated online as in FlashAttention (arXiv:2205.14135); compare Cut Cross-Entropy (arXiv:2411.09009).
    """
    _check(hidden, weight, targets)
    backend = choose_loss_backend(backend, hidden)
    copy = weight.to(hidden.dtype) if weight_copy is None else weight_copy
    if copy.shape != weight.shape or copy.dtype != hidden.dtype:
        raise ValueError(
            f"weight_copy is {copy.dtype} {tuple(copy.shape)}; allowed: {hidden.dtype} {tuple(weight.shape)}"
        )
    if backend == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_cross_entropy_reference(hidden, weight, targets, ignore_index=ignore_index)
    loss, _, _ = torch.ops.zoology.linear_cross_entropy(
        hidden, weight, copy.detach(), targets, ignore_index, backend == "triton"
    )
    return loss


def linear_argmax(hidden: Tensor, weight: Tensor, *, chunk_size: int = 4096, backend: str = "auto") -> Tensor:
    """argmax_v (W h)_v [N], int64, of hidden [N, D] and weight [V, D] of one floating dtype; the first of equal logits.

    `backend` is "chunked" (`chunk_size` rows of logits at a time), "triton" (no logits in memory; D and float32 as for
    `linear_cross_entropy`), or "auto": triton where it supports the input. Raises ValueError for what does not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)}, weight {weight.dtype} {tuple(weight.shape)}; "
            "allowed: [N, D] and [V, D] of one dtype"
        )
    refusal = triton_refusal(hidden)
    triton_support.check_backend(backend, ("auto", "chunked", "triton"), refusal)
    if backend == "triton" or (backend == "auto" and not refusal):
        from kernels.linear_cross_entropy.triton_argmax import linear_argmax_triton

        return linear_argmax_triton(hidden, weight)
    return linear_argmax_chunked(hidden, weight, chunk_size=chunk_size)


def choose_loss_backend(backend: str, hidden: Tensor) -> str:
    """The backend that runs: a named one or an error with the reason."""
    refusal = triton_refusal(hidden)
    triton_support.check_backend(backend, BACKENDS, refusal)
    if backend != "auto":
        return backend
    if hidden.device.type != "cuda":
        return "reference"
    return "chunked" if refusal else "triton"


def triton_refusal(hidden: Tensor) -> str | None:
    """Why the Triton kernels do not take this input, or None if they do."""
    if found := triton_support.refusal("hidden", hidden):
        return found
    if hidden.dtype == torch.float32 and _products_are_exact() and not triton_support.INTERPRETED:
        return "float32 products must be exact; allowed: torch.set_float32_matmul_precision('high'), or 16-bit inputs"
    if hidden.shape[1] > MAX_TRITON_WIDTH:
        return f"hidden has width {hidden.shape[1]}; allowed: up to {MAX_TRITON_WIDTH}"
    return None


def _products_are_exact() -> bool:
    """Whether float32 products must not round. The compiler cannot trace the question, but guards the answer."""
    return torch.get_float32_matmul_precision() == "highest"


# What `torch.compiler.assume_constant_result` does, which as a decorator would import the compiler and Triton here.
_products_are_exact._dynamo_marked_constant = True


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.dim() != 2 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; allowed: floating, two axes, none empty")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has width {hidden.shape[1]}; allowed: {weight.shape[1]}, that of weight")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype} {tuple(targets.shape)}; allowed: integers [{hidden.shape[0]}]")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}; allowed: {hidden.device}, the device of hidden")


# -- the operator: one node in a graph, the loss with both gradients ------------------------------------------------


@torch.library.custom_op(
    "zoology::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor copy, Tensor targets, int ignore_index, bool fused) "
    "-> (Tensor, Tensor, Tensor)",
)
def _operator(hidden, weight, copy, targets, ignore_index, fused):
    with torch.autocast(hidden.device.type, enabled=False):
        if fused:
            from kernels.linear_cross_entropy.triton import linear_cross_entropy_triton

            return linear_cross_entropy_triton(hidden, copy, targets, weight.dtype, ignore_index)
        gradient = softmax_gradient
        if (
            triton_support.INSTALLED
            and (hidden.device.type == "cuda" or triton_support.INTERPRETED)
            and hidden.dtype != torch.float64
        ):
            from kernels.linear_cross_entropy.triton import softmax_gradient_triton as gradient
        return linear_cross_entropy_chunked(
            hidden, copy, targets, weight.dtype, ignore_index=ignore_index, gradient=gradient
        )


@_operator.register_fake
def _(hidden, weight, copy, targets, ignore_index, fused):
    acc = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=acc), torch.empty_like(hidden), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    dhidden, dweight = ctx.saved_tensors
    return dhidden * grad.to(dhidden.dtype), dweight * grad.to(dweight.dtype), None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)
