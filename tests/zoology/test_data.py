"""Data in memory: splits, the order of an epoch, and the types that numbers are kept in."""

import pytest
import torch

from zoology.data import compact, epoch_batches, load_split


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_shows_every_example_once(shuffle):
    generator = torch.Generator().manual_seed(0)
    batches = list(epoch_batches([40, 28], 4, shuffle=shuffle, generator=generator))
    for index, size in enumerate((40, 28)):
        rows = torch.cat([rows for which, rows in batches if which == index])
        assert rows.sort().values.tolist() == list(range(size))
    in_order = [index for index, _ in batches] == [0] * 10 + [1] * 7
    assert in_order is not shuffle
    again = list(epoch_batches([40, 28], 4, shuffle=shuffle, generator=generator))
    same = all(torch.equal(a[1], b[1]) for a, b in zip(batches, again))
    assert same is not shuffle


def test_splits_share_no_example(make_run):
    data = make_run().data
    rows = [row for split in ("train", "validation", "test") for _, d in load_split(data, split) for row in d.tokens]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_numbers_are_kept_in_the_smallest_type():
    assert compact(torch.tensor([-100, 32767])).dtype == torch.int16
    assert compact(torch.tensor([0, 32768])).dtype == torch.int32
    assert compact(torch.tensor([0, 32768])).tolist() == [0, 32768]


def test_the_seed_of_the_data_draws_every_split(make_run):
    data = make_run().data
    seeded = data.model_copy(update={"seed": 5})
    for split in ("train", "validation", "test"):
        for part, found in load_split(seeded, split):
            assert torch.equal(found.tokens, part.task.split(split, part.num_examples, 5).inputs)
    hashes, others = data.hashes(), seeded.hashes()
    assert all(set(hashes[split]).isdisjoint(others[split]) for split in hashes)
