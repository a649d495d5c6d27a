"""Attention over a cache: the slots in use and no others, the same in every division of the cache."""

import pytest
import torch
from torch.nn import functional as F

from kernels import cached_attention, taylor_linear_attention_step
from kernels.cached_attention import triton_refusal
from kernels.taylor_linear_attention import TaylorState

# (B, S, H, K, position)
CASES = [
    (2, 300, 3, 10, 299),
    (2, 300, 3, 10, 0),
    (1, 70, 2, 24, 40),
    (1, 16, 2, 16, 500),
    (1, 1100, 1, 8, 1030),
]


def example(case, dtype=torch.float64, device="cpu", seed=0):
    b, s, h, k, position = case
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(b, h, k, generator=gen).to(device, dtype)
    keys, values = (torch.randn(b, s, h, k, generator=gen).to(device, dtype) for _ in "kv")
    # What was never written must not be read.
    keys[:, position + 1 :], values[:, position + 1 :] = torch.nan, torch.nan
    return q, keys, values, torch.tensor(position, device=device)


def expected(q, keys, values, position):
    """By PyTorch's own attention, in float64, over a cache cut to what is in use."""
    used = min(int(position) + 1, keys.shape[1])
    q, keys, values = q.double()[:, None], keys.double()[:, :used], values.double()[:, :used]
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)))[:, :, 0]


def error(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


def check(case, dtype, device):
    """At most twice the error of plain PyTorch in the same precision, and never less than one rounding."""
    inputs = example(case, dtype, device)
    exact = expected(*inputs)
    o = cached_attention(*inputs, backend="triton")
    assert o.dtype == dtype
    plain = error(cached_attention(*inputs, backend="reference"), exact)
    assert error(o, exact) <= max(2 * plain, torch.finfo(dtype).eps), (case, dtype, error(o, exact), plain)


def check_inplace_step(device, state_dtype, b=2, h=3, f=5, v_dim=20):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, h, n, generator=gen).to(device) for n in (f, f, v_dim))
    state = TaylorState.zeros(b, h, f, v_dim, device=device, dtype=state_dtype)
    state = TaylorState(torch.randn(state.kv.shape, generator=gen).to(state.kv), state.key_sum + 50)
    kept = TaylorState(*(x.clone() for x in state))
    o, new = taylor_linear_attention_step(q, k, v, state, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(state, kept))
    # Parts of one projection: rows that lie apart.
    q, k, v = torch.cat([x.flatten(1) for x in (q, k, v)], 1).split([h * f, h * f, h * v_dim], 1)
    q, k, v = (x.unflatten(1, (h, -1)) for x in (q, k, v))
    written, same = taylor_linear_attention_step(q, k, v, state, backend="triton", inplace=True)
    assert same is state
    assert torch.equal(written, o)
    assert all(torch.equal(one, other) for one, other in zip(state, new))


@pytest.mark.parametrize("case", CASES)
def test_reference(case):
    inputs = example(case)
    assert error(cached_attention(*inputs), expected(*inputs)) < 1e-12
    half = [x.bfloat16() for x in inputs[:3]]
    assert error(cached_attention(*half, inputs[3]), expected(*half, inputs[3])) < 4e-3


def test_scale():
    q, keys, values, position = example(CASES[2])
    doubled = cached_attention(2 * q, keys, values, position)
    assert torch.allclose(cached_attention(q, keys, values, position, scale=2 * 24**-0.5), doubled, rtol=1e-12)


def test_the_reference_has_gradients():
    q, keys, values, position = example((1, 6, 2, 4, 3))
    inputs = [x.nan_to_num().requires_grad_() for x in (q, keys, values)]
    assert torch.autograd.gradcheck(lambda *x: cached_attention(*x, position), inputs)


INTERPRETED = """
import torch

import test_cached_attention as t
from kernels.cached_attention import triton as impl

torch.set_num_threads(1)
divided = []
choose = impl.choose_splits
impl.choose_splits = lambda *sizes: divided.append(choose(*sizes)) or divided[-1]
for case in t.CASES:
    t.check(case, torch.float32, "cpu")
t.check(t.CASES[2], torch.bfloat16, "cpu")
assert min(divided) == 1 and max(divided) == 4, divided
for dtype in (torch.float32, torch.bfloat16):
    t.check_inplace_step("cpu", dtype)
print("same")
"""


def test_triton_kernels_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, (4, 3000, 24, 70, 2500), (64, 128, 16, 112, 77), (1, 4096, 2, 256, 4095)])
def test_on_the_device(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_inplace_step_on_the_device(state_dtype):
    check_inplace_step("cuda", state_dtype, b=9, h=16, f=16, v_dim=112)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q has shape \(2, 3\)"),
        ({"keys": torch.zeros(2, 9, 3, 5)}, r"keys has shape \(2, 9, 3, 5\); allowed: \(2, S, 3, 4\)"),
        ({"values": torch.zeros(2, 8, 3, 4)}, r"values has shape \(2, 8, 3, 4\); allowed: \(2, 9, 3, 4\)"),
        ({"values": torch.zeros(2, 9, 3, 4).bfloat16()}, "values is torch.bfloat16 on cpu; allowed: torch.float32"),
        ({"position": torch.zeros(1, dtype=torch.int64)}, r"position has shape \(1,\)"),
        ({"position": torch.zeros(())}, "allowed: an integer tensor without axes"),
        ({"backend": "flash"}, "backend is 'flash'; allowed: auto, reference, triton"),
        ({"backend": "triton"}, "backend='triton' cannot run here: q is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = {"q": torch.zeros(2, 3, 4), "keys": torch.zeros(2, 9, 3, 4), "values": torch.zeros(2, 9, 3, 4)}
    values |= {"position": torch.tensor(3)} | change
    with pytest.raises(ValueError, match=message):
        cached_attention(values.pop("q"), values.pop("keys"), values.pop("values"), values.pop("position"), **values)


def test_why_the_kernel_does_not_run():
    q = torch.zeros(1, 2, 300, device="meta")
    assert "q is on meta" in triton_refusal(q, q)
