"""How much of a GPU's memory a run will take: measured, or guessed until then."""

from __future__ import annotations

import math

from zoology.runner.plan import PlannedRun

GB = 1e9
ALONE = math.inf
"""What a run takes that ran out of memory beside others: the whole GPU, however large."""

RESERVED = 2.0
"""Bytes that a process takes of a GPU for each byte that its tensors have at most: 1.8 was measured."""

_TENSORS_PER_LAYER = 16
"""Tensors [B, T, D] in float32 that a layer and its backward pass keep, with as much again unused between them."""

_BYTES_PER_PARAMETER = 20  # weight, gradient, two moments, and the copy that is computed with
_DATA_AND_WORKSPACES = 0.5 * GB
_MARGIN = 1.1  # between models of one architecture, after one was measured


class MemoryEstimate:
    """Bytes that runs take on a GPU, from those that were measured on the way.

    A run whose model was measured takes what it took then; others as much as their size says, or in proportion to it
    what their architecture was found to take.
    """

    def __init__(self):
        self._by_point: dict[str, float] = {}
        self._ratios: dict[str, float] = {}
        self._whole: set[str] = set()  # points measured to the end of a run
        self._crowded: dict[str, int] = {}

    def observe(self, run: PlannedRun, peak: float, *, whole: bool) -> None:
        """Learn what a run took so far, or as a `whole`."""
        self._by_point[run.point_id] = max(self._by_point.get(run.point_id, 0.0), float(peak))
        if whole:
            if self._crowded.get(run.point_id) == 1:
                del self._crowded[run.point_id]  # now it is known what it takes
            self._whole.add(run.point_id)
            if guess := _guess(run):
                name = run.config.architecture
                self._ratios[name] = max(self._ratios.get(name, 0.0), peak / guess)

    def crowded(self, run: PlannedRun) -> None:
        """The run's model found no memory beside others: it is not tried there until it was measured, or again."""
        self._crowded[run.point_id] = self._crowded.get(run.point_id, 0) + 1

    def bytes(self, run: PlannedRun) -> float:
        """What `run` will take, ALONE if it must not share."""
        if run.point_id in self._crowded:
            return ALONE
        measured = self._by_point.get(run.point_id, 0.0)
        if run.point_id in self._whole:
            return measured
        ratio = self._ratios.get(run.config.architecture)
        return max(measured, _guess(run) * (1.0 if ratio is None else _MARGIN * ratio))


def _guess(run: PlannedRun) -> float:
    """An upper bound for ordinary models: activations of the longest training batch, weights, data."""
    if run.size is None:
        return 0.0
    config = run.config
    tokens = config.data.batch_size * max(part.task.seq_len for part in config.data.train)
    activations = 4.0 * tokens * config.model.d_model * _TENSORS_PER_LAYER * (config.model.n_layers + 1)
    return activations + _BYTES_PER_PARAMETER * run.size.parameters + _DATA_AND_WORKSPACES
