"""Checks a store and the files beside it: hashes, and whether the numbers are possible."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.store import RepresentationStore, Shard
from fusion_trainer.training.batches import DIGITS
from varm_common.errors import UserError
from varm_common.files import sha256_of
from varm_common.saved_arrays import damage

__all__ = ["all_problems", "store_problems"]

LEAST = float(np.finfo(np.float16).min)
SLACK = 2e-3
"""How far Σ exp(logprobs) + tail may lie from 1: float16 keeps 11 bits of a logarithm."""


def all_problems(store: RepresentationStore) -> Iterator[str]:
    """Everything wrong with a store, its dialogues, their token files, and the maps and counts beside it."""
    yield from store_problems(store)
    dialogues = Dialogues.beside(store.folder, store.identity["data"])
    if dialogues is not None:
        try:
            len(dialogues)
        except UserError as error:
            yield str(error)
        for path in sorted(dialogues.folder.glob("tokens-*-*.arrow")):
            if not sha256_of(path).startswith(path.stem.rpartition("-")[2][:DIGITS]):
                yield f"{path}: its content has changed since it was written; remove it, it will be made again"
    folder = store.folder.resolve().parent
    for path in sorted((*folder.glob("*.safetensors"), *folder.parent.glob("maps/*.safetensors"))):
        if problem := damage(path):
            yield problem


def store_problems(store: RepresentationStore) -> Iterator[str]:
    """Everything wrong with a store's shards."""
    for described in store.manifest["shards"]:
        path = store.folder / described["file"]
        if sha256_of(path) != described["sha256"]:
            yield f"{path.name}: its SHA-256 is not the manifest's; remove it and run its command again"
        try:
            shard = Shard(path, store.k)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            yield f"{path.name}: not a readable shard: {error}"
            continue
        yield from (f"{path.name}: {problem}" for problem in _wrong_content(store, shard, described))


def _wrong_content(store: RepresentationStore, shard: Shard, described: dict[str, Any]) -> Iterator[str]:
    columns = shard.of_positions
    ids = columns["ids"]
    logprobs, tail, gold = (columns[name].astype(np.float32) for name in ("logprobs", "tail", "gold_logprob"))
    counts = {"rows": len(shard.blocks), "positions": len(tail)}
    for key, found in counts.items():
        if found != described[key]:
            yield f"{found} {key}, not {described[key]}"
    if counts["rows"] + 1 != len(shard.offsets) or shard.offsets[-1] != len(tail):
        yield "its rows do not cover its positions"
        return
    total = np.exp(logprobs).sum(1) + tail
    if store.aligned:  # there, an id may have no probability
        logprobs = np.where(np.isneginf(logprobs), LEAST, logprobs)
    checks = {
        "NaN or infinite": ~(np.isfinite(logprobs).all(1) & np.isfinite(tail) & np.isfinite(gold)),
        "an id outside the vocabulary": (ids >= store.identity["vocabulary"]).any(1),
        "an id twice": (np.diff(np.sort(ids, 1), axis=1) == 0).any(1),
        "a log-probability above 0": (logprobs > 0).any(1) | (gold > 0),
        "log-probabilities that rise": (np.diff(logprobs, axis=1) > 0).any(1),
        "a tail outside [0, 1]": (tail < 0) | (tail > 1),
        "a total mass that is not 1": np.abs(total - 1) > SLACK * (1 + store.k / 10),
    }
    if store.aligned:
        checks["`paired` neither 0 nor 1"] = columns["paired"] > 1
        checks["a token of no bytes"] = columns["gold_bytes"] == 0
    for what, wrong in checks.items():
        if wrong.any():
            position = int(np.argmax(wrong))
            row = int(shard.offsets.searchsorted(position, "right")) - 1
            where = f"first in conversation {shard.conversations[row].as_py()!r}, block {shard.blocks[row]}"
            yield f"{what} at {int(wrong.sum())} positions, {where}, position {position - shard.offsets[row]}"
