"""MQAR: layout, labels, distributions, golden bytes, bad input."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zoology.tasks import IGNORE_INDEX, MQAR
from zoology.tasks.mqar import predecessor_mqar

LEVEL = 1e-4  # the seeds are fixed, so a test that passes once passes always


def digest(batch) -> str:
    """Hash of both tensors as little-endian int64."""
    data = hashlib.sha256()
    for tensor in batch:
        assert tensor.dtype == torch.int64
        data.update(tensor.numpy().astype("<i8").tobytes())
    return data.hexdigest()[:16]


GOLDEN = {
    "default": ({}, "a6c60c94c077770b"),
    "zeros": ({"random_non_queries": False}, "90871b668079c6a3"),
    "distinct": ({"filler": "distinct", "seq_len": 128, "num_kv_pairs": 16}, "155214d59a4fd4b0"),
    "dense": ({"seq_len": 256, "num_kv_pairs": 64}, "5f5bda0d58649cf6"),
    "long": ({"seq_len": 1024, "num_kv_pairs": 256}, "af86b93b9214bb7f"),
    "passes": ({"num_passes": 3, "num_kv_pairs": 8, "power_a": 0.7}, "0a86e8e5707357e4"),
    "small": ({"vocab_size": 10, "seq_len": 16, "num_kv_pairs": 4}, "5849e0ff1c252934"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_bytes_are_golden(case):
    options, expected = GOLDEN[case]
    assert digest(MQAR(**options).split("train", 600, seed=123)) == expected


def check_example(task: MQAR, inputs: list[int], labels: list[int]) -> None:
    """Reads one example the slow way."""
    half, count = task.vocab_size // 2, task.num_kv_pairs
    assert len(inputs) == len(labels) == task.seq_len
    context = inputs[: 2 * count]
    keys, values = context[0::2], context[1::2]
    assert len(set(keys)) == len(set(values)) == count
    assert all(1 <= key < half for key in keys)
    assert all(half <= value < task.vocab_size for value in values)
    assert inputs[: task.prefix_length] == context * task.num_passes
    assert set(labels[: task.prefix_length]) == {IGNORE_INDEX}
    value_of = dict(zip(keys, values))
    asked = [t for t, label in enumerate(labels) if label != IGNORE_INDEX]
    assert sorted(inputs[t] for t in asked) == sorted(keys)
    for t in asked:
        assert labels[t] == value_of[inputs[t]]
        assert (t - task.prefix_length) % 2 == 0
    filler = [inputs[t] for t in range(task.prefix_length, task.seq_len) if t not in asked]
    if not task.random_non_queries:
        assert set(filler) <= {0}
    if task.filler == "distinct":
        assert not set(filler) & set(keys)


@st.composite
def valid_tasks(draw):
    pairs, passes = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    random_non_queries = draw(st.booleans())
    return MQAR(
        vocab_size=2 * (pairs + 1) + draw(st.sampled_from([0, 1, 2, 50, 5000])),
        seq_len=2 * pairs * (passes + 1) + 2 * draw(st.integers(0, 30)),
        num_kv_pairs=pairs,
        num_passes=passes,
        power_a=draw(st.floats(1e-3, 10)),
        random_non_queries=random_non_queries,
        filler=draw(st.sampled_from(["any", "distinct"])) if random_non_queries else "any",
    )


@settings(max_examples=60, deadline=None)
@given(task=valid_tasks(), seed=st.integers(0, 2**70))
def test_every_valid_config_gives_right_examples(task, seed):
    batch = task.sample(4, seed)
    for inputs, labels in zip(batch.inputs.tolist(), batch.labels.tolist()):
        check_example(task, inputs, labels)


@pytest.mark.parametrize("options", [options for options, _ in GOLDEN.values()], ids=list(GOLDEN))
def test_labels_are_right_at_every_query(options):
    task = MQAR(**options)
    for inputs, labels in zip(*(tensor.tolist() for tensor in task.split("test", 40, 0))):
        check_example(task, inputs, labels)


def test_keys_and_values_are_uniform():
    batch = MQAR(vocab_size=64, seq_len=32, num_kv_pairs=5).sample(20_000, 0)
    for column in range(5):
        keys = batch.inputs[:, 2 * column].numpy() - 1
        values = batch.inputs[:, 2 * column + 1].numpy() - 32
        assert stats.chisquare(np.bincount(keys, minlength=31)).pvalue > LEVEL
        assert stats.chisquare(np.bincount(values, minlength=32)).pvalue > LEVEL


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_gaps_follow_the_power_law(power_a):
    """The first key's slot has the law's probabilities, the second's those of the next draw."""
    task = MQAR(vocab_size=64, seq_len=48, num_kv_pairs=2, power_a=power_a, random_non_queries=False)
    batch = task.sample(30_000, 1)
    slots = (task.seq_len - 4) // 2
    p = np.arange(1.0, slots + 1) ** (power_a - 1)
    p /= p.sum()
    second = (p[:, None] * p / (1 - p[:, None])).sum(0) - p * p / (1 - p)
    for column, expected in ((0, p), (2, second)):
        row, position = np.nonzero((batch.inputs[:, 4:] == batch.inputs[:, [column]]).numpy())
        assert (row == np.arange(30_000)).all()
        counts = np.bincount(position // 2, minlength=slots)
        assert stats.chisquare(counts, expected * 30_000).pvalue > LEVEL


def test_random_filler_is_uniform_over_the_vocabulary():
    batch = MQAR(vocab_size=32, seq_len=64, num_kv_pairs=2).sample(3000, 0)
    filler = batch.inputs[:, 5::2].numpy()  # odd positions are never asked
    assert stats.chisquare(np.bincount(filler.ravel(), minlength=32)).pvalue > LEVEL


def test_distinct_filler_is_uniform_over_all_but_the_keys():
    task = MQAR(vocab_size=12, seq_len=64, num_kv_pairs=3, filler="distinct")
    batch = task.sample(3000, 0)
    keys, filler = batch.inputs[:, 0:6:2].numpy(), batch.inputs[:, 7::2].numpy()
    for key in range(1, 6):
        rows = (keys != key).all(1)
        share = (filler[rows] == key).mean()
        assert share == pytest.approx(1 / 9, abs=4 * math.sqrt(1 / 9 / filler[rows].size))
        assert (filler[~rows] == key).sum() == 0


def test_any_filler_does_repeat_keys():
    """The published filler asks questions that are not scored: each of T - 3D tokens is a key with D / V."""
    for seq_len, pairs in ((64, 4), (512, 64)):
        expected = 1 - (1 - pairs / 8192) ** (seq_len - 3 * pairs)
        for filler, share in (("any", expected), ("distinct", 0.0)):
            task = MQAR(seq_len=seq_len, num_kv_pairs=pairs, filler=filler)
            inputs, labels = task.sample(4000, 0)
            unscored = torch.where(labels == IGNORE_INDEX, inputs, -1)[:, 2 * pairs :]
            member = torch.zeros(4000, 8192, dtype=torch.bool)
            member.scatter_(1, inputs[:, 0 : 2 * pairs : 2], True)
            hit = (member.gather(1, unscored.clamp(min=0)) & (unscored >= 0)).any(1).float().mean().item()
            assert hit == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))


