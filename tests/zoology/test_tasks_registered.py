"""What holds for every registered task: each is generated, hashed and described the same way."""

import hashlib
import json

import pytest
import torch

from zoology import tasks
from zoology.tasks import IGNORE_INDEX

SPLITS = ("train", "validation", "test")

# Hashes of 300 training examples with the default options, seed 5, as little-endian int64, inputs then labels.
GOLDEN = {
    "compound_key_mqar": "185d1881e7e34236",
    "dense_mqar": "a58c282c8b5c5993",
    "forgetting_mqar": "5e52ec7e6f81d12a",
    "jrt_prompt": "303ef1ac30596632",
    "last_value_mqar": "e3c9260a32fd0d04",
    "mad_compression": "58954607db4f6d82",
    "mad_fuzzy_recall": "49d636eedcb82238",
    "mad_in_context_recall": "9b16f50a40df04ba",
    "mad_memorization": "b29b8596582d7337",
    "mad_noisy_recall": "e301eda0ece2cbf1",
    "mad_selective_copying": "e3e77079abe6777f",
    "mqar": "dcabbb94ccdc3ed2",
    "set_disjointness": "8c1ba251c3e4f7d8",
    "two_hop_mqar": "4e5e3718bff11dda",
}


def digest(batch) -> str:
    data = hashlib.sha256()
    for tensor in batch:
        data.update(tensor.numpy().astype("<i8").tobytes())
    return data.hexdigest()[:16]


def test_every_task_has_golden_bytes():
    assert sorted(GOLDEN) == tasks.names()


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_are_golden(name):
    assert digest(tasks.create(name).split("train", 300, seed=5)) == GOLDEN[name]


@pytest.mark.parametrize("name", tasks.names())
class TestEveryTask:
    def configs(self, name):
        return [tasks.create(name), tasks.create(name, **tasks.get(name).example)]

    def test_examples_are_tokens_and_labels(self, name):
        for task in self.configs(name):
            inputs, labels = task.sample(100, 0)
            assert inputs.shape == labels.shape == (100, task.seq_len)
            assert inputs.dtype == labels.dtype == torch.int64
            assert inputs.min() >= 0
            assert inputs.max() < task.vocab_size
            scored = labels[labels != IGNORE_INDEX]
            assert scored.min() >= 0
            assert scored.max() < task.vocab_size
            assert (labels != IGNORE_INDEX).any(1).all()

    def test_nothing_is_asked_in_the_prefix(self, name):
        for task in self.configs(name):
            assert 0 <= task.prefix_length < task.seq_len
            assert (task.sample(50, 0).labels[:, : task.prefix_length] == IGNORE_INDEX).all()

    def test_a_longer_sample_begins_with_the_shorter(self, name):
        for task in self.configs(name):
            long = task.sample(70, 1)
            for n in (1, 2, 33):
                assert torch.equal(task.sample(n, 1).inputs, long.inputs[:n])
                assert torch.equal(task.sample(n, 1).labels, long.labels[:n])

    def test_splits_and_seeds_are_other_examples(self, name):
        task = tasks.create(name)
        batches = [task.split(split, 20, seed).inputs for split in SPLITS for seed in (0, 1)]
        rows = {tuple(row) for batch in batches for row in batch.tolist()}
        assert len(rows) == 120

    def test_config_round_trips(self, name):
        for task in self.configs(name):
            again = tasks.from_config(json.loads(json.dumps(task.config())))
            assert again == task
            assert torch.equal(again.sample(5, 0).inputs, task.sample(5, 0).inputs)
            assert tasks.dataset_hash(again, "test", 5, 0) == tasks.dataset_hash(task, "test", 5, 0)

    def test_required_bits_fit_what_can_be_said(self, name):
        """Positive, not above what the context can hold, and no more after another pass."""
        for task in self.configs(name):
            bits = task.required_bits()
            assert 0 < bits <= task.seq_len * torch.tensor(float(task.vocab_size)).log2().item()
            assert task.required_bits_after(1) == bits
            assert task.required_bits_after(2) <= bits

    def test_has_a_page_for_the_table(self, name):
        page = tasks.describe(name)
        assert page["name"] == name
        assert page["definition"].endswith(".")
        assert "\n" not in page["definition"]
        assert page["example"].count(">") >= 1
        assert page["required_bits"].endswith(".")
        assert page["default_bits"] == tasks.create(name).required_bits()
        assert "arXiv" in page["source"] or "HazyResearch" in page["source"] or "Zoology" in page["source"]
        assert json.dumps(page)

    def test_unknown_option(self, name):
        with pytest.raises(ValueError, match=rf"{name}: unknown option sequence=3.*; options are "):
            tasks.create(name, sequence=3)
