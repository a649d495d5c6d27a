"""Set disjointness and JRT-Prompt."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zoology.tasks import (
    IGNORE_INDEX,
    MQAR,
    JRTPrompt,
    MADInContextRecall,
    MADSelectiveCopying,
    SetDisjointness,
    from_config,
)

LEVEL = 1e-4  # the seeds are fixed, so a test that passes once passes always


@settings(max_examples=60, deadline=None)
@given(first=st.integers(1, 20), second=st.integers(1, 20), spare=st.integers(0, 30), seed=st.integers(0, 2**40))
def test_the_answer_is_the_token_in_both_sets(first, second, spare, seed):
    task = SetDisjointness(vocab_size=4 + first + second + spare, first_size=first, second_size=second)
    batch = task.sample(4, seed)
    for inputs, labels in zip(batch.inputs.tolist(), batch.labels.tolist()):
        assert (inputs[0], inputs[1 + first], inputs[-1]) == (1, 2, 3)
        a, b = inputs[1 : 1 + first], inputs[2 + first : -1]
        assert (len(set(a)), len(set(b))) == (first, second)
        assert min(a + b) >= 4
        assert set(a) & set(b) == {labels[-1]}
        assert labels[:-1] == [IGNORE_INDEX] * (task.seq_len - 1)


def test_the_shared_token_stands_anywhere():
    task = SetDisjointness(vocab_size=40, first_size=3, second_size=5)
    inputs, labels = (tensor.numpy() for tensor in task.sample(15_000, 0))
    row, in_first = np.nonzero(inputs[:, 1:4] == labels[:, [-1]])
    _, in_second = np.nonzero(inputs[:, 5:10] == labels[:, [-1]])
    assert len(row) == len(in_second) == 15_000
    assert stats.chisquare(np.bincount(in_first * 5 + in_second, minlength=15)).pvalue > LEVEL
    assert stats.chisquare(np.bincount(labels[:, -1] - 4, minlength=36)).pvalue > LEVEL
    assert stats.chisquare(np.bincount(inputs[:, 1] - 4, minlength=36)).pvalue > LEVEL


def test_sets_follow_the_published_sizes():
    """Every size of the published protocol fits its vocabulary of 2,048."""
    for pair in [(4, 16), (64, 16), (16, 256), (256, 4), (1, 32), (768, 16), (4, 768)]:
        task = SetDisjointness(first_size=pair[0], second_size=pair[1])
        assert task.seq_len == sum(pair) + 3
        assert task.prefix_length == sum(pair) + 2


@pytest.mark.parametrize(("first", "second"), [(4, 768), (768, 4), (16, 16)])
def test_required_bits_depend_on_the_order_until_read_twice(first, second):
    task = SetDisjointness(first_size=first, second_size=second)
    assert task.required_bits() == first
    assert JRTPrompt(task=task, num_passes=1).required_bits() == first
    assert JRTPrompt(task=task, num_passes=2).required_bits() == min(first, second)
    assert JRTPrompt(task=JRTPrompt(task=task, num_passes=2), num_passes=1).required_bits() == min(first, second)


@pytest.mark.parametrize("num_passes", [1, 2, 3])
@pytest.mark.parametrize("inner", [MQAR(), SetDisjointness(), MADSelectiveCopying()], ids=lambda task: task.name)
def test_prompt_repeats_the_context(inner, num_passes):
    task = JRTPrompt(task=inner, num_passes=num_passes)
    for split in ("train", "test"):
        once, repeated = inner.split(split, 20, 3), task.split(split, 20, 3)
        length = inner.prefix_length
        assert task.prefix_length == num_passes * length
        assert repeated.inputs.shape == (20, task.seq_len) == (20, (num_passes - 1) * length + inner.seq_len)
        for i in range(num_passes):
            assert torch.equal(repeated.inputs[:, i * length : (i + 1) * length], once.inputs[:, :length])
        assert torch.equal(repeated.inputs[:, num_passes * length :], once.inputs[:, length:])
        assert (repeated.labels[:, : num_passes * length] == IGNORE_INDEX).all()
        assert torch.equal(repeated.labels[:, num_passes * length :], once.labels[:, length:])


def test_prompt_of_mqar_has_the_form_of_its_own_num_passes():
    prompt, own = JRTPrompt(task=MQAR(seq_len=64), num_passes=3), MQAR(seq_len=80, num_passes=3)
    assert (prompt.seq_len, prompt.prefix_length) == (own.seq_len, own.prefix_length)
    assert prompt.required_bits() == own.required_bits()


def test_prompt_as_json():
    task = from_config({"name": "jrt_prompt", "num_passes": 3, "task": {"name": "mqar", "seq_len": 32}})
    assert task == JRTPrompt(task=MQAR(seq_len=32), num_passes=3)
    assert task.config()["task"]["name"] == "mqar"


def test_identity_covers_the_version_of_the_task_inside(monkeypatch):
    task = JRTPrompt()
    before = task.identity()
    monkeypatch.setattr(SetDisjointness, "version", 2)
    assert task.identity() != before


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (SetDisjointness, {"first_size": 0}, "first_size=0: must be greater than or equal to 1"),
        (SetDisjointness, {"second_size": -3}, "second_size=-3: must be greater than or equal to 1"),
        (SetDisjointness, {"vocab_size": 23}, "first_size=4 and second_size=16 .* has 19 .*: must be at least 24"),
        (SetDisjointness, {"vocab_size": 2}, "vocab_size=2: must be greater than or equal to 6"),
        (SetDisjointness, {"num_passes": 2}, "set_disjointness: unknown option num_passes=2"),
        (JRTPrompt, {"num_passes": 0}, "num_passes=0: must be greater than or equal to 1"),
        (JRTPrompt, {"task": MADInContextRecall()}, r"must have a context to repeat \(prefix_length > 0\)"),
        (JRTPrompt, {"task": "mqar"}, "task='mqar': must be a Task or a mapping"),
        (JRTPrompt, {"task": {"name": "mqra"}}, r"unknown task 'mqra' \(closest: mqar"),
        (JRTPrompt, {"task": {"name": "mqar", "seq_len": 7}}, "seq_len=7: must be even"),
    ],
)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)
