"""One small mixer under several names, each with a backend that is right, wrong, missing, refusing or raising.

Loaded by the fixture `fake_backends`, as a user's file would be.
"""

from typing import NamedTuple

import torch
from torch import nn

from architectures import SequenceMixer, register

LIBRARIES = {"right": None, "wrong-gradient": None, "wrong-step": None, "refusing": None, "raising": None}


class AverageState(NamedTuple):
    mean: torch.Tensor  # [B, D]


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is 1% too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


class Average(SequenceMixer):
    """Exponential moving average of the values with one learned decay per channel."""

    def __init__(self, d_model: int, *, backend: str = "auto"):
        super().__init__(d_model, backend=backend)
        self.value, self.logit = nn.Linear(d_model, d_model), nn.Parameter(torch.zeros(d_model))

    def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
        return AverageState(torch.zeros(batch_size, self.d_model, **self.like_parameters(device, dtype)))

    def unsupported(self, backend, *, device, dtype, seq_len):
        if backend == "refusing" and self.d_model % 64:
            return f"d_model={self.d_model}; allowed: multiples of 64"
        return None

    def forward(self, x):
        backend, logit = self.backend_for(x), self.logit
        if backend == "reference":
            mean, outputs = torch.zeros_like(x[:, 0]), []
            for token in x.unbind(1):
                mean = self._average(token, mean, logit.sigmoid())
                outputs.append(mean)
            return torch.stack(outputs, 1)
        if backend == "raising":
            raise RuntimeError("no kernel image")
        if backend == "wrong-gradient":
            logit = ScaledGradient.apply(logit)
        age = torch.arange(x.shape[1], device=x.device)
        age = (age[:, None] - age[None]).to(x.dtype)
        kept = (1 - logit.sigmoid()) ** age.clamp_min(0).unsqueeze(-1) * (age >= 0).unsqueeze(-1)
        return torch.einsum("tsd,bsd->btd", kept.to(x.dtype), logit.sigmoid() * self.value(x))

    def step(self, x, state):
        self.check_state(x, state)
        backend = self.backend_for(x)
        if backend == "raising":
            raise RuntimeError("no kernel image")
        rate = self.logit.sigmoid() * (1.01 if backend == "wrong-step" else 1)
        mean = self._average(x, state.mean, rate)
        return mean, AverageState(mean)

    def _average(self, x, mean, rate):
        return mean + rate * (self.value(x) - mean)


for kind in ("right", "wrong-gradient", "wrong-step", "refusing", "raising", "absent"):

    @register(f"fake_{kind.replace('-', '_')}", paper="none")
    class Fake(Average):
        """The average, with one backend beside the reference."""

        backends = (kind, "reference")


@register("fake_all", paper="none")
class All(Average):
    """All of the backends, the one that is right behind those that are not."""

    backends = ("absent", "refusing", "raising", "wrong-gradient", "wrong-step", "right", "reference")
