"""Parts that several architectures share: short causal convolution, rotary embedding, head splitting.

Axes: B batch, T time, D channels, H heads, K head width.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.mixer import require_at_least
from kernels.convolution_step import convolution_step, triton_refusal
from kernels.short_convolution import short_convolution


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., H * K] -> [..., H, K]."""
    return x.unflatten(-1, (num_heads, -1))


def merge_heads(x: Tensor) -> Tensor:
    """[..., H, K] -> [..., H * K]."""
    return x.flatten(-2)


def whole_sequences_only(
    width: int, widest: int, *, named: bool, device: torch.device, dtype: torch.dtype, seq_len: int
) -> str | None:
    """Why Triton kernels that read sequences as a whole, of states up to `widest`, do not run these; or None.

    Single tokens are left to a backend with a kernel for them, unless this one is `named`.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the dtype is {dtype}; allowed: bfloat16, float16, float32"
    if width > widest:
        return f"states have width {width}; allowed: up to {widest}"
    if seq_len == 1 and not named:
        return "it is for whole sequences, not for single tokens"
    return None


def check_room(position: Tensor, length: int, capacity: int) -> None:
    """Refuse tokens beyond the capacity of a state that grows with the sequence. Raises ValueError."""
    # Reading the position on a GPU would wait for it; what can be told there is the length alone.
    seen = int(position) if position.device.type == "cpu" else 0
    if seen + length > capacity:
        raise ValueError(f"the state holds max_seq_len={capacity} tokens, {seen} are in it, {length} more came")


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over a few tokens: y_t = sum_j w_j x_{t-j} (+ b), j < kernel_size.

    Its memory is the last kernel_size - 1 inputs, [B, kernel_size - 1, D], oldest first, zeros before the
    sequence starts. Weights are initialised as `nn.Conv1d` does. Raises ValueError if kernel_size < 1.
    """

    def __init__(self, d_model: int, kernel_size: int, *, bias: bool = True, activation: str | None = None):
        super().__init__()
        require_at_least(1, kernel_size=kernel_size)
        if activation not in (None, "silu"):
            raise ValueError(f"activation={activation!r} is not one of None, 'silu'")
        self.kernel_size = kernel_size
        self.activation = activation
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(d_model, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(d_model).uniform_(-bound, bound)) if bias else None

    def init_tail(self, batch_size: int, *, device=None, dtype=None) -> Tensor:
        """Zero memory [B, kernel_size - 1, D]."""
        return torch.zeros(batch_size, self.kernel_size - 1, self.weight.shape[0], device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D], from an empty memory."""
        return self._convolve(F.pad(x, (0, 0, self.kernel_size - 1, 0)), x.shape[1])

    def prefill(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D], tail -> [B, T, D], tail after the T tokens."""
        extended = torch.cat([tail.to(x.dtype), x], dim=1)
        return self._convolve(extended, x.shape[1]), extended[:, x.shape[1] :].to(tail.dtype)

    def prefill_by_kernel(self, x: Tensor, tail: Tensor, *, empty: bool = False) -> tuple[Tensor, Tensor]:
        """`prefill` by `kernels.short_convolution`, one pass over x each way; `empty`: the tail is all zeros."""
        # In the dtype of x: under autocast float32 weights would widen what the backward pass reads.
        weight, bias = (None if part is None else part.to(x.dtype) for part in (self.weight, self.bias))
        y = short_convolution(x, weight, bias, initial_state=None if empty else tail)
        size = self.kernel_size - 1
        before = x if x.shape[1] >= size else torch.cat([tail.to(x.dtype), x], dim=1)
        after = before[:, before.shape[1] - size :].to(tail.dtype)
        return F.silu(y) if self.activation == "silu" else y, after

    def step(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, D], tail -> [B, D], tail."""
        y, tail = self.prefill(x.unsqueeze(1), tail)
        return y.squeeze(1), tail

    def gated_step(
        self,
        x: Tensor,
        tail: Tensor,
        gate: Tensor,
        *,
        x_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor, str]:
        """`step` times gate [B, D], by `kernels.convolution_step` where it can -> [B, D], tail, the backend that ran.

        x_bias and gate_bias [D] are added to x and gate before. The tail may be written to.
        """
        biases = {"x_bias": x_bias, "gate_bias": gate_bias}
        given = [part for part in (x, tail, self.weight, self.bias, gate, x_bias, gate_bias) if part is not None]
        if backend == "reference" or triton_refusal(given) is not None:
            y, tail = self.step(x if x_bias is None else x + x_bias, tail)
            return y * (gate if gate_bias is None else gate + gate_bias), tail, "reference"
        y, tail = convolution_step(
            x, tail, self.weight, self.bias, activation=self.activation, gate=gate, backend="triton", **biases
        )
        return y, tail, "triton"

    def _convolve(self, extended: Tensor, length: int) -> Tensor:
        # A few shifted products are faster than conv1d on CPU, and fuse into one kernel under torch.compile.
        y = extended[:, self.kernel_size - 1 :] * self.weight[:, 0]
        for lag in range(1, self.kernel_size):
            start = self.kernel_size - 1 - lag
            y = y + extended[:, start : start + length] * self.weight[:, lag]
        if self.bias is not None:
            y = y + self.bias
        return F.silu(y) if self.activation == "silu" else y


def with_skip(taps: Tensor, skip: Tensor) -> Tensor:
    """Taps [L, ...] of a convolution that also adds `skip` [...] times its input: no pass over the input for that."""
    return torch.cat([taps[:1] + skip, taps[1:]])


def token_shift(x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The input one token earlier, x [B, T, D] or [B, D] and last [B, D] -> as x, and the new last in its own dtype."""
    earlier = last.to(x.dtype)
    if x.ndim == 2:
        return earlier, x.to(last.dtype)
    return torch.cat([earlier.unsqueeze(1), x[:, :-1]], dim=1), x[:, -1].to(last.dtype)


