"""Set disjointness at a small state: the published code's form of linear attention, and the runs."""

from pathlib import Path

import pytest
import torch

from architectures import registry
from zoology import plots_jrt, results
from zoology.runner import plan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
EXPERIMENT = EXPERIMENTS / "jrt_small_state.py"


pytestmark = pytest.mark.usefixtures("own_weight")


@pytest.mark.parametrize(
    ("name", "prefix_length"), [("own_weight", 0), ("own_weight_prefix", 0), ("own_weight_prefix", 5)]
)
@torch.no_grad()
def test_sums_are_divided_by_the_weight_of_a_token_for_itself(name, prefix_length):
    torch.manual_seed(0)
    mixer = registry.create(name, 12, feature_dim=4, num_heads=2).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)

    def heads(projection):
        return projection(x).unflatten(-1, (2, -1))

    def weight(a, b):
        s = float(a @ b) / 4**0.5
        return 1 + s + s * s / 2

    q, k, v = heads(mixer.q_proj), heads(mixer.k_proj), heads(mixer.v_proj)
    read = [[(k, v, u) for u in range(t + 1)] for t in range(7)]
    if prefix_length:
        prefix = heads(mixer.prefix_k_proj), heads(mixer.prefix_v_proj)
        read = [tokens + [(*prefix, u) for u in range(prefix_length)] for tokens in read]
    expected = torch.zeros(2, 7, 2, 6, dtype=torch.float64)
    for b in range(2):
        for t in range(7):
            for h in range(2):
                total = sum(weight(q[b, t, h], keys[b, u, h]) * values[b, u, h] for keys, values, u in read[t])
                expected[b, t, h] = total / weight(q[b, t, h], k[b, t, h])
    y = mixer(x, prefix_length) if prefix_length else mixer(x)
    torch.testing.assert_close(y, mixer.out_proj(expected.flatten(2)), rtol=1e-12, atol=1e-12)


def test_the_causal_form_has_nothing_of_a_prefix_and_neither_decodes():
    causal, prefix = (registry.create(name, 8) for name in ("own_weight", "own_weight_prefix"))
    assert (causal.takes_prefix, prefix.takes_prefix) == (False, True)
    assert {name for name, _ in prefix.named_parameters()} - {name for name, _ in causal.named_parameters()} == {
        "prefix_k_proj.weight",
        "prefix_v_proj.weight",
    }
    x = torch.randn(1, 3, 8)
    for mixer in (causal, prefix):
        state = mixer.init_state(1, 3)
        with pytest.raises(NotImplementedError, match="not decoded"):
            mixer.prefill(x, state)
        with pytest.raises(NotImplementedError, match="not decoded"):
            mixer.step(x[:, 0], state)


def test_the_runs_keep_the_published_data_and_differ_in_reading_a_prefix_and_in_their_seeds():
    (published, *_) = plan.load_sweep(EXPERIMENTS / "jrt_set_disjointness.py", "paper")
    runs = plan.load_sweep(EXPERIMENT, "paper")
    assert [(run.architecture, run.model.layers[1].name, run.seed) for run in runs] == [
        ("own_weight", "own_weight", 1),
        ("own_weight", "own_weight", 2),
        ("own_weight_prefix", "own_weight_prefix", 1),
        ("own_weight_prefix", "own_weight_prefix", 2),
    ]
    assert len({run.run_id for run in runs}) == 4
    for run in runs:
        assert run.data == published.data.model_copy(update={"num_validation": 256})
        assert run.train == published.train.model_copy(update={"lr": 8e-4, "epochs": 16})
        assert run.model.layers[1].options == {"feature_dim": 8, "num_heads": 2}
        assert (run.model.d_model, run.model.n_layers, run.model.init) == (128, 4, "plain")


def test_the_candidates_were_causal_models_of_the_same_data():
    import experiments.jrt_small_state as experiment

    (run, *_) = plan.load_sweep(EXPERIMENT, "paper")
    tried = experiment.candidates()
    assert [(one.architecture, one.train.lr, one.train.epochs, one.seed) for one in tried] == [
        ("own_weight", 8e-4, 16, 0),
        ("own_weight", 1.6e-3, 16, 0),
        ("own_weight", 1.2e-3, 16, 0),
        ("based", 1.2e-3, 16, 0),
    ]
    assert all(one.data == run.data for one in tried)


def test_the_smoke_scale_has_small_sets_and_trains(check_gradients):
    runs = plan.load_sweep(EXPERIMENT, "smoke")
    assert [run.seed for run in runs] == [1, 2, 1, 2]
    for run in runs[::2]:
        check_gradients(run)


def test_the_committed_records_are_of_these_runs(planned_ids):
    """By their configurations but for the precision, which the command line sets."""
    records = results.load_records(EXPERIMENTS / "results" / "jrt_small_state")
    assert {record["run_id"] for record in records} == planned_ids(EXPERIMENT)
    table = plots_jrt.order_by_run(results.from_records(records)).set_index(["architecture", "seed"])
    assert table["difference"].round(3).to_dict() == {
        ("own_weight", 1): 0.006,
        ("own_weight", 2): 0.063,
        ("own_weight_prefix", 1): -0.001,
        ("own_weight_prefix", 2): 0.086,
    }
