"""Taylor linear attention and its prefix form: the reference against the formula, the kernels against the reference."""

import importlib
import subprocess
import sys

import pytest
import torch

from kernels import prefix_linear_attention, taylor_linear_attention, taylor_linear_attention_step, triton_support
from kernels.prefix_linear_attention.reference import (
    prefix_linear_attention_quadratic,
    prefix_linear_attention_reference,
)
from kernels.taylor_linear_attention import TaylorState, num_taylor_features
from kernels.taylor_linear_attention.reference import (
    naive_taylor_linear_attention,
    taylor_features,
    taylor_linear_attention_reference,
    taylor_state_reference,
)

# B, T, H, f, V, with an initial and a final state, length of the prefix (0: none)
CASES = [
    (1, 1, 3, 16, 64, True, True, 0),
    (2, 2, 3, 16, 64, False, False, 0),
    (1, 63, 3, 16, 64, False, True, 0),
    (2, 64, 3, 16, 64, False, False, 0),
    (1, 65, 3, 8, 64, True, True, 0),
    (1, 127, 3, 16, 20, True, False, 0),
    (1, 1000, 3, 16, 64, True, True, 0),
    (1, 1024, 3, 16, 64, True, True, 0),
    (1, 200, 1, 24, 80, True, False, 0),
    (1, 130, 2, 32, 64, True, True, 0),
    (1, 127, 3, 16, 256, False, False, 0),
    (1, 100, 2, 5, 7, True, True, 0),
    (2, 100, 3, 16, 64, False, True, 77),
    (2, 320, 3, 16, 64, True, False, 333),
    (1, 70, 3, 16, 64, False, False, 600),
]


def error(actual, expected):
    """Relative distance, infinite for anything not finite."""
    actual, expected = actual.double(), expected.double()
    if not actual.isfinite().all():
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def example(b, t, h, f, v_dim, initial, final, prefix, *, dtype, device, std=1.0, state_dtype=torch.float32):
    """Inputs, and a gradient for each output."""
    gen = torch.Generator().manual_seed(t + 7 * f + v_dim)

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=gen) * scale).to(device, dtype)

    inputs = [draw(b, t, h, f, scale=std), draw(b, t, h, f, scale=std), draw(b, t, h, v_dim)]
    state = None
    if initial:
        kv, key_sum = taylor_state_reference(
            draw(b, h, 9, f, dtype=torch.float32), draw(b, h, 9, v_dim, dtype=torch.float32), scale=f**-0.5
        )
        state = TaylorState(kv.to(state_dtype), key_sum.to(state_dtype))
    extra = [draw(b, prefix, h, f, scale=std), draw(b, prefix, h, v_dim)] if prefix else []
    mask = (torch.rand(b, prefix, generator=gen) < 0.7).to(device) if prefix else None
    num = num_taylor_features(f)
    grads = [draw(b, t, h, v_dim)]
    if final:
        grads += [draw(b, h, num, v_dim, dtype=torch.float32), draw(b, h, num, dtype=torch.float32)]
    return inputs, state, extra, mask, grads


def with_gradients(function, inputs, state, extra, mask, grads, final, dtype=None):
    """Outputs of `function`, then the gradients of every input; all inputs in `dtype` if it is given."""

    def leaf(x):
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()

    inputs, extra = [leaf(x) for x in inputs], [leaf(x) for x in extra]
    state = None if state is None else TaylorState(*(leaf(x) for x in state))
    o, end = function(*inputs, *extra, mask, initial_state=state, output_final_state=final)
    outputs = [o, *(end if final else ())]
    loss = sum((x.double() * g.double()).sum() for x, g in zip(outputs, grads))
    leaves = [*inputs, *(state or ()), *extra]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(loss, leaves))


def call(backend):
    def function(q, k, v, *rest, **options):
        *extra, mask = rest
        if extra:
            return prefix_linear_attention(q, k, v, *extra, prefix_mask=mask, backend=backend, **options)
        return taylor_linear_attention(q, k, v, backend=backend, **options)

    return function


