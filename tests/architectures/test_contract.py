"""Every registered architecture keeps the mixer contract; a new one is tested by being registered."""

import copy
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import architectures
from architectures import registry
from architectures.mixer import clone_state, count_elements, map_state, state_tensors

NAMES = architectures.names()
BATCH, LENGTH, WIDTH = 2, 13, 8
LENGTHS = (1, 2, 63, 64, 65, 200)

pytestmark = pytest.mark.parametrize("name", NAMES)


def build(name, d_model=WIDTH, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return perturb(architectures.create(name, d_model=d_model, **options)).to(dtype)


def perturb(mixer):
    """Move every parameter a little, so that none that starts at zero or one hides a path through the mixer."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def inputs(length=LENGTH, batch=BATCH, d_model=WIDTH, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, d_model, generator=generator, dtype=torch.float64).to(dtype)


def unroll(mixer, x, state):
    outputs = []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def assert_close(actual, expected, tolerance):
    """Largest difference relative to the largest expected value."""
    assert torch.isfinite(actual).all()
    scale = expected.abs().max().clamp_min(1e-30)
    assert float((actual - expected).abs().max() / scale) <= tolerance


@torch.no_grad()
def test_causal(name):
    mixer, x = build(name), inputs()
    for cut in (1, 7, LENGTH - 1):
        changed = x.clone()
        changed[:, cut:] = inputs(seed=2)[:, cut:]
        assert_close(mixer(changed)[:, :cut], mixer(x)[:, :cut], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_forward_is_prefill_is_unrolled_step(name, dtype, tolerance):
    mixer, x = build(name, dtype=dtype), inputs(dtype=dtype)
    expected = mixer(x)
    prefilled, after_prefill = mixer.prefill(x, mixer.init_state(BATCH, LENGTH))
    stepped, after_steps = unroll(mixer, x, mixer.init_state(BATCH, LENGTH))
    assert expected.abs().max() > 1e-4
    assert_close(prefilled, expected, tolerance)
    assert_close(stepped, expected, tolerance)
    for (field, one), (_, other) in zip(state_tensors(after_prefill), state_tensors(after_steps)):
        if one.is_floating_point() or one.is_complex():
            assert_close(one, other, tolerance)
        else:
            assert torch.equal(one, other), field


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 3, 8, LENGTH - 1])
def test_split_and_resume(name, cut):
    mixer, x = build(name), inputs()
    expected = mixer(x)
    first, state = mixer.prefill(x[:, :cut], mixer.init_state(BATCH, LENGTH))
    kept = clone_state(state)
    second, _ = mixer.prefill(x[:, cut:], state)
    assert_close(torch.cat([first, second], 1), expected, 1e-9)
    resumed, _ = unroll(mixer, x[:, cut:], kept)
    assert_close(torch.cat([first, resumed], 1), expected, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(name, length):
    """Chunk borders and ragged ends: the parallel form agrees with one token at a time."""
    mixer, x = build(name), inputs(length, batch=1)
    half = length // 2
    expected = mixer(x)
    stepped, _ = unroll(mixer, x, mixer.init_state(1, length))
    assert_close(stepped, expected, 1e-9)
    state = mixer.init_state(1, length)
    parts = []
    for part in (x[:, :half], x[:, half:]):
        if part.shape[1]:
            y, state = mixer.prefill(part, state)
            parts.append(y)
    assert_close(torch.cat(parts, 1), expected, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("d_model", [4, 16])
def test_tiny_widths_with_defaults(name, d_model):
    mixer, x = build(name, d_model=d_model), inputs(9, d_model=d_model)
    stepped, _ = unroll(mixer, x, mixer.init_state(BATCH, 9))
    assert_close(stepped, mixer(x), 1e-9)


@torch.no_grad()
def test_batch_invariance(name):
    mixer, x = build(name), inputs(batch=3)
    together = mixer(x)
    for row in range(3):
        assert_close(mixer(x[row : row + 1]), together[row : row + 1], 1e-12)


def test_every_parameter_gets_a_finite_gradient(name):
    """A mixer that takes a prefix gets one: parameters that only a prefix reads have no gradient without."""
    mixer, x = build(name), inputs().requires_grad_()
    prefix = {"prefix_length": LENGTH // 2} if mixer.takes_prefix else {}
    (mixer(x, **prefix) * inputs(seed=3)).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0
    missing = [n for n, p in mixer.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []
    flat = [n for n, p in mixer.named_parameters() if p.grad.abs().max() == 0]
    assert flat == []


@torch.no_grad()
def test_train_mode_is_eval_mode(name):
    mixer, x = build(name), inputs()
    assert torch.equal(mixer.train()(x), mixer.eval()(x))


def test_same_seed_same_parameters(name):
    first, second, third = (
        dict(architectures.create(name, d_model=WIDTH).state_dict()) for seed in (5, 5, 6) if torch.manual_seed(seed)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, LENGTH])
def test_state_is_what_is_counted(name, length):
    mixer = build(name)
    _, state = mixer.prefill(inputs(length), mixer.init_state(BATCH, length))
    _, stepped = unroll(mixer, inputs(length), mixer.init_state(BATCH, length))
    for after in (state, stepped):
        assert sum(count_elements(t) for _, t in state_tensors(after)) == BATCH * mixer.state_size(length)
    batched = [tensor.shape[0] for _, tensor in state_tensors(state) if tensor.ndim]
    assert batched == [BATCH] * len(batched)
    assert batched


@torch.no_grad()
def test_step_reads_only_its_arguments(name):
    """Stepping one sequence between the steps of another changes nothing."""
    mixer, x, other = build(name), inputs(), inputs(seed=4)
    expected, _ = unroll(mixer, x, mixer.init_state(BATCH, LENGTH))
    state, disturbed, outputs = mixer.init_state(BATCH, LENGTH), mixer.init_state(BATCH, LENGTH), []
    for t in range(LENGTH):
        y, state = mixer.step(x[:, t], state)
        _, disturbed = mixer.step(other[:, t], disturbed)
        outputs.append(y)
    assert torch.equal(torch.stack(outputs, 1), expected)


class Foreign(tuple):
    __slots__ = ()


@torch.no_grad()
def test_foreign_states_are_refused(name):
    mixer, x = build(name), inputs()
    token = x[:, 0]
    own = mixer.init_state(BATCH, LENGTH)
    with pytest.raises(ValueError, match="state"):
        mixer.step(token, Foreign(own))
    with pytest.raises(ValueError, match="shape"):
        mixer.step(token, mixer.init_state(BATCH + 1, LENGTH))
    with pytest.raises(ValueError, match="shape"):
        mixer.prefill(x, mixer.init_state(BATCH + 1, LENGTH))
    lower = {torch.float64: torch.float16, torch.complex128: torch.complex64}
    other_dtype = map_state(lambda t: t.to(lower.get(t.dtype, t.dtype)), own)
    with pytest.raises(ValueError, match=r"float16|complex64"):
        mixer.step(token, other_dtype)


@torch.no_grad()
def test_a_16_bit_mixer_does_not_forget_how_to_count(name):
    """A state in bfloat16 that sums without decay stands still beyond 256 tokens: such sums are kept in float32."""
    mixer = build(name).to(torch.bfloat16)
    x = inputs(500, 1, dtype=torch.bfloat16)
    exact = copy.deepcopy(mixer).double()(x.double())[:, 400:]
    y = unroll(mixer, x, mixer.init_state(1, 500))[0][:, 400:]
    assert float((y.double() - exact).norm() / exact.norm()) < 0.06


def test_an_input_of_another_shape_or_dtype_is_refused(name):
    """[T, D] is not T sequences of one token, whatever would come out."""
    mixer = build(name)
    for shape in [(LENGTH, WIDTH), (BATCH, LENGTH, WIDTH + 1), (BATCH, LENGTH, 1, WIDTH)]:
        with pytest.raises(ValueError, match=re.escape(f"x has shape {shape}; allowed: [B, T, {WIDTH}]")):
            mixer(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64; allowed: a floating dtype"):
        mixer(torch.zeros(BATCH, LENGTH, WIDTH, dtype=torch.int64))


def test_wrong_options_are_refused(name):
    with pytest.raises(ValueError, match="no option 'no_such_option'"):
        architectures.create(name, d_model=WIDTH, no_such_option=1)
    with pytest.raises(ValueError, match="d_model"):
        architectures.create(name, d_model=0)
    with pytest.raises(ValueError, match="d_model"):
        architectures.create(name, d_model="64")
    with pytest.raises(ValueError, match="backend"):
        architectures.create(name, d_model=WIDTH, backend="no_such_backend")


# What an option may not be, by its type; where one of these is allowed, the mixer must work with it.
SUSPECTS = {int: (0, -1), float: (0.0, -1.0, float("nan"), float("inf"))}


def attempt(name, **options):
    """The mixer, or None and what its constructor says against the options."""
    try:
        return build(name, **options), ""
    except ValueError as error:
        return None, str(error)


@torch.no_grad()
def test_every_number_is_refused_by_name_or_works(name):
    x, unexplained, working = inputs(), [], []
    for option, told in architectures.describe(name).options.items():
        kinds = typing.get_args(told.annotation) or (told.annotation,)
        for value in (suspect for kind in kinds for suspect in SUSPECTS.get(kind, ())):
            mixer, complaint = attempt(name, **{option: value})
            if mixer is not None:
                working.append(mixer)
            elif option not in complaint or str(value) not in complaint:
                unexplained.append(f"{option}={value}: {complaint}")
    assert unexplained == []
    for mixer in working:
        assert_close(unroll(mixer, x, mixer.init_state(BATCH, LENGTH))[0], mixer(x), 1e-9)


def test_a_state_of_another_architecture_is_refused(name):
    mixer = architectures.create(name, d_model=WIDTH)
    for other in set(NAMES) - {name}:
        with pytest.raises(ValueError, match="expects a state of type"):
            mixer.step(torch.zeros(BATCH, WIDTH), architectures.create(other, d_model=WIDTH).init_state(BATCH, LENGTH))


def test_described(name):
    told = architectures.describe(name)
    assert told.summary.endswith((".", ":"))
    assert told.paper
    assert told.options["d_model"].default is ...
    assert sum(told.state.values()) > 0
    assert told.backends[-1] == "reference"
    source = Path(inspect.getsourcefile(registry.get(name).cls)).name
    assert source == f"{name}.py"


def test_fits_mqar(name):
    """Two layers overfit one small batch of associative recall."""
    torch.manual_seed(0)
    vocab, pairs, d_model = 16, 2, 32
    keys = torch.stack([torch.randperm(7)[:pairs] + 1 for _ in range(16)])
    values = torch.randint(8, vocab, (16, pairs))
    tokens = torch.stack([keys, values], -1).flatten(1)
    order = torch.stack([torch.randperm(pairs) for _ in range(16)])
    tokens = torch.cat([tokens, keys.gather(1, order)], 1)
    labels = values.gather(1, order)
    embed, head = nn.Embedding(vocab, d_model), nn.Linear(d_model, vocab)
    norms = [nn.LayerNorm(d_model) for _ in range(3)]
    mixers = [architectures.create("base_conv", d_model=d_model), architectures.create(name, d_model=d_model)]
    modules = nn.ModuleList([embed, head, *norms, *mixers])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        x = embed(tokens)
        for norm, mixer in zip(norms, mixers):
            x = x + mixer(norm(x))
        logits = head(norms[-1](x))[:, 2 * pairs :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert (logits.argmax(-1) == labels).float().mean() == 1.0
