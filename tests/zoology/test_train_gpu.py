"""The static step, its optimizer, precision and checkpoints: on a CPU without recording, on a GPU with it."""

import pytest
import torch
from torch import nn

import architectures
from zoology import graphs
from zoology.config import DataConfig, MaskedPrefix, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.data import compact, gather_labels, load_split
from zoology.graphs import PickLabelled, batch_loss, compile_apart, fetch_loop, finish_step, forget_loops, reside
from zoology.loops import labelled_loss
from zoology.model import LanguageModel
from zoology.optimizer import FlatAdamW
from zoology.precision import check_precision
from zoology.tasks import IGNORE_INDEX, MQAR, SetDisjointness
from zoology.train import TrainingDiverged, train


@pytest.fixture(autouse=True)
def _no_loops_left():
    forget_loops()
    yield
    forget_loops()


def small_run(names=("base_conv", "attention"), *, seed=0, batch_size=24, model=None, **options):
    """Slices of 60 and 30 examples in batches of 24: both end in a short batch. No dropout."""
    short = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2)
    long = MQAR(vocab_size=32, seq_len=24, num_kv_pairs=4)
    model = {"embed_dropout": 0.0} | (model or {})
    options = {"lr": 1e-2, "epochs": 2, "stop_accuracy": None} | options
    return RunConfig(
        architecture=names[-1],
        model=ModelConfig(vocab_size=32, d_model=16, layers=[layer(name) for name in names], **model),
        data=DataConfig(
            train=[Slice(task=short, num_examples=60), Slice(task=long, num_examples=30)],
            test=[Slice(task=short, num_examples=50, name="short"), Slice(task=long, num_examples=30, name="long")],
            batch_size=batch_size,
        ),
        train=TrainConfig(**options),
        seed=seed,
    )


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# -- the static step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 0.05},
        {"schedule": "step", "min_lr": 1e-3},
        {"model": {"channel_mixer": "swiglu", "norm": "rmsnorm", "n_layers": 3, "max_positions": 24}},
    ],
)
def test_static_steps_are_eager_steps(options):
    """Short batches, clipping, schedule and optimizer included; sums differ in their order only."""
    eager, static = (train(small_run(**options), mode=mode) for mode in ("eager", "static"))
    assert (eager.execution.mode, static.execution.mode) == ("eager", "static")
    assert [e.loss for e in static.epochs] == pytest.approx([e.loss for e in eager.epochs], rel=2e-5)
    assert torch.allclose(weights(static.model), weights(eager.model), rtol=0, atol=2e-5)
    for split in ("validation", "test"):
        assert getattr(static, split) == getattr(eager, split)


def test_scores_do_not_depend_on_the_batches_they_are_made_of(monkeypatch):
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


def test_a_loop_serves_other_rates_and_seeds_with_their_own_numbers():
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


def test_another_model_decay_or_precision_is_another_loop():
    loops = [
        fetch_loop(config, torch.device("cpu"), lambda config=config: load_splits(config), "static")[0]
        for config in (small_run(), small_run(weight_decay=0.0), small_run(precision="bf16"), small_run(("attention",)))
    ]
    assert len({id(loop) for loop in loops}) == 4
    again = fetch_loop(small_run(("attention",), lr=1.0), torch.device("cpu"), None, "static")[0]
    assert again is loops[3]


def load_splits(config):
    return {split: load_split(config.data, split) for split in ("train", "validation", "test")}


def test_the_best_epoch_is_restored():
    config = small_run(epochs=5, select="best", lr=3e-2)
    eager, static = (train(config, mode=mode) for mode in ("eager", "static"))
    assert static.selected_epoch == eager.selected_epoch
    assert static.validation == eager.validation
    best = max(epoch.validation_accuracy for epoch in static.epochs)
    assert sum(score.accuracy for score in static.validation.values()) / 2 == pytest.approx(best)


def test_a_loss_that_is_no_number_names_the_step():
    with pytest.raises(TrainingDiverged, match=r"epoch 1, step \d of 5 \(lr=1e\+30\)"):
        train(small_run(lr=1e30), mode="static")


def test_filling_rows_count_for_nothing():
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


def test_numbers_are_kept_in_the_smallest_type():
    assert compact(torch.tensor([-100, 32767])).dtype == torch.int16
    assert compact(torch.tensor([0, 32768])).dtype == torch.int32
    assert compact(torch.tensor([0, 32768])).tolist() == [0, 32768]


@pytest.mark.parametrize("names", [("base_conv", "attention"), ("sliding_window", "based")])
def test_the_loss_is_one_graph(names):
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


def test_slices_that_differ_in_their_labels_only_share_compiled_code(monkeypatch):
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


def test_the_end_of_a_step_is_one_graph():
    results = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = Two()
        names = [name for name, _ in model.named_parameters() if name != "unused"]
        optimizer = FlatAdamW(model, names, weight_decay=0.1, clip_norm=0.1, low_precision=torch.bfloat16)
        grads = [torch.randn_like(parameter) for parameter in optimizer.parameters]
        scalars = torch.tensor([[0.0, 1.0, 1.0], optimizer.scalars_at(1, 1e-2)])
        losses, counter = torch.zeros(2), torch.ones(1, dtype=torch.int64)
        finish = finish_step if backend is None else compile_apart(finish_step, backend=backend)
        tables = (scalars, losses, counter)
        finish(optimizer.vectors, optimizer.group(grads), *tables, torch.tensor(3.0), **optimizer.options)
        results.append([*optimizer.vectors[0], *optimizer.vectors[1], losses])
        assert counter.tolist() == [2]
        assert losses.tolist() == [0.0, 3.0]
    for plain, traced in zip(*results):
        assert torch.equal(plain, traced)