def test_splits_share_no_example():
    task = MQAR()
    contexts = [
        {tuple(row[:8]) for row in task.split(split, 2000, 0).inputs.tolist()}
        for split in ("train", "validation", "test")
    ]
    assert len(set.union(*contexts)) == 6000


def test_required_bits():
    assert MQAR(num_kv_pairs=256, seq_len=1024).required_bits() == 3072  # facts of the Based protocol
    assert MQAR(num_kv_pairs=4, num_passes=2).required_bits() == 48
    assert MQAR(vocab_size=9, num_kv_pairs=2).required_bits() == pytest.approx(2 * math.log2(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_kv_pairs": 17},
            r"num_kv_pairs=17 .* but seq_len=64: seq_len must be at least 68",
        ),
        ({"num_kv_pairs": 8, "num_passes": 4}, r"num_passes=4 needs 4 \* 16 .* seq_len=64: .* at least 80"),
        (
            {"vocab_size": 9},
            r"vocab_size=9 leaves .*= 3 keys for num_kv_pairs=4: .* at least 10",
        ),
        ({"vocab_size": 3}, r"vocab_size=3: must be greater than or equal to 4"),
        ({"seq_len": 63}, r"seq_len=63: must be even"),
        ({"seq_len": 2}, r"seq_len=2: must be greater than or equal to 4"),
        ({"seq_len": 0}, r"seq_len=0: must be greater"),
        ({"seq_len": -64}, r"seq_len=-64: must be greater"),
        ({"num_kv_pairs": 0}, r"num_kv_pairs=0: must be greater than or equal to 1"),
        ({"num_passes": 0}, r"num_passes=0: must be greater than or equal to 1"),
        ({"power_a": 0.0}, r"power_a=0.0: must be greater than 0"),
        ({"power_a": float("nan")}, r"power_a=nan: "),
        ({"power_a": 11.0}, r"power_a=11.0: must be less than or equal to 10"),
        ({"num_kv_pairs": "4"}, r"num_kv_pairs='4': must be a valid integer"),
        ({"num_kv_pairs": 4.5}, r"num_kv_pairs=4.5: must be a valid integer"),
        ({"random_non_queries": 1}, r"random_non_queries=1: must be a valid boolean"),
        ({"filler": "zeros"}, r"filler='zeros': must be 'any' or 'distinct'"),
        (
            {"filler": "distinct", "random_non_queries": False},
            r"filler='distinct' with random_non_queries=False",
        ),
        (
            {"num_pairs": 4},
            r"mqar: unknown option num_pairs=4 \(closest: num_kv_pairs.*\); options are vocab_size,",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**options)


PREDECESSOR = [  # hashes of what the published code gave, run at HazyResearch/zoology d88d6f5
    ((8192, 1000, 64, 0, 4), {}, "509945552f27b1a1"),
    ((8192, 300, 64, 123, 16), {}, "1e3afb989b60b657"),
    ((8192, 200, 256, 7, 64), {}, "cdd46a4a923960ac"),
    ((8192, 50, 512, 1, 64), {}, "674d84f76abfbbf5"),
    ((8192, 20, 1024, 2**31 + 5, 256), {}, "f5889349b8d934c1"),
    ((100, 500, 32, 3, 3), {"power_a": 0.5}, "21e1be71a7903c04"),
    ((70, 200, 64, 9, 16), {"power_a": 1.0}, "c49685ecdc563f7f"),
    ((33, 100, 32, 4, 5), {"power_a": 0.1}, "2936f959e7994c13"),
    ((12, 50, 8, 11, 1), {}, "c7d9ac45f1927a82"),
]


@pytest.mark.parametrize(("arguments", "options", "expected"), PREDECESSOR)
def test_predecessor_bit_for_bit(arguments, options, expected):
    assert digest(predecessor_mqar(*arguments, **options)) == expected


def test_predecessor_follows_the_same_definition():
    task = MQAR(vocab_size=70, seq_len=64, num_kv_pairs=15, random_non_queries=False)
    batch = predecessor_mqar(70, 20, 64, 5, 15)
    for inputs, labels in zip(batch.inputs.tolist(), batch.labels.tolist()):
        check_example(task, inputs, labels)


def test_predecessor_leaves_the_global_generator_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    predecessor_mqar(100, 3, 32, 3, 3)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 10, 64, 0, 4), "vocab_size=64: must exceed seq_len=64"),
        ((8192, 10, 64, 1 << 32, 4), "seed=4294967296: must be below 2.32"),
        ((8192, 10, 64, -1, 4), "seed=-1: must be a whole number >= 0"),
        ((8192, 0, 64, 0, 4), "num_examples=0: must be a whole number >= 1"),
        ((8192, 10, 64, 0, 17), "num_kv_pairs=17 .* at least 68"),
    ],
)
def test_predecessor_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        predecessor_mqar(*arguments)
