"""What `precision: fp32 | tf32 | bf16` means on a device, and whether the device has it.

fp32: every product in float32. tf32: matrix products of float32 tensors may round their inputs to 10 bits of
mantissa. bf16: as under autocast, matrix products and mixers compute in bfloat16; weights, the residual stream,
norms, the loss and the optimizer stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "tf32", "bf16")


def check_precision(precision: str, device: torch.device | str) -> None:
    """Raise ValueError, saying what the device lacks, unless it can compute in `precision`."""
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"train.precision={precision!r}: {name} has compute capability {capability[0]}.{capability[1]}, "
            f"{precision} needs 8.0 or later; allowed here: fp32"
        )
    if precision == "tf32":
        raise ValueError(
            f"train.precision='tf32': a mode of NVIDIA tensor cores, the device is {device.type!r}; allowed: fp32, bf16"
        )


@contextmanager
def computing_in(precision: str, device: torch.device | str) -> Iterator[None]:
    """Whether float32 products may use TF32, for the duration; what was set before is restored. CPUs: no effect."""
    if torch.device(device).type != "cuda":
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """The autocast region of a forward pass: bfloat16 for "bf16", off otherwise.

    Without its cache of cast weights, which would outlive the recording of a CUDA graph.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
