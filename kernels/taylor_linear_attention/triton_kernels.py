"""Taylor linear attention in Triton: chunked, one program per (head, group of chunks), the state on chip.

A program walks over chunks of `C` tokens with the state of its head in registers. Inside a chunk the weights
1 + s + s^2 / 2 are computed from s = q.k; what comes from before is read out of the state. The packed features
are never in device memory: with e1 and e2 one-hot matrices that pick the two factors of each feature,

    phi(x) = (x e1) * (x e2)     (two small matrix products and a product of registers)

gives any set of monomials on the tensor cores, and its transpose (e1^T x^T) * (e2^T x^T) arrives in registers in
the layout of the left operand of the state update phi(k)^T v. The gradient goes back the same way:
dx = (dphi * (x e2)) e1^T + (dphi * (x e1)) e2^T.

Feature c of a kernel is pair c for c < NQ = f (f + 1) / 2, and so comes in groups of f, one per distance, with the f
linear ones as the group after the pairs. For even f the last group of pairs is half empty, and the constant is where
its second half starts; for odd f it comes last. A kernel's state holds bare monomials (0 where there is no feature),
and the factors of `scale` sit on the side of x. States in device memory between
kernels keep this "raw" order, padded to NB blocks of BF features; the public order and factors of
`reference.py` are converted where a state enters or leaves.

When there are too few heads to fill the device, the sequence is cut in groups: `_state_kernel` sums each group,
`_scan_kernel` turns the sums into the state before each group, and the groups then run side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear_recurrence.triton_chunks import operand


# ---------------------------------------------------------------- pieces
@triton.jit
def _kinds(c, F: tl.constexpr):
    """Whether feature c is linear, and whether it is the constant."""
    LINEAR: tl.constexpr = (F // 2 + 1) * F
    CONSTANT: tl.constexpr = F * (F + 1) // 2 + (F % 2) * F
    return (c >= LINEAR) & (c < LINEAR + F), c == CONSTANT


@triton.jit
def _select(
    i_b,
    WHICH: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
):
    """One-hot rows that pick factor WHICH (1 or 2; 3: both, one after the other) of each feature of block i_b.

    Also the same for the factors that are the constant 1, with the one in column 0: [BF, FP], or [2 BF, FP].
    """
    NQ: tl.constexpr = F * (F + 1) // 2
    r = tl.arange(0, 2 * BF if WHICH == 3 else BF)
    c = i_b * BF + r % BF
    i = tl.arange(0, FP)
    linear, constant = _kinds(c, F)
    first = tl.where((c < NQ) | linear, c % F, -1)
    second = tl.where(c < NQ, (c % F + c // F) % F, -1)
    first_one, second_one = constant, linear | constant
    if WHICH == 1:
        index, one = first, first_one
    elif WHICH == 2:
        index, one = second, second_one
    else:
        index, one = tl.where(r < BF, first, second), tl.where(r < BF, first_one, second_one)
    return (index[:, None] == i[None, :]).to(OP), (one[:, None] & (i == 0)[None, :]).to(OP)


@triton.jit
def _weights(i_b, scale, F: tl.constexpr, BF: tl.constexpr):
    """Weight of each monomial in 1 + s + s^2 / 2: [BF], the square of what `_public` multiplies by."""
    NQ: tl.constexpr = F * (F + 1) // 2
    c = i_b * BF + tl.arange(0, BF)
    linear, _ = _kinds(c, F)
    return tl.where(c < F, 0.5 * scale * scale, tl.where(c < NQ, scale * scale, tl.where(linear, scale, 1.0)))


@triton.jit
def _public(i_b, scale, F: tl.constexpr, BF: tl.constexpr):
    """Of each feature of block i_b: its row in the public state, whether it exists, and public over raw."""
    NQ: tl.constexpr = F * (F + 1) // 2
    c = i_b * BF + tl.arange(0, BF)
    linear, constant = _kinds(c, F)
    row = tl.where(c < NQ, 1 + F + c, tl.where(linear, 1 + c % F, 0))
    factor = tl.where(c < F, scale * 0.7071067811865476, tl.where(c < NQ, scale, tl.where(linear, tl.sqrt(scale), 1.0)))
    return row, (c < NQ) | linear | constant, factor


@triton.jit
def _factors(
    x,
    i_b,
    WHICH: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Factor WHICH of the features of block i_b of rows x [C, FP]: [C, BF]; 3: both, side by side."""
    NQ: tl.constexpr = F * (F + 1) // 2
    e, one = _select(i_b, WHICH, F, x.shape[1], BF, OP)
    x12 = tl.dot(x, tl.trans(e), input_precision=PREC)
    if PARTS > 1 or (i_b + 1) * BF > NQ:
        # A product and not a sum of constants, which the compiler would keep in registers all through the loop.
        x12 = tl.dot(tl.full(x.shape, 1.0, OP), tl.trans(one), acc=x12, input_precision=PREC)
    return x12


