"""Conversations → blocks of at most ``max_length`` tokens of the pivot, and of other tokenizers if they are given.

A block of a dialogue begins with the system turn and holds as many exchanges as fit (paper, appendix A). Every
block is rendered on its own. Only an exchange that is too long alone is cut, and counted. Short documents of plain
text are packed into one block; a long one is cut into pieces.
"""

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise, takewhile
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_trainer.data.answers import Answer, supervised_spans, whole_text
from fusion_trainer.data.conversations import BAD_ROW, Conversation, Message
from fusion_trainer.data.report import Report
from fusion_trainer.data.templates import Rendered, Template, TemplateError, find_template
from fusion_trainer.text.tokenizer import Span, TextTokenizer, Tokens, supervised_positions
from varm_common.errors import UserError, listed

__all__ = ["NOT_IN_FINGERPRINT", "SCHEMA", "Block", "Preparation"]

PLACES = [pa.field(name, pa.int32(), nullable=False) for name in ("turn", "open", "mark", "end")]
PIECES = pa.field("pieces", pa.list_(pa.list_(pa.int32(), 3)), nullable=False)
ANSWER = pa.struct([*PLACES, PIECES, pa.field("closed", pa.bool_(), nullable=False)])
COLUMNS = {
    "conversation": pa.string(),  # the conversation's id
    "block": pa.int32(),  # which of its blocks
    "source": pa.string(),  # file and row
    "text": pa.string(),  # as the pivot reads it
    "bos": pa.int32(),  # bytes of BOS at its head
    "answers": pa.list_(ANSWER),  # those to be learnt, as ``Answer``
    "turns": pa.string(),  # JSON of the messages and tools; empty for plain text
    "tokens": pa.int32(),  # of the pivot, with BOS
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in COLUMNS.items()])
CONVERSATIONS_AT_ONCE = 256
NOT_IN_FINGERPRINT = ("source", "tokens")
"""Columns that say nothing about the content."""
BETWEEN_DOCUMENTS = "\n\n"
Part = tuple[list[Message], Rendered, Tokens]
"""Some turns of a dialogue (none for plain text), their rendering, and its tokens."""


