"""Dialogues and stores → batches: the pivot's tokens, and what each supervised position learns from.

The dialogues' tokens are kept in a file beside them, made once per tokenizer. Distributions are fused when a batch
is collated, from the memory-mapped stores: no copy of them is written.

With packing several blocks share a row of a batch, each with positions of its own from 0 on, by which the model's
attention keeps them apart.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fusion_trainer.alignment.pairing import read_blocks
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import DIALOGUES, Reader
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer
from fusion_trainer.training.fusion import Fused, Rule, cross_entropies, fuse
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.files import fingerprint, remove_abandoned, sha256_of, whole_file, written_to

__all__ = ["Collator", "Example", "FusionData", "TokenFile", "pack", "write_tokens"]

TOKENS = pa.schema(
    [
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("positions", pa.list_(pa.int32()), nullable=False),  # supervised: they predict the next token
        pa.field("gold_bytes", pa.list_(pa.int32()), nullable=False),  # bytes of the tokens that follow them
        pa.field("bytes", pa.int32(), nullable=False),  # supervised bytes of the text
    ]
)
RULES = 2
"""Raised with every change of what a row of the token file holds."""
BLOCKS_AT_ONCE = 256
DIGITS = 12
"""Of a hash in a file's name."""
NO_BLOCK = -1
IGNORED = -100
"""The label of a token that is not supervised, as everywhere in transformers."""


@dataclass(frozen=True)
class TokenRow:
    """One block: int32 [tokens], int32 [positions], int32 [positions], and its supervised bytes."""

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    gold_bytes: NDArray[np.int32]
    bytes: int


def write_tokens(dialogues: Dialogues, tokenizer: TextTokenizer) -> Path:
    """The file with the dialogues' tokens, made if it is not there; its name ends with the hash of its content.

    Raises:
        UserError: The dialogues' folder cannot be written.
    """
    head = f"tokens-{fingerprint([tokenizer.sha256, dialogues.fingerprint, RULES])[:DIGITS]}"
    for known in sorted(dialogues.folder.glob(f"{head}-*.arrow")):
        if known.stem.removeprefix(f"{head}-") == sha256_of(known)[:DIGITS]:
            return known
    path = dialogues.folder / f"{head}.arrow"
    own = dialogues.manifest["request"].get("tokenizer", tokenizer.sha256) == tokenizer.sha256
    reader = Reader(tokenizer, DIALOGUES)
    starts = range(0, len(dialogues), BLOCKS_AT_ONCE)
    with written_to(dialogues.folder):
        remove_abandoned(dialogues.folder, path.name)
    with written_to(dialogues.folder), whole_file(path) as file, pa.ipc.new_file(file, TOKENS) as writer:
        for start in tqdm(starts, desc="tokenise", unit="batch", disable=len(starts) < 2 or is_quiet()):
            blocks = [dialogues[n] for n in range(start, min(start + BLOCKS_AT_ONCE, len(dialogues)))]
            rows: list[tuple[Any, ...]] = []
            for read in read_blocks(reader, blocks if own else [block.without_bos() for block in blocks]):
                size = sum(stop - first for first, stop in read.spans)
                rows.append((read.tokens.ids, read.positions, read.sizes[read.positions + 1], size))
            columns = zip(zip(*rows, strict=True), TOKENS, strict=True)
            arrays = [pa.array(list(column), field.type) for column, field in columns]
            writer.write_batch(pa.record_batch(arrays, schema=TOKENS))
    with written_to(dialogues.folder):
        return path.rename(path.with_stem(f"{head}-{sha256_of(path)[:DIGITS]}"))


class TokenFile:
    """The dialogues' tokens, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._columns = [[batch.column(name) for name in TOKENS.names] for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [blocks], tokens of each."""
        offsets = [np.diff(columns[0].offsets.to_numpy()) for columns in self._columns]
        return np.concatenate(offsets).astype(np.int64)

    def __getitem__(self, block: int) -> TokenRow:
        part = int(self._starts.searchsorted(block, "right")) - 1
        columns, row = self._columns[part], block - int(self._starts[part])
        ids, positions, gold_bytes = (_list(column, row) for column in columns[:3])
        return TokenRow(ids, positions, gold_bytes, columns[3][row].as_py())


def _list(column: pa.ListArray, row: int) -> NDArray[np.int32]:
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    found: NDArray[np.int32] = column.values.slice(start, stop - start).to_numpy()
    return found


@dataclass(frozen=True)
class Example:
    """One block, ready to be collated.

    Attributes:
        block: Its number.
        tokens: Its ids and supervised positions.
        fused: What the first of them learn from (all, but for what lies beyond a model's context); None for CLM
            alone.
    """

    block: int
    tokens: TokenRow
    fused: Fused | None