def plain(q, k, v, *rest, initial_state, output_final_state):
    """The same computation in the dtype of its inputs: weights inside the sequence, features for the states."""
    *extra, mask = rest
    scale, dtype = q.shape[-1] ** -0.5, q.dtype
    q, k, v, *extra = (x.transpose(1, 2) for x in (q, k, v, *extra))
    s = (q @ k.transpose(-1, -2)) * scale
    weights = (1 + s * (1 + 0.5 * s)).tril()
    state = None if initial_state is None else TaylorState(*(x.to(dtype) for x in initial_state))
    if extra:
        state = taylor_state_reference(*extra, scale=scale, mask=mask, initial_state=state)
    numerator, denominator = weights @ v, weights.sum(-1, keepdim=True)
    if state is not None:
        phi = taylor_features(q, scale)
        numerator, denominator = numerator + phi @ state.kv, denominator + phi @ state.key_sum.unsqueeze(-1)
    end = taylor_state_reference(k, v, scale=scale, initial_state=state) if output_final_state else None
    return (numerator / denominator).transpose(1, 2), end


def check_against_float64(case, dtype, device, *, backend="triton", std=1.0, slack=2.0, floor=0.0):
    """Each output and gradient is off by at most `slack` times what plain PyTorch is off by in the same dtype."""
    final = case[6]
    data = example(*case, dtype=dtype, device=device, std=std)
    expected = with_gradients(call("reference"), *data, final, torch.float64)
    actual = with_gradients(call(backend), *data, final)
    budget = with_gradients(plain, *data, final)
    for i, (one, other, rough) in enumerate(zip(actual, expected, budget, strict=True)):
        allowed = max(slack * error(rough, other), floor)
        assert error(one, other) <= allowed, (case, dtype, i, error(one, other), allowed)


# ---------------------------------------------------------------- the reference
@pytest.mark.parametrize("f", [1, 2, 3, 5, 8, 16])
def test_features_give_the_second_order_expansion(f):
    q, k = torch.randn(2, 10, f, dtype=torch.float64)
    phi_q, phi_k = taylor_features(q, 0.3), taylor_features(k, 0.3)
    s = 0.3 * (q * k).sum(-1)
    assert phi_q.shape[-1] == num_taylor_features(f) == 1 + f + f * (f + 1) // 2
    torch.testing.assert_close((phi_q * phi_k).sum(-1), 1 + s + s**2 / 2, rtol=1e-12, atol=1e-12)


def test_order_of_the_packed_features():
    x = torch.tensor([2.0, 3.0, 5.0, 7.0])
    pairs = [4 * 0.5**0.5, 9 * 0.5**0.5, 25 * 0.5**0.5, 49 * 0.5**0.5, 6, 15, 35, 14, 10, 21]
    torch.testing.assert_close(taylor_features(x, 1.0), torch.tensor([1, 2, 3, 5, 7, *pairs]))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
def test_chunked_recurrent_and_quadratic_forms_agree(length):
    q, k = torch.randn(2, 2, length, 3, 5, dtype=torch.float64)
    v = torch.randn(2, length, 3, 4, dtype=torch.float64)
    o, state = taylor_linear_attention_reference(q, k, v, scale=0.4, output_final_state=True, chunk_size=16)
    naive_o, naive_state = naive_taylor_linear_attention(q, k, v, scale=0.4)
    s = 0.4 * torch.einsum("bthf,bshf->bhts", q, k)
    weights = (1 + s + s**2 / 2).tril()
    quadratic = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(o, quadratic, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(naive_o, quadratic, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(naive_state), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", [1, 30, 64, 99])
def test_split_and_resume(split):
    q, k = torch.randn(2, 2, 100, 2, 4, dtype=torch.float64)
    v = torch.randn(2, 100, 2, 3, dtype=torch.float64)
    o, state = taylor_linear_attention(q, k, v, output_final_state=True)
    first, middle = taylor_linear_attention(q[:, :split], k[:, :split], v[:, :split], output_final_state=True)
    second, end = taylor_linear_attention(
        q[:, split:], k[:, split:], v[:, split:], initial_state=middle, output_final_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], 1), o, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tuple(end), tuple(state), rtol=1e-10, atol=1e-10)


