"""Evaluation of any callable, and what a score says."""

import math
from types import SimpleNamespace

import pytest
import torch

import zoology
from zoology.evaluate import summarise
from zoology.tasks import MQAR

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
