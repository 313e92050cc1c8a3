"""A model on held-out dialogues: loss per byte, comparable between tokenizers, and exact matches.

The texts are those of a prepared folder, the same for every model; each reads them with its own tokenizer. A row
counts as matched when greedy decoding gives its answers token by token, which one forward pass tells: every token
is the likeliest where it stands. Results are grouped by the part of a conversation's id before its first ``/``
(``sorting/17``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fusion_trainer.batches import Collator, FusionData, TokenFile, write_tokens
from fusion_trainer.config import EvaluateConfig
from fusion_trainer.dialogues import Dialogues
from fusion_trainer.errors import FusionError
from fusion_trainer.files import read_json, write_json, written_to
from fusion_trainer.fusion import Rule
from fusion_trainer.heads import CHUNK_BYTES, SplitModel
from fusion_trainer.models import load_causal_lm, local_folder, weights_fingerprint
from fusion_trainer.representations.extract import batches
from fusion_trainer.tokens import load_tokenizer

__all__ = ["ALL", "evaluate", "score"]

FORMAT, VERSION = "fusion-trainer evaluation", 1
ALL = "all"
"""The group of all rows."""


@dataclass
class Sums:
    """Over the rows of a group: supervised bytes and tokens, their loss in nats, answers matched."""

    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    matched: int = 0

    def add(self, tokens: int, size: int, nats: float, matched: bool) -> None:
        self.rows += 1
        self.tokens += tokens
        self.bytes += size
        self.nats += nats
        self.matched += matched

    def as_dict(self) -> dict[str, float]:
        shares = {"nats_per_byte": self.nats / max(1, self.bytes), "exact_match": self.matched / max(1, self.rows)}
        return {**vars(self), **shares}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score the model ``config`` names, or find the score that is there already.

    Raises:
        FusionError: Model or dialogues cannot be used, or the output is of something else.
    """
    folder, revision = local_folder(config.model, config.revision, code=config.trust_remote_code)
    dialogues = Dialogues(config.dialogues)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights_fingerprint(folder, config.model),
        "dialogues": dialogues.fingerprint,
    }
    if config.output.is_file():
        found = read_json(config.output)
        if isinstance(found, dict) and {key: found.get(key) for key in about} == about:
            return found
        raise FusionError(f"`{config.output}` is of something else; give another --output, or remove it")
    tokenizer = load_tokenizer(folder, config.model, config.trust_remote_code)
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    model = load_causal_lm(
        folder,
        config.model,
        dtype=config.dtype,
        attention=config.attention,
        device=device,
        device_map=None,
        load_in=None,
        trust_remote_code=config.trust_remote_code,
    )
    tokens = write_tokens(dialogues, tokenizer)
    groups = score(model, tokens, [dialogues[n].conversation for n in range(len(dialogues))], config.batch_tokens)
    result = {
        **about,
        "model": config.model,
        "revision": revision,
        "groups": {name: sums.as_dict() for name, sums in groups.items()},
    }
    with written_to(config.output.parent):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.output, result)
    return result


def score(model: Any, tokens: Path, names: list[str], batch_tokens: int) -> dict[str, Sums]:
    """Sums by group, ``ALL`` first.

    Args:
        model: A causal language model in evaluation mode.
        tokens: The dialogues, tokenised by its own tokenizer (``batches.write_tokens``).
        names: The conversation of each block.
        batch_tokens: Most tokens in a batch, padding included.
    """
    split = SplitModel(model)
    if not split.trial()[1]:
        raise FusionError(f"{type(model).__name__} does not give its logits from its layers' output alone")
    lengths = TokenFile(tokens).lengths.tolist()
    data = FusionData(tokens, [], Rule(), [[block] for block in range(len(lengths))])
    sums = {ALL: Sums(), **{name: Sums() for name in sorted({_group(name) for name in names})}}
    with tqdm(total=len(lengths), unit="row", desc="evaluate") as bar:
        for numbers in batches(lengths, batch_tokens):
            batch = Collator(0)([data[number] for number in numbers])
            nats, hits = _asked(split, {name: tensor.to(split.device) for name, tensor in batch.items()})
            of_item = batch["of_item"].numpy()
            for item, number in enumerate(numbers):
                here = of_item == item
                if here.any():
                    found = (
                        int(here.sum()),
                        int(batch["bytes"][item]),
                        float(nats[here].sum()),
                        bool(hits[here].all()),
                    )
                    for group in {ALL, _group(names[number])}:
                        sums[group].add(*found)
            bar.update(len(numbers))
    return sums


def _group(conversation: str) -> str:
    head, slash, _ = conversation.partition("/")
    return head if slash else ALL


@torch.inference_mode()
def _asked(split: SplitModel, batch: dict[str, Tensor]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The loss at each supervised position, and whether its token is the likeliest."""
    hidden = split.hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).flatten(0, 1)
    hidden_SH = hidden.index_select(0, batch["positions"])
    parts = list(_chunks(split, hidden_SH, batch["gold"]))
    if not parts:
        return np.empty(0), np.empty(0, bool)
    nats, hits = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return nats.astype(np.float64), hits


def _chunks(split: SplitModel, hidden_SH: Tensor, gold_S: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = split.model.get_input_embeddings().weight.shape[0]
    size = max(1, CHUNK_BYTES.get(hidden_SH.device.type, CHUNK_BYTES["cuda"]) // (4 * rows))
    for hidden_CH, gold_C in zip(torch.split(hidden_SH, size), torch.split(gold_S, size), strict=True):
        logits_CV = split.head(hidden_CH).float()
        yield logits_CV.logsumexp(1) - logits_CV.gather(1, gold_C[:, None])[:, 0], logits_CV.argmax(1) == gold_C
