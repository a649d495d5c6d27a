"""Linear cross-entropy: every backend has the loss and gradients of plain PyTorch, whatever the shape."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from kernels import triton_support
from kernels.linear_cross_entropy import linear_argmax, linear_cross_entropy
from kernels.linear_cross_entropy.reference import linear_cross_entropy_chunked

implementation = importlib.import_module("kernels.linear_cross_entropy")

# N, D, V: blocks of 64 and 128 that fit, that do not, and one row.
SHAPES = [(1, 16, 33), (70, 24, 150), (129, 48, 300), (64, 64, 256)]


def example(n, d, v, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale).to(dtype)
    weight = (torch.randn(v, d, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    targets[1::3] = -100
    return hidden, weight, targets


def gradients(loss, *inputs):
    return (loss, *torch.autograd.grad(loss * 3, inputs))


def expected(hidden, weight, targets):
    """The textbook computation in float64."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    return gradients(F.cross_entropy(h @ w.T, targets), h, w)


def error(actual, wanted):
    """Relative distance."""
    actual, wanted = actual.detach().double(), wanted.detach()
    return float((actual - wanted).norm() / wanted.norm().clamp_min(1e-300))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_loss_and_gradients_are_plain_cross_entropy(backend, shape):
    hidden, weight, targets = example(*shape)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    actual = gradients(linear_cross_entropy(h, w, targets, backend=backend), h, w)
    for one, other in zip(actual, expected(hidden, weight, targets)):
        assert one.dtype == torch.float64
        assert error(one, other) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunks_do_not_matter(chunk_size):
    hidden, weight, targets = example(70, 24, 150)
    loss, dh, dw = linear_cross_entropy_chunked(
        hidden, weight, targets, torch.float64, ignore_index=-100, chunk_size=chunk_size
    )
    for one, other in zip((loss, dh * 3, dw * 3), expected(hidden, weight, targets)):
        assert error(one, other) < 1e-12


def test_a_row_that_does_not_count_changes_nothing():
    hidden, weight, targets = example(12, 8, 20)
    counted = targets != -100
    both = linear_cross_entropy(hidden, weight, targets, backend="chunked")
    alone = linear_cross_entropy(hidden[counted], weight, targets[counted], backend="chunked")
    assert torch.allclose(both, alone, rtol=1e-14)


def test_sixteen_bit_logits_with_a_float32_gradient_for_the_master_weight():
    hidden, weight, targets = example(128, 32, 200, torch.float32, scale=0.3)
    h, w = hidden.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(h, w, targets, weight_copy=weight.bfloat16(), backend="chunked")
    loss, dh, dw = gradients(loss, h, w)
    assert (loss.dtype, dh.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    wanted = expected(hidden.bfloat16(), weight.bfloat16(), targets)
    for one, other in zip((loss, dh, dw), wanted):
        assert error(one, other) < 1e-2


def test_large_logits_do_not_overflow():
    hidden, weight, targets = example(16, 16, 40, torch.float32, scale=200.0)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    actual = gradients(linear_cross_entropy(h, w, targets, backend="chunked"), h, w)
    textbook = gradients(F.cross_entropy(h @ w.T, targets), h, w)
    for one, plain, other in zip(actual, textbook, expected(hidden, weight, targets)):
        assert error(one, other) < 2 * error(plain, other) + 1e-6


def test_argmax_is_argmax():
    hidden, weight, _ = example(50, 8, 30)
    assert torch.equal(linear_argmax(hidden, weight, chunk_size=7), (hidden @ weight.T).argmax(-1))


def check_argmax(actual, hidden, weight, rounding):
    """The index of a logit that exact arithmetic finds no smaller than the largest, but for rounding."""
    logits = hidden.double() @ weight.double().T
    sizes = hidden.double().abs() @ weight.double().abs().T
    assert actual.dtype == torch.int64
    picked = logits.gather(1, actual[:, None])[:, 0]
    slack = rounding * sizes.gather(1, torch.stack([actual, logits.argmax(1)], 1)).sum(1)
    assert (picked >= logits.max(1).values - slack).all()


def tied(n, d, v):
    """Logits that are small whole numbers, so that many are equal and none is rounded."""
    generator = torch.Generator().manual_seed(v)
    return [torch.randint(-1, 2, size, generator=generator).float() for size in ((n, d), (v, d))]


def test_an_argmax_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"hidden is torch.float32 \(4, 8\), weight torch.float64 \(9, 8\)"):
        linear_argmax(torch.zeros(4, 8), torch.zeros(9, 8).double())
    with pytest.raises(ValueError, match="backend is 'reference'; allowed: auto, chunked, triton"):
        linear_argmax(torch.zeros(4, 8), torch.zeros(9, 8), backend="reference")
    with pytest.raises(ValueError, match="backend='triton' cannot run here"):
        linear_argmax(torch.zeros(4, 8).double(), torch.zeros(9, 8).double(), backend="triton")


