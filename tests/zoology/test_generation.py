"""Generation in static states: the parallel form's logits whatever the chunks, the same tokens, and clear refusals."""

import copy
from typing import NamedTuple

import pytest
import torch

import zoology.graphs
from architectures import SequenceMixer, register, registry
from architectures.mixer import clone_state, state_tensors
from zoology import generation, presets
from zoology.config import ModelConfig, layer
from zoology.generation import Decoder, DoesNotFit
from zoology.model import LanguageModel

EXPANDED = layer("base_conv", expand=4)
BASED = layer("based", num_heads=2, feature_dim=4)
WINDOW = layer("sliding_window", window=5, num_heads=2, rotary_fraction=0.5)
ATTENTION = layer("attention", num_heads=2, rotary_fraction=0.5)
PREFIX = layer("prefix_linear_attention", num_heads=2, feature_dim=4)


def build(*layers, seed=0, **options):
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=32, d_model=16, layers=layers, n_layers=len(layers), init_std=0.3, **options)
    return LanguageModel(config).double().eval().requires_grad_(False)


def draw(batch, length, seed=0):
    return torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(seed))


def decoded_logits(decoder, tokens, prompt, prefix_length=0):
    """Logits after tokens prompt - 1 .. of a text that is given, [B, T - prompt + 1, V]."""
    found = [decoder.prefill(tokens[:, :prompt], prefix_length)]
    for t in range(prompt, tokens.shape[1]):
        decoder.decode(tokens[:, t], 1)
        found.append(decoder.logits.clone())  # a recorded step writes into the same memory again
    return torch.stack(found, 1)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, None])
@pytest.mark.parametrize(
    "layers",
    [(EXPANDED, BASED, WINDOW), (ATTENTION, layer("mamba")), (layer("base_conv"), layer("hyena"), layer("rwkv4"))],
    ids=["based", "attention-mamba", "others"],
)
def test_decoding_is_the_parallel_form_whatever_the_chunks(layers, chunk_size):
    model, tokens = build(*layers, norm="rmsnorm", channel_mixer="swiglu"), draw(3, 24)
    decoder = Decoder(model, 3, 24, chunk_size=chunk_size)
    actual, expected = decoded_logits(decoder, tokens, 17), model(tokens)[:, 16:]
    assert torch.allclose(actual, expected, rtol=1e-8, atol=1e-11)
    assert int(decoder.position) == decoder.seen == 24


@pytest.mark.parametrize("chunk_size", [2, 9, None])
def test_a_prefix_is_read_whole_with_the_first_chunk(chunk_size):
    model, tokens = build(EXPANDED, PREFIX), draw(2, 20)
    expected = model(tokens, prefix_length=6)[:, 12:]
    actual = decoded_logits(Decoder(model, 2, 20, chunk_size=chunk_size), tokens, 13, 6)
    assert torch.allclose(actual, expected, rtol=1e-8, atol=1e-11)
    assert not torch.allclose(actual, model(tokens)[:, 12:], rtol=1e-3)


def test_decoding_goes_on_with_weights_that_changed_meanwhile():
    model, tokens = build(BASED, channel_mixer="swiglu"), draw(3, 8)  # whose projections are joined
    decoder = Decoder(model, 3, 8)
    before = decoded_logits(decoder, tokens, 5)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    decoder.reset()
    expected = model(tokens)[:, 4:]
    assert torch.allclose(decoded_logits(decoder, tokens, 5), expected, rtol=1e-8, atol=1e-11)
    assert not torch.allclose(before, expected, rtol=1e-3)


