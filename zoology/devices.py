"""Which devices `--device` means, one rule for every command, and how many cores there are."""

from __future__ import annotations

import os

import torch


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_devices(text: str) -> list[str]:
    """Devices of "auto", "cpu", "cuda" (all of them), or a list such as "cuda:0,cuda:2".

    "auto" is all GPUs, and the CPU where there are none. Raises ValueError for what this machine lacks, and for "auto"
    where CUDA_VISIBLE_DEVICES names GPUs of which torch sees none: falling back to the CPU would be found out hours
    later.
    """
    count = torch.cuda.device_count()
    if text == "auto":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if not count and visible.strip() not in ("", "-1"):
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES={visible}: torch {torch.__version__} sees none of these GPUs; "
                "correct the variable or unset it, or take --device cpu"
            )
        return [f"cuda:{index}" for index in range(count)] or ["cpu"]
    if text == "cuda" and count:
        return [f"cuda:{index}" for index in range(count)]
    names = [_checked(name, text, count) for name in text.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"--device {text}: names a device twice")
    return names


def choose_device(text: str) -> torch.device:
    """The device of a command that needs one: the first of "auto" and "cuda". Raises ValueError as above."""
    names = resolve_devices(text)
    if text in ("auto", "cuda"):
        return torch.device(names[0].partition(":")[0])
    if len(names) > 1:
        raise ValueError(f"--device {text}: must be one device here")
    return torch.device(names[0])


def _checked(name: str, text: str, count: int) -> str:
    """The device's name as others write it; `count` GPUs are there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {text}: no device of torch; allowed are auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda":
        if (device.index or 0) >= count:
            raise ValueError(f"--device {text}: torch sees {count} CUDA devices here")
        return f"cuda:{device.index or 0}"
    try:
        usable = not torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, ImportError):
        usable = False
    if not usable:
        raise ValueError(f"--device {text}: this torch ({torch.__version__}) cannot use it here")
    return device.type if device.type == "cpu" else str(device)
