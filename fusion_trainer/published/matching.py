"""Which row of a published dataset belongs to which block of the dialogues.

They are matched by their ids: a block, read by the row's model, has the ids of the row. Rows that were cut at
their maximum length have only a common start with their block.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.alignment.pairing import Read, read_blocks
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import Reader
from fusion_trainer.published.rows import RowError
from fusion_trainer.published.rows import Tokens as RowTokens
from fusion_trainer.published.texts import CUT, common_start, without_bos

__all__ = ["Matches", "match", "read_all"]

STARTS = (512, 64)
"""Longer blocks are also found by so many first tokens: their rows may be cut."""
BLOCKS_AT_ONCE = 256
UNKNOWN = -1


@dataclass
class Matches:
    """The row of each block.

    Attributes:
        row_of: int64 [blocks]; -1 for a block without a row.
        problems: Row and reason of each row that cannot be used.
    """

    row_of: NDArray[np.int64]
    problems: list[tuple[int, str]] = field(default_factory=list)


def read_all(dialogues: Dialogues, reader: Reader) -> Iterator[tuple[int, Read]]:
    """Every block as a model reads it."""
    for start in range(0, len(dialogues), BLOCKS_AT_ONCE):
        numbers = range(start, min(start + BLOCKS_AT_ONCE, len(dialogues)))
        yield from zip(numbers, read_blocks(reader, [dialogues[number] for number in numbers]), strict=True)


def match(
    dialogues: Dialogues,
    reader: Reader,
    rows: Iterable[tuple[int, RowTokens | RowError]],
    blocks: Iterable[tuple[int, Read]],
) -> Matches:
    """Find the row of each block. Of equal blocks each gets a row of its own, in order.

    Args:
        dialogues: The blocks.
        reader: How the rows' model reads them.
        rows: Every row of the dataset.
        blocks: The blocks as read by ``reader``.
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
    matches = Matches(np.full(len(dialogues), UNKNOWN, np.int64))
    for row, tokens in rows:
        if isinstance(tokens, RowError):
            matches.problems.append((row, str(tokens)))
            continue
        ids = without_bos(reader.tokenizer, tokens.ids)
        if equal := whole.get(_key(ids)):
            matches.row_of[equal.pop()] = row
            continue
        candidates = (block for key in _starts(ids) for block in starts.get(key, ()))
        free = (block for block in candidates if matches.row_of[block] == UNKNOWN)
        found = next((block for block in free if _same_start(dialogues, reader, block, ids)), None)
        if found is None:
            matches.problems.append((row, f"its ids are not those of any block in `{dialogues.folder}`"))
        else:
            matches.row_of[found] = row
    return matches


def _same_start(dialogues: Dialogues, reader: Reader, block: int, ids: NDArray[np.integer]) -> bool:
    """Whether the block or the row is the start of the other, but for some last tokens."""
    read = without_bos(reader.tokenizer, read_blocks(reader, [dialogues[block]])[0].tokens.ids)
    return common_start(read, ids) >= min(len(read), len(ids)) - CUT


def _starts(ids: NDArray[np.integer]) -> Iterator[bytes]:
    return (_key(ids[:size]) for size in STARTS if len(ids) > size)


def _key(ids: NDArray[np.integer]) -> bytes:
    return hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16).digest()
