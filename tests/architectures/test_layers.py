"""Parts that several architectures share."""

import pytest
import torch

from architectures.layers import rotary


@pytest.mark.parametrize("rows", [None, 4000])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary_turns_pairs_by_their_angles(fraction, rows):
    """As rotations of complex numbers, in float64; looked-up angles are those rounded once."""
    gen = torch.Generator().manual_seed(0)
    x, positions = torch.randn(2, 5, 3, 16, generator=gen), torch.tensor([0, 1, 17, 1000, 3999])
    width = int(16 * fraction)
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    pairs = torch.complex(x[..., : width // 2].double(), x[..., width // 2 : width].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat([turned.real, turned.imag, x[..., width:].double()], dim=-1)
    assert torch.allclose(rotary(x.double(), positions, fraction=fraction, rows=rows), expected, atol=1e-10)
    tolerance = 1e-6 if rows else 2e-3  # an angle of 4,000 in float32
    assert float((rotary(x, positions, fraction=fraction, rows=rows) - expected).abs().max()) < tolerance


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="needs an even width, got 3 of head_dim 6"):
        rotary(torch.zeros(1, 1, 1, 6), torch.zeros(1), fraction=0.5)
