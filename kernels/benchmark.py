"""Time the operations beside every installed peer and the limit of the machine.

    python -m kernels.benchmark [OP ...] [--lengths 2048,8192,32768] [--out FILE.json]
    python -m kernels.benchmark --draw FILE.json [--draw MORE.json] [--plot FILE.png] [--page FILE.md]

Every implementation first answers for its result: output and gradients at a small size against float64, in the
function it claims to compute. One that is wrong gets no row. Peers that compute another function with the same
inputs and outputs (softmax attention) are checked against that function and marked so.

The limit of a row is the larger of two times: the bytes that must move (inputs read once, outputs written once)
over the bandwidth of a large device copy, and the operations that must be done over the rate of a large bf16
matrix product, both measured in the same run. Times are milliseconds, median and 20th and 80th percentile, of replays
of a CUDA graph, with the L2 cache cleared between them; a graph of decode steps holds one step for each of several
states, so that none finds its state in the cache, and starting the graph is not counted as part of a step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import (
    cached_attention,
    prefix_linear_attention,
    selective_scan,
    short_convolution,
    taylor_linear_attention,
    taylor_linear_attention_step,
)
from kernels.taylor_linear_attention import TaylorState, num_taylor_features
from kernels.taylor_linear_attention.reference import taylor_state_reference

CHUNK = 64  # of the operation count: what is inside a chunk is quadratic
TABLE_START, TABLE_END = "<!-- measured -->", "<!-- end -->"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}


class Case(NamedTuple):
    """One thing to time: `run` on inputs of the full size, `check` for its error at a small size."""

    op: str
    implementation: str
    direction: str
    shape: dict[str, int]
    dtype: torch.dtype
    num_bytes: int
    num_ops: int
    run: Callable[[], object]
    check: Callable[[], float]
    captured: bool = False  # timed as replays of a CUDA graph, so that Python and launches are not timed instead
    calls: int = 1  # of the operation in one `run`


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative distance, infinite for anything not finite."""
    actual, expected = actual.double(), expected.double()
    if not actual.isfinite().all():
        return float("inf")
    return ((actual - expected).norm() / expected.norm()).item()


def worst_error(function, truth, inputs: list[Tensor]) -> float:
    """Largest error of output and gradients of `function` against those of `truth` in float64."""
    results = []
    for f, dtype in ((function, None), (truth, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
        o = f(*leaves)
        weight = torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=o.device).view(o.shape)
        grads = torch.autograd.grad((o.double() * weight).sum(), leaves)
        results.append([o.detach(), *grads])
    return max(error(a, b) for a, b in zip(*results))


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


# ---------------------------------------------------------------- Taylor linear attention
def based(q, k, v, backend="triton"):
    return taylor_linear_attention(q, k, v, backend=backend)[0]


def softmax_attention(q, k, v):
    s = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    upper = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return torch.einsum("bhts,bshv->bthv", s.masked_fill(upper, -torch.inf).softmax(-1), v)


def sdpa(backend):
    def function(q, k, v):
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(backend):
            o = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
            )
        return o.transpose(1, 2)

    return function


def attention_peers() -> Iterator[tuple[str, Callable, int | None]]:
    """Name, function, and the longest sequence it is timed at in the backward pass (None: as long as the forward)."""
    yield "ours", based, None
    yield "ours, plain PyTorch", lambda q, k, v: based(q, k, v, "reference"), 8192
    if installed("fla"):
        from fla.ops.based import fused_chunk_based, parallel_based

        yield "fla fused_chunk_based", fused_chunk_based, None
        yield "fla parallel_based", parallel_based, 8192


def softmax_peers() -> Iterator[tuple[str, Callable, int | None]]:
    from torch.nn.attention import SDPBackend

    yield "softmax, SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION), 8192
    yield "softmax, SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION), 8192
    if installed("flash_attn"):
        from flash_attn import flash_attn_func

        yield "softmax, flash-attn", lambda q, k, v: flash_attn_func(q, k, v, causal=True), 8192


