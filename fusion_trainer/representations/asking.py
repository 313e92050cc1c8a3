"""A causal language model asked for its next-token distributions at chosen positions only.

The layers run once over a padded batch; then the hidden states of the supervised positions alone go through the
model's head, a chunk at a time, so that no logits of shape [batch, length, vocabulary] exist. Whatever an
architecture does after its head (soft-capping, scaling) is its own code still: for a chunk the model's forward
runs with the layers' output already in place. That this gives the model's logits is tried when it is loaded.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusion_trainer.representations.topk import TopK, top_k

__all__ = ["AskedModel"]

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Of one chunk's logits in float32."""
TRIAL_TOKENS = 8
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class AskedModel:
    """A model of transformers and the ids its tokenizer knows.

    Args:
        model: A causal language model in evaluation mode.
        vocabulary: The ids that stand for a token; other rows of the head never win a place.

    Attributes:
        rows: Rows of the head, [rows] logits per position.
        separable: Whether the layers and the head could be told apart; if not, logits are computed for every
            position of a batch.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, vocabulary: frozenset[int]) -> None:
        self.model = model
        self.layers = model.base_model
        self.device = _input_device(model)
        self._one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        trial_BL = (
            torch.arange(TRIAL_TOKENS, device=self.device)[None] % model.get_input_embeddings().weight.shape[0]
        )
        logits_LV = model(input_ids=trial_BL, use_cache=False).logits[0]
        self.rows = logits_LV.shape[-1]
        self.separable = self._is_separable(trial_BL, logits_LV)
        absent = sorted(set(range(self.rows)) - vocabulary)
        self.absent = torch.tensor(absent, device=logits_LV.device) if absent else None
        self.chunk = max(1, CHUNK_BYTES.get(logits_LV.device.type, CHUNK_BYTES["cuda"]) // (4 * self.rows))

    def _is_separable(self, trial_BL: Tensor, logits_LV: Tensor) -> bool:
        if self.layers is not self.model:
            try:
                ours_LV = self._head(self._hidden(trial_BL, None).flatten(0, 1))
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, TypeError, KeyError, IndexError, RuntimeError):
                ours_LV = None  # its head asks for more than the layers' output
            if ours_LV is not None and _agree(ours_LV, logits_LV, TOLERANCE.get(logits_LV.dtype, 1e-1)):
                return True
        warnings.warn(
            f"{type(self.model).__name__} does not give its logits from its layers' output alone: they are "
            "computed at every position, which takes more memory; lower --batch-tokens if it is too much",
            stacklevel=2,
        )
        return False

    def _hidden(self, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
        output: Tensor = self.layers(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)[0]
        return output

    def _head(self, hidden_CH: Tensor) -> Tensor:
        """The model's forward on hidden states [C, H] instead of tokens: logits [C, V]."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        output = MoeModelOutputWithPast(last_hidden_state=hidden_CH[None])
        own = self.layers.__dict__.get("forward")
        self.layers.forward = lambda *_, **__: output
        try:
            logits_CV: Tensor = self.model(input_ids=self._one, use_cache=False).logits[0]
        finally:
            del self.layers.forward
            if own is not None:
                self.layers.forward = own
        return logits_CV

    @torch.inference_mode()
    def bare_forward(self, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
        """What transformers does with a batch: logits [B, L, V]. Benchmarks compare with it."""
        logits_BLV: Tensor = self.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
        return logits_BLV

    @torch.inference_mode()
    def distributions(
        self, ids_BL: Tensor, mask_BL: Tensor | None, positions_S: Tensor, gold_S: Tensor, k: int
    ) -> TopK:
        """The distributions at some positions of a batch.

        Args:
            ids_BL: int64, padded at the end.
            mask_BL: int64, 1 for tokens and 0 for padding; None where nothing is padded.
            positions_S: int64, indices into the flattened [B · L].
            gold_S: int64, the tokens that follow them.
            k: Entries kept.

        Returns:
            The ``TopK`` of all S positions, on the device of the logits.
        """
        if self.separable:
            hidden_SH = self._hidden(ids_BL, mask_BL).flatten(0, 1)
            hidden_SH = hidden_SH.index_select(0, positions_S.to(hidden_SH.device))
            chunks: Iterator[Tensor] = (self._head(hidden_CH) for hidden_CH in torch.split(hidden_SH, self.chunk))
        else:
            logits_SV = self.bare_forward(ids_BL, mask_BL).flatten(0, 1)
            logits_SV = logits_SV.index_select(0, positions_S.to(logits_SV.device))
            chunks = iter(torch.split(logits_SV, self.chunk))
        parts = [
            top_k(logits_CV, gold_C.to(logits_CV.device), k, self.absent)
            for logits_CV, gold_C in zip(chunks, torch.split(gold_S, self.chunk), strict=True)
        ]
        return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in TopK.__annotations__))


def _input_device(model: Any) -> torch.device:
    """Where token ids go: to the embedding, or, if that is offloaded, to the first weights that are not."""
    weights = [model.get_input_embeddings().weight, *model.parameters()]
    return next((weight.device for weight in weights if weight.device.type != "meta"), torch.device("cpu"))


def _agree(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Equal to rounding, on the scale of the logits; NaN agrees with NaN (it is reported where it is met)."""
    if ours.shape != theirs.shape:
        return False
    scale = float(theirs.float().abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1.0))
    return torch.allclose(ours.float(), theirs.float(), rtol=0.0, atol=tolerance * scale, equal_nan=True)
