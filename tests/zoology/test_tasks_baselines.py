"""Baselines against hand-made batches and against what theory says of MQAR."""

import numpy as np
import pytest
import torch

from zoology.tasks import IGNORE_INDEX, MQAR, Batch, create, names
from zoology.tasks.baselines import baselines, majority, position_copy, position_only

N = IGNORE_INDEX


def batch(inputs, labels):
    return Batch(torch.tensor(inputs), torch.tensor(labels))


TRAIN = batch([[5, 6, 1, 2], [7, 8, 1, 2], [9, 4, 1, 2]], [[N, N, 6, 3], [N, N, 8, 3], [N, N, 3, 2]])
TEST = batch([[4, 7, 1, 2], [6, 5, 1, 2]], [[N, N, 7, 3], [N, 6, 5, N]])


def test_by_hand():
    assert majority(TRAIN, TEST) == 1 / 4  # 3 everywhere
    # Position 2 saw 6, 8, 3 once each: the smallest, 3; position 3: 3; position 1 was never scored: 3.
    assert position_only(TRAIN, TEST) == 1 / 4
    # Position 2 copies position 1 (6 and 8 were right); position 3 had its label nowhere but once at itself.
    assert position_copy(TRAIN, TEST) == 2 / 4


def test_position_copy_may_copy_the_position_itself_but_none_after_it():
    train = batch([[1, 2, 3], [4, 5, 6]], [[N, 2, N], [N, 5, N]])
    assert position_copy(train, batch([[7, 8, 9]], [[N, 8, N]])) == 1.0
    later = batch([[1, 2, 3], [4, 5, 6]], [[N, 3, N], [N, 6, N]])
    assert position_copy(later, batch([[7, 8, 9]], [[N, 9, N]])) == 0.0


def test_majority_of_a_skewed_label():
    train = batch([[0, 0, 0]], [[1, 1, 0]])
    assert majority(train, batch([[0, 0, 0]], [[1, 0, N]])) == 0.5


def test_position_only_reads_the_position():
    train = batch([[0, 0]] * 3, [[4, 5], [4, 6], [7, 5]])
    assert position_only(train, batch([[0, 0]], [[4, 5]])) == 1.0
    assert majority(train, batch([[0, 0]], [[4, 5]])) == 0.5


def test_dense_mqar_can_be_guessed_from_the_layout():
    """With as many slots as pairs, the first question is about the first pair with the power law's p_1."""
    task = MQAR(vocab_size=512, seq_len=16, num_kv_pairs=4)
    found = baselines(task, num_train=4000, num_test=4000)
    p = np.arange(1, 5) ** -0.99
    p /= p.sum()
    rows = np.arange(4)
    # P(pair j is asked in slot i): successive draws without replacement, enumerated.
    place = np.zeros((4, 4))
    for order in np.array(np.meshgrid(*[rows] * 4)).reshape(4, -1).T:
        weight, left = float(len(set(order)) == 4), 1.0
        for slot in order:
            weight *= p[slot] / max(left, 1e-9)
            left -= p[slot]
        place[rows, order] += weight
    assert place.sum() == pytest.approx(4)
    assert found["position_copy"] == pytest.approx(place.max(0).mean(), abs=0.015)
    assert found["position_copy"] > 0.3
    assert found["majority"] < 0.02
    assert found["position_only"] < 0.02


@pytest.mark.parametrize("name", names())
def test_every_task_has_baselines(name):
    found = baselines(create(name), num_train=50, num_test=50)
    assert set(found) == {"majority", "position_only", "position_copy"}
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