def test_gradcheck_of_the_reference():
    q, k = torch.randn(2, 1, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        state = taylor_state_reference(torch.randn(1, 2, 4, 3).double(), torch.randn(1, 2, 4, 2).double(), scale=0.5)
    kv, key_sum = (x.requires_grad_() for x in state)

    def function(q, k, v, kv, key_sum):
        o, end = taylor_linear_attention_reference(
            q, k, v, scale=0.5, initial_state=TaylorState(kv, key_sum), output_final_state=True, chunk_size=2
        )
        return o, *end

    assert torch.autograd.gradcheck(
        function, (q.detach().requires_grad_(), k.detach().requires_grad_(), v, kv, key_sum)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_scores_and_the_smallest_normaliser(dtype):
    """|s| of 100 and more; and s = -1, where 1 + s + s^2 / 2 is at its least, 1 / 2."""
    case = (1, 70, 1, 16, 8, False, False, 0)
    (q, k, v), *_ = example(*case, dtype=dtype, device="cpu", std=6.0)
    assert (q[0, :, 0].double() @ k[0, :, 0].double().T).abs().max() / 4 > 100
    expected, _ = taylor_linear_attention(q.double(), k.double(), v.double())
    o, _ = taylor_linear_attention(q, k, v, backend="reference")
    assert error(o, expected) < 2 * torch.finfo(dtype).eps
    q = torch.zeros(1, 4, 1, 4, dtype=torch.float64)
    q[..., 0] = 1
    v = torch.randn(1, 4, 1, 2, dtype=torch.float64)
    o, end = taylor_linear_attention(q, -q, v, scale=1.0, output_final_state=True)
    torch.testing.assert_close(o[:, -1, 0], v.mean(1)[:, 0])
    phi = taylor_features(q[:, 0, 0], 1.0)
    torch.testing.assert_close((phi * end.key_sum[:, 0]).sum(-1), torch.tensor([2.0], dtype=torch.float64))


def test_dtypes_of_the_states():
    q, k, v = torch.randn(3, 1, 6, 2, 4)
    for given, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64)):
        state = None if given is None else TaylorState.zeros(1, 2, 4, 4, dtype=given)
        o, end = taylor_linear_attention(q, k, v, initial_state=state, output_final_state=True)
        assert (o.dtype, end.kv.dtype, end.key_sum.dtype) == (torch.float32, expected, expected)
        o, end = taylor_linear_attention_step(q[:, 0], k[:, 0], v[:, 0], end)
        assert (o.dtype, end.kv.dtype) == (torch.float32, expected)
    assert taylor_linear_attention(q, k, v)[1] is None


def test_step_reads_before_it_rounds_the_state():
    q, k = torch.randn(2, 2, 3, 4)
    v = torch.randn(2, 3, 5)
    state = TaylorState(
        *(x.bfloat16() for x in taylor_state_reference(torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 5), scale=0.5))
    )
    o, new = taylor_linear_attention_step(q, k, v, state)
    exact, wide = taylor_linear_attention_step(q, k, v, TaylorState(*(x.float() for x in state)))
    torch.testing.assert_close(o, exact, rtol=0, atol=0)
    torch.testing.assert_close(new.kv, wide.kv.bfloat16(), rtol=0, atol=0)


# ---------------------------------------------------------------- the prefix
def dense_prefix(q, k, v, prefix_k, prefix_v, mask):
    def weigh(a, b):
        s = a.shape[-1] ** -0.5 * torch.einsum("bthf,bshf->bhts", a, b)
        return 1 + s + s**2 / 2

    weights = torch.cat([weigh(q, prefix_k) * mask[:, None, None], weigh(q, k).tril()], -1)
    return torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), torch.cat([prefix_v, v], 1))


