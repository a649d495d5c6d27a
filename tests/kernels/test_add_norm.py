"""Pending additions and their norm: PyTorch's own norm of a sum that is rounded once."""

import pytest
import torch
from torch import nn

from kernels import add_norm

# (B, D, S, bias, dtype of the parts)
CASES = [
    (3, 20, 1, False, None),
    (2, 700, 4, True, torch.float32),
    (5, 33, 2, False, torch.float32),
    (1, 1, 3, True, None),
]


def example(case, dtype=torch.float64, device="cpu"):
    b, d, s, bias, parts_dtype = case
    gen = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=gen).to(device, dtype)

    return draw(b, d), draw(s, b, d, dtype=parts_dtype or dtype), draw(d), draw(d) if bias else None


def expected(x, parts, weight, bias, dtype):
    """In float64, but for the rounding of the sum to `dtype`, which the norm is meant to see."""
    total = (x.double() + parts.double().sum(0) + (0 if bias is None else bias.double())).to(dtype)
    norm = nn.RMSNorm(x.shape[1], eps=torch.finfo(torch.promote_types(dtype, torch.float32)).eps).double()
    norm.weight.data = weight.double().cpu()
    return total, norm(total.double().cpu()).detach()


def check(case, dtype, device):
    """The sum is right but for half-way cases; the norm errs at most twice as much as PyTorch does, or a rounding."""
    x, parts, weight, bias = example(case, dtype, device)
    total, y = expected(x, parts, weight, bias, dtype)
    eps = torch.finfo(dtype).eps
    found, normed = add_norm(x, parts, weight, bias=bias, backend="triton")
    _, plain = add_norm(x, parts, weight, bias=bias, backend="reference")
    assert (found.dtype, normed.dtype) == (dtype, dtype)
    assert torch.allclose(found.double(), total.double(), rtol=2 * eps, atol=8 * torch.finfo(torch.float32).eps)
    one, other = (float((value.double().cpu() - y).norm() / y.norm()) for value in (normed, plain))
    assert one <= max(2 * other, eps), (case, dtype, one, other)


@pytest.mark.parametrize("case", CASES)
def test_reference(case):
    x, parts, weight, bias = example(case)
    total, y = expected(x, parts, weight, bias, torch.float64)
    found, normed = add_norm(x, parts, weight, bias=bias)
    assert torch.allclose(found, total, rtol=1e-12, atol=1e-12)
    assert torch.allclose(normed, y, rtol=1e-12, atol=1e-12)
    wider = add_norm(x, parts, weight, bias=bias, eps=1.0)[1]
    assert torch.allclose(wider, total * (total.square().mean(1, keepdim=True) + 1).rsqrt() * weight, rtol=1e-12)


def test_the_sum_is_rounded_once():
    x, parts, bias = torch.ones(2, 3).bfloat16(), torch.full((4, 2, 3), 2.0**-9), torch.full((3,), 2.0**-9).bfloat16()
    found, _ = add_norm(x, parts, x[0], bias=bias)
    assert torch.equal(found, torch.full((2, 3), 1 + 5 * 2.0**-9).bfloat16())


INTERPRETED = """
import torch

import test_add_norm as t

for case in t.CASES:
    t.check(case, torch.float32, "cpu")
    t.check(case, torch.bfloat16, "cpu")
given = t.example(t.CASES[0], torch.float32)[:3]
try:
    t.add_norm(given[0].requires_grad_(), *given[1:], backend="triton")
except ValueError as error:
    assert "it has no gradient; allowed: no_grad" in str(error)
    print("same")
"""


def test_triton_kernel_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, (128, 1792, 4, True, torch.float32), (2, 16384, 1, False, None)])
def test_on_the_device(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 1, 4)}, r"x has shape \(2, 1, 4\)"),
        ({"parts": torch.zeros(2, 4)}, r"parts \(2, 4\); allowed: \[B, D\] and \[S, B, D\]"),
        ({"parts": torch.zeros(0, 2, 4)}, r"parts \(0, 2, 4\)"),
        ({"weight": torch.zeros(3)}, r"weight has shape \(3,\); allowed: \(4,\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); allowed: \(4,\)"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: auto, reference, triton"),
        ({"backend": "triton"}, "backend='triton' cannot run here: x is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = {"x": torch.zeros(2, 4), "parts": torch.zeros(1, 2, 4), "weight": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        add_norm(values.pop("x"), values.pop("parts"), values.pop("weight"), **values)
