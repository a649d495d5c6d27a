"""Small runs that several test files share."""

import pytest

from zoology.config import DataConfig, ModelConfig, RunConfig, Slice, TrainConfig, layer
from zoology.tasks import MQAR


def tiny_run(layers=("base_conv", "attention"), *, lr=1e-2, epochs=1, num_examples=64, seed=0, **train):
    """A run of about a second: vocabulary 32, sequences of 16 and 24."""
    short = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2)
    long = MQAR(vocab_size=32, seq_len=24, num_kv_pairs=4)
    return RunConfig(
        architecture=layers[-1],
        model=ModelConfig(vocab_size=32, d_model=16, layers=[layer(name) for name in layers]),
        data=DataConfig(
            train=[Slice(task=short, num_examples=num_examples), Slice(task=long, num_examples=num_examples // 2)],
            test=[Slice(task=short, num_examples=40, name="short"), Slice(task=long, num_examples=30, name="long")],
            num_validation=20,
            batch_size=16,
        ),
        train=TrainConfig(lr=lr, epochs=epochs, **train),
        seed=seed,
    )


@pytest.fixture
def make_run():
    return tiny_run
