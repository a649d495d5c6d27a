"""Feature maps of linear attention: phi with phi(q).phi(k) in place of exp(q.k / sqrt(f)).

A map is a small module from [B, T, H, f] to [B, T, H, F]; `linear_attention` builds one for the queries and one for the
keys, so a map with parameters learns two. A new one is a subclass with a name:

    @register_feature_map("abs")
    class Abs(FeatureMap):
        def forward(self, x, positions):
            return x.abs()
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.mixer import require_at_least
from kernels.taylor_linear_attention import num_taylor_features
from kernels.taylor_linear_attention.reference import taylor_features

_maps: dict[str, type[FeatureMap]] = {}


def register_feature_map(name: str) -> Callable[[type[FeatureMap]], type[FeatureMap]]:
    """Class decorator: make a `FeatureMap` available to `linear_attention` by name.

    Raises ValueError if the name is taken, TypeError if the class is not a FeatureMap.
    """

    def decorate(cls: type[FeatureMap]) -> type[FeatureMap]:
        if not (isinstance(cls, type) and issubclass(cls, FeatureMap)):
            raise TypeError(f"@register_feature_map({name!r}) decorates {cls!r}, not a subclass of FeatureMap")
        taken = _maps.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"feature map {name!r} is registered twice: as {taken!r} and as {cls!r}")
        _maps[name] = cls
        return cls

    return decorate


def feature_map_names() -> list[str]:
    """All registered feature maps, sorted."""
    return sorted(_maps)


def create_feature_map(name: str, feature_dim: int, **options: Any) -> FeatureMap:
    """Build the map `name` for inputs of width `feature_dim`.

    Raises ValueError for an unknown name (with the closest ones) or options the map does not have.
    """
    if name not in _maps:
        close = difflib.get_close_matches(name, _maps, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"feature_map={name!r} is unknown: {hint}allowed are {', '.join(feature_map_names())}")
    try:
        return _maps[name](feature_dim, **options)
    except TypeError as error:
        raise ValueError(f"feature_map_options={options!r} do not fit feature map {name!r}: {error}") from error


class FeatureMap(nn.Module):
    """Base of all maps: x [B, T, H, feature_dim], positions [T] -> [B, T, H, num_features].

    `nonnegative` says that every phi(q).phi(k) is at least 0, and decides how the output is normalised.
    """

    nonnegative: ClassVar[bool] = True

    def __init__(self, feature_dim: int):
        super().__init__()
        self.feature_dim = feature_dim
        self.num_features = feature_dim

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError


@register_feature_map("taylor")
class Taylor(FeatureMap):
    """1 + s + s^2 / 2 with s = q.k / sqrt(f), the second-order Taylor series of exp (Based, arXiv:2402.18668)."""

    def __init__(self, feature_dim: int):
        super().__init__(feature_dim)
        self.num_features = num_taylor_features(feature_dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return taylor_features(x, self.feature_dim**-0.5)


@register_feature_map("elu")
class Elu(FeatureMap):
    """elu(x) + 1 (linear transformer, arXiv:2006.16236, eq. 7)."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.elu(x) + 1


@register_feature_map("relu")
class Relu(FeatureMap):
    """max(x, 0)."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.relu(x)


@register_feature_map("square")
class Square(FeatureMap):
    """x^2 / sqrt(2), elementwise: the diagonal of the second-order Taylor term (Based, appendix)."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x.square() * math.sqrt(0.5)


@register_feature_map("identity")
class Identity(FeatureMap):
    """x itself: weights q.k of either sign."""

    nonnegative = False

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


