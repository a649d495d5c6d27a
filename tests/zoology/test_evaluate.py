"""Evaluation of any callable, and what a score says."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import zoology
from zoology.data import Labelled
from zoology.evaluate import score, summarise
from zoology.tasks import IGNORE_INDEX, MQAR, Task

TASK = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2, random_non_queries=False)


def oracle(tokens):
    """Logits of a perfect recaller: the token that followed the first occurrence of the current one."""
    first = (tokens[:, None, :] == tokens[:, :, None]).int().argmax(-1)
    following = tokens.gather(1, (first + 1).clamp_max(tokens.shape[1] - 1))
    return torch.nn.functional.one_hot(following, 32).float()


def test_evaluate_scores_a_perfect_and_a_blind_callable():
    perfect = zoology.evaluate(oracle, TASK, 50, 0)
    assert perfect == (1.0, 0.0, 50)
    blind = zoology.evaluate(lambda tokens: torch.zeros(*tokens.shape, 32), TASK, 50, 0)
    assert blind.accuracy == 0.0


def test_a_score_has_the_standard_error_of_its_mean():
    score = summarise(torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0], dtype=torch.float64))
    assert score.accuracy == pytest.approx(0.7)
    assert score.stderr == pytest.approx(math.sqrt((3 * 0.3**2 + 0.7**2 + 0.2**2) / 4 / 5))
    assert score.num_examples == 5
    assert math.isnan(summarise(torch.ones(1)).stderr)


def test_evaluate_takes_shifted_logits_and_output_objects():
    def shifted(tokens):
        return SimpleNamespace(logits=torch.roll(oracle(tokens), -1, dims=1))

    assert zoology.evaluate(shifted, TASK, 50, 0, alignment="next").accuracy == 1.0
    assert zoology.evaluate(shifted, TASK, 50, 0).accuracy < 0.5


def test_evaluate_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match=r"shape \[50, 16, 31\], expected \[50, 16, 32\]"):
        zoology.evaluate(lambda tokens: torch.zeros(*tokens.shape, 31), TASK, 50, 0)
    with pytest.raises(ValueError, match="alignment='previous'"):
        zoology.evaluate(oracle, TASK, 5, 0, alignment="previous")
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        zoology.evaluate(oracle, TASK, 5, 0, batch_size=0)


def test_evaluate_leaves_a_module_in_its_mode():
    class Always(torch.nn.Module):
        def forward(self, tokens):
            assert not self.training
            return oracle(tokens)

    model = Always().train()
    zoology.evaluate(model, TASK, 5, 0)
    assert model.training


def test_every_example_counts_the_same_however_many_labels_it_has():
    """Of three, one, and two labels: what fills the rows up is no answer, not even a right one."""
    none = IGNORE_INDEX
    targets = torch.tensor([[5, 6, 7], [5, none, none], [5, 6, none]])
    data = Labelled(torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64), targets)
    answers = torch.tensor([[5, 6, 0], [5, none, none], [0, 6, none]])
    for batch_size in (1, 2, 3):
        rows = iter(answers.split(batch_size))
        found = score(lambda batch, rows=rows: next(rows), data, batch_size)
        assert found.accuracy == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
        assert found.num_examples == 3


def test_a_shifted_label_may_stand_anywhere_but_at_the_first_position():
    class Echo(Task):
        """Every token from `first` on is its own answer, in every second row only the last one is asked for."""

        vocab_size: int = 32
        seq_len: int = 6
        first: int = 1

        def draw(self, stream, n):
            inputs = stream.integers(0, 32, n, 6).astype(np.int64)
            labels = np.full_like(inputs, IGNORE_INDEX)
            labels[:, self.first :] = inputs[:, self.first :]
            labels[::2, :-1] = IGNORE_INDEX
            return inputs, labels

    def foreseeing(tokens):
        return torch.nn.functional.one_hot(tokens.roll(-1, 1), 32).float()

    assert zoology.evaluate(foreseeing, Echo(), 20, 0, alignment="next").accuracy == 1.0
    with pytest.raises(ValueError, match="alignment='next': a label at position 0 has no token before it"):
        zoology.evaluate(foreseeing, Echo(first=0), 20, 0, alignment="next")
