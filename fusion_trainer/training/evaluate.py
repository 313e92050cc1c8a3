"""Score models on held-out dialogues: nats per byte, comparable between tokenizers, and exact matches.

All models read the texts of one prepared folder, each with its own tokenizer. A row is matched if greedy decoding
would give its answers token by token. One forward pass shows that: each token is the likeliest at its position.
Tokens beyond a model's context are counted, not scored, and their row is not matched.

Results are kept by conversation, so that two models can be compared pair by pair. They are also summed by group,
the part of a conversation's id before its first ``/`` (``sorting/17``), with standard errors over conversations.
A loss that is not finite is an error, never a score.
"""

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
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

from fusion_trainer.config import EvaluateConfig, one_or_more
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.extraction import batches
from fusion_trainer.representations.split_model import SplitModel, context_length, positions_at_a_time
from fusion_trainer.text.tokenizer import load_tokenizer
from fusion_trainer.training.batches import Collator, Example, TokenFile, TokenRow, write_tokens
from varm_common import models
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.files import written_to
from varm_common.record import Record
from varm_common.standard_errors import standard_error

__all__ = ["ALL", "by_conversation", "demand_finite", "evaluate", "evaluate_each", "score"]

FORMAT, VERSION = "fusion-trainer evaluation", 2
ALL = "all"
"""The group of all rows."""


