"""The chunked recurrence against the naive one and against flash-linear-attention's naive references."""

import against_float64
import pytest
import torch

from kernels.linear_recurrence import linear_recurrence, linear_recurrence_step, naive_linear_recurrence

DECAYS = ("none", "head", "key")


def draw(decay, *, length, dtype=torch.float64, bonus=False, strong=True, seed=0):
    """q, k, v, g, bonus, initial state; strong decays spread over e^+-6 with one reset."""
    b, h, k_dim, v_dim = 2, 3, 5, 4
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(b, length, h, k_dim), normal(b, length, h, k_dim), normal(b, length, h, v_dim)
    g = None
    if decay != "none":
        shape = (b, length, h) if decay == "head" else (b, length, h, k_dim)
        g = -torch.exp((3 if strong else 1) * normal(*shape))
        if strong:
            g[:, length // 2] = -torch.inf
    u, state = normal(h, k_dim) if bonus else None, normal(b, h, k_dim, v_dim)
    return [None if x is None else x.to(dtype) for x in (q, k, v, g, u, state)]


def error(ours, reference):
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 130])
def test_chunked_equals_naive(decay, bonus, length):
    q, k, v, g, u, state = draw(decay, length=length, bonus=bonus)
    o, final = linear_recurrence(q, k, v, g, bonus=u, initial_state=state, output_final_state=True, chunk_size=32)
    wanted, wanted_final = naive_linear_recurrence(q, k, v, g, bonus=u, initial_state=state)
    assert error(o, wanted) < 1e-13
    assert error(final, wanted_final) < 1e-13
    o, final = linear_recurrence(q, k, v, g, bonus=u, chunk_size=32)
    assert error(o, naive_linear_recurrence(q, k, v, g, bonus=u)[0]) < 1e-13
    assert final is None


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_equal_naive(decay, bonus):
    inputs = draw(decay, length=37, bonus=bonus, strong=False)
    weights = torch.randn(2, 37, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    gradients = []
    for run in (naive_linear_recurrence, linear_recurrence):
        leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
        q, k, v, g, u, state = leaves
        options = {"output_final_state": True, "chunk_size": 16} if run is linear_recurrence else {}
        o, final = run(q, k, v, g, bonus=u, initial_state=state, **options)
        ((o * weights[0]).sum() + (final * weights[1]).sum()).backward()
        gradients.append([x.grad for x in leaves if x is not None])
    assert len(gradients[0]) == len(gradients[1]) >= 4
    for ours, wanted in zip(gradients[1], gradients[0]):
        assert error(ours, wanted) < 1e-12


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_is_as_close_to_float64_as_the_naive_form(decay):
    exact = draw(decay, length=200)
    q, k, v, g, _, state = exact
    wanted, _ = naive_linear_recurrence(q, k, v, g, initial_state=state)
    q, k, v, g, _, state = (None if x is None else x.float() for x in exact)
    budget = error(naive_linear_recurrence(q, k, v, g, initial_state=state)[0], wanted)
    o, _ = linear_recurrence(q, k, v, g, initial_state=state)
    assert o.dtype == torch.float32
    assert error(o, wanted) < 3 * budget


def test_a_strong_then_weak_decay_loses_nothing():
    """One strong decay early in a chunk must not cost the later, weak ones their digits (sums are never subtracted)."""
    q, k, v, g, _, _ = draw("key", length=64, strong=False)
    g = torch.full_like(g, -0.01)
    g[:, 1] = -1e4
    wanted, _ = naive_linear_recurrence(q, k, v, g)
    o, _ = linear_recurrence(q.float(), k.float(), v.float(), g.float())
    assert error(o, wanted) < 2e-6


def test_finite_gradients_at_a_reset():
    q, k, v, g, _, state = (
        None if x is None else x.requires_grad_() for x in draw("key", length=40, dtype=torch.float32)
    )
    o, final = linear_recurrence(q, k, v, g, initial_state=state, output_final_state=True)
    (o.square().sum() + final.square().sum()).backward()
    for x in (q, k, v, g, state):
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("decay", DECAYS)
def test_split_anywhere_and_resume(decay):
    q, k, v, g, u, state = draw(decay, length=70, bonus=True)
    options = {"bonus": u, "output_final_state": True, "chunk_size": 16}
    whole, final = linear_recurrence(q, k, v, g, initial_state=state, **options)
    for cut in (1, 16, 33, 69):
        first, middle = linear_recurrence(
            q[:, :cut], k[:, :cut], v[:, :cut], None if g is None else g[:, :cut], initial_state=state, **options
        )
        second, last = linear_recurrence(
            q[:, cut:], k[:, cut:], v[:, cut:], None if g is None else g[:, cut:], initial_state=middle, **options
        )
        assert error(torch.cat([first, second], dim=1), whole) < 1e-13
        assert error(last, final) < 1e-13


def test_low_precision_inputs_keep_a_float32_state():
    q, k, v, g, _, _ = draw("head", length=50, dtype=torch.bfloat16, strong=False)
    o, state = linear_recurrence(q, k, v, g, output_final_state=True)
    wanted, wanted_state = naive_linear_recurrence(*(x.double() for x in (q, k, v, g)))
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert error(state, wanted_state) < 1e-5
    assert error(o, wanted) < 2**-8
    kept = torch.zeros(2, 3, 5, 4, dtype=torch.bfloat16)
    assert linear_recurrence_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], kept)[1].dtype == torch.bfloat16