def test_wide_heads_are_cached_in_multiples_of_8():
    torch.manual_seed(0)
    layers = tuple(layer(name, num_heads=2, rotary_fraction=36 / 70) for name in ("attention", "sliding_window"))
    config = ModelConfig(vocab_size=32, d_model=140, layers=layers)
    model, tokens = LanguageModel(config).double().eval(), draw(2, 20)
    assert [count for count in model.state_fields(64).values() if count] == [64 * 2 * 72] * 4
    actual = decoded_logits(Decoder(model, 2, 20, chunk_size=5), tokens, 12)
    assert torch.allclose(actual, model(tokens)[:, 11:], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_learned_positions_and_other_shells(norm):
    model, tokens = build(BASED, norm=norm, channel_mixer="none", max_positions=16), draw(2, 16)
    actual = decoded_logits(Decoder(model, 2, 16, chunk_size=3), tokens, 7)
    assert torch.allclose(actual, model(tokens)[:, 6:], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("new", [1, 4])
def test_a_text_may_end_one_token_after_the_last_learned_position(new):
    model, tokens = build(ATTENTION, max_positions=8), draw(2, 9 - new)
    made = model.generate(tokens, new)
    last = model(made[:, :8])[:, -1].argmax(-1)
    assert torch.equal(made[:, 8], last)
    with pytest.raises(ValueError, match="max_seq_len=9: the model has 8 learned positions"):
        model.generate(tokens, new + 1)


INTERPRETED = """
import torch

import test_generation as t

model = t.build(t.EXPANDED, t.BASED, t.WINDOW, norm="rmsnorm", channel_mixer="swiglu")
tokens = t.draw(2, 9)
exact = model(tokens)[:, 6:]
with torch.no_grad():
    plain = model.float()(tokens)[:, 6:]
    found = t.decoded_logits(t.Decoder(model, 2, 9), tokens, 7)
assert "triton" in model.blocks[2].mixer.backends_used()
error, allowed = (float((one.double() - exact).norm() / exact.norm()) for one in (found, plain))
assert error <= 2 * allowed, (error, allowed)
print("same")
"""


def test_steps_by_the_kernels_of_a_gpu_interpreted(run_interpreted):
    """Norms, activations, convolutions and windows that wrap around are Triton's: no further off than plain float32."""
    run_interpreted(INTERPRETED)


def argmax_loop(model, tokens, new):
    for _ in range(new):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


def test_greedy_is_the_argmax_loop_over_several_turns():
    model, first, second = build(EXPANDED, BASED, WINDOW, ATTENTION), draw(3, 9), draw(3, 6, seed=1)
    decoder = Decoder(model, 3, 40, chunk_size=4)
    text = argmax_loop(model, first, 5)
    start = decoder.pick(decoder.prefill(first))
    assert torch.equal(torch.cat([first, start[:, None], decoder.decode(start, 4)], 1), text)
    # The last token was picked but not read yet.
    text = torch.cat([text, second], 1)
    start = decoder.pick(decoder.prefill(text[:, 13:]))
    assert torch.equal(torch.cat([text, start[:, None], decoder.decode(start, 7)], 1), argmax_loop(model, text, 8))


def test_states_stay_where_they_are_and_are_all_there_is():
    model = build(EXPANDED, BASED, WINDOW, ATTENTION, layer("mamba"))
    decoder = Decoder(model, 3, 24)
    at = [tensor.data_ptr() for _, tensor in state_tensors(decoder.state)]
    decoder.decode(decoder.pick(decoder.prefill(draw(3, 10))), 12)
    assert [tensor.data_ptr() for _, tensor in state_tensors(decoder.state)] == at
    assert decoder.state_bytes() == 3 * model.state_bytes(24)


@pytest.mark.parametrize("layers", [(EXPANDED, BASED, ATTENTION), (layer("rwkv4"), layer("hyena"))])
def test_reset_forgets_everything(layers):
    model, tokens = build(*layers), draw(2, 11)
    decoder = Decoder(model, 2, 20)
    decoder.decode(draw(2, 1, seed=9)[:, 0], 20)
    decoder.reset()
    assert torch.equal(decoded_logits(decoder, tokens, 6), decoded_logits(Decoder(model, 2, 20), tokens, 6))


def test_draws_follow_the_seed():
    model, tokens = build(EXPANDED, ATTENTION), draw(64, 5)

    def texts(*seeds, temperature=1.0):
        decoder = Decoder(model, 64, 12)
        for seed in seeds:
            decoder.reset()
            decoder.prefill(tokens)
            yield decoder.decode(tokens[:, -1], 7, temperature=temperature, seed=seed)

    one, same, other, onwards = texts(5, 5, 6, None)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(other, onwards)
    assert torch.equal(*texts(1, temperature=1e-9), *texts(2, temperature=0.0))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_have_the_probabilities_of_the_softmax(temperature):
    count, logits = 40_000, torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0])
    generator = torch.Generator().manual_seed(0)
    drawn = generation.scores(logits.expand(count, -1), torch.tensor(temperature), generator).argmax(-1)
    expected = torch.softmax(logits / temperature, -1)
    found = torch.bincount(drawn, minlength=5) / count
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / count).sqrt()).all()


