"""The sweep says what it trains and, in words, which of the zoo it leaves out."""

import re
from pathlib import Path

import pytest

import architectures
from zoology.runner import plan

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "mqar_sweep.py"


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_what_is_left_out_is_named(scale):
    words = set(re.findall(r"\w+", getattr(plan.load_module(EXPERIMENT), scale).__doc__.partition("Left out")[2]))
    trained = {layer.name for run in plan.load_sweep(EXPERIMENT, scale) for layer in run.model.layers}
    built_in = set(architectures.names()) - set(architectures.added_names())
    assert words & set(architectures.names()) == built_in - trained
