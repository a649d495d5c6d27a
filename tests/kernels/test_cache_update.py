"""A token that joins a cache: keys turned by their angles, one slot written and no other."""

import pytest
import torch

from kernels import cache_update

# (B, S, H, K, K', turned, position)
CASES = [
    (2, 7, 3, 10, 10, 4, 3),
    (1, 5, 2, 70, 72, 36, 23),
    (3, 4, 40, 6, 8, 6, 1_000_003),
    (2, 3, 1, 5, 5, 0, 2),
]


def example(case, dtype=torch.float64, device="cpu"):
    b, s, h, k, wide, turned, position = case
    gen = torch.Generator().manual_seed(0)
    joined = torch.randn(b, 3 * h * k, generator=gen).to(device, dtype)
    q, k, v = (part.unflatten(1, (h, k)) for part in joined.chunk(3, dim=1))  # rows lie apart
    keys, values = (torch.randn(b, s, h, wide, generator=gen).to(device, dtype) for _ in "kv")
    return (q, k, v, keys, values, torch.tensor(position, device=device)), {"turned": turned, "base": 100.0}


def expected(case, q, k, v, keys, values, position):
    """Each pair of entries as a complex number, times e^(i angle), in float64."""
    _, s, _, width, wide, turned, position = case
    angles = position * 100.0 ** (-torch.arange(0, turned, 2).double() / max(turned, 1))
    q, k, v, keys, values = (x.double().cpu().clone() for x in (q, k, v, keys, values))

    def turn(x):
        half = turned // 2
        pairs = torch.complex(x[..., :half].contiguous(), x[..., half:turned].contiguous())
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        x = torch.cat([pairs.real, pairs.imag, x[..., turned:]], -1)
        return torch.nn.functional.pad(x, (0, wide - width))

    keys[:, position % s], values[:, position % s] = turn(k), torch.nn.functional.pad(v, (0, wide - width))
    return turn(q), keys, values


def check(case, dtype, device, backend):
    (q, k, v, keys, values, position), options = example(case, dtype, device)
    wanted = expected(case, q, k, v, keys, values, position)
    new_q = cache_update(q, k, v, keys, values, position, backend=backend, **options)
    eps = torch.finfo(
        dtype
    ).eps  # of the angle, up to pi, its sine and cosine, two products, their sum: entries below 4
    for actual, exact in zip((new_q, keys, values), wanted):
        assert actual.dtype == dtype
        assert torch.allclose(actual.double().cpu(), exact, rtol=eps, atol=8 * max(eps, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_reference(case, dtype):
    check(case, dtype, "cpu", "reference")


INTERPRETED = """
import torch

import test_cache_update as t

for case in t.CASES:
    t.check(case, torch.float32, "cpu", "triton")
    t.check(case, torch.bfloat16, "cpu", "triton")
print("same")
"""


def test_triton_kernel_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, (128, 128, 16, 112, 112, 56, 777), (4, 300, 24, 70, 72, 36, 299)])
def test_on_the_device(case, dtype):
    check(case, dtype, "cuda", "triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q has shape \(2, 3\)"),
        ({"k": torch.zeros(2, 3, 5)}, r"k has shape \(2, 3, 5\); allowed: \(2, 3, 4\)"),
        ({"keys": torch.zeros(2, 9, 3, 3)}, r"keys has shape \(2, 9, 3, 3\); allowed: \(2, S, 3, 4 or more\)"),
        ({"values": torch.zeros(2, 8, 3, 4)}, r"values has shape \(2, 8, 3, 4\); allowed: \(2, 9, 3, 4\)"),
        ({"v": torch.zeros(2, 3, 4).bfloat16()}, "v is torch.bfloat16 on cpu; allowed: torch.float32"),
        ({"position": torch.zeros(1, dtype=torch.int64)}, r"position has shape \(1,\)"),
        ({"turned": 3}, "turned=3: must be an even number from 0 to 4"),
        ({"turned": 6}, "turned=6: must be an even number from 0 to 4"),
        ({"backend": "flash"}, "backend is 'flash'; allowed: auto, reference, triton"),
        ({"backend": "triton"}, "backend='triton' cannot run here: q is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = {name: torch.zeros(2, 3, 4) for name in "qkv"} | {"keys": torch.zeros(2, 9, 3, 4)}
    values |= {"values": torch.zeros(2, 9, 3, 4), "position": torch.tensor(3)} | change
    with pytest.raises(ValueError, match=message):
        cache_update(*[values.pop(name) for name in ("q", "k", "v", "keys", "values", "position")], **values)
