"""The fast selective scan against the naive one."""

import against_float64
import pytest
import torch

from kernels.selective_scan import naive_selective_scan, selective_scan, selective_scan_step
from kernels.selective_scan.reference import selective_scan_reference


def draw(length, dtype=torch.float64):
    """x, dt, A, B, C, state; step sizes from 0 (nothing happens) to 1000 (everything is forgotten)."""
    b, d, n = 2, 5, 3
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = torch.exp(2 * normal(b, length, d))
    dt[:, length // 3], dt[:, length // 2] = 0, 1000
    inputs = normal(b, length, d), dt, -torch.exp(normal(d, n)), normal(b, length, n), normal(b, length, n)
    return [x.to(dtype) for x in (*inputs, normal(b, d, n))]


def error(ours, reference):
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


@pytest.mark.parametrize("num_stretches", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
def test_equals_naive_with_gradients(length, num_stretches):
    inputs = draw(length)
    weights = torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])
    results = []
    for run, options in ((naive_selective_scan, {}), (selective_scan_reference, {"num_stretches": num_stretches})):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, last = run(*leaves[:5], initial_state=leaves[5], **options)
        ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
        results.append([y, last, *(x.grad for x in leaves)])
    assert len(results[1]) == 8
    for ours, wanted in zip(results[1], results[0]):
        assert error(ours, wanted) < 1e-12


def test_gradients_do_not_change_the_inputs():
    x, dt, A, B, C, state = draw(9)
    copies = [part.clone() for part in (x, dt, A, B, C, state)]
    leaves = [part.requires_grad_() for part in (x, dt, A, B, C, state)]
    y, last = selective_scan(*leaves[:5], initial_state=leaves[5])
    (y.sum() + last.sum()).backward()
    for part, copy in zip(leaves, copies):
        assert torch.equal(part, copy)


def test_float32_is_as_close_to_float64_as_the_naive_form():
    exact = draw(200)
    wanted, _ = naive_selective_scan(*exact[:5], initial_state=exact[5])
    *inputs, state = (x.float() for x in exact)
    budget = error(naive_selective_scan(*inputs, initial_state=state)[0], wanted)
    y, last = selective_scan(*inputs, initial_state=state)
    assert y.dtype == last.dtype == torch.float32
    assert error(y, wanted) < 3 * budget


def test_split_and_resume_and_step():
    *inputs, state = draw(20)
    whole, last = selective_scan(*inputs, initial_state=state)
    x, dt, A, B, C = inputs
    first, middle = selective_scan(x[:, :7], dt[:, :7], A, B[:, :7], C[:, :7], initial_state=state)
    outputs = [first]
    for t in range(7, 20):
        y, middle = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], middle)
        outputs.append(y.unsqueeze(1))
    assert error(torch.cat(outputs, dim=1), whole) < 1e-13
    assert error(middle, last) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bias_and_skip(dtype):
    x, dt, A, B, C, _ = draw(12, dtype)
    bias, skip = torch.linspace(-5, 1, 5, dtype=torch.float64), torch.linspace(2, -1, 5, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    y, last = selective_scan(x, -dt, A, B, C, dt_bias=bias.to(wide), skip=skip.to(wide))
    sizes = (1 + (bias - dt.double()).exp()).log()
    wanted, wanted_last = naive_selective_scan(x.double(), sizes, A.double(), B.double(), C.double())
    assert error(y, wanted + skip * x.double()) < (1e-12 if dtype == torch.float64 else 2**-8)
    assert error(last, wanted_last) < (1e-12 if dtype == torch.float64 else 1e-5)
    state, outputs = torch.zeros(2, 5, 3, dtype=wide), []
    for t in range(12):
        token, state = selective_scan_step(
            x[:, t], -dt[:, t], A, B[:, t], C[:, t], state, dt_bias=bias.to(wide), skip=skip.to(wide)
        )
        outputs.append(token)
    assert error(torch.stack(outputs, 1), wanted + skip * x.double()) < (1e-12 if dtype == torch.float64 else 2**-8)
    assert error(state, wanted_last) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_low_precision_inputs_keep_a_float32_state():
    *inputs, _ = draw(30, torch.bfloat16)
    y, last = selective_scan(*inputs)
    wanted, wanted_last = naive_selective_scan(*(x.double() for x in inputs))
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert error(y, wanted) < 2**-8
    assert error(last, wanted_last) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 4)}, r"x has shape \(2, 4\); allowed: \[B, T, D\]"),
        ({"dt": (2, 4, 1)}, r"dt has shape \(2, 4, 1\); allowed: \(2, 4, 5\)"),
        ({"A": (4, 3)}, r"A has shape \(4, 3\); allowed: \(5, N >= 1\)"),
        ({"B": (2, 4, 2)}, r"B has shape \(2, 4, 2\); allowed: \(2, 4, 3\)"),
        ({"initial_state": (2, 3, 5)}, r"initial_state has shape \(2, 3, 5\); allowed: \(2, 5, 3\)"),
        ({"dt_bias": (3,)}, r"dt_bias has shape \(3,\); allowed: \(5,\)"),
        ({"skip": (2, 5)}, r"skip has shape \(2, 5\); allowed: \(5,\)"),
    ],
)
def test_bad_shapes(change, message):
    shapes = {"x": (2, 4, 5), "dt": (2, 4, 5), "A": (5, 3), "B": (2, 4, 3), "C": (2, 4, 3)} | change
    with pytest.raises(ValueError, match=message):
        selective_scan(**{key: torch.zeros(shape) for key, shape in shapes.items()})


