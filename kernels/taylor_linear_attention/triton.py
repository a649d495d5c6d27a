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
    tile = Tile(
        f, 16 if f <= 16 else 32, v_dim, block_v, 64 if narrow else 32, block, num_blocks, op, prec, parts, not narrow
    )
    stages = {"state": 3, "apply": 3, "apply from a state": 2, "dx": 2, "dx reverse": 3}
    if not narrow:
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


class Starts(NamedTuple):
    """Raw states at the start of each group, kv [B*H, G, NB*BF, V] and z [B*H, G, NB*BF]; None when all are zero."""

    kv: Tensor | None
    z: Tensor | None


def sum_groups(x: Tensor, y: Tensor, c, mask, tile: Tile, options, groups: int, per_group: int, *, skip: str | None):
    """Group sums, raw, of phi(x) y^T and phi(x) c; `skip` names an end group ('first', 'last') that nobody needs."""
    b, t, h, _ = x.shape
    kv = torch.empty(b * h, groups, tile.rows, tile.V, device=x.device, dtype=torch.float32)
    z = torch.empty(b * h, groups, tile.rows, device=x.device, dtype=torch.float32)
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
    return kv, z


def scan(kv, z, initial: TaylorState | None, final: TaylorState | None, scale: float, tile: Tile, *, reverse: bool):
    """Turn group sums into the states at the start of each group, in place; the skipped end group may hold anything."""
    heads, groups, rows, _ = kv.shape
    block = 16
    tk._scan_kernel[(rows // block, heads)](
        kv,
        z,
        kv if initial is None else initial.kv,
        z if initial is None else initial.key_sum,
        kv if final is None else final.kv,
        z if final is None else final.key_sum,
        scale,
        groups,
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        HAS_FINAL=final is not None,
        F=tile.F,
        V=tile.V,
        VP=triton.next_power_of_2(tile.V),
        FT=rows,
        BR=block,
        num_warps=4,
    )


def group_starts(x, y, c, initial, scale, tile, options, groups, per_group, *, reverse: bool) -> Starts:
    """The state at the start of each group: forwards from `initial`, or backwards from the final gradient."""
    if groups == 1 and initial is None:
        return Starts(None, None)
    skip = "first" if reverse else "last"
    kv, z = sum_groups(x, y, c, None, tile, options, groups, per_group, skip=skip)
    scan(kv, z, initial, None, scale, tile, reverse=reverse)
    return Starts(kv, z)


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
            x.numel(),
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
STATE = "Tensor? initial_kv, Tensor? initial_key_sum"


@torch.library.custom_op(
    "zoology::taylor_linear_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {STATE}, float scale, bool output_final_state)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def forward_op(q, k, v, initial_kv, initial_key_sum, scale, output_final_state):
    q, k, v = (x.contiguous() for x in (q, k, v))
    (b, t, h, f), v_dim = q.shape, v.shape[-1]
    tile, options = choose_tile(f, v_dim, q.dtype)
    groups, per_group = split(t, tile, triton.cdiv(v_dim, tile.BV) * b * h, q.device)
    initial = as_state(initial_kv, initial_key_sum)
    start = group_starts(k, v, None, initial, scale, tile, options, groups, per_group, reverse=False)
    norm = torch.empty(tile.PARTS, b, t, h, device=q.device, dtype=torch.float32)
    final = empty_state(b, h, f, v_dim, q) if output_final_state else None
    o = launch_apply(q, k, v, None, v, norm, start, final, scale, tile, options, groups, per_group, reverse=False)
    return o, norm[0] if tile.PARTS == 1 else norm[-1].clone(), *(final or (q.new_empty(0), q.new_empty(0)))


@forward_op.register_fake
def _(q, k, v, initial_kv, initial_key_sum, scale, output_final_state):
    b, t, h, f = q.shape
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    norm = q.new_empty(b, t, h, dtype=torch.float32)
    if output_final_state:
        return o, norm, *empty_state(b, h, f, v.shape[-1], q)
    return o, norm, o.new_empty(0), o.new_empty(0)


@torch.library.custom_op(
    "zoology::taylor_linear_attention_backward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor o, Tensor norm, Tensor do, {STATE},"
    " Tensor? dfinal_kv, Tensor? dfinal_key_sum, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(q, k, v, o, norm, do, initial_kv, initial_key_sum, dfinal_kv, dfinal_key_sum, scale):
    q, k, v, do = (x.contiguous() for x in (q, k, v, do))
    (b, t, h, f), v_dim = q.shape, v.shape[-1]
    tile, options = choose_tile(f, v_dim, q.dtype, backward=True)
    groups, per_group = split(t, tile, triton.cdiv(v_dim, tile.BV) * b * h, q.device)
    plan = (scale, tile, options, groups, per_group)

    # fp16 has no room for do / norm at long lengths.
    dn = torch.empty_like(v, dtype=torch.float32 if v.dtype == torch.float16 else v.dtype)
    delta = torch.empty_like(norm)
    rows = 32
    tk._normaliser_kernel[(triton.cdiv(norm.numel(), rows),)](
        o, do, norm, dn, delta, norm.numel(), V=v_dim, VP=triton.next_power_of_2(v_dim), BR=rows, num_warps=4
    )
    initial, dfinal = as_state(initial_kv, initial_key_sum), as_state(dfinal_kv, dfinal_key_sum)
    start = group_starts(k, v, None, initial, *plan, reverse=False)
    dq = launch_dx(q, dn, delta, k, v, None, start, None, *plan, reverse=False)

    start = group_starts(q, dn, delta, dfinal, *plan, reverse=True)
    dinitial = None if initial is None else empty_state(b, h, f, v_dim, q)
    dk = launch_dx(k, v, delta, q, dn, None, start, dinitial, *plan, reverse=True)
    dv = launch_apply(k, q, dn, None, v, None, start, None, *plan, reverse=True)
    if initial is None:
        return dq, dk, dv, q.new_empty(0), q.new_empty(0)
    return dq, dk, dv, *(x.to(initial.kv.dtype) for x in dinitial)


@backward_op.register_fake
def _(q, k, v, o, norm, do, initial_kv, initial_key_sum, dfinal_kv, dfinal_key_sum, scale):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if initial_kv is None:
        return dq, dk, dv, q.new_empty(0), q.new_empty(0)
    return (
        dq,
        dk,
        dv,
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (initial_kv, initial_key_sum)),
    )


def _setup_forward(ctx, inputs, output):
    q, k, v, initial_kv, initial_key_sum, scale, output_final_state = inputs
    o, norm, _, _ = output
    ctx.save_for_backward(q, k, v, o, norm, initial_kv, initial_key_sum)
    ctx.scale, ctx.output_final_state = scale, output_final_state
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _, dfinal_kv, dfinal_key_sum):
    q, k, v, o, norm, initial_kv, initial_key_sum = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    dfinal = (None, None)
    if ctx.output_final_state and not (dfinal_kv is None and dfinal_key_sum is None):
        dfinal = TaylorState.zeros(*q.shape[::2], q.shape[-1], v.shape[-1], device=q.device, dtype=torch.float32)
        dfinal = [zero if x is None else x for x, zero in zip((dfinal_kv, dfinal_key_sum), dfinal)]
    dq, dk, dv, dkv, dkey_sum = torch.ops.zoology.taylor_linear_attention_backward(
        q, k, v, o, norm, do, initial_kv, initial_key_sum, *dfinal, ctx.scale
    )
    if initial_kv is None:
        dkv = dkey_sum = None
    return dq, dk, dv, dkv, dkey_sum, None, None


forward_op.register_autograd(_backward, setup_context=_setup_forward)


@torch.library.custom_op(
    "zoology::taylor_state",
    mutates_args=(),
    schema=f"(Tensor k, Tensor v, Tensor? mask, {STATE}, float scale) -> (Tensor, Tensor)",
)
def state_op(k, v, mask, initial_kv, initial_key_sum, scale):
    """The public state after all tokens that count, in float32: the memory of a non-causal prefix."""
    k, v = k.contiguous(), v.contiguous()
    (b, t, h, f), v_dim = k.shape, v.shape[-1]
    tile, options = choose_tile(f, v_dim, k.dtype)
    groups, per_group = split(t, tile, triton.cdiv(v_dim, tile.BV) * b * h, k.device)
    mask = None if mask is None else mask.contiguous()
    kv, z = sum_groups(k, v, None, mask, tile, options, groups, per_group, skip=None)
    final = empty_state(b, h, f, v_dim, k)
    scan(kv, z, as_state(initial_kv, initial_key_sum), final, scale, tile, reverse=False)
    return tuple(final)


@state_op.register_fake
def _(k, v, mask, initial_kv, initial_key_sum, scale):
    return tuple(empty_state(k.shape[0], k.shape[2], k.shape[3], v.shape[3], k))


@torch.library.custom_op(
    "zoology::taylor_state_backward",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor? mask, Tensor dkv, Tensor dkey_sum, float scale) -> (Tensor, Tensor)",
)
def state_backward_op(k, v, mask, dkv, dkey_sum, scale):
    k, v = k.contiguous(), v.contiguous()
    (b, t, h, f), v_dim = k.shape, v.shape[-1]
    tile, options = choose_tile(f, v_dim, k.dtype, backward=True)
    groups, per_group = split(t, tile, triton.cdiv(v_dim, tile.BV) * b * h, k.device)
    plan = (scale, tile, options, groups, per_group)
    start = Starts(
        torch.empty(b * h, 1, tile.rows, v_dim, device=k.device, dtype=torch.float32),
        torch.empty(b * h, 1, tile.rows, device=k.device, dtype=torch.float32),
    )
    scan(*start, as_state(dkv, dkey_sum), None, scale, tile, reverse=True)
    mask = None if mask is None else mask.contiguous()
    dk = launch_dx(k, v, None, None, None, mask, start, None, *plan, reverse=True)
    dv = launch_apply(k, None, None, mask, v, None, start, None, *plan, reverse=True)
    return dk, dv


