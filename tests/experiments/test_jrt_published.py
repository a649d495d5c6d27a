"""Set disjointness with the layers of the published models, causal and not, and the runs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from architectures import registry
from zoology import plots_jrt, results
from zoology.runner import plan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
EXPERIMENT = EXPERIMENTS / "jrt_published.py"


pytestmark = pytest.mark.usefixtures("own_weight")


@pytest.mark.parametrize("prefix_length", [0, 4, 7])
@torch.no_grad()
def test_every_token_reads_the_whole_prefix_by_the_same_keys_and_values(prefix_length):
    torch.manual_seed(0)
    mixer = registry.create("own_weight_noncausal", 12, feature_dim=4, num_heads=2).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    expected = torch.zeros(2, 7, 2, 6, dtype=torch.float64)
    for t in range(7):
        s = torch.einsum("bhf,buhf->buh", q[:, t], k) / 4**0.5
        w = 1 + s + s**2 / 2
        seen = range(max(t + 1, prefix_length))
        expected[:, t] = sum(w[:, u, :, None] * v[:, u] for u in seen) / w[:, t, :, None]
    torch.testing.assert_close(mixer(x, prefix_length), mixer.out_proj(expected.flatten(2)), rtol=1e-12, atol=1e-12)
    assert [name for name, _ in mixer.named_parameters() if "prefix" in name] == []


@torch.no_grad()
def test_the_convolution_stands_between_dense_layers_and_wraps_around_a_prefix():
    torch.manual_seed(0)
    causal, wrapped = (registry.create(name, 6).double() for name in ("dense_base_conv", "dense_base_conv_noncausal"))
    wrapped.load_state_dict(causal.state_dict())
    published = nn.Conv1d(6, 6, 3, groups=6).double()
    published.weight.copy_(causal.conv.weight.flip(1).unsqueeze(1))  # by lag here, oldest input first there
    published.bias.copy_(causal.conv.bias)
    x = torch.randn(2, 9, 6, dtype=torch.float64)

    def expected(before):
        """The layer behind these two inputs of the convolution."""
        convolved = published(torch.cat([before, causal.before(x)], dim=1).mT).mT
        return causal.after(convolved) * causal.projection(x) + x

    zeros = torch.zeros(2, 2, 6, dtype=torch.float64)
    for y, before in (
        (causal(x), zeros),
        (wrapped(x), zeros),
        (wrapped(x, 7), causal.before(x[:, 5:7])),
        (wrapped(x, 9), causal.before(x[:, 7:])),
    ):
        torch.testing.assert_close(y, expected(before), rtol=1e-12, atol=1e-12)
    with pytest.raises(NotImplementedError, match="not decoded"):
        causal.step(x[:, 0], causal.init_state(2, 9))


def test_the_runs_keep_the_data_and_budget_of_the_small_state_and_differ_in_their_layers():
    (small, *_) = plan.load_sweep(EXPERIMENTS / "jrt_small_state.py", "paper")
    runs = plan.load_sweep(EXPERIMENT, "paper")
    assert [
        (
            run.architecture,
            [spec.name for spec in run.model.layers],
            run.model.d_model,
            run.model.layers[1].options["feature_dim"],
            run.train.epochs,
            run.seed,
        )
        for run in runs
    ] == [
        (mixer, [conv, mixer], *state, seed)
        for *state, seed in (
            (128, 8, 16, 3),
            (128, 8, 16, 4),
            (128, 4, 12, 5),
            (128, 4, 12, 6),
            (128, 4, 12, 9),
            (128, 4, 12, 10),
            (36, 4, 48, 7),
            (36, 4, 48, 8),
        )
        for mixer, conv in (
            ("own_weight", "dense_base_conv"),
            ("own_weight_noncausal", "dense_base_conv_noncausal"),
        )
    ]
    for run in runs:
        assert run.data == small.data.model_copy(update={"num_validation": 128})
        assert run.train == small.train.model_copy(update={"epochs": run.train.epochs})
        assert run.model.layers[1].options["num_heads"] == small.model.layers[1].options["num_heads"] == 2
        same = {"layers": small.model.layers, "d_model": small.model.d_model}
        assert run.model.model_copy(update=same) == small.model


def test_the_smoke_scale_has_small_sets_and_trains(check_gradients):
    for run in plan.load_sweep(EXPERIMENT, "smoke")[:2]:
        check_gradients(run)


def test_the_committed_records_are_of_these_runs(planned_ids):
    """Finished and not, by their configurations but for the precision, which the command line sets."""
    directory = EXPERIMENTS / "results" / "jrt_published"
    assert {path.parent.name for path in directory.glob("*/metrics.jsonl")} == planned_ids(EXPERIMENT)
    table = plots_jrt.order_by_run(results.from_records(results.load_records(directory)))
    assert table.set_index(["architecture", "seed"])["difference"].round(3).to_dict() == {
        ("own_weight", 5): 0.023,
        ("own_weight_noncausal", 5): -0.009,
        ("own_weight", 6): 0.006,
        ("own_weight_noncausal", 6): -0.012,
        ("own_weight", 3): -0.081,
        ("own_weight_noncausal", 3): -0.003,
        ("own_weight", 7): 0.009,
        ("own_weight", 9): 0.016,
        ("own_weight_noncausal", 9): -0.02,
        ("own_weight", 10): 0.079,
        ("own_weight_noncausal", 10): -0.005,
    }