class TestAgainstFlashLinearAttention:
    """The naive references of flash-linear-attention (float32, time second or third, scale inside)."""

    def test_gla(self):
        from fla.ops.gla.naive import naive_recurrent_gla

        q, k, v, g, _, state = draw("key", length=40, dtype=torch.float32, strong=False)
        wanted, wanted_state = naive_recurrent_gla(q, k, v, g, initial_state=state, output_final_state=True)
        o, final = linear_recurrence(q * 5**-0.5, k, v, g, initial_state=state, output_final_state=True)
        assert error(o, wanted) < 1e-6
        assert error(final, wanted_state) < 1e-6

    def test_simple_gla(self):
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

        q, k, v, g, _, state = draw("head", length=40, dtype=torch.float32, strong=False)
        wanted, wanted_state = naive_recurrent_simple_gla(q, k, v, g, scale=1.0, initial_state=state)
        o, final = linear_recurrence(q, k, v, g, initial_state=state, output_final_state=True)
        assert error(o, wanted) < 1e-6
        assert error(final, wanted_state) < 1e-6

    def test_rwkv6(self):
        from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

        q, k, v, g, u, state = draw("key", length=40, dtype=torch.float32, bonus=True, strong=False)
        heads_first = (x.transpose(1, 2) for x in (q, k, v, g))
        wanted, wanted_state = naive_recurrent_rwkv6(
            *heads_first, u, scale=1.0, initial_state=state, output_final_state=True
        )
        o, final = linear_recurrence(q, k, v, g, bonus=u, initial_state=state, output_final_state=True, chunk_size=16)
        assert error(o, wanted.transpose(1, 2)) < 1e-6
        assert error(final, wanted_state) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 3)}, r"q has shape \(2, 4, 3\); allowed: \[B, T, H, K\]"),
        ({"k": (2, 4, 3, 6)}, r"k has shape \(2, 4, 3, 6\); allowed: \(2, 4, 3, 5\)"),
        ({"v": (2, 5, 3, 4)}, r"v has shape \(2, 5, 3, 4\); allowed: \(2, 4, 3\) \+ \(V,\)"),
        ({"g": (2, 4, 3, 4)}, r"g has shape \(2, 4, 3, 4\); allowed: \(2, 4, 3\) or \(2, 4, 3, 5\)"),
        ({"bonus": (3, 4)}, r"bonus has shape \(3, 4\); allowed: \(3, 5\)"),
        ({"initial_state": (2, 3, 4, 5)}, r"initial_state has shape \(2, 3, 4, 5\); allowed: \(2, 3, 5, 4\)"),
        ({"chunk_size": 24}, r"chunk_size is 24; allowed: a power of two"),
    ],
)
def test_bad_arguments(change, message):
    shapes = {"q": (2, 4, 3, 5), "k": (2, 4, 3, 5), "v": (2, 4, 3, 4)} | change
    arguments = {key: torch.zeros(x) if isinstance(x, tuple) else x for key, x in shapes.items()}
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**arguments)