@pytest.mark.parametrize("form", ["features", "quadratic"])
def test_prefix_against_the_formula_with_gradients(form):
    q, k, pk = (torch.randn(2, n, 3, 4, dtype=torch.float64, requires_grad=True) for n in (20, 20, 6))
    v, pv = (torch.randn(2, n, 3, 5, dtype=torch.float64, requires_grad=True) for n in (20, 6))
    mask = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    if form == "features":
        actual, _ = prefix_linear_attention_reference(q, k, v, pk, pv, prefix_mask=mask, scale=0.5)
    else:
        actual, _ = prefix_linear_attention(q, k, v, pk, pv, prefix_mask=mask)
    expected = dense_prefix(q, k, v, pk, pv, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(actual)
    one = torch.autograd.grad((actual * weight).sum(), (q, k, v, pk, pv))
    other = torch.autograd.grad((expected * weight).sum(), (q, k, v, pk, pv))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_masked_prefix_tokens_leave_no_trace_in_explicit_weights():
    q, k, v = torch.randn(3, 2, 10, 2, 4)
    pk, pv = torch.randn(2, 2, 6, 2, 4)
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    holes = ~mask[..., None, None].expand_as(pk)
    torn = prefix_linear_attention_quadratic(
        q, k, v, pk.masked_fill(holes, torch.nan), pv.masked_fill(holes, torch.nan), prefix_mask=mask, scale=0.5
    )
    short, _ = prefix_linear_attention_reference(
        q[:1], k[:1], v[:1], pk[:1, :4], pv[:1, :4], prefix_mask=None, scale=0.5
    )
    torch.testing.assert_close(torn[:1], short)
    torch.testing.assert_close(torn[1:], taylor_linear_attention(q[1:], k[1:], v[1:], scale=0.5)[0])


def test_masked_prefix_tokens_leave_no_trace():
    """What stands at a masked position may be anything; a prefix without tokens is no prefix."""
    q, k, v = torch.randn(3, 2, 10, 2, 4)
    pk, pv = torch.randn(2, 2, 6, 2, 4).requires_grad_()
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    o, end = prefix_linear_attention(q, k, v, pk, pv, prefix_mask=mask, output_final_state=True)
    holes = ~mask[..., None, None].expand_as(pk)
    torn = prefix_linear_attention(
        q,
        k,
        v,
        pk.masked_fill(holes, torch.nan),
        pv.masked_fill(holes, torch.nan),
        prefix_mask=mask,
        output_final_state=True,
    )
    torch.testing.assert_close(torn[0], o, rtol=0, atol=0)
    alone, alone_end = taylor_linear_attention(q[1:], k[1:], v[1:], output_final_state=True)
    torch.testing.assert_close(o[1:], alone)
    torch.testing.assert_close(end.kv[1:], alone_end.kv)
    (gradient,) = torch.autograd.grad(o.sum(), pk)
    assert (gradient[holes] == 0).all()


# ---------------------------------------------------------------- bad input
def bad(**changes):
    given = {"q": torch.randn(2, 6, 3, 4), "k": torch.randn(2, 6, 3, 4), "v": torch.randn(2, 6, 3, 5)}
    return {**given, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(q=torch.randn(2, 6, 4)), r"q has shape \(2, 6, 4\)"),
        (bad(k=torch.randn(2, 5, 3, 4)), r"k has shape .* allowed: \(2, 6, 3, 4\)"),
        (bad(v=torch.randn(2, 6, 2, 5)), "v has shape"),
        (bad(v=torch.randn(2, 6, 3, 5, dtype=torch.float64)), "v has dtype torch.float64; allowed: torch.float32"),
        (bad(q=torch.ones(2, 6, 3, 4, dtype=torch.int64)), "q has dtype torch.int64"),
        (bad(k=torch.randn(2, 6, 3, 4, device="meta")), "k is on meta; allowed: cpu"),
        ({name: x[:, :0] for name, x in bad().items()}, "every axis at least 1"),
        (bad(scale=-1.0), "scale is -1.0; allowed: a positive"),
        (bad(backend="cuda"), "backend is 'cuda'; allowed: auto, reference, triton"),
        (bad(backend="triton"), "backend='triton' cannot run here"),
        (bad(initial_state=TaylorState.zeros(2, 3, 5, 5)), r"initial_state.kv has shape .* allowed: \(2, 3, 15, 5\)"),
        (bad(initial_state=torch.zeros(2, 3, 15, 5)), "initial_state is a Tensor; allowed: a TaylorState"),
    ],
)
def test_bad_input_is_refused_with_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        taylor_linear_attention(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix_k": torch.randn(2, 4, 3, 5)}, r"prefix_k has shape .* allowed: \(2, M >= 1, 3, 4\)"),
        ({"prefix_v": torch.randn(2, 3, 3, 5)}, "prefix_v has 3 tokens; allowed: 4"),
        ({"prefix_mask": torch.ones(2, 4)}, "prefix_mask is torch.float32"),
        ({"prefix_mask": torch.ones(2, 3, dtype=torch.bool)}, r"allowed: bool \(2, 4\)|allowed: bool of \(2, 4\)"),
    ],
)
def test_bad_prefix_is_refused_with_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        prefix_linear_attention(**bad(prefix_k=torch.randn(2, 4, 3, 4), prefix_v=torch.randn(2, 4, 3, 5)) | arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_features_are_taken_up_to_the_largest(monkeypatch, dtype):
    implementation = importlib.import_module("kernels.taylor_linear_attention")
    monkeypatch.setattr(triton_support, "INSTALLED", True)
    monkeypatch.setattr(triton_support, "INTERPRETED", True)
    assert implementation.triton_refusal(torch.zeros(1, 4, 1, 32, dtype=dtype)) is None
    assert implementation.triton_refusal(torch.zeros(1, 1, 32, dtype=dtype)) is None
    assert "is 33; allowed: up to 32" in implementation.triton_refusal(torch.zeros(1, 4, 1, 33, dtype=dtype))


def test_step_refuses_what_does_not_fit():
    q, v = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="state is None"):
        taylor_linear_attention_step(q, q, v, None)
    with pytest.raises(ValueError, match=r"state.kv has shape"):
        taylor_linear_attention_step(q, q, v, TaylorState.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="no gradient for a decode step"):
        taylor_linear_attention_step(q.requires_grad_(), q, v, TaylorState.zeros(2, 3, 4, 5), backend="triton")


