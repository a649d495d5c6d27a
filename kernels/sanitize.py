"""Launch every Triton kernel at sizes of a few chunks: a program for compute-sanitizer, which slows kernels a lot.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --kernel-name kernel_substring=_kernel \\
        python -m kernels.sanitize [OP ...]

and the same with `--tool racecheck`. Ragged lengths and widths reach the masks, even ones the kernels without. Values
are not compared, the tests do that; a result that is not finite ends the program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import (
    add_norm,
    cache_update,
    cached_attention,
    convolution_step,
    delta_rule,
    dplr_delta_rule,
    gated_norm,
    linear_argmax,
    linear_cross_entropy,
    linear_recurrence,
    next_token,
    prefix_linear_attention,
    selective_scan,
    short_convolution,
    taylor_linear_attention,
    taylor_linear_attention_step,
)
from kernels.taylor_linear_attention import TaylorState, num_taylor_features

Draw = Callable[..., Tensor]
WITH_GRADIENT = {"requires_grad": True}


def differentiate(*outputs: Tensor, inputs: list[Tensor]) -> Iterator[Tensor]:
    """The outputs, then the gradients of all inputs."""
    yield from outputs
    yield from torch.autograd.grad(sum(x.float().sum() for x in outputs), inputs)


def taylor(draw: Draw) -> Iterator[Tensor]:
    """Ragged, with states at both ends; even, in groups of chunks; wide features and several tiles of values."""
    for length, f, v_dim, resumed in ((130, 16, 64, True), (512, 16, 64, False), (70, 24, 80, False)):
        q, k, v = (draw(1, length, 3, n, **WITH_GRADIENT) for n in (f, f, v_dim))
        state = TaylorState.zeros(1, 3, f, v_dim, device=q.device) if resumed else None
        o, end = taylor_linear_attention(q, k, v, initial_state=state, output_final_state=resumed, backend="triton")
        yield from differentiate(o, *(end or ()), inputs=[q, k, v])


def prefix(draw: Draw) -> Iterator[Tensor]:
    """A prefix of one group, which is a state at once, and one of several with a mask."""
    for length, m, masked in ((70, 64, False), (70, 600, True)):
        given = [
            draw(1, n, 3, width, **WITH_GRADIENT) for n, width in ((length, 16),) * 2 + ((length, 64), (m, 16), (m, 64))
        ]
        mask = torch.arange(m, device=given[0].device).expand(1, m) % 5 > 0 if masked else None
        o, _ = prefix_linear_attention(*given, prefix_mask=mask, backend="triton")
        yield from differentiate(o, inputs=given)


def taylor_step(draw: Draw) -> Iterator[Tensor]:
    """Into a state of its own, and over the old one."""
    for dtype, v_dim in ((torch.float32, 64), (torch.bfloat16, 20)):
        q, k, v = (draw(2, 3, n) for n in (16, 16, v_dim))
        kv, key_sum = draw(2, 3, num_taylor_features(16), v_dim), draw(2, 3, num_taylor_features(16)).abs() + 10
        state = TaylorState(kv.to(dtype), key_sum.to(dtype))
        for inplace in (False, True):
            o, new = taylor_linear_attention_step(q, k, v, state, backend="triton", inplace=inplace)
            yield from (o, *new)


def convolution(draw: Draw) -> Iterator[Tensor]:
    for length, d, taps in ((130, 70, 3), (128, 64, 4)):
        given = [draw(2, length, d, **WITH_GRADIENT), draw(d, taps, **WITH_GRADIENT), draw(d, **WITH_GRADIENT)]
        yield from differentiate(short_convolution(*given, backend="triton"), inputs=given)


def one_convolution_step(draw: Draw) -> Iterator[Tensor]:
    for d, silu, biases in ((70, "silu", True), (64, None, False)):
        tail = draw(3, 3, d)
        of_layer = {"x_bias": draw(d), "gate_bias": draw(d)} if biases else {}
        y, tail = convolution_step(
            draw(3, d), tail, draw(d, 4), draw(d), activation=silu, gate=draw(3, d), backend="triton", **of_layer
        )
        yield from (y, tail)


def addition_and_norm(draw: Draw) -> Iterator[Tensor]:
    for d, parts in ((70, 1), (64, 4)):
        yield from add_norm(draw(3, d), draw(parts, 3, d), draw(d), bias=draw(d), backend="triton")


def choice_of_tokens(draw: Draw) -> Iterator[Tensor]:
    for rows, n in ((3, 3000), (1100, 70)):
        scores = draw(rows, n)
        token, made, count = (
            torch.zeros(*shape, dtype=torch.int64, device=scores.device) for shape in ([rows], [2, rows], [1])
        )
        next_token(scores, token, made, count + 1, backend="triton")
        yield made[1].float()


def norm_behind_a_gate(draw: Draw) -> Iterator[Tensor]:
    """Ragged, in groups, more rows than programs; and even, with a skip."""
    for rows, d, groups, skips in ((2100, 70, 2, False), (64, 64, 1, True)):
        given = [draw(*shape, **WITH_GRADIENT) for shape in ((rows, d), (rows, d), (d,))]
        more = [draw(rows, d, **WITH_GRADIENT), draw(d, **WITH_GRADIENT)] if skips else [None, None]
        o = gated_norm(*given, x=more[0], skip=more[1], num_groups=groups, backend="triton")
        yield from differentiate(o, inputs=[part for part in (*given, *more) if part is not None])


def joining_a_cache(draw: Draw) -> Iterator[Tensor]:
    """Rows that lie apart, filled up or not, turned or not."""
    for heads, width, wide, turned in ((3, 10, 10, 4), (40, 70, 72, 0)):
        parts = (part.unflatten(1, (heads, width)) for part in draw(2, 3 * heads * width).chunk(3, dim=1))
        keys, values = draw(2, 5, heads, wide), draw(2, 5, heads, wide)
        position = torch.tensor(7, device=keys.device)
        yield cache_update(*parts, keys, values, position, turned=turned, backend="triton")
        yield from (keys, values)


def attention(draw: Draw) -> Iterator[Tensor]:
    """A cache read by one program a head, and one cut in parts that are joined."""
    for slots, used, width in ((50, 7, 40), (700, 650, 64)):
        q, keys, values = draw(2, 3, width), draw(2, slots, 3, width), draw(2, slots, 3, width)
        at = torch.tensor(used, device=q.device)
        yield cached_attention(q, keys, values, at, backend="triton")


def cross_entropy(draw: Draw) -> Iterator[Tensor]:
    """Without logits in memory, and with the logits of a few rows."""
    for backend in ("triton", "chunked"):
        hidden, weight = draw(150, 40, **WITH_GRADIENT), draw(300, 40, **WITH_GRADIENT)
        targets = torch.arange(150, device=hidden.device) % 300
        targets[::7] = -100
        yield from differentiate(
            linear_cross_entropy(hidden, weight, targets, backend=backend), inputs=[hidden, weight]
        )
        yield linear_argmax(hidden, weight, backend=backend)


def scan(draw: Draw) -> Iterator[Tensor]:
    """Ragged, from a state on; and even, with a bias and a skip; states of an odd and of a wide width."""
    for length, d, n, resumed in ((37, 70, 3, True), (64, 64, 24, False)):
        x, dt, a = draw(2, length, d, **WITH_GRADIENT), draw(2, length, d).abs(), -draw(d, n).abs()
        b, c = draw(2, length, n, **WITH_GRADIENT), draw(2, length, n, **WITH_GRADIENT)
        rest = {"initial_state": draw(2, d, n)} if resumed else {"dt_bias": draw(d), "skip": draw(d)}
        y, last = selective_scan(x, dt, a, b, c, **rest, backend="triton")
        yield from differentiate(y, *([last] if resumed else []), inputs=[x, b, c])


def recurrence(draw: Draw) -> Iterator[Tensor]:
    """A decay per head and one per channel; ragged, from a state on, in several tiles of values; and even."""
    for length, k_dim, v_dim, resumed in ((70, 20, 80, True), (64, 16, 64, False)):
        for by_channel in (False, True):
            q, k, v = (draw(2, length, 3, n, **WITH_GRADIENT) for n in (k_dim, k_dim, v_dim))
            g = -draw(*((2, length, 3, k_dim) if by_channel else (2, length, 3))).abs()
            state = draw(2, 3, k_dim, v_dim) if resumed else None
            o, last = linear_recurrence(q, k, v, g, initial_state=state, output_final_state=resumed, backend="triton")
            yield from differentiate(o, *([last] if resumed else []), inputs=[q, k, v])


def delta(draw: Draw) -> Iterator[Tensor]:
    """With a decay, without, and one per channel; ragged, from a state on, in several tiles of values; and even."""
    for length, k_dim, v_dim, gated in ((70, 20, 80, True), (64, 16, 64, False)):
        q, k, v = (draw(2, length, 3, n, **WITH_GRADIENT) for n in (k_dim, k_dim, v_dim))
        beta, g = draw(2, length, 3).sigmoid(), -draw(2, length, 3).abs() if gated else None
        state = draw(2, 3, k_dim, v_dim) if gated else None
        unit = torch.nn.functional.normalize(k, dim=-1)
        o, last = delta_rule(q, unit, v, beta, g, initial_state=state, output_final_state=gated, backend="triton")
        yield from differentiate(o, *([last] if gated else []), inputs=[q, k, v])
        decay, unit = -draw(2, length, 3, k_dim).abs(), unit.detach()
        o, last = dplr_delta_rule(
            q, k, v, -unit, unit, decay, initial_state=state, output_final_state=gated, backend="triton"
        )
        yield from differentiate(o, *([last] if gated else []), inputs=[q, k, v])


OPS: dict[str, Callable[[Draw], Iterator[Tensor]]] = {
    "taylor_linear_attention": taylor,
    "prefix_linear_attention": prefix,
    "taylor_linear_attention_step": taylor_step,
    "short_convolution": convolution,
    "convolution_step": one_convolution_step,
    "add_norm": addition_and_norm,
    "gated_norm": norm_behind_a_gate,
    "next_token": choice_of_tokens,
    "cache_update": joining_a_cache,
    "cached_attention": attention,
    "linear_cross_entropy": cross_entropy,
    "selective_scan": scan,
    "linear_recurrence": recurrence,
    "delta_rule": delta,
}


def run(op: str, device: str, dtype: torch.dtype) -> None:
    """Launch the kernels of one operation; RuntimeError for a result that is not finite."""
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int, requires_grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=gen).to(device, dtype).requires_grad_(requires_grad)

    for i, x in enumerate(OPS[op](draw)):
        if not x.isfinite().all():
            raise RuntimeError(f"result {i} of {op} in {dtype} is not finite")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(OPS)}; all without one")
    args = parser.parse_args(argv)
    if unknown := [op for op in args.ops if op not in OPS]:
        parser.error(f"unknown operation {unknown[0]!r}; allowed: {', '.join(OPS)}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    for op in args.ops or OPS:
        run(op, "cuda", torch.bfloat16)
        torch.cuda.synchronize()
        print(op, flush=True)


if __name__ == "__main__":
    main()
