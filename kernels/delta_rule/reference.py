"""The generalised delta rule in plain PyTorch: the specification of the operation, and a chunked form of it.

One recurrence serves DeltaNet, Gated DeltaNet, Kimi Delta Attention and RWKV-7. With a state S [K, V] per head,

    u_t = x_t + a_t^T S_{t-1}                                      what is written: a value corrected by a read
    S_t = diag(exp(g_t)) S_{t-1} + b_t u_t^T + k_t v_t^T           decay, corrected write, plain write
    o_t = scale * q_t^T S_t

- delta rule (arXiv:2406.06484), gated by a scalar (arXiv:2412.06464) or per channel (arXiv:2510.26692):
  x_t = v_t, a_t = -exp(g_t) k_t, b_t = beta_t k_t and no plain write, which is
  S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T;
- diagonal plus low rank, RWKV-7 (arXiv:2503.14456): x_t = 0 and a_t, b_t, k_t, v_t as given.

Chunked form. Let G_i be the sum of g over the first i tokens of a chunk that starts from S_0, and let

    A(r, c)_ij = sum_K r_i c_j exp(G_{i-1} - G_j)     for j < i,

the decayed products of what token i reads with what token j wrote. Then (WY representation)

    (I - A(a, b)) U = X + A(a, k) V + diag(exp(G_{i-1})) a S_0
    O = diag(exp(G_{i-1})) q' S_0 + A(q', b) U + A(q', k) V + (q.b) U + (q.k) V,        q' = exp(g) q

and only the state passes from chunk to chunk. Exponents stay exact and at most zero: A is built by halves, the
rows of a second half and the columns of a first half each decayed to the border between them, so that nothing is
ever divided by a decay, however strong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DeltaTerms(NamedTuple):
    """Terms of the recurrence above, `scale` folded into q; x or (k, v) may be None, and g for no decay."""

    q: Tensor  # [B, T, H, K]
    a: Tensor  # [B, T, H, K]
    b: Tensor  # [B, T, H, K]
    x: Tensor | None  # [B, T, H, V]
    k: Tensor | None  # [B, T, H, K]
    v: Tensor | None  # [B, T, H, V]
    g: Tensor | None  # [B, T, H, K], or [B, T, H, 1] for one decay per head

    def map(self, function) -> DeltaTerms:
        return DeltaTerms(*(None if term is None else function(term) for term in self))


def delta_terms(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float) -> DeltaTerms:
    """The (gated) delta rule as terms of the general recurrence; g [..., H] or [..., H, K] or None, beta [..., H]."""
    if g is not None and g.dim() == beta.dim():
        g = g.unsqueeze(-1)
    a = -k if g is None else -k * g.exp()
    return DeltaTerms(q * scale, a, k * beta.unsqueeze(-1), v, None, None, g)


def dplr_terms(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float) -> DeltaTerms:
    """Diagonal plus low rank as terms of the general recurrence."""
    return DeltaTerms(q * scale, a, b, None, k, v, g)


def step_terms(terms: DeltaTerms, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: terms without the axis T, state [B, H, K, V] -> o [B, H, V], state."""
    read = (terms.a.unsqueeze(-2) @ state).squeeze(-2)
    written = read if terms.x is None else terms.x + read
    if terms.g is not None:
        state = state * terms.g.exp().unsqueeze(-1)
    state = state + terms.b.unsqueeze(-1) * written.unsqueeze(-2)
    if terms.k is not None:
        state = state + terms.k.unsqueeze(-1) * terms.v.unsqueeze(-2)
    return (terms.q.unsqueeze(-2) @ state).squeeze(-2), state


