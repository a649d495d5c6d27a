"""Which backend runs: chosen, refused with a reason, recorded; and the kernels themselves on a GPU."""

import copy
import importlib.util
import logging

import pytest
import torch

import architectures
from architectures import backends, fla, mamba_ssm, parity
from architectures.layers import ShortConvolution
from kernels.triton_tuning import compiled_side_by_side

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def build(name, d_model=8, **options):
    torch.manual_seed(0)
    return architectures.create(name, d_model=d_model, **options)


# -- choice and refusal ------------------------------------------------------------------------------------------


def test_auto_takes_what_is_right(fake_backends):
    mixer = build("fake_right")
    mixer(torch.randn(2, 5, 8))
    assert mixer.backends_used() == ["right"]
    assert mixer.backends_refused() == {}


@pytest.mark.parametrize(
    ("name", "backend", "reason"),
    [
        ("fake_absent", "absent", "no_such_module not installed: pip install 'zoology[no-such-extra]'"),
        ("fake_refusing", "refusing", "d_model=8; allowed: multiples of 64"),
        ("fake_raising", "raising", "parity check failed: RuntimeError: no kernel image"),
        ("fake_wrong_gradient", "wrong-gradient", "parity check failed: output error"),
    ],
)
def test_auto_passes_over_what_cannot_run_and_says_why(fake_backends, caplog, name, backend, reason):
    mixer = build(name)
    with caplog.at_level(logging.INFO, "architectures"):
        y = mixer(torch.randn(2, 5, 8))
    assert mixer.backends_used() == ["reference"]
    assert mixer.backends_refused()[backend].startswith(reason)
    assert f"backend {backend} refused: {reason}" in caplog.text
    assert y.shape == (2, 5, 8)


def test_auto_takes_the_next_one_that_is_right(fake_backends):
    mixer = build("fake_all")
    assert mixer.resolve_backend(CPU, torch.float32, 12) == "wrong-step"
    assert list(mixer.backends_refused()) == ["absent", "refusing", "raising", "wrong-gradient"]
    assert mixer.resolve_backend(CPU, torch.float32, 1) == "right"
    assert "output error" in mixer.backends_refused()["wrong-step"]
    assert mixer.backends_used() == ["wrong-step", "right"]


@pytest.mark.parametrize(
    ("name", "backend", "seq_len", "message"),
    [
        ("fake_absent", "absent", 5, r"backend='absent' for Fake: no_such_module not installed: pip install"),
        ("fake_refusing", "refusing", 5, r"backend='refusing' for Fake: d_model=8; allowed: multiples of 64"),
        ("fake_raising", "raising", 5, r"parity check failed: RuntimeError: no kernel image"),
        ("fake_wrong_gradient", "wrong-gradient", 5, r"gradient error of logit 1.0e-02 \(allowed \d\.\de-07\)"),
        ("fake_wrong_step", "wrong-step", 1, r"output error \d\.\de-03 \(allowed \d\.\de-07\)"),
    ],
)
def test_a_named_backend_is_refused_with_the_reason(fake_backends, name, backend, seq_len, message):
    mixer = build(name, backend=backend)
    with pytest.raises(backends.BackendError, match=message):
        mixer.resolve_backend(CPU, torch.float32, seq_len)
    assert mixer.backends_used() == ["reference"]


def test_a_named_backend_that_is_right_runs(fake_backends):
    mixer, reference = build("fake_right", backend="right"), build("fake_right", backend="reference")
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(mixer(x), reference(x))
    assert (mixer.backends_used(), reference.backends_used()) == (["right"], ["reference"])


def test_a_plan_refuses_shapes_without_memory_or_kernels(fake_backends, monkeypatch):
    """On the meta device, where a sweep is planned, shapes are refused and numbers are not checked."""
    monkeypatch.setattr(parity, "check", lambda *case: pytest.fail("a plan has nothing to check"))
    with torch.device("meta"):
        wide, narrow = build("fake_refusing", 64, backend="refusing"), build("fake_refusing", backend="refusing")
        wrong = build("fake_wrong_gradient", backend="wrong-gradient")
    assert wide.resolve_backend(CPU, torch.float32, 5) == "refusing"
    assert wrong.resolve_backend(CPU, torch.float32, 5) == "wrong-gradient"
    with pytest.raises(backends.BackendError, match="multiples of 64"):
        narrow.resolve_backend(CPU, torch.float32, 5)


