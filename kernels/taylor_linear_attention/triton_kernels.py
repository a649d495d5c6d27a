"""Taylor linear attention in Triton: chunked, one program per (head, group of chunks), the state on chip.

A program walks over chunks of `C` tokens with the state of its head in registers. Inside a chunk the weights
1 + s + s^2 / 2 are computed from s = q.k; what comes from before is read out of the state. The packed features
are never in device memory: with e1 and e2 one-hot matrices that pick the two factors of each feature,

    phi(x) = (x e1) * (x e2)     (two small matrix products and a product of registers)

gives any set of monomials on the tensor cores, and its transpose (e1^T x^T) * (e2^T x^T) arrives in registers in
the layout of the left operand of the state update phi(k)^T v. The gradient goes back the same way:
dx = (dphi * (x e2)) e1^T + (dphi * (x e1)) e2^T.

Feature c of a kernel is pair c for c < NQ = f (f + 1) / 2, then the f linear ones, then the constant; a kernel's
state holds bare monomials, and the factors of `scale` sit on the side of q. States in device memory between
kernels keep this "raw" order, padded to NB blocks of BF features; the public order and factors of
`reference.py` are converted where a state enters or leaves.

When there are too few heads to fill the device, the sequence is cut in groups: `_state_kernel` sums each group,
`_scan_kernel` turns the sums into the state before each group, and the groups then run side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl


# ---------------------------------------------------------------- pieces
@triton.jit
def _select(i_b: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, NQ: tl.constexpr, BF: tl.constexpr, OP: tl.constexpr):
    """One-hot rows [BF, FP] of the two factors of each feature of block i_b, and where a factor is the constant 1."""
    c = i_b * BF + tl.arange(0, BF)
    i = tl.arange(0, FP)
    first = tl.where(c < NQ, c % F, tl.where(c < NQ + F, c - NQ, -1))
    second = tl.where(c < NQ, (c % F + c // F) % F, -1)
    # By way of float32: Triton's interpreter takes a bool for the bits of a bfloat16.
    e1 = (first[:, None] == i[None, :]).to(tl.float32).to(OP)
    e2 = (second[:, None] == i[None, :]).to(tl.float32).to(OP)
    one1 = (c == NQ + F).to(tl.float32)
    one2 = ((c >= NQ) & (c <= NQ + F)).to(tl.float32)
    return e1, e2, one1, one2


@triton.jit
def _weights(i_b: tl.constexpr, scale, F: tl.constexpr, NQ: tl.constexpr, BF: tl.constexpr):
    """Weight of each monomial in 1 + s + s^2 / 2: [BF]."""
    c = i_b * BF + tl.arange(0, BF)
    return tl.where(c < F, 0.5 * scale * scale, tl.where(c < NQ, scale * scale, tl.where(c < NQ + F, scale, 1.0)))


@triton.jit
def _public(i_b, scale, F: tl.constexpr, NQ: tl.constexpr, BF: tl.constexpr):
    """Of each feature of block i_b: its row in the public state, whether it exists, and public over raw."""
    c = i_b * BF + tl.arange(0, BF)
    row = tl.where(c < NQ, 1 + F + c, tl.where(c < NQ + F, 1 + c - NQ, 0))
    factor = tl.where(
        c < F, scale * 0.7071067811865476, tl.where(c < NQ, scale, tl.where(c < NQ + F, tl.sqrt(scale), 1.0))
    )
    return row, c <= NQ + F, factor


@triton.jit
def _factors(
    x,
    i_b: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    NQ: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """The two factors [C, BF] of the features of block i_b of rows x [C, FP], and the one-hots [BF, FP]."""
    e1, e2, one1, one2 = _select(i_b, F, FP, NQ, BF, OP)
    x1 = tl.dot(x, tl.trans(e1), input_precision=PREC)
    x2 = tl.dot(x, tl.trans(e2), input_precision=PREC)
    if (i_b + 1) * BF > NQ:
        x1 += one1[None, :]
        x2 += one2[None, :]
    return x1, x2, e1, e2


@triton.jit
def _features_t(
    x_t,
    m,
    i_b: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    NQ: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """Features [BF, C] of columns x_t [FP, C]; m [C] is 0 where a token does not count (its x is 0) and 1 elsewhere."""
    e1, e2, one1, one2 = _select(i_b, F, FP, NQ, BF, OP)
    x1 = tl.dot(e1, x_t, input_precision=PREC)
    x2 = tl.dot(e2, x_t, input_precision=PREC)
    if (i_b + 1) * BF > NQ:
        x1 += one1[:, None]
        x2 += one2[:, None] * m[None, :]
    return x1 * x2


@triton.jit
def _load_start(
    p_kv,
    p_z,
    i_b: tl.constexpr,
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
def _store_public(
    p_kv,
    p_z,
    b_s,
    b_z,
    i_b: tl.constexpr,
    o_v,
    is_first,
    scale,
    INVERSE: tl.constexpr,
    F: tl.constexpr,
    NQ: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
):
    """Write a block of a raw state as public rows (INVERSE: of a gradient with respect to a raw state)."""
    row, exists, factor = _public(i_b, scale, F, NQ, BF)
    if INVERSE:
        factor = 1.0 / factor
    m = exists[:, None] & (o_v < V)[None, :]
    tl.store(p_kv + row[:, None] * V + o_v[None, :], b_s * factor[:, None], mask=m)
    if is_first:
        tl.store(p_z + row, b_z * factor, mask=exists)


# ---------------------------------------------------------------- state passing
@triton.jit
def _state_kernel(
    x_ptr,
    y_ptr,
    norm_ptr,
    delta_ptr,
    mask_ptr,
    kv_ptr,
    z_ptr,
    scale,
    T,
    H,
    G,
    num_chunks,
    first_group,
    ADJOINT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    NB: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """Sums of a group, raw: phi(k) v^T and phi(k); ADJOINT: weighted phi(q) (do / norm)^T and phi(q) delta."""
    NQ: tl.constexpr = F * (F + 1) // 2
    i_v, i_g, i_bh = tl.program_id(0), tl.program_id(1) + first_group, tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    o_f, o_v, o_c = tl.arange(0, FP), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    base = i_b.to(tl.int64) * T
    x_ptr += (base * H + i_h) * F
    y_ptr += (base * H + i_h) * V
    norm_ptr += base * H + i_h
    delta_ptr += base * H + i_h

    b_s0 = tl.zeros([BF, BV], tl.float32)
    b_z0 = tl.zeros([BF], tl.float32)
    if NB > 1:
        b_s1 = tl.zeros([BF, BV], tl.float32)
        b_z1 = tl.zeros([BF], tl.float32)
        b_s2 = tl.zeros([BF, BV], tl.float32)
        b_z2 = tl.zeros([BF], tl.float32)
    for i_c in range(i_g * num_chunks, tl.minimum((i_g + 1) * num_chunks, tl.cdiv(T, C))):
        o_t = i_c * C + o_c
        m_t = o_t < T
        if HAS_MASK:
            m_t = m_t & (tl.load(mask_ptr + base + o_t, mask=m_t, other=0) != 0)
        b_x = tl.load(x_ptr + o_t[:, None] * H * F + o_f[None, :], mask=m_t[:, None] & (o_f < F)[None, :], other=0.0)
        b_y = tl.load(y_ptr + o_t[:, None] * H * V + o_v[None, :], mask=m_t[:, None] & (o_v < V)[None, :], other=0.0)
        b_xt = tl.trans(b_x.to(OP))
        b_m = m_t.to(tl.float32)
        if ADJOINT:
            b_n = tl.load(norm_ptr + o_t * H, mask=m_t, other=1.0)
            b_d = tl.where(i_v == 0, tl.load(delta_ptr + o_t * H, mask=m_t, other=0.0), 0.0)
            b_y = b_y.to(tl.float32) / b_n[:, None]
        b_y = b_y.to(OP)
        b_p = _features_t(b_xt, b_m, 0, F, FP, NQ, BF, OP, PREC)
        b_s0 = tl.dot(b_p.to(OP), b_y, acc=b_s0, input_precision=PREC)
        b_z0 += tl.sum(b_p * b_d[None, :] if ADJOINT else b_p, 1)
        if NB > 1:
            b_p = _features_t(b_xt, b_m, 1, F, FP, NQ, BF, OP, PREC)
            b_s1 = tl.dot(b_p.to(OP), b_y, acc=b_s1, input_precision=PREC)
            b_z1 += tl.sum(b_p * b_d[None, :] if ADJOINT else b_p, 1)
            b_p = _features_t(b_xt, b_m, 2, F, FP, NQ, BF, OP, PREC)
            b_s2 = tl.dot(b_p.to(OP), b_y, acc=b_s2, input_precision=PREC)
            b_z2 += tl.sum(b_p * b_d[None, :] if ADJOINT else b_p, 1)

    p_kv = kv_ptr + (i_bh.to(tl.int64) * G + i_g) * (NB * BF) * V
    p_z = z_ptr + (i_bh.to(tl.int64) * G + i_g) * (NB * BF)
    c = tl.arange(0, BF)
    m_s = (c >= 0)[:, None] & (o_v < V)[None, :]
    p_s = p_kv + c[:, None] * V + o_v[None, :]
    w = _weights(0, scale, F, NQ, BF) if ADJOINT else tl.full([BF], 1.0, tl.float32)
    tl.store(p_s, b_s0 * w[:, None], mask=m_s)
    if i_v == 0:
        tl.store(p_z + c, b_z0 * w)
    if NB > 1:
        w = _weights(1, scale, F, NQ, BF) if ADJOINT else tl.full([BF], 1.0, tl.float32)
        tl.store(p_s + BF * V, b_s1 * w[:, None], mask=m_s)
        if i_v == 0:
            tl.store(p_z + BF + c, b_z1 * w)
        w = _weights(2, scale, F, NQ, BF) if ADJOINT else tl.full([BF], 1.0, tl.float32)
        tl.store(p_s + 2 * BF * V, b_s2 * w[:, None], mask=m_s)
        if i_v == 0:
            tl.store(p_z + 2 * BF + c, b_z2 * w)


@triton.jit
def _scan_kernel(
    kv_ptr,
    z_ptr,
    init_kv_ptr,
    init_z_ptr,
    final_kv_ptr,
    final_z_ptr,
    scale,
    G,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    FT: tl.constexpr,
    BR: tl.constexpr,
):
    """In place, group sums -> the raw state before each group (REVERSE: after), from a public initial state.

    REVERSE works on gradients, whose public factors are the inverse. HAS_FINAL also writes the public total.
    """
    NQ: tl.constexpr = F * (F + 1) // 2
    i_r, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r, o_v = i_r * BR + tl.arange(0, BR), tl.arange(0, VP)
    row, exists, factor = _public(i_r, scale, F, NQ, BR)
    if REVERSE:
        factor = 1.0 / factor
    m_s = exists[:, None] & (o_v < V)[None, :]
    b_s = tl.zeros([BR, VP], tl.float32)
    b_z = tl.zeros([BR], tl.float32)
    NF: tl.constexpr = NQ + F + 1
    if HAS_INITIAL:
        p = init_kv_ptr + (i_bh * NF + row[:, None]) * V + o_v[None, :]
        b_s = tl.load(p, mask=m_s, other=0.0).to(tl.float32) / factor[:, None]
        b_z = tl.load(init_z_ptr + i_bh * NF + row, mask=exists, other=0.0).to(tl.float32) / factor
    m_w = (o_v < V)[None, :]
    # The sum of the last group serves only the total, and is not there without one.
    for i in range(0, G if HAS_FINAL else G - 1):
        i_g = i_bh * G + (G - 1 - i if REVERSE else i)
        p_s = kv_ptr + (i_g * FT + o_r[:, None]) * V + o_v[None, :]
        p_z = z_ptr + i_g * FT + o_r
        b_ds = tl.load(p_s, mask=m_w, other=0.0)
        b_dz = tl.load(p_z)
        tl.store(p_s, b_s, mask=m_w)
        tl.store(p_z, b_z)
        b_s += b_ds
        b_z += b_dz
    if not HAS_FINAL:
        i_g = i_bh * G + (0 if REVERSE else G - 1)
        tl.store(kv_ptr + (i_g * FT + o_r[:, None]) * V + o_v[None, :], b_s, mask=m_w)
        tl.store(z_ptr + i_g * FT + o_r, b_z)
    if HAS_FINAL:
        p = final_kv_ptr + (i_bh * NF + row[:, None]) * V + o_v[None, :]
        tl.store(p, b_s * factor[:, None], mask=m_s)
        tl.store(final_z_ptr + i_bh * NF + row, b_z * factor, mask=exists)


# ---------------------------------------------------------------- forward
@triton.jit
def _read(
    b_q,
    b_s,
    b_z,
    b_o,
    b_n,
    scale,
    i_b: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    NQ: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    x1, x2, _, _ = _factors(b_q, i_b, F, FP, NQ, BF, OP, PREC)
    b_p = x1 * x2 * _weights(i_b, scale, F, NQ, BF)[None, :]
    b_o = tl.dot(b_p.to(OP), b_s.to(OP), acc=b_o, input_precision=PREC)
    b_n += tl.sum(b_p * b_z[None, :], 1)
    return b_o, b_n


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    norm_ptr,
    start_kv_ptr,
    start_z_ptr,
    final_kv_ptr,
    final_z_ptr,
    scale,
    T,
    H,
    G,
    num_chunks,
    HAS_START: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    NB: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """o = (phi(q).S + w v) / (phi(q).z + sum w) over the chunks of one group, w = tril(1 + s + s^2 / 2)."""
    NQ: tl.constexpr = F * (F + 1) // 2
    i_v, i_g, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    o_f, o_v, o_c = tl.arange(0, FP), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    base = i_b.to(tl.int64) * T
    q_ptr += (base * H + i_h) * F
    k_ptr += (base * H + i_h) * F
    v_ptr += (base * H + i_h) * V
    o_ptr += (base * H + i_h) * V
    norm_ptr += base * H + i_h
    start_kv_ptr += (i_bh.to(tl.int64) * G + i_g) * (NB * BF) * V
    start_z_ptr += (i_bh.to(tl.int64) * G + i_g) * (NB * BF)

    b_s0, b_z0 = _load_start(start_kv_ptr, start_z_ptr, 0, o_v, HAS_START, V, BV, BF)
    if NB > 1:
        b_s1, b_z1 = _load_start(start_kv_ptr, start_z_ptr, 1, o_v, HAS_START, V, BV, BF)
        b_s2, b_z2 = _load_start(start_kv_ptr, start_z_ptr, 2, o_v, HAS_START, V, BV, BF)
    for i_c in range(i_g * num_chunks, tl.minimum((i_g + 1) * num_chunks, tl.cdiv(T, C))):
        o_t = i_c * C + o_c
        m_t = o_t < T
        m_f = m_t[:, None] & (o_f < F)[None, :]
        m_v = m_t[:, None] & (o_v < V)[None, :]
        b_q = tl.load(q_ptr + o_t[:, None] * H * F + o_f[None, :], mask=m_f, other=0.0).to(OP)
        b_k = tl.load(k_ptr + o_t[:, None] * H * F + o_f[None, :], mask=m_f, other=0.0).to(OP)
        b_v = tl.load(v_ptr + o_t[:, None] * H * V + o_v[None, :], mask=m_v, other=0.0).to(OP)
        b_kt = tl.trans(b_k)
        b_m = m_t.to(tl.float32)

        b_w = tl.dot(b_q, b_kt, input_precision=PREC) * scale
        b_w = tl.where(o_c[:, None] >= o_c[None, :], 1.0 + b_w * (1.0 + 0.5 * b_w), 0.0)
        b_n = tl.sum(b_w, 1)
        b_o = tl.dot(b_w.to(OP), b_v, input_precision=PREC)

        b_o, b_n = _read(b_q, b_s0, b_z0, b_o, b_n, scale, 0, F, FP, NQ, BF, OP, PREC)
        b_p = _features_t(b_kt, b_m, 0, F, FP, NQ, BF, OP, PREC)
        b_s0 = tl.dot(b_p.to(OP), b_v, acc=b_s0, input_precision=PREC)
        b_z0 += tl.sum(b_p, 1)
        if NB > 1:
            b_o, b_n = _read(b_q, b_s1, b_z1, b_o, b_n, scale, 1, F, FP, NQ, BF, OP, PREC)
            b_p = _features_t(b_kt, b_m, 1, F, FP, NQ, BF, OP, PREC)
            b_s1 = tl.dot(b_p.to(OP), b_v, acc=b_s1, input_precision=PREC)
            b_z1 += tl.sum(b_p, 1)
            b_o, b_n = _read(b_q, b_s2, b_z2, b_o, b_n, scale, 2, F, FP, NQ, BF, OP, PREC)
            b_p = _features_t(b_kt, b_m, 2, F, FP, NQ, BF, OP, PREC)
            b_s2 = tl.dot(b_p.to(OP), b_v, acc=b_s2, input_precision=PREC)
            b_z2 += tl.sum(b_p, 1)

        b_o = b_o / b_n[:, None]
        tl.store(o_ptr + o_t[:, None] * H * V + o_v[None, :], b_o.to(o_ptr.dtype.element_ty), mask=m_v)
        if i_v == 0:
            tl.store(norm_ptr + o_t * H, b_n, mask=m_t)

    if HAS_FINAL:  # noqa: SIM102  known when compiling, the inner one only when running
        if i_g == G - 1:
            p_kv = final_kv_ptr + i_bh.to(tl.int64) * (NQ + F + 1) * V
            p_z = final_z_ptr + i_bh.to(tl.int64) * (NQ + F + 1)
            _store_public(p_kv, p_z, b_s0, b_z0, 0, o_v, i_v == 0, scale, False, F, NQ, V, BF)
            if NB > 1:
                _store_public(p_kv, p_z, b_s1, b_z1, 1, o_v, i_v == 0, scale, False, F, NQ, V, BF)
                _store_public(p_kv, p_z, b_s2, b_z2, 2, o_v, i_v == 0, scale, False, F, NQ, V, BF)


# ---------------------------------------------------------------- backward
@triton.jit
def _delta_kernel(o_ptr, do_ptr, norm_ptr, delta_ptr, N, V: tl.constexpr, VP: tl.constexpr, BR: tl.constexpr):
    """Gradient of the normaliser, -(do . o) / norm, per row."""
    o_r, o_v = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, VP)
    m = (o_r < N)[:, None] & (o_v < V)[None, :]
    b_o = tl.load(o_ptr + o_r[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    b_do = tl.load(do_ptr + o_r[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    b_n = tl.load(norm_ptr + o_r, mask=o_r < N, other=1.0)
    tl.store(delta_ptr + o_r, -tl.sum(b_o * b_do, 1) / b_n, mask=o_r < N)


@triton.jit
def _pull_back(
    b_x,
    b_g,
    b_dx,
    i_b: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    NQ: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """Add to b_dx [C, FP] the gradient of the features of block i_b, b_g [C, BF]."""
    x1, x2, e1, e2 = _factors(b_x, i_b, F, FP, NQ, BF, OP, PREC)
    b_dx = tl.dot((b_g * x2).to(OP), e1, acc=b_dx, input_precision=PREC)
    return tl.dot((b_g * x1).to(OP), e2, acc=b_dx, input_precision=PREC)


@triton.jit
def _dq_block(
    b_q,
    b_kt,
    b_v,
    b_m,
    b_dn,
    b_dd,
    b_s,
    b_z,
    b_dq,
    scale,
    i_b: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    NQ: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    b_g = tl.dot(b_dn, tl.trans(b_s.to(OP)), input_precision=PREC) + b_dd[:, None] * b_z[None, :]
    b_g *= _weights(i_b, scale, F, NQ, BF)[None, :]
    b_dq = _pull_back(b_q, b_g, b_dq, i_b, F, FP, NQ, BF, OP, PREC)
    b_p = _features_t(b_kt, b_m, i_b, F, FP, NQ, BF, OP, PREC)
    b_s = tl.dot(b_p.to(OP), b_v, acc=b_s, input_precision=PREC)
    b_z += tl.sum(b_p, 1)
    return b_dq, b_s, b_z


@triton.jit
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    norm_ptr,
    delta_ptr,
    dq_ptr,
    start_kv_ptr,
    start_z_ptr,
    scale,
    T,
    H,
    G,
    num_chunks,
    partial_stride,
    HAS_START: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    NB: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradient of q: dphi(q) = S (do / norm) + z delta, S summed again from k and v; one part per V tile."""
    NQ: tl.constexpr = F * (F + 1) // 2
    i_v, i_g, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    o_f, o_v, o_c = tl.arange(0, FP), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    base = i_b.to(tl.int64) * T
    q_ptr += (base * H + i_h) * F
    k_ptr += (base * H + i_h) * F
    v_ptr += (base * H + i_h) * V
    do_ptr += (base * H + i_h) * V
    norm_ptr += base * H + i_h
    delta_ptr += base * H + i_h
    dq_ptr += (base * H + i_h) * F + i_v * partial_stride.to(tl.int64)
    start_kv_ptr += (i_bh.to(tl.int64) * G + i_g) * (NB * BF) * V
    start_z_ptr += (i_bh.to(tl.int64) * G + i_g) * (NB * BF)

    b_s0, b_z0 = _load_start(start_kv_ptr, start_z_ptr, 0, o_v, HAS_START, V, BV, BF)
    if NB > 1:
        b_s1, b_z1 = _load_start(start_kv_ptr, start_z_ptr, 1, o_v, HAS_START, V, BV, BF)
        b_s2, b_z2 = _load_start(start_kv_ptr, start_z_ptr, 2, o_v, HAS_START, V, BV, BF)
    for i_c in range(i_g * num_chunks, tl.minimum((i_g + 1) * num_chunks, tl.cdiv(T, C))):
        o_t = i_c * C + o_c
        m_t = o_t < T
        m_f = m_t[:, None] & (o_f < F)[None, :]
        m_v = m_t[:, None] & (o_v < V)[None, :]
        b_q = tl.load(q_ptr + o_t[:, None] * H * F + o_f[None, :], mask=m_f, other=0.0).to(OP)
        b_k = tl.load(k_ptr + o_t[:, None] * H * F + o_f[None, :], mask=m_f, other=0.0).to(OP)
        b_v = tl.load(v_ptr + o_t[:, None] * H * V + o_v[None, :], mask=m_v, other=0.0).to(OP)
        b_do = tl.load(do_ptr + o_t[:, None] * H * V + o_v[None, :], mask=m_v, other=0.0)
        b_n = tl.load(norm_ptr + o_t * H, mask=m_t, other=1.0)
        b_dd = tl.where(i_v == 0, tl.load(delta_ptr + o_t * H, mask=m_t, other=0.0), 0.0)
        b_dn = (b_do.to(tl.float32) / b_n[:, None]).to(OP)
        b_kt = tl.trans(b_k)
        b_m = m_t.to(tl.float32)

        b_ds = tl.dot(b_q, b_kt, input_precision=PREC) * scale
        b_g = tl.dot(b_dn, tl.trans(b_v), input_precision=PREC) + b_dd[:, None]
        b_ds = tl.where(o_c[:, None] >= o_c[None, :], (1.0 + b_ds) * b_g * scale, 0.0)
        b_dq = tl.dot(b_ds.to(OP), b_k, input_precision=PREC)

        b_dq, b_s0, b_z0 = _dq_block(
            b_q, b_kt, b_v, b_m, b_dn, b_dd, b_s0, b_z0, b_dq, scale, 0, F, FP, NQ, BF, OP, PREC
        )
        if NB > 1:
            b_dq, b_s1, b_z1 = _dq_block(
                b_q, b_kt, b_v, b_m, b_dn, b_dd, b_s1, b_z1, b_dq, scale, 1, F, FP, NQ, BF, OP, PREC
            )
            b_dq, b_s2, b_z2 = _dq_block(
                b_q, b_kt, b_v, b_m, b_dn, b_dd, b_s2, b_z2, b_dq, scale, 2, F, FP, NQ, BF, OP, PREC
            )
        tl.store(dq_ptr + o_t[:, None] * H * F + o_f[None, :], b_dq.to(dq_ptr.dtype.element_ty), mask=m_f)


