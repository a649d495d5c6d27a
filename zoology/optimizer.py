"""AdamW over few long vectors instead of many parameters, so that a step is one or two kernels.

Parameters are views of the vectors. Where a model computes in bfloat16, its linear layers own views of a bfloat16
copy of them, which the update writes along the way: no weight is cast in a training step, and gradients of those
layers arrive in bfloat16, as under autocast.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGE = 1 << 16
"""Parameters of this many elements get a vector of their own: joining their gradients to others would cost more."""

ALIGNMENT = 64  # elements; matrix products want 16-byte aligned operands


class Vectors(NamedTuple):
    """One long vector of weights and what AdamW keeps for it, all [n] float32; `copy` [n] bfloat16, if there is one."""

    master: Tensor
    first: Tensor
    second: Tensor
    copy: Tensor | None


def adamw_update(
    vectors: Sequence[Vectors],
    grads: Sequence[Sequence[Tensor]],
    scalars: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
) -> None:
    """One step of AdamW (arXiv:1711.05101, algorithm 2) in place, the decay scaled by the learning rate as in PyTorch.

    grads: those of each vector's parameters. scalars [3]: learning rate, 1 / (1 - beta1^t), (1 - beta2^t)^(-1/2).
    `clip_norm` scales gradients whose joint norm exceeds it, as `torch.nn.utils.clip_grad_norm_` does.
    """
    lr, correction1, correction2 = scalars.unbind()
    grads = [_joined(group) for group in grads]
    if clip_norm is not None:
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [grad * scale for grad in grads]
    for (master, first, second, copy), grad in zip(vectors, grads):
        first.copy_(first + (1 - betas[0]) * (grad - first))
        second.copy_(second * betas[1] + (1 - betas[1]) * grad * grad)
        step = lr * correction1 * first / (second.sqrt() * correction2 + eps)
        master.copy_(master * (1 - lr * weight_decay) - step)
        if copy is not None:
            copy.copy_(master)


class FlatAdamW:
    """AdamW for the parameters of `model` that are named, which it moves into its vectors.

    Args:
        names: the parameters that receive gradients; all float32.
        low_precision: the dtype of the linear layers' parameters, or None to leave them in float32.

    `step(grads, scalars)` takes gradients in the order of `names`; `parameters` are what to differentiate by. Who
    wants the update inside a larger function calls `adamw_update(vectors, group(grads), scalars, **options)`.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        weight_decay: float,
        clip_norm: float | None,
        low_precision: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        found = dict(model.named_parameters())
        self.names, self.betas = list(names), betas
        self.steps = 0
        small = [name for name in names if found[name].numel() < LARGE]
        large = [name for name in names if found[name].numel() >= LARGE]
        self._groups = ([small] if small else []) + [[name] for name in large]
        self.vectors: list[Vectors] = []
        self.masters: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        for group in self._groups:
            self._lay_out(group, found, low_precision)
        linear = _linear_parameters(model) if low_precision else set()
        for name in names:
            owner, _, attribute = name.rpartition(".")
            if name in linear:
                setattr(model.get_submodule(owner), attribute, nn.Parameter(self.copies[name]))
            else:
                found[name].data = self.masters[name]
        now = dict(model.named_parameters())
        self.parameters = [now[name] for name in names]
        self._order = {name: index for index, name in enumerate(self.names)}
        self.options = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_norm": clip_norm}

    def _lay_out(self, group: list[str], found: dict[str, nn.Parameter], low: torch.dtype | None) -> None:
        # A vector of one parameter has its length, as that parameter's gradient does.
        *others, last = group
        length = sum(_padded(found[name].numel()) for name in others) + found[last].numel()
        device = found[group[0]].device
        master, first, second = (torch.zeros(length, device=device) for _ in range(3))
        copy = None if low is None else torch.zeros(length, device=device, dtype=low)
        self.vectors.append(Vectors(master, first, second, copy))
        for name, view in self._views(master, group, found).items():
            view.copy_(found[name].detach())
            self.masters[name] = view
        if copy is not None:
            copy.copy_(master)
            self.copies |= self._views(copy, group, found)

    @staticmethod
    def _views(vector: Tensor, group: list[str], found: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        views, start = {}, 0
        for name in group:
            size = found[name].numel()
            views[name] = vector[start : start + size].view(found[name].shape)
            start += _padded(size)
        return views

    def step(self, grads: Sequence[Tensor], scalars: Tensor) -> None:
        """Update the weights; `scalars` [3] on the device, from `scalars_at`."""
        adamw_update(self.vectors, self.group(grads), scalars, **self.options)

    def group(self, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """The gradients by vector, as `adamw_update` wants them."""
        return [[grads[self._order[name]] for name in group] for group in self._groups]

    def scalars_at(self, step: int, lr: float) -> tuple[float, float, float]:
        """What `step` needs to know at the 1-based step number `step`, computed in float64."""
        first, second = self.betas
        return lr, 1 / (1 - first**step), 1 / math.sqrt(1 - second**step)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Start anew from these weights."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        for vectors in self.vectors:
            vectors.first.zero_()
            vectors.second.zero_()
            if vectors.copy is not None:
                vectors.copy.copy_(vectors.master)
        self.steps = 0

    def state_dict(self) -> dict:
        """Everything `load_state_dict` needs to go on from here, on the CPU."""
        return {
            "steps": self.steps,
            "vectors": [[tensor.cpu().clone() for tensor in vectors[:3]] for vectors in self.vectors],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for vectors, saved in zip(self.vectors, state["vectors"], strict=True):
            for tensor, value in zip(vectors[:3], saved, strict=True):
                tensor.copy_(value)
            if vectors.copy is not None:
                vectors.copy.copy_(vectors.master)


def _joined(grads: Sequence[Tensor]) -> Tensor:
    """Gradients of the parameters of one vector in its layout, [n] float32."""
    *others, last = [grad.reshape(-1).float() for grad in grads]
    padded = [F.pad(grad, (0, _padded(len(grad)) - len(grad))) for grad in others]
    return torch.cat([*padded, last]) if padded else last


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _linear_parameters(model: nn.Module) -> set[str]:
    """Names of the weights and biases of linear layers, which autocast would cast at each use; none that is shared.

    A layer that computes in float32 under autocast too says so by `keep_float32 = True`.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if type(module) is nn.Linear and not getattr(module, "keep_float32", False)
        for name, parameter in module.named_parameters(recurse=False)
        if owners[id(parameter)] == 1
    }
