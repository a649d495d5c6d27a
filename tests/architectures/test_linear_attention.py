"""Linear attention against the quadratic form with explicit weights, and the feature maps by their definitions."""

import math

import pytest
import torch

import architectures
from architectures.feature_maps import (
    FeatureMap,
    create_feature_map,
    feature_map_names,
    register_feature_map,
)

F_DIM = 4


def perturbed(feature_map, **options):
    """Float64 linear attention with every parameter away from its initial value."""
    torch.manual_seed(0)
    mixer = architectures.create(
        "linear_attention", 8, feature_dim=F_DIM, num_heads=2, feature_map=feature_map, **options
    ).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def explicit_weights(name, q, k, mixer):
    """phi(q_i).phi(k_j) for one head from the papers' formulas, q k [T, f] -> [T, T]."""
    s = q @ k.T
    distance = (torch.arange(len(q))[:, None] - torch.arange(len(k))).double()
    map_q, map_k = mixer.feature_map_q, mixer.feature_map_k
    norm = torch.nn.functional.layer_norm
    if name == "taylor":
        return 1 + s / 2 + (s / 2).square() / 2
    if name == "identity":
        return s
    if name == "elu":
        return (torch.where(q > 0, q + 1, q.exp())) @ (torch.where(k > 0, k + 1, k.exp())).T
    if name == "relu":
        return q.clamp(min=0) @ k.clamp(min=0).T
    if name == "square":
        return (q**2) @ (k**2).T / 2
    if name == "cosformer":
        return q.clamp(min=0) @ k.clamp(min=0).T * torch.cos(math.pi / 2 * distance / 2048)
    if name == "rebased":
        q = norm(q, (F_DIM,)) * map_q.gamma + map_q.beta
        k = norm(k, (F_DIM,)) * map_k.gamma + map_k.beta
        return (q @ k.T) ** 2 / F_DIM
    if name == "all_poly":
        q = ((map_q.mixed @ q.T).T ** 2 + (map_q.squared @ q.T**2).T) / 2**0.5
        k = ((map_k.mixed @ k.T).T ** 2 + (map_k.squared @ k.T**2).T) / 2**0.5
        return q @ k.T
    if name == "hedgehog":
        q, k = 2 * (q @ map_q.weight.T + map_q.bias), 2 * (k @ map_k.weight.T + map_k.bias)
        return torch.cat([q, -q], 1).softmax(1) @ torch.cat([k, -k], 1).softmax(1).T
    assert name == "performer"
    q, k = q / 2**0.5, k / 2**0.5
    q = torch.exp(q @ map_q.directions.double().T - (q**2).sum(1, keepdim=True) / 2)
    k = torch.exp(k @ map_k.directions.double().T - (k**2).sum(1, keepdim=True) / 2)
    return q @ k.T / (2 * F_DIM)


BUILT_IN = [
    "all_poly",
    "cosformer",
    "elu",
    "hedgehog",
    "identity",
    "performer",
    "rebased",
    "relu",
    "square",
    "taylor",
]


def test_built_in_names():
    assert set(BUILT_IN) <= set(feature_map_names())


@torch.no_grad()
@pytest.mark.parametrize("name", BUILT_IN)
def test_equals_the_quadratic_form(name):
    mixer = perturbed(name)
    x = torch.randn(2, 70, 8, dtype=torch.float64)
    wanted = []
    for sequence in x:
        q, k = (p(sequence).unflatten(-1, (2, F_DIM)) for p in (mixer.q_proj, mixer.k_proj))
        v = mixer.v_proj(sequence).unflatten(-1, (2, 4))
        heads = []
        for h in range(2):
            weights = explicit_weights(name, q[:, h], k[:, h], mixer).tril()
            total = weights.sum(-1, keepdim=True)
            if name in ("identity", "all_poly"):
                total = total.abs().clamp(min=1)
            elif name != "taylor":
                total = total + 1e-6
            heads.append(weights @ v[:, h] / total)
        wanted.append(mixer.out_proj(torch.cat(heads, dim=-1)))
    wanted = torch.stack(wanted)
    assert ((mixer(x) - wanted).abs().max() / wanted.abs().max()).item() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", BUILT_IN)
def test_prefill_and_step_equal_forward(name):
    mixer = perturbed(name)
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    wanted = mixer(x)
    first, state = mixer.prefill(x[:, :3], mixer.init_state(2, 12))
    second, state = mixer.prefill(x[:, 3:5], state)
    outputs = [*first.unbind(1), *second.unbind(1)]
    for t in range(5, 12):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y)
    assert ((torch.stack(outputs, 1) - wanted).abs().max() / wanted.abs().max()).item() < 1e-12
    assert int(state.position) == 12


