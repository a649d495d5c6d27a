"""Blocks as decode steps run them: the same numbers, one product for one input, and nothing else changed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from architectures import SequenceMixer, register, registry
from architectures.mixer import clone_state
from zoology import step_layers
from zoology.config import ModelConfig, layer
from zoology.generation import Decoder
from zoology.model import LanguageModel
from zoology.step_layers import Columns, Joined, LastLinear, Rest, StepBlock, StepLinear, add_norm, rest_of, total


def build(spec, **options):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=32, d_model=16, layers=(spec,), n_layers=1, init_std=0.3, **options)
    return LanguageModel(config).double().eval().requires_grad_(False).blocks[0]


def states(block):
    empty = block.mixer.init_state(3, 8)
    return empty, clone_state(empty)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (layer("based", num_heads=2, feature_dim=4), [8, 8, 16]),
        (layer("prefix_linear_attention", num_heads=2, feature_dim=4), [8, 8, 16]),
        (layer("attention", num_heads=2), None),
        (layer("mamba"), None),
        (layer("base_conv"), None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_step_is_that_of_the_block(spec, sizes):
    block = build(spec)
    step = StepBlock(block, block.mixer.init_state(1, 2), 3)
    assert (step.joined.sizes if step.joined else None) == sizes
    one, other = states(block)
    for x in torch.randn(4, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        same, rest, one = step.mix(x, step.no_rest(x), one)
        expected, other = block.mixer.step(block.norm(x), other)
        assert torch.equal(same, x)
        assert torch.allclose(total(rest.parts, rest.bias), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("channel_mixer", ["none", "mlp", "swiglu"])
def test_sums_in_parts_are_the_whole_sum(monkeypatch, channel_mixer, num_parts):
    """Of every product whose sum can be divided: logits of decode steps, joined layers and pending sums among them."""
    monkeypatch.setattr(step_layers, "choose_num_parts", lambda rows, n, d, *_: num_parts if d % num_parts == 0 else 1)
    divided = []
    product = step_layers.product_in_parts
    monkeypatch.setattr(step_layers, "product_in_parts", lambda *a: divided.append(a[2]) or product(*a))
    torch.manual_seed(0)
    layers = tuple(layer(name) for name in ("based", "mamba", "attention"))
    options = {"vocab_size": 32, "d_model": 16, "init_std": 0.3, "channel_mixer": channel_mixer}
    model = LanguageModel(ModelConfig(layers=layers, n_layers=3, **options)).double().eval().requires_grad_(False)
    tokens = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))
    decoder, found = Decoder(model, 3, 7), []
    for token in tokens.T:
        decoder.decode(token, 1)
        found.append(decoder.logits)
    assert torch.allclose(torch.stack(found, 1), model(tokens), rtol=1e-9, atol=1e-12)
    # In a step: out; in, x and out; qkv and out; two of every channel mixer. Joined layers are one product as it is.
    assert divided == [num_parts] * 7 * (6 + (0 if channel_mixer == "none" else 6))


def test_a_rest_is_rounded_once():
    x, parts, bias = torch.ones(2, 3).bfloat16(), torch.full((4, 2, 3), 2.0**-9), torch.full((3,), 2.0**-9).bfloat16()
    whole = 1 + 5 * 2.0**-9
    for norm in (nn.LayerNorm(3).bfloat16(), nn.RMSNorm(3).bfloat16()):
        found, normed = add_norm(norm, x, Rest(parts, bias))
        assert torch.equal(found, torch.full((2, 3), whole).bfloat16())
        assert torch.equal(normed, norm(found))
        assert torch.equal(add_norm(norm, x, Rest(x[None]))[0], 2 * x)


def test_the_model_keeps_its_layers_and_shares_its_weights():
    block = build(layer("based"), channel_mixer="swiglu")
    step = StepBlock(block, block.mixer.init_state(1, 2), 3)
    assert {type(module) for name, module in block.named_modules() if name.endswith(("proj", "fc1"))} == {nn.Linear}
    assert type(step.mixer.q_proj) is Columns
    assert (type(step.channel_mixer.fc1), type(step.channel_mixer.fc2)) == (StepLinear, LastLinear)
    assert step.mixer.out_proj is step.last
    shared = {id(parameter) for parameter in block.parameters()}
    assert {id(parameter) for parameter in step.parameters()} == shared


def test_an_output_that_is_not_of_the_last_layer_is_refused():
    last, x = LastLinear(nn.Linear(4, 3), 2), torch.randn(2, 4)
    assert torch.allclose(rest_of(last(x), last).parts[0], F.linear(x, last.weight, last.bias))
    y = last(x)
    with pytest.raises(RuntimeError, match="a mixer's step ends otherwise than it did when it was looked at"):
        rest_of(y + 1, last)


def test_weights_that_changed_are_copied_again():
    layers = [nn.Linear(4, 3), nn.Linear(4, 5)]
    joined, x = Joined(layers), torch.randn(2, 4)

    def outputs():
        joined.read(x)
        return joined.outputs

    with torch.no_grad():
        before = [output.clone() for output in outputs()]
        for one in layers:
            one.weight.mul_(2)
            one.bias.add_(1)
        assert all(torch.equal(old, new) for old, new in zip(before, outputs()))
        joined.refresh()
        for one, output in zip(layers, outputs()):
            assert torch.allclose(output, one(x), rtol=1e-6, atol=1e-6)


class Odd(SequenceMixer):
    """Two layers that read the input, one with a bias, one that reads what another gives, weights read by name."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.one, self.two = nn.Linear(d_model, d_model, bias=False), nn.Linear(d_model, 2 * d_model, bias=False)
        self.biased, self.after = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        return registry.get("base_conv").cls(self.d_model).init_state(batch_size, max_seq_len, dtype=torch.float64)

    def step(self, x, state):
        y = self.one(x) * self.two(x[:, None])[:, 0, : self.two.in_features] + self.biased(x) * self.one.weight.sum()
        return self.after(y + self.one(y)), state


