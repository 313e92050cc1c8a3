"""A causal language model that gives its top-k next-token distributions at chosen positions only.

The layers run once over a padded batch. Then only the hidden states of the supervised positions go through the
model's head, a chunk at a time. When the model is loaded, a trial checks that this gives the model's own logits.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusion_trainer.representations.split_model import SplitModel, positions_at_a_time
from fusion_trainer.representations.topk import TopK, joined, top_k

__all__ = ["TopKModel"]


class TopKModel:
    """A model of transformers and the ids that its tokenizer knows.

    Args:
        model: A causal language model in evaluation mode.
        vocabulary: The ids that stand for a token; other rows of the head are never among the k.

    Attributes:
        rows: Rows of the head: each position has [rows] logits.
        separable: Whether the layers and the head can be separated; if not, logits are computed for every position
            of a batch.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, vocabulary: frozenset[int]) -> None:
        self.model = model
        self.split = SplitModel(model)
        self.device = self.split.device
        logits_LV, self.separable = self.split.trial()
        if not self.separable:
            warnings.warn(
                f"{type(model).__name__} does not give its logits from its layers' output alone: they are "
                "computed at every position, which takes more memory; lower --batch-tokens if it is too much",
                stacklevel=2,
            )
        self.rows = logits_LV.shape[-1]
        absent = sorted(set(range(self.rows)) - vocabulary)
        self.absent = torch.tensor(absent, device=logits_LV.device) if absent else None
        self.chunk = positions_at_a_time(logits_LV.device, self.rows)

    @torch.inference_mode()
    def bare_forward(self, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
        """transformers' logits [B, L, V] of a batch."""
        logits_BLV: Tensor = self.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
        return logits_BLV

    @torch.inference_mode()
    def distributions(
        self, ids_BL: Tensor, mask_BL: Tensor | None, positions_S: Tensor, gold_S: Tensor, k: int
    ) -> TopK:
        """The distributions at some positions of a batch, on the device of the logits.

        Args:
            ids_BL: int64, padded at the end.
            mask_BL: int64, 1 for tokens and 0 for padding; None if nothing is padded.
            positions_S: int64, indices into the flattened [B · L].
            gold_S: int64, the tokens that follow them.
            k: Entries kept.
        """
        if self.separable:
            hidden_SH = self.split.hidden(input_ids=ids_BL, attention_mask=mask_BL).flatten(0, 1)
            hidden_SH = hidden_SH.index_select(0, positions_S.to(hidden_SH.device))
            chunks: Iterator[Tensor] = map(self.split.head, torch.split(hidden_SH, self.chunk))
        else:
            logits_SV = self.bare_forward(ids_BL, mask_BL).flatten(0, 1)
            logits_SV = logits_SV.index_select(0, positions_S.to(logits_SV.device))
            chunks = iter(torch.split(logits_SV, self.chunk))
        columns = zip(chunks, torch.split(gold_S, self.chunk), strict=True)
        return joined(
            [top_k(logits_CV, gold_C.to(logits_CV.device), k, self.absent) for logits_CV, gold_C in columns]
        )