@pytest.mark.parametrize(
    ("seq_len", "checked"), [(5, [5]), (160, [160]), (200, [136]), (256, [128]), (1024, [128]), (1, [160, 1])]
)
def test_a_check_has_the_rest_behind_whole_chunks_that_the_sequence_has(fake_backends, monkeypatch, seq_len, checked):
    """Else kernels for ragged sequences would be compiled that whole ones never use, and their own not be checked."""
    seen, check = [], parity.check
    monkeypatch.setattr(parity, "check", lambda *case: seen.append(case[-1]) or check(*case))
    assert build("fake_right").resolve_backend(CPU, torch.float32, seq_len) == "right"
    assert seen == checked


def test_nothing_is_checked_while_a_graph_is_captured(fake_backends, monkeypatch):
    monkeypatch.setattr(backends, "_capturing", lambda device: True)
    mixer = build("fake_right")
    assert mixer.resolve_backend(CPU, torch.float32, 5) == "reference"
    assert "CUDA graph capture: call resolve_backend before" in mixer.backends_refused()["right"]
    monkeypatch.undo()


def test_what_was_resolved_before_a_capture_runs_in_it(fake_backends, monkeypatch):
    mixer = build("fake_right")
    assert mixer.resolve_backend(CPU, torch.float32, 5) == "right"
    monkeypatch.setattr(backends, "_capturing", lambda device: True)
    assert mixer.resolve_backend(CPU, torch.float32, 5) == "right"
    assert build("fake_right").resolve_backend(CPU, torch.float32, 5) == "right"


def test_resolved_backends_are_part_of_one_graph(fake_backends):
    mixer, x = build("fake_right"), torch.randn(2, 5, 8)
    expected = mixer(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(mixer, backend="eager", fullgraph=True)(x), expected)


def test_unresolved_backends_are_checked_outside_of_the_graph(fake_backends):
    mixer, x = build("fake_all"), torch.randn(2, 5, 8)
    torch._dynamo.reset()
    y = torch.compile(mixer, backend="eager")(x)
    assert mixer.backends_used() == ["wrong-step"]
    torch.testing.assert_close(y, build("fake_all", backend="reference")(x))


def test_backends_that_ran_beside_are_recorded():
    mixer = build("attention")
    assert mixer.ran_beside("sdpa") == "sdpa"
    mixer.ran_beside("sdpa")
    assert mixer.backends_used() == ["sdpa"]


