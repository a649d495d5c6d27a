"""Attention and sliding windows against PyTorch's module and GPT-NeoX's, weights copied over; their memory."""

import pytest
import torch
from torch import nn

import architectures

D_MODEL, HEADS, LENGTH = 24, 3, 20
backends = pytest.mark.parametrize("backend", ["sdpa", "reference"])


def build(name, **options):
    torch.manual_seed(0)
    mixer = architectures.create(name, D_MODEL, num_heads=HEADS, **options).double()
    return mixer, torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)


def torch_attention(mixer, x, readable):
    """`nn.MultiheadAttention` with the weights of `mixer`; readable [T, T]."""
    oracle = nn.MultiheadAttention(D_MODEL, HEADS, bias=mixer.qkv.bias is not None, batch_first=True).double()
    oracle.in_proj_weight.copy_(mixer.qkv.weight)
    oracle.out_proj.weight.copy_(mixer.out_proj.weight)
    if mixer.qkv.bias is not None:
        oracle.in_proj_bias.copy_(mixer.qkv.bias)
        oracle.out_proj.bias.copy_(mixer.out_proj.bias)
    return oracle(x, x, x, attn_mask=~readable, need_weights=False)[0]


@torch.no_grad()
@backends
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_that_of_torch(backend, bias):
    mixer, x = build("attention", bias=bias, backend=backend)
    readable = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    torch.testing.assert_close(mixer(x), torch_attention(mixer, x, readable), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@backends
@pytest.mark.parametrize("window", [1, 2, 7, LENGTH - 1, LENGTH, 50])
def test_a_window_is_the_current_token_and_those_before(backend, window):
    mixer, x = build("sliding_window", window=window, backend=backend)
    readable = torch.tensor([[t - window < u <= t for u in range(LENGTH)] for t in range(LENGTH)])
    torch.testing.assert_close(mixer(x), torch_attention(mixer, x, readable), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rotary_attention_is_that_of_gpt_neox(fraction):
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    mixer, x = build("attention", rotary_fraction=fraction)
    config = neox.GPTNeoXConfig(
        hidden_size=D_MODEL, num_attention_heads=HEADS, attention_bias=True, attn_implementation="eager"
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction}
    oracle = neox.GPTNeoXAttention(config, layer_idx=0).double().eval()
    # There the rows of a head's q, k and v stand together.
    width = D_MODEL // HEADS
    for mine, theirs in (
        (mixer.qkv.weight, oracle.query_key_value.weight),
        (mixer.qkv.bias, oracle.query_key_value.bias),
    ):
        theirs.copy_(mine.unflatten(0, (3, HEADS, width)).transpose(0, 1).flatten(0, 2))
    oracle.dense.load_state_dict(mixer.out_proj.state_dict())
    positions = torch.arange(LENGTH)[None]
    turns = neox.GPTNeoXRotaryEmbedding(config)(x.float(), positions)
    mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected, _ = oracle(x, attention_mask=mask, position_embeddings=tuple(part.double() for part in turns))
    # The oracle's angles are float32.
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("d_model", "published"), [(64, 525_056), (128, 1_050_112)])
def test_published_memory_of_attention(d_model, published):
    """Bytes of [base_conv, attention] in the Based protocol at 1024 tokens: 2 T D, and 3 D for the base convolution."""
    assert 4 * (architectures.create("attention", d_model).state_size(1024) + 3 * d_model) == published


@pytest.mark.parametrize(
    ("window", "published"),
    [(8, 9_728), (16, 17_920), (32, 34_304), (64, 67_072), (128, 132_608), (256, 263_680), (512, 525_824)],
)
def test_published_memory_of_a_window(window, published):
    """Bytes of [base_conv, sliding_window] at width 128: 2 w D, and 3 D for the base convolution."""
    assert 4 * (architectures.create("sliding_window", 128, window=window).state_size(1024) + 3 * 128) == published