class FusionData(Dataset[list[Example]]):
    """Blocks with their fused distributions; an item is the blocks of one row of a batch.

    Args:
        tokens: The file of ``write_tokens``.
        stores: The pivot's own (if it takes part) and the sources' aligned ones; none for CLM alone.
        rule: How they are fused.
        groups: The blocks of each item.
    """

    def __init__(
        self, tokens: Path, stores: Sequence[RepresentationStore], rule: Rule, groups: Sequence[Sequence[int]]
    ) -> None:
        self.tokens = TokenFile(tokens)
        self.stores, self.rule, self.groups = list(stores), rule, groups

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item."""
        return [int(self.tokens.lengths[list(group)].sum()) for group in self.groups]

    def __getitem__(self, number: int | None) -> list[Example]:
        """The blocks of an item; for None one of which nothing is learned."""
        if number is None:
            block, nothing = self.groups[0][0], np.zeros(0, np.int32)
            return [Example(NO_BLOCK, TokenRow(self.tokens[block].ids[:1], nothing, nothing, 0), None)]
        return [self.example(block) for block in self.groups[number]]

    def example(self, block: int) -> Example:
        """One block with its fused distributions.

        Raises:
            UserError: A store's row has another number of positions than the pivot's tokens.
        """
        tokens = self.tokens[block]
        rows = [store[block] for store in self.stores]
        if not rows:
            return Example(block, tokens, None)
        sizes = [len(row) for row in rows]
        if min(sizes) != max(sizes) or max(sizes) > len(tokens.positions):
            found = ", ".join(f"`{s.folder}` {size}" for s, size in zip(self.stores, sizes, strict=True))
            raise UserError(
                f"block {block} has {len(tokens.positions)} supervised positions, but in the stores {found}: they "
                "were made of other dialogues or with another tokenizer; extract and align again"
            )
        known = tokens.gold_bytes[: sizes[0]]
        size = tokens.bytes if sizes[0] == len(tokens.positions) else int(known.sum())
        return Example(block, tokens, fuse(rows, cross_entropies(rows, self.rule, size, known), self.rule))


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Items in as few rows of ``room`` tokens as best-fit decreasing needs; the same for the same lengths.

    Returns:
        The items of each row, ascending.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # what is free in a row, and which; ascending
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect_left(free, (lengths[item], -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(item)
        insort(free, (left - lengths[item], row))
    return [sorted(row) for row in rows]


@dataclass
class Collator:
    """Items → a batch of tensors.

    Attributes:
        padding: The id that fills a row up; it is never learned.
        packed: Rows hold several blocks, told apart by ``position_ids``.
        flat: All rows in one, as attention kernels for packed sequences want it.
        tail: The rest of the fused distribution is an outcome of its own.

    A batch holds ``input_ids`` and ``labels`` [B, L], ``attention_mask`` or ``position_ids`` [B, L]; for S
    supervised positions ``positions`` (indices into [B · L]), ``of_item`` (the item they are of), ``gold``,
    ``fused_ids`` and ``fused_probabilities`` [S, M], ``fused_tail`` (with ``tail``), ``confidence`` and ``shares``
    [S, models]; ``blocks`` of all items and ``item_of_block``, and ``bytes`` of each item.
    """

    padding: int
    packed: bool = False
    flat: bool = False
    tail: bool = False

    def __call__(self, items: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        rows = [[example for item in items for example in item]] if self.flat else items
        width = max(sum(len(example.tokens.ids) for example in row) for row in rows)
        ids = np.full((len(rows), width), self.padding, np.int64)
        labels = np.full((len(rows), width), IGNORED, np.int64)
        places = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        positions, golds = [], []
        for number, row in enumerate(rows):
            start = 0
            for example in row:
                tokens = example.tokens
                stop = start + len(tokens.ids)
                ids[number, start:stop] = tokens.ids
                labels[number, start + tokens.positions + 1] = gold = tokens.ids[tokens.positions + 1]
                places[number, start:stop] = np.arange(stop - start)
                mask[number, start:stop] = 1
                positions.append(number * width + start + tokens.positions)
                golds.append(gold)
                start = stop
            places[number, start:] = np.arange(width - start)
        batch: dict[str, NDArray[Any]] = {"input_ids": ids, "labels": labels}
        batch["position_ids" if self.packed else "attention_mask"] = places if self.packed else mask
        examples = [example for item in items for example in item]
        of_item = np.repeat(np.arange(len(items)), [sum(len(e.tokens.positions) for e in item) for item in items])
        batch |= {"positions": np.concatenate(positions).astype(np.int64), "of_item": of_item}
        batch |= {"gold": np.concatenate(golds).astype(np.int64), **self._fused(examples)}
        batch["blocks"] = np.array([example.block for example in examples])
        batch["item_of_block"] = np.repeat(np.arange(len(items)), [len(item) for item in items])
        batch["bytes"] = np.array([sum(example.tokens.bytes for example in item) for item in items])
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _fused(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        fused = [example.fused for example in examples if example.fused is not None]
        entries = max((one.ids.shape[1] for one in fused), default=0)
        models = max((one.shares.shape[1] for one in fused), default=0)
        size = sum(len(example.tokens.positions) for example in examples)
        ids = np.zeros((size, entries), np.int64)
        probabilities, shares = np.zeros((size, entries), np.float32), np.zeros((size, models), np.float32)
        tail, confidence = np.zeros(size, np.float32), np.zeros(size, np.float32)
        start = 0
        for example in examples:
            if (one := example.fused) is not None:
                here = slice(start, start + len(one.ids))
                ids[here, : one.ids.shape[1]] = one.ids
                probabilities[here, : one.ids.shape[1]] = one.probabilities
                tail[here], confidence[here], shares[here] = one.tail, one.confidence, one.shares
            start += len(example.tokens.positions)
        found = {
            "fused_ids": ids,
            "fused_probabilities": probabilities,
            "shares": shares,
            "confidence": confidence,
        }
        return {**found, "fused_tail": tail} if self.tail else found