def test_every_backend_has_a_library_and_its_extra_exists():
    tomllib = pytest.importorskip("tomllib")
    with open("pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    wanted = {backend for name in architectures.names() for backend in architectures.describe(name).backends}
    assert wanted <= set(backends.LIBRARIES)
    for library in filter(None, backends.LIBRARIES.values()):
        listed = " ".join(extras[library.extra])
        # fla-core comes with flash-linear-attention.
        assert library.distributions[0] in listed


# -- what the adapters refuse, by shape, dtype and version ---------------------------------------------------------


def fla_refusal(operation, key_width=64, value_width=64, device=CUDA, dtype=torch.bfloat16):
    return fla.refusal("fla", operation, key_width, value_width, device=device, dtype=dtype, seq_len=64)


@pytest.mark.parametrize(
    "operation", ["gla", "retention", "rwkv6", "delta_rule", "gated_delta_rule", "kda", "dplr_delta_rule"]
)
def test_fla_refuses_shapes_its_kernels_cannot_do(monkeypatch, operation):
    monkeypatch.setattr(backends, "is_hopper", lambda device: False)
    assert fla_refusal(operation) is None
    assert "width 512; allowed: up to 256" in fla_refusal(operation, key_width=512)
    assert "values of width 8; allowed in torch.bfloat16: even, at least 16" in fla_refusal(operation, value_width=8)
    assert "keys of width 17" in fla_refusal(operation, key_width=17)
    assert "dtype is torch.float64" in fla_refusal(operation, dtype=torch.float64)
    assert fla.refusal("reference", operation, 1, 1, device=CPU, dtype=torch.float64, seq_len=1) is None


def test_fla_runs_float32_where_it_has_exact_kernels(monkeypatch):
    float32 = {"dtype": torch.float32}
    assert [fla_refusal(op, 3, 5, **float32) for op in ("gla", "retention", "delta_rule")] == [None] * 3
    assert "loses more of float32 than rounding does" in fla_refusal("rwkv6", **float32)
    for operation in fla.NO_RECURRENT_GRADIENT:
        assert "multiply float32 in TF32" in fla_refusal(operation, **float32)
    monkeypatch.setattr(backends, "tf32_allowed", lambda: True)
    for operation in {"rwkv6", *fla.NO_RECURRENT_GRADIENT}:
        assert fla_refusal(operation, **float32) is None


@pytest.mark.parametrize(
    ("triton", "hopper", "bad"),
    [
        ("3.3.1", True, False),
        ("3.4.0", True, True),
        ("3.6.0", True, True),
        ("3.7.0+cu130", True, True),
        ("3.7.1", True, False),
        ("3.10.0", True, False),
        ("3.6.0", False, False),
        (None, True, False),
    ],
)
def test_known_bad_versions_are_refused_by_metadata(monkeypatch, triton, hopper, bad):
    monkeypatch.setattr(backends, "installed", lambda name: {"triton": triton}[name])
    monkeypatch.setattr(backends, "is_hopper", lambda device: hopper)
    assert fla_refusal("delta_rule") is None
    assert fla_refusal("kda") is None
    assert fla_refusal("retention", dtype=torch.float32) is None  # by other kernels
    assert fla_refusal("gated_delta_rule") is None  # by other kernels, too: test_adapters
    assert ("upgrade Triton" in (fla_refusal("retention") or "")) == bad


@pytest.mark.parametrize(
    ("version", "expected"), [("3.7.1", (3, 7, 1)), ("2.11.0+cu130", (2, 11, 0)), ("1.6.2.post1", (1, 6, 2))]
)
def test_versions_are_compared_as_numbers(version, expected):
    assert backends.version_tuple(version) == expected


def test_installed_versions_come_from_metadata():
    assert backends.version_tuple(backends.installed("torch")) == backends.version_tuple(torch.__version__)
    assert backends.installed("no-such-distribution") is None


def mamba_refusal(channels=64, d_conv=4, d_state=16, dtype=torch.bfloat16, chunked=False):
    conv = ShortConvolution(channels, d_conv)
    return mamba_ssm.refusal("mamba-ssm", conv, d_state, chunked=chunked, device=CUDA, dtype=dtype, seq_len=64)


def test_mamba_ssm_refuses_shapes_its_kernels_cannot_do(monkeypatch):
    assert mamba_refusal() is None
    assert "60 channels; allowed: multiples of 8" in mamba_refusal(channels=60)
    assert "d_conv=5; allowed: 2, 3, 4" in mamba_refusal(d_conv=5)
    assert "d_state=257; allowed: up to 256" in mamba_refusal(d_state=257)
    assert "dtype is torch.float64" in mamba_refusal(dtype=torch.float64)
    assert mamba_refusal(dtype=torch.float32) is None
    assert "TF32" in mamba_refusal(dtype=torch.float32, chunked=True)
    monkeypatch.setattr(backends, "tf32_allowed", lambda: True)
    assert mamba_refusal(dtype=torch.float32, chunked=True) is None


@pytest.mark.parametrize("name", ["attention", "sliding_window"])
def test_flash_attn_refuses_what_it_cannot_do(name):
    case = {"device": CUDA, "seq_len": 64}
    mixer = build(name, 64)
    assert mixer.unsupported("flash-attn", dtype=torch.bfloat16, **case) is None
    assert "dtype is torch.float32" in mixer.unsupported("flash-attn", dtype=torch.float32, **case)
    assert "head_dim=512" in build(name, 512).unsupported("flash-attn", dtype=torch.bfloat16, **case)
    assert mixer.unsupported("sdpa", dtype=torch.float32, **case) is None


def test_optional_kernels_need_cuda():
    for name, backend in (("attention", "flash-attn"), ("mamba", "mamba-ssm"), ("gla", "fla"), ("based", "triton")):
        with pytest.raises(backends.BackendError, match="needs a CUDA device, the input is on 'cpu'"):
            build(name, 64, backend=backend).resolve_backend(CPU, torch.bfloat16, 64)


def test_a_missing_library_breaks_only_the_backend_that_needs_it_and_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "fla" else find(name, *rest))
    assert torch.isfinite(build("gla", 64)(torch.randn(1, 4, 64))).all()
    with pytest.raises(backends.BackendError, match=r"fla not installed: pip install 'zoology\[fla\]'"):
        build("gla", 64, backend="fla")(torch.randn(1, 4, 64))
    case = {"dtype": torch.bfloat16, "seq_len": 64}
    assert backends.refusal(build("gla", 64), "fla", CUDA, **case) == "fla not installed: pip install 'zoology[fla]'"