@state_backward_op.register_fake
def _(k, v, mask, dkv, dkey_sum, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))


def _setup_state(ctx, inputs, output):
    k, v, mask, initial_kv, _, scale = inputs
    ctx.save_for_backward(k, v, mask)
    ctx.scale, ctx.initial_dtype = scale, None if initial_kv is None else initial_kv.dtype


def _state_backward(ctx, dkv, dkey_sum):
    k, v, mask = ctx.saved_tensors
    dk, dv = torch.ops.zoology.taylor_state_backward(k, v, mask, dkv, dkey_sum, ctx.scale)
    if ctx.initial_dtype is None:
        return dk, dv, None, None, None, None
    return dk, dv, None, dkv.to(ctx.initial_dtype), dkey_sum.to(ctx.initial_dtype), None


state_op.register_autograd(_state_backward, setup_context=_setup_state)


def launch_step(q, k, v, state, new, scale):
    """Outputs of one token, and the state after it in `new`, which may be `state` itself.

    A program owns one head's state, and each element is read before the thread that read it writes it.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    (b, h, f), v_dim = q.shape, v.shape[-1]
    o = torch.empty_like(v)
    v_padded = triton.next_power_of_2(v_dim)
    tk._step_kernel[(b * h,)](
        q,
        k,
        v,
        *state,
        o,
        *new,
        scale,
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
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial_state: TaylorState | None, output_final_state: bool
) -> tuple[Tensor, TaylorState | None]:
    initial = (None, None) if initial_state is None else initial_state
    o, _, kv, key_sum = torch.ops.zoology.taylor_linear_attention(q, k, v, *initial, scale, output_final_state)
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
