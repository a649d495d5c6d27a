"""MQAR variants: every label found again by reading the example, the distributions, and bad input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zoology.tasks import (
    IGNORE_INDEX,
    MQAR,
    CompoundKeyMQAR,
    DenseMQAR,
    ForgettingMQAR,
    LastValueMQAR,
    MADCompression,
    SetDisjointness,
    TwoHopMQAR,
    longer_than_train,
)

LEVEL = 1e-4  # the seeds are fixed, so a test that passes once passes always


def examples(task, n=30, seed=0):
    return zip(*(tensor.tolist() for tensor in task.sample(n, seed)))


def scored(labels):
    return [t for t, label in enumerate(labels) if label != IGNORE_INDEX]


def passes(task, inputs):
    """One pass over the context, having checked that all are the same."""
    once = inputs[: task.prefix_length // task.num_passes]
    assert inputs[: task.prefix_length] == once * task.num_passes
    return once


def check_filler(task, inputs, labels, keys):
    question = {t - i for t in scored(labels) for i in range(task.question_length)}
    filler = {inputs[t] for t in range(task.prefix_length, task.seq_len) if t not in question}
    allowed = set(range(task.vocab_size)) if task.random_non_queries else {0}
    assert filler <= (allowed - set(keys) if task.filler == "distinct" else allowed)


def solve_last_value(task, inputs, labels):
    context = passes(task, inputs)
    keys, values = context[0::2], context[1::2]
    assert len(set(keys)) == task.num_kv_pairs == len(set(keys[: task.num_kv_pairs]))
    assert len(set(keys[task.num_kv_pairs :])) == len(keys) - task.num_kv_pairs
    assert all(key < task.vocab_size // 2 for key in keys)
    memory = {}
    for key, value in zip(keys, values):
        memory[key] = value
    asked = scored(labels)
    assert sorted(inputs[t] for t in asked) == sorted(memory)
    assert [labels[t] for t in asked] == [memory[inputs[t]] for t in asked]
    assert all((t - task.prefix_length) % 2 == 0 for t in asked)
    check_filler(task, inputs, labels, keys)
    return keys, values


@st.composite
def family(draw, cls, needs_vocab, needs_len, max_pairs=8, **options):
    """A valid config of a RecallTask: `needs_*` give the smallest sizes for (pairs, passes, options)."""
    pairs, num_passes = draw(st.integers(1, max_pairs)), draw(st.integers(1, 2))
    extra = {name: draw(strategy(pairs)) for name, strategy in options.items()}
    pairs = extra.pop("num_kv_pairs", pairs)
    random_non_queries = draw(st.booleans())
    seq_len = needs_len(pairs, num_passes, extra)
    return cls(
        vocab_size=needs_vocab(pairs, extra) + draw(st.sampled_from([0, 1, 2, 3, 100])),
        seq_len=max(4, seq_len + seq_len % 2) + 2 * draw(st.integers(0, 20)),
        num_kv_pairs=pairs,
        num_passes=num_passes,
        power_a=draw(st.sampled_from([0.01, 1.0])),
        random_non_queries=random_non_queries,
        filler=draw(st.sampled_from(["any", "distinct"])) if random_non_queries else "any",
        **extra,
    )


@settings(max_examples=40, deadline=None)
@given(
    task=family(
        LastValueMQAR,
        lambda d, x: max(2 * (d + 1), 2 * (d + x["num_updates"]) - 1),
        lambda d, p, x: 2 * (d + x["num_updates"]) * p + 2 * d,
        num_updates=lambda d: st.integers(1, d),
    ),
    seed=st.integers(0, 2**40),
)
def test_last_value_wins(task, seed):
    for inputs, labels in examples(task, 3, seed):
        _, values = solve_last_value(task, inputs, labels)
        assert len(set(values)) == len(values)
        assert all(task.vocab_size // 2 <= value < task.vocab_size for value in values)


@settings(max_examples=40, deadline=None)
@given(
    task=family(
        ForgettingMQAR,
        lambda d, x: 2 * (d + 2),
        lambda d, p, x: 2 * (d + x["num_forgotten"]) * p + 2 * d,
        num_forgotten=lambda d: st.integers(1, d),
    ),
    seed=st.integers(0, 2**40),
)
def test_forgotten_keys_have_no_value(task, seed):
    for inputs, labels in examples(task, 3, seed):
        keys, values = solve_last_value(task, inputs, labels)
        assert min(keys) >= 2
        assert values[task.num_kv_pairs :] == [1] * task.num_forgotten
        assert len(set(values[: task.num_kv_pairs])) == task.num_kv_pairs
        assert min(values[: task.num_kv_pairs]) >= task.vocab_size // 2
        assert [labels[t] for t in scored(labels)].count(1) == task.num_forgotten


@pytest.mark.parametrize("task", [LastValueMQAR(vocab_size=32), ForgettingMQAR(vocab_size=32)])
def test_every_pair_of_keys_is_updated_as_often(task):
    inputs = task.sample(12_000, 0).inputs.numpy()
    row, first = np.nonzero(inputs[:, 0:8:2] == inputs[:, [8]])
    _, second = np.nonzero(inputs[:, 0:8:2] == inputs[:, [10]])
    assert len(row) == 12_000
    counts = np.bincount(first * 4 + second, minlength=16).reshape(4, 4)
    assert np.diag(counts).sum() == 0
    assert stats.chisquare(counts[~np.eye(4, dtype=bool)]).pvalue > LEVEL


@settings(max_examples=40, deadline=None)
@given(
    task=family(TwoHopMQAR, lambda d, x: 3 * (d + 1), lambda d, p, x: 4 * d * p + 2 * d),
    seed=st.integers(0, 2**40),
)
def test_two_hops(task, seed):
    third = task.vocab_size // 3
    for inputs, labels in examples(task, 3, seed):
        context = passes(task, inputs)
        arrow = dict(zip(context[0::2], context[1::2]))
        starts = [token for token in arrow if token < third]
        assert len(arrow) == 2 * len(starts) == 2 * task.num_kv_pairs
        assert 0 not in arrow
        asked = scored(labels)
        assert sorted(inputs[t] for t in asked) == sorted(starts)
        for t in asked:
            middle = arrow[inputs[t]]
            assert third <= middle < 2 * third <= labels[t] == arrow[middle] < task.vocab_size
        check_filler(task, inputs, labels, starts)


def test_hops_stand_in_any_order():
    inputs = TwoHopMQAR(vocab_size=30, num_kv_pairs=2, seq_len=16).sample(8000, 0).inputs.numpy()
    first_hop = inputs[:, 0:8:2] < 10
    codes = first_hop @ 2 ** np.arange(4)
    counts = np.bincount(codes, minlength=16)
    two = [code for code in range(16) if bin(code).count("1") == 2]
    assert counts[two].sum() == 8000
    assert stats.chisquare(counts[two]).pvalue > LEVEL


@settings(max_examples=40, deadline=None)
@given(
    task=family(
        CompoundKeyMQAR,
        lambda d, x: max(3 * (math.isqrt(d) + 1), 3 * d),
        lambda d, p, x: 3 * d * p + 3 * d,
        num_kv_pairs=lambda d: st.sampled_from([1, 4, 9]),
    ),
    seed=st.integers(0, 2**40),
)
def test_compound_keys(task, seed):
    third, side = task.vocab_size // 3, math.isqrt(task.num_kv_pairs)
    for inputs, labels in examples(task, 3, seed):
        context = passes(task, inputs)
        memory = dict(zip(zip(context[0::3], context[1::3]), context[2::3]))
        assert len(memory) == len(set(memory.values())) == task.num_kv_pairs
        firsts, seconds = {first for first, _ in memory}, {second for _, second in memory}
        assert len(firsts) == len(seconds) == side  # a full grid: neither token decides
        assert all(1 <= token < third for token in firsts)
        assert all(third <= token < 2 * third for token in seconds)
        assert min(memory.values()) >= 2 * third
        asked = scored(labels)
        assert sorted((inputs[t - 1], inputs[t]) for t in asked) == sorted(memory)
        assert all(labels[t] == memory[inputs[t - 1], inputs[t]] for t in asked)
        assert all((t - 1 - task.prefix_length) % 3 == 0 for t in asked)
        check_filler(task, inputs, labels, firsts)


@settings(max_examples=30, deadline=None)
@given(pairs=st.integers(1, 8), num_passes=st.integers(1, 3), asked=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_dense_questions(pairs, num_passes, asked, seed):
    task = DenseMQAR(vocab_size=40, seq_len=2 * pairs * num_passes + asked, num_kv_pairs=pairs, num_passes=num_passes)
    for inputs, labels in examples(task, 3, seed):
        context = passes(task, inputs)
        memory = dict(zip(context[0::2], context[1::2]))
        assert len(memory) == len(set(memory.values())) == pairs
        assert scored(labels) == list(range(task.prefix_length, task.seq_len))
        assert labels[task.prefix_length :] == [memory[key] for key in inputs[task.prefix_length :]]


def test_dense_questions_are_uniform():
    inputs = DenseMQAR(vocab_size=40, seq_len=20, num_kv_pairs=5).sample(4000, 0).inputs.numpy()
    asked = (inputs[:, 10:, None] == inputs[:, None, 0:10:2]).argmax(2)
    assert stats.chisquare(np.bincount(asked.ravel(), minlength=5)).pvalue > LEVEL


def test_longer_than_train():
    task = MQAR(seq_len=64, num_kv_pairs=4)
    assert longer_than_train(task) == [MQAR(seq_len=64 * f, num_kv_pairs=4) for f in (1, 2, 4, 8)]
    assert longer_than_train(task, (1, 3), grow="pairs") == [task, MQAR(seq_len=192, num_kv_pairs=12)]
    assert longer_than_train(MADCompression(), (2,)) == [MADCompression(seq_len=124)]
    with pytest.raises(ValueError, match="grow='length': must be one of filler, pairs"):
        longer_than_train(task, grow="length")
    with pytest.raises(ValueError, match="factors=0: must be a whole number >= 1"):
        longer_than_train(task, (0,))
    with pytest.raises(ValueError, match="must have the option seq_len"):
        longer_than_train(SetDisjointness())
    with pytest.raises(ValueError, match="must have the option num_kv_pairs"):
        longer_than_train(MADCompression(), grow="pairs")


def test_required_bits():
    assert LastValueMQAR().required_bits() == 48  # log2(4096) for each of 4 keys
    assert ForgettingMQAR().required_bits() == pytest.approx(math.log2(6) + 24)
    assert ForgettingMQAR(num_forgotten=4).required_bits() == 0
    assert TwoHopMQAR(vocab_size=3 * 64).required_bits() == 24
    assert CompoundKeyMQAR(vocab_size=3 * 64).required_bits() == 24
    assert DenseMQAR(num_passes=2).required_bits() == 48


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (LastValueMQAR, {"num_updates": 5}, "num_updates=5: must be at most num_kv_pairs=4"),
        (LastValueMQAR, {"num_updates": 0}, "num_updates=0: must be greater than or equal to 1"),
        (LastValueMQAR, {"vocab_size": 10}, "vocab_size=10 has 5 values for .* = 6: must be at least 11"),
        (LastValueMQAR, {"seq_len": 18}, r"num_passes=1 needs 1 \* 12 .* 4 \* 2 .* seq_len must be at least 20"),
        (LastValueMQAR, {"seq_len": 21}, "seq_len=21: must be even"),
        (ForgettingMQAR, {"num_forgotten": 5}, "num_forgotten=5: must be at most num_kv_pairs=4"),
        (ForgettingMQAR, {"vocab_size": 11}, "vocab_size=11 leaves .* = 3 keys .* must be at least 12"),
        (TwoHopMQAR, {"vocab_size": 14}, "vocab_size=14 leaves .* = 3 keys for num_kv_pairs=4: .* at least 15"),
        (TwoHopMQAR, {"seq_len": 22}, "num_kv_pairs=4 .* seq_len=22: seq_len must be at least 24"),
        (CompoundKeyMQAR, {"num_kv_pairs": 5}, r"num_kv_pairs=5: must be a square"),
        (CompoundKeyMQAR, {"vocab_size": 8}, r"vocab_size=8 leaves .* 1 keys for sqrt.num_kv_pairs.=2: .* 9"),
        (CompoundKeyMQAR, {"vocab_size": 9}, r"vocab_size=9 has 3 values for num_kv_pairs=4: must be at least 10"),
        (DenseMQAR, {"seq_len": 8}, "needs 8 positions of context, but seq_len=8: must be at least 9"),
        (DenseMQAR, {"num_passes": 9}, "num_passes=9 needs 72 positions"),
        (DenseMQAR, {"vocab_size": 9}, "vocab_size=9 leaves .* = 3 keys"),
        (DenseMQAR, {"filler": "any"}, "dense_mqar: unknown option filler='any'"),
        (DenseMQAR, {"num_passes": 0}, "num_passes=0: must be greater than or equal to 1"),
    ],
)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize(
    ("task", "questions"),
    [
        (LastValueMQAR(vocab_size=11, seq_len=20), 4),
        (ForgettingMQAR(vocab_size=12, seq_len=20), 4),
        (TwoHopMQAR(vocab_size=15, seq_len=24), 4),
        (CompoundKeyMQAR(vocab_size=10, seq_len=24), 4),
        (DenseMQAR(vocab_size=10, seq_len=9), 1),
    ],
)
def test_the_sizes_that_messages_name_are_enough(task, questions):
    assert (task.sample(50, 0).labels != IGNORE_INDEX).sum(1).tolist() == [questions] * 50
