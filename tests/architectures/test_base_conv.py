"""Base convolution against PyTorch's convolution, weights copied over, in the form of either paper; its memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import architectures

D_MODEL, LENGTH = 6, 15


def torch_convolution(conv, x):
    """`nn.Conv1d` with the weights of a ShortConvolution, its newest tap first, on x [B, T, D]."""
    channels, size = conv.weight.shape
    oracle = nn.Conv1d(channels, channels, size, groups=channels, padding=size - 1, bias=conv.bias is not None).double()
    oracle.weight.copy_(conv.weight.flip(-1).unsqueeze(1))
    if conv.bias is not None:
        oracle.bias.copy_(conv.bias)
    return oracle(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3, 20])
def test_the_residual_form(kernel_size, bias):
    """y = conv(x) * (W x + b) + x."""
    torch.manual_seed(0)
    mixer = architectures.create("base_conv", D_MODEL, kernel_size=kernel_size, bias=bias).double()
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    wanted = torch_convolution(mixer.conv, x) * mixer.projection(x) + x
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_form_of_the_language_models():
    """(u, g) = W_i x, y = W_o (silu(conv(u)) * g)."""
    torch.manual_seed(0)
    mixer = architectures.create("base_conv", D_MODEL, expand=4).double()
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    u, g = mixer.in_proj(x).split(2 * D_MODEL, dim=-1)
    wanted = mixer.out_proj(F.silu(torch_convolution(mixer.conv, u)) * g)
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_memory_is_one_input_short_of_the_published_count(kernel_size):
    """The papers count kernel_size D elements: the current token is in hand, and is not carried."""
    assert architectures.create("base_conv", 64, kernel_size=kernel_size).state_size(1024) == 64 * kernel_size - 64
    expanded = architectures.create("base_conv", 64, kernel_size=kernel_size, expand=4)
    assert expanded.state_size(1024) == 128 * (kernel_size - 1)
