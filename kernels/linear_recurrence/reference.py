"""The linear recurrence with decay in plain PyTorch: the specification, token by token, and a chunked form.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,        o_t = S_t^T q_t                          (bonus is None)
    S_t as above,                                     o_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t    (bonus u)

Axes: B batch, T time, H heads, K key width, V value width. The log decay g is 0 everywhere (None), one number per
head [B, T, H], or one per key channel [B, T, H, K].

The chunked form only exponentiates sums of g over a stretch of tokens, so with g <= 0 every exponential is at most 1,
and it never subtracts two such sums, so nothing cancels however strong the decay is, down to g = -inf (a reset).
With one decay per head the sums over all stretches of a chunk are a [C, C] matrix. With one per key channel the
pairs (i, j < i) of a chunk are visited by halving: for i in the right and j in the left half of a block,

    exp(sum_{l=j+1..i} g_l) = exp(sum over the right half up to i) * exp(sum over the left half after j),

a product of a factor of q_i and a factor of k_j, so that each level is one batched matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, float32 otherwise."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def linear_recurrence_step_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, *, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step: q k [B, H, K], v [B, H, V], g None, [B, H] or [B, H, K], state [B, H, K, V].

    The state is rounded to its own dtype after the output.
    """
    acc = accumulation_dtype(q, state)
    out_dtype, state_dtype = v.dtype, state.dtype
    q, k, v, state = (x.to(acc) for x in (q, k, v, state))
    added = k.unsqueeze(-1) * v.unsqueeze(-2)
    read = None if bonus is None else state + bonus.to(acc).unsqueeze(-1) * added
    if g is not None:
        state = state * (g.unsqueeze(-1) if g.ndim == 2 else g).to(acc).exp().unsqueeze(-1)
    state = state + added
    o = (q.unsqueeze(-2) @ (state if read is None else read)).squeeze(-2)
    return o.to(out_dtype), state.to(state_dtype)


def naive_linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence above, one token at a time; shapes as in `linear_recurrence`. The specification."""
    state = initial_state
    if state is None:
        shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        state = torch.zeros(shape, dtype=accumulation_dtype(q), device=q.device)
    outputs = []
    for t in range(q.shape[1]):
        decay = None if g is None else g[:, t]
        o, state = linear_recurrence_step_reference(q[:, t], k[:, t], v[:, t], decay, state, bonus=bonus)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def linear_recurrence_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Chunked form; shapes as in `linear_recurrence`. The default `chunk_size` is what was fastest on a CPU."""
    acc = accumulation_dtype(q, initial_state)
    out_dtype, length = v.dtype, q.shape[1]
    chunk = min(chunk_size or (64 if g is None else 32), 1 << (length - 1).bit_length())
    if g is not None and g.ndim == 3:
        g = g.unsqueeze(-1)
    if g is None and bonus is not None:
        g = torch.zeros_like(q[..., :1])
    # A padded token has k = 0 and g = 0: it changes no state.
    q, k, v = (_to_chunks(x.to(acc), chunk) for x in (q, k, v))
    g = None if g is None else _to_chunks(g.to(acc), chunk)

    if g is None:
        o = (q @ k.transpose(-1, -2)).tril() @ v
        from_start, total, k_out = q, None, k
    else:
        if g.shape[-1] == 1 and bonus is None:
            o = (q @ k.transpose(-1, -2) * _sum_between(g).exp()) @ v
        else:
            o = _inside_chunk(q, k, v, g, bonus)
        from_start = q * _sum_until(g, exclusive=bonus is not None).exp()
        total, k_out = g.sum(-2).exp().unsqueeze(-1), k * _sum_after(g).exp()

    num_chunks = q.shape[2]
    if initial_state is None and num_chunks == 1 and not output_final_state:
        return _from_chunks(o, length).to(out_dtype), None
    added = k_out.transpose(-1, -2) @ v
    state = torch.zeros_like(added[:, :, 0]) if initial_state is None else initial_state.to(acc)
    states = []
    for n in range(num_chunks):
        states.append(state)
        state = (state if total is None else state * total[:, :, n]) + added[:, :, n]
    o = o + from_start @ torch.stack(states, dim=2)
    o = _from_chunks(o, length).to(out_dtype)
    if not output_final_state:
        return o, None
    return o, state.to(acc if initial_state is None else initial_state.dtype)


def _inside_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None) -> Tensor:
    """What each token reads of its own chunk: q k [..., C, K], v [..., C, V], g [..., C, K or 1] -> [..., C, V]."""
    # [H, K] -> [H, 1 (chunks), 1 (time), K]
    own = k if bonus is None else k * bonus.to(k.dtype)[:, None, None]
    o = (q * own).sum(-1, keepdim=True) * v
    size = q.shape[-2]
    while size > 1:
        half = size // 2
        left_k, left_v, left_g = (x.unflatten(-2, (-1, 2, half)).select(-3, 0) for x in (k, v, g))
        right_q, right_g = (x.unflatten(-2, (-1, 2, half)).select(-3, 1) for x in (q, g))
        right_q = right_q * _sum_until(right_g, exclusive=bonus is not None).exp()
        left_k = left_k * _sum_after(left_g).exp()
        read = (right_q @ left_k.transpose(-1, -2)) @ left_v
        o = o + torch.stack([torch.zeros_like(read), read], dim=-3).flatten(-4, -2)
        size = half
    return o


def _sum_between(g: Tensor) -> Tensor:
    """sum_{j < l <= i} g_l, [..., C, 1] -> [..., C (i), C (j)], and -inf where j > i."""
    size = g.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    summed = torch.where(later, g, 0.0).cumsum(-2)
    return summed.masked_fill(later.transpose(0, 1), -torch.inf)


def _sum_until(g: Tensor, *, exclusive: bool) -> Tensor:
    """sum_{l <= i} g_l over the time axis -2, or sum_{l < i}."""
    return (_shift(g, 1) if exclusive else g).cumsum(-2)


def _sum_after(g: Tensor) -> Tensor:
    """sum_{l > j} g_l over the time axis -2; summed from the right, since total minus prefix would cancel."""
    return _shift(g, -1).flip(-2).cumsum(-2).flip(-2)


def _shift(g: Tensor, by: int) -> Tensor:
    return F.pad(g[..., :-1, :], (0, 0, 1, 0)) if by > 0 else F.pad(g[..., 1:, :], (0, 0, 0, 1))


def _to_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, X] -> [B, H, N, C, X], padded with zeros at the end."""
    x = x.transpose(1, 2)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % chunk))
    return x.unflatten(2, (-1, chunk))


def _from_chunks(x: Tensor, length: int) -> Tensor:
    """[B, H, N, C, X] -> [B, T, H, X]."""
    return x.flatten(2, 3)[:, :, :length].transpose(1, 2)
