"""The language models of the Based and JRT papers, at 360M and 1.3B parameters, made of registry mixers.

Shapes are those of the papers' training configurations (HazyResearch/based, 32c1bd4, and
HazyResearch/prefix-linear-attention, 7490f22, train/configs/experiment), the blocks are this suite's own: pre-norm
with RMSNorm, residual stream in the model's dtype, tied head, GPT-2's vocabulary filled up to a multiple of 8.
Weights are random: what is measured on these models is speed and memory.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

import torch

from zoology.config import LayerConfig, ModelConfig, layer
from zoology.model import LanguageModel

VOCAB_SIZE = 50264
"""The 50,257 tokens of GPT-2, filled up so that rows of logits stay aligned, as the papers' code does."""


class Preset(NamedTuple):
    """A model, and the parameters that its paper states."""

    config: ModelConfig
    nominal_parameters: int


def names() -> list[str]:
    """The names that `config` and `build` know."""
    return list(_PRESETS)


def get(name: str) -> Preset:
    """The preset called `name`. Raises ValueError, listing the known ones, if there is none."""
    if name not in _PRESETS:
        close = difflib.get_close_matches(str(name), names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown preset {name!r}: {hint}Known presets are {', '.join(names())}")
    return _PRESETS[name]


def config(name: str, **changes) -> ModelConfig:
    """The ModelConfig of a preset, with some of its fields replaced.

    Raises ValueError for an unknown preset, listing the known ones, and for a field or value ModelConfig refuses.
    """
    fields = {key: getattr(get(name).config, key) for key in ModelConfig.model_fields}
    return ModelConfig(**(fields | changes))


def build(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    n_layers: int | None = None,
    backend: str = "auto",
) -> LanguageModel:
    """A preset in eval mode with random weights of `dtype`, made on `device` from `seed`.

    `n_layers` cuts the stack short; `backend` goes to every mixer that has it (the others keep "auto"). The random
    state of the caller is left alone. Raises ValueError for an unknown preset.
    """
    changes = {} if n_layers is None else {"n_layers": n_layers}
    return build_config(with_backend(config(name, **changes), backend), device=device, dtype=dtype, seed=seed)


def build_config(
    model_config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> LanguageModel:
    """A model of `model_config` in eval mode, its random weights made on `device`."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        return LanguageModel(model_config).to(dtype).eval().requires_grad_(False)


def with_backend(model_config: ModelConfig, backend: str) -> ModelConfig:
    """The same model with every mixer that has this backend told to use it."""
    if backend == "auto":
        return model_config
    from architectures import registry

    def told(spec: LayerConfig) -> LayerConfig:
        known = backend in registry.get(spec.name).cls.backends
        return LayerConfig(name=spec.name, options=spec.options | {"backend": backend}) if known else spec

    fields = {key: getattr(model_config, key) for key in ModelConfig.model_fields}
    return ModelConfig(**(fields | {"layers": tuple(told(spec) for spec in model_config.layers)}))


# The first of every group of about five layers is linear attention, the second a sliding window.
_LINEAR_360M, _LINEAR_1B = (1, 6, 11, 16, 21), (1, 6, 11, 16, 21, 27, 33)


def _based(linear: LayerConfig, d_model: int, n_layers: int, at: tuple[int, ...]) -> ModelConfig:
    conv = layer("base_conv", kernel_size=3, expand=4)
    window = layer("sliding_window", window=128, num_heads=16, rotary_fraction=0.5, bias=False)
    layers = [linear if i in at else window if i - 1 in at else conv for i in range(n_layers)]
    return _model(d_model, layers, channel_mixer="swiglu", channel_expand=2.0)


def _attention(d_model: int, n_layers: int, num_heads: int) -> ModelConfig:
    # Rotary on half of each head; of a head of 70 the next even width, 36, as flash-attn's module does.
    head_dim = d_model // num_heads
    spec = layer(
        "attention", num_heads=num_heads, rotary_fraction=(head_dim // 2 + head_dim // 2 % 2) / head_dim, bias=False
    )
    return _model(d_model, [spec] * n_layers, channel_mixer="mlp", channel_expand=4.0)


def _mamba(d_model: int, n_layers: int) -> ModelConfig:
    return _model(d_model, [layer("mamba")] * n_layers, channel_mixer="none")


def _model(d_model: int, layers: list[LayerConfig], **options) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        d_model=d_model,
        layers=tuple(layers),
        n_layers=len(layers),
        norm="rmsnorm",
        embed_dropout=0.0,
        **options,
    )


_LINEAR = layer("based", feature_dim=16, num_heads=16)
_PREFIX_LINEAR = layer("prefix_linear_attention", feature_dim=16, num_heads=16)

_PRESETS = {
    "attention-360m": Preset(_attention(1024, 24, 16), 355_000_000),
    "attention-1.3b": Preset(_attention(1680, 36, 24), 1_330_000_000),
    "based-360m": Preset(_based(_LINEAR, 1024, 27, _LINEAR_360M), 363_000_000),
    "based-1.3b": Preset(_based(_LINEAR, 1792, 36, _LINEAR_1B), 1_350_000_000),
    "mamba-360m": Preset(_mamba(1024, 46), 358_000_000),
    "mamba-1.3b": Preset(_mamba(2048, 46), 1_320_000_000),
    "jrt-360m": Preset(_based(_PREFIX_LINEAR, 1024, 26, _LINEAR_360M), 356_000_000),
    "jrt-1.3b": Preset(_based(_PREFIX_LINEAR, 1792, 36, _LINEAR_1B), 1_350_000_000),
}