def taylor_cases(lengths: list[int]) -> Iterator[Case]:
    """B16 H16 f16 V64 (softmax attention: head dimension 64), and B1 at the token count of the middle length."""
    h, f, v_dim, dtype = 16, 16, 64, torch.bfloat16
    num = num_taylor_features(f)
    shapes = [(16, t) for t in lengths] + [(1, 16 * t) for t in lengths[1:2]]
    for batch, length in shapes:
        rows = batch * length * h
        # Per row: bytes forward, operations forward and backward.
        taylor = (
            4 * (f + v_dim),
            4 * num * v_dim + CHUNK * (f + v_dim),
            10 * num * v_dim + CHUNK * (3 * f + 2 * v_dim),
        )
        softmax = (8 * v_dim, 2 * length * v_dim, 5 * length * v_dim)
        kinds = [(f, lambda *x: based(*x, "reference"), taylor, attention_peers)]
        if batch > 1:
            kinds.append((v_dim, softmax_attention, softmax, softmax_peers))
        for width, truth, (num_bytes, ops_forward, ops_backward), peers in kinds:
            shape = {"B": batch, "T": length, "H": h, "f": width, "V": v_dim}
            for name, function, longest in peers():
                if name == "ours, plain PyTorch" and (batch == 1 or batch * length > 16 * 8192):
                    continue
                small = [draw(2, 256, h, n, dtype=dtype) for n in (width, width, v_dim)]
                inputs = [draw(batch, length, h, n, dtype=dtype).requires_grad_() for n in (width, width, v_dim)]
                output = []

                def check(function=function, truth=truth, small=small):
                    return worst_error(function, truth, small)

                def forward(function=function, inputs=inputs):
                    with torch.no_grad():
                        function(*inputs)

                def backward(function=function, inputs=inputs, output=output):
                    if not output:
                        output.append(function(*inputs))
                        output.append(torch.randn_like(output[0]))
                    torch.autograd.grad(output[0], inputs, output[1], retain_graph=True)

                what = ("taylor_linear_attention", name)
                yield Case(*what, "forward", shape, dtype, rows * num_bytes, rows * ops_forward, forward, check, True)
                if longest is None or length <= longest:
                    yield Case(
                        *what,
                        "backward",
                        shape,
                        dtype,
                        2 * rows * num_bytes,
                        rows * ops_backward,
                        backward,
                        check,
                        True,
                    )
        if batch > 1 and installed("mamba_ssm"):
            yield from scan_cases(batch, length, h * v_dim, 16)


def scan_truth(x, dt, a, b, c):
    return selective_scan(x, torch.nn.functional.softplus(dt), -a.exp(), b, c, backend="reference")[0]


def mamba_scan(x, dt, a, b, c):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, b, c = (part.transpose(1, 2) for part in (x, dt, b, c))
    return selective_scan_fn(x, dt, -a.exp(), b, c, delta_softplus=True).transpose(1, 2)


def scan_cases(batch: int, length: int, width: int, d_state: int) -> Iterator[Case]:
    """The selective scan of Mamba with as many channels as there are values in all heads."""

    def inputs(batch, length):
        rows, dtype = (batch, length), torch.bfloat16
        a = torch.arange(1, d_state + 1, device="cuda", dtype=torch.float32).log().repeat(width, 1)
        x, dt = (draw(*rows, width, dtype=dtype) for _ in range(2))
        b, c = (draw(*rows, d_state, dtype=dtype) for _ in range(2))
        return [x, dt - 4, a, b, c]

    small, large = inputs(2, 256), [x.requires_grad_() for x in inputs(batch, length)]
    output = []

    def check():
        return worst_error(mamba_scan, scan_truth, small)

    def forward():
        with torch.no_grad():
            mamba_scan(*large)

    def backward():
        if not output:
            output.append(mamba_scan(*large))
            output.append(torch.randn_like(output[0]))
        torch.autograd.grad(output[0], large, output[1], retain_graph=True)

    what = ("taylor_linear_attention", "selective scan, mamba-ssm")
    shape = {"B": batch, "T": length, "D": width, "N": d_state}
    num_bytes, ops = batch * length * 2 * (3 * width + 2 * d_state), batch * length * width * d_state
    yield Case(*what, "forward", shape, torch.bfloat16, num_bytes, 7 * ops, forward, check, True)
    yield Case(*what, "backward", shape, torch.bfloat16, 2 * num_bytes, 20 * ops, backward, check, True)


