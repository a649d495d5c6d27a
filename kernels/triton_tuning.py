"""Candidates of autotuned Triton kernels, compiled side by side.

Triton compiles a kernel's candidates one after the other, each just before it is timed. fla's kernels have up to 48:
one layer in bfloat16 kept a core busy for two to four minutes before its first result (fla 0.6, Triton 3.6, H200).
Threads share that work well, as the compiler holds no lock of Python's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def compiled_side_by_side(device: torch.device, *, threads: int | None = None) -> Iterator[None]:
    """Until the end of the block, whatever autotuned kernel is first called compiles all its candidates at once.

    What is tuned, how it is timed and what is kept on disk stay Triton's. Does nothing without CUDA, or with a Triton
    that compiles in no threads. `threads`: one per core, at most 8, when None; each needs some 100 MB.
    """
    if device.type != "cuda" or not _possible():
        yield
        return
    from triton.runtime.autotuner import Autotuner

    prune_configs, bench = Autotuner.prune_configs, Autotuner._bench
    waiting: dict[Autotuner, list] = {}
    threads = threads or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())

    def remember(tuner, *arguments):
        waiting[tuner] = prune_configs(tuner, *arguments)
        return waiting[tuner]

    def compile_and_bench(tuner, *args, config, **meta):
        # The first candidate finds the others waiting. Where disk knows the best one, nothing is timed or compiled.
        _compile(tuner, waiting.pop(tuner, ()), args, meta, threads)
        return bench(tuner, *args, config=config, **meta)

    Autotuner.prune_configs, Autotuner._bench = remember, compile_and_bench
    try:
        yield
    finally:
        Autotuner.prune_configs, Autotuner._bench = prune_configs, bench


def _possible() -> bool:
    try:
        from triton import AsyncCompileMode
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return False
    return hasattr(AsyncCompileMode, "submit") and hasattr(Autotuner, "_bench")


def _compile(tuner, configs: list, args: tuple, meta: dict, threads: int) -> None:
    from triton import AsyncCompileMode

    # An error is left to the candidate it belongs to: it comes again where that is timed.
    with ThreadPoolExecutor(threads) as executor, AsyncCompileMode(executor, ignore_errors=True):
        for config in configs:
            tuner.fn.run(*args, **{**meta, "warmup": True, **config.all_kwargs()})
