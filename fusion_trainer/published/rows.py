"""The rows of published representations, as ``datasets`` stores them.

A row is one conversation, in the tokens of one model. FuseChat pads it to 2,048 tokens, on the right. Its columns:

    input_ids, attention_mask            [length]
    labels                               [length]: the id if the token is learnt, else -100
    per_step_logits, per_step_indices    [length or more, k]: the k largest logits at position i, which predict
                                         token i + 1, and their ids; float16 values, not normalised
    per_step_metric_ce                   [length - 1 or more]: the cross-entropy at position i of label i + 1, in
                                         nats; 0 if that label is -100. Aligned rows lack it.
    metric_ce                            the mean of that over the learnt tokens

Rows of the pivot that a source was aligned to have, in addition, the source's distributions at the pivot's
positions, in the pivot's ids. A list has up to k entries. One entry with the logit 1.0 is no distribution: it
means that the position was not aligned, as an empty list does.

    fused_per_step_logits, fused_per_step_indices, fused_metric_ce                      FuseChat
    per_step_aligned_logits_N, per_step_aligned_indices_N, metric_ce_aligned_N          FuseLLM, source N
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fusion_trainer.data.conversations import RowError
from fusion_trainer.data.sources import load_table
from varm_common.errors import UserError
from varm_common.files import fingerprint, sha256_of

__all__ = ["IGNORED", "Published", "Row", "RowError", "Tokens", "Values", "open_published", "row_tokens"]

IGNORED = -100
TOKENS = ("input_ids", "labels", "attention_mask")
OWN = ("per_step_logits", "per_step_indices", "metric_ce")
PER_STEP = "per_step_metric_ce"
ALIGNED = (
    ("fused_per_step_logits", "fused_per_step_indices", "fused_metric_ce"),
    ("per_step_aligned_logits_{n}", "per_step_aligned_indices_{n}", "metric_ce_aligned_{n}"),
)
NUMBERED = "per_step_aligned_logits_"
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Tokens:
    """What a row says about its text: ids int64 [length] without padding, and which of them are learnt."""

    ids: NDArray[np.int64]
    learnt: NDArray[np.bool_]


Row = tuple[int, Tokens | RowError]
"""A row's number and tokens, or what is wrong with them."""


