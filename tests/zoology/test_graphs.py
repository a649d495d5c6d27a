"""The static step: the eager one's numbers, whatever it is made of, shares or prepares beside other work."""

import pytest
import torch

import architectures
from zoology import graphs
from zoology.config import DataConfig, MaskedPrefix, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.data import gather_labels, load_split
from zoology.graphs import PickLabelled, batch_loss, compile_apart, fetch_loop, forget_loops, reside
from zoology.loops import labelled_loss
from zoology.model import LanguageModel
from zoology.tasks import IGNORE_INDEX, MQAR, SetDisjointness
from zoology.train import TrainingDiverged, train

pytestmark = pytest.mark.usefixtures("no_loops_left")


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 0.05},
        {"schedule": "step", "min_lr": 1e-3},
        {"model": {"channel_mixer": "swiglu", "norm": "rmsnorm", "n_layers": 3, "max_positions": 24}},
    ],
)
def test_static_steps_are_eager_steps(small_run, options):
    """Short batches, clipping, schedule and optimizer included; sums differ in their order only."""
    eager, static = (train(small_run(**options), mode=mode) for mode in ("eager", "static"))
    assert (eager.execution.mode, static.execution.mode) == ("eager", "static")
    assert [e.loss for e in static.epochs] == pytest.approx([e.loss for e in eager.epochs], rel=2e-5)
    assert torch.allclose(weights(static.model), weights(eager.model), rtol=0, atol=2e-5)
    for split in ("validation", "test"):
        assert getattr(static, split) == getattr(eager, split)


def test_scores_do_not_depend_on_the_batches_they_are_made_of(small_run, monkeypatch):
    """Labels are counted example by example, whether the last batch is full, short, or the only one."""
    run, found, sizes = small_run(epochs=1), [], []
    for batches in (1 / 24, 1, 2, 100):  # of 24 x 24 tokens
        monkeypatch.setattr(graphs, "EVALUATION_BATCHES", batches)
        forget_loops()
        found.append(train(run, mode="static"))
        (loop,) = graphs._loops.values()
        sizes.append([(loop.evaluation_size(50, 16), loop.evaluation_size(30, 24), loop.evaluation_size(9, 10**6))])
    assert sizes == [[(1, 1, 1)], [(36, 24, 1)], [(50, 30, 1)], [(50, 30, 1)]]
    assert all(outcome.test == found[0].test and outcome.validation == found[0].validation for outcome in found)
    assert [score.num_examples for score in found[0].test.values()] == [50, 30]


def test_a_loop_serves_other_rates_and_seeds_with_their_own_numbers(small_run):
    def numbers(outcome):
        return [epoch.loss for epoch in outcome.epochs], outcome.test, weights(outcome.model).tolist()

    configs = [small_run(lr=1e-2), small_run(lr=3e-3, seed=1, epochs=3), small_run(lr=1e-2)]
    shared = [train(config, mode="static") for config in configs]
    assert [outcome.execution.reused for outcome in shared] == [False, True, True]
    assert shared[1].execution.build_seconds == 0
    assert numbers(shared[0]) == numbers(shared[2])
    forget_loops()
    alone = train(configs[1], mode="static")
    assert not alone.execution.reused
    assert numbers(alone) == numbers(shared[1])


def test_another_model_decay_or_precision_is_another_loop(small_run):
    loops = [
        fetch_loop(config, torch.device("cpu"), lambda config=config: load_splits(config), "static")[0]
        for config in (small_run(), small_run(weight_decay=0.0), small_run(precision="bf16"), small_run(("attention",)))
    ]
    assert len({id(loop) for loop in loops}) == 4
    again = fetch_loop(small_run(("attention",), lr=1.0), torch.device("cpu"), None, "static")[0]
    assert again is loops[3]


def load_splits(config):
    return {split: load_split(config.data, split) for split in ("train", "validation", "test")}


