"""Kernels of a decode step that are launched before the one ahead is done: programmatic dependent launch.

What a launch costs then passes while the last programs ahead are still at work. Everything that a kernel reads or
writes comes after `wait_for_kernels_ahead`, which returns when all of them are done and what they wrote is visible.

Source: CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"; Hopper and later.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # before Triton 3.3
    gdc_wait = None


@triton.jit
def wait_for_kernels_ahead(EARLY: tl.constexpr):
    """The first line of a kernel that is launched with `early_launch`."""
    if EARLY:
        gdc_wait()


@functools.cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Options of such a launch on `device`; where there is none, those of any other."""
    if gdc_wait is None or device.type != "cuda" or torch.version.hip:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True} if torch.cuda.get_device_capability(device)[0] >= 9 else {"EARLY": False}
