"""Softmax attention with a KV cache: the architecture that remembers everything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from architectures import backends
from architectures.layers import check_room, merge_heads, rotary, split_heads
from architectures.mixer import SequenceMixer, divide_heads
from architectures.registry import register
from kernels.cache_update import triton_refusal as update_refusal
from kernels.cached_attention import triton_refusal as attention_refusal
from kernels.taylor_linear_attention import autocast_inputs

MAX_FLASH_HEAD_DIM = 256


class AttentionState(NamedTuple):
    """KV cache, allocated at the longest length: memory that grows with the sequence."""

    keys: Tensor  # [B, max_seq_len, H, K'], K' the width that `cache_width` gives
    values: Tensor  # [B, max_seq_len, H, K']
    position: Tensor  # [], int64, tokens seen


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, backend: str, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T + mask) v; q [B, T, H, K], k v [B, S, H, K], mask [T, S] (True: may be read).

    scale is 1 / sqrt(K) when None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if backend == "sdpa":
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = (q @ k.transpose(-2, -1)) * scale
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=exact)
        o = weights.to(v.dtype) @ v
    return o.transpose(1, 2)


def cache_width(head_dim: int) -> int:
    """Entries that a cache keeps of each head: from 64 on a multiple of 8, the 16 bytes that memory is read in.

    What is filled up is zero, is moved like the rest, and counts as state like the rest.
    """
    return head_dim if head_dim < 64 else -(-head_dim // 8) * 8


def widen(x: Tensor, width: int) -> Tensor:
    """[..., K] filled up with zeros to [..., width]."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention q k v [B, T, H, K] -> [B, T, H, K] by flash-attn, to the last `window` tokens if given."""
    from flash_attn import flash_attn_func

    # flash-attn counts the tokens to the left of the current one, and means "all of them" by -1.
    left = -1 if window is None else window - 1
    q, k, v = autocast_inputs(q, k, v)
    right = 0 if window is not None else -1
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(left, right))


@torch.library.custom_op(
    "zoology::flash_cached_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor keys, Tensor values, Tensor length, float scale) -> Tensor",
)
def flash_cached_attention(q: Tensor, keys: Tensor, values: Tensor, length: Tensor, scale: float) -> Tensor:
    """The queries q [B, T, H, K] of the last T of `length` [] tokens, causally, over a KV cache; no gradient.

    An operator, because flash-attn's own function cannot be compiled. It copies the cache where K is no multiple of 8.
    In one part: flash-attn 2.8.3 was measured to give wrong and varying numbers where it divides a cache (H200).
    """
    from flash_attn import flash_attn_with_kvcache

    lengths = length.to(torch.int32).expand(q.shape[0]).contiguous()
    o = flash_attn_with_kvcache(
        q.contiguous(), keys, values, cache_seqlens=lengths, softmax_scale=scale, causal=True, num_splits=1
    )
    return o.contiguous()