def test_bad_dtypes_and_a_missing_state():
    q = torch.zeros(2, 4, 3, 5)
    with pytest.raises(ValueError, match=r"k has dtype torch.float64; allowed: torch.float32, that of q"):
        linear_recurrence(q, q.double(), q)
    with pytest.raises(ValueError, match=r"g has dtype torch.int64; allowed: a floating dtype"):
        linear_recurrence(q, q, q, torch.zeros(2, 4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="state is None"):
        linear_recurrence_step(q[:, 0], q[:, 0], q[:, 0], None, None)


def close_to_float64(case, dtype, device):
    (b, t, h, k, v), resumed, by_channel = case
    generator = torch.Generator().manual_seed(t)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    g = -torch.exp(2 * (normal(b, t, h, k) if by_channel else normal(b, t, h)) - 2)
    g[:, t // 2], g[:, t // 3] = -torch.inf, 0
    inputs = {"q": normal(b, t, h, k), "k": normal(b, t, h, k), "v": normal(b, t, h, v)}
    inputs = {name: part.to(dtype) for name, part in inputs.items()} | {"g": g.float()}
    state, weights = normal(b, h, k, v).float(), (normal(b, t, h, v), normal(b, h, k, v))
    if resumed:
        inputs |= {"initial_state": state}

    def run(given, backend):
        return linear_recurrence(**given, output_final_state=True, backend=backend)

    against_float64.check(run, inputs, resumed, weights, dtype, device, case)


# B, T, H, K, V; from a state on and with a gradient through the last; with a decay per key channel
SHAPES = [
    ((2, 37, 2, 5, 3), True, False),
    ((1, 130, 1, 16, 70), False, False),
    ((1, 3, 2, 4, 6), False, False),
    ((2, 37, 2, 5, 3), True, True),
    ((1, 20, 1, 16, 70), False, True),
]


def test_kernels_interpreted(close_when_interpreted):
    close_when_interpreted("test_linear_recurrence", half=(0, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        *SHAPES,
        ((2, 256, 4, 24, 64), False, False),
        ((1, 200, 2, 128, 256), True, False),
        ((2, 256, 2, 32, 64), False, True),
        ((1, 200, 2, 128, 256), True, True),
    ],
)
def test_kernels_against_float64(case, dtype, poisoned):
    close_to_float64(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["head", "key"])
def test_registration_of_the_operator(decay):
    import kernels.linear_recurrence.triton  # noqa: F401

    q, k, v, g, _, state = draw(decay, length=20, dtype=torch.float32, strong=False)
    leaves = [part.cuda().requires_grad_() for part in (q, k, v, g, state)]
    torch.library.opcheck(torch.ops.zoology.linear_recurrence.default, leaves)


@pytest.mark.parametrize(
    ("decay", "options", "message"),
    [
        ("head", {}, "backend='triton' cannot run here: "),
        ("head", {"backend": "cuda"}, "backend is 'cuda'; allowed: auto, reference, triton"),
    ],
)
def test_what_triton_does_not_take(decay, options, message):
    q, k, v, g, _, _ = draw(decay, length=4)
    with pytest.raises(ValueError, match=message):
        linear_recurrence(q, k, v, g, **{"backend": "triton"} | options)
