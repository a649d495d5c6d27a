"""Sequence mixers by name, each with a parallel form, a recurrent form and a state whose memory is measured."""

from architectures.mixer import SequenceMixer, clone_state, count_elements, map_state, state_tensors
from architectures.registry import added_names, create, describe, load_file, names, register

__all__ = [
    "SequenceMixer",
    "added_names",
    "clone_state",
    "count_elements",
    "create",
    "describe",
    "load_file",
    "map_state",
    "names",
    "register",
    "state_tensors",
]
