"""Random data for the training benchmark: dialogues, and the stores of a pivot and its sources.

The dialogues are those of examples/make_sharegpt.py. The stores are written by the program's own writer without
asking a model: ten plausible entries at each position, and cross-entropies of which now the pivot's and now the
source's is lower. The cost of a training step does not depend on their values.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import extract
import numpy as np
import torch

from fusion_trainer.config import PrepareConfig
from fusion_trainer.data.prepare import prepare
from fusion_trainer.representations import store
from fusion_trainer.text.tokenizer import load_tokenizer
from fusion_trainer.training.batches import FusionData, TokenFile, write_tokens
from fusion_trainer.training.fusion import Rule

K, SOURCES = 10, 3


def prepared(work: Path, vocabulary: int, length: int, tokens: int, text: bool = False) -> FusionData:
    """Blocks of dialogues (or of plain text, where all is supervised), with the stores of pivot and sources."""
    pivot, data = work / "pivot", work / "data.jsonl"
    lines = list(extract.texts(islice(extract.conversations(1), extract.TRAINED_ON)))
    extract.write_model(pivot, f"narrow-{vocabulary // 1000}k", lines, torch.device("cpu"))
    rows, characters = [], 0
    for row in extract.conversations(0):
        words = "\n".join(extract.texts([row]))
        rows.append({"id": row["id"], "text": words} if text else row)
        characters += len(words)
        if characters > extract.CHARACTERS_PER_TOKEN * tokens:
            break
    extract.write_jsonl(data, rows)
    config = PrepareConfig(data=[str(data)], pivot=str(pivot), template="chatml", max_length=length)
    path = write_tokens(prepare(config, work, quiet=True), load_tokenizer(pivot, "pivot"))
    stores = [random_store(work / f"store-{n}", TokenFile(path), n, vocabulary) for n in range(1 + SOURCES)]
    return FusionData(path, stores, Rule(), [[block] for block in range(len(stores[0]))])


def random_store(folder: Path, tokens: TokenFile, number: int, vocabulary: int) -> store.RepresentationStore:
    """Number 0 is the pivot's own; the others are aligned to it."""
    rng, blocks = np.random.default_rng(number), len(tokens.lengths)
    identity = {"top_k": K, "vocabulary": vocabulary}
    identity |= {"kind": store.ALIGNED, "version": store.WITH_CHUNKS} if number else {}
    rows = [random_row(rng, tokens, block, vocabulary, number > 0) for block in range(blocks)]
    return extract.write_store(folder, identity, [0, blocks], [rows])


def random_row(rng: Any, tokens: TokenFile, block: int, vocabulary: int, aligned: bool) -> store.Representation:
    row = tokens[block]
    golds, size = row.ids[row.positions + 1].astype(np.int64), len(row.positions)
    steps = 7919 * (np.arange(K) - rng.integers(3, size=(size, 1)))  # a prime: no id twice at a position
    tail, shares = rng.uniform(0.01, 0.2, size), -np.sort(-(rng.exponential(size=(size, K)) ** 3))
    shares *= ((1 - tail) / shares.sum(1))[:, None]
    ids = ((golds[:, None] + steps) % vocabulary).astype(store.id_dtype(vocabulary))
    gold_logprob = np.log(shares[:, 0] * rng.uniform(0.5, 1)).astype(np.float16)
    logprobs = np.log(shares).clip(-30).astype(np.float16)
    columns = (ids, logprobs, tail.astype(np.float16), gold_logprob, f"block {block}", 0)
    if not aligned:
        return store.Representation(*columns)
    entropy = -float(gold_logprob.sum(dtype=np.float64))
    gold_bytes = row.gold_bytes.clip(1).astype(np.uint16)
    means = entropy / max(1, size), entropy / max(1, row.bytes)
    of_pivot = (mean * rng.uniform(0.9, 1.1) for mean in means)
    sizes, first = np.zeros(size, np.uint16), np.flatnonzero(rng.random(size) < 0.8)
    sizes[first] = np.diff(first, append=size)
    logprobs = np.where(sizes, -rng.exponential(2.0, size), 0.0).astype(np.float16)
    chunks = {"chunk_size": sizes, "chunk_logprob": logprobs}
    return store.Representation(*columns, np.ones(size, np.uint8), gold_bytes, *means, *of_pivot, **chunks)