# -- a user's own mixers ---------------------------------------------------------------------------------------


class Summed(NamedTuple):
    total: torch.Tensor  # [B, D]
    position: torch.Tensor  # [], tokens seen


class Mean(SequenceMixer):
    """The mean of the inputs so far: `step` alone, new tensors every time."""

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        like = self.like_parameters(device, dtype)
        return Summed(torch.zeros(batch_size, self.d_model, **like), torch.zeros((), dtype=torch.int64, device=device))

    def like_parameters(self, device=None, dtype=None):
        return {"device": device, "dtype": dtype or torch.float64}

    def step(self, x, state):
        state = Summed(state.total + x, state.position + 1)
        return state.total / state.position, state


class EveryOther(Mean):
    """Reads every other token only: its 0-d integer is no number of tokens."""

    def step(self, x, state):
        total = torch.where(state.position == 0, state.total + x, state.total)
        return total, Summed(total, (state.position + 1) % 2)


class CountsInPlace(Mean):
    """Writes into its own counter."""

    def step(self, x, state):
        state.total.add_(x)
        state.position.add_(1)
        return state.total / state.position, state


class Branches(Mean):
    """What no compiler can trace."""

    def step(self, x, state):
        scale = 1.0 if float(x[0, 0]) > 0 else 2.0
        y, state = super().step(x, state)
        return scale * y, state


class Waits(Mean):
    """What no graph can hold: it asks the device for a number."""

    def step(self, x, state):
        float(x.sum())
        return super().step(x, state)


OWN = {
    "own_waits": Waits,
    "own_mean": Mean,
    "own_every_other": EveryOther,
    "own_counter": CountsInPlace,
    "own_branches": Branches,
}


@pytest.fixture
def own_mixers():
    for name, cls in OWN.items():
        register(name, paper="none")(cls)
    yield
    for name in OWN:
        registry._entries.pop(name)


@pytest.mark.parametrize("names", [("own_mean", "own_mean"), ("own_every_other", "own_mean"), ("own_counter",) * 2])
def test_a_users_mixer_gets_it_for_free(own_mixers, names):
    model, tokens = build(*(layer(name) for name in names)), draw(3, 15)
    decoder = Decoder(model, 3, 15, chunk_size=4)
    assert torch.allclose(decoded_logits(decoder, tokens, 7), model(tokens)[:, 6:], rtol=1e-9, atol=1e-12)
    assert torch.equal(model.generate(tokens[:, :7], 5), argmax_loop(model, tokens[:, :7], 5))


class Replayed:
    """In place of a CUDA graph: runs what was recorded, whose result lies where the first run left it."""

    def __init__(self, run):
        self.run, self.result = run, run()

    def replay(self):
        self.result.copy_(self.run())


