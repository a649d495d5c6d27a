"""The language-model shell around the sequence mixers: embedding, pre-norm blocks, tied head.

Axes: B batch, T time, D model width, P labelled positions per example, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import architectures
from architectures import registry
from architectures.mixer import SequenceMixer, State, check_prefix_length, count_bytes, count_elements, state_tensors
from zoology.config import ModelConfig


class Stack(NamedTuple):
    """Decode state of a model: one state per layer, and the number of tokens seen."""

    layers: tuple
    position: Tensor  # [], int64


LONG_GENERATION = 256
"""From how many new tokens on `generate` compiles its step."""

Pick = Callable[[Tensor], Tensor] | None  # [B, T, D] -> [B, P, D]


class ChannelMixer(nn.Module):
    """The channel half of a block: "mlp" is W2 gelu(W1 x), "swiglu" is W2 (silu(W1 x) * W3 x) (arXiv:2002.05202)."""

    def __init__(self, kind: str, d_model: int, expand: float):
        super().__init__()
        inner = max(1, round(expand * d_model))
        self.gated = kind == "swiglu"
        self.fc1 = nn.Linear(d_model, inner * (2 if self.gated else 1))
        self.fc2 = nn.Linear(inner, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.gated))


def activate(hidden: Tensor, gated: bool) -> Tensor:
    """What the second layer of a `ChannelMixer` reads of the first one's output."""
    if not gated:
        return F.gelu(hidden)
    gate, value = hidden.chunk(2, dim=-1)
    return F.silu(gate) * value


