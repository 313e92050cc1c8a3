"""Rows of a published dataset → the shards of a store."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fusion_trainer.alignment.align_row import name_the_end
from fusion_trainer.alignment.pairing import Read, read_blocks
from fusion_trainer.data.answers import END, supervised_spans
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.conversations import bad_rows_message
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import Reader
from fusion_trainer.published.distributions import Codec
from fusion_trainer.published.matching import UNKNOWN
from fusion_trainer.published.rows import Published, RowError, Values, row_tokens
from fusion_trainer.published.texts import common_start, without_bos
from fusion_trainer.representations.store import CROSS_ENTROPIES, Representation, RepresentationStore
from fusion_trainer.representations.store_writer import StoreWriter
from fusion_trainer.text.tokenizer import supervised_positions
from varm_common.console import is_quiet
from varm_common.errors import UserError

__all__ = ["Aligned", "Transcription"]


@dataclass(frozen=True)
class Aligned:
    """What the row of an aligned source needs besides the published row.

    Attributes:
        pivot_store: The pivot's own store.
        source_reader: How the source read the blocks.
        end: The id of the pivot's vocabulary that the source's end of an answer has.
        unpaired: What takes the place of positions that were not aligned: ``pivot`` or ``gold``.
    """

    pivot_store: RepresentationStore
    source_reader: Reader
    end: int | None
    unpaired: str


@dataclass
class Transcription:
    """Writes one store.

    Attributes:
        row_of: int64 [blocks], the row of each block; -1 for a block without one.
        skip: Leave out rows that cannot be used. They are collected in ``problems``.
        problems: Place and reason of these rows.
    """

    published: Published
    row_of: NDArray[np.int64]
    dialogues: Dialogues
    reader: Reader
    codec: Codec
    skip: bool
    aligned: Aligned | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)

    def write(self, writer: StoreWriter) -> None:
        """Write the shards that are missing, and the manifest.

        Raises:
            UserError: Rows of a shard cannot be used, and they are not to be left out.
        """
        missing, starts = writer.missing(), writer.first_rows
        sizes = {shard: int(self.dialogues.lengths[slice(*starts[shard : shard + 2])].sum()) for shard in missing}
        total, hidden = sum(sizes.values()), not missing or is_quiet()
        with tqdm(total=total, unit="tok", unit_scale=True, disable=hidden, desc="import") as bar:
            for shard, size in sizes.items():
                rows, answers, facts = self._shard(range(*starts[shard : shard + 2]))
                writer.write(shard, rows, facts, None if self.aligned else answers)
                bar.update(size)
        writer.wait()
        writer.finish()

    def _shard(self, numbers: range) -> tuple[list[Representation], list[list[list[int]]], dict[str, int]]:
        blocks = [self.dialogues[number] for number in numbers]
        wanted = [int(self.row_of[number]) for number in numbers]
        tables = iter(self.published.table([row for row in wanted if row != UNKNOWN]))
        counts: Counter[str] = Counter(positions=0, tokens=0, cut_tokens=0, bad_rows=0, without_row=0)
        rows, problems = list[Representation](), list[tuple[str, str]]()
        sources = read_blocks(self.aligned.source_reader, blocks) if self.aligned else [None] * len(blocks)
        reads = read_blocks(self.reader, blocks)
        for number, block, row, read, source in zip(numbers, blocks, wanted, reads, sources, strict=True):
            table = None if row == UNKNOWN else next(tables)
            counts["without_row"] += table is None
            try:
                rows.append(self._row(number, block, read, source, table, counts))
            except RowError as error:
                problems.append((self.published.where(row), str(error)))
                rows.append(self._row(number, block, read, source, None, counts))
        if problems and not self.skip:
            raise UserError(bad_rows_message(problems))
        self.problems += problems
        counts["bad_rows"] += len(problems)
        counts["positions"] = sum(map(len, rows))
        counts["unknown_tail"] = sum(int(np.isnan(row.tail).sum()) for row in rows)
        counts["unknown_gold_logprob"] = sum(int(np.isnan(row.gold_logprob).sum()) for row in rows)
        answers = [
            [[own.turn, own.pieces[0][0], own.pieces[-1][1], own.end] for own in read.answers if own.pieces]
            for read in reads
        ]
        return rows, answers, dict(counts)

    def _row(
        self, number: int, block: Block, read: Read, source: Read | None, table: Any, counts: Counter[str]
    ) -> Representation:
        """A block's row; without ``table``, a row of what is known without its published row."""
        empty = Representation(conversation=block.conversation, block=block.block, **self.codec.empty())
        if self.aligned is None:
            return empty if table is None else self._own(empty, read, table, counts)
        own = self.aligned.pivot_store[number]
        if table is None:
            unknown = dict.fromkeys(CROSS_ENTROPIES, float("nan"))
            return _with_entropies(own, np.zeros(len(own), np.uint8), read, unknown)
        assert source is not None
        return self._aligned(self.aligned, own, read, source, table, counts)

    def _own(self, empty: Representation, read: Read, table: Any, counts: Counter[str]) -> Representation:
        tokens = row_tokens(*table)
        positions, places = self._places(read, tokens.ids)
        golds = read.tokens.ids[positions + 1]
        columns, foreign = self.codec.own(self.published.values(table, tokens), places, golds)
        counts["tokens"] += len(tokens.ids)
        sizes = [len(without_bos(self.reader.tokenizer, ids)) for ids in (read.tokens.ids, tokens.ids)]
        counts["cut_tokens"] += max(0, sizes[0] - sizes[1])
        counts["foreign_ids"] += foreign
        return replace(empty, **columns)

    def _aligned(
        self, aligned: Aligned, own: Representation, read: Read, source: Read, table: Any, counts: Counter[str]
    ) -> Representation:
        tokens = row_tokens(*table)
        positions, places = self._places(read, tokens.ids)
        if len(positions) < len(own):
            raise RowError(f"it has {len(positions)} learnt tokens, the pivot's store {len(own)}")
        positions, places = positions[: len(own)], places[: len(own)]
        golds = read.tokens.ids[positions + 1]
        values = self.published.values(table, tokens, aligned=True)
        row, foreign = self.codec.aligned(values, places, golds, own, aligned.unpaired)
        assert row.paired is not None
        paired = row.paired.astype(bool)
        at_end = read.places.place[positions] == END
        name_the_end(row, paired & at_end, golds, aligned.end)
        here = np.where(row.ids == golds[:, None], np.exp(row.logprobs.astype(np.float64)), 0.0).sum(1)
        mine = self.published.values(table, tokens)
        entropies = _entropies(mine, values, int(tokens.learnt[1:].sum()), read, source)
        counts.update(
            paired=int(paired.sum()),
            no_partner=int((~paired).sum()),
            ends=int(at_end.sum()),
            ends_paired=int((at_end & paired).sum()),
            ends_ppm=round(1e6 * float(here[at_end & paired].sum())),
            foreign_ids=foreign,
            compared=1,
            better_by_token=int(entropies["ce_per_token"] < entropies["pivot_ce_per_token"]),
            better_by_byte=int(entropies["ce_per_byte"] < entropies["pivot_ce_per_byte"]),
        )
        return _with_entropies(row, row.paired, read, entropies)

    def _places(self, read: Read, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The supervised positions that the row has read as the block has, and where they are in the row.

        The distribution at a position also needs the next token.
        """
        mine, theirs = (without_bos(self.reader.tokenizer, array) for array in (read.tokens.ids, ids))
        before = len(read.tokens) - len(mine)
        positions = read.positions[read.positions + 1 < before + common_start(mine, theirs)]
        places = positions.astype(np.int64) - before + len(ids) - len(theirs)
        if len(places) and places[0] < 0:
            raise RowError("its model read no BOS, so nothing predicts its first token")
        return positions, places


def _with_entropies(
    own: Representation, paired: NDArray[np.uint8], read: Read, entropies: dict[str, Any]
) -> Representation:
    """A row with the columns that only an aligned store has."""
    sizes = read.sizes[read.positions[: len(own)] + 1]
    gold_bytes = np.clip(sizes, 1, np.iinfo(np.uint16).max).astype(np.uint16)
    return replace(own, paired=paired, gold_bytes=gold_bytes, **entropies)


def _entropies(own: Values, other: Values, learnt: int, read: Read, source: Read) -> dict[str, Any]:
    """Both models' cross-entropies: published per token, here also per byte that both learn."""
    content = sum(stop - start for answer in read.answers for start, stop, _ in answer.pieces)
    size = max(1, content + sum(answer.closed for answer in read.answers))
    theirs = len(supervised_positions(source.tokens, supervised_spans(source.answers)))
    values = other.mean, other.mean * theirs / size, own.mean, own.mean * learnt / size
    return dict(zip(CROSS_ENTROPIES, values, strict=True))
