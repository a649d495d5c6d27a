"""The samplers: their distributions, and that their bytes stay."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from zoology.tasks.samplers import Stream, _exponential, _scale, power_law_handicaps, stream_key

LEVEL = 1e-4  # the seeds are fixed, so a test that passes once passes always


def stream(*parts, chunk=0):
    return Stream(stream_key("test", *parts), chunk)


def chi_square(values, expected):
    """p-value that `values` (integers) were drawn with the probabilities `expected`."""
    counts = np.bincount(np.asarray(values).ravel(), minlength=len(expected))
    assert len(counts) == len(expected)
    return stats.chisquare(counts, np.asarray(expected) / np.sum(expected) * counts.sum()).pvalue


def test_words_are_philox():
    """Against the published known answer of Philox-4x64-10 (Random123) for an all-zero counter and key."""
    zero = Stream(bytes(16))
    # NumPy counts up before it makes a block: counter 2^256 - 1 gives the block of counter 0.
    raw = np.random.Philox(counter=np.full(4, 2**64 - 1, dtype=np.uint64), key=np.zeros(2, dtype=np.uint64))
    assert [hex(word) for word in raw.random_raw(4)] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]
    assert zero.words(8).tolist() == [
        word
        for pair in np.random.Philox(counter=[0, 0, 1, 0], key=0).random_raw(4).tolist()
        for word in (pair & 0xFFFFFFFF, pair >> 32)
    ]


def test_first_words_are_golden():
    assert stream("golden").words(5).tolist() == [1757535364, 2813541114, 1116055329, 2397582424, 1642463867]


def test_draws_chunks_and_keys_are_apart():
    draws = stream(0)
    words = [draws.words(1000), draws.words(1000), stream(0, chunk=1).words(1000), stream(1).words(1000)]
    assert len(np.unique(np.concatenate(words))) > 3990


@pytest.mark.parametrize("size", [1, 2, 3, 7, 4095, 4096, 8192, (1 << 32) - 5, 1 << 32])
def test_scale_is_the_exact_product(size):
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 123456789], dtype=np.uint32)
    assert _scale(words, size).tolist() == [int(word) * size >> 32 for word in words]


@pytest.mark.parametrize(("low", "high"), [(0, 8), (5, 12), (3, 4), (0, 100)])
def test_integers_are_uniform(low, high):
    values = stream(low, high).integers(low, high, 200, 100)
    assert values.shape == (200, 100)
    assert values.min() == low
    assert values.max() == high - 1
    assert low + 1 == high or chi_square(values.astype(int) - low, np.ones(high - low)) > LEVEL


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_bernoulli(probability):
    hits = stream(probability).bernoulli(probability, 100, 200)
    assert hits.mean() == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 20_000))


@pytest.mark.parametrize(("size", "k"), [(5, 1), (5, 2), (8, 2), (4, 4), (5, 3), (13, 3)])
def test_distinct_is_uniform_over_ordered_choices(size, k):
    drawn = stream(size, k).distinct(10, 10 + size, 60_000, k) - 10
    assert (np.sort(drawn, axis=1)[:, 1:] != np.sort(drawn, axis=1)[:, :-1]).all()
    codes = drawn @ size ** np.arange(k)
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == math.perm(size, k)
    assert stats.chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize(("size", "k"), [(1, 1), (4095, 4), (4095, 256), (1000, 250), (1000, 251), (300, 300)])
def test_distinct_has_no_duplicates(size, k):
    drawn = stream(size, k).distinct(1, 1 + size, 300, k)
    assert drawn.min() >= 1
    assert drawn.max() <= size
    assert all(len(set(row)) == k for row in drawn.tolist())


def test_permutation_is_uniform():
    codes = stream("p").permutation(4, 24_000) @ 4 ** np.arange(4)
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > LEVEL


def test_exponential_is_minus_log():
    words = np.concatenate([np.arange(70_000), 2**32 - 1 - np.arange(70_000), stream("e").words(70_000)])
    uniform = (words + 0.5) / 2**32
    assert np.abs(_exponential(words.astype(np.uint32)) + np.log(uniform)).max() < 1e-9
    assert _exponential(words.astype(np.uint32)).min() > 0


@pytest.mark.parametrize("a", [0.01, 0.5, 1.0, 2.0])
def test_race_draws_successively_by_weight(a):
    """First and second place have the probabilities of drawing twice without replacement."""
    size = 6
    handicaps = power_law_handicaps(size, a)
    p = np.arange(1, size + 1) ** (a - 1)
    p /= p.sum()
    pairs = p[:, None] * p[None, :] / (1 - p[:, None])
    np.fill_diagonal(pairs, 0)
    off = ~np.eye(size, dtype=bool)
    for k in (2, size):
        places = stream(a, k).race(handicaps, 60_000, k)
        assert chi_square(places[:, 0], p) > LEVEL
        counts = np.bincount(places[:, 0] * size + places[:, 1], minlength=size**2).reshape(size, size)
        assert stats.chisquare(counts[off], pairs[off] * 60_000).pvalue > LEVEL


def test_race_of_all_is_a_permutation():
    places = stream("r").race(power_law_handicaps(37, 0.01), 500, 37)
    assert (np.sort(places, axis=1) == np.arange(37)).all()


def test_partial_race_is_the_head_of_the_full_race():
    handicaps = power_law_handicaps(100, 0.01)
    assert (stream("h").race(handicaps, 50, 3) == stream("h").race(handicaps, 50, 100)[:, :3]).all()


def test_power_law_handicaps():
    for a in (0.01, 1.0, 3.0):
        assert power_law_handicaps(50, a) == pytest.approx(np.arange(1, 51) ** (1 - a), rel=1e-14)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda s: s.integers(5, 5, 2), "low=5, high=5: allowed are 0 <= low < high <= 2^32"),
        (lambda s: s.integers(-1, 5, 2), "low=-1, high=5: allowed"),
        (lambda s: s.integers(0, 2**32 + 1, 2), "high=4294967297: allowed"),
        (lambda s: s.bernoulli(1.5, 2), "probability=1.5: must be in [0, 1]"),
        (lambda s: s.bernoulli(float("nan"), 2), "probability=nan: must be"),
        (lambda s: s.permutation(3, 2, 4), "k=4 without replacement out of 3: must be 0 to 3"),
        (lambda s: s.distinct(10, 13, 2, 4), "k=4 without replacement out of 3"),
        (lambda s: s.race(np.ones(3), 2, 4), "k=4 without replacement out of 3"),
        (lambda s: s.pick(np.array([[True, False], [False, False]])), "mask: row 1 of 2 has no True entry"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(Stream(bytes(16)))


def test_certain_and_impossible_events():
    """At both ends of the words."""
    draws = stream()
    draws.words = lambda n, *shape: np.array([0, 2**32 - 1], dtype=np.uint32)
    assert draws.bernoulli(1.0, 2).all()
    assert not draws.bernoulli(0.0, 2).any()
