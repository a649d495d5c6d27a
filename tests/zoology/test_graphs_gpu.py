"""The static loop on a GPU: every mode has the numbers of the eager loop, whatever is done beside it or done again."""

import threading
import time

import pytest
import torch

from zoology import graphs
from zoology.config import Slice
from zoology.data import load_split
from zoology.graphs import StaticLoop, forget_loops
from zoology.model import LanguageModel
from zoology.tasks import MQAR
from zoology.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_loops_left")]

CUDA = torch.device("cuda")


@pytest.fixture
def quiet_run(make_run):
    """A small run without dropout, which no two modes draw alike."""

    def build(layers=("base_conv", "attention"), *, test=(), **options):
        run = make_run(layers, epochs=3, **options)
        data = run.data.model_copy(update={"test": (*run.data.test, *test)})
        return run.model_copy(update={"model": run.model.model_copy(update={"embed_dropout": 0.0}), "data": data})

    return build


def assert_same(found, wanted):
    """Sums differ in their order: losses to 1e-4, and no example's answer is anything but a near tie."""
    assert [epoch.loss for epoch in found.epochs] == pytest.approx([epoch.loss for epoch in wanted.epochs], rel=1e-4)
    for split in ("validation", "test"):
        for label, score in getattr(wanted, split).items():
            assert getattr(found, split)[label].accuracy == pytest.approx(score.accuracy, abs=0.03)


@pytest.mark.parametrize("mode", ["static", "graph", "compiled", "compiled graph"])
def test_every_mode_has_the_numbers_of_the_eager_loop(quiet_run, mode):
    config = quiet_run()
    eager, found = (train(config, device="cuda", mode=name) for name in ("eager", mode))
    assert found.execution.mode == mode
    assert eager.epochs[-1].loss < eager.epochs[0].loss
    assert_same(found, eager)


def test_around_what_the_compiler_refuses_pieces_are_recorded(quiet_run, monkeypatch):
    product = torch.nn.functional.scaled_dot_product_attention
    config = quiet_run()
    eager = train(config, device="cuda", mode="eager")
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", torch.compiler.disable(lambda *a, **k: product(*a, **k))
    )
    torch._dynamo.utils.counters.clear()
    found = train(config, device="cuda", mode="auto")
    assert found.execution.mode == "pieces graph"
    assert found.execution.reason.startswith("compiled graph: Unsupported")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    assert_same(found, eager)


def test_what_threads_prepare_ends_before_the_recording_and_changes_no_number(quiet_run, monkeypatch):
    """Losses are tried while the model is; a twin predicts at a length that training lacks while steps are compiled."""
    longer = Slice(task=MQAR(vocab_size=32, seq_len=40, num_kv_pairs=4), num_examples=30, name="longer")
    config = quiet_run(test=[longer])
    monkeypatch.setattr(graphs, "num_cores", lambda: 1 << 20)
    alone = train(config, device="cuda", mode="compiled graph")
    forget_loops()
    torch._dynamo.reset()
    happened = []

    def noted(name):
        function = getattr(StaticLoop, name)

        def run(self, *args):
            assert threading.current_thread() is not threading.main_thread()
            function(self, *args)
            torch.cuda.synchronize()
            time.sleep(0.5)
            happened.append(name)

        monkeypatch.setattr(StaticLoop, name, run)

    class Recording(torch.cuda.graph):
        def __enter__(self):
            happened.append("recording")
            return super().__enter__()

    noted("_rehearse_losses")
    noted("_rehearse_evaluation")
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(graphs, "num_cores", lambda: 1)
    beside = train(config, device="cuda", mode="compiled graph")
    assert happened[:3] == ["_rehearse_losses", "_rehearse_evaluation", "recording"]
    assert happened[2:] == ["recording"] * len(happened[2:])
    assert beside.execution.mode == "compiled graph"
    assert_same(beside, alone)


def test_a_thread_works_on_the_device_it_is_for():
    seen = []
    with graphs._Beside(torch.device("cuda", torch.cuda.device_count() - 1), lambda: seen.append(torch.ones(2).cuda())):
        pass
    assert seen[0].device.index == torch.cuda.device_count() - 1
    with graphs._Beside(CUDA, lambda: torch.ones(2, device="cuda") @ torch.ones(3, device="cuda")) as failed:
        failed.wait()
    assert torch.ones(2, device="cuda").sum().item() == 2


def test_what_is_computed_again_takes_less_memory_and_has_the_same_numbers(quiet_run, monkeypatch):
    config = quiet_run(("base_conv", "hyena"))
    part = Slice(task=MQAR(vocab_size=32, seq_len=256, num_kv_pairs=8), num_examples=256)
    few = part.model_copy(update={"num_examples": 20})
    data = config.data.model_copy(update={"train": (part,), "test": (few,), "batch_size": 128})
    model = config.model.model_copy(update={"d_model": 64})
    config = config.model_copy(update={"data": data, "model": model})
    splits = {
        split: [(part, rows.to(CUDA)) for part, rows in load_split(data, split)]
        for split in ("train", "validation", "test")
    }
    found = []
    for limit in (float("inf"), 1.0):
        forget_loops()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        monkeypatch.setattr(graphs, "LARGE_ACTIVATIONS", limit)
        loop = StaticLoop(config, CUDA, splits, compiled=True, captured=True)
        torch.manual_seed(0)
        loop.load(LanguageModel(config.model).to(CUDA), config)
        loop.order.copy_(torch.arange(256, dtype=torch.int32).view(2, 128))
        loop.scalars.copy_(torch.tensor([0.0, 1.0, 1.0]))
        loop.replay([0, 0])
        found.append((loop.recomputes, loop.peak_memory_bytes, loop.losses.tolist()))
        del loop
    (plain, peak, losses), (again, lower, same) = found
    assert (plain, again) == (False, True)
    assert lower < peak
    assert same == pytest.approx(losses, rel=1e-5)
