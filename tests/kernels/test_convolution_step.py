"""The step of a short convolution: PyTorch's own convolution of the last tokens, and the tail one token later."""

import pytest
import torch
from torch.nn import functional as F

from kernels import convolution_step

# (B, D, W, bias, activation, gate; "biased": x and gate with the biases of the layer that they come from)
CASES = [
    (3, 20, 3, True, "silu", True),
    (2, 700, 4, False, None, True),
    (2, 9, 2, True, None, False),
    (11, 300, 3, True, "silu", True),
    (1, 5, 1, False, "silu", False),
    (3, 600, 3, True, "silu", "biased"),
]


def example(case, dtype=torch.float64, device="cpu"):
    b, d, w, bias, activation, gate = case
    gen = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=gen).to(device, dtype)

    # Halves of one projection: rows that lie apart.
    x, gate_values = draw(b, 2 * d).chunk(2, dim=-1)
    rest = {"bias": draw(d) if bias else None, "activation": activation, "gate": gate_values if gate else None}
    if gate == "biased":
        rest |= {"x_bias": draw(d), "gate_bias": draw(d)}
    return x, draw(b, w - 1, d), draw(d, w), rest


def expected(x, tail, weight, rest):
    """In float64, but for the rounding of x with its bias, which is what is remembered."""
    x = x if rest.get("x_bias") is None else (x.double() + rest["x_bias"].double()).to(x.dtype)
    window = torch.cat([tail, x.unsqueeze(1)], 1).double()
    bias = None if rest["bias"] is None else rest["bias"].double()
    y = F.conv1d(window.transpose(1, 2), weight.double().flip(-1).unsqueeze(1), bias, groups=x.shape[1]).squeeze(2)
    y = F.silu(y) if rest["activation"] else y
    if rest["gate"] is not None:
        y = y * (rest["gate"].double() + rest.get("gate_bias", torch.zeros(())).double())
    return y, window[:, 1:]


def check(case, dtype, device):
    """At most twice the error of plain PyTorch in the same precision, and never less than one rounding."""
    x, tail, weight, rest = example(case, dtype, device)
    y, after = expected(x, tail, weight, rest)
    plain, _ = convolution_step(x, tail, weight, backend="reference", **rest)
    actual, same = convolution_step(x, tail, weight, backend="triton", **rest)
    assert same is tail
    assert actual.dtype == dtype
    found, allowed = (float((one.double() - y).norm() / y.norm()) for one in (actual, plain))
    assert found <= max(2 * allowed, torch.finfo(dtype).eps), (case, dtype, found, allowed)
    assert torch.equal(tail.double(), after)


@pytest.mark.parametrize("case", CASES)
def test_reference(case):
    x, tail, weight, rest = example(case)
    before = tail.clone()
    y, after = convolution_step(x, tail, weight, **rest)
    for one, exact in zip((y, after), expected(x, tail, weight, rest)):
        assert torch.allclose(one, exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(tail, before)


INTERPRETED = """
import torch

import test_convolution_step as t

for case in t.CASES:
    t.check(case, torch.float32, "cpu")
t.check(t.CASES[0], torch.bfloat16, "cpu")
print("same")
"""


def test_triton_kernel_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, (128, 3584, 3, True, "silu", "biased")])
def test_on_the_device(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 1, 4)}, r"x has shape \(2, 1, 4\)"),
        ({"tail": torch.zeros(2, 3, 4)}, r"tail \(2, 3, 4\) and weight \(4, 3\); allowed: \[B, D\]"),
        ({"gate": torch.zeros(2, 5)}, r"gate has shape \(2, 5\); allowed: \(2, 4\)"),
        ({"x_bias": torch.zeros(3)}, r"x_bias has shape \(3,\); allowed: \(4,\)"),
        ({"gate_bias": torch.zeros(4)}, r"gate_bias has shape \(4,\); allowed: None without a gate"),
        ({"activation": "gelu"}, "activation is 'gelu'; allowed: None, 'silu'"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: auto, reference, triton"),
        ({"backend": "triton"}, "backend='triton' cannot run here: x is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = {"x": torch.zeros(2, 4), "tail": torch.zeros(2, 2, 4), "weight": torch.zeros(4, 3)} | change
    with pytest.raises(ValueError, match=message):
        convolution_step(values.pop("x"), values.pop("tail"), values.pop("weight"), **values)
