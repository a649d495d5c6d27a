"""Softmax attention with a KV cache: the architecture that remembers everything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.layers import merge_heads, rotary, split_heads
from architectures.mixer import SequenceMixer, divide_heads
from architectures.registry import register


class AttentionState(NamedTuple):
    """KV cache, allocated at the longest length: memory that grows with the sequence."""

    keys: Tensor  # [B, max_seq_len, H, K]
    values: Tensor  # [B, max_seq_len, H, K]
    position: Tensor  # [], int64, tokens seen


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v; q [B, T, H, K], k v [B, S, H, K], mask [T, S] (True: may be read)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if backend == "sdpa":
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=exact)
        o = weights.to(v.dtype) @ v
    return o.transpose(1, 2)


class SelfAttention(SequenceMixer):
    """What full and sliding-window attention share: projections, heads, rotary embedding."""

    backends = ("sdpa", "reference")

    def __init__(self, d_model: int, *, num_heads: int, rotary_fraction: float, bias: bool, backend: str):
        super().__init__(d_model, backend=backend)
        self.num_heads = num_heads
        self.head_dim = divide_heads(d_model, num_heads)
        self.rotary_fraction = rotary_fraction
        if not 0 <= rotary_fraction <= 1 or int(self.head_dim * rotary_fraction) % 2:
            raise ValueError(
                f"rotary_fraction={rotary_fraction} must lie in [0, 1] and turn an even part of "
                f"head_dim={self.head_dim} (d_model={d_model}, num_heads={num_heads})"
            )
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], positions [T] -> q, k, v [B, T, H, K], q and k turned."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        if self.rotary_fraction:
            q = rotary(q, positions, fraction=self.rotary_fraction)
            k = rotary(k, positions, fraction=self.rotary_fraction)
        return q, k, v

    def step(self, x: Tensor, state):
        y, state = self.prefill(x.unsqueeze(1), state)
        return y.squeeze(1), state


@register("attention", paper="arXiv:1706.03762")
class Attention(SelfAttention):
    """Causal multi-head softmax attention: y_t = sum_{u <= t} softmax_u(q_t . k_u / sqrt(K)) v_u.

    Attention Is All You Need (arXiv:1706.03762), eq. 1; rotary embedding (arXiv:2104.09864) on
    `rotary_fraction` of each head, off by default as in the MQAR protocols. The state is the KV cache, 2 T D
    elements at length T.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 1,
        rotary_fraction: float = 0.0,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__(d_model, num_heads=num_heads, rotary_fraction=rotary_fraction, bias=bias, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self._project(x, torch.arange(length, device=x.device))
        if self.backend_for(x) == "sdpa":
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        else:
            causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            o = masked_attention(q, k, v, causal, "reference")
        return self.out_proj(merge_heads(o))

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> AttentionState:
        like = self.like_parameters(device, dtype)
        shape = (batch_size, max_seq_len, self.num_heads, self.head_dim)
        position = torch.zeros((), dtype=torch.int64, device=like["device"])
        return AttentionState(torch.zeros(shape, **like), torch.zeros(shape, **like), position)

    def prefill(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        self.check_state(x, state)
        length, capacity = x.shape[1], state.keys.shape[1]
        # Reading the position on a GPU would wait for it; there index_copy_ itself traps a cache overrun.
        if x.device.type == "cpu" and int(state.position) + length > capacity:
            raise ValueError(
                f"the state holds max_seq_len={capacity} tokens, {int(state.position)} are in it, {length} more came"
            )
        positions = state.position + torch.arange(length, device=x.device)
        q, k, v = self._project(x, positions)
        keys = state.keys.index_copy_(1, positions, k.to(state.keys.dtype))
        values = state.values.index_copy_(1, positions, v.to(state.values.dtype))
        seen = torch.arange(capacity, device=x.device)[None] <= positions[:, None]
        o = masked_attention(q, keys.to(q.dtype), values.to(q.dtype), seen, self.backend_for(x))
        return self.out_proj(merge_heads(o)), AttentionState(keys, values, state.position + length)
