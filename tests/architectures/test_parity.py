"""The parity check: what it measures, what it allows, and what it leaves alone."""

import copy
import math

import pytest
import torch

import architectures
from architectures import parity
from architectures.parity import BATCH, FACTOR, LENGTH, Parity

CPU = torch.device("cpu")


def build(name, d_model=8, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return architectures.create(name, d_model=d_model, **options).to(dtype)


def check(mixer, backend, dtype=torch.float32, seq_len=LENGTH):
    return parity.check(mixer, backend, CPU, dtype, seq_len)


def test_a_long_case_is_stood_in_for_by_two_chunks_and_its_rest():
    assert [parity.stand_in(n) for n in (1, LENGTH - 1, LENGTH)] == [1, LENGTH - 1, LENGTH]
    assert [parity.stand_in(n) for n in (1024, 1025, 1087)] == [128, 129, 191]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seq_len", [1, 2, 33, LENGTH, 10 * LENGTH])
def test_what_is_right_passes(fake_backends, dtype, seq_len):
    result = check(build("fake_right"), "right", dtype, seq_len)
    assert result.passed, str(result)
    assert 0 <= result.output <= result.output_allowed
    assert result.gradient <= result.gradient_allowed
    assert (result.gradient > 0) == (seq_len > 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_gradient_that_is_wrong_by_a_hundredth_is_found(fake_backends, dtype):
    result = check(build("fake_wrong_gradient"), "wrong-gradient", dtype)
    assert not result.passed
    assert result.gradient_name == "logit"
    assert result.gradient == pytest.approx(0.01, rel=1e-3)
    assert result.output <= result.output_allowed


def test_a_wrong_step_is_found_in_decoding_alone(fake_backends):
    mixer = build("fake_wrong_step")
    assert check(mixer, "wrong-step").passed
    decoded = check(mixer, "wrong-step", seq_len=1)
    assert not decoded.passed
    assert 1e-4 < decoded.output < 1e-1


def test_what_raises_has_failed_with_its_message(fake_backends):
    result = check(build("fake_raising"), "raising")
    assert not result.passed
    assert str(result) == "RuntimeError: no kernel image"
    assert math.isnan(result.output)


def test_numbers_that_are_not_finite_fail():
    nan = float("nan")
    assert not Parity(nan, 1e-6, 0.0, 1e-6, "x").passed
    assert not Parity(0.0, 1e-6, nan, 1e-6, "x").passed
    assert not Parity(0.0, nan, 0.0, 1e-6, "x").passed
    assert not Parity(0.0, 1e-6, float("inf"), 1e-6, "x").passed
    assert Parity(1e-6, 1e-6, 1e-6, 1e-6, "x").passed
    assert not Parity(1.1e-6, 1e-6, 0.0, 1e-6, "x").passed


@pytest.mark.parametrize(("wrong", "named", "auto"), [("auto", True, False), ("right", False, True)])
def test_what_auto_runs_and_what_a_name_runs_are_checked_apart(fake_backends, monkeypatch, wrong, named, auto):
    """A mixer may run something else beside a backend where it was free to choose."""
    step = fake_backends.Average.step

    def other(mixer, x, state):
        y, state = step(mixer, x, state)
        return (1.01 * y if mixer.backend == wrong else y), state

    monkeypatch.setattr(fake_backends.Average, "step", other)
    assert check(build("fake_right", backend="right"), "right", seq_len=1).passed == named
    assert check(build("fake_right"), "right", seq_len=1).passed == auto


def test_a_gradient_that_is_nan_comes_out_as_the_worst(fake_backends, monkeypatch):
    right = parity._Case.errors

    def broken(case, backend, dtype, exact):
        found = right(case, backend, dtype, exact)
        return (
            found._replace(gradients={**found.gradients, "value.bias": float("nan")}) if backend == "right" else found
        )

    monkeypatch.setattr(parity._Case, "errors", broken)
    result = check(build("fake_right"), "right")
    assert not result.passed
    assert result.gradient_name == "value.bias"


def test_what_is_allowed_is_a_small_factor_times_the_references_own_error(fake_backends):
    """The budget, by hand: the reference in float32 against float64, on the parameters and inputs of the case."""
    mixer = build("fake_right")
    case = parity._Case(mixer, CPU, torch.float32, LENGTH)
    ((drawn, direction),) = case.draws

    def run(dtype):
        twin, x = copy.deepcopy(case.mixer).to(dtype), drawn.to(dtype)
        twin.force_backend("reference")
        x.requires_grad_()
        y = twin(x)
        (y.double() * direction).sum().backward()
        return y.detach().double(), {"x": x.grad, **{n: p.grad for n, p in twin.named_parameters()}}

    (exact, exact_gradients), (single, gradients) = run(torch.float64), run(torch.float32)

    def error(a, b):
        return float((a.double() - b).norm() / b.norm())

    eps = torch.finfo(torch.float32).eps
    own = error(single, exact)
    result = check(mixer, "right")
    assert result.output_allowed >= FACTOR * max(own, eps) * (1 - 1e-9)
    # Token by token the reference is off by about as much: rounding does not pile up in an average.
    assert result.output_allowed <= FACTOR * max(2 * own, eps)
    name = result.gradient_name
    expected = FACTOR * max(error(gradients[name], exact_gradients[name]), result.output_allowed / FACTOR)
    assert result.gradient_allowed == pytest.approx(expected, rel=1e-6)


def test_16_bit_beside_float32_parameters_is_autocast_and_16_bit_parameters_are_not(fake_backends):
    cases = [
        parity._Case(build("fake_right", dtype=dtype), CPU, torch.bfloat16, LENGTH)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert [case.autocast for case in cases] == [True, False]
    assert [case.draws[0][0].dtype for case in cases] == [torch.float32, torch.bfloat16]
    assert all(
        check(build("fake_right", dtype=d), "right", torch.bfloat16).passed for d in (torch.float32, torch.bfloat16)
    )


def test_a_gradient_that_is_zero_but_for_rounding_does_not_fail_the_check():
    """Under softmax the gradient of a bias of the keys is zero: an error relative to it means nothing."""
    mixer = build("attention")
    with torch.no_grad():
        mixer.qkv.bias.zero_()
    split = parity._Case(mixer, CPU, torch.float32, LENGTH)
    exact = split.run("reference", torch.float64)
    gradients = {**exact[1], "nothing": torch.full((8,), 1e-18, dtype=torch.float64)}
    found = dict(gradients, nothing=torch.full((8,), 1e-9, dtype=torch.float64))
    split.run = lambda *args, **options: (exact[0], found)
    errors = split.errors("sdpa", torch.float32, (exact[0], gradients))
    assert errors.gradients["nothing"] < 1e-5


def test_results_are_kept_by_shape_option_dtype_and_length(fake_backends, monkeypatch):
    runs = []
    compare = parity._compare
    monkeypatch.setattr(parity, "_compare", lambda *case: runs.append(case[1:]) or compare(*case))

    def count(mixer, backend="sdpa", **case):
        before = len(runs)
        check(mixer, backend, **case)
        return len(runs) - before

    window = {"window": 4, "num_heads": 2}
    assert count(build("sliding_window", **window)) == 1
    assert count(build("sliding_window", **window)) == 0
    assert count(build("sliding_window", **window), seq_len=1000) == 0
    assert count(build("sliding_window", **window), seq_len=20) == 1
    assert count(build("sliding_window", window=5, num_heads=2)) == 1
    assert count(build("sliding_window", window=4, num_heads=4)) == 1
    assert count(build("sliding_window", 16, **window)) == 1
    assert count(build("sliding_window", **window), dtype=torch.float64) == 1
    assert count(build("attention", num_heads=2)) == 1
    assert count(build("fake_right"), "right") == 1
    assert count(build("fake_right"), "wrong-step") == 1
    assert parity.known(build("fake_right"), "right", CPU, torch.float32, LENGTH).passed
    assert parity.known(build("fake_right"), "right", CPU, torch.float32, 7) is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # products in TF32 are other products
        assert parity.known(build("fake_right"), "right", CPU, torch.float32, LENGTH) is None
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_it_does_not_depend_on_where_it_is_called_from(fake_backends, context):
    mixer = build("fake_wrong_gradient")
    outside = parity._compare(mixer, "wrong-gradient", CPU, torch.float32, 20)
    with context():
        inside = check(mixer, "wrong-gradient", seq_len=20)
    assert inside == outside


def test_it_leaves_the_mixer_and_the_global_generator_alone(fake_backends):
    mixer = build("fake_right").eval()
    before = copy.deepcopy(mixer.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check(mixer, "right")
    check(mixer, "right", seq_len=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in mixer.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in mixer.parameters())
    assert not mixer.training
    assert (mixer.backend, mixer.backends_used()) == ("auto", ["reference"])


def test_a_frozen_mixer_is_checked_like_another(fake_backends):
    result = check(build("fake_wrong_gradient").requires_grad_(False), "wrong-gradient")
    assert not result.passed
    assert result.gradient_name == "logit"


def test_the_case_moves_parameters_that_start_at_zero():
    case = parity._Case(build("rwkv7"), CPU, torch.float32, LENGTH)
    assert case.draws[0][0].shape == (BATCH, LENGTH, 8)
    assert float(case.mixer.out_proj.weight.detach().abs().min()) > 0


def test_a_gradient_of_two_numbers_is_compared_by_eight():
    """D of Mamba-2 with two heads: its numbers nearly cancel behind the norm, and one draw says little of rounding."""
    case = parity._Case(build("mamba2", 64, d_state=8), CPU, torch.float32, 8)
    outputs, gradients = case.run("reference", torch.float64)
    assert gradients["D"].shape == (4, 2)
    assert outputs.shape == (4, BATCH, 8, 64)
    alone = [case._run("reference", torch.float64, *draw)[1]["D"] for draw in case.draws]
    assert torch.equal(torch.stack(alone), gradients["D"])
    assert len({float(each[0]) for each in alone}) == 4
    decode = parity._Case(build("mamba2", 64, d_state=8), CPU, torch.float32, 1)
    assert len(decode.draws) == 1  # without gradients


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2", "prefix_linear_attention"])
def test_all_draws_go_token_by_token_through_the_reference_at_once(name, monkeypatch):
    """Steps are slow, and their cost is by the step, not by the example: each draw is stepped through, none apart."""
    mixer, length = build(name, 16), 24
    case = parity._Case(mixer, CPU, torch.float64, length)
    steps, own_step = [], type(mixer).step
    monkeypatch.setattr(type(mixer), "step", lambda self, *args: steps.append(1) or own_step(self, *args))
    together = case.run_token_by_token(torch.float64)
    assert len(steps) == (length // 2 if mixer.takes_prefix else length)
    torch.testing.assert_close(together, case.run("reference", torch.float64)[0], rtol=1e-9, atol=1e-11)


def test_a_step_that_rounds_more_than_the_parallel_form_widens_the_budget(fake_backends, monkeypatch):
    """What is allowed follows the worse of the two forms of the reference, over all draws."""
    mixer = build("mamba2", 16, d_state=8)
    before = parity._compare(mixer, "reference", CPU, torch.float32, 24)
    step = type(mixer).step

    def rough(self, x, state):
        y, state = step(self, x, state)
        return y * (1 + 1e-4 * (y.shape[0] > BATCH)), state

    monkeypatch.setattr(type(mixer), "step", rough)
    after = parity._compare(mixer, "reference", CPU, torch.float32, 24)
    assert before.output_allowed < 1e-5
    assert after.output_allowed == pytest.approx(FACTOR * 1e-4, rel=0.05)


@pytest.mark.parametrize("name", architectures.names())
def test_every_reference_is_close_to_itself_in_float64(name):
    """Float32 on a CPU is off by rounding: a reference that computes in less than it should is found here."""
    found = parity.errors(build(name, 16), "reference", CPU, torch.float32, 65)
    assert found.output < 1e-5
    assert max(found.gradients.values()) < 1e-4
    assert parity.errors(build(name, 16), "reference", CPU, torch.float64, 65).output == 0
