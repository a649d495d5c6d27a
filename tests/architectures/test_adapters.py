"""The adapters to outside kernels, on a CPU: the kernels are replaced by plain loops with the signatures, layouts and
conventions that their libraries document. What is tested is what the adapters pass and what they make of the answer;
the kernels themselves are tested on a GPU (test_backends.py)."""

import copy
import sys
import types

import pytest
import torch
from torch.nn import functional as F

import architectures
from architectures import backends
from architectures.mixer import state_tensors


@pytest.fixture
def install(monkeypatch):
    """Put modules with the given functions where the adapters import them from."""

    def put(module, **functions):
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in stubs:
                stubs[name] = types.ModuleType(name)
                stubs[name].__path__ = []
                monkeypatch.setitem(sys.modules, name, stubs[name])
        for name, function in functions.items():
            setattr(stubs[module], name, function)

    stubs = {}
    return put


def twins(name, backend, d_model=16, **options):
    """The same mixer on `backend` and on the reference, every parameter moved."""
    torch.manual_seed(0)
    mixer = architectures.create(name, d_model=d_model, backend=backend, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other = copy.deepcopy(mixer)
    mixer.force_backend(backend)
    other.force_backend("reference")
    return mixer, other


def assert_close(actual, expected, tolerance=1e-5):
    """Some kernels take float32 whatever they are given: what is asked is layout and convention, not precision."""
    assert float((actual - expected).norm() / expected.norm().clamp_min(1e-12)) <= tolerance


def check_training(mixer, other, length=20):
    x, direction = torch.randn(2, length, 16).double(), torch.randn(2, length, 16).double()
    found = []
    for module in (mixer, other):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        (y * direction).sum().backward()
        found.append([y, inputs.grad, *(parameter.grad for parameter in module.parameters())])
    for one, expected in zip(*found):
        assert_close(one, expected)


@torch.no_grad()
def check_decoding(mixer, other, parts=(2, 7), steps=4):
    """Two prefills, the first shorter than a convolution, then single steps: outputs and the last state."""
    x = torch.randn(2, sum(parts) + steps, 16).double()
    found = []
    for module in (mixer, other):
        state, outputs = module.init_state(2, x.shape[1]), []
        for part in x[:, : sum(parts)].split(parts, dim=1):
            y, state = module.prefill(part, state)
            outputs.append(y)
        for token in x[:, sum(parts) :].unbind(1):
            y, state = module.step(token, state)
            outputs.append(y.unsqueeze(1))
        found.append([torch.cat(outputs, 1), *(tensor for _, tensor in state_tensors(state))])
    for one, expected in zip(*found):
        assert one.dtype == expected.dtype
        assert_close(one.double(), expected.double())


@torch.no_grad()
def check_prefill_of_nothing(mixer, other, length=9):
    """`prefill_empty`, for which kernels need not read a state, is the reference's `prefill` of an empty one."""
    x = torch.randn(2, length, 16).double()
    y, state = mixer.prefill_empty(x, mixer.init_state(2, length))
    expected, last = other.prefill(x, other.init_state(2, length))
    for one, exact in zip([y, *(t for _, t in state_tensors(state))], [expected, *(t for _, t in state_tensors(last))]):
        assert one.dtype == exact.dtype
        assert_close(one.double(), exact.double())


@pytest.mark.parametrize(
    ("name", "options"),
    [("attention", {"num_heads": 2}), ("sliding_window", {"window": 4}), ("sliding_window", {"window": 50})],
)
def test_flash_prefill_of_nothing(flash_attn, name, options):
    check_prefill_of_nothing(*twins(name, "flash-attn", **options))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("length", [2, 9])
def test_mamba_prefill_of_nothing(mamba_ssm, name, length):
    check_prefill_of_nothing(*twins(name, "mamba-ssm"), length=length)


# -- flash-attn --------------------------------------------------------------------------------------------------


def flash(q, k, v, causal, window_size, softmax_scale=None):
    """Query i of T reads keys [i + S - T - left, i + S - T + right], -1 meaning no bound; q k v [B, T, H, K]."""
    at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])[None]
    left, right = window_size[0], 0 if causal else window_size[1]
    readable = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    readable &= (key >= at - left) if left >= 0 else True
    readable &= (key <= at + right) if right >= 0 else True
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~readable, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, v)


def flash_cache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, num_splits):
    assert cache_seqlens.dtype == torch.int32
    assert num_splits == 1
    (seen,) = set(cache_seqlens.tolist())
    return flash(q, k_cache[:, :seen], v_cache[:, :seen], causal, (-1, -1), softmax_scale)


