"""The MAD tasks: every label found again by reading the example, the distributions, and bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zoology.tasks import (
    IGNORE_INDEX,
    MADCompression,
    MADFuzzyRecall,
    MADInContextRecall,
    MADMemorization,
    MADNoisyRecall,
    MADSelectiveCopying,
)
from zoology.tasks.samplers import Stream, first_occurrence, stream_key

LEVEL = 1e-4  # the seeds are fixed, so a test that passes once passes always


def examples(task, n=30, seed=0):
    return zip(*(tensor.tolist() for tensor in task.sample(n, seed)))


def solve_in_context(task, inputs, labels):
    """The labels that reading pair by pair gives."""
    noise = task.vocab_size - task.noise_vocab_size
    memory, expected = {}, []
    for key, value in zip(inputs[0::2], inputs[1::2]):
        expected += [IGNORE_INDEX, IGNORE_INDEX]
        if key >= noise:
            assert value >= noise
            continue
        assert key < task.num_keys <= value < noise
        if key in memory:
            assert memory[key] == value
            expected[-2] = value
        memory[key] = value
    assert labels == expected
    assert labels[-2] == inputs[-1]  # the last question is always answered


@settings(max_examples=50, deadline=None)
@given(
    vocab=st.integers(2, 20),
    noise=st.integers(1, 10),
    slots=st.integers(2, 40),
    share=st.sampled_from([0.0, 0.3, 0.99]),
    seed=st.integers(0, 2**40),
)
def test_in_context_and_noisy_recall(vocab, noise, slots, share, seed):
    quiet = MADInContextRecall(vocab_size=vocab, seq_len=2 * slots)
    noisy = MADNoisyRecall(vocab_size=vocab + noise, noise_vocab_size=noise, frac_noise=share, seq_len=2 * slots)
    for task in (quiet, noisy):
        for inputs, labels in examples(task, 4, seed):
            solve_in_context(task, inputs, labels)


@pytest.mark.parametrize("task", [MADInContextRecall(), MADNoisyRecall(), MADNoisyRecall(frac_noise=0.8)])
def test_published_settings_of_recall(task):
    assert task.num_keys == task.num_values == 8
    for inputs, labels in examples(task):
        solve_in_context(task, inputs, labels)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_share_of_noise(share):
    """The noise that is expected, given that one slot of the first 63 and the last one are never noise."""
    inputs = MADNoisyRecall(frac_noise=share).sample(1000, 0).inputs
    noise = inputs[:, 0::2] >= 16
    assert not noise[:, -1].any()
    expected = share * 62 / 63
    error = math.sqrt(expected * (1 - expected) / (1000 * 63))
    assert noise[:, :-1].double().mean().item() == pytest.approx(expected, abs=4 * error)
    tokens = inputs[inputs >= 16].numpy() - 16
    assert stats.chisquare(np.bincount(tokens, minlength=16)).pvalue > LEVEL


def test_keys_values_and_the_last_question_are_uniform():
    inputs = MADInContextRecall(seq_len=256).sample(4000, 0).inputs.numpy()
    for column in (0, 2, 40):
        assert stats.chisquare(np.bincount(inputs[:, column], minlength=8)).pvalue > LEVEL
    assert stats.chisquare(np.bincount(inputs[:, 1] - 8, minlength=8)).pvalue > LEVEL
    # After 127 pairs all 8 keys were seen, so the last one is any of them.
    assert stats.chisquare(np.bincount(inputs[:, -2], minlength=8)).pvalue > LEVEL
    # Short sequences: of two keys seen, each is asked as often as the other, however often it was seen.
    short = MADInContextRecall(vocab_size=4, seq_len=8).sample(8000, 0).inputs.numpy()
    both = (short[:, 0:6:2].min(1) == 0) & (short[:, 0:6:2].max(1) == 1)
    assert stats.chisquare(np.bincount(short[both, -2], minlength=2)).pvalue > LEVEL


def test_expected_number_of_different_keys():
    task = MADNoisyRecall(vocab_size=80, frac_noise=0.6, seq_len=64)
    before_last = task.sample(4000, 0).inputs[:, 0:62:2].tolist()
    counts = [len({key for key in row if key < 64}) for row in before_last]
    expected = task.required_bits() / 5  # 32 values
    assert np.mean(counts) == pytest.approx(expected, abs=4 * np.std(counts) / math.sqrt(4000))


def solve_fuzzy(task, inputs, labels):
    """The labels that parsing runs of key and value tokens gives."""
    pad = task.vocab_size - 1
    begin = next(t for t, token in enumerate(inputs) if token != pad)
    assert pad not in inputs[begin:]
    assert begin <= 2 * (task.key_length + task.value_length) - 3
    memory, expected, t = {}, [IGNORE_INDEX] * task.seq_len, begin
    runs = [tuple(run) for _, run in itertools.groupby(inputs[begin:], lambda token: token < task.num_keys)]
    assert len(runs) % 2 == 0
    for i in range(0, len(runs), 2):
        key, value = runs[i : i + 2]
        assert key[0] < task.num_keys <= value[0]
        for run, longest in ((key, task.key_length), (value, task.value_length)):
            assert len(set(run)) == len(run) <= longest
        t += len(key)
        if key in memory:
            assert memory[key] == value
            expected[t - 1 : t - 1 + len(value)] = value
        memory[key] = value
        t += len(value)
    assert t == task.seq_len
    assert expected[-2] == inputs[-1]  # the last question repeats a key
    if task.training:
        expected = inputs[1:] + [IGNORE_INDEX]
    assert labels == expected
    return runs


@settings(max_examples=50, deadline=None)
@given(
    vocab=st.integers(9, 30),
    lengths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    spare=st.integers(0, 40),
    training=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_fuzzy_recall(vocab, lengths, spare, training, seed):
    task = MADFuzzyRecall(
        vocab_size=vocab,
        seq_len=max(4, 2 * sum(lengths)) + spare,
        key_length=lengths[0],
        value_length=lengths[1],
        training=training,
    )
    for inputs, labels in examples(task, 4, seed):
        runs = solve_fuzzy(task, inputs, labels)
        assert {len(key) for key in runs[0::2]} <= set(range(1 if training else lengths[0], lengths[0] + 1))


def test_fuzzy_lengths_and_tokens_are_uniform():
    task = MADFuzzyRecall(training=True)
    keys, values = [], []
    for inputs, labels in examples(task, 1500):
        runs = solve_fuzzy(task, inputs, labels)
        keys.append(runs[0])
        values.append(runs[1])
    for runs, low, count in ((keys, 0, 7), (values, 7, 8)):
        assert stats.chisquare(np.bincount([len(run) for run in runs], minlength=4)[1:]).pvalue > LEVEL
        tokens = [token - low for run in runs for token in run]
        assert stats.chisquare(np.bincount(tokens, minlength=count)).pvalue > LEVEL


def test_fuzzy_bits():
    task = MADFuzzyRecall()
    entropy = math.log2(3) + (math.log2(8) + math.log2(56) + math.log2(336)) / 3
    assert task.required_bits() == pytest.approx(20 * entropy)  # 20 pairs of six, and the last, fit 128
    assert all(len(solve_fuzzy(task, *example)) // 2 - 1 >= 20 for example in examples(task, 50))


@pytest.mark.parametrize("cls", [MADInContextRecall, MADNoisyRecall, MADFuzzyRecall])
def test_training_labels_are_the_next_tokens(cls):
    inputs, labels = cls(training=True).sample(20, 0)
    assert torch.equal(labels[:, :-1], inputs[:, 1:])
    assert (labels[:, -1] == IGNORE_INDEX).all()


def test_memorization():
    task = MADMemorization()
    dictionary = task.dictionary()
    assert (len(dictionary), len(set(dictionary.tolist()))) == (127, 127)
    assert 127 <= dictionary.min() <= dictionary.max() < 255
    for split in ("train", "test"):
        inputs, labels = task.split(split, 50, 0)
        assert (inputs[:, 1::2] == 255).all()
        assert (labels[:, 0::2] == IGNORE_INDEX).all()
        assert torch.equal(labels[:, 1::2], torch.from_numpy(dictionary)[inputs[:, 0::2]])
    assert (task.replace(seq_len=64).dictionary() == dictionary).all()
    assert (task.replace(map_seed=1).dictionary() != dictionary).any()
    keys = task.sample(4000, 0).inputs[:, 0::2].numpy()
    assert stats.chisquare(np.bincount(keys.ravel(), minlength=127)).pvalue > LEVEL
    assert task.required_bits() == math.log2(127)


@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(3, 20), count=st.integers(1, 12), spare=st.integers(0, 40), seed=st.integers(0, 2**40))
def test_selective_copying(vocab, count, spare, seed):
    task = MADSelectiveCopying(vocab_size=vocab, seq_len=2 * count + 2 + spare, num_tokens=count)
    for inputs, labels in examples(task, 4, seed):
        context = inputs[: task.prefix_length]
        assert inputs[task.prefix_length :] == [vocab - 1] + [vocab - 2] * count
        tokens = [token for token in context if token != vocab - 2]
        assert max(tokens) < vocab - 2
        assert labels == [IGNORE_INDEX] * (task.seq_len - count) + tokens


def test_blanks_stand_before_any_token():
    task = MADSelectiveCopying(seq_len=64, num_tokens=5)
    inputs = task.sample(1000, 0).inputs[:, : task.prefix_length].numpy()
    assert (inputs[:, -1] != 14).all()
    _, place = np.nonzero(inputs != 14)
    gaps = np.diff(place.reshape(1000, 5), axis=1, prepend=-1) - 1
    assert (gaps.sum(1) == 53).all()
    assert stats.chisquare(gaps.sum(0)).pvalue > LEVEL
    # The variance of one gap is multinomial as well, not that of evenly spread blanks.
    assert gaps.var() == pytest.approx(53 * 0.2 * 0.8, rel=0.15)


def test_compression():
    task = MADCompression()
    inputs, labels = task.sample(4000, 0)
    assert (task.seq_len, task.prefix_length) == (62, 31)
    assert (inputs[:, 31:] == 15).all()
    assert torch.equal(labels[:, 31:], inputs[:, :31])
    assert (labels[:, :31] == IGNORE_INDEX).all()
    assert stats.chisquare(np.bincount(inputs[:, :31].ravel().numpy(), minlength=15)).pvalue > LEVEL
    assert task.required_bits() == pytest.approx(31 * math.log2(15))


@pytest.mark.parametrize(
    ("cls", "settings_count", "bits"),
    [
        (MADInContextRecall, 11, 24),
        (MADNoisyRecall, 14, 24),
        (MADFuzzyRecall, 11, None),
        (MADMemorization, 6, None),
        (MADCompression, 11, None),
        (MADSelectiveCopying, 13, 16 * math.log2(14)),
    ],
)
def test_published_settings(cls, settings_count, bits):
    published = list(cls.published())
    assert len(published) == settings_count
    assert published[0] == (cls(), 256 if cls is MADMemorization else 12_800)
    assert len({(task, count) for task, count in published}) == settings_count
    for task, _ in published:
        assert (task.sample(2, 0).labels != IGNORE_INDEX).any()
    assert bits is None or cls().required_bits() == pytest.approx(bits, abs=0.05)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MADInContextRecall, {"seq_len": 127}, "seq_len=127: must be even"),
        (MADInContextRecall, {"seq_len": 2}, "seq_len=2: must be greater than or equal to 4"),
        (MADInContextRecall, {"vocab_size": 1}, "vocab_size=1: must be greater than or equal to 2"),
        (MADInContextRecall, {"frac_noise": 0.2}, "frac_noise=0.2 with noise_vocab_size=0"),
        (MADNoisyRecall, {"frac_noise": 1.0}, "frac_noise=1.0: must be less than 1"),
        (MADNoisyRecall, {"frac_noise": -0.1}, "frac_noise=-0.1: must be greater than or equal to 0"),
        (MADNoisyRecall, {"vocab_size": 17}, "vocab_size=17: must exceed noise_vocab_size=16 by at least 2"),
        (MADFuzzyRecall, {"vocab_size": 6}, "vocab_size=6 has 2 key and 3 value tokens .* must be at least 7"),
        (MADFuzzyRecall, {"seq_len": 11}, r"seq_len=11: must be at least 2 \* .* = 12"),
        (MADFuzzyRecall, {"key_length": 0}, "key_length=0: must be greater than or equal to 1"),
        (MADMemorization, {"seq_len": 31}, "seq_len=31: must be even"),
        (MADMemorization, {"map_seed": -1}, "map_seed=-1: must be greater than or equal to 0"),
        (MADCompression, {"seq_len": 63}, "seq_len=63: must be even"),
        (MADSelectiveCopying, {"num_tokens": 128}, "num_tokens=128 needs .* = 258 .* at most 127"),
        (MADSelectiveCopying, {"vocab_size": 2}, "vocab_size=2: must be greater than or equal to 3"),
    ],
)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_first_occurrence():
    codes = np.array([[3, 1, 3, 3, 1], [5, 5, 4, 9, 4]])
    assert first_occurrence(codes).tolist() == [[0, 1, 0, 0, 1], [0, 0, 2, 3, 2]]
    assert first_occurrence(codes[:, :1]).tolist() == [[0], [0]]


def test_pick_and_below_are_uniform():
    stream = Stream(stream_key("test pick"))
    mask = np.tile([True, False, True, True], (9000, 1))
    counts = np.bincount(stream.pick(mask), minlength=4)
    assert counts[1] == 0
    assert stats.chisquare(counts[[0, 2, 3]]).pvalue > LEVEL
    drawn = stream.below(np.repeat([1, 5], 9000))
    assert (drawn[:9000] == 0).all()
    assert stats.chisquare(np.bincount(drawn[9000:], minlength=5)).pvalue > LEVEL