class Block(nn.Module):
    """x + mixer(norm(x)), then x + channel_mixer(norm(x))."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        norm = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
        spec = config.layer_at(index)
        depth = {"layer_idx": index, "n_layers": config.n_layers}
        known = registry.options(spec.name)
        options = {key: value for key, value in depth.items() if key in known} | spec.options
        self.norm = norm(config.d_model)
        self.mixer: SequenceMixer = architectures.create(spec.name, d_model=config.d_model, **options)
        self.dropout = nn.Dropout(config.resid_dropout)
        self.channel_norm = None if config.channel_mixer == "none" else norm(config.d_model)
        self.channel_mixer = (
            ChannelMixer(config.channel_mixer, config.d_model, config.channel_expand)
            if config.channel_mixer in ("mlp", "swiglu")
            else nn.Identity()
        )

    def forward(self, x: Tensor, prefix_length: int = 0, pick: Pick = None) -> Tensor:
        y = self._same_shape(x, self.mixer(self.norm(x), **self._prefix(prefix_length)), "forward")
        if pick is not None:
            # What follows the mixer sees one token at a time: where few are asked for, only those go on.
            x, y = pick(x), pick(y)
        return self._mix_channels(x + self.dropout(y))

    def prefill(self, x: Tensor, state: State, prefix_length: int = 0) -> tuple[Tensor, State]:
        y, state = self.mixer.prefill(self.norm(x), state, **self._prefix(prefix_length))
        return self._mix_channels(x + self._same_shape(x, y, "prefill")), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.mixer.step(self.norm(x), state)
        return self._mix_channels(x + self._same_shape(x, y, "step")), state

    def _same_shape(self, x: Tensor, y: Tensor, form: str) -> Tensor:
        """The mixer's output. Raises ValueError unless it has the input's shape: a sum of others may well broadcast."""
        if y.shape != x.shape:
            raise ValueError(
                f"{type(self.mixer).__name__}.{form} gave {list(y.shape)} for an input of {list(x.shape)}: "
                "must be of the same shape"
            )
        return y

    def _prefix(self, length: int) -> dict[str, int]:
        return {"prefix_length": length} if self.mixer.takes_prefix else {}

    def _mix_channels(self, x: Tensor) -> Tensor:
        return x if self.channel_norm is None else x + self.dropout(self.channel_mixer(self.channel_norm(x)))


class LanguageModel(nn.Module):
    """Tokens to next-symbol logits through the mixers of a `ModelConfig`.

    `forward` gives logits everywhere; `hidden` and `head` apart let training and evaluation apply the head
    only where there is a label (`labelled_logits`). `init_state`, `prefill` and `step` decode like a mixer.

    `prefix_length` says how many leading tokens are context (`Task.prefix_length`). Mixers that take a prefix read
    them non-causally; the others, and so a model without such a mixer, are causal whatever it is.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model) if config.max_positions else None
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = (nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm)(config.d_model)
        initialise(self)

    @property
    def takes_prefix(self) -> bool:
        """Whether any layer reads a prefix non-causally."""
        return any(block.mixer.takes_prefix for block in self.blocks)

    def embed(self, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
        """tokens [B, T] -> [B, T, D], the first token being at position `start`."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(start + torch.arange(tokens.shape[1], device=tokens.device))
        return self.embed_dropout(x)

    def hidden(self, tokens: Tensor, prefix_length: int = 0, pick: Pick = None) -> Tensor:
        """tokens [B, T] -> [B, T, D], normed: what the head reads. With `pick`, only the positions it keeps."""
        check_prefix_length(prefix_length, tokens.shape[1])
        x = self.embed(tokens)
        for block in self.blocks[:-1]:
            x = block(x, prefix_length)
        return self.norm(self.blocks[-1](x, prefix_length, pick))

    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V], with the weights of the embedding."""
        return F.linear(hidden, self.embedding.weight)

    def forward(self, tokens: Tensor, prefix_length: int = 0) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        return self.head(self.hidden(tokens, prefix_length))

    def labelled_logits(self, tokens: Tensor, positions: Tensor, prefix_length: int = 0) -> Tensor:
        """tokens [B, T], positions [B, P] -> logits [B, P, V] at those positions only."""
        hidden = self.hidden(tokens, prefix_length)
        return self.head(hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])))

    # -- decoding -------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_seq_len: int, *, device=None, dtype=None) -> Stack:
        """Empty decode state for `batch_size` sequences of at most `max_seq_len` tokens."""
        if 0 < self.config.max_positions < max_seq_len:
            raise ValueError(f"max_seq_len={max_seq_len}: the model has {self.config.max_positions} learned positions")
        layers = tuple(
            block.mixer.init_state(batch_size, max_seq_len, device=device, dtype=dtype) for block in self.blocks
        )
        return Stack(layers, torch.zeros((), dtype=torch.int64, device=device or self.embedding.weight.device))

    def prefill(self, tokens: Tensor, state: Stack, prefix_length: int = 0) -> tuple[Tensor, Stack]:
        """tokens [B, T], state -> logits [B, T, V], state after them. A prefix comes whole, with the first tokens."""
        check_prefix_length(prefix_length, tokens.shape[1])
        x, states = self.embed(tokens, state.position), []
        for block, layer_state in zip(self.blocks, state.layers):
            x, layer_state = block.prefill(x, layer_state, prefix_length)
            states.append(layer_state)
        return self.head(self.norm(x)), Stack(tuple(states), state.position + tokens.shape[1])

    def step(self, tokens: Tensor, state: Stack) -> tuple[Tensor, Stack]:
        """tokens [B], state -> logits [B, V], state."""
        x, states = self.embed(tokens[:, None], state.position)[:, 0], []
        for block, layer_state in zip(self.blocks, state.layers):
            x, layer_state = block.step(x, layer_state)
            states.append(layer_state)
        return self.head(self.norm(x)), Stack(tuple(states), state.position + 1)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0, prefix_length: int = 0
    ) -> Tensor:
        """Continue tokens [B, T] by `max_new_tokens`: greedily, or sampled at `temperature` > 0 -> [B, T + new].

        The prompt is read in chunks, and on a GPU the steps are replays of a CUDA graph; to go on with one batch, or
        to measure, hold a `zoology.generation.Decoder`. Raises ValueError for numbers and shapes that do not fit, and
        for a batch that needs more memory than there is.
        """
        from zoology.generation import Decoder, check_temperature

        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be a whole number >= 1")
        if tokens.ndim != 2 or min(tokens.shape) < 1:
            raise ValueError(f"tokens have shape {list(tokens.shape)}: must be [at least 1, at least 1]")
        check_temperature(temperature)
        batch_size, length = tokens.shape
        # Compiling takes longer than it saves on a short text.
        compiled = "auto" if max_new_tokens >= LONG_GENERATION else False
        training = self.training
        self.eval()
        try:
            # The last token made is not read.
            decoder = Decoder(self, batch_size, length + max_new_tokens - 1, compiled=compiled)
            made = decoder.pick(decoder.prefill(tokens, prefix_length), temperature=temperature, seed=seed)[:, None]
            if max_new_tokens > 1:
                rest = decoder.decode(made[:, 0], max_new_tokens - 1, temperature=temperature)
                made = torch.cat([made, rest], 1)
        finally:
            self.train(training)
        return torch.cat([tokens, made], 1)

    # -- what is measured -----------------------------------------------------------------------------------

    def state_fields(self, seq_len: int) -> dict[str, int]:
        """Elements of every state field of every layer for one sequence, keys like `1.based.kv`."""
        return {
            f"{index}.{self.config.layer_at(index).name}.{field}": count
            for index, block in enumerate(self.blocks)
            for field, count in block.mixer.state_fields(seq_len).items()
        }

    def state_size(self, seq_len: int) -> int:
        """Real numbers carried per sequence at length `seq_len`, over all layers."""
        return sum(self.state_fields(seq_len).values())

    def state_bytes(self, seq_len: int) -> int:
        """Bytes carried per sequence at length `seq_len`, in the dtype the states are kept in."""
        return sum(block.mixer.state_bytes(seq_len) for block in self.blocks)

    def num_parameters(self) -> int:
        """Parameters, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def measured_state(state: State) -> tuple[int, int]:
    """(elements, bytes) of a live decode state, all sequences of the batch together."""
    tensors = [tensor for _, tensor in state_tensors(state)]
    return sum(map(count_elements, tensors)), sum(map(count_bytes, tensors))


@torch.no_grad()
def initialise(model: LanguageModel) -> None:
    """The one place where the shell sets weights.

    Embeddings are normal(0, init_std) always. With `init="paper"` so are the weights of every linear layer, biases
    zero, and output projections (`out_proj`, `fc2`) get init_std / sqrt(2 n_layers), as the code of the Zoology
    and Based papers did. That went by names: where an output projection was called otherwise (Based, GLA, H3,
    the DeltaNets) it started like every other layer, as all do with `init="plain"`. Exempt are mixers, and single
    linear layers, with `keep_init = True`: those whose own initialisation matters. With `init="mixer"` all mixers
    keep what their constructors chose; with `init="mamba"` too, but for output projections, which are divided by
    sqrt(n_layers), as in Mamba's code and in the papers' for its blocks.
    """
    config = model.config
    for embedding in (model.embedding, model.positions):
        if embedding is not None:
            nn.init.normal_(embedding.weight, std=config.init_std)
    for block in model.blocks:
        parts = [block.channel_mixer]
        if config.init in ("paper", "plain") and not block.mixer.keep_init:
            parts.append(block.mixer)
        for name, module in (named for part in parts for named in part.named_modules()):
            if isinstance(module, nn.Linear) and not getattr(module, "keep_init", False):
                scale = math.sqrt(2 * config.n_layers) if _is_output(name) and config.init != "plain" else 1
                nn.init.normal_(module.weight, std=config.init_std / scale)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if config.init == "mamba":
            for name, module in block.mixer.named_modules():
                if _is_output(name):
                    module.weight.div_(math.sqrt(config.n_layers))


def _is_output(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("out_proj", "fc2")
