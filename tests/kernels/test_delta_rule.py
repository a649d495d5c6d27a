"""The generalised delta rule: its chunked form against its recurrence, and both against published references."""

import against_float64
import pytest
import torch
from torch.nn import functional as F

from kernels.delta_rule import delta_rule, delta_rule_step, dplr_delta_rule, dplr_delta_rule_step
from kernels.delta_rule.reference import chunk_terms, delta_terms, dplr_terms, naive_terms

BATCH, HEADS, KEY, VALUE = 2, 3, 8, 5
SCALE = 0.3


def make(length, dtype=torch.float64, decay=1.0, seed=0):
    """Inputs by name; `decay` is the largest -g."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (BATCH, length, HEADS, KEY)
    q, k, a = (F.normalize(randn(*shape), dim=-1) for _ in range(3))
    tensors = {
        "q": q,
        "k": k,
        "v": randn(BATCH, length, HEADS, VALUE),
        "beta": randn(BATCH, length, HEADS).sigmoid(),
        "g": -decay * randn(*shape).sigmoid(),
        "a": -a,
        "b": a * randn(*shape).sigmoid(),
        "state": randn(BATCH, HEADS, KEY, VALUE),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


KINDS = ("deltanet", "gated_deltanet", "kda", "rwkv7")


def terms_of(kind, i):
    if kind == "rwkv7":
        return dplr_terms(i["q"], i["k"], i["v"], i["a"], i["b"], i["g"], SCALE)
    g = {"deltanet": None, "gated_deltanet": i["g"][..., 0], "kda": i["g"]}[kind]
    return delta_terms(i["q"], i["k"], i["v"], i["beta"], g, SCALE)


def run_public(kind, i, **options):
    if kind == "rwkv7":
        return dplr_delta_rule(*(i[n] for n in ("q", "k", "v", "a", "b", "g")), scale=SCALE, **options)
    g = {"deltanet": None, "gated_deltanet": i["g"][..., 0], "kda": i["g"]}[kind]
    return delta_rule(i["q"], i["k"], i["v"], i["beta"], g, scale=SCALE, **options)


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


def test_the_rule_itself():
    """Two tokens by hand: the second write replaces half of what the first stored under the same key."""
    k = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    k[..., 0] = 1
    v = torch.tensor([[[[4.0]], [[10.0]]]], dtype=torch.float64)
    beta = torch.tensor([[[1.0], [0.5]]], dtype=torch.float64)
    o, state = delta_rule(k, k, v, beta, scale=1.0, output_final_state=True)
    assert o.flatten().tolist() == [4.0, 7.0]
    assert state.flatten().tolist() == [7.0, 0.0]
    halved = torch.full((1, 2, 1), 0.5, dtype=torch.float64).log()
    o, _ = delta_rule(k, k, v, beta, halved, scale=1.0)
    assert o.flatten().tolist() == pytest.approx([4.0, 2.0 + 0.5 * 8.0])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.05, 3.0, 500.0])
def test_chunked_form_is_the_recurrence(kind, decay):
    for length in (1, 2, 31, 32, 33, 70):
        i = make(length, decay=decay)
        terms = terms_of(kind, i)
        o, state = naive_terms(terms, i["state"])
        for chunk_size in (None, 1, 8, 64):
            chunked_o, chunked_state = chunk_terms(terms, i["state"], chunk_size=chunk_size)
            assert error(chunked_o, o) < 1e-12
            assert error(chunked_state, state) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_recurrence(kind):
    names = [n for n in make(1) if n not in (("beta",) if kind == "rwkv7" else ("a", "b"))]
    gradients = []
    for form in (naive_terms, chunk_terms):
        i = make(19, decay=2.0)
        leaves = [i[n].requires_grad_() for n in names]
        o, state = form(terms_of(kind, i), i["state"])
        loss = (o * o.detach().cos()).sum() + (state * state.detach().sin()).sum()
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=kind == "deltanet"))
    compared = [n for n, one in zip(names, gradients[0]) if one is not None]
    assert set(names) - set(compared) == ({"g"} if kind == "deltanet" else set())
    errors = [error(two, one) for one, two in zip(*gradients) if one is not None]
    assert max(errors) < 1e-11


@pytest.mark.parametrize("strongest", [-400.0, -float("inf")])
@pytest.mark.parametrize("kind", ["gated_deltanet", "kda", "rwkv7"])
def test_strong_decay_is_safe_in_float32(kind, strongest):
    """Weak and total decay in turn, where the sums of g inside a chunk reach -5000, or a reset."""
    i = make(64, dtype=torch.float32)
    i["g"] = (
        torch.where(torch.arange(64)[:, None, None] % 5 == 2, strongest, -0.01)
        .expand_as(i["g"])
        .clone()
        .requires_grad_()
    )
    exact = {name: tensor.detach().double() for name, tensor in i.items()}
    o, state = run_public(kind, i, initial_state=i["state"], output_final_state=True)
    expected, expected_state = naive_terms(terms_of(kind, exact), exact["state"])
    rounded, _ = naive_terms(terms_of(kind, i), i["state"])
    assert error(o.double(), expected) < 4 * error(rounded.double(), expected)
    assert error(state.double(), expected_state) < 1e-5
    (gradient,) = torch.autograd.grad(o.square().sum(), i["g"])
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_public_functions_resume_and_step(kind):
    i = make(45, decay=2.0)
    expected, expected_state = naive_terms(terms_of(kind, i), torch.zeros_like(i["state"]))
    whole, none = run_public(kind, i)
    assert none is None
    assert error(whole, expected) < 1e-12
    first, second = (
        {n: t if n == "state" else t[:, part] for n, t in i.items()} for part in (slice(20), slice(20, None))
    )
    start, state = run_public(kind, first, output_final_state=True)
    rest, final = run_public(kind, second, initial_state=state, output_final_state=True)
    assert error(torch.cat([start, rest], 1), expected) < 1e-12
    assert error(final, expected_state) < 1e-12
    for t in range(20, 45):
        token = {n: x[:, t] for n, x in i.items() if n != "state"}
        if kind == "rwkv7":
            o, state = dplr_delta_rule_step(*(token[n] for n in ("q", "k", "v", "a", "b", "g")), state, scale=SCALE)
        else:
            g = {"deltanet": None, "gated_deltanet": token["g"][..., 0], "kda": token["g"]}[kind]
            o, state = delta_rule_step(token["q"], token["k"], token["v"], token["beta"], g, state, scale=SCALE)
        assert error(o, expected[:, t]) < 1e-11
    assert error(state, expected_state) < 1e-12


@torch.no_grad()
def test_low_precision_inputs_are_accumulated_in_float32():
    i = make(40, dtype=torch.bfloat16)
    o, state = run_public("kda", i, output_final_state=True)
    exact = {name: tensor.double() for name, tensor in i.items()}
    expected, expected_state = naive_terms(terms_of("kda", exact), torch.zeros_like(exact["state"]))
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert error(o.double(), expected) < 2**-8
    assert error(state.double(), expected_state) < 1e-5
    _, kept = run_public("kda", i, initial_state=i["state"], output_final_state=True)
    assert kept.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = run_public("kda", make(40, dtype=torch.float32), output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@torch.no_grad()
def test_fla_naive_references(fla_naive):
    """The same inputs through fla's naive recurrences, which compute in float32."""
    i = make(37, dtype=torch.float32)
    q, k, v, beta, g, a, b, state = i.values()
    options = {"initial_state": state, "output_final_state": True}

    def heads_first(x):
        return x.transpose(1, 2)

    scale = KEY**-0.5
    delta = fla_naive("delta_rule").delta_rule_recurrence(*map(heads_first, (q, k, v, beta)), **options)
    gated = fla_naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, k, v, beta, g[..., 0], **options)
    kda = fla_naive("kda").naive_recurrent_kda(q, k, v, g, beta, **options)
    dplr = fla_naive("generalized_delta_rule/dplr").dplr_recurrence(*map(heads_first, (q, k, v, a, b, g)), **options)
    pairs = [
        ((heads_first(delta[0]), delta[1]), delta_rule(q, k, v, beta, **options)),
        (gated, delta_rule(q, k, v, beta, g[..., 0], **options)),
        (kda, delta_rule(q, k, v, beta, g, **options)),
        ((heads_first(dplr[0]), dplr[1]), dplr_delta_rule(q, k, v, a, b, g, scale=scale, **options)),
    ]
    for (expected_o, expected_state), (o, final) in pairs:
        assert error(o, expected_o) < 2e-6
        assert error(final, expected_state) < 2e-6