def taylor_step_cases(lengths: list[int]) -> Iterator[Case]:
    """One token for B sequences, H16 f16 V64; the limit counts the packed state, once each way.

    A run takes as many states as make a gigabyte (at most 256), and keeps all results, so that no cache holds them.
    """
    h, f, v_dim = 16, 16, 64
    num = num_taylor_features(f)
    for batch in (1, 128, 1024, 4096):
        for state_dtype in (torch.float32, torch.bfloat16):

            def inputs(batch=batch, state_dtype=state_dtype):
                q, k, v = (draw(batch, h, n, dtype=torch.bfloat16) for n in (f, f, v_dim))
                state = taylor_state_reference(
                    draw(batch, h, 20, f, dtype=torch.float32),
                    draw(batch, h, 20, v_dim, dtype=torch.float32),
                    scale=0.25,
                )
                return q, k, v, TaylorState(*(x.to(state_dtype) for x in state))

            size = 2 * batch * h * num * (v_dim + 1) * state_dtype.itemsize
            given = [inputs() for _ in range(max(2, min(256, 10**9 // size)))]
            for backend in ("triton", "reference"):

                def check(backend=backend, inputs=inputs):
                    q, k, v, state = inputs(2)
                    o, new = taylor_linear_attention_step(q, k, v, state, backend=backend)
                    wide = TaylorState(*(x.double() for x in state))
                    expected, expected_new = taylor_linear_attention_step(
                        q.double(), k.double(), v.double(), wide, backend="reference"
                    )
                    return max(error(o, expected), error(new.kv, expected_new.kv))

                def run(given=given, backend=backend):
                    return [taylor_linear_attention_step(*x, backend=backend) for x in given]

                name = "ours" if backend == "triton" else "ours, plain PyTorch"
                yield Case(
                    "taylor_linear_attention_step", name, str(state_dtype).removeprefix("torch.") + " state",
                    {"B": batch, "H": h, "f": f, "V": v_dim}, torch.bfloat16, size, 4 * batch * h * num * v_dim,
                    run, check, True, len(given),
                )  # fmt: skip


def prefix_cases(lengths: list[int]) -> Iterator[Case]:
    """The causal kernel's shape with a prefix of half and of all of the sequence."""
    h, f, v_dim, dtype = 16, 16, 64, torch.bfloat16
    num = num_taylor_features(f)
    for length in lengths:
        for prefix in (length // 2, length):
            small = [
                draw(2, n, h, w, dtype=dtype) for n, w in ((256, f), (256, f), (256, v_dim), (100, f), (100, v_dim))
            ]

            def check(small=small):
                return worst_error(
                    lambda *x: prefix_linear_attention(*x, backend="triton")[0],
                    lambda *x: prefix_linear_attention(*x, backend="reference")[0],
                    small,
                )

            sizes = ((length, f), (length, f), (length, v_dim), (prefix, f), (prefix, v_dim))
            inputs = [draw(16, n, h, w, dtype=dtype).requires_grad_() for n, w in sizes]

            def forward(inputs=inputs):
                with torch.no_grad():
                    prefix_linear_attention(*inputs, backend="triton")

            rows, prefix_rows = 16 * length * h, 16 * prefix * h
            yield Case(
                "prefix_linear_attention", "ours", "forward",
                {"B": 16, "T": length, "M": prefix, "H": h, "f": f, "V": v_dim}, dtype,
                rows * 2 * (2 * f + 2 * v_dim) + prefix_rows * 2 * (f + v_dim),
                rows * (4 * num * v_dim + CHUNK * (f + v_dim)) + prefix_rows * 2 * num * v_dim, forward, check, True,
            )  # fmt: skip


def width_cases(lengths: list[int]) -> Iterator[Case]:
    """B16 T2048 H16 V64 at other widths and precisions, beside plain PyTorch."""
    batch, length, h, v_dim = 16, 2048, 16, 64
    for dtype, f in (
        (torch.bfloat16, 8),
        (torch.bfloat16, 24),
        (torch.bfloat16, 32),
        (torch.float16, 16),
        (torch.float32, 16),
        (torch.float32, 32),
    ):
        num, rows = num_taylor_features(f), batch * length * h
        for name, backend in (("ours", "triton"), ("ours, plain PyTorch", "reference")):
            small = [draw(2, 256, h, n, dtype=dtype) for n in (f, f, v_dim)]
            inputs = [draw(batch, length, h, n, dtype=dtype).requires_grad_() for n in (f, f, v_dim)]

            def both(inputs=inputs, backend=backend):
                o = based(*inputs, backend)
                torch.autograd.grad(o, inputs, o.detach())

            def check(small=small, backend=backend):
                return worst_error(lambda *x: based(*x, backend), lambda *x: based(*x, "reference"), small)

            ops = rows * (14 * num * v_dim + CHUNK * (4 * f + 3 * v_dim))
            yield Case(
                "taylor_linear_attention", name, "forward and backward",
                {"B": batch, "T": length, "H": h, "f": f, "V": v_dim}, dtype,
                3 * rows * 2 * (f + v_dim) * dtype.itemsize, ops, both, check, True,
            )  # fmt: skip


def convolution_peers() -> Iterator[tuple[str, Callable]]:
    yield "ours", lambda *x: short_convolution(*x, backend="triton")
    yield "ours, plain PyTorch", lambda *x: short_convolution(*x, backend="reference")
    if installed("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        yield "causal-conv1d", lambda x, w, b: causal_conv1d_fn(x.transpose(1, 2), w.flip(1), b).transpose(1, 2)


def convolution_cases(lengths: list[int]) -> Iterator[Case]:
    """Short convolutions at the sizes of the recall experiments; a run takes more inputs than the cache holds."""
    batch, length, d, calls = 256, 256, 128, 6
    for dtype, taps in ((torch.float32, 3), (torch.bfloat16, 3), (torch.bfloat16, 4)):
        size = batch * length * d * dtype.itemsize
        for name, function in convolution_peers():
            weights = [draw(d, taps, dtype=dtype), draw(d, dtype=dtype)]
            xs = [draw(batch, length, d, dtype=dtype).requires_grad_() for _ in range(calls)]
            leaves = [w.requires_grad_() for w in weights]
            outputs = []

            def check(function=function, dtype=dtype, taps=taps):
                small = [draw(2, 100, d, dtype=dtype), draw(d, taps, dtype=dtype), draw(d, dtype=dtype)]
                return worst_error(function, lambda *x: short_convolution(*x, backend="reference"), small)

            def forward(function=function, xs=xs, weights=weights):
                with torch.no_grad():
                    return [function(x, *weights) for x in xs]

            def backward(function=function, xs=xs, leaves=leaves, outputs=outputs):
                if not outputs:
                    outputs.extend((function(x, *leaves), torch.randn_like(x)) for x in xs)
                pairs = zip(xs, outputs)
                return [torch.autograd.grad(y, [x, *leaves], dy, retain_graph=True) for x, (y, dy) in pairs]

            shape = {"B": batch, "T": length, "D": d, "W": taps}
            what = ("short_convolution", name)
            elements = batch * length * d
            yield Case(*what, "forward", shape, dtype, 2 * size, 2 * taps * elements, forward, check, True, calls)
            yield Case(*what, "backward", shape, dtype, 3 * size, 4 * taps * elements, backward, check, True, calls)


def window_peers() -> Iterator[tuple[str, Callable]]:
    """Attention of q [B, H, K] to the first `used` slots of a ring [B, W, H, K], all of which are in use."""
    yield "ours", lambda q, k, v, at: cached_attention(q, k, v, at, backend="triton")
    yield "ours, plain PyTorch", lambda q, k, v, at: cached_attention(q, k, v, at, backend="reference")

    def by_sdpa(q, k, v, at):
        k, v = (x.transpose(1, 2) for x in (k, v))
        mask = torch.arange(k.shape[2], device=q.device) <= at
        return torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2), k, v, mask[None]).squeeze(2)

    yield "SDPA", by_sdpa
    if installed("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        def by_flash(q, k, v, at):
            used = (at + 1).clamp(max=k.shape[1]).to(torch.int32).expand(q.shape[0]).contiguous()
            return flash_attn_with_kvcache(q.unsqueeze(1), k, v, cache_seqlens=used).squeeze(1)

        yield "flash-attn, KV cache", by_flash


def window_cases(lengths: list[int]) -> Iterator[Case]:
    """A step of attention to 128 tokens, B128 H16 width 64: the token is put in its slot, then the ring is read."""
    h, width, window, calls = 16, 64, 128, 4
    for dtype in (torch.bfloat16, torch.float32):

        def inputs(batch, dtype=dtype):
            rings = [draw(batch, window, h, width, dtype=dtype) for _ in range(2)]
            return *rings, *(draw(batch, h, width, dtype=dtype) for _ in range(3))

        given = [inputs(128) for _ in range(calls)]
        position = torch.tensor(1000, device="cuda")
        for name, attend in window_peers():

            def step(ring_k, ring_v, q, k, v, attend=attend, position=position):
                slot = (position % window).view(1)
                ring_k.index_copy_(1, slot, k.unsqueeze(1))
                ring_v.index_copy_(1, slot, v.unsqueeze(1))
                return attend(q, ring_k, ring_v, position)

            def check(step=step, inputs=inputs):
                ring_k, ring_v, q, k, v = inputs(3)
                o = step(ring_k, ring_v, q, k, v)
                s = torch.einsum("bhk,bwhk->bhw", q.double(), ring_k.double()) * width**-0.5
                return error(o, torch.einsum("bhw,bwhk->bhk", s.softmax(-1), ring_v.double()))

            def run(step=step, given=given):
                with torch.no_grad():
                    return [step(*x) for x in given]

            rows = 128 * h * window
            yield Case(
                "sliding-window step", name, "step", {"B": 128, "H": h, "K": width, "W": window}, dtype,
                2 * rows * width * dtype.itemsize, 2 * rows * width, run, check, True, calls,
            )  # fmt: skip


OPS: dict[str, Callable[[list[int]], Iterator[Case]]] = {
    "taylor_linear_attention": taylor_cases,
    "taylor_linear_attention_step": taylor_step_cases,
    "prefix_linear_attention": prefix_cases,
    "widths": width_cases,
    "short_convolution": convolution_cases,
    "sliding_window": window_cases,
}


# ---------------------------------------------------------------- measuring
def quantiles(run: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    from triton.testing import do_bench

    median, low, high = do_bench(run, warmup=20, rep=80, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def capture(run: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of `run`, to replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # A backward pass runs on the stream of its forward pass, which is this one too.
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay


def ceilings() -> dict[str, float]:
    """Bandwidth of a large copy (read and written bytes) in TB/s, and of a bf16 matrix product in TFLOP/s."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = quantiles(lambda: target.copy_(source))[0]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = quantiles(lambda: a @ b)[0]
    return {"copy_tb_per_s": 8 * source.numel() / copy * 1e-9, "bf16_tflop_per_s": 2 * 8192**3 / product * 1e-9}


def measure(case: Case, limits: dict[str, float]) -> dict:
    """The record of a case: its times, or why it has none."""
    record = {
        "op": case.op,
        "implementation": case.implementation,
        "direction": case.direction,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    try:
        record["error"] = case.check()
        if not record["error"] <= TOLERANCE[case.dtype]:
            return record | {"refused": f"error {record['error']:.1e} in the parity check"}
        run = case.run
        if case.captured:
            try:
                run = capture(run)
            except RuntimeError:  # a peer that waits for the device
                torch.cuda.synchronize()
        record["captured"] = run is not case.run
        times = quantiles(run)
        median, low, high = (ms / case.calls for ms in times)
    except Exception as problem:  # a peer that breaks must not take the others' rows with it
        return record | {"refused": f"{type(problem).__name__}: {str(problem)[:200]}"}
    limit = max(
        case.num_bytes / limits["copy_tb_per_s"] * 1e-9,
        case.num_ops / limits["bf16_tflop_per_s"] * 1e-9,
    )
    return record | {
        "ms": median,
        "ms_20": low,
        "ms_80": high,
        "tb_per_s": case.num_bytes / median * 1e-9,
        "tflop_per_s": case.num_ops / median * 1e-9,
        "limit_ms": limit,
        "share_of_limit": limit / median,
    }


def environment() -> dict[str, str]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    found = {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }
    for name in ("fla", "flash_attn", "mamba_ssm"):
        if installed(name):
            found[name] = getattr(importlib.import_module(name), "__version__", "?")
    return found


def line(record: dict) -> str:
    shape = " ".join(f"{k}{v}" for k, v in record["shape"].items())
    start = f"{record['op']:<29}{shape:<30}{record['direction']:<22}{record['implementation']:<24}"
    if "refused" in record:
        return start + "refused: " + record["refused"]
    return (
        f"{start}{record['ms']:9.4f} ms ({record['ms_20']:.4f}-{record['ms_80']:.4f}) {record['tb_per_s']:6.2f} TB/s"
        f" {record['tflop_per_s']:7.1f} TFLOP/s {record['share_of_limit']:6.1%} of {record['limit_ms']:.4f} ms"
        f"  error {record['error']:.1e}"
    )


def plot(records: dict, path: Path) -> None:
    """Milliseconds against length, a panel per direction, from the records alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in records["rows"] if r["op"] == "taylor_linear_attention" and r["shape"]["B"] == 16 and "ms" in r]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, direction in zip(axes, ("forward", "backward")):
        chosen = [r for r in rows if r["direction"] == direction]
        for name in dict.fromkeys(r["implementation"] for r in chosen):
            mine = [r for r in chosen if r["implementation"] == name]
            axis.plot([r["shape"]["T"] for r in mine], [r["ms"] for r in mine], marker="o", label=name)
        mine = [r for r in chosen if r["implementation"] == "ours"]
        axis.plot([r["shape"]["T"] for r in mine], [r["limit_ms"] for r in mine], "k--", label="limit of the machine")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=direction)
        lengths = [r["shape"]["T"] for r in mine]
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    shape = "batch 16, 16 heads, feature dimension 16 (softmax: 64), value dimension 64, bf16"
    figure.suptitle(f"Taylor linear attention on {records['environment']['device']}: {shape}", fontsize=9)
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    figure.savefig(path, dpi=150)


def table(records: dict) -> str:
    """The measured rows of our operations and of their peers as Markdown, from the records alone."""
    found, limits = records["environment"], records["ceilings"]
    lines = [
        f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, commit {found['commit'][:12]}; "
        f"copy {limits['copy_tb_per_s']:.2f} TB/s, bf16 product {limits['bf16_tflop_per_s']:.0f} TFLOP/s.",
        "",
        "| operation | shape | dtype | | implementation | ms (20th to 80th percentile) | TB/s | TFLOP/s | of limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in records["rows"]:
        if "ms" not in row:
            continue
        cells = (
            row["op"],
            " ".join(f"{key}{value}" for key, value in row["shape"].items()),
            row["dtype"],
            row["direction"],
            row["implementation"],
            f"{row['ms']:.4g} ({row['ms_20']:.4g} to {row['ms_80']:.4g})",
            f"{row['tb_per_s']:.2f}",
            f"{row['tflop_per_s']:.1f}",
            f"{row['share_of_limit']:.1%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(page: str, *runs: dict) -> str:
    """`page` with a table of each run's records between its markers. Raises ValueError for a page without them."""
    before, start, rest = page.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not (start and end):
        raise ValueError(f"the page has no {TABLE_START} followed by {TABLE_END}")
    tables = "\n\n".join(table(records) for records in runs)
    return f"{before}{start}\n{tables}\n{end}{after}"


def _records(path: Path, parser: argparse.ArgumentParser) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"records {path}: {getattr(error, 'strerror', None) or 'not JSON'}")
    if not isinstance(found, dict) or not {"environment", "ceilings", "rows"} <= found.keys():
        parser.error(f"records {path}: must hold what --out wrote, with 'environment', 'ceilings' and 'rows'")
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(OPS)}; all without one")
    parser.add_argument("--lengths", default="2048,8192,32768", help="sequence lengths")
    parser.add_argument("--out", type=Path, help="write the records here, as JSON")
    parser.add_argument(
        "--draw", type=Path, action="append", help="draw these records instead of measuring; can be repeated"
    )
    parser.add_argument("--plot", type=Path, help="the figure to write")
    parser.add_argument("--page", type=Path, help="with --draw: a Markdown file whose tables are to be renewed")
    args = parser.parse_args(argv)
    if args.draw:
        runs = [_records(path, parser) for path in args.draw]
        plot(runs[0], args.plot or args.draw[0].with_suffix(".png"))
        if args.page:
            args.page.write_text(write_table(args.page.read_text(), *runs))
        return
    if unknown := [op for op in args.ops if op not in OPS]:
        parser.error(f"unknown operation {unknown[0]!r}; allowed: {', '.join(OPS)}")
    if not torch.cuda.is_available() or not installed("triton"):
        parser.error("needs a CUDA device and Triton")
    torch.manual_seed(0)
    limits = ceilings()
    records = {"environment": environment(), "ceilings": limits, "rows": []}
    print(records["environment"], limits, sep="\n", file=sys.stderr)
    for op in args.ops or OPS:
        for case in OPS[op]([int(x) for x in args.lengths.split(",")]):
            records["rows"].append(measure(case, limits))
            print(line(records["rows"][-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(records, indent=1) + "\n")
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    main()
