"""Activations of a channel mixer: PyTorch's own, in float64."""

import pytest
import torch
from torch.nn import functional as F

from kernels import activation

CASES = [(3, 20, "swiglu"), (2, 2500, "gelu"), (1, 2, "swiglu"), (2, 2400, "swiglu")]


def example(case, dtype=torch.float64, device="cpu"):
    b, n, _ = case
    return (3 * torch.randn(b, n, generator=torch.Generator().manual_seed(0))).to(device, dtype)


def expected(x, kind):
    gate, value = x.double().tensor_split(2, dim=1)
    return F.gelu(x.double()) if kind == "gelu" else gate / (1 + (-gate).exp()) * value


def check(case, dtype, device):
    """At most twice the error of plain PyTorch in the same precision, and never less than one rounding."""
    x, kind = example(case, dtype, device), case[2]
    exact = expected(x, kind)
    actual = activation(x, kind, backend="triton")
    assert actual.dtype == dtype
    plain = activation(x, kind, backend="reference")
    found, allowed = (float((one.double() - exact).norm() / exact.norm()) for one in (actual, plain))
    assert found <= max(2 * allowed, torch.finfo(dtype).eps), (case, dtype, found, allowed)


@pytest.mark.parametrize("case", CASES)
def test_reference(case):
    x = example(case)
    assert torch.allclose(activation(x, case[2]), expected(x, case[2]), rtol=1e-12, atol=1e-12)


INTERPRETED = """
import torch

import test_activation as t

for case in t.CASES:
    t.check(case, torch.float32, "cpu")
    t.check(case, torch.bfloat16, "cpu")
print("same")
"""


def test_triton_kernel_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, (128, 7168, "swiglu")])
def test_on_the_device(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 128])
def test_what_is_asked_for_stays_as_it_is(rows):
    x = example((rows, 3000, "swiglu"), torch.bfloat16, "cuda")
    ahead = torch.randn(3_000_000, device="cuda", dtype=torch.bfloat16)
    kept = ahead.clone()
    plain, found = (activation(x, "swiglu", ahead=one, backend="triton") for one in (None, ahead))
    assert torch.equal(found, plain)
    assert torch.equal(ahead, kept)


@pytest.mark.parametrize(
    ("x", "kind", "backend", "message"),
    [
        (torch.zeros(2, 3), "swiglu", "auto", r"x has shape \(2, 3\); allowed: \[B, N\], N even"),
        (torch.zeros(2, 1, 4), "gelu", "auto", r"x has shape \(2, 1, 4\)"),
        (torch.zeros(2, 4), "relu", "auto", "kind is 'relu'; allowed: swiglu, gelu"),
        (torch.zeros(2, 4), "gelu", "cuda", "backend is 'cuda'; allowed: auto, reference, triton"),
        (torch.zeros(2, 4), "gelu", "triton", "backend='triton' cannot run here: x is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(x, kind, backend, message):
    with pytest.raises(ValueError, match=message):
        activation(x, kind, backend=backend)
