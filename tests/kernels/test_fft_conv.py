"""Long convolution by FFT and by Toeplitz matrices against the direct sum, and that against one written by hand."""

import pytest
import torch
from torch.nn import functional as F

from kernels.fft_conv import fft_conv, fft_conv_step, naive_conv
from kernels.fft_conv.reference import fast_length
from kernels.fft_conv.toeplitz import toeplitz_matrix


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def test_by_hand():
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    taps = torch.tensor([[10.0], [1.0]])
    assert naive_conv(x, taps).flatten().tolist() == [10.0, 21.0, 32.0]
    assert naive_conv(x, taps, torch.tensor([[[7.0], [5.0]]])).flatten().tolist() == [15.0, 21.0, 32.0]


def test_direct_sum_is_conv1d():
    x, taps = randn(2, 9, 3), randn(4, 3, seed=1)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), taps.flip(0).T.unsqueeze(1), groups=3).mT
    assert error(naive_conv(x, taps), expected) < 1e-14


@pytest.mark.parametrize("length", [1, 2, 31, 64, 100])
@pytest.mark.parametrize("num_taps", [1, 3, 64, 300])
def test_fft_is_the_direct_sum(length, num_taps):
    x, taps = randn(2, length, 3), randn(num_taps, 3, seed=1)
    assert error(fft_conv(x, taps), naive_conv(x, taps)) < 1e-13
    for past in (0, 1, num_taps - 1, 50):
        history = randn(2, past, 3, seed=2)
        expected = naive_conv(x, taps, history)
        assert error(fft_conv(x, taps, history=history), expected) < 1e-13
        last = torch.cat([history, x[:, :-1]], 1)
        assert error(fft_conv_step(x[:, -1], taps, history=last), expected[:, -1]) < 1e-13


@pytest.mark.parametrize("length", [1, 2, 31, 64, 100])
@pytest.mark.parametrize("num_taps", [1, 3, 64, 300])
def test_toeplitz_products_are_the_direct_sum(length, num_taps):
    x, taps = randn(2, length, 3), randn(num_taps, 3, seed=1)
    assert error(fft_conv(x, taps, backend="toeplitz"), naive_conv(x, taps)) < 1e-14


def test_toeplitz_matrix_by_hand():
    taps = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    first = [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [0.0, 0.0, 1.0]]
    assert toeplitz_matrix(taps, 3).tolist() == [first, [[10 * entry for entry in row] for row in first]]


def test_toeplitz_products_are_causal_to_the_last_bit():
    x, taps = randn(2, 40, 3).float(), randn(40, 3, seed=1).float()
    changed = torch.cat([x[:, :25], x[:, 25:] * 1e6], 1)
    one, other = (fft_conv(tokens, taps, backend="toeplitz")[:, :25] for tokens in (x, changed))
    assert torch.equal(one, other)


@pytest.mark.parametrize("shared", [(3, 1, 1), (1, 2, 1), (1, 1, 1), (3, 1, 2)])
def test_toeplitz_taps_shared_by_several_channels(shared):
    x, taps = randn(2, 20, 3, 2, 2), randn(20, *shared, seed=1)
    expected = naive_conv(x.flatten(2), taps.expand(-1, 3, 2, 2).flatten(1)).unflatten(2, (3, 2, 2))
    assert error(fft_conv(x, taps, backend="toeplitz"), expected) < 1e-14


def test_taps_shared_by_several_channels():
    x, taps = randn(2, 20, 3, 2, 2), randn(20, 3, 1, 1, seed=1)
    expected = naive_conv(x.flatten(2), taps.expand(-1, -1, 2, 2).flatten(1)).unflatten(2, (3, 2, 2))
    assert error(fft_conv(x, taps), expected) < 1e-13
    assert error(fft_conv_step(x[:, -1], taps, history=x[:, :-1]), expected[:, -1]) < 1e-13


def test_gradients_are_those_of_the_direct_sum():
    gradients = []
    for form in (naive_conv, lambda x, taps, history: fft_conv(x, taps, history=history)):
        leaves = [t.requires_grad_() for t in (randn(2, 11, 3), randn(7, 3, seed=1), randn(2, 6, 3, seed=2))]
        gradients.append(torch.autograd.grad(form(*leaves).square().sum(), leaves))
    assert max(error(two, one) for one, two in zip(*gradients)) < 1e-12


@pytest.mark.parametrize("num_taps", [4, 11, 30])
def test_toeplitz_gradients_are_those_of_the_direct_sum(num_taps):
    gradients = []
    for form in (naive_conv, lambda x, taps: fft_conv(x, taps, backend="toeplitz")):
        leaves = [t.requires_grad_() for t in (randn(2, 11, 3), randn(num_taps, 3, seed=1))]
        gradients.append(torch.autograd.grad(form(*leaves).square().sum(), leaves))
    assert max(error(two, one) for one, two in zip(*gradients)) < 1e-13