@pytest.fixture
def flash_attn(install):
    install("flash_attn", flash_attn_func=flash, flash_attn_with_kvcache=flash_cache)


@pytest.mark.parametrize("options", [{}, {"num_heads": 4, "rotary_fraction": 0.5}])
def test_flash_attention(flash_attn, options):
    check_training(*twins("attention", "flash-attn", **options))
    mixer, other = twins("attention", "flash-attn", **options)
    check_decoding(mixer, other)
    assert "sdpa" not in mixer.backends_used()


@pytest.mark.parametrize("window", [1, 2, 7, 19, 20, 21, 100])
def test_flash_window_counts_the_current_token(flash_attn, window):
    check_training(*twins("sliding_window", "flash-attn", window=window, num_heads=2))


def test_a_ring_buffer_is_read_by_sdpa_and_recorded(flash_attn):
    mixer, other = twins("sliding_window", "flash-attn", window=5)
    check_decoding(mixer, other)
    assert "sdpa" in mixer.backends_used()


def test_a_cache_with_a_gradient_or_of_another_dtype_is_read_by_sdpa_and_recorded(flash_attn):
    mixer, _ = twins("attention", "flash-attn")
    mixer.prefill(torch.randn(1, 3, 16).double(), mixer.init_state(1, 3))
    assert "sdpa" in mixer.backends_used()


# -- mamba-ssm and causal-conv1d -----------------------------------------------------------------------------------


def conv1d(x, weight, bias=None, *, initial_states=None, activation=None):
    """x [B, D, T], weight [D, W] with the current token's entry last, initial_states [B, D, W - 1]: channels last."""
    if initial_states is None:
        assert x.stride(2) == 1
        initial_states = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
    else:
        assert x.stride(1) == 1
        assert initial_states.shape[2] == weight.shape[1] - 1
    y = F.conv1d(torch.cat([initial_states, x], 2), weight.unsqueeze(1), bias, groups=x.shape[1])
    return F.silu(y) if activation == "silu" else y


def conv1d_update(x, conv_state, weight, bias=None, activation=None):
    """x [B, D]; conv_state [B, D, W - 1] is written to."""
    y = conv1d(x.unsqueeze(2).transpose(1, 2).contiguous().transpose(1, 2), weight, bias, initial_states=conv_state,
               activation=activation)  # fmt: skip
    conv_state.copy_(torch.cat([conv_state, x.unsqueeze(2)], 2)[:, :, 1:])
    return y.squeeze(2)


def scan(u, delta, A, B, C, *, D=None, z=None, delta_bias=None, delta_softplus, return_last_state):
    """u delta z [B, D, T], A [D, N] and D delta_bias [D] float32, B C [B, N, T]; from nothing, and the last state has
    no gradient."""
    assert A.dtype == torch.float32
    assert all(part is None or part.dtype == torch.float32 for part in (D, delta_bias))
    assert (delta_softplus, return_last_state) == (True, True)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    h, outputs, delta = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), [], F.softplus(delta)
    for t in range(u.shape[2]):
        h = h * torch.exp(delta[:, :, t, None] * A) + (delta * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, 2)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z), h.detach()