def test_autocast_casts_the_inputs_and_not_the_sums():
    q, k, v = torch.randn(3, 1, 40, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, end = taylor_linear_attention(q, k, v, output_final_state=True)
    expected, expected_end = taylor_linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), output_final_state=True)
    assert (o.dtype, end.kv.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o, expected, rtol=0, atol=0)
    torch.testing.assert_close(end.kv, expected_end.kv, rtol=0, atol=0)


def test_traced_without_a_break():
    q, k, v = torch.randn(3, 1, 20, 2, 4)
    state = TaylorState.zeros(1, 2, 4, 4)

    def function(q, k, v, state):
        o, end = taylor_linear_attention(q, k, v, initial_state=state, output_final_state=True)
        prefix, _ = prefix_linear_attention(q, k, v, k, v)
        step, _ = taylor_linear_attention_step(q[:, 0], k[:, 0], v[:, 0], end)
        return o + prefix, step

    traced = torch.compile(function, fullgraph=True, backend="eager")(q, k, v, state)
    torch.testing.assert_close(traced, function(q, k, v, state))


def test_importing_the_operations_does_not_import_triton():
    code = "import sys, kernels; assert 'kernels.taylor_linear_attention.triton' not in sys.modules; print('light')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "light", done.stderr


@pytest.mark.parametrize(("setting", "expected"), [("highest", "tf32x3"), ("high", "tf32")])
def test_products_in_fp32_follow_the_setting_of_pytorch(setting, expected):
    pytest.importorskip("triton")
    from kernels.taylor_linear_attention.triton import choose_tile

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        tiles = [choose_tile(16, 64, dtype)[0] for dtype in (torch.float32, torch.float16)]
        assert [tile.PREC for tile in tiles] == [expected, "tf32"]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("f", [1, 5, 8, 12, 16, 24, 32])
