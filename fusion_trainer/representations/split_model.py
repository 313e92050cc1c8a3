"""A causal language model as two parts: its layers, and what it computes from their output.

So the hidden states of chosen positions alone can go through the head, a chunk at a time, and no logits of shape
[batch, length, vocabulary] exist. Whatever an architecture does after its head (soft-capping, scaling) still
happens: for a chunk, the model's own forward runs with the layers' output already in place.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHUNK_BYTES", "SplitModel", "cached_parts", "context_length", "positions_at_a_time"]

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Size of one chunk's logits in float32."""
LEAST_POSITIONS = {"cpu": 256, "cuda": 1}
"""Of a chunk, even if its logits are larger: every chunk reads the whole head, which a CPU has no cache for."""
CACHED_BYTES = 8 << 20
"""Logits in float32 that a CPU reduces at once. They are read some ten times, so they should stay in its cache."""
CONTEXT_SETTINGS = ("max_position_embeddings", "max_seq_len", "n_positions")
TRIAL_TOKENS = 8
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def context_length(model: Any) -> int | None:
    """The longest text that a model's config allows, in tokens; None if it names no limit."""
    settings = model.config.get_text_config()
    return next((limit for name in CONTEXT_SETTINGS if (limit := getattr(settings, name, None))), None)


def positions_at_a_time(device: torch.device, vocabulary: int) -> int:
    """How many positions go through a head of ``vocabulary`` rows at once."""
    kind = device.type if device.type in CHUNK_BYTES else "cuda"
    return max(LEAST_POSITIONS[kind], CHUNK_BYTES[kind] // (4 * vocabulary))


def cached_parts(logits_CV: Tensor, *columns: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Logits and columns of their positions, in parts of rows: on a CPU as many as its cache holds, else all."""
    rows = max(1, CACHED_BYTES // (4 * logits_CV.shape[1])) if logits_CV.device.type == "cpu" else len(logits_CV)
    for first in range(0, max(1, len(logits_CV)), max(1, rows)):
        part = slice(first, first + rows)
        yield logits_CV[part], *(None if column is None else column[part] for column in columns)


class SplitModel:
    """The two parts of a causal language model of transformers; both run its own code.

    Args:
        model: The model. The head is that of its present ``forward``, even if ``forward`` is replaced later.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.forward = model.forward
        self.device = input_device(model)

    @property
    def layers(self) -> Any:
        return self.model.base_model

    def layers_output(self, **inputs: Any) -> Any:
        """The output of the layers for token ids [B, L]; its first item is hidden states [B, L, H]."""
        return self.layers(**inputs, use_cache=False)

    def hidden(self, **inputs: Any) -> Tensor:
        """Hidden states [B, L, H] of token ids [B, L]."""
        output: Tensor = self.layers_output(**inputs)[0]
        return output

    def head(self, hidden_CH: Tensor) -> Tensor:
        """Logits [C, V] of hidden states [C, H]."""
        logits_CV: Tensor = self.given(_LayersOutput(hidden_CH[None])).logits[0]
        return logits_CV

    def given(self, output: Any, **inputs: Any) -> Any:
        """The model's own output, computed from this output of its layers."""
        layers = self.layers
        placeholder = torch.zeros(1, 1, dtype=torch.long, device=output[0].device)
        own = layers.__dict__.get("forward")
        layers.forward = lambda *_, **__: output
        try:
            return self.forward(input_ids=placeholder, use_cache=False, **inputs)
        finally:
            del layers.forward
            if own is not None:
                layers.forward = own

    @torch.no_grad()
    def trial(self) -> tuple[Tensor, bool]:
        """The logits [8, V] of some tokens, and whether the two parts give the same."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        trial_BL = torch.arange(TRIAL_TOKENS, device=self.device)[None] % rows
        logits_LV: Tensor = self.forward(input_ids=trial_BL, use_cache=False).logits[0]
        if self.layers is self.model:
            return logits_LV, False
        try:
            ours_LV = self.head(self.hidden(input_ids=trial_BL).flatten(0, 1))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, KeyError, IndexError, RuntimeError):
            return logits_LV, False  # its head needs more than the layers' output
        return logits_LV, _agree(ours_LV, logits_LV, TOLERANCE.get(logits_LV.dtype, 1e-1))


class _LayersOutput:
    """Hidden states as the output of layers; all else that a model may pass on from there is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def input_device(model: Any) -> torch.device:
    """Where token ids go: to the embedding, or if that is offloaded, to the first weights that are not."""
    weights = [model.get_input_embeddings().weight, *model.parameters()]
    return next((weight.device for weight in weights if weight.device.type != "meta"), torch.device("cpu"))


def _agree(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Equal up to rounding, on the scale of the logits; NaN agrees with NaN (it is reported later)."""
    if ours.shape != theirs.shape:
        return False
    scale = float(theirs.float().abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1.0))
    return torch.allclose(ours.float(), theirs.float(), rtol=0.0, atol=tolerance * scale, equal_nan=True)
