"""Bias and activation between the layers of a channel mixer: PyTorch's own activations of a float64 sum."""

import pytest
import torch
from torch.nn import functional as F

from kernels import biased_activation

# (S, B, N, activation)
CASES = [(1, 3, 20, "swiglu"), (2, 2, 2100, "swiglu"), (1, 5, 33, "gelu"), (4, 1, 1030, "gelu"), (1, 1, 2, "swiglu")]


def example(case, dtype=torch.float64, device="cpu"):
    s, b, n, _ = case
    gen = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=gen).to(device, dtype) for shape in ((s, b, n), (n,)))


def expected(parts, bias, activation):
    hidden = (parts.double().sum(0) + bias.double()).cpu()
    if activation == "gelu":
        return F.gelu(hidden)
    half = hidden.shape[1] // 2
    return F.silu(hidden[:, :half]) * hidden[:, half:]


def check(case, dtype, device):
    """Rounded once from float32: what is left is a rounding of the result, and those of exponentials."""
    parts, bias = example(case, dtype, device)
    y = expected(parts, bias, case[3])
    found = biased_activation(parts, bias, activation=case[3], backend="triton")
    assert (found.dtype, found.shape) == (dtype, y.shape)
    small = 32 * torch.finfo(torch.float32).eps
    assert torch.allclose(found.double().cpu(), y, rtol=torch.finfo(dtype).eps + small, atol=small)


@pytest.mark.parametrize("case", CASES)
def test_reference(case):
    parts, bias = example(case)
    y = biased_activation(parts, bias, activation=case[3])
    assert torch.allclose(y, expected(parts, bias, case[3]), rtol=1e-12, atol=1e-12)


def test_rounded_once():
    parts, bias = torch.ones(1, 2, 2).bfloat16(), torch.full((2,), 2.0**-9).bfloat16()
    whole = torch.full((2, 1), 1 + 2.0**-9, dtype=torch.float64)
    y = biased_activation(parts, bias, activation="swiglu")
    assert torch.equal(y, (F.silu(whole) * whole).bfloat16())
    assert not torch.equal(y, (F.silu(whole.bfloat16()) * whole.bfloat16()))


INTERPRETED = """
import torch

import test_biased_activation as t

for case in t.CASES:
    t.check(case, torch.float32, "cpu")
    t.check(case, torch.bfloat16, "cpu")
parts, bias = t.example(t.CASES[0], torch.float32)
try:
    t.biased_activation(parts.requires_grad_(), bias, activation="swiglu", backend="triton")
except ValueError as error:
    assert "it has no gradient; allowed: no_grad" in str(error)
    print("same")
"""


def test_triton_kernel_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, (1, 128, 7168, "swiglu"), (2, 128, 6720, "gelu")])
def test_on_the_device(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation is 'relu'; allowed: gelu, swiglu"),
        ({"parts": torch.zeros(2, 4)}, r"parts have shape \(2, 4\) and bias \(4,\); allowed: \[S, B, N\] and \[N\]"),
        ({"parts": torch.zeros(0, 2, 4)}, r"parts have shape \(0, 2, 4\)"),
        ({"bias": torch.zeros(3)}, r"bias \(3,\)"),
        ({"parts": torch.zeros(1, 2, 3), "bias": torch.zeros(3)}, "there are 3 columns; allowed for 'swiglu': an even"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: auto, reference, triton"),
        ({"backend": "triton"}, "backend='triton' cannot run here: parts is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = {"parts": torch.zeros(1, 2, 4), "bias": torch.zeros(4), "activation": "swiglu"} | change
    with pytest.raises(ValueError, match=message):
        biased_activation(values.pop("parts"), values.pop("bias"), **values)
