"""A model on held-out dialogues: loss per byte, comparable between tokenizers, and exact matches.

The texts are those of a prepared folder, the same for every model; each reads them with its own tokenizer. A row
counts as matched when greedy decoding gives its answers token by token, which one forward pass tells: every token
is the likeliest where it stands. What lies beyond a model's context is not scored, but counted, and not matched.
Results are kept by conversation, whose blocks count as one, so that two models can be compared pair by pair. They
are grouped by the part of a conversation's id before its first ``/`` (``sorting/17``), with standard errors over
conversations. A loss that is not finite is an error, never a score.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fusion_trainer.config import EvaluateConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.extraction import batches
from fusion_trainer.representations.split_model import CHUNK_BYTES, SplitModel, context_length
from fusion_trainer.text.tokenizer import load_tokenizer
from fusion_trainer.training.batches import Collator, Example, TokenFile, TokenRow, write_tokens
from varm_common.console import is_quiet
from varm_common.errors import UserError, unlike
from varm_common.files import read_json, write_json, written_to
from varm_common.models import (
    config_fingerprint,
    load_causal_lm,
    local_folder,
    resolved_dtype,
    weights_fingerprint,
)
from varm_common.standard_errors import standard_error

__all__ = ["ALL", "evaluate", "score"]

FORMAT, VERSION = "fusion-trainer evaluation", 2
ALL = "all"
"""The group of all rows."""


@dataclass
class Sums:
    """Over the rows of a conversation or group: supervised bytes and tokens, their loss in nats, answers matched.

    ``cut_tokens`` are those beyond the context, in none of the other sums.
    """

    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    matched: int = 0
    cut_tokens: int = 0

    def add(self, other: "Sums") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score the model ``config`` names, or find the score that is there already.

    Raises:
        UserError: Model or dialogues cannot be used, the loss is not finite, or the output is of something else.
    """
    folder, revision = local_folder(config.model, config.revision, code=config.trust_remote_code)
    dialogues = Dialogues(config.dialogues)
    tokenizer = load_tokenizer(folder, config.model, config.trust_remote_code)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights_fingerprint(folder, config.model),
        "config": config_fingerprint(folder, config.trust_remote_code),
        "tokenizer": tokenizer.sha256,
        "dialogues": dialogues.fingerprint,
        "dtype": resolved_dtype(folder, config.dtype, config.trust_remote_code),
        "attention": config.attention,
    }
    if config.output.exists():
        return _demand(config.output, about)
    state = PartialState(cpu=not torch.accelerator.is_available())
    model = load_causal_lm(
        folder,
        config.model,
        dtype=config.dtype,
        attention=config.attention,
        device=state.device,
        device_map=None,
        load_in=None,
        trust_remote_code=config.trust_remote_code,
    )
    with state.main_process_first():
        tokens = write_tokens(dialogues, tokenizer)
    names = [dialogues[n].conversation for n in range(len(dialogues))]
    found = score(model, tokens, names, config.batch_tokens)
    _demand_finite(found, model, config.model)
    result = {
        **about,
        "model": config.model,
        "revision": revision,
        "groups": _groups(found, config.model),
        "conversations": {name: {"group": _group(name), **vars(sums)} for name, sums in found.items()},
    }
    if state.is_main_process:
        with written_to(config.output.parent):
            config.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(config.output, result)
    state.wait_for_everyone()
    return result


