"""Second-order Taylor linear attention in plain PyTorch: the specification of the operation.

Feature map of Based (arXiv:2402.18668, section 4): with s = scale * q.k,

    phi(q).phi(k) = 1 + s + s^2 / 2,

so phi(x) holds a constant, f linear and f^2 quadratic features. The quadratic ones are symmetric, and the state
keeps each pair once: F = 1 + f + f (f + 1) / 2. The packed order is public, any backend's state can be given to
any other:

    phi[0]          = 1
    phi[1 + i]      = sqrt(scale) * x_i                              i = 0 .. f-1
    phi[1 + f + p]  = scale * x_i * x_j * (sqrt(1/2) if i == j else 1)
                      with i = p % f, j = (i + p // f) % f            p = 0 .. f (f + 1) / 2 - 1

Pairs are ordered by their cyclic distance j - i, which visits every unordered pair exactly once, and a kernel
can compute i and j from p without a table.

    S_t = sum_{u <= t} phi(k_u) v_u^T,    z_t = sum_{u <= t} phi(k_u),    o_t = phi(q_t).S_t / phi(q_t).z_t

1 + s + s^2 / 2 = ((1 + s)^2 + 1) / 2 >= 1/2, so the normaliser is at least half the number of tokens seen: it needs
no epsilon.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TaylorState(NamedTuple):
    """Recurrent memory of Taylor linear attention: `kv` [B, H, F, V] and `key_sum` [B, H, F], packed order above."""

    kv: Tensor
    key_sum: Tensor

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        num_heads: int,
        feature_dim: int,
        value_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TaylorState:
        """The empty memory; `feature_dim` is the width f of q and k."""
        num = num_taylor_features(feature_dim)
        return cls(
            torch.zeros(batch_size, num_heads, num, value_dim, device=device, dtype=dtype),
            torch.zeros(batch_size, num_heads, num, device=device, dtype=dtype),
        )


def num_taylor_features(feature_dim: int) -> int:
    """F = 1 + f + f (f + 1) / 2, the number of packed features of a key of width f."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def taylor_features(x: Tensor, scale: float) -> Tensor:
    """The packed features phi(x), [..., f] -> [..., F], in the dtype of x."""
    f = x.shape[-1]
    pairs = [x * x * (scale * math.sqrt(0.5))]
    for distance in range(1, f // 2 + 1):
        # At half way round an even circle every pair would come twice.
        num = f // 2 if 2 * distance == f else f
        pairs.append((x * x.roll(-distance, dims=-1))[..., :num] * scale)
    return torch.cat([torch.ones_like(x[..., :1]), x * math.sqrt(scale), *pairs], dim=-1)


def accumulation_dtype(dtype: torch.dtype, state: TaylorState | None) -> torch.dtype:
    """float64 where the inputs or the state are float64, float32 for everything narrower."""
    if state is not None:
        dtype = torch.promote_types(dtype, state.kv.dtype)
    return torch.float64 if dtype == torch.float64 else torch.float32


def naive_taylor_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial_state: TaylorState | None = None
) -> tuple[Tensor, TaylorState]:
    """The recurrence above, one token at a time; shapes as in `taylor_linear_attention`."""
    (b, t, h, f), v_dim = k.shape, v.shape[-1]
    state = initial_state or TaylorState.zeros(b, h, f, v_dim, device=q.device, dtype=q.dtype)
    outputs = []
    for i in range(t):
        o, state = taylor_linear_attention_step_reference(q[:, i], k[:, i], v[:, i], state, scale=scale)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def taylor_linear_attention_step_reference(
    q: Tensor, k: Tensor, v: Tensor, state: TaylorState, *, scale: float
) -> tuple[Tensor, TaylorState]:
    """One step: q k [B, H, f], v [B, H, V]; the state is rounded to its own dtype after the output."""
    acc = accumulation_dtype(q.dtype, state)
    phi_q, phi_k = taylor_features(q.to(acc), scale), taylor_features(k.to(acc), scale)
    kv = state.kv.to(acc) + phi_k.unsqueeze(-1) * v.to(acc).unsqueeze(-2)
    key_sum = state.key_sum.to(acc) + phi_k
    numerator = (phi_q.unsqueeze(-2) @ kv).squeeze(-2)
    denominator = (phi_q * key_sum).sum(-1, keepdim=True)
    return (numerator / denominator).to(v.dtype), TaylorState(kv.to(state.kv.dtype), key_sum.to(state.key_sum.dtype))


def taylor_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    initial_state: TaylorState | None = None,
    output_final_state: bool = False,
    chunk_size: int = 128,
) -> tuple[Tensor, TaylorState | None]:
    """Chunked form: quadratic inside a chunk, through the state between chunks; accumulates in float32 or float64.

    At f = 16 and V = 64 a token costs as much in a chunk of 250 as through the state; 128 is fastest on a CPU.
    """
    acc = accumulation_dtype(q.dtype, initial_state)
    out_dtype, length = v.dtype, q.shape[1]
    q, k, v = (x.to(acc).transpose(1, 2) for x in (q, k, v))
    state = None if initial_state is None else TaylorState(*(x.to(acc) for x in initial_state))
    outputs = []
    for start in range(0, length, chunk_size):
        qc, kc, vc = (x[:, :, start : start + chunk_size] for x in (q, k, v))
        s = (qc * scale) @ kc.transpose(-1, -2)
        weights = (1 + s * (1 + 0.5 * s)).tril()
        numerator, denominator = weights @ vc, weights.sum(-1, keepdim=True)
        if state is not None:
            phi_q = taylor_features(qc, scale)
            numerator = numerator + phi_q @ state.kv
            denominator = denominator + phi_q @ state.key_sum.unsqueeze(-1)
        outputs.append(numerator / denominator)
        if output_final_state or start + chunk_size < length:
            state = taylor_state_reference(kc, vc, scale=scale, initial_state=state)
    o = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2).to(out_dtype)
    if not output_final_state:
        return o, None
    state_dtype = acc if initial_state is None else initial_state.kv.dtype
    return o, TaylorState(*(x.to(state_dtype) for x in state))


def taylor_state_reference(
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    initial_state: TaylorState | None = None,
) -> TaylorState:
    """sum phi(k) v^T and sum phi(k) where mask [B, T] is True; k [B, H, T, f], v [B, H, T, V]."""
    phi_k = taylor_features(k, scale)
    if mask is not None:
        # `where` and not a product: what stands at a masked position may be anything, NaN too.
        phi_k = torch.where(mask[:, None, :, None], phi_k, 0.0)
        v = torch.where(mask[:, None, :, None], v, 0.0)
    kv, key_sum = phi_k.transpose(-1, -2) @ v, phi_k.sum(-2)
    if initial_state is None:
        return TaylorState(kv, key_sum)
    return TaylorState(initial_state.kv + kv, initial_state.key_sum + key_sum)