def test_the_choice_of_a_backend_can_be_traced(monkeypatch):
    """On a GPU it asks for the precision of float32 products, which torch.compile cannot trace by itself."""
    monkeypatch.setattr(triton_support, "INTERPRETED", True)
    hidden, weight, targets = example(12, 8, 20, torch.float32)
    traced = torch.compile(
        lambda h: implementation.linear_cross_entropy(h, weight, targets, backend="reference"),
        fullgraph=True,
        backend="eager",
    )
    assert torch.equal(traced(hidden), linear_cross_entropy(hidden, weight, targets, backend="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 3)}, "hidden has width 3; allowed: 8"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"targets are torch.int64 \(5,\); allowed: integers \[4\]"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: auto, reference, chunked, triton"),
        ({"weight_copy": torch.zeros(9, 8).bfloat16()}, "weight_copy is torch.bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(9, 8), "targets": torch.zeros(4, dtype=torch.long)}
    values |= change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(values.pop("hidden"), values.pop("weight"), values.pop("targets"), **values)


INTERPRETED = """
import torch
import test_linear_cross_entropy as t
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_cross_entropy import triton as impl
for shape in t.SHAPES:
    hidden, weight, targets = t.example(*shape, torch.float32)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    for backend in ("triton", "chunked"):
        actual = t.gradients(linear_cross_entropy(h, w, targets, backend=backend), h, w)
        for one, other in zip(actual, t.expected(hidden, weight, targets)):
            assert t.error(one, other) < 1e-5, (shape, backend, t.error(one, other))
# Vocabulary and rows cut in parts.
impl.num_multiprocessors = lambda device: 16
hidden, weight, targets = t.example(70, 16, 300, torch.float32)
loss, dh, dw = impl.linear_cross_entropy_triton(
    hidden, weight, targets, torch.float32, -100, (impl.Launch(32, 32, 4, 2), impl.Launch(64, 32, 4, 2))
)
for one, other in zip((loss, dh * 3, dw * 3), t.expected(hidden, weight, targets)):
    assert t.error(one, other) < 1e-5
# float32 through float16, whose mantissa is TF32's: an error of 2^-11 in each factor.
torch.set_float32_matmul_precision("high")
hidden, weight, targets = t.example(70, 24, 150, torch.float32)
h, w = hidden.requires_grad_(), weight.requires_grad_()
actual = t.gradients(linear_cross_entropy(h, w, targets, backend="triton"), h, w)
assert all(x.dtype == torch.float32 for x in actual)
errors = [t.error(one, other) for one, other in zip(actual, t.expected(hidden, weight, targets))]
assert 1e-5 < max(errors) < 2**-10, errors
# The largest logit.
from kernels.linear_cross_entropy.triton_argmax import linear_argmax_triton
for shape in t.SHAPES:
    hidden, weight, _ = t.example(*shape, torch.float32)
    t.check_argmax(t.linear_argmax(hidden, weight, backend="triton"), hidden, weight, 2**-10)
    hidden, weight = t.tied(*shape)
    assert torch.equal(linear_argmax_triton(hidden, weight, impl.Launch(32, 32, 4, 2)), (hidden @ weight.T).argmax(-1))
lost = torch.full((3, 16), float("nan"))
assert (linear_argmax_triton(lost, torch.ones(40, 16)) < 40).all()
print("same")
"""


def test_triton_kernels_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 128, 8192), (16384, 128, 8192), (300, 256, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logit_on_the_device(dtype, shape):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        hidden, weight, _ = (x.cuda() for x in example(*shape, dtype))
        check_argmax(linear_argmax(hidden, weight, backend="triton"), hidden, weight, 2**-10)
        hidden, weight = (x.cuda() for x in tied(*shape))
        actual = linear_argmax(hidden.to(dtype), weight.to(dtype), backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual, (hidden.double() @ weight.double().T).argmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 128, 8192), (5000, 128, 8192), (300, 256, 1000)])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_float32_products_that_may_round_on_the_device(backend, shape):
    hidden, weight, targets = (x.cuda() for x in example(*shape, torch.float32, scale=0.1))
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        actual = gradients(linear_cross_entropy(h, w, targets, backend=backend), h, w)
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other in zip(actual, expected(hidden, weight, targets)):
        assert error(one, other) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 128, 8192), (5000, 128, 8192), (300, 256, 1000)])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_on_the_device(backend, shape):
    hidden, weight, targets = (x.cuda() for x in example(*shape, torch.float32, scale=0.1))
    h, w = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    actual = gradients(linear_cross_entropy(h, w, targets, backend=backend), h, w)
    for one, other in zip(actual, expected(hidden.bfloat16(), weight.bfloat16(), targets)):
        assert error(one, other) < 1e-2
