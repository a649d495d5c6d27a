"""Operations of sequence mixers: one public function each, a plain-PyTorch reference and faster backends behind it.

Each line below imports public functions and plain PyTorch only; a backend is imported when it first runs. They
are imported at once and not on demand, because a folder and its function share a name, and Python would
otherwise let whichever was imported last win.
"""

from kernels.delta_rule import delta_rule, delta_rule_step, dplr_delta_rule, dplr_delta_rule_step
from kernels.fft_conv import fft_conv, fft_conv_step
from kernels.linear_cross_entropy import linear_argmax, linear_cross_entropy
from kernels.prefix_linear_attention import prefix_linear_attention
from kernels.taylor_linear_attention import taylor_linear_attention, taylor_linear_attention_step

__all__ = [
    "delta_rule",
    "delta_rule_step",
    "dplr_delta_rule",
    "dplr_delta_rule_step",
    "fft_conv",
    "fft_conv_step",
    "linear_argmax",
    "linear_cross_entropy",
    "prefix_linear_attention",
    "taylor_linear_attention",
    "taylor_linear_attention_step",
]
