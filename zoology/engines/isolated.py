"""Calls in worker processes of their own: one that kills its process costs that call, and no other."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple

import torch


class Died(NamedTuple):
    """What there is instead of a result where the process died, or was ended because it took too long."""

    reason: str


def run_isolated(
    function: Callable,
    calls: Sequence[tuple],
    *,
    jobs: int,
    initializer: Callable | None = None,
    initargs: tuple = (),
    timeout: float | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (index of the call, what `function(*call)` returned, or Died), in the order in which they end.

    `jobs` processes stay for many calls, each started by `initializer(*initargs)`. One is replaced when it died, took
    more than `timeout` seconds for a call, or left its GPU unusable. What a call raises is raised here. Whoever stops
    asking early ends all processes and what they are in the middle of.
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    for numbered in enumerate(calls):
        todo.put(numbered)
    stopping = threading.Event()
    processes = [_Process(initializer, initargs) for _ in range(min(jobs, len(calls)))]

    def work(process: _Process) -> None:
        while not stopping.is_set():
            try:
                index, call = todo.get_nowait()
            except queue.Empty:
                break
            try:
                done.put((index, process.call(function, call, timeout), None))
            except BaseException as error:
                done.put((index, None, error))
        process.close()

    threads = [threading.Thread(target=work, args=(process,), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    try:
        for _ in calls:
            index, result, error = done.get()
            if error is not None:
                raise error
            yield index, result
    except BaseException:  # a generator that is closed included
        stopping.set()
        for process in processes:
            process.kill()
        raise
    for thread in threads:
        thread.join()


class _Process:
    """One worker process, started when it is needed."""

    def __init__(self, initializer: Callable | None, initargs: tuple):
        self.initializer, self.initargs = initializer, initargs
        self.pool: ProcessPoolExecutor | None = None
        self.pid: int | None = None
        self.killed = False

    def call(self, function: Callable, arguments: tuple, timeout: float | None) -> Any:
        try:
            if self.pool is None:
                self.pool = ProcessPoolExecutor(1, get_context("spawn"), _start, (self.initializer, self.initargs))
                self.pid = self.pool.submit(os.getpid).result()
            if self.killed:
                self.kill()
            future = self.pool.submit(_call, function, arguments)
            if not wait([future], timeout).done:
                self._end()
                self.close()
                return Died(f"no answer within {timeout:g} s")
            result, usable = future.result()
        except BrokenProcessPool:
            self.close()
            return Died("its process died")
        if not usable:
            self.close()
        return result

    def kill(self) -> None:
        """End the process, or the one that is just being started once it is there."""
        self.killed = True
        self._end()

    def _end(self) -> None:
        if (pid := self.pid) is not None:  # another thread may take it away
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = self.pid = None


def _start(initializer: Callable | None, initargs: tuple) -> None:
    def leave_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _call(function: Callable, arguments: tuple) -> tuple[Any, bool]:
    """The result, and whether the process can go on: after an illegal access every use of its GPU raises."""
    result = function(*arguments)
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return result, False
    return result, True
