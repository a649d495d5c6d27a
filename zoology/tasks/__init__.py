"""Recall tasks: frozen configs that generate the same examples on every machine."""

from .base import IGNORE_INDEX, Batch, Split, Task, dataset_hash
from .mqar import MQAR
from .registry import AnyTask, create, describe, format_example, from_config, get, names, register

__all__ = [
    "IGNORE_INDEX",
    "MQAR",
    "AnyTask",
    "Batch",
    "Split",
    "Task",
    "create",
    "dataset_hash",
    "describe",
    "format_example",
    "from_config",
    "get",
    "names",
    "register",
]
