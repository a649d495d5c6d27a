"""States as trees of tensors, and what of them counts as memory."""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from architectures import SequenceMixer
from architectures.mixer import clone_state, count_bytes, count_elements, map_state, state_tensors


class Inner(NamedTuple):
    spectrum: Tensor
    position: Tensor


class Outer(NamedTuple):
    parts: tuple[Inner, Inner]
    sums: Tensor


class Mixer(SequenceMixer):
    """A complex state of 3 + seq_len numbers, a counter, and sums in 16 bits."""

    def __init__(self):
        super().__init__(2)
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        def inner(size):
            spectrum = torch.zeros(batch_size, size, dtype=torch.complex128, device=device)
            return Inner(spectrum, torch.zeros((), dtype=torch.int64, device=device))

        sums = torch.zeros(batch_size, 5, dtype=dtype or torch.bfloat16, device=device)
        return Outer((inner(3), inner(max_seq_len)), sums)


def test_a_complex_number_counts_as_two_and_a_counter_not_at_all():
    assert count_elements(torch.zeros(2, 3, dtype=torch.complex64)) == 12
    assert count_bytes(torch.zeros(2, 3, dtype=torch.complex64)) == 48
    assert count_elements(torch.zeros((), dtype=torch.int64)) == count_bytes(torch.zeros((), dtype=torch.int64)) == 0
    assert count_elements(torch.zeros(())) == 1
    assert count_elements(torch.zeros(4, dtype=torch.int64)) == 4
    assert count_bytes(torch.zeros(4, dtype=torch.int64)) == 32


def test_fields_elements_and_bytes_of_a_nested_state():
    mixer = Mixer()
    assert mixer.state_fields(7) == {
        "parts.0.spectrum": 6,
        "parts.0.position": 0,
        "parts.1.spectrum": 14,
        "parts.1.position": 0,
        "sums": 5,
    }
    assert mixer.state_size(7) == 25
    assert mixer.state_bytes(7) == (3 + 7) * 16 + 5 * 2
    assert mixer.state_bytes(7, torch.float32) == (3 + 7) * 16 + 5 * 4


def test_a_copy_has_the_types_of_the_state_and_memory_of_its_own():
    state = Mixer().init_state(1, 2)
    copied = clone_state(state)
    state.parts[1].spectrum.fill_(1)
    assert type(copied) is Outer
    assert type(copied.parts[1]) is Inner
    assert not copied.parts[1].spectrum.any()
    shapes = [tuple(tensor.shape) for _, tensor in state_tensors(map_state(lambda tensor: tensor[..., None], state))]
    assert shapes == [(1, 3, 1), (1,), (1, 2, 1), (1,), (1, 5, 1)]


def test_sums_are_kept_in_float32_beside_16_bits_unless_a_dtype_is_given():
    low, full = Mixer().bfloat16(), Mixer()
    assert low.like_sums()["dtype"] == torch.float32
    assert low.like_sums(dtype=torch.bfloat16)["dtype"] == torch.bfloat16
    assert full.like_sums()["dtype"] == torch.float64


class Kept(NamedTuple):
    sums: Tensor
    window: Tensor


class Keeper(SequenceMixer):
    """Sums of a fixed size, and a window that grows with the sequence."""

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        like = {"device": device, "dtype": dtype}
        return Kept(torch.zeros(batch_size, 5, **like), torch.zeros(batch_size, max_seq_len, **like))


@pytest.mark.parametrize(
    ("sums", "window", "message"),
    [
        ((3, 5), (3, 9), None),
        ((3, 5), (3, 1), None),
        ((3, 6), (3, 9), r"state field 'sums' has shape \(3, 6\), expected \[3, 5\]"),
        ((2, 5), (3, 9), r"state field 'sums' has shape \(2, 5\), expected \[3, 5\]"),
        ((3, 5), (2, 9), r"state field 'window' has shape \(2, 9\), expected \[3, any\]"),
        ((3, 5), (3, 9, 1), r"state field 'window' has shape \(3, 9, 1\), expected \[3, any\]"),
    ],
)
def test_a_state_fits_but_for_its_length(sums, window, message):
    state = Kept(torch.zeros(sums), torch.zeros(window))
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        Keeper(2).check_state(torch.zeros(3, 2), state)


@pytest.mark.parametrize(
    ("of_input", "of_state", "fits"),
    [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.float64, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float64, False),
    ],
)
def test_a_state_has_the_dtype_of_the_input_or_float32_beside_16_bits(of_input, of_state, fits):
    state = Keeper(2).init_state(3, 9, dtype=of_state)
    with nullcontext() if fits else pytest.raises(ValueError, match=f"'sums' is {of_state}, the input {of_input}"):
        Keeper(2).check_state(torch.zeros(3, 2, dtype=of_input), state)