def test_the_operator_is_registered_whole():
    a, b = randn(2, 3, 4).requires_grad_(), randn(2, 4, 5, seed=1).requires_grad_()
    torch.library.opcheck(torch.ops.zoology.batched_product, (a, b))


@pytest.mark.parametrize("shared", [(3, 2), (3, 1)])
def test_toeplitz_products_are_traced_whole(shared):
    leaves = [t.requires_grad_() for t in (randn(2, 11, 3, 2), randn(7, *shared, seed=1))]

    def loss(x, taps):
        return fft_conv(x, taps, backend="toeplitz").square().sum()

    plain = torch.autograd.grad(loss(*leaves), leaves)
    traced = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert max(error(two, one) for one, two in zip(plain, traced)) < 1e-14


def test_toeplitz_products_follow_autocast():
    x, taps = randn(2, 64, 3).float(), randn(64, 3, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fft_conv(x, taps, backend="toeplitz")
    rounded = fft_conv(x.bfloat16().double(), taps.bfloat16().double(), backend="toeplitz")
    assert y.dtype == torch.float32
    assert error(y.double(), rounded) < 2**-8
    assert error(y.double(), naive_conv(x.double(), taps.double())) > 1e-4  # it did round


def test_low_precision_is_computed_in_float32():
    x, taps = randn(2, 200, 3).bfloat16(), randn(200, 3, seed=1).bfloat16()
    exact = naive_conv(x.double(), taps.double())
    for backend in ("reference", "toeplitz"):
        y = fft_conv(x, taps, backend=backend)
        assert y.dtype == torch.bfloat16
        assert error(y.double(), exact) < 2**-8
    assert error(fft_conv(x.float(), taps.float()).double(), exact) < 2e-6


@pytest.mark.parametrize(("least", "expected"), [(1, 2), (7, 8), (11, 12), (511, 512), (513, 540), (1201, 1250)])
def test_fast_lengths(least, expected):
    assert fast_length(least) == expected


@pytest.mark.parametrize(
    ("x", "taps", "history", "message"),
    [
        ((2, 5), (4,), None, r"x has shape \(2, 5\)"),
        ((2, 0, 3), (4, 3), None, "x has shape"),
        ((2, 5, 3), (4, 2), None, r"taps has shape \(4, 2\); allowed: \(L,\) \+ \(3,\)"),
        ((2, 5, 3), (0, 3), None, "taps has shape"),
        ((2, 5, 3), (4, 3), (1, 6, 3), r"history has shape \(1, 6, 3\)"),
        ((2, 5, 3), (4, 3), (2, 6, 2), "history has shape"),
    ],
)
def test_wrong_shapes_are_refused(x, taps, history, message):
    with pytest.raises(ValueError, match=message):
        fft_conv(torch.zeros(x), torch.zeros(taps), history=None if history is None else torch.zeros(history))


def test_wrong_dtype_and_device_are_refused():
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"taps has dtype torch.complex64"):
        fft_conv(x, torch.zeros(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="taps is on meta"):
        fft_conv_step(x[:, 0], torch.zeros(4, 3, device="meta"), history=x)


def test_backends_that_do_not_fit_are_refused():
    x, taps = torch.zeros(2, 5, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match="backend is 'fft'; allowed: auto, reference, toeplitz"):
        fft_conv(x, taps, backend="fft")
    with pytest.raises(ValueError, match="backend='toeplitz' cannot run here: there is a history"):
        fft_conv(x, taps, history=x, backend="toeplitz")


# Factors are rounded to 24 bits (of which sums lose two), 11 or 8: float32, TF32, bfloat16.
@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 65, 256, 512, 600])
@pytest.mark.parametrize(("precision", "bits"), [("fp32", 22), ("tf32", 11), ("bf16", 8)])
def test_on_the_device(precision, bits, length):
    leaves = [randn(8, length, 16), randn(length, 16, seed=1) / length**0.5]
    grad = randn(8, length, 16, seed=2)

    def all_three(*tensors):
        tensors = [tensor.clone().requires_grad_() for tensor in tensors]
        y = fft_conv(*tensors)
        return (y, *torch.autograd.grad(y, tensors, grad.to(y)))

    expected = all_three(*leaves)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            actual = all_three(*(leaf.float().cuda() for leaf in leaves))
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other in zip(actual, expected):
        assert one.dtype == torch.float32
        difference = (one.cpu().double() - other).norm() / other.norm()
        assert difference < 2.0 ** (2 - bits)
