"""Based against the naive form of flash-linear-attention and a series written out; its published memory."""

import math

import pytest
import torch
from torch.nn import functional as F

import architectures


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 3])
def test_is_fla_naive_based(fla_naive, heads):
    torch.manual_seed(0)
    mixer = architectures.create("based", 12, feature_dim=4, num_heads=heads).double()
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    q, k, v = (
        F.linear(x, part.weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    o = fla_naive("based").naive_parallel_based(q, k, v)
    # fla adds 1e-6 to the sum of weights, which is at least 1/2 of the tokens read.
    wanted = o.transpose(1, 2).flatten(-2) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_weights_are_the_series_of_the_exponential():
    """One head, token by token: y_t = sum w v / sum w, w = 1 + s + s^2 / 2, s = q.k / sqrt(f)."""
    torch.manual_seed(1)
    mixer = architectures.create("based", 6, feature_dim=5).double()
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    q, k, v = (F.linear(x[0], part.weight) for part in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    wanted = []
    for t in range(9):
        s = [float(q[t] @ k[u]) / math.sqrt(5) for u in range(t + 1)]
        weights = [1 + value + value**2 / 2 for value in s]
        wanted.append(sum(w * v[u] for u, w in enumerate(weights)) / sum(weights))
    torch.testing.assert_close(mixer(x)[0], torch.stack(wanted) @ mixer.out_proj.weight.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("d_model", "feature_dim", "published"),
    [
        (48, 8, 9_396), (64, 8, 12_468), (128, 8, 24_756), (48, 16, 30_564), (64, 16, 40_548), (48, 24, 64_276),
        (128, 16, 80_484), (64, 24, 85_268), (128, 24, 169_236), (256, 16, 160_356), (256, 32, 579_780),
    ],
)  # fmt: skip
def test_published_memory(d_model, feature_dim, published):
    """Bytes of [base_conv, based] in the Based protocol: (V + 1) F with each pair once, and 3 D for the convolution."""
    state = architectures.create("based", d_model, feature_dim=feature_dim).state_size(1024)
    assert 4 * (state + 3 * d_model) == published