def test_a_chunk_is_recorded_once_two_of_its_shape_were_read(monkeypatch):
    model, tokens, recorded = build(EXPANDED, BASED, ATTENTION), draw(2, 21), []

    def record(decoder, run, generator=None):
        before = clone_state(decoder.state)
        graph = Replayed(run)
        for (_, tensor), (_, old) in zip(state_tensors(decoder.state), state_tensors(before)):
            tensor.copy_(old)  # recording runs nothing
        recorded.append(graph)
        return graph, graph.result

    decoder = Decoder(model, 2, 21, chunk_size=4)
    decoder.record_prompts = True
    monkeypatch.setattr(Decoder, "_record", record)
    counts = []
    for _ in range(4):
        decoder.reset()
        actual = decoded_logits(decoder, tokens, 18)
        assert torch.allclose(actual, model(tokens)[:, 17:], rtol=1e-8, atol=1e-11)
        counts.append(len(recorded))
    # Chunks of 4 on an empty state, three times 4 behind it, and 2: the middle ones come often enough in one prompt.
    assert counts == [1, 1, 3, 3]


# -- compiled --------------------------------------------------------------------------------------------------


def compile_with(monkeypatch, backend):
    original = zoology.graphs.compile_apart

    def compile_apart(function, options=None, *, dynamic):
        return original(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(zoology.graphs, "compile_apart", compile_apart)


def test_a_step_is_one_graph_for_all_layers_of_a_kind(monkeypatch):
    """Traced whole, as the compiler needs it, and not again for the second layer of a kind."""
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return graph

    compile_with(monkeypatch, count)
    model, tokens = build(EXPANDED, WINDOW, ATTENTION, EXPANDED, norm="rmsnorm"), draw(2, 14)
    decoder = Decoder(model, 2, 14, compiled=True)
    for prompt in (9, 11):
        decoder.reset()
        actual = decoded_logits(decoder, tokens, prompt)
        assert torch.allclose(actual, model(tokens)[:, prompt - 1 :], rtol=1e-9, atol=1e-12)
    # Steps, chunks of any length, and the head.
    assert len(traced) == 3 + 3 + 1


@pytest.mark.parametrize(("compiled", "count"), [(True, 2), (False, 1)])
def test_steps_and_prompts_are_compiled_by_themselves(monkeypatch, compiled, count):
    """Steps and the head without prompts, or prompts alone."""
    traced = []
    compile_with(monkeypatch, lambda graph, inputs: traced.append(graph) or graph)
    model, tokens = build(BASED, BASED), draw(2, 9)
    decoder = Decoder(model, 2, 9, compiled=compiled, compile_prompts=not compiled)
    assert torch.allclose(decoded_logits(decoder, tokens, 5), model(tokens)[:, 4:], rtol=1e-9, atol=1e-12)
    assert len(traced) == count


def test_joined_projections_are_in_that_graph_too(monkeypatch):
    traced = []
    compile_with(monkeypatch, lambda graph, inputs: traced.append(graph) or graph)
    model, tokens = build(BASED, BASED), draw(2, 6)
    decoder, found = Decoder(model, 2, 6, compiled=True), []
    for token in tokens.T:
        decoder.decode(token, 1)
        found.append(decoder.logits)
    assert torch.allclose(torch.stack(found, 1), model(tokens), rtol=1e-9, atol=1e-12)
    assert len(traced) == 2  # the step of a layer, and the head
    assert [block.joined.sizes for block in decoder._steps] == [[8, 8, 16]] * 2


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(own_mixers, caplog, monkeypatch):
    compile_with(monkeypatch, "eager")
    model, tokens = build(layer("own_branches")), draw(2, 9)
    decoder = Decoder(model, 2, 9, compiled=True)
    with caplog.at_level("WARNING", logger="zoology"):
        actual = decoded_logits(decoder, tokens, 5)
    assert torch.allclose(actual, model(tokens)[:, 4:], rtol=1e-9, atol=1e-12)
    assert "a step of own_branches runs uncompiled" in caplog.text


# -- refusals --------------------------------------------------------------------------------------------------


def test_needs_are_counted():
    model = build(EXPANDED, BASED, ATTENTION)
    needs = generation.memory_needed(model.config, 6, 100, 10, torch.float64)
    assert needs.states == 6 * model.state_bytes(100)
    assert needs.weights == 8 * model.num_parameters()
    assert needs.total == needs.weights + needs.states + needs.activations + needs.logits
    assert needs.logits == 6 * 32 * 8  # in float32, and what is drawn from them
    assert generation.memory_needed(model.config, 6, 100, 10, torch.float64, weights=False).weights == 0


@pytest.mark.parametrize(("mixer", "widths"), [("none", 24), ("mlp", 24 + 2 * 4), ("swiglu", 24 + 3 * 4)])
def test_what_a_chunk_keeps_grows_with_the_channel_mixer(mixer, widths):
    config = build(BASED, channel_mixer=mixer, channel_expand=4).config
    found = [generation.memory_needed(config, 6, 100, tokens, torch.float64).activations for tokens in (0, 1, 10)]
    assert found == [6 * tokens * widths * 16 * 8 for tokens in (1, 1, 10)]


def test_what_cannot_fit_is_refused_before_it_is_allocated(monkeypatch):
    model = build(ATTENTION)
    states = 4 * model.state_bytes(1 << 40)
    monkeypatch.setattr(generation, "available_memory", lambda device: 12_345)
    with pytest.raises(DoesNotFit, match="12,345 bytes are available on cpu") as refused:
        Decoder(model, 4, 1 << 40)
    assert refused.value.needed > states
    assert refused.value.available == 12_345
    with pytest.raises(ValueError, match=f"batch_size=4, max_seq_len=64 needs {refused_total(model):,} bytes"):
        generation.check_memory(model.config, 4, 64, 8, "cpu", dtype=torch.float64)


def refused_total(model):
    return generation.memory_needed(model.config, 4, 64, 8, torch.float64).total


def test_a_chunk_that_cannot_fit_is_refused(monkeypatch):
    model = build(ATTENTION)
    decoder = Decoder(model, 4, 64, chunk_size=32)
    monkeypatch.setattr(generation, "available_memory", lambda device: 1000)
    with pytest.raises(DoesNotFit, match=r"prefill of 4 x 32 tokens at once needs about .* lower chunk_size"):
        decoder.prefill(draw(4, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be a whole number >= 1"),
        ({"max_seq_len": 0}, "max_seq_len=0: must be a whole number >= 1"),
        ({"chunk_size": 0}, "chunk_size=0: must be a whole number >= 1, or None"),
        ({"graphs": True}, "graphs=True: needs a CUDA device, the model is on cpu"),
        ({"record_prompts": True}, "record_prompts=True: needs a CUDA device, the model is on cpu"),
        ({"graphs": "yes"}, "graphs='yes': must be True, False or 'auto'"),
    ],
)
def test_bad_decoders(options, message):
    with pytest.raises(ValueError, match=message):
        Decoder(build(BASED), **({"batch_size": 2, "max_seq_len": 8} | options))


def test_bad_calls():
    decoder = Decoder(build(BASED), 2, 8)
    with pytest.raises(ValueError, match=r"tokens have shape \[3, 4\]: must be \[2, at least 1\]"):
        decoder.prefill(draw(3, 4))
    with pytest.raises(ValueError, match=r"tokens have shape \[2, 1\]: must be \[2\]"):
        decoder.decode(draw(2, 1), 3)
    with pytest.raises(ValueError, match="steps=0: must be a whole number >= 1"):
        decoder.decode(draw(2, 1)[:, 0], 0)
    with pytest.raises(ValueError, match=r"temperature=-1\.0: must be a finite number >= 0"):
        decoder.decode(draw(2, 1)[:, 0], 1, temperature=-1.0)
    decoder.prefill(draw(2, 6))
    with pytest.raises(ValueError, match="holds max_seq_len=8 tokens, 6 are in it, 3 more came"):
        decoder.decode(draw(2, 1)[:, 0], 3)


def test_bad_generation():
    model = build(BASED)
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"max_new_tokens={count!r}: must be a whole number >= 1"):
            model.generate(draw(2, 4), count)
    with pytest.raises(ValueError, match=r"tokens have shape \[2, 0\]"):
        model.generate(draw(2, 4)[:, :0], 3)


