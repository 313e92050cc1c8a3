"""One process's share of an extraction: blocks are tokenised, the model is queried, shards are written.

While a shard is computed, the next one is tokenised and the last one written. An engine may compute several
batches at once, also of two shards. The finished part of a shard is saved regularly, so a killed run loses little.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fusion_trainer.config import ExtractConfig
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import Reader
from fusion_trainer.representations.engine import Distributions, Engine, EngineStoppedError, Pending, Query
from fusion_trainer.representations.store import Representation, id_dtype
from fusion_trainer.representations.store_writer import StoreWriter
from fusion_trainer.text.tokenizer import supervised_positions
from varm_common.console import is_quiet
from varm_common.errors import UserError
from varm_common.files import fingerprint, written_to
from varm_common.saved_arrays import load_arrays, save_arrays

__all__ = ["Extraction", "batches"]

PARTIAL = "fusion-trainer part of a shard"
SAVED_EVERY = 240.0
"""Seconds between two saves of the finished part of a shard."""
ENOUGH_TOKENS = 2048
"""Of a batch: a larger one is hardly faster for each token."""
COLUMNS = ("ids", "logprobs", "tail", "gold_logprob")
LEAST = np.finfo(np.float16).min


@dataclass(frozen=True)
class Row:
    """A block as the model reads it: ids [tokens] as far as its context, and positions at which it is queried."""

    block: Block
    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    cut_tokens: int
    answers: list[list[int]]

    @property
    def query(self) -> Query:
        name = f"conversation {self.block.conversation!r}, block {self.block.block} ({self.block.source})"
        return Query(self.ids, self.positions, name)

    def stored(self, columns: dict[str, Any], first: int) -> Representation:
        """The row of the store; its positions are those from ``first`` on in ``columns`` of distributions."""
        own = {name: column[first : first + len(self.positions)] for name, column in columns.items()}
        return Representation(conversation=self.block.conversation, block=self.block.block, **own)


@dataclass
class Part:
    """A shard that is being computed: its rows, facts of their texts, and the finished rows by number."""

    shard: int
    rows: Sequence[Row]
    counts: Counter[str]
    done: dict[int, Representation]


@dataclass(frozen=True)
class Sent:
    """A batch that the engine computes: the numbers of its rows in the part. Without a batch, the part's end."""

    part: Part
    numbers: Sequence[int] = ()
    pending: Pending | None = None


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows grouped by length, longest first, each group at most ``batch_tokens`` when padded to its longest row.

    A row that is longer than that is a batch of its own. A batch of ``ENOUGH_TOKENS`` takes no row that would be
    padded by more than a quarter: one more batch costs less than the padding.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        longest = lengths[groups[-1][0]] if groups else 0
        padded = longest * len(groups[-1]) if groups else 0
        wasteful = padded >= ENOUGH_TOKENS and lengths[row] < 0.75 * longest
        if groups and padded + longest <= batch_tokens and not wasteful:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Extraction:
    """An engine with its model, and the store that is written."""

    def __init__(
        self, config: ExtractConfig, dialogues: Dialogues, reader: Reader, engine: Engine, writer: StoreWriter
    ) -> None:
        self.config, self.dialogues, self.reader = config, dialogues, reader
        self.engine, self.writer = engine, writer
        self.id_dtype: Any = id_dtype(writer.identity["vocabulary"])
        self._sent: deque[Sent] = deque()
        self._saved_at = time.monotonic()
        self._tokens_read = 0

    def run(self, shards: Sequence[int], silent: bool) -> None:
        """Compute and write the shards. The bar counts the pivot's tokens, and shows the model's own rate.

        Raises:
            UserError: The engine cannot compute a row, or cannot be reached any more.
        """
        lengths, starts = self.dialogues.lengths, self.writer.first_rows
        total = sum(int(lengths[starts[shard] : starts[shard + 1]].sum()) for shard in shards)
        name = self.config.model[-40:]
        bar = tqdm(total=total, unit="tok", unit_scale=True, disable=silent or is_quiet(), desc=name)
        try:
            with bar, ThreadPoolExecutor(1, "tokeniser") as ahead:
                reading = ahead.submit(self._read, shards[0])
                for shard, following in zip(shards, [*shards[1:], None], strict=True):
                    rows, counts = reading.result()
                    if following is not None:
                        reading = ahead.submit(self._read, following)
                    self._send(Part(shard, rows, counts, _load_partial(self._partial(shard), rows)), bar)
                while self._sent:
                    self._receive(bar)
            self.writer.wait()
        except (EngineStoppedError, KeyboardInterrupt):
            self._save_received()
            raise
        finally:
            self.engine.close()

    def _read(self, shard: int) -> tuple[list[Row], Counter[str]]:
        """Render and tokenise the blocks of a shard; tokens beyond the model's context are cut off and counted."""
        blocks = [self.dialogues[number] for number in range(*self.writer.first_rows[shard : shard + 2])]
        reader = replace(self.reader, counts=Counter())
        readings = [reader.read(block) for block in blocks]
        tokenised = reader.tokenizer.encode([reading.text for reading in readings])
        rows: list[Row] = []
        for block, reading, tokens in zip(blocks, readings, tokenised, strict=True):
            ids = tokens.ids[: self.engine.context]
            if len(ids) and self.engine.rows is not None and int(ids.max()) >= self.engine.rows:
                raise UserError(
                    f"{block.source}: token {int(ids.max())} of the tokenizer of {self.config.model} has no row "
                    f"in the model, which has {self.engine.rows}: the tokenizer does not belong to these weights"
                )
            positions = supervised_positions(tokens, reading.spans)
            filled = (answer for answer in reading.answers if answer.pieces)
            answers = [[answer.turn, answer.pieces[0][0], answer.pieces[-1][1], answer.end] for answer in filled]
            rows.append(Row(block, ids, positions[positions < len(ids) - 1], len(tokens) - len(ids), answers))
        return rows, reader.counts

    def _partial(self, shard: int) -> Path:
        return self.writer.path(shard).with_suffix(".partial")

    def _send(self, part: Part, bar: Any) -> None:
        """Let the engine compute the rows of a shard, while earlier batches are received."""
        queried = [number for number, row in enumerate(part.rows) if len(row.positions)]
        for group in batches([len(part.rows[number].ids) for number in queried], self.engine.batch_tokens):
            numbers = [queried[place] for place in group]
            if part.done.keys() >= set(numbers):
                bar.update(sum(part.rows[number].block.tokens for number in numbers))
                continue
            pending = self.engine.start([part.rows[number].query for number in numbers], self.config.top_k)
            self._sent.append(Sent(part, numbers, pending))
            while len(self._sent) > self.engine.ahead:
                self._receive(bar)
        self._sent.append(Sent(part))

    def _receive(self, bar: Any) -> None:
        """Wait for the batch that was sent first; after a shard's last batch, write the shard."""
        sent = self._sent.popleft()
        if sent.pending is None:
            self._write(sent.part)
            return
        rows = [sent.part.rows[number] for number in sent.numbers]
        sent.part.done |= self._received(sent.pending.result(), sent)
        self._tokens_read += sum(len(row.ids) for row in rows)
        rate = bar.format_sizeof(self._tokens_read / max(bar.format_dict["elapsed"], 1e-9))
        bar.set_postfix_str(f"{rate}tok/s of the model's own", refresh=False)
        bar.update(sum(row.block.tokens for row in rows))
        if time.monotonic() - self._saved_at > SAVED_EVERY:
            self._save_partials(sent.part)

    def _write(self, part: Part) -> None:
        k = self.config.top_k
        columns = [np.zeros((0, k), self.id_dtype), np.zeros((0, k), np.float16), *2 * [np.zeros(0, np.float16)]]
        empty = dict(zip(COLUMNS, columns, strict=True))
        done = [part.done.get(number) or row.stored(empty, 0) for number, row in enumerate(part.rows)]
        facts: dict[str, Any] = {
            "batch_tokens": self.engine.batch_tokens,
            "positions": sum(map(len, done)),
            "tokens": sum(len(row.ids) for row in part.rows),
            "cut_tokens": sum(row.cut_tokens for row in part.rows),
            **dict(sorted(part.counts.items())),
        }
        self.writer.write(part.shard, done, facts, [row.answers for row in part.rows])

    def _save_partials(self, *more: Part) -> None:
        """Save the finished rows of the shards that are not written."""
        parts = {part.shard: part for part in (*more, *(sent.part for sent in self._sent))}
        if self.writer.silent:
            return
        with written_to(self.writer.folder):
            for part in parts.values():
                _save_partial(self._partial(part.shard), part.rows, part.done)
        self._saved_at = time.monotonic()

    def _save_received(self) -> None:
        """Save what the engine has answered before it stopped."""
        for sent in self._sent:
            if sent.pending is not None and sent.pending.done():
                with suppress(Exception):  # the error that is raised is the first one
                    sent.part.done |= self._received(sent.pending.result(), sent)
        with suppress(UserError):
            self._save_partials()

    def _received(self, answer: Distributions, sent: Sent) -> dict[int, Representation]:
        """The distributions of a batch, by the number of their row."""
        columns: dict[str, NDArray[Any]] = {"ids": answer.ids.astype(self.id_dtype)}
        for name in COLUMNS[1:]:
            columns[name] = np.maximum(getattr(answer, name), LEAST).astype(np.float16, copy=False)
        finite = np.isfinite(columns["logprobs"]).all(1)
        finite &= np.isfinite(columns["tail"]) & np.isfinite(columns["gold_logprob"])
        received: dict[int, Representation] = {}
        start = 0
        for number in sent.numbers:
            row = sent.part.rows[number]
            stop = start + len(row.positions)
            if not finite[start:stop].all():
                position = int(row.positions[np.argmin(finite[start:stop])])
                raise UserError(
                    f"{self.config.model} gives NaN or infinite logits, first at token position {position} of "
                    f"{row.query.name}. {self.engine.why_not_finite()}"
                )
            received[number] = row.stored(columns, start)
            start = stop
        return received


def _partial_identity(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rows": fingerprint([[row.ids.tolist(), row.positions.tolist()] for row in rows])}


def _save_partial(path: Path, rows: Sequence[Row], done: dict[int, Representation]) -> None:
    """Save the finished rows of a shard."""
    if done:
        arrays = {name: np.concatenate([getattr(row, name) for row in done.values()]) for name in COLUMNS}
        arrays["done"] = np.array([*done], np.int64)
        save_arrays(path, PARTIAL, {"identity": _partial_identity(rows)}, arrays)


def _load_partial(path: Path, rows: Sequence[Row]) -> dict[int, Representation]:
    """The finished rows of a shard by their numbers; none if the file is missing, damaged or of other rows."""
    try:
        _, arrays = load_arrays(path, PARTIAL, _partial_identity(rows))
    except UserError:
        return {}
    done: dict[int, Representation] = {}
    start = 0
    for number in arrays.pop("done").tolist():
        done[number] = rows[number].stored(arrays, start)
        start += len(done[number])
    return done