@triton.jit
def _groups(i_b, F: tl.constexpr, BF: tl.constexpr):
    """Of block i_b as [1, BF / F, F]: the number of each group of F features, and where the constant is."""
    g = i_b * (BF // F) + tl.arange(0, BF // F)[None, :, None]
    return g, (g == F // 2) & (tl.arange(0, F)[None, None, :] == F // 2)


@triton.jit
def _repeat(b_x, scale, i_b, F: tl.constexpr, BF: tl.constexpr):
    """First factor of block i_b, of features in whole groups, times the weights: [C, BF / F, F].

    Feature c has c % F as its first: that is x [C, F] over and over, and takes no product.
    """
    shape: tl.constexpr = (b_x.shape[0], BF // F, F)
    x = b_x.to(tl.float32)
    x1 = tl.broadcast_to((x * (scale * scale))[:, None, :], shape)
    g, constant = _groups(i_b, F, BF)
    if i_b == 0:
        x1 = tl.where(g == 0, 0.5 * x1, x1)
    if (i_b + 1) * BF > F * (F + 1) // 2:
        x1 = tl.where(g == F // 2 + 1, tl.broadcast_to((x * scale)[:, None, :], shape), x1)
        x1 = tl.where(constant, 1.0, x1)
    return x1


@triton.jit
def _second(b_x, i_b, F: tl.constexpr, BF: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr):
    """Second factor of block i_b, of features in whole groups; 0 where it is one: [C, BF / F, F]."""
    e2, _ = _select(i_b, 2, F, F, BF, OP)
    return tl.reshape(tl.dot(b_x, tl.trans(e2), input_precision=PREC), (b_x.shape[0], BF // F, F))


@triton.jit
def _gather(
    p_x,
    m,
    i_b,
    WHICH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
):
    """`_factors`, 1 or 2, out of memory: exact, and in float32 cheaper than products. [C, BF], or [BF, C] TRANSPOSED.

    The rows start at p_x [C]; where m [C] is 0 all factors are 1.
    """
    NQ: tl.constexpr = F * (F + 1) // 2
    c = i_b * BF + tl.arange(0, BF)
    linear, _ = _kinds(c, F)
    if WHICH == 1:
        index, picks = c % F, (c < NQ) | linear
    else:
        index, picks = (c % F + c // F) % F, c < NQ
    if TRANSPOSED:
        x = tl.load(p_x[None, :] + index[:, None], mask=picks[:, None] & (m != 0)[None, :], other=1.0)
    else:
        x = tl.load(p_x[:, None] + index[None, :], mask=picks[None, :] & (m != 0)[:, None], other=1.0)
    return x.to(tl.float32)


@triton.jit
def _scatter(b_a, e, b_dx, OP: tl.constexpr, PREC: tl.constexpr):
    """b_dx + b_a e; a one-hot e has few digits, so that two products of tf32 do what else takes three."""
    if PREC == "tf32x3":
        b_hi = operand(b_a, OP, "tf32")
        b_dx = tl.dot(b_hi, e, acc=b_dx, input_precision="tf32")
        b_dx = tl.dot(b_a - b_hi, e, acc=b_dx, input_precision="tf32")
    else:
        b_dx = tl.dot(operand(b_a, OP, PREC), e, acc=b_dx, input_precision=PREC)
    return b_dx


@triton.jit
def _features_t(
    x_t,
    p_x,
    m,
    i_b,
    EVEN: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Features [BF, C] of columns x_t [FP, C]; m [C] is 0 where a token does not count (its x is 0) and 1 elsewhere."""
    NQ: tl.constexpr = F * (F + 1) // 2
    if GATHER:
        c = i_b * BF + tl.arange(0, BF)
        linear, constant = _kinds(c, F)
        x1 = _gather(p_x, m, i_b, 1, True, F, BF)
        x2 = _gather(p_x, m, i_b, 2, True, F, BF)
        b_p = tl.where(((c < NQ) | linear | constant)[:, None] & (m != 0)[None, :], x1 * x2, 0.0)
    else:
        e, _ = _select(i_b, 3, F, x_t.shape[0], BF, OP)
        x12 = tl.dot(e, x_t, input_precision=PREC)
        x1, x2 = tl.split(tl.permute(tl.reshape(x12, (2, BF, x_t.shape[1])), (1, 2, 0)))
        if PARTS > 1 or (i_b + 1) * BF > NQ:
            c = i_b * BF + tl.arange(0, BF)
            linear, constant = _kinds(c, F)
            x1 += constant.to(tl.float32)[:, None]
            one2 = (linear | constant).to(tl.float32)[:, None]
            x2 += one2 if EVEN else one2 * m[None, :]
        b_p = x1 * x2
    return b_p


@triton.jit
def _load(p, m, EVEN: tl.constexpr):
    """Load, zero outside the mask; EVEN says that the mask is true everywhere, which saves the registers it takes."""
    if EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=m, other=0.0)


@triton.jit
def _store(p, x, m, EVEN: tl.constexpr):
    """Store inside the mask, which is true everywhere if EVEN."""
    if EVEN:
        tl.store(p, x)
    else:
        tl.store(p, x, mask=m)


@triton.jit
def _load_start(
    p_kv,
    p_z,
    i_b,
    o_v,
    HAS_START: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BF: tl.constexpr,
):
    """Block i_b of a raw state, [BF, BV] and [BF]; zeros where there is none."""
    c = i_b * BF + tl.arange(0, BF)
    b_s = tl.zeros([BF, BV], tl.float32)
    b_z = tl.zeros([BF], tl.float32)
    if HAS_START:
        b_s = tl.load(p_kv + c[:, None] * V + o_v[None, :], mask=(o_v < V)[None, :], other=0.0)
        b_z = tl.load(p_z + c)
    return b_s, b_z


@triton.jit
def _spread(b_z):
    """z [BF] in three columns of [BF, 16], of which `_total` is the sum: twice the leading part, and the rest."""
    return tl.where(tl.arange(0, 16)[None, :] < 2, b_z[:, None], 0.0)


@triton.jit
def _columns(b_c, OP: tl.constexpr):
    """What a token weighs in the three columns of z, [C, 16]: twice its leading part, and the rest."""
    i = tl.arange(0, 16)[None, :]
    b_hi = b_c.to(OP).to(tl.float32)
    return tl.where(i < 2, b_hi[:, None], tl.where(i == 2, (b_c - b_hi)[:, None], 0.0)).to(OP)


@triton.jit
def _z_operand(b_z, OP: tl.constexpr):
    """z [BF, 16] as an operand that keeps twice the digits: the sum of its columns is z."""
    i = tl.arange(0, 16)[None, :]
    return tl.where(i == 1, b_z - b_z.to(OP).to(tl.float32), b_z).to(OP)


@triton.jit
def _total(b_z):
    """z [BF] from its columns."""
    i = tl.arange(0, 16)[None, :]
    return tl.sum(tl.where((i == 0) | (i == 2), b_z, 0.0), 1)


@triton.jit
def _absorb(
    x_t,
    p_x,
    b_y,
    b_c,
    b_m,
    b_s,
    b_z,
    i_b,
    WITH_Z: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Add a chunk to block i_b of a raw state: phi(x)^T y and, WITH_Z, phi(x)^T c.

    With COLUMNS, c is [C, 16] from `_columns` and z as in `_spread`; else c is 1 and z a vector.
    """
    b_p = _features_t(x_t, p_x, b_m, i_b, EVEN, F, BF, OP, PREC, PARTS, GATHER)
    b_s = tl.dot(operand(b_p, OP, PREC), b_y, acc=b_s, input_precision=PREC)
    if COLUMNS:
        b_z = tl.dot(operand(b_p, OP, PREC), b_c, acc=b_z, input_precision=PREC)
    elif WITH_Z:
        b_z += tl.sum(b_p, 1)
    return b_s, b_z


@triton.jit
def _store_raw(p_kv, p_z, b_s, b_z, i_b, o_v, is_first, V: tl.constexpr, BF: tl.constexpr):
    """Write block i_b of a raw state."""
    c = i_b * BF + tl.arange(0, BF)
    tl.store(p_kv + c[:, None] * V + o_v[None, :], b_s, mask=(o_v < V)[None, :])
    if is_first:
        tl.store(p_z + c, b_z)


@triton.jit
def _store_public(
    p_kv,
    p_z,
    b_s,
    b_z,
    i_b,
    o_v,
    is_first,
    scale,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
):
    """Write a block of a raw state as rows of a public one."""
    row, exists, factor = _public(i_b, scale, F, BF)
    m = exists[:, None] & (o_v < V)[None, :]
    tl.store(p_kv + row[:, None] * V + o_v[None, :], b_s * factor[:, None], mask=m)
    if is_first:
        tl.store(p_z + row, b_z * factor, mask=exists)


# ---------------------------------------------------------------- state passing
@triton.jit(do_not_specialize=["T", "G", "num_chunks", "first_group", "part"])
def _state_kernel(
    x_ptr,
    y_ptr,
    c_ptr,
    mask_ptr,
    kv_ptr,
    z_ptr,
    T,
    G,
    num_chunks,
    first_group,
    part,
    HAS_C: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EVEN: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    NB: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Raw sums of a group of chunks, phi(x) y^T and phi(x) c; c is 1 without HAS_C."""
    if PARTS == 1:
        i_0: tl.constexpr = 0
    else:
        i_0 = part * NB
    i_v, i_g, i_bh = tl.program_id(0), tl.program_id(1) + first_group, tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    o_f, o_v, o_c = tl.arange(0, FP), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    base = i_b.to(tl.int64) * T
    x_ptr += (base * H + i_h) * F
    y_ptr += (base * H + i_h) * V
    c_ptr += base * H + i_h

    b_s0 = tl.zeros([BF, BV], tl.float32)
    b_z0 = tl.zeros([BF, 16], tl.float32)
    if NB > 1:
        b_s1 = tl.zeros([BF, BV], tl.float32)
        b_z1 = tl.zeros([BF, 16], tl.float32)
        b_s2 = tl.zeros([BF, BV], tl.float32)
        b_z2 = tl.zeros([BF, 16], tl.float32)
    for i_c in range(i_g * num_chunks, tl.minimum((i_g + 1) * num_chunks, tl.cdiv(T, C))):
        o_t = i_c * C + o_c
        m_t = o_t < T
        if HAS_MASK:
            m_t = m_t & (tl.load(mask_ptr + base + o_t, mask=m_t, other=0) != 0)
        b_x = _load(x_ptr + o_t[:, None] * H * F + o_f[None, :], m_t[:, None] & (o_f < F)[None, :], EVEN)
        b_y = _load(y_ptr + o_t[:, None] * H * V + o_v[None, :], m_t[:, None] & (o_v < V)[None, :], EVEN)
        p_x = x_ptr + o_t * H * F
        b_xt = tl.trans(b_x.to(OP))
        b_y = operand(b_y, OP, PREC)
        b_m = m_t.to(tl.float32)
        b_c = _columns(_load(c_ptr + o_t * H, m_t, EVEN) if HAS_C else b_m, OP)
        b_s0, b_z0 = _absorb(
            b_xt, p_x, b_y, b_c, b_m, b_s0, b_z0, i_0, True, True, EVEN, F, BF, OP, PREC, PARTS, GATHER
        )
        if NB > 1:
            b_s1, b_z1 = _absorb(
                b_xt, p_x, b_y, b_c, b_m, b_s1, b_z1, i_0 + 1, True, True, EVEN, F, BF, OP, PREC, PARTS, GATHER
            )
            b_s2, b_z2 = _absorb(
                b_xt, p_x, b_y, b_c, b_m, b_s2, b_z2, i_0 + 2, True, True, EVEN, F, BF, OP, PREC, PARTS, GATHER
            )

    p_s = kv_ptr + (i_bh.to(tl.int64) * G + i_g) * (PARTS * NB * BF) * V
    p_z = z_ptr + (i_bh.to(tl.int64) * G + i_g) * (PARTS * NB * BF)
    _store_raw(p_s, p_z, b_s0, _total(b_z0), i_0, o_v, i_v == 0, V, BF)
    if NB > 1:
        _store_raw(p_s, p_z, b_s1, _total(b_z1), i_0 + 1, o_v, i_v == 0, V, BF)
        _store_raw(p_s, p_z, b_s2, _total(b_z2), i_0 + 2, o_v, i_v == 0, V, BF)


@triton.jit
def _load_group(kv_ptr, z_ptr, i_g, inside, o_r, o_v, V: tl.constexpr, FT: tl.constexpr):
    """Rows o_r of the raw state i_g, zeros unless `inside`."""
    m_r = inside & (o_r < FT)
    b_s = tl.load(
        kv_ptr + (i_g * FT + o_r[:, None]) * V + o_v[None, :], mask=m_r[:, None] & (o_v < V)[None, :], other=0.0
    )
    return b_s, tl.load(z_ptr + i_g * FT + o_r, mask=m_r, other=0.0)


@triton.jit
def _store_group(kv_ptr, z_ptr, b_s, b_z, i_g, inside, o_r, o_v, V: tl.constexpr, FT: tl.constexpr):
    """Write rows o_r of the raw state i_g, if `inside`."""
    m_r = inside & (o_r < FT)
    tl.store(kv_ptr + (i_g * FT + o_r[:, None]) * V + o_v[None, :], b_s, mask=m_r[:, None] & (o_v < V)[None, :])
    tl.store(z_ptr + i_g * FT + o_r, b_z, mask=m_r)


@triton.jit(do_not_specialize=["G", "P"])
def _scan_kernel(
    kv_ptr,
    z_ptr,
    before_kv_ptr,
    before_z_ptr,
    init_kv_ptr,
    init_z_ptr,
    scale,
    G,
    P,
    REVERSE: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    FT: tl.constexpr,
    BR: tl.constexpr,
):
    """In place, sums of G groups -> the raw state before each of them (REVERSE: after it).

    The first one is a public initial state and the raw sums of P groups of a prefix.
    """
    NQ: tl.constexpr = F * (F + 1) // 2
    NF: tl.constexpr = NQ + F + 1
    i_r, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r, o_v = i_r * BR + tl.arange(0, BR), tl.arange(0, VP)
    b_s = tl.zeros([BR, VP], tl.float32)
    b_z = tl.zeros([BR], tl.float32)
    if HAS_INITIAL:
        row, exists, factor = _public(i_r, scale, F, BR)
        p = init_kv_ptr + (i_bh * NF + row[:, None]) * V + o_v[None, :]
        b_s = tl.load(p, mask=exists[:, None] & (o_v < V)[None, :], other=0.0).to(tl.float32) / factor[:, None]
        b_z = tl.load(init_z_ptr + i_bh * NF + row, mask=exists, other=0.0).to(tl.float32) / factor
    # Groups come four at a time, so that memory is waited for once: no load passes an earlier store.
    if HAS_BEFORE:
        for i in range(0, P, 4):
            i_g = i_bh * P + i
            b_s0, b_z0 = _load_group(before_kv_ptr, before_z_ptr, i_g, i < P, o_r, o_v, V, FT)
            b_s1, b_z1 = _load_group(before_kv_ptr, before_z_ptr, i_g + 1, i + 1 < P, o_r, o_v, V, FT)
            b_s2, b_z2 = _load_group(before_kv_ptr, before_z_ptr, i_g + 2, i + 2 < P, o_r, o_v, V, FT)
            b_s3, b_z3 = _load_group(before_kv_ptr, before_z_ptr, i_g + 3, i + 3 < P, o_r, o_v, V, FT)
            b_s += (b_s0 + b_s1) + (b_s2 + b_s3)
            b_z += (b_z0 + b_z1) + (b_z2 + b_z3)
    STEP: tl.constexpr = -1 if REVERSE else 1
    first = i_bh * G + (G - 1 if REVERSE else 0)
    for i in range(0, G - 1, 4):
        i_g = first + i * STEP
        b_s0, b_z0 = _load_group(kv_ptr, z_ptr, i_g, i < G - 1, o_r, o_v, V, FT)
        b_s1, b_z1 = _load_group(kv_ptr, z_ptr, i_g + STEP, i + 1 < G - 1, o_r, o_v, V, FT)
        b_s2, b_z2 = _load_group(kv_ptr, z_ptr, i_g + 2 * STEP, i + 2 < G - 1, o_r, o_v, V, FT)
        b_s3, b_z3 = _load_group(kv_ptr, z_ptr, i_g + 3 * STEP, i + 3 < G - 1, o_r, o_v, V, FT)
        _store_group(kv_ptr, z_ptr, b_s, b_z, i_g, i < G - 1, o_r, o_v, V, FT)
        b_s, b_z = b_s + b_s0, b_z + b_z0
        _store_group(kv_ptr, z_ptr, b_s, b_z, i_g + STEP, i + 1 < G - 1, o_r, o_v, V, FT)
        b_s, b_z = b_s + b_s1, b_z + b_z1
        _store_group(kv_ptr, z_ptr, b_s, b_z, i_g + 2 * STEP, i + 2 < G - 1, o_r, o_v, V, FT)
        b_s, b_z = b_s + b_s2, b_z + b_z2
        _store_group(kv_ptr, z_ptr, b_s, b_z, i_g + 3 * STEP, i + 3 < G - 1, o_r, o_v, V, FT)
        b_s, b_z = b_s + b_s3, b_z + b_z3
    # Nobody summed the last group: its start is what is there now.
    _store_group(kv_ptr, z_ptr, b_s, b_z, first + (G - 1) * STEP, G > 0, o_r, o_v, V, FT)


# ---------------------------------------------------------------- outputs: o, and the gradient of v
@triton.jit
def _read(
    b_x,
    p_x,
    b_m,
    b_s,
    b_z,
    b_o,
    b_n,
    scale,
    i_b,
    NORMALISE: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Add phi(x).S to b_o [C, BV] and phi(x).z to b_n [C], block i_b."""
    PAIRS: tl.constexpr = F * (F + 1) // 2
    if PARTS == 1 and not GATHER and b_x.shape[1] == F and BF % F == 0 and (not NORMALISE or (i_b + 1) * BF <= PAIRS):
        x2 = _second(b_x, i_b, F, BF, OP, PREC)
        if (i_b + 1) * BF > F * (F + 1) // 2:
            g, constant = _groups(i_b, F, BF)
            x2 = tl.where((g == F // 2 + 1) | constant, 1.0, x2)
        b_p = tl.reshape(_repeat(b_x, scale, i_b, F, BF) * x2, (b_x.shape[0], BF))
    else:
        if GATHER:
            x1 = _gather(p_x, b_m, i_b, 1, False, F, BF)
            x2 = _gather(p_x, b_m, i_b, 2, False, F, BF)
        else:
            x12 = _factors(b_x, i_b, 3, F, BF, OP, PREC, PARTS)
            x1, x2 = tl.split(tl.permute(tl.reshape(x12, (b_x.shape[0], 2, BF)), (0, 2, 1)))
        b_p = x1 * x2 * _weights(i_b, scale, F, BF)[None, :]
    if NORMALISE:
        b_n += tl.sum(b_p * b_z[None, :], 1)
    b_o = tl.dot(operand(b_p, OP, PREC), operand(b_s, OP, PREC), acc=b_o, input_precision=PREC)
    return b_o, b_n


@triton.jit(do_not_specialize=["T", "G", "num_chunks", "part"])
def _apply_kernel(
    x_ptr,
    xs_ptr,
    ys_ptr,
    mask_ptr,
    o_ptr,
    norm_ptr,
    before_ptr,
    start_kv_ptr,
    start_z_ptr,
    final_kv_ptr,
    final_z_ptr,
    scale,
    T,
    G,
    num_chunks,
    part,
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    EVEN: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    NB: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """o_i = sum of w_ij y_j over j <= i (REVERSE: j >= i) and over the state at the start, w = 1 + s + s^2 / 2.

    The output has x = q, xs = k, ys = v and NORMALISE; the gradient of v has x = k, xs = q, ys = do / norm and REVERSE.
    Without CAUSAL only the state at the start is read.
    """
    NQ: tl.constexpr = F * (F + 1) // 2
    if PARTS == 1:
        i_0: tl.constexpr = 0
    else:
        i_0 = part * NB
    i_v, i_g, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    o_f, o_v, o_c = tl.arange(0, FP), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    base = i_b.to(tl.int64) * T
    x_ptr += (base * H + i_h) * F
    xs_ptr += (base * H + i_h) * F
    ys_ptr += (base * H + i_h) * V
    o_ptr += (base * H + i_h) * V
    norm_ptr += base * H + i_h
    before_ptr += base * H + i_h
    i_s = i_bh.to(tl.int64) * G + i_g if CAUSAL else i_bh.to(tl.int64)
    start_kv_ptr += i_s * (PARTS * NB * BF) * V
    start_z_ptr += i_s * (PARTS * NB * BF)

    b_s0, b_z0 = _load_start(start_kv_ptr, start_z_ptr, i_0, o_v, HAS_START, V, BV, BF)
    if NB > 1:
        b_s1, b_z1 = _load_start(start_kv_ptr, start_z_ptr, i_0 + 1, o_v, HAS_START, V, BV, BF)
        b_s2, b_z2 = _load_start(start_kv_ptr, start_z_ptr, i_0 + 2, o_v, HAS_START, V, BV, BF)
    first = i_g * num_chunks
    last = tl.minimum(first + num_chunks, tl.cdiv(T, C))
    for i_c in range(first, last):
        o_t = (first + last - 1 - i_c if REVERSE else i_c) * C + o_c
        m_t = o_t < T
        m_f = m_t[:, None] & (o_f < F)[None, :]
        m_v = m_t[:, None] & (o_v < V)[None, :]
        b_x = _load(x_ptr + o_t[:, None] * H * F + o_f[None, :], m_f, EVEN).to(OP)
        b_m = m_t.to(tl.float32)
        p_x, p_xs = x_ptr + o_t * H * F, xs_ptr + o_t * H * F
        b_n = tl.zeros([C], tl.float32)
        b_o = tl.zeros([C, BV], tl.float32)
        if CAUSAL:
            b_xs = _load(xs_ptr + o_t[:, None] * H * F + o_f[None, :], m_f, EVEN).to(OP)
            b_ys = operand(_load(ys_ptr + o_t[:, None] * H * V + o_v[None, :], m_v, EVEN), OP, PREC)
            b_xst = tl.trans(b_xs)
        if CAUSAL and INSIDE:
            b_w = tl.dot(b_x, b_xst, input_precision=PREC) * scale
            m_c = o_t[:, None] <= o_t[None, :] if REVERSE else o_t[:, None] >= o_t[None, :]
            b_w = tl.where(m_c, 1.0 + b_w * (1.0 + 0.5 * b_w), 0.0)
            if NORMALISE:
                b_n = tl.sum(b_w, 1)
            b_o = tl.dot(operand(b_w, OP, PREC), b_ys, acc=b_o, input_precision=PREC)

        b_o, b_n = _read(b_x, p_x, b_m, b_s0, b_z0, b_o, b_n, scale, i_0, NORMALISE, F, BF, OP, PREC, PARTS, GATHER)
        if CAUSAL:
            b_s0, b_z0 = _absorb(
                b_xst, p_xs, b_ys, b_m, b_m, b_s0, b_z0, i_0, NORMALISE, False, EVEN, F, BF, OP, PREC, PARTS, GATHER
            )
        if NB > 1:
            b_o, b_n = _read(
                b_x, p_x, b_m, b_s1, b_z1, b_o, b_n, scale, i_0 + 1, NORMALISE, F, BF, OP, PREC, PARTS, GATHER
            )
            if CAUSAL:
                b_s1, b_z1 = _absorb(
                    b_xst,
                    p_xs,
                    b_ys,
                    b_m,
                    b_m,
                    b_s1,
                    b_z1,
                    i_0 + 1,
                    NORMALISE,
                    False,
                    EVEN,
                    F,
                    BF,
                    OP,
                    PREC,
                    PARTS,
                    GATHER,
                )
            b_o, b_n = _read(
                b_x, p_x, b_m, b_s2, b_z2, b_o, b_n, scale, i_0 + 2, NORMALISE, F, BF, OP, PREC, PARTS, GATHER
            )
            if CAUSAL:
                b_s2, b_z2 = _absorb(
                    b_xst,
                    p_xs,
                    b_ys,
                    b_m,
                    b_m,
                    b_s2,
                    b_z2,
                    i_0 + 2,
                    NORMALISE,
                    False,
                    EVEN,
                    F,
                    BF,
                    OP,
                    PREC,
                    PARTS,
                    GATHER,
                )

        p_o = o_ptr + o_t[:, None] * H * V + o_v[None, :]
        if not INSIDE:
            b_o += _load(p_o, m_v, EVEN)
        if NORMALISE:
            if not INSIDE:
                b_n += _load(before_ptr + o_t * H, m_t, EVEN)
            b_r = 1.0 / b_n
            b_o *= (b_r if PARTS == 1 else tl.where(part == PARTS - 1, b_r, 1.0))[:, None]
            _store(norm_ptr + o_t * H, b_n, m_t, EVEN)  # the same from every tile of V
        if HAS_MASK:
            b_counts = tl.load(mask_ptr + base + o_t, mask=m_t, other=0) != 0
            b_o = tl.where(b_counts[:, None], b_o, 0.0)
        _store(p_o, b_o.to(o_ptr.dtype.element_ty), m_v, EVEN)

    if HAS_FINAL:  # noqa: SIM102  known when compiling, the inner one only when running
        if i_g == (0 if REVERSE else G - 1):
            p_kv = final_kv_ptr + i_bh.to(tl.int64) * (NQ + F + 1) * V
            p_z = final_z_ptr + i_bh.to(tl.int64) * (NQ + F + 1)
            _store_public(p_kv, p_z, b_s0, b_z0, i_0, o_v, i_v == 0, scale, F, V, BF)
            if NB > 1:
                _store_public(p_kv, p_z, b_s1, b_z1, i_0 + 1, o_v, i_v == 0, scale, F, V, BF)
                _store_public(p_kv, p_z, b_s2, b_z2, i_0 + 2, o_v, i_v == 0, scale, F, V, BF)


# ---------------------------------------------------------------- gradients of q and k
@triton.jit(do_not_specialize=["N"])
def _normaliser_kernel(
    o_ptr, do_ptr, norm_ptr, dn_ptr, delta_ptr, N, V: tl.constexpr, VP: tl.constexpr, BR: tl.constexpr
):
    """Gradients of numerator and normaliser per row: do / norm, and -(do . o) / norm."""
    o_r, o_v = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, VP)
    m = (o_r < N)[:, None] & (o_v < V)[None, :]
    b_o = tl.load(o_ptr + o_r[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    b_do = tl.load(do_ptr + o_r[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    b_r = 1.0 / tl.load(norm_ptr + o_r, mask=o_r < N, other=1.0)
    tl.store(dn_ptr + o_r[:, None] * V + o_v[None, :], (b_do * b_r[:, None]).to(dn_ptr.dtype.element_ty), mask=m)
    tl.store(delta_ptr + o_r, -tl.sum(b_o * b_do, 1) * b_r, mask=o_r < N)


@triton.jit
def _pull_back(
    b_x,
    p_x,
    b_m,
    b_y,
    b_c,
    b_s,
    b_z,
    b_dx,
    scale,
    i_b,
    F: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Add to b_dx [C, FP] the gradient of x behind the features of block i_b, dphi(x) = S y + z c, c [C, 16]."""
    e2, _ = _select(i_b, 2, F, b_x.shape[1], BF, OP)
    if PARTS == 1 and not GATHER and b_x.shape[1] == F and BF % F == 0:
        b_g = tl.dot(b_y, tl.trans(operand(b_s, OP, PREC)), input_precision=PREC)
        b_g = tl.dot(b_c, tl.trans(_z_operand(b_z, OP)), acc=b_g, input_precision=PREC)
        b_g = tl.reshape(b_g, (b_x.shape[0], BF // F, F))
        b_1 = b_g * _second(b_x, i_b, F, BF, OP, PREC)
        g, _ = _groups(i_b, F, BF)
        if i_b == 0:
            b_1 = tl.where(g == 0, 0.5 * b_1, b_1)
        if (i_b + 1) * BF > F * (F + 1) // 2:
            b_1 = tl.where(g == F // 2 + 1, b_g / scale, b_1)
        b_dx += tl.sum(b_1, 1) * (scale * scale)
        b_g = tl.reshape(b_g * _repeat(b_x, scale, i_b, F, BF), (b_x.shape[0], BF))
        b_dx += tl.dot(operand(b_g, OP, PREC), e2, input_precision=PREC)
    else:
        # One factor after the other: both at once would not fit in the registers.
        b_w = _weights(i_b, scale, F, BF)
        e1, _ = _select(i_b, 1, F, b_x.shape[1], BF, OP)
        b_g = tl.dot(b_y, tl.trans(operand(b_s * b_w[:, None], OP, PREC)), input_precision=PREC)
        b_g = tl.dot(b_c, tl.trans(_z_operand(b_z * b_w[:, None], OP)), acc=b_g, input_precision=PREC)
        if GATHER:
            b_dx = _scatter(b_g * _gather(p_x, b_m, i_b, 2, False, F, BF), e1, b_dx, OP, PREC)
            b_dx = _scatter(b_g * _gather(p_x, b_m, i_b, 1, False, F, BF), e2, b_dx, OP, PREC)
        else:
            x2 = _factors(b_x, i_b, 2, F, BF, OP, PREC, PARTS)
            b_dx = _scatter(b_g * x2, e1, b_dx, OP, PREC)
            x1 = tl.dot(b_x, tl.trans(e1), input_precision=PREC)  # where it is 1, e2 picks nothing
            b_dx = _scatter(b_g * x1, e2, b_dx, OP, PREC)
    return b_dx


@triton.jit(do_not_specialize=["T", "G", "num_chunks", "part", "num_rows"])
def _dx_kernel(
    x_ptr,
    y_ptr,
    c_ptr,
    xs_ptr,
    ys_ptr,
    mask_ptr,
    dx_ptr,
    start_kv_ptr,
    start_z_ptr,
    final_kv_ptr,
    final_z_ptr,
    scale,
    T,
    G,
    num_chunks,
    part,
    num_rows,
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    EVEN: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    NB: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Gradient of x_i through w_ij (y_i.y_j + c_i c_j) over j <= i (REVERSE: j >= i) and the state at the start.

    For q: x = q, y = do / norm, c = delta, xs = k, ys = v, cs = 1. For k, with REVERSE, the two sides change places.
    One part per tile of V; c counts in the first. Without CAUSAL only the state at the start is read.
    """
    NQ: tl.constexpr = F * (F + 1) // 2
    if PARTS == 1:
        i_0: tl.constexpr = 0
    else:
        i_0 = part * NB
    i_v, i_g, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    o_f, o_v, o_c = tl.arange(0, FP), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    base = i_b.to(tl.int64) * T
    x_ptr += (base * H + i_h) * F
    y_ptr += (base * H + i_h) * V
    xs_ptr += (base * H + i_h) * F
    ys_ptr += (base * H + i_h) * V
    c_ptr += base * H + i_h
    dx_ptr += (base * H + i_h) * F + i_v * num_rows.to(tl.int64) * F
    i_s = i_bh.to(tl.int64) * G + i_g if CAUSAL else i_bh.to(tl.int64)
    start_kv_ptr += i_s * (PARTS * NB * BF) * V
    start_z_ptr += i_s * (PARTS * NB * BF)

    b_s0, b_z0 = _load_start(start_kv_ptr, start_z_ptr, i_0, o_v, HAS_START, V, BV, BF)
    b_z0 = _spread(b_z0)
    if NB > 1:
        b_s1, b_z1 = _load_start(start_kv_ptr, start_z_ptr, i_0 + 1, o_v, HAS_START, V, BV, BF)
        b_z1 = _spread(b_z1)
        b_s2, b_z2 = _load_start(start_kv_ptr, start_z_ptr, i_0 + 2, o_v, HAS_START, V, BV, BF)
        b_z2 = _spread(b_z2)
    first = i_g * num_chunks
    last = tl.minimum(first + num_chunks, tl.cdiv(T, C))
    for i_c in range(first, last):
        o_t = (first + last - 1 - i_c if REVERSE else i_c) * C + o_c
        m_t = o_t < T
        m_f = m_t[:, None] & (o_f < F)[None, :]
        m_v = m_t[:, None] & (o_v < V)[None, :]
        b_x = _load(x_ptr + o_t[:, None] * H * F + o_f[None, :], m_f, EVEN).to(OP)
        b_y = operand(_load(y_ptr + o_t[:, None] * H * V + o_v[None, :], m_v, EVEN), OP, PREC)
        b_m = m_t.to(tl.float32)
        p_x, p_xs = x_ptr + o_t * H * F, xs_ptr + o_t * H * F
        if CAUSAL:
            b_xs = _load(xs_ptr + o_t[:, None] * H * F + o_f[None, :], m_f, EVEN).to(OP)
            b_ys = operand(_load(ys_ptr + o_t[:, None] * H * V + o_v[None, :], m_v, EVEN), OP, PREC)
            b_d = _load(c_ptr + o_t * H, m_t, EVEN)
            b_c = b_m if REVERSE else b_d
            b_cs = b_d if REVERSE else b_m
        else:
            b_c = b_m
        b_c = tl.where(i_v == 0, b_c, 0.0)
        b_r = tl.where(tl.arange(0, 16)[None, :] < 3, b_c[:, None], 0.0).to(OP)
        b_dx = tl.zeros([C, FP], tl.float32)
        if CAUSAL:
            b_xst = tl.trans(b_xs)
        if CAUSAL and INSIDE:
            b_ds = tl.dot(b_x, b_xst, input_precision=PREC) * scale
            b_g = tl.dot(b_y, tl.trans(b_ys), input_precision=PREC) + b_c[:, None] * b_cs[None, :]
            m_c = o_t[:, None] <= o_t[None, :] if REVERSE else o_t[:, None] >= o_t[None, :]
            b_ds = tl.where(m_c, (1.0 + b_ds) * b_g * scale, 0.0)
            b_dx = tl.dot(operand(b_ds, OP, PREC), b_xs, acc=b_dx, input_precision=PREC)
        if CAUSAL:
            b_cs = _columns(b_cs, OP)

        b_dx = _pull_back(b_x, p_x, b_m, b_y, b_r, b_s0, b_z0, b_dx, scale, i_0, F, BF, OP, PREC, PARTS, GATHER)
        if CAUSAL:
            b_s0, b_z0 = _absorb(
                b_xst, p_xs, b_ys, b_cs, b_m, b_s0, b_z0, i_0, True, True, EVEN, F, BF, OP, PREC, PARTS, GATHER
            )
        if NB > 1:
            b_dx = _pull_back(b_x, p_x, b_m, b_y, b_r, b_s1, b_z1, b_dx, scale, i_0 + 1, F, BF, OP, PREC, PARTS, GATHER)
            if CAUSAL:
                b_s1, b_z1 = _absorb(
                    b_xst, p_xs, b_ys, b_cs, b_m, b_s1, b_z1, i_0 + 1, True, True, EVEN, F, BF, OP, PREC, PARTS, GATHER
                )
            b_dx = _pull_back(b_x, p_x, b_m, b_y, b_r, b_s2, b_z2, b_dx, scale, i_0 + 2, F, BF, OP, PREC, PARTS, GATHER)
            if CAUSAL:
                b_s2, b_z2 = _absorb(
                    b_xst, p_xs, b_ys, b_cs, b_m, b_s2, b_z2, i_0 + 2, True, True, EVEN, F, BF, OP, PREC, PARTS, GATHER
                )
        if HAS_MASK:
            b_counts = tl.load(mask_ptr + base + o_t, mask=m_t, other=0) != 0
            b_dx = tl.where(b_counts[:, None], b_dx, 0.0)
        p_dx = dx_ptr + o_t[:, None] * H * F + o_f[None, :]
        if not INSIDE:
            b_dx += _load(p_dx, m_f, EVEN)
        _store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), m_f, EVEN)

    if HAS_FINAL:  # noqa: SIM102  known when compiling, the inner one only when running
        if i_g == (0 if REVERSE else G - 1):
            p_kv = final_kv_ptr + i_bh.to(tl.int64) * (NQ + F + 1) * V
            p_z = final_z_ptr + i_bh.to(tl.int64) * (NQ + F + 1)
            _store_public(p_kv, p_z, b_s0, _total(b_z0), i_0, o_v, i_v == 0, scale, F, V, BF)
            if NB > 1:
                _store_public(p_kv, p_z, b_s1, _total(b_z1), i_0 + 1, o_v, i_v == 0, scale, F, V, BF)
                _store_public(p_kv, p_z, b_s2, _total(b_z2), i_0 + 2, o_v, i_v == 0, scale, F, V, BF)


# ---------------------------------------------------------------- decode step
@triton.jit
def _load_rows(kv_ptr, z_ptr, i_bh, i_r: tl.constexpr, o_v, NF: tl.constexpr, V: tl.constexpr, BR: tl.constexpr):
    """Rows i_r BR .. of one head's state, [BR, VP] and [BR], in their own dtype."""
    r = i_r * BR + tl.arange(0, BR)
    m_s = (r < NF)[:, None] & (o_v < V)[None, :]
    b_s = tl.load(kv_ptr + (i_bh * NF + r[:, None]) * V + o_v[None, :], mask=m_s, other=0.0)
    return b_s, tl.load(z_ptr + i_bh * NF + r, mask=r < NF, other=0.0)


@triton.jit
def _step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_ptr,
    z_ptr,
    o_ptr,
    new_kv_ptr,
    new_z_ptr,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    H: tl.constexpr,
    F: tl.constexpr,
    NF: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    BR: tl.constexpr,
):
    """One token of one head: S += phi(k) v^T, z += phi(k), o = phi(q).S / phi(q).z; the state moves once each way."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    p_q, p_k = q_ptr + i_b * q_row + i_h * q_head, k_ptr + i_b * k_row + i_h * k_head
    o_v = tl.arange(0, VP)
    m_v = o_v < V
    NUM: tl.constexpr = (NF + BR - 1) // BR
    b_s_next, b_z_next = _load_rows(kv_ptr, z_ptr, i_bh, 0, o_v, NF, V, BR)
    b_v = tl.load(v_ptr + i_b * v_row + i_h * v_head + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_o = tl.zeros([VP], tl.float32)
    b_n = tl.zeros([BR], tl.float32)
    root = tl.sqrt(scale)
    for i_r in tl.static_range(0, NUM):
        b_s, b_z = b_s_next, b_z_next
        if i_r + 1 < NUM:
            # Asked for before the rows in hand are written, behind which the compiler could not move it.
            b_s_next, b_z_next = _load_rows(kv_ptr, z_ptr, i_bh, i_r + 1, o_v, NF, V, BR)
        r = i_r * BR + tl.arange(0, BR)
        p = r - 1 - F
        first = tl.where(p >= 0, p % F, r - 1)
        second = (p % F + p // F) % F
        m_1, m_2 = (r >= 1) & (r < NF), (p >= 0) & (r < NF)
        factor = tl.where(m_2, tl.where(p < F, scale * 0.7071067811865476, scale), tl.where(m_1, root, 1.0))
        b_pq = tl.load(p_q + first, mask=m_1, other=1.0).to(tl.float32)
        b_pq *= tl.load(p_q + second, mask=m_2, other=1.0).to(tl.float32) * factor
        b_pk = tl.load(p_k + first, mask=m_1, other=1.0).to(tl.float32)
        b_pk *= tl.load(p_k + second, mask=m_2, other=1.0).to(tl.float32) * factor
        b_pq = tl.where(r < NF, b_pq, 0.0)
        b_s = b_s.to(tl.float32) + b_pk[:, None] * b_v[None, :]
        b_z = b_z.to(tl.float32) + b_pk
        b_o += tl.sum(b_pq[:, None] * b_s, 0)
        b_n += b_pq * b_z
        o_s = (i_bh * NF + r[:, None]) * V + o_v[None, :]
        tl.store(new_kv_ptr + o_s, b_s.to(new_kv_ptr.dtype.element_ty), mask=(r < NF)[:, None] & m_v[None, :])
        tl.store(new_z_ptr + i_bh * NF + r, b_z.to(new_z_ptr.dtype.element_ty), mask=r < NF)
    b_o = b_o / tl.sum(b_n, 0)
    tl.store(o_ptr + i_bh * V + o_v, b_o.to(o_ptr.dtype.element_ty), mask=m_v)