class PerHead(Odd):
    """Two layers that all heads share: they read the input in pieces."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.one, self.two = (nn.Linear(d_model // 4, d_model // 4, bias=False) for _ in range(2))

    def step(self, x, state):
        heads = x.unflatten(-1, (4, -1))
        return self.after((torch.sigmoid(self.one(heads)) * self.two(heads)).flatten(1)), state


@pytest.mark.parametrize("mixer", [Odd, PerHead])
def test_layers_of_another_input_stay_apart(mixer):
    """In `Odd` `one` is called twice, the second time with something else: then it cannot be read ahead."""
    register("odd", paper="none")(mixer)
    try:
        block = build(layer("odd"))
        step = StepBlock(block, block.mixer.init_state(1, 2), 3)
        x = torch.randn(3, 16, dtype=torch.float64)
        assert step.joined is None
        assert step.last.weight is block.mixer.after.weight
        _, rest, _ = step.mix(x, step.no_rest(x), None)
        expected, _ = block.mixer.step(block.norm(x), None)
        assert torch.allclose(total(rest.parts, rest.bias), expected, rtol=1e-12, atol=1e-14)
    finally:
        registry._entries.pop("odd")


@pytest.mark.gpu
@pytest.mark.parametrize("num_parts", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_on_the_device(dtype, num_parts):
    """Rounded each and added up, they are no further from float64 than twice the whole product; also of rows apart."""
    gen = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*size, generator=gen).to("cuda", dtype) for size in ((130, 2 * 3584), (1792, 3584), (1792,))
    )
    for rows in (x[:128, :3584], x[1:3, 3584:]):
        exact = rows.double() @ weight.double().T + bias.double()
        parts = step_layers.product_in_parts(rows, weight, num_parts)
        assert (parts.dtype, tuple(parts.shape)) == (dtype, (num_parts, rows.shape[0], 1792))
        found, plain = (
            float((y.double() - exact).norm() / exact.norm())
            for y in (step_layers.total(parts, bias).to(dtype), nn.functional.linear(rows, weight, bias))
        )
        assert found <= max(2 * plain, torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_the_number_of_parts_is_tried_out_on_the_device():
    device = torch.device("cuda")
    assert step_layers.choose_num_parts(128, 1792, 3584, torch.bfloat16, device) in (1, *step_layers.NUM_PARTS)
    assert step_layers.choose_num_parts(128, 1792, 3584, torch.float32, device) == 1
    assert step_layers.choose_num_parts(128, 64, 30, torch.bfloat16, device) == 1
