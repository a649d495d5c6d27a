"""The gated norm: the reference against its formula, the kernels against float64."""

import pytest
import torch
from torch.nn import functional as F

from kernels import gated_norm

# shape, num_groups, with x and skip
CASES = [((2, 37, 256), 1, True), ((3, 70), 2, False), ((1, 5, 3, 24), 3, True), ((700, 20), 1, True)]


def example(shape, with_skip, dtype=torch.float64, device="cpu"):
    gen = torch.Generator().manual_seed(shape[-1])

    def normal(*size):
        return torch.randn(size, generator=gen).to(device, dtype)

    parts = {"y": normal(*shape), "gate": normal(*shape), "weight": normal(shape[-1])}
    return parts | ({"x": normal(*shape), "skip": normal(shape[-1])} if with_skip else {})


def formula(y, gate, weight, x=0, skip=0, *, num_groups, eps):
    """Group by group, from the definition."""
    h = (y + x * skip) * gate * torch.sigmoid(gate)
    parts = [part / (part.square().mean(-1, keepdim=True) + eps).sqrt() for part in h.chunk(num_groups, dim=-1)]
    return torch.cat(parts, dim=-1) * weight


def with_gradients(parts, dtype=None, **options):
    leaves = {name: part.to(dtype or part.dtype, copy=True).requires_grad_() for name, part in parts.items()}
    o = gated_norm(**leaves, **options)
    weights = torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view_as(o).to(o.device, o.dtype)
    return dict(zip(["o", *leaves], [o.detach(), *torch.autograd.grad((o * weights).sum(), leaves.values())]))


def error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item() if actual.isfinite().all() else float("inf")


def check_against_float64(case, dtype, device):
    """Off by at most twice what plain PyTorch is off by in the same dtype, or four roundings: sums differ in order."""
    shape, num_groups, with_skip = case
    parts = example(shape, with_skip, dtype, device)
    parts["weight"] = parts["weight"].float()  # as under autocast
    options = {"num_groups": num_groups, "eps": 1e-5}
    actual, rough = (with_gradients(parts, **options, backend=name) for name in ("triton", "reference"))
    exact = with_gradients(parts, torch.float64, **options)
    assert list(actual) == ["o", *parts]
    for name, one in actual.items():
        assert one.dtype == rough[name].dtype
        allowed = max(2 * error(rough[name], exact[name]), 4 * torch.finfo(dtype).eps)
        assert error(one, exact[name]) <= allowed, (case, name, error(one, exact[name]), allowed)


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_formula(case):
    shape, num_groups, with_skip = case
    parts = example(shape, with_skip)
    for eps in (0.0, 0.3):
        wanted = formula(**parts, num_groups=num_groups, eps=eps)
        torch.testing.assert_close(gated_norm(**parts, num_groups=num_groups, eps=eps), wanted)


def test_gradcheck_of_the_reference():
    parts = example((3, 4), True)
    leaves = [part.requires_grad_() for part in parts.values()]
    assert torch.autograd.gradcheck(
        lambda *given: gated_norm(**dict(zip(parts, given)), num_groups=2, backend="reference"), leaves
    )


def test_the_result_has_the_dtype_of_y():
    parts = example((3, 8), True, torch.float32)
    wanted = gated_norm(**parts)
    assert gated_norm(**parts | {"y": parts["y"].bfloat16()}).dtype == torch.bfloat16
    mixed = gated_norm(**parts | {"gate": parts["gate"].bfloat16()})
    assert mixed.dtype == torch.float32
    assert error(mixed, wanted) < 2**-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(0, 6)}, r"y has shape \(0, 6\); allowed: \[..., D\]"),
        ({"gate": torch.ones(2, 3)}, r"gate has shape \(2, 3\); allowed: \(2, 6\)"),
        ({"weight": torch.ones(2, 6)}, r"weight has shape \(2, 6\); allowed: \(6,\)"),
        ({"weight": torch.ones(6).int()}, "weight has dtype torch.int32; allowed: a floating dtype"),
        ({"gate": torch.ones(2, 6, device="meta")}, "gate is on meta; allowed: cpu, the device of y"),
        ({"x": torch.ones(2, 6)}, "skip is None; allowed: x and skip together"),
        ({"skip": torch.ones(6)}, "x is None; allowed: x and skip together"),
        ({"num_groups": 4}, "num_groups=4 does not divide the width of y, 6"),
        ({"eps": -1.0}, r"eps=-1.0 is not a finite number >= 0"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: auto, reference, triton"),
        ({"backend": "triton"}, "backend='triton' cannot run here"),
    ],
)
def test_bad_input_is_refused_with_the_rule(change, message):
    given = {"y": torch.ones(2, 6), "gate": torch.ones(2, 6), "weight": torch.ones(6)}
    with pytest.raises(ValueError, match=message):
        gated_norm(**given | change)


INTERPRETED = """
from importlib import import_module

import torch

import test_gated_norm as t

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
for case in t.CASES[:3]:
    t.check_against_float64(case, torch.float32, "cpu")
import_module("kernels.gated_norm.triton").PROGRAMS = 2  # so that each has several tiles of rows
t.check_against_float64(t.CASES[3], torch.float16, "cpu")
print("same")
"""


def test_kernels_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_of_wider_tensors_are_read_where_they_are(dtype):
    parts = example((2, 70, 64), True, dtype, "cuda")
    apart = dict(parts)
    for name, after in (("y", 0), ("gate", 12), ("x", 72)):
        apart[name] = F.pad(parts[name], (8, after), value=float("nan"))[..., 8 : 8 + 64]
        assert apart[name].stride(1) == 72 + after
    found = []
    for given in (parts, apart):
        leaves = {name: part.detach().requires_grad_() for name, part in given.items()}
        o = gated_norm(**leaves, backend="triton")
        found.append([o, *torch.autograd.grad(o.sum(), leaves.values())])
    for one, other in zip(*found):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, ((8, 256, 512), 1, True), ((64, 256, 128), 1, True)])
def test_kernels_against_float64(case, dtype, poisoned):
    check_against_float64(case, dtype, "cuda")


@pytest.mark.gpu
def test_registration_of_the_operator():
    import kernels.gated_norm.triton  # noqa: F401

    parts = example((2, 37, 24), True, torch.float32, "cuda")
    leaves = [parts[name].requires_grad_() for name in ("y", "gate", "weight", "x", "skip")]
    torch.library.opcheck(torch.ops.zoology.gated_norm.default, (*leaves, 2, 1e-5))
    torch.library.opcheck(torch.ops.zoology.gated_norm.default, (*leaves[:3], None, None, 1, 1e-5))