@dataclass(frozen=True)
class Block:
    """One block. The attributes are those of ``COLUMNS``, and:

    Attributes:
        answers: The answers to be learnt in ``text``, and which bytes of the contents in ``messages`` they are.
        messages: The turns, as other models are to render them; none for plain text.
        tools: The functions that the chat template is given, as JSON schemas.
    """

    conversation: str
    block: int
    source: str
    text: str
    answers: tuple[Answer, ...]
    tokens: int
    bos: int = 0
    messages: tuple[Message, ...] = ()
    tools: Sequence[Any] | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The supervised bytes of ``text``."""
        return supervised_spans(self.answers)

    def without_bos(self) -> "Block":
        """The block as another model than the pivot reads it."""
        text = self.text.encode()[self.bos :].decode()
        answers = tuple(answer.moved(lambda place: place - self.bos) for answer in self.answers)
        return replace(self, text=text, bos=0, answers=answers)

    def with_marker(self, old: str, new: str) -> "Block":
        """The block with another end-of-turn marker; within the content of an answer the text stays as it is."""
        raw, marker, other = self.text.encode(), old.encode(), new.encode()
        content = [piece for answer in self.answers for piece in answer.pieces]
        stops = [
            match.end()
            for match in re.finditer(re.escape(marker), raw)
            if not any(start <= match.start() < stop for start, stop, _ in content)
        ]
        parts = [raw[start:stop] for start, stop in pairwise([0, *stops, len(raw)])]
        text = b"".join([*(part[: -len(marker)] + other for part in parts[:-1]), parts[-1]]).decode()

        def moved(place: int) -> int:
            return place + (len(other) - len(marker)) * bisect_right(stops, place)

        return replace(self, text=text, answers=tuple(answer.moved(moved) for answer in self.answers))

    def as_row(self) -> dict[str, Any]:
        """The block as a row of ``SCHEMA``."""
        row = asdict(self)
        turns = {"messages": row.pop("messages"), "tools": row.pop("tools")}
        return {**row, "turns": json.dumps(turns, ensure_ascii=False) if self.messages else ""}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Block":
        """The inverse of ``as_row``."""
        turns = json.loads(row.pop("turns") or "{}")
        for answer in row["answers"]:
            answer["pieces"] = tuple(map(tuple, answer["pieces"]))
        answers = tuple(Answer(**answer) for answer in row.pop("answers"))
        messages = tuple(Message(**message) for message in turns.get("messages", ()))
        return cls(**row, answers=answers, messages=messages, tools=turns.get("tools"))


@dataclass
class Preparation:
    """Turns conversations into blocks and counts what it does.

    Attributes:
        tokenizer: The pivot's.
        template: None for data without turns; otherwise the tokenizer's own.
        max_length: Tokens of the pivot, with BOS.
        packing: Put several short documents of plain text into one block.
        skipped: If given, conversations that cannot be used are counted here (by ``conversations`` too) instead of
            being an error.
        others: Tokenizers of other models; a block's text has at most ``max_length`` tokens of each of them, too.
    """

    tokenizer: TextTokenizer
    template: Template | None
    max_length: int
    packing: bool = True
    skipped: Counter[str] | None = None
    others: Sequence[TextTokenizer] = ()
    report: Report = field(default_factory=Report)
    _problems: list[str] = field(default_factory=list)

    @property
    def ends(self) -> list[int]:
        """The pivot's ids that end an answer in its template; none if there are no dialogues."""
        return self.template.end_ids if self.template and self.report.turns else []

    def blocks(self, conversations: Iterable[Conversation]) -> Iterator[Block]:
        """All blocks, in the order of the conversations (of a few hundred at a time, dialogues before documents).

        Raises:
            UserError: The template refuses some conversations (all are named), or most conversations have
                nothing to supervise.
        """
        iterator = iter(conversations)
        while some := list(islice(iterator, CONVERSATIONS_AT_ONCE)):
            self.report.conversations += len(some)
            for conversation in some:
                if conversation.text is None:
                    yield from self._dialogue(conversation)
            yield from self._documents([conversation for conversation in some if conversation.text is not None])
        self._check_report()

    def _check_report(self) -> None:
        report = self.report
        skipped = self.skipped or Counter()
        report.dropped.update(skipped)
        report.conversations += skipped[BAD_ROW]
        if self._problems:
            raise UserError(
                f"{len(self._problems)} conversations cannot be rendered:{listed(self._problems)}\n"
                "Correct them, choose another --template, or leave them out with --bad-rows skip."
            )
        if not report.conversations:
            raise UserError("the data is empty")
        if 2 * report.kept <= report.conversations:
            reasons = "; ".join(f"{number} {reason}" for reason, number in report.dropped.most_common())
            few = f"only {report.kept} of {report.conversations} conversations"
            raise UserError(f"{few} can be learnt from: {reasons}")

    def _block(self, conversation: Conversation, number: int, part: Part) -> list[Block]:
        """A block, counted; none if no token of it is supervised."""
        messages, rendered, tokens = part
        self.report.folded += rendered.folded
        self.report.left_out.update(rendered.left_out)
        supervised = len(supervised_positions(tokens, rendered.spans))
        if not supervised:
            return []
        self.report.count_block(len(tokens), supervised)
        answers, turns = _as_rendered(rendered, messages)
        whose = conversation.id, number, conversation.where
        return [Block(*whose, rendered.text, answers, len(tokens), rendered.bos, turns, conversation.tools)]

    def _lengths(self, texts: Sequence[str], tokens: Sequence[Tokens]) -> list[int]:
        """For each text its number of tokens, with the tokenizer that has most; ``tokens`` are the pivot's."""
        read = [tokens, *(other.encode(texts) for other in self.others)]
        return [max(map(len, each)) for each in zip(*read, strict=True)]

    def _fits(self, part: Part) -> bool:
        _, rendered, tokens = part
        return len(tokens) <= self.max_length and self._lengths([rendered.text], [tokens])[0] <= self.max_length

    # Dialogues

    def _dialogue(self, conversation: Conversation) -> list[Block]:
        messages = list(conversation.messages)
        self.report.turns += len(messages)
        while messages and messages[-1].role != "assistant":
            messages.pop()
            self.report.open_turns += 1
        if not messages:
            self.report.dropped["no answer in it"] += 1
            return []
        try:
            parts = self._parts(messages, conversation.tools)
        except TemplateError as error:
            if self.skipped is not None:
                self.skipped["the template refuses it"] += 1
            else:
                self._problems.append(f"{conversation.where}: {error}")
            return []
        blocks: list[Block] = []
        for part in parts:
            blocks += self._block(conversation, len(blocks), part if self._fits(part) else self._cut(part))
        if blocks:
            self.report.kept += 1
        else:
            self.report.dropped["no supervised token"] += 1
        return blocks

    def _parts(self, messages: list[Message], tools: Sequence[Any] | None) -> list[Part]:
        """A dialogue whole if it fits, otherwise as many exchanges in each part as fit; each part is rendered."""
        whole = self._render(messages, tools)
        if self._fits(whole):
            return [whole]
        system, exchanges = _exchanges(messages)
        parts: list[Part] = []
        try:
            while exchanges:
                part = self._render([*system, *exchanges.pop(0)], tools)
                while exchanges and self._fits(longer := self._render([*part[0], *exchanges[0]], tools)):
                    part = longer
                    exchanges.pop(0)
                parts.append(part)
        except TemplateError as error:
            between = f"longer than {self.max_length} tokens, and split between its turns {error}"
            raise TemplateError(between) from error
        return parts

    def _render(self, messages: list[Message], tools: Sequence[Any] | None) -> Part:
        if self.template is None:
            self.template = find_template(None, self.tokenizer.tokenizer, self.tokenizer.name)
        rendered = self.template.render(messages, tools)
        return messages, rendered, self.tokenizer.encode([rendered.text])[0]

    def _cut(self, part: Part) -> Part:
        turns, rendered, tokens = part
        before_text = int(np.searchsorted(tokens.ends, 0, "right"))
        text, fitting = self._head(rendered.text.encode(), 0, tokens, self.max_length - before_text)
        self.report.cut_turns += 1
        self.report.cut_tokens += len(tokens) - len(fitting)
        size = len(text.encode())
        answers = tuple(answer.cut(size) for answer in rendered.answers if answer.open < size)
        return turns, replace(rendered, text=text, answers=answers), fitting

    def _head(self, raw: bytes, start: int, tokens: Tokens, room: int) -> tuple[str, Tokens]:
        """The longest piece of a text that fits into a block, cut between two characters; and its tokens.

        Args:
            raw: The whole text.
            start: The byte with which the piece begins.
            tokens: The tokens of the whole text.
            room: How many of them may fit; fewer are tried if the piece alone has more tokens.
        """
        room, limit = max(1, room), len(raw)
        while True:
            last = int(np.searchsorted(tokens.ends, start, "right")) + room - 1
            stop = min(limit, len(raw) if last >= len(tokens) else int(tokens.ends[last]))
            head = raw[start:stop].decode(errors="ignore") or raw[start : start + 4].decode(errors="ignore")[:1]
            again = self.tokenizer.encode([head])[0]
            if len(again) > self.max_length and room > 1:
                room = max(1, room - (len(again) - self.max_length))
                continue
            readings = [other.encode([head])[0] for other in self.others]
            ends = [int(read.ends[self.max_length - 1]) for read in readings if len(read) > self.max_length]
            if not ends or len(head) == 1:
                return head, again
            limit = min(stop - 1, start + min(ends))

    # Documents of plain text, all of which is supervised

    def _documents(self, documents: Sequence[Conversation]) -> Iterator[Block]:
        texts = [document.text or "" for document in documents]
        read = self.tokenizer.encode(texts)
        waiting: list[Conversation] = []
        room = self.max_length
        for document, tokens, length in zip(documents, read, self._lengths(texts, read), strict=True):
            if len(tokens) < 2:
                self.report.dropped["no supervised token"] += 1
                continue
            self.report.kept += 1
            fits = length <= self.max_length
            size = length + len(BETWEEN_DOCUMENTS)
            if waiting and (not fits or not self.packing or size > room):
                yield from self._packed(waiting)
                waiting, room = [], self.max_length
            if fits:
                waiting.append(document)
                room -= size
            else:
                yield from self._pieces(document, tokens)
        yield from self._packed(waiting)

    def _packed(self, documents: Sequence[Conversation]) -> Iterator[Block]:
        """Short documents as one block; as one each if together they have more tokens than apart."""
        if not documents:
            return
        text = BETWEEN_DOCUMENTS.join(document.text or "" for document in documents)
        part = _plain(text, self.tokenizer.encode([text])[0])
        if len(documents) == 1 or self._fits(part):
            yield from self._block(documents[0], 0, part)
            return
        for document in documents:
            yield from self._packed([document])

    def _pieces(self, document: Conversation, tokens: Tokens) -> Iterator[Block]:
        """A long document in blocks that together are its text."""
        raw, start, number = (document.text or "").encode(), 0, 0
        while start < len(raw):
            head, piece = self._head(raw, start, tokens, self.max_length - len(self.tokenizer.prefix))
            made = self._block(document, number, _plain(head, piece))
            yield from made
            number += len(made)
            start += len(head.encode())


