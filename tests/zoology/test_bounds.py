"""What decoding must move and multiply, against counts by hand and for every registered architecture."""

import pytest
import torch

import architectures
from architectures.mixer import count_bytes, state_tensors
from zoology import presets
from zoology.bounds import LayerWork, ModelWork, Moved, element_sizes
from zoology.config import ModelConfig, layer
from zoology.model import LanguageModel

D = 16


def config(*layers, **options):
    return ModelConfig(vocab_size=64, d_model=D, layers=list(layers), channel_mixer="none", **options)


def work(name, **options):
    return LayerWork(config(layer(name, **options), n_layers=1), 0)


def test_attention_by_hand():
    """Four projections, and two products with as many keys and values as there are tokens."""
    counted = work("attention", bias=False)
    assert counted.weights == 4 * D * D + 2 * D  # the norm has a weight and a bias
    assert counted.read(100) == {"keys": 100 * D, "values": 100 * D, "position": 0}
    assert counted.written(100) == {"keys": D, "values": D, "position": 0}
    assert [counted.operations(p) for p in (2, 10, 1000)] == [8 * D * D + 4 * p * D for p in (2, 10, 1000)]


def test_a_window_is_read_as_far_as_it_is_filled():
    counted = work("sliding_window", window=24, bias=False)
    assert [counted.read(p)["window_k"] for p in (8, 24, 1000)] == [8 * D, 24 * D, 24 * D]
    assert counted.written(1000) == {"window_k": D, "window_v": D, "position": 0}


def test_a_recurrent_state_is_read_and_written_whole():
    counted = work("based", feature_dim=4)
    features = 1 + 4 + 10
    assert counted.read(7) == counted.read(7000) == counted.written(70) == {"kv": features * D, "key_sum": features}
    tail = work("base_conv", kernel_size=3)
    assert tail.read(9) == tail.written(9) == {"conv": 2 * D}


def test_what_a_step_writes_may_grow():
    """Inputs move along the tail of a long convolution, as many as there were."""
    assert [sum(work("long_conv").written(p).values()) for p in (1, 9, 64, 300)] == [D, 9 * D, 64 * D, 300 * D]


def test_a_prefix_costs_its_own_projections():
    """Keys and values of the prefix are projections that a step never reads, and a sum that one step does as well."""
    causal, prefix = work("based", feature_dim=4), work("prefix_linear_attention", feature_dim=4)
    assert (prefix.weights, prefix.written(9)) == (causal.weights, causal.written(9))
    assert prefix.prefix_weights == D * 4 + D * D
    assert prefix.prefix_operations >= 2 * prefix.prefix_weights + 2 * 15 * D
    assert (causal.prefix_weights, causal.prefix_operations) == (0, 0)


def test_what_a_batch_shares_is_not_counted_for_each_sequence():
    """The filters of a long convolution depend on weights alone."""
    one, many = (work("long_conv").operations(p) for p in (10, 500))
    assert one == many == 2 * D * D


@pytest.mark.parametrize("name", architectures.names())
def test_every_architecture_can_be_counted(name):
    counted = work(name)
    mixer = counted.block.mixer
    assert counted.read(50) == mixer.state_fields(50)
    assert 0 < sum(counted.written(50).values()) <= sum(counted.read(50).values())
    assert counted.operations(40) >= 2 * D * D
    named = sum(parameter.numel() for parameter in counted.block.parameters())
    assert counted.weights + counted.prefix_weights == named


@torch.no_grad()
def test_a_model_is_the_sum_of_its_layers():
    shape = config(layer("base_conv"), layer("attention", bias=False), n_layers=4)
    model, counted = LanguageModel(shape).eval(), ModelWork(shape)
    _, state = model.prefill(torch.zeros(3, 10, dtype=torch.int64), model.init_state(3, 10))
    sizes = element_sizes(state.layers)
    moved = counted.step(3, 10, 4, sizes)
    final_norm = sum(parameter.numel() for parameter in model.norm.parameters())
    assert moved.weight_bytes == 4 * (model.num_parameters() - final_norm)
    assert moved.state_bytes_read == sum(count_bytes(tensor) for _, tensor in state_tensors(state.layers))
    assert moved.state_bytes_written == 3 * 2 * 4 * (2 * D + 2 * D)
    linears = 2 * (2 * D * D + 8 * D * D)
    assert moved.operations == 3 * (linears + 2 * 4 * 10 * D + 2 * 64 * D)
    assert list(counted.layers) == [0, 1]


@pytest.mark.parametrize("window", [8, 12])
def test_prefill_is_the_sum_of_its_steps_with_one_head(window):
    shape = config(layer("attention", bias=False), layer("sliding_window", window=window, bias=False))
    counted, sizes = ModelWork(shape), dict.fromkeys(("0.keys", "0.values", "0.position"), 2)
    sizes |= dict.fromkeys(("1.window_k", "1.window_v", "1.position"), 2)
    head = 2 * 64 * D
    for length in (1, 2, 5, 8, 33):
        steps = [counted.step(1, position, 2, sizes).operations - head for position in range(1, length + 1)]
        moved = counted.prefill(4, length, 2, sizes)
        assert moved.operations == 4 * (sum(steps) + head)
        assert moved.state_bytes_written == 4 * counted.step(1, length, 2, sizes).state_bytes_read
        assert moved.state_bytes_read == 0


def test_a_prefix_adds_to_prefill():
    shape = config(layer("prefix_linear_attention"), n_layers=1)
    counted = ModelWork(shape)
    sizes = dict.fromkeys(("0.kv", "0.key_sum"), 4)
    causal, prefix = (counted.prefill(2, 32, 4, sizes, length) for length in (0, 32))
    added = counted.layers[0]
    assert prefix.operations - causal.operations == 2 * 32 * added.prefix_operations
    assert prefix.weight_bytes - causal.weight_bytes == 4 * added.prefix_weights


def test_the_longer_time_is_the_bound():
    moved = Moved(weight_bytes=6e9, state_bytes_read=3e9, state_bytes_written=1e9, operations=4e12)
    ceilings = {"copy": 1e12, "bf16": 1e15, "fp32": 1e14}
    assert moved.milliseconds(ceilings, "bf16") == {"bandwidth_ms": 10.0, "operations_ms": 4.0, "ms": 10.0}
    assert moved.milliseconds(ceilings, "fp32")["ms"] == 40.0


def test_the_sizes_of_elements_are_those_of_the_live_state():
    mixer = architectures.create("mamba", d_model=D)
    state = mixer.init_state(1, 4, dtype=torch.bfloat16)
    assert element_sizes((state,)) == {f"0.{name}": tensor.element_size() for name, tensor in state_tensors(state)}


def test_the_cache_of_the_attention_preset():
    """36 layers of 24 heads of 70, each kept as 72: what a decode step at batch 128 has to read."""
    shape = presets.config("attention-1.3b")
    counted = ModelWork(shape)
    sizes = {f"{i}.{name}": 2 for i in range(36) for name in ("keys", "values", "position")}
    moved = counted.step(128, 1000, 2, sizes)
    assert moved.state_bytes_read == 128 * 36 * 2 * 1000 * 24 * 72 * 2
    assert moved.weight_bytes == pytest.approx(2 * 1.3e9, rel=0.02)