def test_tf32_is_asked_of_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert backends.tf32_allowed() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


# -- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _candidates_side_by_side(request):
    """As a parity check does it, which these tests leave out."""
    device = CUDA if "gpu" in request.keywords and torch.cuda.is_available() else CPU
    with compiled_side_by_side(device):
        yield


PAIRS = [
    (name, backend)
    for name in architectures.names()
    for backend in architectures.describe(name).backends
    if backend in backends.NEEDS_CUDA | {"sdpa"}
]
gpu_pairs = pytest.mark.parametrize(("name", "backend"), PAIRS)


def gpu_mixer(name, backend, dtype, seq_len, d_model=64, chosen="named"):
    """A mixer on the GPU that runs `backend`, every parameter moved; skips where it is refused for a known reason.

    chosen "auto": with whatever else `auto` runs beside that backend.
    """
    torch.manual_seed(0)
    mixer = architectures.create(name, d_model=d_model, backend=backend if chosen == "named" else "auto").to("cuda")
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if reason := backends.refusal(mixer, backend, CUDA, dtype, seq_len):
        pytest.skip(f"{name} {backend}: {reason}")
    mixer.to(dtype)
    mixer.force_backend(backend)
    return mixer


def reference_of(mixer, dtype=torch.float64):
    """The same mixer on the reference, in float64 or in the dtype it has."""
    twin = copy.deepcopy(mixer).to(dtype)
    twin.force_backend("reference")
    return twin


def assert_near(found, own, exact, dtype):
    """Off from `exact` by no more than a small factor times what the reference in this dtype, `own`, is."""

    def error(x):
        return float((x.double() - exact).norm() / exact.norm())

    assert torch.isfinite(found).all()
    assert error(found) <= parity.FACTOR * max(error(own), torch.finfo(dtype).eps)


@pytest.mark.gpu
@gpu_pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seq_len", [1, 33, 64, 200])
def test_gpu_parity(name, backend, dtype, seq_len):
    """Outputs and all gradients, or decoding (seq_len 1), within what the reference's own rounding allows."""
    torch.manual_seed(0)
    mixer = architectures.create(name, d_model=64, backend=backend).to("cuda")
    if reason := backends.refusal(mixer, backend, CUDA, dtype, seq_len):
        pytest.skip(f"{name} {backend}: {reason}")
    result = parity.check(mixer, backend, CUDA, dtype, seq_len)
    assert result.passed, str(result)


def decode(mixer, x, parts, steps):
    """Outputs for x [B, T, D] from prefills of these lengths and single steps, and the last state."""
    state, outputs = mixer.init_state(x.shape[0], x.shape[1]), []
    for part in x[:, : sum(parts)].split(parts, dim=1):
        y, state = mixer.prefill(part, state)
        outputs.append(y)
    for token in x[:, sum(parts) : sum(parts) + steps].unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y.unsqueeze(1))
    return torch.cat(outputs, 1), state