def test_the_best_epoch_is_restored(small_run):
    config = small_run(epochs=5, select="best", lr=3e-2)
    eager, static = (train(config, mode=mode) for mode in ("eager", "static"))
    assert static.selected_epoch == eager.selected_epoch
    assert static.validation == eager.validation
    best = max(epoch.validation_accuracy for epoch in static.epochs)
    assert sum(score.accuracy for score in static.validation.values()) / 2 == pytest.approx(best)


def test_a_loss_that_is_no_number_names_the_step(small_run):
    with pytest.raises(TrainingDiverged, match=r"epoch 1, step \d of 5 \(lr=1e\+30\)"):
        train(small_run(lr=1e30), mode="static")


def test_filling_rows_count_for_nothing(small_run):
    torch.manual_seed(0)
    model = LanguageModel(small_run().model).double()
    data = gather_labels(MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2).sample(5, seed=0))
    order = torch.tensor([[0, 1, 2], [4, -1, 3]], dtype=torch.int32)
    counter = torch.ones(1, dtype=torch.int64)
    batch_loss(model, reside(data), order, counter, None, 0, "fp32").backward()
    filled = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    labelled_loss(model, data.rows(torch.tensor([4, 3]))).backward()
    for one, other in zip(filled, model.parameters()):
        assert torch.allclose(one, other.grad, rtol=1e-9, atol=1e-14)


def test_picking_has_the_gradient_of_gathering():
    batch = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=3).sample(4, seed=0)
    batch.labels[2, batch.labels[2].ne(IGNORE_INDEX).nonzero()[:2, 0]] = IGNORE_INDEX
    batch.labels[3, 0] = 5  # a true label where padding labels point to
    data = gather_labels(batch)
    resident = reside(data)
    positions, targets = data.positions.long(), data.targets.long()
    x = torch.randn(4, 16, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, positions.shape[1], 8, dtype=torch.float64) * (targets != IGNORE_INDEX)[..., None]
    index = positions[..., None].expand(-1, -1, 8)
    wanted = torch.autograd.grad(x.gather(1, index), x, upstream)[0]
    picked = PickLabelled.apply(x, positions, resident.slots.long())
    assert torch.equal(picked, x.gather(1, index))
    assert torch.equal(torch.autograd.grad(picked, x, upstream)[0], wanted)


@pytest.mark.parametrize("names", [("base_conv", "attention"), ("sliding_window", "based")])
def test_the_loss_is_one_graph(small_run, names):
    """What torch.compile traces without a break computes the same loss and gradients."""
    torch.manual_seed(0)
    model = LanguageModel(small_run(names).model)
    data = reside(gather_labels(MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2).sample(5, seed=0)))
    order, counter = torch.tensor([[0, 3, -1, 1]], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)

    def loss(*columns):
        return batch_loss(model, type(data)(*columns), order, counter, None, 0, "fp32")

    plain = torch.autograd.grad(loss(*data), list(model.parameters()))
    traced = compile_apart(loss, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(traced(*data), list(model.parameters())), plain):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_slices_that_differ_in_their_labels_only_share_compiled_code(small_run, monkeypatch):
    def run(mode):
        config = small_run()
        pairs = tuple(Slice(task=MQAR(vocab_size=32, seq_len=16, num_kv_pairs=p), num_examples=30) for p in (2, 4))
        return train(config.model_copy(update={"data": config.data.model_copy(update={"train": pairs})}), mode=mode)

    compiled = []

    def compile_eagerly(function, options, whole=True):
        compiled.append(function.__name__)
        return compile_apart(function, backend="aot_eager")

    monkeypatch.setattr(graphs, "compile_apart", compile_eagerly)
    torch._dynamo.utils.counters.clear()
    one, other = run("static"), run("compiled")
    assert compiled == ["finish_step", "loss_of_batch"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert [e.loss for e in one.epochs] == pytest.approx([e.loss for e in other.epochs], rel=1e-5)


@pytest.mark.parametrize("name", architectures.names())
def test_the_static_loss_of_every_architecture_has_the_gradients_of_the_plain_one(small_run, name):
    torch.manual_seed(0)
    model = LanguageModel(small_run((name,)).model).double()
    data = gather_labels(MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2).sample(5, seed=0))
    # A penalty averaged over the batch sees filling rows.
    filling = [] if name == "input_dependent_sparse_attention" else [-1]
    order = torch.tensor([[0, 3, *filling, 1]], dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int64)
    plain = labelled_loss(model, data.rows(torch.tensor([0, 3, 1])))
    static = batch_loss(model, reside(data), order, counter, None, 0, "fp32")
    assert torch.allclose(static, plain, rtol=1e-12)
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (static, plain))):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-8, atol=1e-12)