def _demand(output: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The scores that are there, if they are those asked for."""
    try:
        found = dict(read_json(output))
    except (OSError, ValueError, TypeError):
        found = {}
    if found.get("format") != FORMAT:
        raise UserError(f"`{output}` holds something else; give another --output")
    if difference := unlike(f"`{output}` holds other scores:", about, {key: found.get(key) for key in about}):
        raise UserError(f"{difference}\nGive another --output, or remove that file.")
    return found


def score(model: Any, tokens: Path, names: list[str], batch_tokens: int) -> dict[str, Sums]:
    """Sums by conversation; several processes share the batches.

    Args:
        model: A causal language model in evaluation mode.
        tokens: The dialogues, tokenised by its own tokenizer (``batches.write_tokens``).
        names: The conversation of each block.
        batch_tokens: Most tokens in a batch, padding included.
    """
    split = SplitModel(model)
    if not split.trial()[1]:
        raise UserError(f"{type(model).__name__} does not give its logits from its layers' output alone")
    context = context_length(model)
    file = TokenFile(tokens)
    lengths = np.minimum(file.lengths, context or file.lengths.max(initial=0)).tolist()
    known = model.get_input_embeddings().weight.shape[0]
    sums = {name: Sums() for name in names}
    state = PartialState()
    mine = batches(lengths, batch_tokens)[state.process_index :: state.num_processes]
    with tqdm(
        total=sum(map(len, mine)), unit="row", desc="evaluate", disable=not state.is_main_process or is_quiet()
    ) as bar:
        for numbers in mine:
            rows = [file[number] for number in numbers]
            read = [_within(row, lengths[number]) for row, number in zip(rows, numbers, strict=True)]
            batch = Collator(0)([[Example(number, row, None)] for number, row in zip(numbers, read, strict=True)])
            if (unknown := int(batch["input_ids"].max())) >= known:
                raise UserError(
                    f"token {unknown} of the tokenizer has no row in the model, which has {known}: tokenizer and "
                    "weights do not belong together"
                )
            nats, hits = _asked(split, {name: tensor.to(split.device) for name, tensor in batch.items()})
            of_item = batch["of_item"].numpy()
            for item, number in enumerate(numbers):
                here, supervised = of_item == item, len(rows[item].positions)
                cut = supervised - int(here.sum())
                if rows[item].bytes:  # there is an answer, whatever tokens it has
                    matched = supervised > 0 and not cut and bool(hits[here].all())
                    found = Sums(1, int(here.sum()), read[item].bytes, float(nats[here].sum()), matched, cut)
                    sums[names[number]].add(found)
            bar.update(len(numbers))
    return {name: own for name, own in _of_all_processes(sums).items() if own.rows}


def _demand_finite(found: Mapping[str, Sums], model: Any, name: str) -> None:
    """See that there is a number for every conversation.

    Raises:
        UserError: One is NaN or infinite. The first tensor of the model that is not finite is named.
    """
    wrong = next((conversation for conversation, sums in found.items() if not math.isfinite(sums.nats)), None)
    if wrong is None:
        return
    tensors = chain(model.named_parameters(), model.named_buffers())
    broken = next((key for key, tensor in tensors if not bool(torch.isfinite(tensor).all())), None)
    cause = (
        f"its tensor `{broken}` holds NaN or infinite values; train or copy it again"
        if broken
        else "its weights are finite, so its arithmetic overflows; try --dtype float32"
    )
    raise UserError(f"the loss of `{name}` is not finite, first on the conversation `{wrong}`: {cause}")


def _groups(found: Mapping[str, Sums], model: str) -> dict[str, dict[str, float | None]]:
    """Sums, scores and their standard errors by group, ``ALL`` first; groups of which nothing was read are absent.

    Raises:
        UserError: Nothing was read at all.
    """
    groups: dict[str, list[Sums]] = {ALL: list(found.values())}
    for name in sorted(found, key=_group):
        if _group(name) != ALL:
            groups.setdefault(_group(name), []).append(found[name])
    scored = {name: own for name, own in groups.items() if sum(one.bytes for one in own)}
    if ALL not in scored:
        raise UserError(f"there is nothing to score: no token of an answer lies within the context of `{model}`")
    return {name: _scores(own) for name, own in scored.items()}


def _scores(conversations: list[Sums]) -> dict[str, float | None]:
    total = Sums()
    for one in conversations:
        total.add(one)
    loss = [one.nats for one in conversations], [one.bytes for one in conversations]
    matched = [one.matched for one in conversations], [one.rows for one in conversations]
    return {
        **vars(total),
        "conversations": len(conversations),
        "nats_per_byte": total.nats / total.bytes,
        "nats_per_byte_error": standard_error(loss),
        "exact_match": total.matched / total.rows,
        "exact_match_error": standard_error(matched),
    }


def _of_all_processes(sums: dict[str, Sums]) -> dict[str, Sums]:
    found = {name: Sums() for name in sums}
    for part in gather_object([sums]):
        for name, own in part.items():
            found[name].add(own)
    return found


def _within(row: TokenRow, context: int) -> TokenRow:
    """The part of a row that a model reads."""
    if len(row.ids) <= context:
        return row
    known = row.positions < context - 1
    sizes = row.gold_bytes[known]
    return replace(
        row, ids=row.ids[:context], positions=row.positions[known], gold_bytes=sizes, bytes=int(sizes.sum())
    )


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