@torch.no_grad()
def test_naive_linear_attention_of_fla():
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    mixer = perturbed("elu").float()
    x = torch.randn(2, 40, 8)
    q, k, v = mixer._project(x)
    phi_q, phi_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    wanted, _ = naive_recurrent_linear_attn(phi_q, phi_k, v, scale=1.0, normalize=True)
    wanted = mixer.out_proj(wanted.flatten(-2))
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hedgehog_of_fla():
    from fla.modules.feature_map import HedgehogFeatureMap

    ours, theirs = create_feature_map("hedgehog", 4), HedgehogFeatureMap(4)
    theirs.layer.weight.copy_(ours.weight.add_(torch.randn(4, 4)))
    theirs.layer.bias.copy_(ours.bias.add_(torch.randn(4)))
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(ours(x, torch.arange(5)), theirs(x))


def test_performer_estimates_the_softmax_kernel():
    """Over many random features phi(q).phi(k) tends to exp(q.k / sqrt(f)), and q and k share the features."""
    map_q, map_k = (create_feature_map("performer", 8, num_random=1 << 14) for _ in range(2))
    q, k = 0.5 * torch.randn(2, 1, 5, 1, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)
    ours = (map_q(q, positions) * map_k(k, positions)).sum(-1)
    wanted = torch.exp((q * k).sum(-1) / 8**0.5)
    torch.testing.assert_close(ours, wanted, rtol=0.03, atol=0)


def test_performer_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    create_feature_map("performer", 8)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("feature_dim", [8, 16])
def test_state_is_the_published_count_without_the_doubled_pairs(feature_dim):
    """Based counts (V + 1) * (1 + f + f^2); the f (f - 1) / 2 off-diagonal pairs are symmetric and kept once here."""
    mixer = architectures.create("linear_attention", 64, feature_dim=feature_dim)
    published = (64 + 1) * (1 + feature_dim + feature_dim**2)
    assert published - mixer.state_size(1024) == (64 + 1) * feature_dim * (feature_dim - 1) // 2
    assert mixer.state_size(1) == mixer.state_size(1024)


def test_a_users_feature_map():
    @register_feature_map("test_exp")
    class Exp(FeatureMap):
        def forward(self, x, positions):
            return x.exp()

    mixer = architectures.create("linear_attention", 8, feature_dim=4, feature_map="test_exp")
    assert mixer.state_size(10) == 4 * 8 + 4
    with pytest.raises(ValueError, match="'test_exp' is registered twice"):
        register_feature_map("test_exp")(type("Other", (FeatureMap,), {}))
    with pytest.raises(TypeError, match="not a subclass of FeatureMap"):
        register_feature_map("test_other")(dict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "tailor"}, "feature_map='tailor' is unknown: did you mean 'taylor'"),
        ({"feature_map_options": {"degree": 3}}, r"feature_map_options=\{'degree': 3\} do not fit .* 'taylor'"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"num_heads": 3}, r"num_heads=3 does not divide d_model=8: allowed are \[1, 2, 4, 8\]"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"backend": "mamba-ssm"}, "backend='mamba-ssm' is not one of"),
        ({"feature_map": "cosformer", "feature_map_options": {"horizon": 0}}, "horizon must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        architectures.create("linear_attention", 8, **options)


def test_cosformer_refuses_a_sequence_beyond_its_horizon():
    mixer = perturbed("cosformer", feature_map_options={"horizon": 16})
    with pytest.raises(ValueError, match="a sequence of 17 tokens is longer than horizon=16"):
        mixer(torch.zeros(1, 17, 8, dtype=torch.float64))


def test_a_named_backend_that_cannot_run_is_refused():
    x = torch.zeros(1, 4, 8)
    mixer = architectures.create("linear_attention", 8, feature_map="elu", backend="triton")
    for run in (lambda: mixer(x), lambda: mixer.step(x[:, 0], mixer.init_state(1, 4))):
        with pytest.raises(ValueError, match="backend='triton' for LinearAttention: needs a CUDA device"):
            run()
    reason = mixer.unsupported("triton", device=torch.device("cuda"), dtype=torch.float32, seq_len=4)
    assert reason == "there are Triton kernels for feature_map='taylor' only"


def test_based_takes_the_quadratic_form_of_short_float32_sequences():
    """Named, or for longer sequences and single tokens, the Triton kernels are not passed over for their speed."""

    def reason(seq_len, **options):
        mixer = architectures.create("based", d_model=8, **options)
        return mixer.unsupported("triton", device=torch.device("meta"), dtype=torch.float32, seq_len=seq_len)

    assert reason(2) == reason(512) == "in float32 up to 512 tokens the quadratic form is faster"
    for other in (reason(1), reason(513), reason(512, backend="triton")):
        assert "q is on meta" in other