@dataclass(frozen=True)
class Values:
    """Distributions of one model in a row.

    Attributes:
        logits: float64, of all positions one after the other.
        ids: int64, in the same order.
        offsets: int64 [positions + 1], where each position begins.
        mean: Mean cross-entropy over the learnt tokens, in nats.
        per_step: float64 [positions], the cross-entropy at each position; NaN where the row does not have it.
    """

    logits: NDArray[np.float64]
    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    mean: float
    per_step: NDArray[np.float64]

    def at(self, positions: NDArray[np.integer], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The first k logits and ids at some positions, [positions, k]; -inf and -1 where there are fewer."""
        counts = np.minimum(np.diff(self.offsets)[positions], k)
        logits, ids = np.full((len(positions), k), -np.inf), np.full((len(positions), k), -1, np.int64)
        there = np.arange(k) < counts[:, None]
        entries = (self.offsets[positions][:, None] + np.arange(k))[there]
        logits[there], ids[there] = self.logits[entries], self.ids[entries]
        return logits, ids


@dataclass(frozen=True)
class Published:
    """Some published datasets, one after the other.

    Attributes:
        parts: The opened datasets.
        names: What they are called in messages.
        hashes: What identifies their content.
        aligned: The columns of the aligned source's logits, ids and mean cross-entropy; None if there is none.
        per_step: Whether there are cross-entropies of single tokens.
        k: Entries of each distribution.
    """

    parts: Sequence[Any]
    names: Sequence[str]
    hashes: Sequence[str]
    aligned: tuple[str, str, str] | None
    per_step: bool
    k: int

    @property
    def fingerprint(self) -> str:
        """Identifies the content."""
        return fingerprint(self.hashes)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def where(self, row: int) -> str:
        """The row's place, for messages."""
        part, number = self._place(row)
        return f"{self.names[part]}, row {number + 1}"

    def _place(self, row: int) -> tuple[int, int]:
        for number, part in enumerate(self.parts):
            if row < len(part):
                return number, row
            row -= len(part)
        raise IndexError(row)

    def tokens(self) -> Iterator[Row]:
        """Every row's number and tokens, or what is wrong with them."""
        row = 0
        for part in self.parts:
            columns = part.select_columns([name for name in TOKENS if name in part.column_names])
            for start in range(0, len(part), ROWS_AT_ONCE):
                table = columns.with_format("arrow")[start : start + ROWS_AT_ONCE]
                for number in range(len(table)):
                    try:
                        yield row, row_tokens(table, number)
                    except RowError as error:
                        yield row, error
                    row += 1

    def table(self, rows: Sequence[int]) -> list[tuple[pa.Table, int]]:
        """For each row its table and its number there."""
        places = [self._place(row) for row in rows]
        tables: dict[tuple[int, int], tuple[pa.Table, int]] = {}
        for part in {part for part, _ in places}:
            numbers = [number for other, number in places if other == part]
            read = self.parts[part].with_format("arrow")[numbers]
            tables |= {(part, number): (read, at) for at, number in enumerate(numbers)}
        return [tables[place] for place in places]

    def values(self, place: tuple[pa.Table, int], tokens: Tokens, *, aligned: bool = False) -> Values:
        """The distributions of a row: the row's own model, or the source that was aligned to it.

        Raises:
            RowError: They do not fit the row's tokens.
        """
        table, number = place
        names = self.aligned if aligned and self.aligned else OWN
        length = len(tokens.ids)
        logits, offsets = _lists(table, names[0], number, length)
        ids, other = _lists(table, names[1], number, length)
        if not np.array_equal(offsets, other):
            raise RowError(f"`{names[0]}` and `{names[1]}` have lists of different lengths")
        if not aligned and (np.diff(offsets)[:-1] != self.k).any():
            raise RowError(f"`{names[0]}` has not {self.k} entries at every position")
        mean = _number(table, names[2], number)
        per_step = np.full(length, np.nan)
        if not aligned and self.per_step:
            given = _array(table, PER_STEP, number).astype(np.float64)
            if len(given) < length - 1:
                raise RowError(f"`{PER_STEP}` has {len(given)} entries for {length} tokens")
            after = np.flatnonzero(tokens.learnt[1:])
            per_step[after] = given[after]
            if not np.isfinite(per_step[after]).all():
                raise RowError(f"`{PER_STEP}` is NaN or infinite at learnt tokens")
        return Values(logits.astype(np.float64), ids.astype(np.int64), offsets, mean, per_step)


def open_published(data: Sequence[str], name: str | None, split: str, source: int | None) -> Published:
    """Open published datasets: folders of ``save_to_disk``, Arrow or Parquet files, or Hub ids.

    ``source`` is the number of the aligned source, which has to be given if there are several.

    Raises:
        UserError: One cannot be read, has no rows, or lacks columns.
    """
    parts = [load_table(each, name, split) for each in data]
    shown = [each.rstrip("/").rpartition("/")[2] for each in data]
    for part, called in zip(parts, shown, strict=True):
        if missing := [column for column in ("input_ids", "labels", *OWN[:2]) if column not in part.column_names]:
            raise UserError(
                f"{called} holds no published representations: no column {', '.join(map(repr, missing))}; it has "
                f"{', '.join(map(repr, part.column_names))}"
            )
        if not len(part):
            raise UserError(f"{called} has no rows")
    columns = set.intersection(*(set(part.column_names) for part in parts))
    aligned = _aligned_columns(columns, source, shown[0])
    for column in ("metric_ce", *(aligned[1:] if aligned else ())):
        if column not in columns:
            raise UserError(
                f"{shown[0]} has no column `{column}`. Datasets that were aligned with `--metric_level token` "
                "lack it: their cross-entropies belong to the source's own positions, which are not known"
            )
    _, offsets = _lists(parts[0].with_format("arrow")[:1], OWN[0], 0, 0)
    k = int(offsets[1] - offsets[0]) if len(offsets) > 1 else 0
    if not k:
        raise UserError(f"{shown[0]}, row 1: `{OWN[0]}` is empty")
    pairs = zip(map(Path, data), parts, strict=True)
    hashes = [sha256_of(path) if path.is_file() else str(part._fingerprint) for path, part in pairs]
    return Published(parts, shown, hashes, aligned, PER_STEP in columns, k)


def _aligned_columns(columns: set[str], source: int | None, name: str) -> tuple[str, str, str] | None:
    """The columns of the aligned source; None if there is none."""
    numbers = sorted(int(column.removeprefix(NUMBERED)) for column in columns if column.startswith(NUMBERED))
    if source is None and len(numbers) > 1:
        shown = ", ".join(map(str, numbers))
        raise UserError(f"{name} has the aligned sources {shown}: choose that of --model with --aligned-source")
    chosen = source if source is not None else next(iter(numbers), 0)
    if numbers and chosen not in numbers:
        raise UserError(f"{name} has no aligned source {chosen}; choose another --aligned-source")
    filled = ((a.format(n=chosen), b.format(n=chosen), c.format(n=chosen)) for a, b, c in ALIGNED)
    return next((names for names in filled if names[0] in columns), None)


def _scalar(table: pa.Table, column: str, number: int) -> Any:
    """A row's value; what `datasets` writes as an array of fixed shape is a list, too."""
    scalar = table.column(column)[number]
    return scalar.value if isinstance(scalar, pa.ExtensionScalar) else scalar


def _array(table: pa.Table, column: str, number: int) -> NDArray[Any]:
    """A list of numbers in a row."""
    scalar = _scalar(table, column, number)
    if not scalar.is_valid or scalar.values.null_count:
        raise RowError(f"`{column}` is missing or has missing entries")
    values: NDArray[Any] = scalar.values.to_numpy(zero_copy_only=False)
    return values


def _lists(table: pa.Table, column: str, number: int, least: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The first ``least`` lists of a row's list of lists (0: all), joined, and where each begins."""
    scalar = _scalar(table, column, number)
    lists = scalar.values if scalar.is_valid else None
    if lists is None or lists.null_count:
        raise RowError(f"`{column}` is missing or has missing entries")
    if len(lists) < least:
        raise RowError(f"`{column}` has {len(lists)} positions for {least} tokens")
    lists = lists[: least or None]
    flat = lists.flatten()
    if flat.null_count:
        raise RowError(f"`{column}` has missing entries")
    sizes = pc.list_value_length(lists).to_numpy()
    return flat.to_numpy(zero_copy_only=False), np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _number(table: pa.Table, column: str, number: int) -> float:
    value = table.column(column)[number].as_py()
    if value is None or not np.isfinite(value):
        raise RowError(f"`{column}` is {'missing' if value is None else value}")
    return float(value)


def row_tokens(table: pa.Table, number: int) -> Tokens:
    ids, labels = (_array(table, column, number).astype(np.int64) for column in TOKENS[:2])
    mask = np.ones(len(ids), np.int64)
    if TOKENS[2] in table.column_names:
        mask = _array(table, TOKENS[2], number).astype(np.int64)
    if not len(ids) == len(labels) == len(mask):
        arrays = zip(TOKENS, (ids, labels, mask), strict=True)
        sizes = ", ".join(f"{len(array)} {column}" for column, array in arrays)
        raise RowError(f"its columns have different lengths: {sizes}")
    length = int(np.max(np.flatnonzero(mask), initial=-1)) + 1
    ids, labels, mask = ids[:length], labels[:length], mask[:length]
    if not mask.all():
        raise RowError(
            f"token {int(np.argmin(mask))} is padding inside the text: the model did not read it (the authors pad "
            "with the unknown token)"
        )
    learnt = labels != IGNORED
    if (wrong := learnt & (labels != ids)).any():
        at = int(np.argmax(wrong))
        raise RowError(f"label {at} is {labels[at]}, but the token is {ids[at]}")
    if not learnt[1:].any():
        raise RowError("no token of it is learnt: all labels are -100")
    return Tokens(ids, learnt)
