"""Retention, the mixer of RetNet: linear attention with a fixed decay per head and rotated queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures import fla
from architectures.layers import merge_heads, rotary, split_heads, whole_sequences_only
from architectures.mixer import SequenceMixer, default_num_heads, divide_heads, require_at_least, require_positive
from architectures.registry import register
from kernels.linear_recurrence import MAX_TRITON_WIDTH, linear_recurrence, linear_recurrence_step


class RetNetState(NamedTuple):
    """`kv` [B, H, K, V]; `position` [] int64, the number of tokens seen, which the rotation needs."""

    kv: Tensor
    position: Tensor


@register("retnet", paper="arXiv:2307.08621")
class RetNet(SequenceMixer):
    """Multi-scale retention: S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), gamma_h = 1 - 2^(-5-h).

    RetNet (arXiv:2307.08621), section 2, eq. 6-8: q and k are rotated by their position, every head h decays at a rate
    of its own, and y = W_o (silu(W_g x) * RMSNorm(o)), the norm per head and without weights. Values are `expand_v` = 2
    times as wide as d_model. All projections start xavier-uniform with gain 2^-2.5, the last with 2^-1.

    xPos: the decay takes the place of xPos' scaling, as in the official code, and only the rotation is left; its
    frequencies are those of rotary embedding, 10000^(-2i/K), where the official code has 10000^(-i/(K/2 - 1)).
    The three rescalings of section 2.1 cancel in the norm that follows and are left out. `rotate` is on by
    default wherever the width of a head is even.

    Checked against fla's `naive_retention`. State: K V per head, the published count.

    Raises ValueError where num_heads does not divide d_model, or `rotate` is asked of an odd width.
    """

    backends = ("triton", "fla", "reference")

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        expand_v: int = 2,
        rotate: bool | None = None,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ):
        super().__init__(d_model, backend=backend)
        require_at_least(1, expand_v=expand_v)
        require_positive(norm_eps=norm_eps)
        self.num_heads = default_num_heads(d_model, 32) if num_heads is None else num_heads
        self.head_k_dim = divide_heads(d_model, self.num_heads)
        self.head_v_dim = expand_v * self.head_k_dim
        self.rotate = self.head_k_dim % 2 == 0 if rotate is None else rotate
        if self.rotate and self.head_k_dim % 2:
            raise ValueError(f"rotate=True needs an even width of a head, got {self.head_k_dim}")
        self.norm_eps = norm_eps
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, expand_v * d_model, bias=False)
        self.g_proj = nn.Linear(d_model, expand_v * d_model, bias=False)
        self.out_proj = nn.Linear(expand_v * d_model, d_model, bias=False)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def unsupported(self, backend, **case):
        if backend == "triton":
            return whole_sequences_only(self.head_k_dim, MAX_TRITON_WIDTH, named=self.backend == backend, **case)
        return fla.refusal(backend, "retention", self.head_k_dim, self.head_v_dim, **case)

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> RetNetState:
        like = self.like_parameters(device, dtype)
        return RetNetState(
            kv=torch.zeros(batch_size, self.num_heads, self.head_k_dim, self.head_v_dim, **like),
            position=torch.zeros((), dtype=torch.int64, device=like["device"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.empty_state(x))[0]

    def prefill(self, x: Tensor, state: RetNetState) -> tuple[Tensor, RetNetState]:
        self.check_state(x, state)
        return self._run(x, state)

    def step(self, x: Tensor, state: RetNetState) -> tuple[Tensor, RetNetState]:
        self.check_state(x, state)
        y, state = self._run(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def _run(self, x: Tensor, state: RetNetState) -> tuple[Tensor, RetNetState]:
        """x [B, T, D]."""
        backend = self.backend_for(x)
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotate:
            positions = state.position + torch.arange(x.shape[1], device=x.device)
            q, k = rotary(q, positions), rotary(k, positions)
        q = q * self.head_k_dim**-0.5
        if backend == "fla":
            o, kv = fla.linear_recurrence(q, k, v, self.log_decay(q.device, torch.float32), state.kv)
        else:
            o, kv = self._mix(q, k, v, state.kv, "triton" if backend == "triton" else "reference")
        o = merge_heads(F.rms_norm(o, o.shape[-1:], eps=self.norm_eps)) * F.silu(self.g_proj(x))
        return self.out_proj(o), RetNetState(kv, state.position + x.shape[1])

    def log_decay(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """log gamma [H]. Not a buffer: one cast to 16 bits with the model would lose what tells the heads apart."""
        return torch.log1p(-torch.exp2(-5 - torch.arange(self.num_heads, device=device, dtype=dtype)))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        """q k [B, T, H, K], v [B, T, H, V], kv [B, H, K, V] -> o [B, T, H, V], kv."""
        g = self.log_decay(q.device, torch.promote_types(q.dtype, torch.float32)).expand(q.shape[:-1])
        if q.shape[1] == 1:
            o, kv = linear_recurrence_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], kv)
            return o.unsqueeze(1), kv
        return linear_recurrence(q, k, v, g, initial_state=kv, output_final_state=True, backend=kernel)