@torch.no_grad()
def assert_decodes_like_the_reference(name, backend, dtype, chosen):
    mixer, same, exact = (gpu_mixer(name, backend, dtype, 70, chosen=chosen) for _ in range(3))
    same, exact = reference_of(same, dtype), reference_of(exact)
    x = torch.randn(2, 80, 64, device="cuda", dtype=dtype)

    def run(first, then):
        inputs = x.to(next(first.parameters()).dtype)
        y, state = decode(first, inputs, [3, 67], 5)
        outputs = [y]
        for token in inputs[:, 75:].unbind(1):
            y, state = then.step(token, state)
            outputs.append(y.unsqueeze(1))
        return torch.cat(outputs, 1)

    assert_near(run(mixer, same), run(same, same), run(exact, exact), dtype)


@pytest.mark.gpu
@gpu_pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_prefill_and_step_agree_with_the_reference(name, backend, dtype):
    """In the dtype of the parameters, from an empty and from a filled state; the reference can go on from its state."""
    assert_decodes_like_the_reference(name, backend, dtype, "named")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if pair[1] in ("sdpa", "flash-attn")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_auto_decodes_a_cache_like_the_reference(name, backend, dtype):
    """The same where `auto` reads a cache by a kernel of its own."""
    assert_decodes_like_the_reference(name, backend, dtype, "auto")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "backend"), [pair for pair in PAIRS if pair[1] not in ("sdpa", "flash-attn")]
)  # a KV cache is written in place, which autograd does not follow
def test_gpu_gradients_pass_through_states(name, backend):
    """Backpropagation through two prefills and a step, as truncated training would do it."""
    # Parts of more than 32 tokens: for shorter ones fla's GLA compiles hundreds of candidates of its own.
    dtype, parts = torch.bfloat16, [33, 40]
    length = sum(parts) + 1
    mixer = gpu_mixer(name, backend, dtype, length)
    x = torch.randn(2, length, 64, device="cuda", dtype=dtype)
    direction = torch.randn(2, length, 64, device="cuda", dtype=torch.float64)

    def gradients(module):
        inputs = x.to(next(module.parameters()).dtype, copy=True).requires_grad_()
        y, _ = decode(module, inputs, parts, 1)
        (y.double() * direction).sum().backward()
        # A parameter that only a prefix reads has none.
        parameters = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
        return [inputs.grad, *parameters]

    found, own, exact = (gradients(m) for m in (mixer, reference_of(mixer, dtype), reference_of(mixer)))
    typical = max(float(gradient.abs().max()) for gradient in exact)
    for one, other, right in zip(found, own, exact):
        # Gradients that vanish but for rounding are not compared relative to themselves.
        assert_near(one + 1e-2 * typical, other + 1e-2 * typical, right + 1e-2 * typical, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 2, 16, 63, 64, 65, 128, 1000])
def test_gpu_flash_window_counts_the_current_token(window):
    torch.manual_seed(0)
    options = {"window": window, "backend": "flash-attn"}
    mixer = architectures.create("sliding_window", d_model=64, **options).to("cuda", torch.bfloat16)
    if reason := backends.refusal(mixer, "flash-attn", CUDA, torch.bfloat16, 130):
        pytest.skip(reason)
    exact, own = reference_of(mixer), reference_of(mixer, torch.bfloat16)
    mixer.force_backend("flash-attn")
    x = torch.randn(2, 130, 64, device="cuda", dtype=torch.bfloat16)
    assert_near(mixer(x), own(x), exact(x.double()), torch.bfloat16)


@pytest.mark.gpu
@gpu_pairs
def test_gpu_backends_run_in_a_captured_graph(name, backend):
    """Resolved and warm, forward and backward are captured and replayed with new inputs."""
    mixer = gpu_mixer(name, backend, torch.bfloat16, 64)
    static = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    fresh = torch.randn_like(static)

    def step():
        for tensor in (static, *mixer.parameters()):
            tensor.grad = None
        y = mixer(static)
        y.float().square().sum().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    captured, gradient = y.detach().clone(), static.grad.clone()
    expected = step().detach()
    # The same kernels on the same numbers: atomic additions alone may differ.
    torch.testing.assert_close(captured, expected, rtol=2e-2, atol=1e-3 * float(expected.abs().max()))
    torch.testing.assert_close(gradient, static.grad, rtol=2e-2, atol=1e-3 * float(static.grad.abs().max()))