REFUSALS = [
    ({"q": (2, 4, 3)}, "q has shape"),
    ({"k": (2, 4, 3, 7)}, "k has shape"),
    ({"v": (2, 5, 3, 5)}, "v has shape"),
    ({"beta": (2, 4, 3, 1)}, "beta has shape"),
    ({"g": (2, 4)}, "g has shape"),
    ({"state": (2, 3, 5, 8)}, "state has shape"),
]


@pytest.mark.parametrize(("shapes", "message"), REFUSALS)
def test_wrong_shapes_are_refused(shapes, message):
    i = make(4)
    i.update({name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=message):
        delta_rule(i["q"], i["k"], i["v"], i["beta"], i["g"], initial_state=i["state"])


def test_wrong_arguments_are_refused():
    i = make(4)
    core = [i[n] for n in ("q", "k", "v", "a", "b", "g")]
    with pytest.raises(ValueError, match="scale is -1"):
        delta_rule(i["q"], i["k"], i["v"], i["beta"], scale=-1)
    with pytest.raises(ValueError, match="k has dtype"):
        delta_rule(i["q"], i["k"].float(), i["v"], i["beta"])
    with pytest.raises(ValueError, match="beta has dtype"):
        delta_rule(i["q"], i["k"], i["v"], i["beta"].long())
    with pytest.raises(ValueError, match="a has dtype"):
        dplr_delta_rule(*core[:3], i["a"].float(), *core[4:])
    with pytest.raises(ValueError, match="b has shape"):
        dplr_delta_rule(*core[:4], i["b"][:, :2], i["g"])
    with pytest.raises(ValueError, match="g is on meta"):
        dplr_delta_rule(*core[:5], i["g"].to("meta"))


def close_to_float64(case, dtype, device):
    (b, t, h, k, v), resumed, kind = case
    generator = torch.Generator().manual_seed(t)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Keys have something in common, which makes the triangular system hard, and beta goes up to 2.
    keys, beta = F.normalize(normal(b, t, h, k) + 1, dim=-1), 2 * normal(b, t, h).sigmoid()
    g = -torch.exp(2 * (normal(b, t, h, k) if kind == "rwkv7" else normal(b, t, h)) - 2)
    g[:, t // 2], g[:, t // 3] = -torch.inf, 0
    inputs = {"q": normal(b, t, h, k), "k": keys, "v": normal(b, t, h, v)}
    if kind == "rwkv7":
        inputs |= {"k": normal(b, t, h, k), "a": -keys, "b": keys * normal(b, t, h, k).sigmoid()}
    else:
        inputs |= {"beta": beta}
    inputs = {name: part.to(dtype) for name, part in inputs.items()}
    if kind != "deltanet":
        inputs |= {"g": g.float()}
    if resumed:
        inputs |= {"initial_state": normal(b, h, k, v).float()}
    function = dplr_delta_rule if kind == "rwkv7" else delta_rule
    weights = normal(b, t, h, v), normal(b, h, k, v)

    def run(given, backend):
        return function(**given, scale=SCALE, output_final_state=True, backend=backend)

    against_float64.check(run, inputs, resumed, weights, dtype, device, case)


# B, T, H, K, V; from a state on and with a gradient through the last
SHAPES = [
    ((2, 37, 2, 5, 3), True, "gated_deltanet"),
    ((1, 70, 1, 16, 70), True, "deltanet"),
    ((1, 3, 2, 4, 6), False, "gated_deltanet"),
    ((2, 37, 2, 5, 3), True, "rwkv7"),
    ((1, 20, 1, 16, 70), False, "rwkv7"),
]


def test_kernels_interpreted(close_when_interpreted):
    close_when_interpreted("test_delta_rule", half=(0, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        *SHAPES,
        ((2, 256, 2, 64, 64), False, "deltanet"),
        ((2, 256, 2, 128, 128), False, "deltanet"),
        ((1, 200, 2, 128, 256), True, "gated_deltanet"),
        ((2, 200, 2, 64, 64), True, "rwkv7"),
    ],
)
def test_kernels_against_float64(case, dtype, poisoned):
    close_to_float64(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", [64, 128])
def test_kernels_repeat_to_the_last_bit(width, gated):
    """Nothing is added up in an order that may change, so that a difference is a race; of a training step's size."""
    generator = torch.Generator("cuda").manual_seed(width)

    def normal(*shape):
        return torch.randn(256, 256, 2, *shape, generator=generator, device="cuda")

    leaves = [normal(width), F.normalize(normal(width) + 1, dim=-1), normal(width), normal().sigmoid()]
    leaves = [leaf.bfloat16().requires_grad_() for leaf in leaves]
    g = -normal().abs() if gated else None
    weights = normal(width).bfloat16()

    def results():
        o, _ = delta_rule(*leaves, g, backend="triton")
        return o.detach(), *torch.autograd.grad(o, leaves, weights)

    first = results()
    assert all(torch.isfinite(part).all() for part in first)
    for _ in range(50):
        assert [torch.equal(one, other) for one, other in zip(first, results())] == [True] * 5


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_registration_of_the_operator(gated):
    import kernels.delta_rule.triton  # noqa: F401

    i = make(20, torch.float32)
    given = [i["q"], i["k"], i["v"], i["beta"], i["g"][..., 0], i["state"]]
    leaves = [part.contiguous().cuda().requires_grad_() for part in given]
    if not gated:
        leaves[4] = None
    torch.library.opcheck(torch.ops.zoology.delta_rule.default, (*leaves, SCALE))


@pytest.mark.gpu
def test_registration_of_the_operator_by_channels():
    import kernels.delta_rule.triton_channels  # noqa: F401

    i = make(20, torch.float32)
    leaves = [i[name].cuda().requires_grad_() for name in ("q", "k", "v", "a", "b", "g", "state")]
    torch.library.opcheck(torch.ops.zoology.dplr_delta_rule.default, leaves)


def test_what_triton_does_not_take():
    i = make(4)
    with pytest.raises(ValueError, match="backend='triton' cannot run here"):
        run_public("gated_deltanet", i, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: auto, reference, triton"):
        run_public("deltanet", i, backend="cuda")
    with pytest.raises(ValueError, match="backend='triton' cannot run here"):
        run_public("rwkv7", i, backend="triton")
