"""Sliding-window attention: softmax attention over the last `window` tokens, kept in a ring buffer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from architectures.attention import SelfAttention, flash_attention, masked_attention
from architectures.layers import merge_heads
from architectures.mixer import require_at_least
from architectures.registry import register


class SlidingWindowState(NamedTuple):
    """Ring buffer: token t sits in slot t mod window."""

    window_k: Tensor  # [B, window, H, K'], K' the width that `cache_width` gives
    window_v: Tensor  # [B, window, H, K']
    position: Tensor  # [], int64, tokens seen


@register("sliding_window", paper="arXiv:2004.05150")
class SlidingWindow(SelfAttention):
    """Causal softmax attention over the last `window` tokens, the current one included.

    Longformer (arXiv:2004.05150), the baseline of Based (arXiv:2402.18668). The state is a ring buffer of
    min(window, max_seq_len) keys and values: 2 window D elements, as published. With flash-attn the ring buffer is read
    by sdpa. Checked against PyTorch's `nn.MultiheadAttention` with a mask, weights copied over.
    """

    def __init__(
        self,
        d_model: int,
        *,
        window: int = 64,
        num_heads: int = 1,
        rotary_fraction: float = 0.0,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__(d_model, num_heads=num_heads, rotary_fraction=rotary_fraction, bias=bias, backend=backend)
        require_at_least(1, window=window)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        positions = torch.arange(x.shape[1], device=x.device)
        q, k, v = self._project(x, positions)
        o = self._attend_alone(q, k, v, positions, self.backend_for(x))
        return self.out_proj(merge_heads(o))

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None) -> SlidingWindowState:
        return SlidingWindowState(*self._caches(batch_size, min(self.window, max_seq_len), device, dtype))

    def step(self, x: Tensor, state: SlidingWindowState) -> tuple[Tensor, SlidingWindowState]:
        self.check_state(x, state)
        y = self._step(x, state.window_k, state.window_v, state.position)
        return y, SlidingWindowState(state.window_k, state.window_v, state.position + 1)

    def prefill_empty(self, x: Tensor, state: SlidingWindowState) -> tuple[Tensor, SlidingWindowState]:
        self.check_state(x, state)
        positions = torch.arange(x.shape[1], device=x.device)
        q, k, v = self._project(x, positions, x.shape[1])
        o = self._attend_alone(q, k, v, positions, self.backend_for(x))
        return self.out_proj(merge_heads(o)), self._keep(k, v, positions, state)

    def prefill(self, x: Tensor, state: SlidingWindowState) -> tuple[Tensor, SlidingWindowState]:
        self.check_state(x, state)
        length, slots = x.shape[1], state.window_k.shape[1]
        positions = state.position + torch.arange(length, device=x.device)
        q, k, v = self._project(x, positions)
        # Slot s holds the latest earlier token t with t mod slots == s; slots not yet filled get t < 0.
        slot = torch.arange(slots, device=x.device)
        held = state.position - 1 - (state.position - 1 - slot) % slots
        # Only the first tokens reach back into the ring buffer: out of order and partly empty, it needs a mask.
        first = min(length, slots)
        held_k, held_v = (part[..., : self.head_dim].to(k.dtype) for part in (state.window_k, state.window_v))
        keys, values = torch.cat([held_k, k[:, :first]], dim=1), torch.cat([held_v, v[:, :first]], dim=1)
        backend = self.backend_for(x)
        of = torch.cat([held, positions[:first]])
        o = self._attend(q[:, :first], keys, values, positions[:first], of, self._beside_flash(backend))
        if first < length:
            o = torch.cat([o, self._attend_alone(q, k, v, positions, backend)[:, first:]], dim=1)
        return self.out_proj(merge_heads(o)), self._keep(k, v, positions, state)

    def _keep(self, k: Tensor, v: Tensor, positions: Tensor, state: SlidingWindowState) -> SlidingWindowState:
        """The state after tokens at `positions` [T]."""
        length, slots = k.shape[1], state.window_k.shape[1]
        kept = min(length, slots)
        into = positions[length - kept :] % slots
        self._write(state.window_k, into, k[:, length - kept :])
        self._write(state.window_v, into, v[:, length - kept :])
        return SlidingWindowState(state.window_k, state.window_v, state.position + length)

    def _attend_alone(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, backend: str) -> Tensor:
        """Tokens that read each other within the window, and nothing else."""
        if backend == "flash-attn":
            return flash_attention(q, k, v, window=self.window)
        return self._attend(q, k, v, positions, positions, backend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, of: Tensor, backend: str) -> Tensor:
        """Queries at positions `at` [T] read keys of positions `of` [S] that lie in their window."""
        age = at[:, None] - of[None, :]
        readable = (age >= 0) & (age < self.window) & (of >= 0)
        return masked_attention(q, k, v, readable, backend)
