"""The program for compute-sanitizer: it launches every kernel there is, and says what it does not know."""

import re
from pathlib import Path

import pytest
import torch

import kernels
from kernels import sanitize


def test_unknown_operations_are_refused(capsys):
    with pytest.raises(SystemExit):
        sanitize.main(["fft"])
    assert "unknown operation 'fft'; allowed: taylor_linear_attention, " in capsys.readouterr().err


@pytest.mark.gpu
def test_every_kernel_is_launched():
    launched = {}
    for op in sanitize.OPS:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            sanitize.run(op, "cuda", torch.bfloat16)
            torch.cuda.synchronize()
        launched[op] = {event.key for event in profile.key_averages()}
    missing = set()
    for source in Path(kernels.__file__).parent.glob("*/triton*.py"):
        defined = set(re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.MULTILINE))
        seen = set().union(*(names for op, names in launched.items() if op.startswith(source.parent.name)))
        missing |= {f"{source.parent.name}.{name}" for name in defined - seen}
    assert missing == set()