def _plain(text: str, tokens: Tokens) -> Part:
    return [], Rendered(text, (whole_text(len(text.encode())),)), tokens


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system turns at the head, and the rest in pieces that end with an answer that no tool turn follows."""
    head = list(takewhile(lambda message: message.role == "system", messages))
    pieces: list[list[Message]] = [[]]
    for message, following in pairwise([*messages[len(head) :], None]):
        assert message is not None
        pieces[-1].append(message)
        if message.role == "assistant" and following and following.role != "tool":
            pieces.append([])
    return head, pieces


def _as_rendered(rendered: Rendered, messages: list[Message]) -> tuple[tuple[Answer, ...], tuple[Message, ...]]:
    """The answers and the turns, the content of each answer being what the template kept of it."""
    answers, turns = [], list(messages)
    for answer in rendered.answers:
        pieces, done = [], 0
        for start, stop, _ in answer.pieces:
            pieces.append((start, stop, done))
            done += stop - start
        answers.append(replace(answer, pieces=tuple(pieces)))
        if turns and pieces:
            raw = rendered.text.encode()
            content = b"".join(raw[start:stop] for start, stop, _ in pieces).decode(errors="ignore")
            turns[answer.turn] = replace(turns[answer.turn], content=content)
    for number in set(rendered.contents) - {answer.turn for answer in answers}:  # rendered, not learnt
        turns[number] = replace(turns[number], content=rendered.contents[number])
    for number in rendered.silent:
        extra = {key: value for key, value in turns[number].extra.items() if key != "reasoning_content"}
        turns[number] = replace(turns[number], extra=extra)
    return tuple(answers), tuple(turns)
