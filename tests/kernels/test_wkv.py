"""The parallel WKV against the sums that define it, the naive form and transformers."""

import pytest
import torch

from kernels.wkv import WKVState, naive_wkv, wkv, wkv_step


def draw(length, dtype=torch.float64, scale=1.0):
    b, d = 2, 5
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k, v = scale * normal(b, length, d), normal(b, length, d)
    state = WKVState(normal(b, d).to(dtype), normal(b, d).to(dtype))
    return [x.to(dtype) for x in (k, v, torch.exp(normal(d)), normal(d))], state


def error(ours, reference):
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def test_equals_the_sums_of_the_paper():
    (k, v, w, u), _ = draw(9)
    wanted = []
    for t in range(9):
        age = (t - 1 - torch.arange(t, dtype=torch.float64))[:, None] * w
        weights = torch.cat([torch.exp(k[:, :t] - age), torch.exp(u + k[:, t : t + 1])], dim=1)
        wanted.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    wanted = torch.stack(wanted, dim=1)
    assert error(wkv(k, v, w, u)[0], wanted) < 1e-13
    assert error(naive_wkv(k, v, w, u)[0], wanted) < 1e-13


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65])
def test_parallel_equals_naive(length, scale):
    """Log weights of a few hundred would overflow as weights."""
    inputs, state = draw(length, scale=scale)
    for initial in (None, state):
        o, final = wkv(*inputs, initial_state=initial)
        wanted, wanted_final = naive_wkv(*inputs, initial_state=initial)
        assert error(o, wanted) < 1e-12
        assert error(final.average, wanted_final.average) < 1e-12
        assert error(final.log_weight, wanted_final.log_weight) < 1e-12


def test_gradients_equal_naive():
    inputs, state = draw(37)
    weights = torch.randn(3, 2, 37, 5, dtype=torch.float64)
    for initial in (None, state):
        gradients = []
        for run in (naive_wkv, wkv):
            leaves = [x.clone().requires_grad_() for x in (*inputs, *(initial or ()))]
            memory = None if initial is None else WKVState(*leaves[4:])
            o, final = run(*leaves[:4], initial_state=memory)
            (o * weights[0]).sum().add((final.average * weights[1, :, 0]).sum()).add(
                (final.log_weight * weights[2, :, 0]).sum()
            ).backward()
            gradients.append([x.grad for x in leaves])
        for ours, wanted in zip(*gradients):
            assert error(ours, wanted) < 1e-12


def test_equals_transformers_in_float32():
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    (k, v, w, u), _ = draw(50, torch.float32)
    wanted, (numerator, denominator, exponent) = rwkv_linear_attention_cpu(w.log(), u, k, v, return_state=True)
    o, final = wkv(k, v, w, u)
    assert error(o, wanted) < 1e-6
    assert error(final.average, numerator / denominator) < 1e-6
    assert error(final.log_weight, denominator.log() + exponent) < 1e-6


def test_split_and_resume_and_step():
    (k, v, w, u), state = draw(20)
    whole, last = wkv(k, v, w, u, initial_state=state)
    first, middle = wkv(k[:, :7], v[:, :7], w, u, initial_state=state)
    outputs = [first]
    for t in range(7, 20):
        o, middle = wkv_step(k[:, t], v[:, t], w, u, middle)
        outputs.append(o.unsqueeze(1))
    assert error(torch.cat(outputs, dim=1), whole) < 1e-13
    assert error(middle.log_weight, last.log_weight) < 1e-13


def test_the_weight_stays_in_float32():
    inputs, _ = draw(30, torch.bfloat16)
    empty = WKVState.empty(2, 5, dtype=torch.bfloat16)
    o, final = wkv(*inputs, initial_state=empty)
    assert (o.dtype, final.average.dtype, final.log_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wanted, _ = naive_wkv(*(x.double() for x in inputs))
    assert error(o, wanted) < 2**-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 5)}, r"k has shape \(2, 5\); allowed: \[B, T, D\]"),
        ({"v": (2, 3, 5)}, r"v has shape \(2, 3, 5\); allowed: \(2, 4, 5\)"),
        ({"decay": (4,)}, r"decay has shape \(4,\); allowed: \(5,\)"),
        ({"bonus": (1, 5)}, r"bonus has shape \(1, 5\); allowed: \(5,\)"),
    ],
)
def test_bad_shapes(change, message):
    shapes = {"k": (2, 4, 5), "v": (2, 4, 5), "decay": (5,), "bonus": (5,)} | change
    with pytest.raises(ValueError, match=message):
        wkv(**{key: torch.zeros(shape) for key, shape in shapes.items()})


def test_bad_states():
    (k, v, w, u), state = draw(4)
    with pytest.raises(ValueError, match=r"initial_state.average has shape \(1, 5\); allowed: \(2, 5\)"):
        wkv(k, v, w, u, initial_state=WKVState(*(x[:1] for x in state)))
    with pytest.raises(ValueError, match="initial_state is a tuple; allowed: a WKVState"):
        wkv(k, v, w, u, initial_state=tuple(state))
    with pytest.raises(ValueError, match="state is None"):
        wkv_step(k[:, 0], v[:, 0], w, u, None)
    with pytest.raises(ValueError, match=r"bonus has dtype torch.int64; allowed: a floating dtype"):
        wkv(k, v, w, u.long())