# -- on the device ---------------------------------------------------------------------------------------------

ON_DEVICE = {
    "based": {"layers": presets.config("based-360m").layers[:3], "d_model": 1024},
    "jrt": {"layers": presets.config("jrt-360m").layers[:3], "d_model": 1024},
    "mamba": {"layers": presets.config("mamba-360m").layers[:2], "d_model": 512},
    "attention": {"layers": presets.config("attention-1.3b").layers[:2], "d_model": 1680},
}


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ON_DEVICE)
def test_graphs_on_the_device(name, compiled):
    """In bfloat16 no further from float32 than the parallel form is; the recorded step is the step, token for token."""
    options = ON_DEVICE[name] | {"vocab_size": 512, "norm": "rmsnorm", "channel_mixer": "swiglu", "init_std": 0.05}
    config = ModelConfig(**options, n_layers=len(options["layers"]), embed_dropout=0.0)
    model, prefix_length = presets.build_config(config, device="cuda"), 64 if name == "jrt" else 0
    exact = copy.deepcopy(model).float()
    for block in exact.blocks:
        block.mixer.force_backend("reference")
    tokens = torch.randint(0, 512, (4, 260), generator=torch.Generator().manual_seed(0)).cuda()
    expected, parallel = exact(tokens, prefix_length), model(tokens, prefix_length)

    def error(logits):
        reference = expected[:, 219:]
        return float((logits.float() - reference).norm() / reference.norm())

    decoder = Decoder(model, 4, 320, chunk_size=80, compiled=compiled)
    # Prompts of 80 + 80 + 60 tokens: by operations twice, while they are recorded, and as replays.
    for recorded in (0, 0, 3, 3):
        decoder.reset()
        assert error(decoded_logits(decoder, tokens, 220, prefix_length)) < 1.25 * error(parallel[:, 219:])
        assert len(decoder._prompts) == recorded
    texts = []
    for graphs, temperature, seed in ((True, 0, 0), (False, 0, 0), (True, 1.0, 5), (True, 1.0, 5), (True, 1.0, 6)):
        decoder.graphs = graphs
        decoder.reset()
        decoder.prefill(tokens[:, :220], prefix_length)
        texts.append(decoder.decode(tokens[:, 220], 90, temperature=temperature, seed=seed))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[2], texts[3])
    assert not torch.equal(texts[3], texts[4])


@pytest.mark.gpu
@torch.no_grad()
def test_what_waits_for_the_device_runs_without_graphs_and_says_so(own_mixers, caplog):
    model, tokens = build(layer("own_waits")).cuda(), draw(2, 9).cuda()
    decoder = Decoder(model, 2, 9, compiled=False)
    with caplog.at_level("WARNING", logger="zoology"):
        for _ in range(3):
            decoder.reset()
            actual = decoded_logits(decoder, tokens, 5)
            assert torch.allclose(actual, model(tokens)[:, 4:], rtol=1e-9, atol=1e-12)
    assert "generation runs without CUDA graphs" in caplog.text
    assert not decoder.graphs
    assert not decoder.record_prompts
    # Who draws random numbers on the device still can, and as before.
    drawn, texts = [], []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(torch.rand(4, device="cuda"))
        texts.append(Decoder(model, 2, 9, compiled=False).decode(tokens[:, 0], 8, temperature=1.0, seed=3))
    assert torch.equal(*drawn)
    assert torch.equal(*texts)