@register_feature_map("performer")
class Performer(FeatureMap):
    """Positive random features exp(w_i.x' - |x'|^2 / 2) / sqrt(m), x' = x / f^(1/4).

    Source: FAVOR+, arXiv:2009.14794, Lemma 1.

    The w_i are orthogonal in blocks of f, with the norms of Gaussian vectors, drawn once from a generator of their own,
    so that queries and keys share them; they are a buffer, not trained. The published code also subtracts the largest
    exponent over all keys; that reads the future, so here nothing is subtracted: the exponent is at most |w_i|^2 / 2,
    about f / 2, which float32 holds up to f of about 150.
    """

    def __init__(self, feature_dim: int, num_random: int | None = None, seed: int = 0):
        super().__init__(feature_dim)
        self.num_features = 2 * feature_dim if num_random is None else num_random
        require_at_least(1, num_random=num_random)
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        blocks = [
            _random_rotation(torch.randn(feature_dim, feature_dim, **draw))
            for _ in range(-(-self.num_features // feature_dim))
        ]
        norms = torch.randn(self.num_features, feature_dim, **draw).norm(dim=-1, keepdim=True)
        directions = torch.cat(blocks)[: self.num_features] * norms
        self.register_buffer("directions", directions.to(torch.get_default_dtype()))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x * self.feature_dim**-0.25
        exponent = x @ self.directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() * self.num_features**-0.5


def _random_rotation(gaussian: Tensor) -> Tensor:
    # The signs of R are a convention of the QR code; undoing them is what makes Q uniform over the rotations.
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


@register_feature_map("cosformer")
class Cosformer(FeatureMap):
    """relu(x) weighted by cos(pi / 2 * (i - j) / horizon) (cosFormer, arXiv:2202.08791, eq. 10).

    The paper divides by the length of the sequence, which a causal model does not know; `horizon` takes its place, and
    has to be at least the length: tokens further apart would get negative weights.
    """

    def __init__(self, feature_dim: int, horizon: int = 2048):
        super().__init__(feature_dim)
        require_at_least(1, horizon=horizon)
        self.num_features = 2 * feature_dim
        self.horizon = horizon

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if positions.shape[0] > self.horizon:
            raise ValueError(f"a sequence of {positions.shape[0]} tokens is longer than horizon={self.horizon}")
        angle = (positions.to(x.dtype) * (math.pi / 2 / self.horizon))[:, None, None]
        x = F.relu(x)
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


@register_feature_map("all_poly")
class AllPoly(FeatureMap):
    """((W_1 x)^2 + W_2 x^2) / sqrt(2), a learned second-order polynomial (Based's ablation).

    W_1 and W_2 [num_features, f] start as Gaussians of variance 1 / f; the weights can have either sign.
    """

    nonnegative = False

    def __init__(self, feature_dim: int, num_features: int | None = None):
        super().__init__(feature_dim)
        self.num_features = feature_dim if num_features is None else num_features
        require_at_least(1, num_features=num_features)
        shape, std = (self.num_features, feature_dim), feature_dim**-0.5
        self.mixed = nn.Parameter(torch.randn(shape) * std)
        self.squared = nn.Parameter(torch.randn(shape) * std)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return ((x @ self.mixed.T).square() + x.square() @ self.squared.T) * math.sqrt(0.5)


@register_feature_map("hedgehog")
class Hedgehog(FeatureMap):
    """softmax of [y, -y], y = 2 (W x + b), W starting at the identity (Hedgehog, arXiv:2402.04347, section 4.2).

    The softmax over the features and the factor 2 follow the layer of flash-linear-attention.
    """

    def __init__(self, feature_dim: int):
        super().__init__(feature_dim)
        self.num_features = 2 * feature_dim
        self.weight = nn.Parameter(torch.eye(feature_dim))
        self.bias = nn.Parameter(torch.zeros(feature_dim))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        y = 2 * F.linear(x, self.weight, self.bias)
        return torch.cat([y, -y], dim=-1).softmax(-1)


@register_feature_map("rebased")
class Rebased(FeatureMap):
    """(gamma * LayerNorm(x) + beta)^2 with phi(q).phi(k) = (q'.k')^2 / f (ReBased, arXiv:2402.10644, eq. 8).

    All products of two entries count; each unordered pair is stored once, so F = f (f + 1) / 2.
    """

    def __init__(self, feature_dim: int):
        super().__init__(feature_dim)
        self.num_features = feature_dim * (feature_dim + 1) // 2
        self.gamma = nn.Parameter(torch.ones(feature_dim))
        self.beta = nn.Parameter(torch.zeros(feature_dim))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = F.layer_norm(x, (self.feature_dim,), self.gamma, self.beta)
        # The last f (f + 1) / 2 packed Taylor features are scale * x_i x_j / sqrt(2) on the diagonal; see that kernel.
        return taylor_features(x, math.sqrt(2) * self.feature_dim**-0.5)[..., 1 + self.feature_dim :]