def test_what_cannot_run_as_a_graph_runs_without_and_says_why(small_run, caplog):
    """On a CPU nothing can be recorded: every rung of the ladder fails and is logged."""
    loop, reason = fetch_loop(small_run(), torch.device("cpu"), lambda: load_splits(small_run()), "auto")
    assert loop is None
    assert [clause.partition(":")[0] for clause in reason.split("; ")] == ["compiled graph", "graph"]
    assert [record.args[:2] for record in caplog.records] == [("attention", "compiled graph"), ("attention", "graph")]


@pytest.fixture
def refused_by_the_compiler(monkeypatch):
    """Attention's product is a call that cannot be compiled; the rest compiles without a compiler for CPUs."""
    product = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", torch.compiler.disable(lambda *a, **k: product(*a, **k))
    )

    def compile_eagerly(function, options, whole=True):
        return compile_apart(function, backend="aot_eager", whole=whole)

    monkeypatch.setattr(graphs, "compile_apart", compile_eagerly)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_around_what_the_compiler_refuses_the_rest_is_compiled(small_run, refused_by_the_compiler):
    config = small_run(("base_conv", "attention"))
    config = config.model_copy(update={"model": config.model.model_copy(update={"embed_dropout": 0.0})})
    plain = train(config, mode="static")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        train(config, mode="compiled")
    torch._dynamo.utils.counters.clear()
    outcome = train(config, mode="pieces")
    assert outcome.execution.mode == "pieces"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    assert [e.loss for e in outcome.epochs] == pytest.approx([e.loss for e in plain.epochs], rel=1e-5)


def test_pieces_are_tried_only_where_the_compiler_refused_the_whole(small_run, monkeypatch):
    tried, clock = [], [0.0]
    monkeypatch.setattr(graphs.time, "perf_counter", lambda: clock[0])

    def loop(error, succeeds):
        class Loop:
            execution = graphs.Execution()

            def __init__(self, *_, compiled, captured):
                tried.append((compiled, captured))
                clock[0] += 7.0
                if (compiled, captured) != succeeds:
                    raise error

        return Loop

    refused = torch._dynamo.exc.Unsupported("a disabled function\nand more")
    for error, succeeds, wanted in (
        (refused, (graphs.PIECES, True), [(True, True), (graphs.PIECES, True)]),
        (refused, (False, True), [(True, True), (graphs.PIECES, True), (False, True)]),
        (RuntimeError("no compiler"), (False, True), [(True, True), (False, True)]),
    ):
        tried.clear()
        forget_loops()
        monkeypatch.setattr(graphs, "StaticLoop", loop(error, succeeds))
        found, reason = fetch_loop(small_run(), torch.device("cpu"), dict, "auto")
        assert tried == wanted
        assert found.execution.reason == reason
        assert reason.count(type(error).__name__) == len(wanted) - 1
        assert found.execution.build_seconds == 7.0 * len(wanted)  # an attempt in vain takes its time, too
    forget_loops()


def masked_run(task):
    """A run with the masked-token loss on the prefix."""
    part = Slice(task=task, num_examples=20)
    return RunConfig(
        architecture="attention",
        model=ModelConfig(vocab_size=64, d_model=16, layers=[layer("attention")], embed_dropout=0.0),
        data=DataConfig(train=[part], test=[part], batch_size=8),
        train=TrainConfig(lr=1e-3, epochs=2, masked_prefix=MaskedPrefix(share=0.3, weight=0.5)),
    )