@flash_cached_attention.register_fake
def _(q, keys, values, length, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class SelfAttention(SequenceMixer):
    """What full and sliding-window attention share: projections, heads, rotary embedding."""

    backends = ("flash-attn", "sdpa", "reference")

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 1,
        rotary_fraction: float = 0.0,
        bias: bool = True,
        backend: str = "auto",
    ):
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

    def unsupported(self, backend, *, device, dtype, seq_len):
        if backend != "flash-attn":
            return None
        if dtype not in (torch.bfloat16, torch.float16):
            return f"the dtype is {dtype}; allowed: bfloat16, float16"
        if self.head_dim > MAX_FLASH_HEAD_DIM:
            return f"head_dim={self.head_dim}; allowed: up to {MAX_FLASH_HEAD_DIM}"
        return None

    def _project(self, x: Tensor, positions: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], positions [T], below `rows` if that is known -> q, k, v [B, T, H, K], q and k turned."""
        return self._turn(*self._split(x), positions, rows)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., D] -> q, k, v [..., H, K], not turned."""
        return tuple(split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))

    def _turn(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, rows: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.rotary_fraction:
            q = rotary(q, positions, fraction=self.rotary_fraction, rows=rows)
            k = rotary(k, positions, fraction=self.rotary_fraction, rows=rows)
        return q, k, v

    def _caches(self, batch_size: int, slots: int, device, dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Empty keys, values and position."""
        like = self.like_parameters(device, dtype)
        shape = (batch_size, slots, self.num_heads, cache_width(self.head_dim))
        position = torch.zeros((), dtype=torch.int64, device=like["device"])
        return torch.zeros(shape, **like), torch.zeros(shape, **like), position

    def _write(self, cache: Tensor, at: Tensor, x: Tensor) -> Tensor:
        """Put x [B, T, H, K] into slots `at` [T] of a cache."""
        cache.index_copy_(1, at, widen(x, cache.shape[-1]).to(cache.dtype))
        return cache

    def _step(self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, rows: int | None = None) -> Tensor:
        """One token x [B, D] joins the cache, in slot position mod S, and reads what is in it -> [B, D]."""
        q, k, v = self._split(x)
        backend = self.backend_for(x)
        chosen = self.backend == "auto" and backend != "reference" and keys.dtype == q.dtype
        if chosen and (update_refusal(q, k, v, keys, values) or attention_refusal(keys[:, 0], keys)) is None:
            return self.out_proj(merge_heads(self._join_cache(q, k, v, keys, values, position)))
        at = position.reshape(1)
        q, k, v = self._turn(*(part.unsqueeze(1) for part in (q, k, v)), at, rows)
        slot = at % keys.shape[1]
        self._write(keys, slot, k)
        self._write(values, slot, v)
        if keys.dtype != q.dtype or backends.wants_grad(q, keys, values):
            keys, values, backend = keys.to(q.dtype), values.to(q.dtype), self._beside_flash(backend)
        return self.out_proj(merge_heads(self._read_cache(q, keys, values, position, backend)[:, 0]))

    def _join_cache(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """q k v [B, H, K], not turned yet, by the kernels of a decode step -> [B, H, K]."""
        self.ran_beside("triton")
        turned = int(self.head_dim * self.rotary_fraction)
        q = kernels.cache_update(q, k, v, keys, values, position, turned=turned, backend="triton")
        scale = self.head_dim**-0.5
        o = kernels.cached_attention(q, keys, values, position, scale=scale, backend="triton")
        return o[..., : self.head_dim]

    def _read_cache(self, q: Tensor, keys: Tensor, values: Tensor, position: Tensor, backend: str) -> Tensor:
        """q [B, 1, H, K], the token at `position`, over the slots in use."""
        if backend == "flash-attn" and self.backend == "flash-attn":
            used = (position + 1).clamp(max=keys.shape[1])
            wide = widen(q, keys.shape[-1])
            return flash_cached_attention(wide, keys, values, used, self.head_dim**-0.5)[..., : self.head_dim]
        used = torch.arange(keys.shape[1], device=q.device) <= position
        keys, values = keys[..., : self.head_dim], values[..., : self.head_dim]
        return masked_attention(q, keys, values, used[None], self._beside_flash(backend))

    def _beside_flash(self, backend: str) -> str:
        """What runs where flash-attn has no kernel: its kernel for caches wants one dtype, and has no gradient.

        `auto` never takes that kernel for a later part of a prompt: see `flash_cached_attention`.
        """
        return self.ran_beside("sdpa") if backend == "flash-attn" else backend


@register("attention", paper="arXiv:1706.03762")
class Attention(SelfAttention):
    """Causal multi-head softmax attention: y_t = sum_{u <= t} softmax_u(q_t . k_u / sqrt(K)) v_u.

    Attention Is All You Need (arXiv:1706.03762), eq. 1; rotary embedding (arXiv:2104.09864) on
    `rotary_fraction` of each head, off by default as in the MQAR protocols. The state is the KV cache, 2 T D
    elements at length T, as published. Checked against PyTorch's `nn.MultiheadAttention` and, with rotary embedding,
    transformers' `GPTNeoXAttention`, weights copied over.
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        length = x.shape[1]
        q, k, v = self._project(x, torch.arange(length, device=x.device))
        return self.out_proj(merge_heads(self._attend_causally(q, k, v, self.backend_for(x))))

    def _attend_causally(self, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        """q k v [B, T, H, K], filled up with zeros or not."""
        scale = self.head_dim**-0.5
        if backend == "flash-attn":
            return flash_attention(q, k, v, scale=scale)
        if backend == "sdpa":
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
        causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        return masked_attention(q, k, v, causal, "reference")

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> AttentionState:
        return AttentionState(*self._caches(batch_size, max_seq_len, device, dtype))

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        self.check_state(x, state)
        check_room(state.position, 1, state.keys.shape[1])
        y = self._step(x, state.keys, state.values, state.position, rows=state.keys.shape[1])
        return y, AttentionState(state.keys, state.values, state.position + 1)

    def prefill_empty(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        backend = self.backend_for(x)
        if backend == "reference" or state.keys.dtype != x.dtype:
            return self.prefill(x, state)
        self.check_state(x, state)
        length = x.shape[1]
        check_room(state.position, length, state.keys.shape[1])
        q, k, v = (
            widen(part, state.keys.shape[-1])
            for part in self._project(x, torch.arange(length, device=x.device), length)
        )
        state.keys[:, :length] = k
        state.values[:, :length] = v
        o = self._attend_causally(q, k, v, backend)[..., : self.head_dim]
        return self.out_proj(merge_heads(o)), AttentionState(state.keys, state.values, state.position + length)

    def prefill(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        self.check_state(x, state)
        length, capacity = x.shape[1], state.keys.shape[1]
        check_room(state.position, length, capacity)
        positions = state.position + torch.arange(length, device=x.device)
        q, k, v = self._project(x, positions, capacity)
        keys, values = self._write(state.keys, positions, k), self._write(state.values, positions, v)
        backend = self.backend_for(x)
        if self.backend == "auto" or keys.dtype != q.dtype or backends.wants_grad(q, keys, values):
            backend = self._beside_flash(backend)
        wide, scale = widen(q, keys.shape[-1]), self.head_dim**-0.5
        if backend == "flash-attn":
            o = flash_cached_attention(wide, keys, values, state.position + length, scale)
        else:
            seen = torch.arange(capacity, device=x.device)[None] <= positions[:, None]
            o = masked_attention(wide, keys.to(q.dtype), values.to(q.dtype), seen, backend, scale)
        return self.out_proj(merge_heads(o[..., : self.head_dim])), AttentionState(
            keys, values, state.position + length
        )
