"""The WKV operation of RWKV-4 in plain PyTorch: the specification, token by token, and a parallel form.

A weighted average of the values with weights that decay by w per token and channel, in which the current token has a
bonus u instead:

    o_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{k_i - (t-1-i) w} + e^{u + k_t})

The memory of the tokens so far is that average a and the logarithm l of its total weight. Two neighbouring stretches
of tokens, the later one n tokens long, make one by

    l = logaddexp(l_1 - n w, l_2),    a = a_1 + sigmoid(l_2 - l_1 + n w) (a_2 - a_1),

which exponentiates nothing positive and is associative, so that all prefixes take O(log T) parallel steps and O(T)
work: neighbours are merged, the half as long sequence is scanned, and every second prefix is completed. (The
published kernel carries numerator, denominator and their common exponent, three numbers where these two say the same.)
An empty memory has l = -inf, a = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear_recurrence.reference import accumulation_dtype


class WKVState(NamedTuple):
    """`average` [B, D], the weighted average of the values so far, and `log_weight` [B, D], the log of its weight.

    The log of the weight is kept in float32 at least: in 16 bits an error of its last digit is a factor of its own.
    """

    average: Tensor
    log_weight: Tensor

    @classmethod
    def empty(cls, batch_size: int, d_model: int, *, device=None, dtype=None) -> WKVState:
        """The memory before the first token."""
        average = torch.zeros(batch_size, d_model, device=device, dtype=dtype)
        wide = torch.promote_types(average.dtype, torch.float32)
        return cls(average, torch.full_like(average, -torch.inf, dtype=wide))


def merge(earlier: WKVState, later: WKVState, decay: Tensor) -> WKVState:
    """The two stretches as one; `decay` [D] is what the later one costs the earlier one in log weight."""
    faded = earlier.log_weight - decay
    share = torch.sigmoid(later.log_weight - faded)
    average = torch.lerp(earlier.average, later.average, share)
    return WKVState(average, torch.logaddexp(faded, later.log_weight))


def wkv_step_reference(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: WKVState) -> tuple[Tensor, WKVState]:
    """One token: k v [B, D], decay bonus [D]; the state is rounded to its own dtype after the output."""
    acc = accumulation_dtype(k, state.average)
    out_dtype, given = v.dtype, state
    k, v, decay, bonus = (x.to(acc) for x in (k, v, decay, bonus))
    state = WKVState(*(x.to(acc) for x in state))
    o = torch.lerp(state.average, v, torch.sigmoid(k + bonus - state.log_weight))
    state = merge(state, WKVState(v, k), decay)
    return o.to(out_dtype), WKVState(*(x.to(old.dtype) for x, old in zip(state, given)))


def naive_wkv(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, *, initial_state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """One token at a time; shapes as in `wkv`. The specification."""
    state = initial_state or WKVState.empty(k.shape[0], k.shape[2], device=k.device, dtype=accumulation_dtype(k))
    outputs = []
    for t in range(k.shape[1]):
        o, state = wkv_step_reference(k[:, t], v[:, t], decay, bonus, state)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def wkv_reference(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, *, initial_state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Parallel form of `naive_wkv`."""
    acc = accumulation_dtype(k, None if initial_state is None else initial_state.average)
    out_dtype = v.dtype
    k, v, decay, bonus = (x.to(acc) for x in (k, v, decay, bonus))
    start = initial_state or WKVState.empty(k.shape[0], k.shape[2], device=k.device, dtype=acc)
    tokens = WKVState(*(torch.cat([s.to(acc).unsqueeze(1), x], dim=1) for s, x in zip(start, (v, k))))
    after = _prefixes(tokens, decay)
    before = WKVState(*(x[:, :-1] for x in after))
    o = torch.lerp(before.average, v, torch.sigmoid(k + bonus - before.log_weight))
    return o.to(out_dtype), WKVState(*(x[:, -1].to(old.dtype) for x, old in zip(after, start)))


def _prefixes(parts: WKVState, decay: Tensor) -> WKVState:
    """All prefixes of [B, T, D] neighbouring stretches, each of which fades those before it by `decay`."""
    length = parts.average.shape[1]
    if length == 1:
        return parts
    evens, odds = (WKVState(*(x[:, start::2] for x in parts)) for start in (0, 1))
    paired = merge(WKVState(*(x[:, : length // 2] for x in evens)), odds, decay)
    at_odds = _prefixes(paired, 2 * decay)
    first, rest = ((WKVState(*(x[:, part] for x in evens))) for part in (slice(0, 1), slice(1, None)))
    before = WKVState(*(x[:, : rest.average.shape[1]] for x in at_odds))
    at_evens = merge(before, rest, decay)
    return WKVState(*(_interleave(torch.cat([f, e], 1), o) for f, e, o in zip(first, at_evens, at_odds)))


def _interleave(evens: Tensor, odds: Tensor) -> Tensor:
    num = odds.shape[1]
    paired = torch.stack([evens[:, :num], odds], dim=2).flatten(1, 2)
    return paired if evens.shape[1] == num else torch.cat([paired, evens[:, num:]], dim=1)