def update(state, x, dt, A, B, C, *, D, dt_bias, dt_softplus, z=None):
    """D and dt_bias cannot be left out, the library's defaults notwithstanding: its launcher raises without.

    state [B, (H,) D, N] is written to; x dt [B, (H,) D], A [(H,) D, N], B C [B, (G,) N], dt_bias [(H,) D]."""
    assert dt_softplus
    assert dt_bias.shape == dt.shape[1:]
    if state.ndim == 4:
        B, C = (part.repeat_interleave(state.shape[1] // part.shape[1], 1) for part in (B, C))
    B, C = (part.unsqueeze(-2) for part in (B, C))
    dt = F.softplus(dt + dt_bias).unsqueeze(-1)
    state.copy_(state * torch.exp(dt * A) + dt * x.unsqueeze(-1) * B)
    y = (state * C).sum(-1) + D * x
    return y if z is None else y * F.silu(z)


def ssd(x, dt, A, B, C, *, chunk_size, dt_bias, initial_states, dt_softplus, return_final_states):
    """x [B, T, H, P], dt [B, T, H], A [H], B C [B, T, G, N], states [B, H, P, N]."""
    assert (dt_softplus, return_final_states, chunk_size) == (True, True, 64)
    h, outputs, dt = initial_states, [], F.softplus(dt + dt_bias)
    B, C = (part.repeat_interleave(x.shape[2] // part.shape[2], 2) for part in (B, C))
    for t in range(x.shape[1]):
        h = h * torch.exp(dt[:, t] * A)[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), h


@pytest.fixture
def mamba_ssm(install):
    install("causal_conv1d", causal_conv1d_fn=conv1d, causal_conv1d_update=conv1d_update)
    install("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=scan)
    install("mamba_ssm.ops.triton.selective_state_update", selective_state_update=update)
    install("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=ssd)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba", {}),
        ("mamba", {"d_conv": 2, "d_state": 3}),
        ("mamba2", {"d_state": 6}),
        ("mamba2", {"d_state": 6, "head_dim": 4, "num_groups": 2}),
    ],
)
def test_mamba(mamba_ssm, name, options):
    check_training(*twins(name, "mamba-ssm", **options))
    mixer, other = twins(name, "mamba-ssm", **options)
    check_decoding(mixer, other)
    assert mixer.backends_used() == ["reference"]  # nothing was resolved, and nothing else ran beside


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_gradients_through_the_state_of_mamba_are_not_dropped(mamba_ssm, name):
    mixer, other = twins(name, "mamba-ssm")
    x, gradients = torch.randn(2, 9, 16).double(), []
    for module in (mixer, other):
        y, state = module.prefill(x[:, :8], module.init_state(2, 9))
        last, _ = module.step(x[:, 8], state)
        (y.sum() + last.square().sum()).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for one, expected in zip(*gradients):
        assert_close(one, expected)


# -- flash-linear-attention ----------------------------------------------------------------------------------------


def loop(update_state, tensors, scale, initial_state, output_final_state):
    """Token by token; fla's states are float32 [B, H, K, V], its tensors [B, T, H, ...]."""
    assert initial_state.dtype == torch.float32
    assert output_final_state
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    state, outputs = initial_state.double(), []
    for t in range(tensors["v"].shape[1]):
        o, state = update_state(state, **{name: tensor[:, t].double() for name, tensor in tensors.items()})
        outputs.append(scale * o)
    return torch.stack(outputs, 1).to(tensors["v"].dtype), state.float()


def read(state, q):
    return torch.einsum("bhk,bhkv->bhv", q, state)


def outer(k, v):
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def gla(q, k, v, g=None, gk=None, *, scale, **state):
    def token(s, q, k, v, g):
        s = s * g.exp().unsqueeze(-1) + outer(k, v)
        return read(s, q), s

    return loop(token, {"q": q, "k": k, "v": v, "g": gk if g is None else g}, scale, **state)


def simple_gla(q, k, v, *, g_gamma, scale, **state):
    assert g_gamma.shape == (q.shape[2],)

    def token(s, q, k, v):
        s = s * g_gamma.exp()[:, None, None] + outer(k, v)
        return read(s, q), s

    return loop(token, {"q": q, "k": k, "v": v}, scale, **state)


def rwkv6(r, k, v, w, u, *, scale, **state):
    assert u.shape == r.shape[2:]

    def token(s, r, k, v, w):
        return read(s + u.unsqueeze(-1) * outer(k, v), r), s * w.exp().unsqueeze(-1) + outer(k, v)

    return loop(token, {"r": r, "k": k, "v": v, "w": w}, scale, **state)


class WantsStateGradient(torch.autograd.Function):
    """fla's recurrent delta rule: the backward pass compiles only for a state that wants a gradient."""

    @staticmethod
    def forward(ctx, q, state):
        ctx.wanted = state.requires_grad
        return q.view_as(q)

    @staticmethod
    def backward(ctx, grad):
        assert ctx.wanted
        return grad, None


def recurrent_delta(q, *, initial_state, **arguments):
    q = WantsStateGradient.apply(q, initial_state)
    return delta(q, initial_state=initial_state, **arguments)


def recurrent_rwkv6(**arguments):
    """This form drops the gradient of its final state."""
    o, state = rwkv6(**arguments)
    return o, state.detach()


def delta(q, k, v, beta, *, g=None, gk=None, scale, **state):
    gates = {} if g is None and gk is None else {"g": gk if g is None else g}

    def token(s, q, k, v, beta, g=None):
        if g is not None:
            s = s * (g.exp() if g.ndim == 3 else g.exp().unsqueeze(-1)).unsqueeze(-1)
        s = s + outer(k, beta.unsqueeze(-1) * (v - read(s, k)))
        return read(s, q), s

    return loop(token, {"q": q, "k": k, "v": v, "beta": beta, **gates}, scale, **state)


def rwkv7(r, w, k, v, a, b, *, scale, **state):
    def token(s, r, w, k, v, a, b):
        s = s * w.exp().unsqueeze(-1) + outer(b, read(s, a)) + outer(k, v)
        return read(s, r), s

    return loop(token, {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, scale, **state)


@pytest.fixture
def fla(install):
    install("fla.ops.gla", chunk_gla=gla, fused_recurrent_gla=gla)
    install("fla.ops.simple_gla", chunk_simple_gla=simple_gla, fused_recurrent_simple_gla=simple_gla)
    install("fla.ops.rwkv6", chunk_rwkv6=rwkv6, fused_recurrent_rwkv6=recurrent_rwkv6)
    install("fla.ops.delta_rule", chunk_delta_rule=delta, fused_recurrent_delta_rule=recurrent_delta)
    install("fla.ops.gated_delta_rule", chunk_gated_delta_rule=delta, fused_recurrent_gated_delta_rule=delta)
    install("fla.ops.kda", chunk_kda=delta)
    install("fla.ops.rwkv7", chunk_rwkv7=rwkv7, fused_recurrent_rwkv7=rwkv7)
    return install


FLA = ["gla", "retnet", "rwkv6", "deltanet", "gated_deltanet", "kda", "rwkv7"]


@pytest.mark.parametrize("name", FLA)
def test_fla(fla, name):
    check_training(*twins(name, "fla", num_heads=2))
    check_decoding(*twins(name, "fla", num_heads=2))


@pytest.mark.parametrize(("triton", "kernel"), [("3.6.0", "chunk_kda"), ("3.7.1", "chunk_gated_delta_rule")])
def test_fla_trains_a_decay_per_head_on_kernels_whose_gradient_is_right(fla, monkeypatch, triton, kernel):
    called = []
    fla("fla.ops.kda", chunk_kda=record(called, "chunk_kda", delta))
    gated = record(called, "chunk_gated_delta_rule", delta)
    fla("fla.ops.gated_delta_rule", chunk_gated_delta_rule=gated, fused_recurrent_gated_delta_rule=delta)
    monkeypatch.setattr(backends, "installed", lambda name: triton)
    monkeypatch.setattr(backends, "is_hopper", lambda device: True)
    modules = twins("gated_deltanet", "fla", num_heads=2)
    check_training(*modules)
    assert set(called) == {kernel}
    called.clear()
    with torch.no_grad():
        modules[0](torch.randn(2, 9, 16).double()), modules[1](torch.randn(2, 9, 16).double())
    assert set(called) == {"chunk_gated_delta_rule"}


def test_fla_in_float32(fla):
    """DeltaNet's recurrent form, which other dtypes do not train with."""
    mixer, other = twins("deltanet", "fla", num_heads=2)
    x = torch.randn(2, 9, 16)
    gradients = []
    for module in (mixer.float(), other.float()):
        module.zero_grad()
        module(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for one, expected in zip(*gradients):
        assert_close(one, expected)
    assert not mixer.init_state(1, 1).kv.requires_grad


@pytest.mark.parametrize("name", FLA)
def test_fla_lets_gradients_through_states(fla, name):
    x, gradients = torch.randn(2, 10, 16).double(), []
    for module in twins(name, "fla", num_heads=2):
        y, state = module.prefill(x[:, :8], module.init_state(2, 10))
        for token in x[:, 8:].unbind(1):
            last, state = module.step(token, state)
        (y.sum() + last.square().sum()).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for one, expected in zip(*gradients):
        assert_close(one, expected)


def record(calls, label, function):
    def run(*args, **kwargs):
        calls.append(label)
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize(
    ("name", "module", "chunked", "recurrent", "function"),
    [
        ("gla", "gla", "chunk_gla", "fused_recurrent_gla", gla),
        ("gated_deltanet", "gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", delta),
    ],
)
def test_fla_uses_its_recurrent_form_for_tokens_and_where_it_is_exact(fla, name, module, chunked, recurrent, function):
    calls = []
    fla(
        f"fla.ops.{module}",
        **{chunked: record(calls, "chunked", function), recurrent: record(calls, "recurrent", function)},
    )
    exact = name == "gla"  # has a recurrent form with a gradient

    def ran(dtype, length, grad):
        mixer = twins(name, "fla", num_heads=2)[0].to(dtype)
        calls.clear()
        with torch.set_grad_enabled(grad):
            x = torch.randn(1, length, 16, dtype=dtype)
            mixer(x) if length > 1 else mixer.step(x[:, 0], mixer.init_state(1, 1))
        return calls[0]

    assert ran(torch.bfloat16, 8, True) == "chunked"
    assert ran(torch.bfloat16, 8, False) == "chunked"
    assert ran(torch.float32, 8, True) == ("recurrent" if exact else "chunked")
    assert ran(torch.bfloat16, 1, False) == "recurrent"
    assert ran(torch.bfloat16, 1, True) == ("recurrent" if exact else "chunked")
