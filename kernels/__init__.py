"""Operations of sequence mixers: one public function each, a plain-PyTorch reference and faster backends behind it.

Each line below imports public functions and plain PyTorch only; a backend is imported when it first runs. They
are imported at once and not on demand, because a folder and its function share a name, and Python would
otherwise let whichever was imported last win.
"""

from kernels.add_norm import add_norm
from kernels.cache_update import cache_update
from kernels.cached_attention import cached_attention
from kernels.convolution_step import convolution_step
from kernels.delta_rule import delta_rule, delta_rule_step, dplr_delta_rule, dplr_delta_rule_step
from kernels.fft_conv import fft_conv, fft_conv_step
from kernels.gated_norm import gated_norm
from kernels.linear_cross_entropy import linear_argmax, linear_cross_entropy
from kernels.linear_recurrence import linear_recurrence, linear_recurrence_step
from kernels.next_token import next_token
from kernels.prefix_linear_attention import prefix_linear_attention
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.short_convolution import short_convolution
from kernels.taylor_linear_attention import taylor_linear_attention, taylor_linear_attention_step
from kernels.wkv import wkv, wkv_step

__all__ = [
    "add_norm",
    "cache_update",
    "cached_attention",
    "convolution_step",
    "delta_rule",
    "delta_rule_step",
    "dplr_delta_rule",
    "dplr_delta_rule_step",
    "fft_conv",
    "fft_conv_step",
    "gated_norm",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_recurrence",
    "linear_recurrence_step",
    "next_token",
    "prefix_linear_attention",
    "selective_scan",
    "selective_scan_step",
    "short_convolution",
    "taylor_linear_attention",
    "taylor_linear_attention_step",
    "wkv",
    "wkv_step",
]
