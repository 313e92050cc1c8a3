"""The text of token ids: from published rows to blocks of dialogues.

A block's text has to give the row's ids when it is tokenised again, because every later stage tokenises it. A
SentencePiece tokenizer puts a space before a text, or before each part of it between added tokens; which it does
is found by trying. A row that was cut at its maximum length may end inside a word or a character, which then
reads differently: such a text is cut some tokens earlier.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.data.answers import Answer, supervised_spans
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.report import Report
from fusion_trainer.published.rows import Published, Row, RowError
from fusion_trainer.published.rows import Tokens as RowTokens
from fusion_trainer.text.tokenizer import TextTokenizer, Tokens, supervised_positions

__all__ = ["CUT", "BlockMaker", "common_start", "without_bos"]

CUT = 16
"""A row may lose so many tokens at its end to become a text that is tokenised the same."""
ROWS_AT_ONCE = 256
Ids = NDArray[np.integer]
SPACES = ("each", "first", "none")
"""Which leading spaces the tokenizer has added: the text's, each part's, or none."""


def without_bos(tokenizer: TextTokenizer, ids: Ids) -> Ids:
    """The ids without those that the tokenizer puts before every text."""
    size = len(tokenizer.prefix)
    return ids[size:] if ids[:size].tolist() == tokenizer.prefix else ids


def common_start(one: Ids, other: Ids) -> int:
    """How many ids at the start are the same."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size