@triton.jit
def _dkv_block(
    b_k,
    b_v,
    b_qt,
    b_dn,
    b_dd,
    b_s,
    b_z,
    b_dk,
    b_dv,
    scale,
    i_b: tl.constexpr,
    CAUSAL: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    NQ: tl.constexpr,
    BF: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    b_so = b_s.to(OP)
    x1, x2, e1, e2 = _factors(b_k, i_b, F, FP, NQ, BF, OP, PREC)
    b_dv = tl.dot((x1 * x2).to(OP), b_so, acc=b_dv, input_precision=PREC)
    b_g = tl.dot(b_v, tl.trans(b_so), input_precision=PREC) + b_z[None, :]
    b_dk = tl.dot((b_g * x2).to(OP), e1, acc=b_dk, input_precision=PREC)
    b_dk = tl.dot((b_g * x1).to(OP), e2, acc=b_dk, input_precision=PREC)
    if CAUSAL:
        b_p = _features_t(b_qt, tl.full([b_qt.shape[1]], 1.0, tl.float32), i_b, F, FP, NQ, BF, OP, PREC)
        b_p *= _weights(i_b, scale, F, NQ, BF)[:, None]
        b_s = tl.dot(b_p.to(OP), b_dn, acc=b_s, input_precision=PREC)
        b_z += tl.sum(b_p * b_dd[None, :], 1)
    return b_dk, b_dv, b_s, b_z


@triton.jit
def _dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    norm_ptr,
    delta_ptr,
    mask_ptr,
    dk_ptr,
    dv_ptr,
    start_kv_ptr,
    start_z_ptr,
    init_kv_ptr,
    init_z_ptr,
    scale,
    T,
    H,
    G,
    num_chunks,
    partial_stride,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    NB: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradients of k and v, chunks from last to first, with D = sum of weighted phi(q) (do / norm)^T of later tokens.

    dv = phi(k).D + w^T (do / norm), dphi(k) = D v + D_z. Without CAUSAL (a prefix) D is given and stays.
    HAS_INITIAL: the gradient of the initial state, D before the first token.
    """
    NQ: tl.constexpr = F * (F + 1) // 2
    i_v, i_g, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    o_f, o_v, o_c = tl.arange(0, FP), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    base = i_b.to(tl.int64) * T
    q_ptr += (base * H + i_h) * F
    k_ptr += (base * H + i_h) * F
    v_ptr += (base * H + i_h) * V
    do_ptr += (base * H + i_h) * V
    norm_ptr += base * H + i_h
    delta_ptr += base * H + i_h
    dk_ptr += (base * H + i_h) * F + i_v * partial_stride.to(tl.int64)
    dv_ptr += (base * H + i_h) * V
    i_s = i_bh.to(tl.int64) * G + i_g if CAUSAL else i_bh.to(tl.int64)
    start_kv_ptr += i_s * (NB * BF) * V
    start_z_ptr += i_s * (NB * BF)

    b_s0, b_z0 = _load_start(start_kv_ptr, start_z_ptr, 0, o_v, HAS_START, V, BV, BF)
    b_z0 = tl.where(i_v == 0, b_z0, 0.0)
    if NB > 1:
        b_s1, b_z1 = _load_start(start_kv_ptr, start_z_ptr, 1, o_v, HAS_START, V, BV, BF)
        b_s2, b_z2 = _load_start(start_kv_ptr, start_z_ptr, 2, o_v, HAS_START, V, BV, BF)
        b_z1 = tl.where(i_v == 0, b_z1, 0.0)
        b_z2 = tl.where(i_v == 0, b_z2, 0.0)
    first = i_g * num_chunks
    last = tl.minimum(first + num_chunks, tl.cdiv(T, C))
    for i in range(0, last - first):
        o_t = (last - 1 - i) * C + o_c
        m_t = o_t < T
        m_f = m_t[:, None] & (o_f < F)[None, :]
        m_v = m_t[:, None] & (o_v < V)[None, :]
        b_k = tl.load(k_ptr + o_t[:, None] * H * F + o_f[None, :], mask=m_f, other=0.0).to(OP)
        b_v = tl.load(v_ptr + o_t[:, None] * H * V + o_v[None, :], mask=m_v, other=0.0).to(OP)
        if CAUSAL:
            b_q = tl.load(q_ptr + o_t[:, None] * H * F + o_f[None, :], mask=m_f, other=0.0).to(OP)
            b_do = tl.load(do_ptr + o_t[:, None] * H * V + o_v[None, :], mask=m_v, other=0.0)
            b_n = tl.load(norm_ptr + o_t * H, mask=m_t, other=1.0)
            b_dd = tl.where(i_v == 0, tl.load(delta_ptr + o_t * H, mask=m_t, other=0.0), 0.0)
            b_dn = (b_do.to(tl.float32) / b_n[:, None]).to(OP)
            b_qt = tl.trans(b_q)
            b_st = tl.dot(b_k, b_qt, input_precision=PREC) * scale
            m_c = o_c[:, None] <= o_c[None, :]
            b_w = tl.where(m_c, 1.0 + b_st * (1.0 + 0.5 * b_st), 0.0)
            b_dv = tl.dot(b_w.to(OP), b_dn, input_precision=PREC)
            b_g = tl.dot(b_v, tl.trans(b_dn), input_precision=PREC) + b_dd[None, :]
            b_ds = tl.where(m_c, (1.0 + b_st) * b_g * scale, 0.0)
            b_dk = tl.dot(b_ds.to(OP), b_q, input_precision=PREC)
        else:
            b_qt = tl.trans(b_k)
            b_dn = b_v
            b_dd = m_t.to(tl.float32)
            b_dv = tl.zeros([C, BV], tl.float32)
            b_dk = tl.zeros([C, FP], tl.float32)

        b_dk, b_dv, b_s0, b_z0 = _dkv_block(
            b_k, b_v, b_qt, b_dn, b_dd, b_s0, b_z0, b_dk, b_dv, scale, 0, CAUSAL, F, FP, NQ, BF, OP, PREC
        )
        if NB > 1:
            b_dk, b_dv, b_s1, b_z1 = _dkv_block(
                b_k, b_v, b_qt, b_dn, b_dd, b_s1, b_z1, b_dk, b_dv, scale, 1, CAUSAL, F, FP, NQ, BF, OP, PREC
            )
            b_dk, b_dv, b_s2, b_z2 = _dkv_block(
                b_k, b_v, b_qt, b_dn, b_dd, b_s2, b_z2, b_dk, b_dv, scale, 2, CAUSAL, F, FP, NQ, BF, OP, PREC
            )
        if HAS_MASK:
            b_counts = tl.load(mask_ptr + base + o_t, mask=m_t, other=0) != 0
            b_dk = tl.where(b_counts[:, None], b_dk, 0.0)
            b_dv = tl.where(b_counts[:, None], b_dv, 0.0)
        tl.store(dk_ptr + o_t[:, None] * H * F + o_f[None, :], b_dk.to(dk_ptr.dtype.element_ty), mask=m_f)
        tl.store(dv_ptr + o_t[:, None] * H * V + o_v[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=m_v)

    if HAS_INITIAL:  # noqa: SIM102  known when compiling, the inner one only when running
        if i_g == 0:
            p_kv = init_kv_ptr + i_bh.to(tl.int64) * (NQ + F + 1) * V
            p_z = init_z_ptr + i_bh.to(tl.int64) * (NQ + F + 1)
            _store_public(p_kv, p_z, b_s0, b_z0, 0, o_v, i_v == 0, scale, True, F, NQ, V, BF)
            if NB > 1:
                _store_public(p_kv, p_z, b_s1, b_z1, 1, o_v, i_v == 0, scale, True, F, NQ, V, BF)
                _store_public(p_kv, p_z, b_s2, b_z2, 2, o_v, i_v == 0, scale, True, F, NQ, V, BF)


# ---------------------------------------------------------------- decode step
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
    F: tl.constexpr,
    NF: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    BR: tl.constexpr,
):
    """One token of one head: S += phi(k) v^T, z += phi(k), o = phi(q).S / phi(q).z; the state moves once each way."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, VP)
    m_v = o_v < V
    b_v = tl.load(v_ptr + i_bh * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_o = tl.zeros([VP], tl.float32)
    b_n = tl.zeros([BR], tl.float32)
    root = tl.sqrt(scale)
    for i_r in tl.static_range(0, tl.cdiv(NF, BR)):
        r = i_r * BR + tl.arange(0, BR)
        p = r - 1 - F
        first = tl.where(p >= 0, p % F, r - 1)
        second = (p % F + p // F) % F
        m_1, m_2 = (r >= 1) & (r < NF), (p >= 0) & (r < NF)
        factor = tl.where(m_2, tl.where(p < F, scale * 0.7071067811865476, scale), tl.where(m_1, root, 1.0))
        b_pq = tl.load(q_ptr + i_bh * F + first, mask=m_1, other=1.0).to(tl.float32)
        b_pq *= tl.load(q_ptr + i_bh * F + second, mask=m_2, other=1.0).to(tl.float32) * factor
        b_pk = tl.load(k_ptr + i_bh * F + first, mask=m_1, other=1.0).to(tl.float32)
        b_pk *= tl.load(k_ptr + i_bh * F + second, mask=m_2, other=1.0).to(tl.float32) * factor
        o_s = (i_bh * NF + r[:, None]) * V + o_v[None, :]
        m_s = (r < NF)[:, None] & m_v[None, :]
        b_s = tl.load(kv_ptr + o_s, mask=m_s, other=0.0).to(tl.float32) + b_pk[:, None] * b_v[None, :]
        b_z = tl.load(z_ptr + i_bh * NF + r, mask=r < NF, other=0.0).to(tl.float32) + b_pk
        b_pq = tl.where(r < NF, b_pq, 0.0)
        b_o += tl.sum(b_pq[:, None] * b_s, 0)
        b_n += b_pq * b_z
        tl.store(new_kv_ptr + o_s, b_s.to(new_kv_ptr.dtype.element_ty), mask=m_s)
        tl.store(new_z_ptr + i_bh * NF + r, b_z.to(new_z_ptr.dtype.element_ty), mask=r < NF)
    b_o = b_o / tl.sum(b_n, 0)
    tl.store(o_ptr + i_bh * V + o_v, b_o.to(o_ptr.dtype.element_ty), mask=m_v)
