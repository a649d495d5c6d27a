"""Set disjointness at a small state: the published code's form of linear attention, the candidates and their choice."""

from pathlib import Path

import pytest
import torch

from architectures import registry
from zoology.runner import plan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
EXPERIMENT = EXPERIMENTS / "jrt_small_state.py"


@pytest.fixture(autouse=True)
def own_weight():
    """Registered for one test: others list what is registered."""
    registry.load_file(EXPERIMENTS / "own_weight.py")
    yield
    for name in ("own_weight", "own_weight_prefix"):
        del registry._entries[name]


@pytest.fixture
def experiment():
    import experiments.jrt_small_state as module

    return module


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


def test_candidates_keep_the_published_data_and_differ_in_mixer_feature_dim_and_rate(experiment):
    (published, *_) = plan.load_sweep(EXPERIMENTS / "jrt_set_disjointness.py", "paper")
    runs = plan.load_sweep(EXPERIMENT, "paper")
    assert [(run.model.layers[1].name, run.model.layers[1].options, run.train.lr, run.seed) for run in runs] == [
        (name, {"feature_dim": f, "num_heads": 2}, rate, 0) for name, f, rate in experiment.CANDIDATES
    ]
    for run in runs:
        assert (run.data.train, run.data.test, run.data.batch_size) == (
            published.data.train,
            published.data.test,
            published.data.batch_size,
        )
        assert (run.model.d_model, run.model.n_layers, run.model.init, run.train.epochs) == (128, 4, "plain", 16)


def test_the_chosen_state_is_run_causally_and_with_a_prefix_over_two_seeds(monkeypatch):
    monkeypatch.setenv("JRT_CHOSEN", "3")
    runs = plan.load_sweep(EXPERIMENT, "paper")
    assert [(run.architecture, run.seed) for run in runs] == [
        ("based", 0),
        ("based", 1),
        ("prefix_linear_attention", 0),
        ("prefix_linear_attention", 1),
    ]
    assert len({(run.train, run.model.layers[1].options["feature_dim"]) for run in runs}) == 1
    monkeypatch.delenv("JRT_CHOSEN")
    assert plan.load_sweep(EXPERIMENT, "paper")[3].run_id == runs[0].run_id


def by_pair(experiment, short_first, long_first):
    return {
        **{f"{a} then {b}": short_first for a, b in experiment.LEARNED_PAIRS},
        **{f"{b} then {a}": long_first for a, b in experiment.LEARNED_PAIRS},
        "4 then 768": 1.0,
        "768 then 4": 0.0,
    }


def test_the_choice_is_the_state_most_ahead_of_those_that_learned_and_are_not_done(experiment):
    def choose(*accuracies):
        return experiment.choice([by_pair(experiment, *pair) for pair in accuracies])

    assert choose((0.8, 0.7), (0.9, 0.7), (0.95, 0.9)) == 1
    assert choose((0.69, 0.1), (0.8, 0.75)) == 1, "has not learned"
    assert choose((0.999, 0.99), (0.7, 0.9)) == 1, "done: both orders alike"
    assert choose((0.6, 0.7), (0.99, 0.99)) is None
    assert experiment.choice([{}, by_pair(experiment, 0.8, 0.7)]) == 1, "not validated yet"