@pytest.mark.parametrize("name", architectures.names())
def test_the_static_loss_of_every_architecture_has_the_gradients_of_the_plain_one(name):
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


def test_what_cannot_run_as_a_graph_runs_without_and_says_why(caplog):
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


def test_around_what_the_compiler_refuses_the_rest_is_compiled(refused_by_the_compiler):
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


def test_pieces_are_tried_only_where_the_compiler_refused_the_whole(monkeypatch):
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


# -- the optimizer ------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A large and some small parameters, one of them without a gradient."""

    def __init__(self):
        super().__init__()
        self.large = nn.Linear(300, 250)
        self.small = nn.Linear(250, 3)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.small(torch.tanh(self.large(x))).square().sum()


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_flat_adamw_is_adamw(clip_norm):
    torch.manual_seed(0)
    flat, plain = Two(), Two()
    plain.load_state_dict(flat.state_dict())
    names = [name for name, _ in flat.named_parameters() if name != "unused"]
    ours = FlatAdamW(flat, names, weight_decay=0.1, clip_norm=clip_norm)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.1)
    for step in range(1, 6):
        lr, x = 0.01 / step, torch.randn(4, 300)
        grads = torch.autograd.grad(flat(x), ours.parameters)
        with torch.no_grad():
            ours.step(grads, torch.tensor(ours.scalars_at(step, lr)))
        theirs.zero_grad()
        theirs.param_groups[0]["lr"] = lr
        plain(x).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        theirs.step()
    assert len(ours.vectors) == 2
    for (name, one), other in zip(flat.named_parameters(), plain.parameters()):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), name


def test_linear_layers_read_a_bfloat16_copy_that_follows_the_master():
    torch.manual_seed(0)
    model = Two()
    names = [name for name, _ in model.named_parameters() if name != "unused"]
    before = model.small.weight.detach().clone()
    optimizer = FlatAdamW(model, names, weight_decay=0.0, clip_norm=None, low_precision=torch.bfloat16)
    assert model.small.weight.dtype == torch.bfloat16
    grads = torch.autograd.grad(model(torch.randn(4, 300).bfloat16()), optimizer.parameters)
    assert grads[names.index("small.weight")].dtype == torch.bfloat16
    with torch.no_grad():
        # Far below what bfloat16 could add up.
        for step in range(1, 9):
            optimizer.step(grads, torch.tensor(optimizer.scalars_at(step, 1e-5)))
    master = optimizer.masters["small.weight"]
    moved = (master - before)[grads[names.index("small.weight")] != 0].abs()
    assert torch.allclose(moved, torch.full_like(moved, 8e-5), rtol=1e-2)
    assert torch.equal(model.small.weight, master.bfloat16())


def test_layers_that_compute_in_float32_keep_their_weights():
    model = LanguageModel(small_run(("hyena",)).model)
    names = [name for name, _ in model.named_parameters()]
    FlatAdamW(model, names, weight_decay=0.0, clip_norm=None, low_precision=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in names if ".filter." in name} == {torch.float32}
    assert dtypes["blocks.0.mixer.in_proj.weight"] == torch.bfloat16


# -- precision ----------------------------------------------------------------------------------------------


def test_bf16_is_near_fp32_and_keeps_float32_weights():
    full = train(small_run(epochs=3), mode="static")
    for mode in ("static", "eager"):
        low = train(small_run(epochs=3, precision="bf16"), mode=mode)
        assert {parameter.dtype for parameter in low.model.parameters()} == {torch.float32}
        for one, other in zip(low.epochs, full.epochs):
            assert one.loss != other.loss
            assert one.loss == pytest.approx(other.loss, rel=2e-2)


def test_a_precision_the_device_lacks_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"train.precision='tf32': a mode of NVIDIA tensor cores, .* allowed: fp32"):
        train(small_run(precision="tf32"))
    with pytest.raises(ValueError, match="precision='fp8': must be one of fp32, tf32, bf16"):
        check_precision("fp8", "cpu")


# -- checkpoints --------------------------------------------------------------------------------------------


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
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(tmp_path, mode, options):
    config = small_run(epochs=4, model={"embed_dropout": 0.1, "resid_dropout": 0.1}, **options)
    whole = train(config, mode=mode)
    forget_loops()
    resumed, seen = interrupted(config, tmp_path / "state.pt", 2, mode=mode)
    assert [(e.epoch, e.loss, e.validation) for e in seen] == [(e.epoch, e.loss, e.validation) for e in whole.epochs]
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert (resumed.test, resumed.validation) == (whole.test, whole.validation)
    assert resumed.selected_epoch == whole.selected_epoch
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_finished_run_is_only_scored_again(tmp_path):
    config, path = small_run(), tmp_path / "state.pt"
    first, again = (train(config, checkpoint=path) for _ in range(2))
    assert again.epochs == first.epochs
    assert (again.test, again.validation) == (first.test, first.validation)


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
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


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    train(small_run(epochs=1), checkpoint=path)
    other = small_run(epochs=1, seed=1)
    with pytest.raises(ValueError, match=f"allowed is run {other.run_id}, version 1"):
        train(other, checkpoint=path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"state.pt cannot be read \(.*\): delete it"):
        train(other, checkpoint=path)


# -- what is prepared beside other work --------------------------------------------------------------------------


def test_what_a_thread_prepares_changes_no_number(monkeypatch):
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
def test_a_step_that_keeps_much_computes_some_of_it_again(monkeypatch, precision, again):
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
