"""The token of the largest score: the first one there is, in the row of this step and no other."""

import pytest
import torch

from kernels import next_token

CASES = [(1, 1), (3, 20), (5, 1025), (2, 7000), (130, 1030)]


def example(case, dtype=torch.float64, device="cpu"):
    """Few different scores: most rows have several largest ones. Some rows are negative, one has a lone infinity."""
    b, v = case
    gen = torch.Generator().manual_seed(0)
    scores = torch.randint(-9, 10, (b, v), generator=gen).to(dtype) - 20 * (torch.arange(b)[:, None] % 2)
    scores[-1, v // 2 :] = -torch.inf
    return scores.to(device), *(torch.full(shape, -1, device=device) for shape in ((b,), (4, b)))


def check(case, dtype, device, backend):
    scores, token, made = example(case, dtype, device)
    first = [next(i for i, x in enumerate(row) if x == max(row)) for row in scores.tolist()]
    for at in (2, 0):
        next_token(scores, token.fill_(-1), made, torch.tensor([at], device=device), backend=backend)
        assert token.tolist() == first
    assert made.tolist() == [first, [-1] * case[0], first, [-1] * case[0]]
    wide = torch.cat([scores, scores + 100], 1)[:, : case[1]]  # rows apart
    next_token(wide, token.fill_(-1), made, torch.tensor([3], device=device), backend=backend)
    assert made[3].tolist() == token.tolist() == first


@pytest.mark.parametrize("case", CASES)
def test_reference(case):
    check(case, torch.float64, "cpu", "auto")


INTERPRETED = """
import torch

import test_next_token as t

for case in t.CASES[:4]:
    t.check(case, torch.float32, "cpu", "triton")
t.check(t.CASES[1], torch.bfloat16, "cpu", "triton")
print("same")
"""


def test_triton_kernel_interpreted(run_interpreted):
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, (128, 50264), (3000, 64)])
def test_on_the_device(case, dtype):
    check(case, dtype, "cuda", "triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 3, 4)}, r"scores have shape \(2, 3, 4\)"),
        (
            {"token": torch.zeros(3, dtype=torch.int64)},
            r"token \(3,\), made \(5, 2\) and count \(1,\); allowed: \[B, V",
        ),
        ({"made": torch.zeros(5, 3, dtype=torch.int64)}, r"made \(5, 3\)"),
        ({"count": torch.zeros((), dtype=torch.int64)}, r"count \(\)"),
        ({"token": torch.zeros(2)}, "token has dtype torch.float32; allowed: torch.int64"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: auto, reference, triton"),
        ({"backend": "triton"}, "backend='triton' cannot run here: scores is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    integers = {"dtype": torch.int64}
    values = {
        "scores": torch.zeros(2, 4),
        "token": torch.zeros(2, **integers),
        "made": torch.zeros(5, 2, **integers),
        "count": torch.zeros(1, **integers),
    } | change
    with pytest.raises(ValueError, match=message):
        next_token(**values)
