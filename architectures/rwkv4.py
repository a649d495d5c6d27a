"""RWKV-4: an average of the values with weights that decay, gated, one number per channel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from architectures.layers import token_shift
from architectures.mixer import SequenceMixer, depth_and_height
from architectures.registry import register
from kernels.wkv import WKVState, wkv, wkv_step


class RWKV4State(NamedTuple):
    """`wkv`, the `average` and `log_weight` [B, D] of the values so far; `shift` [B, D], the last input."""

    wkv: WKVState
    shift: Tensor


@register("rwkv4", paper="arXiv:2305.13048")
class RWKV4(SequenceMixer):
    """RWKV-4 time mixing: y_t = W_o (sigmoid(r_t) * wkv_t), wkv_t an average of the values weighted by e^{k_i} and age.

    RWKV (arXiv:2305.13048), section 3.1, eq. 11-18:

        r, k, v = W_r, W_k, W_v applied to mu x_t + (1 - mu) x_{t-1}, each with its own mu in [0, 1]^D
        wkv_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same without v),   w = exp(time_decay)

    The channel mixing of the paper is a channel mixer and not part of this. Initialisation is the official one
    (BlinkDL/RWKV-LM, RWKV-v4): mu, decay and u vary over the channels and with `layer_idx` of `n_layers`; W_k, W_r
    and W_o start at zero, W_v orthogonal.

    Checked against transformers' `RwkvSelfAttention`, weights copied over. Its state is numerator, denominator and
    exponent, 3 d_model, beside the d_model of the token shift; the same memory is 2 + 1 times d_model here.
    """

    backends = ("reference",)

    def __init__(self, d_model: int, *, layer_idx: int = 0, n_layers: int = 1, backend: str = "auto"):
        super().__init__(d_model, backend=backend)
        depth, height = depth_and_height(layer_idx, n_layers)
        channel = torch.arange(d_model)
        ramp, mix = channel / max(1, d_model - 1), channel / d_model
        self.time_decay = nn.Parameter(-5 + 8 * ramp ** (0.7 + 1.3 * depth))
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        self.time_mix_k = nn.Parameter(mix**height)
        self.time_mix_v = nn.Parameter(mix**height + 0.3 * depth)
        self.time_mix_r = nn.Parameter(mix ** (0.5 * height))
        self.key, self.value, self.receptance, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        nn.init.orthogonal_(self.value.weight)
        for layer in (self.key, self.receptance, self.output):
            nn.init.zeros_(layer.weight)

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> RWKV4State:
        like = self.like_parameters(device, dtype)
        empty = WKVState.empty(batch_size, self.d_model, **like)
        return RWKV4State(empty, torch.zeros(batch_size, self.d_model, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.empty_state(x))[0]

    def prefill(self, x: Tensor, state: RWKV4State) -> tuple[Tensor, RWKV4State]:
        self.check_state(x, state)
        return self._run(x, state)

    def step(self, x: Tensor, state: RWKV4State) -> tuple[Tensor, RWKV4State]:
        self.check_state(x, state)
        return self._run(x, state)

    def _run(self, x: Tensor, state: RWKV4State) -> tuple[Tensor, RWKV4State]:
        """x [B, T, D] or, one token, [B, D]."""
        earlier, last = token_shift(x, state.shift)
        r, k, v = (
            layer(torch.lerp(earlier, x, mix.to(x.dtype)))
            for layer, mix in (
                (self.receptance, self.time_mix_r),
                (self.key, self.time_mix_k),
                (self.value, self.time_mix_v),
            )
        )
        o, memory = self._mix(k, v, state.wkv)
        return self.output(torch.sigmoid(r) * o), RWKV4State(memory, last)

    def _mix(self, k: Tensor, v: Tensor, memory: WKVState) -> tuple[Tensor, WKVState]:
        decay = self.time_decay.to(torch.promote_types(k.dtype, torch.float32)).exp()
        if k.ndim == 2:
            return wkv_step(k, v, decay, self.time_first, memory)
        return wkv(k, v, decay, self.time_first, initial_state=memory)
