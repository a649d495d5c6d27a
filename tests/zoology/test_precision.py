"""Precision: bfloat16 is near float32, and what a device lacks is refused."""

import pytest
import torch

from zoology.precision import check_precision
from zoology.train import train

pytestmark = pytest.mark.usefixtures("no_loops_left")


def test_bf16_is_near_fp32_and_keeps_float32_weights(small_run):
    full = train(small_run(epochs=3), mode="static")
    for mode in ("static", "eager"):
        low = train(small_run(epochs=3, precision="bf16"), mode=mode)
        assert {parameter.dtype for parameter in low.model.parameters()} == {torch.float32}
        for one, other in zip(low.epochs, full.epochs):
            assert one.loss != other.loss
            assert one.loss == pytest.approx(other.loss, rel=2e-2)


def test_a_precision_the_device_lacks_is_refused_at_the_start(small_run):
    with pytest.raises(ValueError, match=r"train.precision='tf32': a mode of NVIDIA tensor cores, .* allowed: fp32"):
        train(small_run(precision="tf32"))
    with pytest.raises(ValueError, match="precision='fp8': must be one of fp32, tf32, bf16"):
        check_precision("fp8", "cpu")