def test_tiles_hold_every_feature(f):
    pytest.importorskip("triton")
    from kernels.taylor_linear_attention.triton import choose_tile

    for v_dim in (1, 20, 64, 100, 256):
        for backward in (False, True):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                tile, _ = choose_tile(f, v_dim, dtype, backward=backward)
                assert f <= tile.FP
                assert num_taylor_features(f) <= tile.rows == tile.PARTS * tile.NB * tile.BF


# ---------------------------------------------------------------- the kernels, interpreted
INTERPRETED = """
import torch

import test_taylor_linear_attention as t
from kernels.taylor_linear_attention import triton as impl

torch.set_num_threads(1)
# Memory nobody wrote is NaN from here on.
torch.use_deterministic_algorithms(True)
impl.num_slots = lambda device: 8
impl.MIN_CHUNKS_PER_GROUP = 1
for case in t.INTERPRETED_CASES:
    t.check_against_float64(case, torch.float32, "cpu", floor=1e-6)
t.check_against_float64(t.INTERPRETED_WIDE, torch.float16, "cpu")
t.check_step("cpu", 3, 5, 20)
for reverse in (False, True):
    t.check_scan(7, 6, reverse)
    t.check_scan(1, 5, reverse)

# Factors picked by products, as for bf16, which the interpreter cannot multiply.
choose_tile = impl.choose_tile


def with_products(*shape, **options):
    tile, launch = choose_tile(*shape, **options)
    return tile._replace(GATHER=False), launch


impl.choose_tile = with_products
for case in (t.INTERPRETED_CASES[0], t.INTERPRETED_CASES[1], t.INTERPRETED_WIDE):
    t.check_against_float64(case, torch.float16, "cpu")
print("same")
"""
INTERPRETED_CASES = [
    (1, 70, 1, 16, 20, True, True, 0),
    (1, 64, 1, 8, 16, False, False, 0),
    (1, 33, 2, 5, 70, True, True, 40),
    (1, 20, 1, 5, 16, False, True, 30),
]
INTERPRETED_WIDE = (1, 20, 1, 24, 16, True, True, 0)


def check_step(device, h, f, v_dim, *, batch=2, dtype=torch.float32, state_dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, h, n, generator=gen).to(device, dtype) for n in (f, f, v_dim))
    keys, values = (torch.randn(batch, h, 20, n, generator=gen).to(device) for n in (f, v_dim))
    state = TaylorState(*(x.to(state_dtype) for x in taylor_state_reference(keys, values, scale=f**-0.5)))
    wide = TaylorState(*(x.double() for x in state))
    expected, new = taylor_linear_attention_step(q.double(), k.double(), v.double(), wide, backend="reference")
    o, end = taylor_linear_attention_step(q, k, v, state, backend="triton")
    assert (o.dtype, end.kv.dtype, end.key_sum.dtype) == (dtype, state_dtype, state_dtype)
    assert error(o, expected) < 2 * torch.finfo(dtype).eps
    for one, other in zip(end, new):
        assert error(one, other) < torch.finfo(state_dtype).eps


def check_scan(groups, prefix_groups, reverse, device="cpu"):
    """Before each group: what the prefix adds up to and the groups before (REVERSE: behind) it."""
    from kernels.taylor_linear_attention import triton as impl

    tile, _ = impl.choose_tile(5, 7, torch.float32)
    gen = torch.Generator().manual_seed(0)
    sums, before = (
        impl.Starts(*(torch.randn(2, n, tile.rows, *v_dim, generator=gen).to(device) for v_dim in ((7,), ())))
        for n in (groups, prefix_groups)
    )
    expected = []
    for x, y in zip(sums, before):
        ordered = x.flip(1) if reverse else x
        starts = y.sum(1, keepdim=True) + ordered.cumsum(1) - ordered
        expected.append(starts.flip(1) if reverse else starts)
    impl.scan(sums, before, None, 0.4, tile, reverse=reverse)
    torch.testing.assert_close(tuple(sums), tuple(expected), rtol=1e-5, atol=1e-5)


def test_triton_kernels_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