@dataclass
class BlockMaker:
    """Makes a block of each row of a dataset in the pivot's ids, and counts what it does.

    A block's conversation is the number of its row, beginning with 1. It has no turns: its answers are the tokens
    that are learnt.

    Attributes:
        tokenizer: The pivot's.
        problems: Place and reason of each row that could not be used.
    """

    tokenizer: TextTokenizer
    report: Report = field(default_factory=Report)
    problems: list[tuple[str, str]] = field(default_factory=list)
    _endings: Counter[int] = field(default_factory=Counter)
    _spaces: str | None = None

    @property
    def ends(self) -> list[int]:
        """The ids that end an answer, the most frequent first."""
        return [token for token, _ in self._endings.most_common()]

    def blocks(self, published: Published, rows: Iterable[Row]) -> Iterator[Block]:
        """The blocks of the rows that can be used, in order."""
        iterator = iter(rows)
        while some := list(islice(iterator, ROWS_AT_ONCE)):
            self.report.conversations += len(some)
            good = {row: tokens for row, tokens in some if isinstance(tokens, RowTokens)}
            texts = dict(zip(good, self._texts([*good.values()]), strict=True))
            for row, tokens in some:
                where = published.where(row)
                try:
                    if isinstance(tokens, RowError):
                        raise tokens
                    yield self._block(row, where, tokens, texts[row])
                except RowError as error:
                    self.problems.append((where, str(error)))

    def _texts(self, rows: Sequence[RowTokens]) -> list[tuple[str, Tokens] | RowError]:
        """Each row's text and its tokens, or what is wrong."""
        found: dict[int, tuple[str, Tokens] | RowError] = {}
        left: dict[int, Ids] = {}
        for number, row in enumerate(rows):
            ids = without_bos(self.tokenizer, row.ids)
            if unknown := [token for token in ids.tolist() if token not in self.tokenizer.surfaces]:
                found[number] = RowError(f"id {unknown[0]} is none of the tokenizer of {self.tokenizer.name}")
            else:
                left[number] = ids
        least = {number: max(2, len(ids) - CUT) for number, ids in left.items()}
        self._spaces = self._spaces or self._found_spaces([*left.values()])
        while left:
            cut: dict[int, Ids] = {}
            for (number, ids), (text, tokens) in zip(left.items(), self._read(left.values()), strict=True):
                read = without_bos(self.tokenizer, tokens.ids)
                same = common_start(read, ids)
                if same == len(ids) == len(read):
                    found[number] = text, tokens
                elif other := self._in_another_way(ids):
                    found[number] = other
                elif min(same, len(ids) - 1) >= least[number]:
                    cut[number] = ids[: min(same, len(ids) - 1)]
                else:
                    found[number] = self._unlike(ids, read, same)
            left = cut
        return [found[number] for number in range(len(rows))]

    def _read(self, ids: Iterable[Ids], spaces: str | None = None) -> Iterator[tuple[str, Tokens]]:
        texts = [self._text(array.tolist(), spaces or self._spaces or "none") for array in ids]
        return zip(texts, self.tokenizer.encode(texts), strict=True)

    def _in_another_way(self, ids: Ids) -> tuple[str, Tokens] | None:
        """A row that has spaces where most rows have none."""
        for spaces in SPACES:
            text, tokens = next(self._read([ids], spaces))
            if np.array_equal(without_bos(self.tokenizer, tokens.ids), ids):
                return text, tokens
        return None

    def _found_spaces(self, rows: Sequence[Ids]) -> str:
        """The way in which most rows give their own ids again."""

        def right(spaces: str) -> int:
            read = [without_bos(self.tokenizer, tokens.ids) for _, tokens in self._read(rows, spaces)]
            return sum(map(np.array_equal, read, rows))

        return max(SPACES, key=right)

    def _unlike(self, ids: Ids, read: Ids, at: int) -> RowError:
        name_of = self.tokenizer.tokenizer.convert_ids_to_tokens
        names = [repr(name_of(int(side[at]))) if at < len(side) else "the end" for side in (ids, read)]
        return RowError(
            f"its ids are not those of their own text: at token {at} there is {names[0]}, and the tokenizer of "
            f"{self.tokenizer.name} reads {names[1]}"
        )

    def _text(self, ids: Sequence[int], spaces: str) -> str:
        raw, first = bytearray(), spaces != "none"
        for token in ids:
            surface = self.tokenizer.surfaces[token]
            mark = token in self.tokenizer.marks
            raw += surface[1:] if first and not mark and surface.startswith(b" ") else surface
            first = (mark and spaces == "each") or (first and not surface)
        return raw.decode(errors="ignore")

    def _block(self, row: int, where: str, tokens: RowTokens, text: tuple[str, Tokens] | RowError) -> Block:
        if isinstance(text, RowError):
            raise text
        plain, read = text
        learnt = self._in_read(tokens, read)
        answers = self._answers(read, learnt)
        supervised = supervised_positions(read, supervised_spans(answers))
        if not np.array_equal(supervised, np.flatnonzero(learnt[1:])):
            raise RowError("its labels begin or end inside a character")
        if not len(supervised):
            raise RowError("no token of it is learnt")
        following = read.ids[supervised + 1].tolist()
        self._endings.update(token for token in following if token in self.tokenizer.special)
        bos = self.tokenizer.tokenizer.bos_token or ""
        self.report.kept += 1
        self.report.count_block(len(read), len(supervised))
        kept = without_bos(self.tokenizer, read.ids)
        self.report.cut_tokens += len(without_bos(self.tokenizer, tokens.ids)) - len(kept)
        size = len(bos.encode()) if bos and plain.startswith(bos) else 0
        return Block(str(row + 1), 0, where, plain, answers, len(read), size)

    def _in_read(self, tokens: RowTokens, read: Tokens) -> NDArray[np.bool_]:
        """Which tokens of the text are learnt; the text's first token is not predicted by the row's model."""
        shift = len(read) - len(without_bos(self.tokenizer, read.ids))
        own = len(tokens.ids) - len(without_bos(self.tokenizer, tokens.ids))
        learnt = np.zeros(len(read), bool)
        learnt[shift:] = tokens.learnt[own : own + len(read) - shift]
        if own == 0:
            learnt[shift : shift + 1] = False
        return learnt

    def _answers(self, read: Tokens, learnt: NDArray[np.bool_]) -> tuple[Answer, ...]:
        """Runs of learnt tokens; each special token in a run ends an answer."""
        answers: list[Answer] = []
        first: int | None = None
        for token in range(1, len(read) + 1):
            inside = token < len(read) and bool(learnt[token])
            if inside and first is None:
                first = token
            ends = inside and int(read.ids[token]) in self.tokenizer.special
            if first is None or (inside and not ends):
                continue
            last = token if ends else token - 1
            begin, stop = int(read.ends[first - 1]), int(read.ends[last])
            mark = int(read.ends[last - 1]) if ends else stop
            pieces = ((begin, mark, 0),) if mark > begin else ()
            answers.append(Answer(len(answers), begin, pieces, mark, stop, closed=ends))
            first = None
        return tuple(answers)
