"""Representations as the authors of FuseChat and FuseLLM publish them, of tiny models.

Follows the meaning of the published columns, not our code: rows are padded on the right, logits are float16 and
not normalised, position i predicts token i + 1, and cross-entropies are 0 where nothing is learnt.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch.nn.functional import cross_entropy

Row = dict[str, Any]
Chat = Sequence[tuple[str, str]]
IGNORED = -100
USER, ASSISTANT = "GPT4 Correct User:", "GPT4 Correct Assistant:"


def chat_text(chat: Chat, end: str) -> str:
    """A conversation in the published template; every model has its own ``end`` of turn."""
    return "".join(f"{USER} {question}{end}{ASSISTANT} {answer}{end}" for question, answer in chat)


def represented(folder: Path, texts: Sequence[str], end: str | None, length: int, k: int = 10) -> list[Row]:
    """The rows of a model in ``folder``; with ``end`` answers are learnt, without it every token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    padding = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.pad_token_id
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=length, add_special_tokens=end is not None)["input_ids"]
        labels = learnt(tokenizer, ids, end) if end else [*ids]
        rest = [padding] * (length - len(ids))
        mask = [1] * len(ids) + [0] * len(rest)
        row = {"input_ids": ids + rest, "labels": labels + [IGNORED] * len(rest), "attention_mask": mask}
        rows.append(row | distributions(model, row, k))
    return rows


def learnt(tokenizer: Any, ids: Sequence[int], end: str) -> list[int]:
    """Labels: every second turn, from after the assistant's name to its end."""
    ending = tokenizer.convert_tokens_to_ids(end)
    name = len(tokenizer(ASSISTANT, add_special_tokens=False)["input_ids"])
    labels, turn, place = [], 0, 0
    for token in ids:
        labels.append(token if turn % 2 and place >= name else IGNORED)
        turn, place = (turn + 1, 0) if token == ending else (turn, place + 1)
    return labels


@torch.no_grad()
def distributions(model: Any, row: Row, k: int) -> Row:
    ids, labels, mask = (torch.tensor([row[name]]) for name in ("input_ids", "labels", "attention_mask"))
    logits = model(input_ids=ids, attention_mask=mask).logits[0].half()
    entropies = cross_entropy(logits[:-1].float(), labels[0, 1:], reduction="none").half()
    learnt = labels[0, 1:] != IGNORED
    values, indices = torch.topk(logits.float(), k)
    return {
        "per_step_logits": values.tolist(),
        "per_step_indices": indices.tolist(),
        "per_step_metric_ce": entropies.tolist(),
        "metric_ce": float((entropies.float() * learnt).sum() / learnt.sum()),
    }


def with_source(pivot: Sequence[Row], source: Sequence[Row], unaligned: Sequence[int] = ()) -> list[Row]:
    """FuseChat's aligned rows of a source with the pivot's vocabulary.

    At the positions ``unaligned`` of each row the source has one entry, the next token, with the logit 1.0; at the
    position before each of them it has none.
    """
    rows = []
    for own, other in zip(pivot, source, strict=True):
        logits, ids = ([*other[name]] for name in ("per_step_logits", "per_step_indices"))
        for place in unaligned:
            if place + 1 < len(logits):
                logits[place], ids[place] = [1.0], [own["input_ids"][place + 1]]
                logits[place - 1], ids[place - 1] = [], []
        kept = {name: value for name, value in own.items() if name != "per_step_metric_ce"}
        fused = {"fused_per_step_logits": logits, "fused_per_step_indices": ids}
        rows.append({**kept, **fused, "fused_metric_ce": other["metric_ce"]})
    return rows


def save(folder: Path, rows: Sequence[Row]) -> Path:
    """As ``save_to_disk`` of a dataset with a ``train`` split."""
    table = datasets.Dataset.from_list([*rows])
    halves = {
        name: datasets.List(datasets.List(datasets.Value("float16")))
        for name in table.features
        if "logits" in name
    }
    table = table.cast(datasets.Features({**table.features, **halves}))
    datasets.DatasetDict({"train": table}).save_to_disk(folder)
    return folder
