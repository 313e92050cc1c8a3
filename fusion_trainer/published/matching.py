"""Which row of a published dataset belongs to which block of the dialogues.

They are matched by their ids: a block, read by the row's model, has the ids of the row. Rows that were cut at
their maximum length have only a common start with their block.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.alignment.pairing import Read, read_blocks
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import Reader
from fusion_trainer.published.rows import Row, RowError
from fusion_trainer.published.texts import CUT, common_start, without_bos

__all__ = ["match", "read_all"]

STARTS = (512, 64)
"""Longer blocks are also found by so many first tokens: their rows may be cut."""
BLOCKS_AT_ONCE = 256
UNKNOWN = -1


def read_all(dialogues: Dialogues, reader: Reader) -> Iterator[tuple[int, Read]]:
    """Every block as a model reads it."""
    for start in range(0, len(dialogues), BLOCKS_AT_ONCE):
        numbers = range(start, min(start + BLOCKS_AT_ONCE, len(dialogues)))
        yield from zip(numbers, read_blocks(reader, [dialogues[number] for number in numbers]), strict=True)


def match(
    dialogues: Dialogues, reader: Reader, rows: Iterable[Row], blocks: Iterable[tuple[int, Read]]
) -> tuple[NDArray[np.int64], list[tuple[int, str]]]:
    """Find the row of each block. Of equal blocks each gets a row of its own, in order.

    Args:
        dialogues: The blocks.
        reader: How the rows' model reads them.
        rows: Every row of the dataset.
        blocks: The blocks as read by ``reader``.

    Returns:
        int64 [blocks], the row of each block, -1 for none; and row and reason of each row that cannot be used.
    """
    whole: dict[bytes, list[int]] = {}
    starts: dict[bytes, list[int]] = {}
    for number, read in blocks:
        ids = without_bos(reader.tokenizer, read.tokens.ids)
        whole.setdefault(_key(ids), []).append(number)
        for key in _starts(ids):
            starts.setdefault(key, []).append(number)
    for numbers in whole.values():
        numbers.reverse()
    row_of = np.full(len(dialogues), UNKNOWN, np.int64)
    problems: list[tuple[int, str]] = []
    for row, tokens in rows:
        if isinstance(tokens, RowError):
            problems.append((row, str(tokens)))
            continue
        ids = without_bos(reader.tokenizer, tokens.ids)
        if equal := whole.get(_key(ids)):
            row_of[equal.pop()] = row
            continue
        candidates = (block for key in _starts(ids) for block in starts.get(key, ()))
        for block in candidates:
            if row_of[block] == UNKNOWN and _same_start(dialogues, reader, block, ids):
                row_of[block] = row
                break
        else:
            problems.append((row, f"its ids are not those of any block in `{dialogues.folder}`"))
    return row_of, problems


def _same_start(dialogues: Dialogues, reader: Reader, block: int, ids: NDArray[np.integer]) -> bool:
    """Whether the block or the row is the start of the other, but for some last tokens."""
    read = without_bos(reader.tokenizer, read_blocks(reader, [dialogues[block]])[0].tokens.ids)
    return common_start(read, ids) >= min(len(read), len(ids)) - CUT


def _starts(ids: NDArray[np.integer]) -> Iterator[bytes]:
    return (_key(ids[:size]) for size in STARTS if len(ids) > size)


def _key(ids: NDArray[np.integer]) -> bytes:
    return hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16).digest()