def test_the_masked_prefix_is_that_of_the_eager_loop(monkeypatch):
    """With the same draws: the loops take theirs from different generators."""
    monkeypatch.setattr(torch, "rand", lambda n, length, **_: (torch.arange(n * length) * 7919 % 97).view(n, length))
    config = masked_run(SetDisjointness(vocab_size=64, first_size=4, second_size=8))
    eager, static = (train(config, mode=mode) for mode in ("eager", "static"))
    assert [e.loss for e in static.epochs] == pytest.approx([e.loss for e in eager.epochs], rel=2e-5)
    bare = train(config.model_copy(update={"train": TrainConfig(lr=1e-3, epochs=2)}), mode="static")
    assert static.epochs[0].loss > bare.epochs[0].loss + 1


def test_labels_within_a_masked_prefix_are_refused(monkeypatch):
    config = masked_run(SetDisjointness(vocab_size=64, first_size=4, second_size=8))
    monkeypatch.setattr(SetDisjointness, "prefix_length", property(lambda self: self.seq_len))
    with pytest.raises(ValueError, match=r"train.masked_prefix: slice .* has labels within its prefix"):
        train(config, mode="static")


def test_what_a_thread_prepares_changes_no_number(small_run, monkeypatch):
    """The loss is tried for every number of labels and a twin predicts at lengths that training lacks."""
    config = small_run()
    test = [*config.data.test, Slice(task=MQAR(vocab_size=32, seq_len=40, num_kv_pairs=4), num_examples=30)]
    config = config.model_copy(update={"data": config.data.model_copy(update={"test": tuple(test)})})
    plain = train(config, mode="static")
    forget_loops()
    done, build, probe = [], graphs.StaticLoop.record_steps, graphs.StaticLoop._probe
    hidden = LanguageModel.hidden
    monkeypatch.setattr(
        LanguageModel,
        "hidden",
        lambda self, tokens, *rest: done.append(tuple(tokens.shape)) or hidden(self, tokens, *rest),
    )

    def probe_beside(loop):
        with graphs._Beside(loop.device, loop._rehearse_losses):
            return probe(loop)

    def build_beside(loop):
        before = len(done)
        twin = graphs.copy.deepcopy(loop.model)
        with graphs._Beside(loop.device, lambda: loop._rehearse_evaluation(twin)):
            pass
        assert done[before:] == [(28, 40)]
        build(loop)

    monkeypatch.setattr(graphs.StaticLoop, "_probe", probe_beside)
    monkeypatch.setattr(graphs.StaticLoop, "record_steps", build_beside)
    beside = train(config, mode="static")
    assert [epoch.loss for epoch in beside.epochs] == [epoch.loss for epoch in plain.epochs]
    assert beside.test == plain.test


def test_what_cannot_be_prepared_is_left_to_those_who_need_it():
    with graphs._Beside(torch.device("cpu"), lambda: 1 / 0) as beside:
        beside.wait()
    with graphs._Beside(torch.device("cpu"), None) as nothing:
        nothing.wait()


@pytest.mark.parametrize(("precision", "again"), [("fp32", True), ("bf16", False)])
def test_a_step_that_keeps_much_computes_some_of_it_again(small_run, monkeypatch, precision, again):
    """What is kept for the backward pass is counted on a few rows, without what does not grow with the batch."""
    config = small_run(("base_conv",), batch_size=48, precision=precision)
    data = {split: load_split(config.data, split) for split in ("train", "validation", "test")}

    def build():
        return graphs.StaticLoop(config, torch.device("cpu"), data, compiled=False, captured=False)

    with graphs._counting_kept(16, 24) as kept:
        x = torch.ones(16, 24, 8, requires_grad=True)
        (x.exp() @ torch.ones(8, 4, requires_grad=True).exp()).sum()
    assert sum(kept.values()) == 16 * 24 * 8 * 4  # the result of exp, which both operations keep; no weight
    assert not build().recomputes
    monkeypatch.setattr(graphs, "LARGE_ACTIVATIONS", 1000.0)
    loop = build()
    assert loop.recomputes is again
    before = torch._functorch.config.activation_memory_budget
    with loop._partitioning():
        assert (torch._functorch.config.activation_memory_budget < before) is again
    assert torch._functorch.config.activation_memory_budget == before
