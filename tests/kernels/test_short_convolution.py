"""The short convolution: the reference against conv1d, the kernels against the reference."""

import pytest
import torch
from torch.nn import functional as F

from kernels import short_convolution

# B, T, D, W, with a bias, with an initial state
CASES = [
    (2, 70, 5, 3, True, False),
    (1, 3, 70, 4, False, True),
    (2, 64, 64, 1, True, False),
    (1, 130, 20, 7, True, True),
]


def example(b, t, d, taps, bias, initial, *, dtype, device="cpu"):
    gen = torch.Generator().manual_seed(t)
    shapes = [(b, t, d), (d, taps), (d,) if bias else None, (b, taps - 1, d) if initial else None, (b, t, d)]
    return [None if s is None else torch.randn(s, generator=gen).to(device, dtype) for s in shapes]


def with_gradients(inputs, dy, backend, dtype=None):
    leaves = [None if x is None else x.to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
    x, weight, bias, state = leaves
    y = short_convolution(x, weight, bias, initial_state=state, backend=backend)
    given = [x for x in leaves if x is not None]
    return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]


def error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item() if actual.isfinite().all() else float("inf")


def check_against_float64(case, dtype, device, backend="triton"):
    """Off by at most twice what plain PyTorch is off by in the same dtype, or four roundings: sums differ in order."""
    *inputs, dy = example(*case, dtype=dtype, device=device)
    actual, rough = (with_gradients(inputs, dy, name) for name in (backend, "reference"))
    expected = with_gradients(inputs, dy, "reference", torch.float64)
    for one, other, exact in zip(actual, rough, expected, strict=True):
        assert one.dtype == dtype
        allowed = max(2 * error(other, exact), 4 * torch.finfo(dtype).eps)
        assert error(one, exact) <= allowed, (case, dtype, error(one, exact), allowed)


@pytest.mark.parametrize("case", CASES)
def test_reference_is_conv1d(case):
    x, weight, bias, state, _ = example(*case, dtype=torch.float64)
    before = torch.zeros(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=x.dtype) if state is None else state
    whole = torch.cat([before, x], 1).transpose(1, 2)
    expected = F.conv1d(whole, weight.flip(1).unsqueeze(1), bias, groups=x.shape[2]).transpose(1, 2)
    torch.testing.assert_close(short_convolution(x, weight, bias, initial_state=state), expected)


def test_gradcheck_of_the_reference():
    x, weight, bias, state, _ = example(1, 5, 2, 3, True, True, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: short_convolution(x, w, b, initial_state=s),
        [part.requires_grad_() for part in (x, weight, bias, state)],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 3)}, r"x is torch.float32 of shape \(4, 3\)"),
        ({"weight": torch.randn(4, 3)}, r"weight has shape \(4, 3\); allowed: \(3, W >= 1\)"),
        ({"bias": torch.randn(2)}, r"bias has shape \(2,\); allowed: \(3,\)"),
        ({"initial_state": torch.randn(2, 2, 3)}, r"initial_state has shape .* allowed: \(2, 1, 3\)"),
        ({"weight": torch.randn(3, 2).double()}, "weight has dtype torch.float64; allowed: torch.float32"),
        ({"backend": "cudnn"}, "backend is 'cudnn'; allowed: auto, reference, triton"),
        ({"backend": "triton"}, "backend='triton' cannot run here"),
    ],
)
def test_bad_input_is_refused_with_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        short_convolution(**({"x": torch.randn(2, 4, 3), "weight": torch.randn(3, 2)} | change))


INTERPRETED = """
import torch

import test_short_convolution as t

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
for case in t.CASES:
    t.check_against_float64(case, torch.float32, "cpu")
t.check_against_float64(t.CASES[0], torch.float16, "cpu")
print("same")
"""


def test_kernels_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_of_a_wider_tensor_are_read_where_they_are(dtype):
    x, weight, bias, _, dy = example(2, 70, 20, 3, True, False, dtype=dtype, device="cuda")
    apart = F.pad(x, (5, 12), value=float("nan"))[..., 5:-12]
    assert apart.stride() == (70 * 37, 37, 1)
    found = []
    for part in (x, apart):
        leaves = [leaf.detach().requires_grad_() for leaf in (part, weight, bias)]
        y = short_convolution(*leaves, backend="triton")
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    for one, other in zip(*found):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_kernels_against_float64(case, dtype, poisoned):
    check_against_float64(case, dtype, "cuda")


@pytest.mark.gpu
def test_registration_of_the_operator():
    import kernels.short_convolution.triton  # noqa: F401

    x, weight, bias, _, _ = example(2, 70, 20, 3, True, False, dtype=torch.float32, device="cuda")
    leaves = [part.requires_grad_() for part in (x, weight, bias)]
    torch.library.opcheck(torch.ops.zoology.short_convolution.default, leaves)
