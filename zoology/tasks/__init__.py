"""Recall tasks: frozen configs that generate the same examples on every machine."""

from .base import IGNORE_INDEX, Batch, Split, Task, dataset_hash
from .baselines import baselines
from .jrt_prompt import JRTPrompt
from .mad import (
    MADCompression,
    MADFuzzyRecall,
    MADInContextRecall,
    MADMemorization,
    MADNoisyRecall,
    MADSelectiveCopying,
)
from .mqar import MQAR
from .mqar_variants import (
    CompoundKeyMQAR,
    DenseMQAR,
    ForgettingMQAR,
    LastValueMQAR,
    TwoHopMQAR,
    longer_than_train,
)
from .registry import AnyTask, create, describe, format_example, from_config, get, load_file, names, register
from .samplers import Stream
from .set_disjointness import SetDisjointness

__all__ = [
    "IGNORE_INDEX",
    "MQAR",
    "AnyTask",
    "Batch",
    "CompoundKeyMQAR",
    "DenseMQAR",
    "ForgettingMQAR",
    "JRTPrompt",
    "LastValueMQAR",
    "MADCompression",
    "MADFuzzyRecall",
    "MADInContextRecall",
    "MADMemorization",
    "MADNoisyRecall",
    "MADSelectiveCopying",
    "SetDisjointness",
    "Split",
    "Stream",
    "Task",
    "TwoHopMQAR",
    "baselines",
    "create",
    "dataset_hash",
    "describe",
    "format_example",
    "from_config",
    "get",
    "load_file",
    "longer_than_train",
    "names",
    "register",
]