# ---------------------------------------------------------------- the kernels on the device
GPU_DTYPES = [(torch.bfloat16, c) for c in CASES]
GPU_DTYPES += [(torch.float16, c) for c in CASES]
GPU_DTYPES += [(torch.float32, c) for c in CASES]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "case"), GPU_DTYPES, ids=str)
def test_kernels_against_float64(dtype, case, poisoned):
    check_against_float64(case, dtype, "cuda", floor=1e-6)


@pytest.mark.gpu
def test_fp32_as_tf32_where_pytorch_allows_it(poisoned):
    data = example(2, 200, 2, 16, 64, True, True, 0, dtype=torch.float32, device="cuda")
    expected = with_gradients(call("reference"), *data, True, torch.float64)
    torch.set_float32_matmul_precision("high")
    try:
        actual = with_gradients(call("triton"), *data, True)
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(actual, expected):
        assert error(one, other) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_with_large_scores(dtype, poisoned):
    check_against_float64((1, 300, 2, 16, 64, False, False, 0), dtype, "cuda", std=6.0, floor=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(2, 1000, 2, 16, 64, True, True, 0), (2, 333, 2, 16, 80, True, True, 100)])
def test_kernels_give_the_same_bits_every_time(case):
    data = example(*case, dtype=torch.bfloat16, device="cuda")
    first = with_gradients(call("triton"), *data, True)
    for _ in range(3):
        for one, other in zip(with_gradients(call("triton"), *data, True), first):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_groups_of_chunks_give_the_result_of_one(monkeypatch):
    from kernels.taylor_linear_attention import triton as impl

    case = (1, 4000, 1, 16, 64, True, True, 0)
    data = example(*case, dtype=torch.bfloat16, device="cuda")
    many = with_gradients(call("triton"), *data, True)
    monkeypatch.setattr(impl, "num_slots", lambda device: 1)
    one = with_gradients(call("triton"), *data, True)
    for a, b in zip(many, one):
        assert error(a, b) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 5, 300])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2]
)
@pytest.mark.parametrize(("f", "v_dim"), [(16, 64), (8, 20), (24, 128), (32, 256)])
def test_step_on_the_device(batch, dtype, state_dtype, f, v_dim, poisoned):
    check_step("cuda", 3, f, v_dim, batch=batch, dtype=dtype, state_dtype=state_dtype)


@pytest.mark.gpu
def test_registration_of_the_operators():
    import kernels.taylor_linear_attention.triton  # noqa: F401

    (q, k, v), state, extra, mask, _ = example(1, 70, 2, 16, 64, True, True, 30, dtype=torch.bfloat16, device="cuda")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    ops = torch.ops.zoology
    extra = [x.requires_grad_() for x in extra]
    nothing = (None,) * 3
    for given in ((*nothing, *state), (*nothing, None, None), (*extra, mask, *state), (*extra, None, None, None)):
        for final in (True, False):
            arguments = (q, k, v, *given, 0.25, final)
            torch.library.opcheck(ops.taylor_linear_attention.default, arguments, test_utils=checks)
    step = (q[:, 0].detach(), k[:, 0].detach(), v[:, 0].detach(), *state, 0.25)
    torch.library.opcheck(ops.taylor_linear_attention_step.default, step, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", [0, 50])
def test_compiled_whole_and_autocast(prefix):
    (q, k, v), _, extra, mask, (weight,) = example(
        2, 128, 2, 16, 64, False, False, prefix, dtype=torch.float32, device="cuda"
    )

    def loss(q, k, v):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            o, _ = call("auto")(q, k, v, *extra, mask, initial_state=None, output_final_state=False)
        assert o.dtype == torch.bfloat16
        return (o.float() * weight).sum()

    leaves = [x.requires_grad_() for x in (q, k, v)]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for one, other in zip(compiled, eager):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    (q, k, v), _, _, _, (weight,) = example(2, 128, 2, 16, 64, False, False, 0, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        o, _ = taylor_linear_attention(*leaves, backend="triton")
        return o, *torch.autograd.grad((o * weight).sum(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for one, other in zip(outputs, step()):
        assert torch.equal(one, other)