def test_bad_dtype_and_a_missing_state():
    x, dt, A, B, C, _ = draw(4)
    with pytest.raises(ValueError, match=r"C has dtype torch.int64; allowed: a floating dtype"):
        selective_scan(x, dt, A, B, C.long())
    with pytest.raises(ValueError, match="state is None"):
        selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], None)


def close_to_float64(case, dtype, device):
    (b, t, d, n), resumed, biased = case
    generator = torch.Generator().manual_seed(t)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = torch.exp(normal(b, t, d))
    dt[:, t // 3], dt[:, t // 2] = 0, 1000
    if biased:  # as a product of matrices gives them
        dt, bias = normal(b, t, d), normal(d).float() - 4
        dt[:, t // 3], dt[:, t // 2] = -1000, 1000
        dt = dt.to(dtype)
    else:
        dt = dt.float()
    inputs = {"x": normal(b, t, d).to(dtype), "dt": dt, "A": -torch.exp(normal(d, n)).float()}
    inputs |= {"B": normal(b, t, n).to(dtype), "C": normal(b, t, n).to(dtype)}
    state, weights = normal(b, d, n).float(), (normal(b, t, d), normal(b, d, n))
    if resumed:
        inputs |= {"initial_state": state}
    if biased:
        inputs |= {"dt_bias": bias, "skip": normal(d).float()}

    def run(given, backend):
        for name in "xBC":  # as columns of wider tensors, as a model has them
            given = given | {name: torch.nn.functional.pad(given[name], (3, 2), value=float("nan"))[..., 3:-2]}
        return selective_scan(**given, backend=backend)

    against_float64.check(run, inputs, resumed, weights, dtype, device, case)


# B, T, D, N; whether from a state on and with a gradient through the last; whether with a bias and a skip
SHAPES = [
    ((2, 37, 5, 3), True, False),
    ((1, 16, 70, 16), False, True),
    ((1, 21, 33, 24), True, True),
    ((1, 3, 4, 1), False, False),
    ((2, 5, 9, 5), True, True),
]


def test_kernels_interpreted(close_when_interpreted):
    close_when_interpreted("test_selective_scan", half=(0,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*SHAPES, ((3, 256, 128, 16), False, True), ((2, 100, 96, 64), True, False)])
def test_kernels_against_float64(case, dtype, poisoned):
    close_to_float64(case, dtype, "cuda")


@pytest.mark.gpu
def test_registration_of_the_operator():
    import kernels.selective_scan.triton  # noqa: F401

    x, dt, A, B, C, state = (part.cuda() for part in draw(20, torch.float32))
    bias, skip = dt[0, 0].clone(), x[0, 0].clone()
    leaves = [part.requires_grad_() for part in (x, dt, bias, skip, A.T.contiguous(), B, C, state.mT.contiguous())]
    torch.library.opcheck(torch.ops.zoology.selective_scan.default, [*leaves, True])


def test_what_triton_does_not_take():
    inputs = draw(4)[:5]
    with pytest.raises(ValueError, match="backend='triton' cannot run here"):
        selective_scan(*inputs, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: auto, reference, triton"):
        selective_scan(*inputs, backend="cuda")