def naive_terms(terms: DeltaTerms, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence one token at a time: the specification. -> o [B, T, H, V], final state."""
    outputs = []
    for i in range(terms.q.shape[1]):
        o, state = step_terms(terms.map(lambda term, i=i: term[:, i]), state)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def chunk_terms(terms: DeltaTerms, state: Tensor, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The chunked form; `chunk_size` a power of two, chosen from the length when None. -> o [B, T, H, V], state."""
    (batch, length, heads, _), value_dim = terms.q.shape, state.shape[-1]
    size = chunk_size or choose_chunk_size(length)
    num_chunks = -(-length // size)
    padding = num_chunks * size - length

    def chunked(term: Tensor) -> Tensor:
        """[B, T, H, K] -> [N, B * H, C, K]; the tokens added at the end write nothing and keep everything."""
        if padding:
            term = torch.nn.functional.pad(term, (0, 0, 0, 0, 0, padding))
        term = term.reshape(batch, num_chunks, size, heads, -1)
        return term.permute(1, 0, 3, 2, 4).reshape(num_chunks, batch * heads, size, -1)

    q, a, b, x, k, v, g = terms.map(chunked)
    decays = None if g is None else Decays.of(g)
    decayed_q = q if g is None else q * g.exp()

    def into(rows: Tensor) -> Tensor:
        return rows if decays is None else rows * decays.from_start

    def out_of(columns: Tensor) -> Tensor:
        return columns if decays is None else columns * decays.to_end

    # (I - A(a, b))^-1 applied to everything that does not wait for the state of the chunk before.
    value = x if k is None else pair_products(a, k, decays) @ v
    solved = torch.linalg.solve_triangular(
        -pair_products(a, b, decays), torch.cat([into(a), value], dim=-1), upper=False, unitriangular=True
    )
    read, written = solved.split([a.shape[-1], value_dim], dim=-1)
    writes, added = out_of(b).transpose(-1, -2), None if k is None else out_of(k).transpose(-1, -2) @ v
    state = state.reshape(batch * heads, *state.shape[-2:])
    states, corrected = [], []
    for i in range(num_chunks):
        states.append(state)
        u = torch.baddbmm(written[i], read[i], state)
        corrected.append(u)
        if decays is not None:
            state = state * decays.total[i].transpose(-1, -2)
        state = torch.baddbmm(state, writes[i], u)
        if added is not None:
            state = state + added[i]
    states, u = torch.stack(states), torch.stack(corrected)
    o = into(decayed_q) @ states + pair_products(decayed_q, b, decays, diagonal=q) @ u
    if k is not None:
        o = o + pair_products(decayed_q, k, decays, diagonal=q) @ v
    o = o.reshape(num_chunks, batch, heads, size, value_dim).permute(1, 0, 3, 2, 4)
    o = o.reshape(batch, num_chunks * size, heads, value_dim)[:, :length]
    return o, state.reshape(batch, heads, *state.shape[-2:])


class Decays(NamedTuple):
    """Factors exp(sum of g) over the stretches of a chunk that `chunk_terms` needs; every sum has terms of one sign."""

    levels: list[tuple[Tensor, Tensor]]
    """For pieces of 1, 2, 4, .. tokens: from the border in the middle of two to before each token of the second
    [.., n, s, K], and from after each token of the first to the border."""
    from_start: Tensor  # [.., C, K], from the start of the chunk to before each token
    to_end: Tensor  # [.., C, K], from after each token to the end of the chunk
    total: Tensor  # [.., 1, K], the whole chunk

    @classmethod
    def of(cls, g: Tensor) -> Decays:
        """g [.., C, K], C a power of two."""
        total = g.unsqueeze(-2)  # [.., pieces, 1, K]
        before = after = torch.zeros_like(total)  # [.., pieces, s, K]
        levels = []
        while total.shape[-3] > 1:
            (before_1, before_2), (after_1, after_2), (total_1, total_2) = (
                part.unflatten(-3, (-1, 2)).unbind(-3) for part in (before, after, total)
            )
            levels.append((before_2.exp(), after_1.exp()))
            before = torch.cat([before_1, before_2 + total_1], dim=-2)
            after = torch.cat([after_1 + total_2, after_2], dim=-2)
            total = total_1 + total_2
        return cls(levels, before.squeeze(-3).exp(), after.squeeze(-3).exp(), total.squeeze(-3).exp())


def pair_products(rows: Tensor, columns: Tensor, decays: Decays | None, diagonal: Tensor | None = None) -> Tensor:
    """A(rows, columns) [.., C, C], strictly lower triangular, or with `diagonal_i . columns_i` on the diagonal."""
    if decays is None:
        products = rows @ columns.transpose(-1, -2)
        # Without decay q' = q, and the diagonal belongs to the same product.
        return products.tril(-1 if diagonal is None else 0)
    if diagonal is None:
        blocks = rows.new_zeros(*rows.shape[:-1], 1, 1)
    else:
        blocks = (diagonal * columns).sum(-1)[..., None, None]
    for from_border, to_border in decays.levels:
        size = blocks.shape[-1]
        row = rows.unflatten(-2, (-1, 2, size)).select(-3, 1) * from_border
        column = columns.unflatten(-2, (-1, 2, size)).select(-3, 0) * to_border
        lower_left = row @ column.transpose(-1, -2)
        first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        upper = torch.cat([first, torch.zeros_like(first)], dim=-1)
        blocks = torch.cat([upper, torch.cat([lower_left, second], dim=-1)], dim=-2)
    return blocks.squeeze(-3)


def choose_chunk_size(length: int) -> int:
    """32, where the work inside and between chunks balances for heads 16 to 64 wide; less for a short sequence."""
    size = 32
    while size >= 2 * length:
        size //= 2
    return size
