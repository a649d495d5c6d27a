"""What the next kernel reads, asked for by the kernel before it: weights come into the L2 cache while something runs.

A product of few rows spends much of its time waiting for its first weights. The small kernel ahead of it leaves the
memory idle; it can ask for them, and need not wait.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_BYTES = 32 << 20  # what is asked for must not drive what is in use out of the cache
PROGRAMS = 128  # at least: one multiprocessor alone asks too slowly


@triton.jit
def fetch_ahead(p, size, BYTES, i, THREADS: tl.constexpr):
    """Program i of THREADS threads asks for its part of the `size` bytes at p, BYTES (a multiple of 16) a thread."""
    o = (i.to(tl.int64) * THREADS + tl.arange(0, THREADS)) * BYTES
    n = tl.minimum(tl.maximum(size - o, 0), BYTES).to(tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [p.to(tl.pointer_type(tl.uint8)) + o, n],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@functools.lru_cache
def _can_ask(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def fetched(ahead: Tensor | None) -> int:
    """Bytes of `ahead` that are asked for: 0 where the device has no such instruction."""
    if ahead is None or not _can_ask(ahead.device) or not ahead.is_contiguous() or ahead.data_ptr() % 16:
        return 0
    return min(ahead.numel() * ahead.element_size(), MOST_BYTES) // 16 * 16


def divided(size: int, programs: int, threads: int) -> int:
    """Bytes of each thread, a multiple of a cache line."""
    return triton.cdiv(triton.cdiv(size, programs * threads), 128) * 128
