"""Launches of the Triton kernels, and their registration as operators with fake kernels and gradients."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.taylor_linear_attention import triton_kernels as tk
from kernels.taylor_linear_attention.reference import TaylorState, num_taylor_features
from kernels.triton_support import INTERPRETED

MIN_CHUNKS_PER_GROUP = 4


class Tile(NamedTuple):
    """Block sizes of a launch: NB blocks of BF features, chunks of C tokens, BV values, and the operand precision.

    PARTS launches, one after the other, share the features where one program has no room for them all. With GATHER
    the factors of a feature are read from memory and not picked by products.
    """

    F: int
    FP: int
    V: int
    BV: int
    C: int
    BF: int
    NB: int
    OP: tl.dtype
    PREC: str
    PARTS: int
    GATHER: bool

    @property
    def rows(self) -> int:
        return self.PARTS * self.NB * self.BF


def choose_tile(f: int, v_dim: int, dtype: torch.dtype, *, backward: bool = False) -> tuple[Tile, dict]:
    """Block sizes and launch options for a shape and dtype.

    bf16 operands go to the tensor cores as they are. fp16 has no room for the sums of the state, so it is computed
    as tf32, which has the same mantissa. fp32 is computed as tf32 where `torch.set_float32_matmul_precision` allows
    it, and otherwise as three tf32 products, which is fp32 to within rounding.
    """
    # Triton's interpreter has no bf16 products.
    narrow = dtype == torch.bfloat16 and not INTERPRETED
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    op, prec = (tl.bfloat16, "tf32") if narrow else (tl.float32, "tf32x3" if exact else "tf32")
    block, num = 64, num_taylor_features(f)
    num_blocks = 1 if num <= block or exact else 3
    block_v = min(64 if narrow or not backward else 32, max(16, triton.next_power_of_2(v_dim)))
    parts = triton.cdiv(num, num_blocks * block)
    # Products pick factors of few digits exactly, and are the faster way where one launch has all features.
    gather = not narrow and (dtype == torch.float32 or parts > 1)
    chunk = 64 if narrow else 32
    tile = Tile(f, 16 if f <= 16 else 32, v_dim, block_v, chunk, block, num_blocks, op, prec, parts, gather)
    stages = {"state": 3, "apply": 3, "apply from a state": 2, "dx": 2, "dx reverse": 3}
    if not narrow or parts > 1:
        # Wide features: what is fetched ahead would take the shared memory of a second program.
        stages = dict.fromkeys(stages, 1)
    return tile, {"num_warps": 4, "num_stages": stages}


def shape_constants(tile: Tile, options: dict, length: int, num_heads: int, mask: Tensor | None, kernel: str) -> dict:
    """What a kernel is compiled for; EVEN: whole tiles everywhere, so that it needs no masks."""
    even = mask is None and length % tile.C == 0 and tile.F == tile.FP and tile.V % tile.BV == 0
    options = dict(options, num_stages=options["num_stages"][kernel])
    return dict(tile._asdict(), EVEN=even, H=num_heads, **options)


@functools.lru_cache
def num_slots(device: torch.device) -> int:
    """How many programs run side by side: two per multiprocessor."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def split(length: int, tile: Tile, programs: int, device: torch.device) -> tuple[int, int]:
    """Number of groups and chunks per group, so that programs * groups fill the device but no group is tiny."""
    chunks = triton.cdiv(length, tile.C)
    groups = max(1, min(num_slots(device) // programs, chunks // MIN_CHUNKS_PER_GROUP))
    per_group = triton.cdiv(chunks, groups)
    return triton.cdiv(chunks, per_group), per_group


class Prefix(NamedTuple):
    """What every token reads besides those before it: k [B, M, H, f], v [B, M, H, V], mask [B, M] bool or None."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


class Starts(NamedTuple):
    """Raw states, kv [B*H, G, rows, V] and z [B*H, G, rows], of or before each group; None when all are zero."""

    kv: Tensor | None
    z: Tensor | None

    @classmethod
    def empty(cls, x: Tensor, groups: int, tile: Tile) -> Starts:
        """Room for the heads of x [B, T, H, f]."""
        shape = (x.shape[0] * x.shape[2], groups, tile.rows)
        kv = torch.empty(*shape, tile.V, device=x.device, dtype=torch.float32)
        return cls(kv, torch.empty(shape, device=x.device, dtype=torch.float32))


def sum_groups(
    x: Tensor, y: Tensor, c, mask, tile: Tile, options, groups: int, per_group: int, *, skip: str | None
) -> Starts:
    """Group sums of phi(x) y^T and phi(x) c; `skip` names an end group ('first', 'last') that nobody needs."""
    b, t, h, _ = x.shape
    kv, z = Starts.empty(x, groups, tile)
    num = groups - (skip is not None)
    for part in range(tile.PARTS if num else 0):
        tk._state_kernel[(triton.cdiv(tile.V, tile.BV), num, b * h)](
            x,
            y,
            z if c is None else c,
            z if mask is None else mask,
            kv,
            z,
            t,
            groups,
            per_group,
            1 if skip == "first" else 0,
            part,
            HAS_C=c is not None,
            HAS_MASK=mask is not None,
            **shape_constants(tile, options, t, h, mask, "state"),
        )
    return Starts(kv, z)


def scan(
    sums: Starts, before: Starts | None, initial: TaylorState | None, scale: float, tile: Tile, *, reverse: bool
) -> Starts:
    """Turn group sums into the states at the start of each group, in place; the skipped end group may hold anything.

    What was `before`, an initial state and sums of groups of a prefix, is in all of them.
    """
    kv, z = sums
    heads, groups, rows, _ = kv.shape
    block = 16
    tk._scan_kernel[(rows // block, heads)](
        kv,
        z,
        *(sums if before is None else before),
        *(sums if initial is None else initial),
        scale,
        groups,
        0 if before is None else before.kv.shape[1],
        REVERSE=reverse,
        HAS_BEFORE=before is not None,
        HAS_INITIAL=initial is not None,
        F=tile.F,
        V=tile.V,
        VP=triton.next_power_of_2(tile.V),
        FT=rows,
        BR=block,
        num_warps=4,
    )
    return sums


def group_starts(
    x, y, c, initial, scale, tile, options, groups, per_group, *, reverse: bool, prefix: Prefix | None = None
) -> Starts:
    """The state at the start of each group: forwards from `initial` and the prefix, or backwards from the gradient."""
    if groups == 1 and initial is None and prefix is None:
        return Starts(None, None)
    before = None
    if prefix is not None:
        cut = split(prefix.k.shape[1], tile, triton.cdiv(tile.V, tile.BV) * x.shape[0] * x.shape[2], x.device)
        before = sum_groups(prefix.k, prefix.v, None, prefix.mask, tile, options, *cut, skip=None)
        if groups == cut[0] == 1 and initial is None:
            return before
    sums = sum_groups(x, y, c, None, tile, options, groups, per_group, skip="first" if reverse else "last")
    return scan(sums, before, initial, scale, tile, reverse=reverse)


def launch_apply(
    x, xs, ys, mask, like, norm, start: Starts, final, scale, tile, options, groups, per_group, *, reverse
):
    """Outputs (forwards, with `norm` [PARTS, B, T, H] to fill) or the gradient of v (`reverse`), shaped as `like`.

    Not causal when `xs` is None.
    """
    b, t, h, _ = x.shape
    o = torch.empty_like(like, dtype=like.dtype if tile.PARTS == 1 else torch.float32)
    kernel = "apply" if start.kv is None or reverse else "apply from a state"
    for part in range(tile.PARTS):
        tk._apply_kernel[(triton.cdiv(tile.V, tile.BV), groups, b * h)](
            x,
            o if xs is None else xs,
            o if ys is None else ys,
            o if mask is None else mask,
            o,
            o if norm is None else norm[part],
            o if norm is None else norm[max(part - 1, 0)],
            o if start.kv is None else start.kv,
            o if start.z is None else start.z,
            o if final is None else final.kv,
            o if final is None else final.key_sum,
            scale,
            t,
            groups,
            per_group,
            part,
            CAUSAL=xs is not None,
            REVERSE=reverse,
            NORMALISE=norm is not None,
            HAS_MASK=mask is not None,
            HAS_START=start.kv is not None,
            HAS_FINAL=final is not None,
            INSIDE=part == 0,
            **shape_constants(tile, options, t, h, mask, kernel),
        )
    return o.to(like.dtype)


def launch_dx(
    x, y, c, xs, ys, mask, start: Starts, final, scale, tile, options, groups, per_group, *, reverse
) -> Tensor:
    """Gradient of x (q forwards, k in `reverse`); not causal when `xs` is None."""
    b, t, h, _ = x.shape
    num_v = triton.cdiv(tile.V, tile.BV)
    # Each tile of V gives its own part of the gradient; they are summed below in a fixed order.
    dtype = x.dtype if num_v == tile.PARTS == 1 else torch.float32
    dx = torch.empty(num_v, *x.shape, device=x.device, dtype=dtype)
    for part in range(tile.PARTS):
        tk._dx_kernel[(num_v, groups, b * h)](
            x,
            y,
            dx if c is None else c,
            dx if xs is None else xs,
            dx if ys is None else ys,
            dx if mask is None else mask,
            dx,
            dx if start.kv is None else start.kv,
            dx if start.z is None else start.z,
            dx if final is None else final.kv,
            dx if final is None else final.key_sum,
            scale,
            t,
            groups,
            per_group,
            part,
            b * t * h,
            CAUSAL=xs is not None,
            REVERSE=reverse,
            HAS_MASK=mask is not None,
            HAS_START=start.kv is not None,
            HAS_FINAL=final is not None,
            INSIDE=part == 0,
            **shape_constants(tile, options, t, h, mask, "dx reverse" if reverse else "dx"),
        )
    return (dx[0] if num_v == 1 else dx.sum(0)).to(x.dtype)


def as_state(kv: Tensor | None, key_sum: Tensor | None) -> TaylorState | None:
    return None if kv is None else TaylorState(kv.contiguous(), key_sum.contiguous())


def empty_state(b: int, h: int, f: int, v_dim: int, like: Tensor) -> TaylorState:
    num = num_taylor_features(f)
    return TaylorState(
        torch.empty(b, h, num, v_dim, device=like.device, dtype=torch.float32),
        torch.empty(b, h, num, device=like.device, dtype=torch.float32),
    )


# ---------------------------------------------------------------- operators
GIVEN = (
    "Tensor? prefix_k, Tensor? prefix_v, Tensor? prefix_mask, Tensor? initial_kv, Tensor? initial_key_sum, float scale"
)


class Call(NamedTuple):
    """What a pass over q, k [B, T, H, f] and v [B, T, H, V] is launched with."""

    prefix: Prefix | None
    initial: TaylorState | None
    plan: tuple

    @classmethod
    def of(cls, q, v, prefix_k, prefix_v, prefix_mask, initial_kv, initial_key_sum, scale, *, backward: bool) -> Call:
        (b, t, h, f), v_dim = q.shape, v.shape[-1]
        tile, options = choose_tile(f, v_dim, q.dtype, backward=backward)
        prefix = None
        if prefix_k is not None:
            mask = None if prefix_mask is None else prefix_mask.contiguous()
            prefix = Prefix(prefix_k.contiguous(), prefix_v.contiguous(), mask)
        groups = split(t, tile, triton.cdiv(v_dim, tile.BV) * b * h, q.device)
        return cls(prefix, as_state(initial_kv, initial_key_sum), (scale, tile, options, *groups))


@torch.library.custom_op(
    "zoology::taylor_linear_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {GIVEN}, bool output_final_state) -> (Tensor, Tensor, Tensor, Tensor)",
)
def forward_op(q, k, v, *given_and_final):
    *given, output_final_state = given_and_final
    q, k, v = (x.contiguous() for x in (q, k, v))
    (b, t, h, f), v_dim = q.shape, v.shape[-1]
    prefix, initial, plan = Call.of(q, v, *given, backward=False)
    parts = plan[1].PARTS
    start = group_starts(k, v, None, initial, *plan, reverse=False, prefix=prefix)
    norm = torch.empty(parts, b, t, h, device=q.device, dtype=torch.float32)
    final = empty_state(b, h, f, v_dim, q) if output_final_state else None
    o = launch_apply(q, k, v, None, v, norm, start, final, *plan, reverse=False)
    return o, norm[0] if parts == 1 else norm[-1].clone(), *(final or (q.new_empty(0), q.new_empty(0)))


@forward_op.register_fake
def _(q, k, v, *given_and_final):
    b, t, h, f = q.shape
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    norm = q.new_empty(b, t, h, dtype=torch.float32)
    if given_and_final[-1]:
        return o, norm, *empty_state(b, h, f, v.shape[-1], q)
    return o, norm, o.new_empty(0), o.new_empty(0)


@torch.library.custom_op(
    "zoology::taylor_linear_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor o, Tensor norm, Tensor do, Tensor? dfinal_kv,"
    f" Tensor? dfinal_key_sum, {GIVEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(q, k, v, o, norm, do, dfinal_kv, dfinal_key_sum, *given):
    """Gradients of q, k, v, and of keys and values of the prefix and both tensors of the initial state, or empty."""
    q, k, v, do = (x.contiguous() for x in (q, k, v, do))
    (b, _, h, f), v_dim = q.shape, v.shape[-1]
    prefix, initial, plan = Call.of(q, v, *given, backward=True)

    # fp16 has no room for do / norm at long lengths.
    dn = torch.empty_like(v, dtype=torch.float32 if v.dtype == torch.float16 else v.dtype)
    delta = torch.empty_like(norm)
    rows = 32
    tk._normaliser_kernel[(triton.cdiv(norm.numel(), rows),)](
        o, do, norm, dn, delta, norm.numel(), V=v_dim, VP=triton.next_power_of_2(v_dim), BR=rows, num_warps=4
    )
    # What the prefix adds up to is summed once more: kept since the forward pass, it would take a state's memory.
    start = group_starts(k, v, None, initial, *plan, reverse=False, prefix=prefix)
    dq = launch_dx(q, dn, delta, k, v, None, start, None, *plan, reverse=False)

    start = group_starts(q, dn, delta, as_state(dfinal_kv, dfinal_key_sum), *plan, reverse=True)
    before = None if initial is None and prefix is None else empty_state(b, h, f, v_dim, q)
    dk = launch_dx(k, v, delta, q, dn, None, start, before, *plan, reverse=True)
    dv = launch_apply(k, q, dn, None, v, None, start, None, *plan, reverse=True)
    dprefix = (q.new_empty(0), q.new_empty(0)) if prefix is None else prefix_gradients(prefix, before, plan)
    if initial is None:
        return dq, dk, dv, *dprefix, q.new_empty(0), q.new_empty(0)
    return dq, dk, dv, *dprefix, *(x.to(initial.kv.dtype) for x in before)


def prefix_gradients(prefix: Prefix, gradient: TaylorState, plan: tuple) -> tuple[Tensor, Tensor]:
    """Of k and v of a prefix, from the gradient of its state."""
    scale, tile, options, *_ = plan
    k, v, mask = prefix
    b, m, h, _ = k.shape
    plan = (scale, tile, options, *split(m, tile, triton.cdiv(tile.V, tile.BV) * b * h, k.device))
    start = scan(Starts.empty(k, 1, tile), None, gradient, scale, tile, reverse=True)
    dk = launch_dx(k, v, None, None, None, mask, start, None, *plan, reverse=True)
    dv = launch_apply(k, None, None, mask, v, None, start, None, *plan, reverse=True)
    return dk, dv


@backward_op.register_fake
def _(q, k, v, o, norm, do, dfinal_kv, dfinal_key_sum, prefix_k, prefix_v, prefix_mask, initial_kv, initial_ks, scale):
    given = (q, k, v, prefix_k, prefix_v, initial_kv, initial_ks)
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in given
    )


def _setup_forward(ctx, inputs, output):
    *tensors, ctx.scale, ctx.output_final_state = inputs
    o, norm, _, _ = output
    ctx.save_for_backward(*tensors, o, norm)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _, dfinal_kv, dfinal_key_sum):
    q, k, v, *given, o, norm = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    dfinal = (None, None)
    if ctx.output_final_state and not (dfinal_kv is None and dfinal_key_sum is None):
        dfinal = TaylorState.zeros(*q.shape[::2], q.shape[-1], v.shape[-1], device=q.device, dtype=torch.float32)
        dfinal = [zero if x is None else x for x, zero in zip((dfinal_kv, dfinal_key_sum), dfinal)]
    dq, dk, dv, dprefix_k, dprefix_v, dkv, dkey_sum = torch.ops.zoology.taylor_linear_attention_backward(
        q, k, v, o, norm, do, *dfinal, *given, ctx.scale
    )
    prefix_k, _, _, initial_kv, _ = given
    if prefix_k is None:
        dprefix_k = dprefix_v = None
    if initial_kv is None:
        dkv = dkey_sum = None
    return dq, dk, dv, dprefix_k, dprefix_v, None, dkv, dkey_sum, None, None


forward_op.register_autograd(_backward, setup_context=_setup_forward)


def launch_step(q, k, v, state, new, scale):
    """Outputs of one token, and the state after it in `new`, which may be `state` itself.

    A program owns one head's state, and each element is read before the thread that read it writes it.
    """
    # Parts of one projection come as they are: rows and heads may lie apart, entries of a head may not.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (b, h, f), v_dim = q.shape, v.shape[-1]
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    v_padded = triton.next_power_of_2(v_dim)
    tk._step_kernel[(b * h,)](
        q,
        k,
        v,
        *state,
        o,
        *new,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        H=h,
        F=f,
        NF=num_taylor_features(f),
        V=v_dim,
        VP=v_padded,
        BR=max(1, 4096 // v_padded),
        num_warps=1 if state.kv.dtype.itemsize == 2 else 2,
    )
    return o


@torch.library.custom_op(
    "zoology::taylor_linear_attention_step",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor kv, Tensor key_sum, float scale) -> (Tensor, Tensor, Tensor)",
)
def step_op(q, k, v, kv, key_sum, scale):
    state = TaylorState(kv.contiguous(), key_sum.contiguous())
    new = TaylorState(*(torch.empty_like(x) for x in state))
    return launch_step(q, k, v, state, new, scale), *new


@step_op.register_fake
def _(q, k, v, kv, key_sum, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, kv, key_sum))


@torch.library.custom_op(
    "zoology::taylor_linear_attention_step_",
    mutates_args=("kv", "key_sum"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!) key_sum, float scale) -> Tensor",
)
def step_inplace_op(q, k, v, kv, key_sum, scale):
    state = TaylorState(kv, key_sum)
    return launch_step(q, k, v, state, state, scale)


@step_inplace_op.register_fake
def _(q, k, v, kv, key_sum, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- what the public functions call
def taylor_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    initial_state: TaylorState | None,
    output_final_state: bool,
    prefix: Prefix | None = None,
) -> tuple[Tensor, TaylorState | None]:
    initial = initial_state or (None, None)
    given = prefix or (None, None, None)
    o, _, kv, key_sum = torch.ops.zoology.taylor_linear_attention(q, k, v, *given, *initial, scale, output_final_state)
    if not output_final_state:
        return o, None
    dtype = torch.float32 if initial_state is None else initial_state[0].dtype
    return o, TaylorState(kv.to(dtype), key_sum.to(dtype))


def taylor_linear_attention_step_triton(
    q: Tensor, k: Tensor, v: Tensor, state: TaylorState, *, scale: float
) -> tuple[Tensor, TaylorState]:
    o, kv, key_sum = torch.ops.zoology.taylor_linear_attention_step(q, k, v, *state, scale)
    return o, TaylorState(kv, key_sum)


def taylor_linear_attention_step_inplace(
    q: Tensor, k: Tensor, v: Tensor, state: TaylorState, *, scale: float
) -> tuple[Tensor, TaylorState]:
    """The same, written into the tensors of `state`, which must be contiguous: for states at fixed addresses."""
    return torch.ops.zoology.taylor_linear_attention_step_(q, k, v, *state, scale), state