def rotary(
    x: Tensor, positions: Tensor, *, fraction: float = 1.0, base: float = 10000.0, rows: int | None = None
) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) on the first `fraction` of the head width.

    x [B, T, H, K], positions [T] -> [B, T, H, K]. The rotated width must be even. Where all positions are known to be
    below `rows`, the angles are looked up and not computed: a compiler would compute them for every element they turn.
    """
    width = int(x.shape[-1] * fraction)
    if width % 2:
        raise ValueError(f"rotary embedding needs an even width, got {width} of head_dim {x.shape[-1]}")
    exact = torch.promote_types(x.dtype, torch.float32)
    if rows is not None and exact == torch.float32:
        cos, sin = rotary_turns(positions, rows, width, base)[:, None].chunk(2, dim=-1)
    else:
        exponents = torch.arange(0, width, 2, device=x.device, dtype=exact) * (-math.log2(base) / width)
        angles = positions.to(exact)[:, None] * torch.exp2(exponents)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., width:]], dim=-1)
    return turned.to(x.dtype)


@torch.library.custom_op(
    "zoology::rotary_turns",
    mutates_args=(),
    schema="(Tensor positions, SymInt rows, int width, float base) -> Tensor",
)
def rotary_turns(positions: Tensor, rows: int, width: int, base: float) -> Tensor:
    """Cosines and sines [T, width], float32, of the angles at positions [T] below `rows`."""
    table = _rotary_table(1 << max(0, rows - 1).bit_length(), width, base, positions.device)
    return table.index_select(0, positions)


@rotary_turns.register_fake
def _(positions, rows, width, base):
    return positions.new_empty(positions.shape[0], width, dtype=torch.float32)


@functools.lru_cache(maxsize=16)
def _rotary_table(rows: int, width: int, base: float, device: torch.device) -> Tensor:
    frequencies = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angles = torch.arange(rows, device=device, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def step_size_bias(num: int, *, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Biases [num] whose softplus is log-uniform in [low, high], the step sizes of Mamba (arXiv:2312.00752, 3.6)."""
    step = torch.exp(torch.rand(num) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return step + torch.log(-torch.expm1(-step))
