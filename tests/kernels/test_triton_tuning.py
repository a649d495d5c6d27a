"""Candidates of autotuned kernels: compiled in threads before the first is timed, and nothing else changes."""

import threading

import pytest
import torch

from kernels.triton_tuning import compiled_side_by_side

pytest.importorskip("triton")


class NothingToLaunchOn(Exception):
    pass


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A kernel with three candidates, the last of which does not compile; a GPU that is only compiled for; a log."""
    import triton
    import triton.compiler
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Device:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def launcher_cls(self, *args):
            raise NothingToLaunchOn

    log = []

    def compile_and_tell(*args, **options):
        log.append("compiled here" if threading.current_thread() is threading.main_thread() else "compiled beside")
        return compiled(*args, **options)

    def time_it(call, quantiles):
        log.append("timed")
        return [float(len(log))] * 3

    compiled = triton.compiler.compile
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.compiler, "compile", compile_and_tell)

    @triton.autotune([triton.Config({"B": width}) for width in (16, 32, 64)], key=["n"], do_bench=time_it)
    @triton.jit
    def double(x, n, B: tl.constexpr):
        tl.static_assert(B < 64)
        o_n = tl.arange(0, B)
        tl.store(x + o_n, 2 * tl.load(x + o_n, mask=o_n < n), mask=o_n < n)

    monkeypatch.setattr(driver, "_active", Device())
    return double, log


def call(double):
    with pytest.raises(NothingToLaunchOn):
        double[(1,)](torch.ones(16), 16)


def test_all_candidates_are_compiled_in_threads_before_the_first_is_timed(tuned):
    double, log = tuned
    with compiled_side_by_side(torch.device("cuda"), threads=2):
        call(double)
    # The one that does not compile fails by itself, where it is timed.
    assert log[:6] == ["compiled beside"] * 3 + ["timed"] * 3
    assert "compiled here" not in log


def test_afterwards_and_without_cuda_triton_is_as_before(tuned):
    from triton.runtime.autotuner import Autotuner

    double, log = tuned
    methods = Autotuner._bench, Autotuner.prune_configs
    with compiled_side_by_side(torch.device("cpu")):
        call(double)
    with pytest.raises(RuntimeError, match="wrong"), compiled_side_by_side(torch.device("cuda")):
        raise RuntimeError("wrong")
    assert (Autotuner._bench, Autotuner.prune_configs) == methods
    assert log[:3] == ["timed"] * 3
    assert "compiled beside" not in log
