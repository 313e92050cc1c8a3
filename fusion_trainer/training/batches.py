"""From dialogues and stores to batches: the pivot's tokens, and the fused distribution of each supervised
position.

The dialogues' tokens are written once per tokenizer, beside the dialogues. Distributions are fused when a batch is
collated, from the memory-mapped stores, so no copy of them is written.

With packing, several blocks share a row of a batch. Each block's positions begin at 0, which is how the model's
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
import pyarrow.compute as pc
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
from fusion_trainer.training.likelihoods import ChunkRows, chunks_of
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.files import atomic_file, fingerprint, remove_abandoned, sha256_of, written_to

__all__ = ["Collator", "Example", "FusionData", "TokenFile", "TokenRow", "pack", "write_tokens"]

COLUMNS = {**dict.fromkeys(("ids", "positions", "gold_bytes"), pa.list_(pa.int32())), "bytes": pa.int32()}
TOKENS = pa.schema([pa.field(name, kind, nullable=False) for name, kind in COLUMNS.items()])
"""Columns of the token file, as in ``TokenRow``."""
RULES = 2
"""Raised with every change of the rows of the token file."""
BLOCKS_AT_ONCE = 256
DIGITS = 12
"""Digits of a hash in a file name."""
NO_BLOCK = -1
Groups = Sequence[Sequence[int]]
IGNORED = -100
"""The label of a token that is not supervised, as in transformers."""


@dataclass(frozen=True)
class TokenRow:
    """One block; a row of the token file."""

    ids: NDArray[np.int32]  # [tokens]
    positions: NDArray[np.int32]  # [supervised positions]: they predict the next token
    gold_bytes: NDArray[np.int32]  # [supervised positions], bytes of the tokens after them
    bytes: int  # supervised bytes of the text


def write_tokens(dialogues: Dialogues, tokenizer: TextTokenizer) -> Path:
    """The file with the dialogues' tokens, written if it does not exist. Its name ends with its content's hash.

    Raises:
        UserError: The dialogues' folder cannot be written.
    """
    head = f"tokens-{fingerprint([tokenizer.sha256, dialogues.fingerprint, RULES])[:DIGITS]}"
    for known in sorted(dialogues.folder.glob(f"{head}-*.arrow")):
        if known.stem.removeprefix(f"{head}-") == sha256_of(known)[:DIGITS]:
            return known
    path = dialogues.folder / f"{head}.arrow"
    same_tokenizer = dialogues.manifest["request"].get("tokenizer", tokenizer.sha256) == tokenizer.sha256
    reader = Reader(tokenizer, DIALOGUES)
    starts = range(0, len(dialogues), BLOCKS_AT_ONCE)
    with written_to(dialogues.folder):
        remove_abandoned(dialogues.folder, path.name)
        with atomic_file(path) as file, pa.ipc.new_file(file, TOKENS) as writer:
            for start in tqdm(starts, desc="tokenise", unit="batch", disable=len(starts) < 2 or is_quiet()):
                blocks = [dialogues[n] for n in range(start, min(start + BLOCKS_AT_ONCE, len(dialogues)))]
                reads = read_blocks(reader, blocks if same_tokenizer else [b.without_bos() for b in blocks])
                rows = [(read.tokens.ids, read.positions, read.sizes[read.positions + 1]) for read in reads]
                sizes = [sum(stop - first for first, stop in read.spans) for read in reads]
                columns = [*zip(*rows, strict=True), sizes]
                arrays = [pa.array(column, field.type) for column, field in zip(columns, TOKENS, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=TOKENS))
        return path.rename(path.with_stem(f"{head}-{sha256_of(path)[:DIGITS]}"))


class TokenFile:
    """The dialogues' tokens, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as source:
            self._columns = pa.ipc.open_file(source).read_all().columns

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [blocks], tokens of each block."""
        return np.asarray(pc.list_value_length(self._columns[0]), np.int64)

    def __getitem__(self, block: int) -> TokenRow:
        ids, positions, gold_bytes = (column[block].values.to_numpy() for column in self._columns[:3])
        return TokenRow(ids, positions, gold_bytes, self._columns[3][block].as_py())


@dataclass(frozen=True)
class Example:
    """One block, ready to be collated."""

    block: int
    tokens: TokenRow
    fused: Fused | None  # of the positions within every model's context, the first ones; None for CLM alone
    chunks: ChunkRows | None = None  # for likelihood matching


class FusionData(Dataset[list[Example]]):
    """Blocks with their fused distributions. An item is the blocks of one row of a batch.

    Args:
        tokens: The file from ``write_tokens``.
        stores: The pivot's own store (if it takes part) and the sources' aligned stores; none for CLM alone.
        rule: How they are fused.
        groups: The blocks of each item.
        chunks: Whether examples have their chunks. The aligned stores need them, too.
    """

    def __init__(
        self, tokens: Path, stores: Sequence[RepresentationStore], rule: Rule, groups: Groups, chunks: bool = False
    ) -> None:
        self.tokens = TokenFile(tokens)
        self.stores, self.rule, self.groups, self.chunks = list(stores), rule, groups, chunks

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item."""
        return [int(self.tokens.lengths[list(group)].sum()) for group in self.groups]

    def __getitem__(self, number: int | None) -> list[Example]:
        """The blocks of an item. For None, one block without supervised positions."""
        if number is None:
            block, nothing = self.groups[0][0], np.zeros(0, np.int32)
            return [Example(NO_BLOCK, TokenRow(self.tokens[block].ids[:1], nothing, nothing, 0), None)]
        return [self.example(block) for block in self.groups[number]]

    def example(self, block: int) -> Example:
        """One block with its fused distributions.

        Raises:
            UserError: A store's row and the pivot's tokens have different numbers of positions.
        """
        tokens = self.tokens[block]
        rows = [store[block] for store in self.stores]
        if not rows:
            return Example(block, tokens, None)
        counts = [len(row) for row in rows]
        if min(counts) != max(counts) or max(counts) > len(tokens.positions):
            in_stores = ", ".join(f"`{s.folder}` {count}" for s, count in zip(self.stores, counts, strict=True))
            raise UserError(
                f"block {block} has {len(tokens.positions)} supervised positions, but in the stores {in_stores}: "
                "they were made from other dialogues or with another tokenizer; extract and align again"
            )
        known = tokens.gold_bytes[: counts[0]]
        size = tokens.bytes if counts[0] == len(tokens.positions) else int(known.sum())
        fused = fuse(rows, cross_entropies(rows, self.rule, size, known), self.rule)
        return Example(block, tokens, fused, chunks_of(rows, fused.shares) if self.chunks else None)


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack items into rows of ``room`` tokens by best-fit decreasing. Equal lengths give equal rows.

    Returns:
        The items of each row, ascending.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # free tokens and number of each row, ascending
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

    A batch holds ``input_ids`` and ``labels`` [B, L], ``attention_mask`` or (packed) ``position_ids`` [B, L];
    for S supervised positions ``positions`` (indices into [B · L]), ``of_item`` (the number of their item),
    ``gold``, ``fused_ids`` and ``fused_probabilities`` [S, M], ``fused_tail`` (with ``tail``), ``confidence``
    and ``shares`` [S, models]; ``blocks`` of all items and ``item_of_block``; and ``bytes`` of each item. If the
    examples have chunks, there are ``chunk_…``, the fields of ``likelihoods.Chunks``.
    """

    padding: int  # the id that fills a row up; it is never learned
    packed: bool = False  # rows hold several blocks, separated by position_ids
    flat: bool = False  # all rows in one, as attention kernels for packed sequences need it
    tail: bool = False  # the rest of the fused distribution is one more outcome

    def __call__(self, items: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        examples = [example for item in items for example in item]
        counts = [sum(len(example.tokens.positions) for example in item) for item in items]
        batch = {
            **self._rows([examples] if self.flat else items),
            **self._fused(examples),
            **self._chunks(examples),
            "of_item": np.repeat(np.arange(len(items)), counts),
            "blocks": np.array([example.block for example in examples]),
            "item_of_block": np.repeat(np.arange(len(items)), [len(item) for item in items]),
            "bytes": np.array([sum(example.tokens.bytes for example in item) for item in items]),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _rows(self, rows: Sequence[Sequence[Example]]) -> dict[str, NDArray[Any]]:
        """Ids, labels, mask or places of the rows, and where their supervised positions are."""
        width = max(sum(len(example.tokens.ids) for example in row) for row in rows)
        fills = (self.padding, IGNORED, 0, 0)
        ids, labels, places, mask = (np.full((len(rows), width), fill, np.int64) for fill in fills)
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
        attention = {"position_ids": places} if self.packed else {"attention_mask": mask}
        positions_S, gold_S = (np.concatenate(parts).astype(np.int64) for parts in (positions, golds))
        return {"input_ids": ids, "labels": labels, **attention, "positions": positions_S, "gold": gold_S}

    def _fused(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """The fused distributions of all supervised positions; zeros where nothing is fused."""
        fused = [example.fused for example in examples if example.fused is not None]
        size = sum(len(example.tokens.positions) for example in examples)
        entries = max((distribution.ids.shape[1] for distribution in fused), default=0)
        models = max((distribution.shares.shape[1] for distribution in fused), default=0)
        columns: dict[str, NDArray[Any]] = {
            "fused_ids": np.zeros((size, entries), np.int64),
            "fused_probabilities": np.zeros((size, entries), np.float32),
            "shares": np.zeros((size, models), np.float32),
            "confidence": np.zeros(size, np.float32),
            "fused_tail": np.zeros(size, np.float32),
        }
        start = 0
        for example in examples:
            if (part := example.fused) is not None:
                here = slice(start, start + len(part.ids))
                columns["fused_ids"][here, : part.ids.shape[1]] = part.ids
                columns["fused_probabilities"][here, : part.ids.shape[1]] = part.probabilities
                columns["shares"][here] = part.shares
                columns["confidence"][here], columns["fused_tail"][here] = part.confidence, part.tail
            start += len(example.tokens.positions)
        if not self.tail:
            del columns["fused_tail"]
        return columns

    def _chunks(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """The chunks of all examples; nothing if no example has any."""
        counts = [len(example.tokens.positions) for example in examples]
        starts = np.cumsum([0, *counts[:-1]])
        rows = zip(starts, (example.chunks for example in examples), strict=True)
        parts = [(chunks.first + start, *chunks[1:]) for start, chunks in rows if chunks is not None]
        if not parts:
            return {}
        first, size, logprob, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
        chunk = np.repeat(np.arange(len(first)), size)
        within = np.arange(len(chunk)) - np.repeat(np.cumsum(size) - size, size)
        columns = {"first": first, "positions": first[chunk] + within, "chunk": chunk}
        columns |= {"logprob": logprob, "weight": weight}
        return {f"chunk_{name}": column for name, column in columns.items()}