@dataclass
class Sums:
    """Sums over rows: supervised tokens and bytes, their loss in nats, matched rows, tokens beyond the context."""

    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    matched: int = 0
    cut_tokens: int = 0

    def add(self, other: "Sums") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def evaluate_each(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Score every model that ``config`` names, one after the other, each into its own output.

    Raises:
        UserError: Some could not be scored; the others are.
    """
    names, outputs = one_or_more(config.model), one_or_more(config.output)
    if len(names) != len(outputs):
        raise UserError(f"{len(names)} models and {len(outputs)} outputs: give one --output for each --model")
    results, problems = [], []
    for name, output in zip(names, outputs, strict=True):
        try:
            results.append(evaluate(config.model_copy(update={"model": name, "output": output})))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return results


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score the one model that ``config`` names, or read its scores if they exist.

    Raises:
        UserError: Model or dialogues cannot be used, the loss is not finite, or the output holds something else.
    """
    name, output = str(config.model), Path(str(config.output))
    code = config.trust_remote_code
    folder, revision = models.local_folder(name, config.revision, code=code)
    dialogues = Dialogues(config.dialogues)
    tokenizer = load_tokenizer(folder, name, code)
    weights = models.weights_fingerprint(folder, name)
    checkpoint = {"weights": weights, "config": models.config_fingerprint(folder, code)}
    inputs = {**checkpoint, "tokenizer": tokenizer.sha256, "dialogues": dialogues.fingerprint}
    how = {"dtype": models.resolved_dtype(folder, config.dtype, code), "attention": config.attention}
    identity = {"format": FORMAT, "version": VERSION, **inputs, **how}
    record = Record(output, identity, "Give another --output, or remove that file")
    if (known := record.read()) is not None:
        return known
    state = PartialState(cpu=not torch.accelerator.is_available())
    model = models.load_causal_lm(
        folder, name, dtype=config.dtype, attention=config.attention, device=state.device, trust_remote_code=code
    )
    with state.main_process_first():
        tokens = write_tokens(dialogues, tokenizer)
    conversations = [dialogues[block].conversation for block in range(len(dialogues))]
    scored = score(model, tokens, conversations, config.batch_tokens)
    demand_finite(scored, model, name)
    scores = {"groups": _groups(scored, name), "conversations": by_conversation(scored)}
    results = {"model": name, "revision": revision, **scores}
    if state.is_main_process:
        with written_to(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
            record.write(**results)
    state.wait_for_everyone()
    return {**identity, **results}


def score(
    model: Any, tokens: Path, names: list[str], batch_tokens: int, only: Container[str] | None = None
) -> dict[str, Sums]:
    """Sums by conversation. Several processes share the batches.

    Args:
        model: A causal language model in evaluation mode.
        tokens: The dialogues in its own tokens (``batches.write_tokens``).
        names: The conversation of each block.
        batch_tokens: Most tokens in a batch, padding included.
        only: The conversations to score; default all.

    Raises:
        UserError: The model cannot be split, or tokenizer and weights do not belong together.
    """
    split = SplitModel(model)
    if not split.trial()[1]:
        raise UserError(f"{type(model).__name__} does not give its logits from its layers' output alone")
    context = context_length(model)
    file = TokenFile(tokens)
    lengths = np.minimum(file.lengths, context or file.lengths.max(initial=0))
    chosen = [block for block, name in enumerate(names) if only is None or name in only]
    sums = {name: Sums() for name in names}
    state = PartialState()
    groups = batches(lengths[chosen].tolist(), batch_tokens)[state.process_index :: state.num_processes]
    mine = [[chosen[row] for row in group] for group in groups]
    hidden = not state.is_main_process or is_quiet()
    with tqdm(total=sum(map(len, mine)), unit="row", desc="evaluate", disable=hidden) as bar:
        for blocks in mine:
            rows = [file[block] for block in blocks]
            for block, row_sums in zip(blocks, _row_sums(split, rows, context), strict=True):
                sums[names[block]].add(row_sums)
            bar.update(len(blocks))
    total, *others = gather_object([sums])
    for part in others:
        for name, own in part.items():
            total[name].add(own)
    return {name: own for name, own in total.items() if own.rows}


def _row_sums(split: SplitModel, rows: list[TokenRow], context: int | None) -> Iterator[Sums]:
    """The sums of each row of a batch. A row without an answer counts as nothing."""
    read = [_within(row, context or len(row.ids)) for row in rows]
    batch = Collator(0)([[Example(number, row, None)] for number, row in enumerate(read)])
    known = split.model.get_input_embeddings().weight.shape[0]
    if (unknown := int(batch["input_ids"].max())) >= known:
        raise UserError(
            f"token {unknown} of the tokenizer has no row in the model, which has {known}: the tokenizer "
            "does not belong to these weights"
        )
    nats, hits = _scored(split, {name: tensor.to(split.device) for name, tensor in batch.items()})
    of_item = batch["of_item"].numpy()
    for number, (row, own) in enumerate(zip(rows, read, strict=True)):
        here = of_item == number
        tokens, cut = len(own.positions), len(row.positions) - len(own.positions)
        matched = len(row.positions) > 0 and not cut and bool(hits[here].all())
        yield Sums(1, tokens, own.bytes, float(nats[here].sum()), matched, cut) if row.bytes else Sums()


def _within(row: TokenRow, context: int) -> TokenRow:
    """The part of a row that fits into the model's context."""
    if len(row.ids) <= context:
        return row
    known = row.positions < context - 1
    sizes = row.gold_bytes[known]
    return TokenRow(row.ids[:context], row.positions[known], sizes, int(sizes.sum()))


@torch.inference_mode()
def _scored(split: SplitModel, batch: dict[str, Tensor]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """For each supervised position its loss in nats, and whether its token is the likeliest."""
    hidden = split.hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).flatten(0, 1)
    hidden_SH, gold_S = hidden.index_select(0, batch["positions"]), batch["gold"]
    nats, hits = [np.empty(0)], [np.empty(0, bool)]
    rows = split.model.get_input_embeddings().weight.shape[0]
    size = positions_at_a_time(hidden_SH.device, rows)
    for hidden_CH, gold_C in zip(torch.split(hidden_SH, size), torch.split(gold_S, size), strict=True):
        if len(gold_C):
            logits_CV = split.head(hidden_CH).float()
            nats_C = logits_CV.logsumexp(1) - logits_CV.gather(1, gold_C[:, None])[:, 0]
            nats.append(nats_C.double().cpu().numpy())
            hits.append((logits_CV.argmax(1) == gold_C).cpu().numpy())
    return np.concatenate(nats), np.concatenate(hits)


def by_conversation(scored: Mapping[str, Sums]) -> dict[str, dict[str, Any]]:
    """The group and the sums of each conversation."""
    return {key: {"group": _group(key), **vars(sums)} for key, sums in scored.items()}


def demand_finite(scored: Mapping[str, Sums], model: Any, name: str) -> None:
    """Check that every conversation has a number."""
    wrong = next((conversation for conversation, sums in scored.items() if not math.isfinite(sums.nats)), None)
    if wrong is None:
        return
    tensors = chain(model.named_parameters(), model.named_buffers())
    broken = next((key for key, tensor in tensors if not bool(torch.isfinite(tensor).all())), None)
    cause = "its weights are finite, so its arithmetic overflows; try --dtype float32"
    if broken:
        cause = f"its tensor `{broken}` holds NaN or infinite values; train or copy it again"
    raise UserError(f"the loss of `{name}` is not finite, first on the conversation `{wrong}`: {cause}")


def _group(conversation: str) -> str:
    head, slash, _ = conversation.partition("/")
    return head if slash else ALL


def _groups(scored: Mapping[str, Sums], model: str) -> dict[str, dict[str, float | None]]:
    """Sums, scores and standard errors by group, ``ALL`` first. A group without a scored byte is left out."""
    groups: dict[str, list[Sums]] = {ALL: list(scored.values())}
    for name in sorted(scored, key=_group):
        if _group(name) != ALL:
            groups.setdefault(_group(name), []).append(scored[name])
    scores = {name: _scores(own) for name, own in groups.items() if any(sums.bytes for sums in own)}
    if ALL not in scores:
        raise UserError(f"there is nothing to score: no token of an answer lies within the context of `{model}`")
    return scores


def _scores(conversations: list[Sums]) -> dict[str, float | None]:
    total = Sums()
    for sums in conversations:
        total.add(sums)
    loss = [sums.nats for sums in conversations], [sums.bytes for sums in conversations]
    matched = [sums.matched for sums in conversations], [sums.rows for sums in conversations]
    nats_per_byte = {"nats_per_byte": total.nats / total.bytes, "nats_per_byte_error": standard_error(loss)}
    matches = {"exact_match": total.matched / total.rows, "exact_match_error": standard_error(matched)}
    return {**vars(total), "conversations": len(conversations), **nats_per_byte, **matches}
