"""A run that was interrupted is one that was not, bit for bit."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from zoology.graphs import forget_loops
from zoology.train import train

pytestmark = pytest.mark.usefixtures("no_loops_left")


class Killed(Exception):
    pass


def interrupted(config, path, after, **options):
    """Train, be killed right after epoch `after`, and go on; the outcome and the epochs that were reported then."""

    def die(epoch):
        if epoch.epoch == after:
            raise Killed

    with pytest.raises(Killed):
        train(config, checkpoint=path, on_epoch=die, **options)
    seen = []
    return train(config, checkpoint=path, on_epoch=seen.append, **options), seen


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("options", [{}, {"select": "best", "schedule": "step"}])
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(small_run, tmp_path, mode, options):
    config = small_run(epochs=4, model={"embed_dropout": 0.1, "resid_dropout": 0.1}, **options)
    whole = train(config, mode=mode)
    forget_loops()
    resumed, seen = interrupted(config, tmp_path / "state.pt", 2, mode=mode)
    assert [(e.epoch, e.loss, e.validation) for e in seen] == [(e.epoch, e.loss, e.validation) for e in whole.epochs]
    assert torch.equal(*(parameters_to_vector(outcome.model.parameters()) for outcome in (resumed, whole)))
    assert (resumed.test, resumed.validation) == (whole.test, whole.validation)
    assert resumed.selected_epoch == whole.selected_epoch
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_finished_run_is_only_scored_again(small_run, tmp_path):
    config, path = small_run(), tmp_path / "state.pt"
    first, again = (train(config, checkpoint=path) for _ in range(2))
    assert again.epochs == first.epochs
    assert (again.test, again.validation) == (first.test, first.validation)


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(small_run, tmp_path, monkeypatch):
    config, path = small_run(epochs=3), tmp_path / "state.pt"
    whole = train(config)
    save, calls = torch.save, []

    def half(state, file):
        calls.append(len(state["epochs"]))
        if len(calls) == 2:
            file.write(b"half")
            raise Killed
        save(state, file)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        train(config, checkpoint=path)
    assert train(config, checkpoint=path).test == whole.test
    assert calls == [1, 2, 2, 3]


def test_a_checkpoint_of_another_run_is_refused(small_run, tmp_path):
    path = tmp_path / "state.pt"
    train(small_run(epochs=1), checkpoint=path)
    other = small_run(epochs=1, seed=1)
    with pytest.raises(ValueError, match=f"allowed is run {other.run_id}, version 1"):
        train(other, checkpoint=path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"state.pt cannot be read \(.*\): delete it"):
        train(other, checkpoint=path)
