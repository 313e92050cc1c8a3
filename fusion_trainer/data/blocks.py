"""Conversations cut into blocks of the pivot's length.

A block begins with the system turn and holds as many exchanges as fit. Every block is rendered on its own."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_trainer.data.answers import Answer, supervised_spans, whole_text
from fusion_trainer.data.conversations import BAD_ROW, Conversation, Message
from fusion_trainer.data.report import Report
from fusion_trainer.data.templates import Rendered, Template, TemplateError, find_template
from fusion_trainer.text.tokenizer import Span, TextTokenizer, Tokens, supervised_positions
from varm_common.errors import UserError, listed

__all__ = ["NOT_OF_THE_CONTENT", "SCHEMA", "Block", "Preparation"]

ANSWER = pa.struct(
    [
        *(pa.field(name, pa.int32(), nullable=False) for name in ("turn", "open", "mark", "end")),
        pa.field("pieces", pa.list_(pa.list_(pa.int32(), 3)), nullable=False),
        pa.field("closed", pa.bool_(), nullable=False),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("conversation", pa.string(), nullable=False),  # the conversation's id
        pa.field("block", pa.int32(), nullable=False),  # which of its blocks
        pa.field("source", pa.string(), nullable=False),  # file and row
        pa.field("text", pa.string(), nullable=False),  # as the pivot reads it
        pa.field("bos", pa.int32(), nullable=False),  # bytes of BOS at its head
        pa.field("answers", pa.list_(ANSWER), nullable=False),  # those to be learnt, as ``Answer``
        pa.field("turns", pa.string(), nullable=False),  # JSON of ``Turns``; empty for plain text
        pa.field("tokens", pa.int32(), nullable=False),  # of the pivot, with BOS
    ]
)
CONVERSATIONS_AT_ONCE = 256
NOT_OF_THE_CONTENT = ("source", "tokens")
"""Columns that do not enter the fingerprint."""
DOCUMENTS_APART = "\n\n"
"""What stands between two documents packed into one block."""


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        conversation: The conversation's id.
        block: Which of its blocks.
        source: File and row.
        text: As the pivot reads it.
        answers: Where the answers to be learnt are in ``text``; the third number of a piece counts bytes of the
            answer in ``messages``.
        tokens: Of the pivot, with BOS.
        bos: Bytes of BOS at the head of ``text``.
        messages: The turns, as other models are to render them; none for plain text.
        tools: What a template is given under this name.
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
        return tuple(supervised_spans(self.answers))

    def without_bos(self) -> "Block":
        """The block as another model than the pivot reads it."""
        text = self.text.encode()[self.bos :].decode()
        return replace(self, text=text, bos=0, answers=tuple(answer.moved(-self.bos) for answer in self.answers))

    def as_row(self) -> dict[str, Any]:
        """The block as a row of ``SCHEMA``."""
        turns = {"messages": [asdict(message) for message in self.messages], "tools": self.tools}
        columns = {name: getattr(self, name) for name in SCHEMA.names if name != "turns"}
        return {
            **columns,
            "answers": [asdict(answer) for answer in self.answers],
            "turns": json.dumps(turns, ensure_ascii=False) if self.messages else "",
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Block":
        """The inverse of ``as_row``."""
        turns = json.loads(row.pop("turns") or "{}")
        answers = [
            Answer(**{**answer, "pieces": tuple(map(tuple, answer["pieces"]))}) for answer in row.pop("answers")
        ]
        messages = tuple(Message(**message) for message in turns.get("messages", ()))
        return cls(**row, answers=tuple(answers), messages=messages, tools=turns.get("tools"))


@dataclass
class Preparation:
    """Turns conversations into blocks and counts what it does.

    Attributes:
        tokenizer: The pivot's.
        template: None for data without turns; otherwise the tokenizer's own.
        max_length: Tokens of the pivot, BOS among them.
        packing: Put several short documents of plain text into one block.
        skipped: If given, conversations that cannot be used are counted here (by ``conversations`` too) instead of
            being an error.
    """

    tokenizer: TextTokenizer
    template: Template | None
    max_length: int
    packing: bool = True
    skipped: Counter[str] | None = None
    report: Report = field(default_factory=Report)
    _problems: list[str] = field(default_factory=list)

    def blocks(self, conversations: Iterable[Conversation]) -> Iterator[Block]:
        """All blocks, in the order of the conversations (of a few hundred at a time, dialogues before documents).

        Raises:
            UserError: The template refuses some conversations (all are named), or most conversations have
                nothing to supervise.
        """
        iterator = iter(conversations)
        while some := list(islice(iterator, CONVERSATIONS_AT_ONCE)):
            documents = [c for c in some if c.text is not None]
            dialogues = [c for c in some if c.text is None]
            self.report.conversations += len(some)
            for block in [*self._of_dialogues(dialogues), *self._of_documents(documents)]:
                self._count(block)
                yield block
        self._judge()

    def _count(self, block: Block) -> None:
        self.report.blocks += 1
        self.report.tokens += block.tokens
        self.report.lengths[1 << (block.tokens - 1).bit_length()] += 1

    def _judge(self) -> None:
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
            raise UserError(
                f"only {report.kept} of {report.conversations} conversations can be learned from: {reasons}"
            )

    # Dialogues

    def _of_dialogues(self, conversations: Sequence[Conversation]) -> Iterator[Block]:
        rendered = [(c, messages, r) for c in conversations for messages, r in [self._rendered(c)] if r]
        texts = self.tokenizer.encode([whole.text for _, _, whole in rendered])
        for (conversation, messages, whole), tokens in zip(rendered, texts, strict=True):
            if len(tokens) <= self.max_length:
                made = self._block(conversation, 0, messages, whole, tokens)
                blocks = [made] if made else []
            else:
                counted = deepcopy(self.report)
                try:
                    blocks = list(self._split(conversation, messages))
                except TemplateError as error:
                    self.report = counted
                    self._refused(conversation, error)
                    continue
            if blocks:
                self.report.kept += 1
            else:
                self.report.dropped["no supervised token"] += 1
            yield from blocks

    def _rendered(self, conversation: Conversation) -> tuple[list[Message], Any]:
        """The turns up to the last answer, and their rendering; None where there is nothing to render."""
        messages = list(conversation.messages)
        self.report.turns += len(messages)
        while messages and messages[-1].role != "assistant":
            messages.pop()
            self.report.open_turns += 1
        if not messages:
            self.report.dropped["no answer in it"] += 1
            return messages, None
        if self.template is None:
            self.template = find_template(None, self.tokenizer.tokenizer, self.tokenizer.name)
        try:
            return messages, self.template.render(messages, conversation.tools)
        except TemplateError as error:
            self._refused(conversation, error)
            return messages, None

    def _refused(self, conversation: Conversation, error: TemplateError) -> None:
        if self.skipped is not None:
            self.skipped["the template refuses it"] += 1
        else:
            self._problems.append(f"{conversation.where}: {error}")

    def _split(self, conversation: Conversation, messages: Sequence[Message]) -> Iterator[Block]:
        """As many exchanges as fit into each block, every block rendered on its own."""
        system, exchanges = _exchanges(messages)
        number = first = 0
        while first < len(exchanges):
            last = first + 1
            turns = [*system, *exchanges[first]]
            rendered, tokens = self._render(conversation, turns)
            while last < len(exchanges):
                more = [*system, *chain(*exchanges[first : last + 1])]
                longer = self._render(conversation, more)
                if len(longer[1]) > self.max_length:
                    break
                turns, (rendered, tokens) = more, longer
                last += 1
            if len(tokens) > self.max_length:
                rendered, tokens = self._cut(rendered, tokens)
            made = self._block(conversation, number, turns, rendered, tokens)
            if made:
                yield made
                number += 1
            first = last

    def _render(self, conversation: Conversation, messages: Sequence[Message]) -> tuple[Rendered, Tokens]:
        assert self.template is not None
        try:
            rendered = self.template.render(messages, conversation.tools)
        except TemplateError as error:
            raise TemplateError(
                f"longer than {self.max_length} tokens, and split between its turns {error}"
            ) from error
        return rendered, self.tokenizer.encode([rendered.text])[0]

    def _cut(self, rendered: Rendered, tokens: Tokens) -> tuple[Rendered, Tokens]:
        """The head of a text that fits, between two characters."""
        text, before = rendered.text, len(tokens)
        length = self.max_length
        while len(tokens) > self.max_length and length:
            stop = int(tokens.ends[length - 1])
            shorter = _head(text.encode()[:stop])
            again = self.tokenizer.encode([shorter])[0]
            if len(again) <= self.max_length:
                text, tokens = shorter, again
            length -= min(length, max(1, len(again) - self.max_length))
        self.report.cut_turns += 1
        self.report.cut_tokens += before - len(tokens)
        size = len(text.encode())
        answers = tuple(answer.cut(size) for answer in rendered.answers if answer.open < size)
        return replace(rendered, text=text, answers=answers), tokens

    def _block(
        self,
        conversation: Conversation,
        number: int,
        messages: Sequence[Message],
        rendered: Rendered,
        tokens: Tokens,
    ) -> Block | None:
        supervised = len(supervised_positions(tokens, rendered.spans))
        self.report.folded += rendered.folded
        self.report.left_out.update(rendered.left_out)
        if not supervised:
            return None
        self.report.supervised_tokens += supervised
        answers, turns = _as_rendered(rendered, messages)
        whose = conversation.id, number, conversation.where
        return Block(*whose, rendered.text, answers, len(tokens), rendered.bos, turns, conversation.tools)

    # Documents of plain text, all of which is supervised

    def _of_documents(self, documents: Sequence[Conversation]) -> Iterator[Block]:
        whole = self.tokenizer.encode([document.text or "" for document in documents])
        waiting: list[tuple[Conversation, str]] = []
        room = self.max_length
        for document, tokens in zip(documents, whole, strict=True):
            text = document.text or ""
            if len(tokens) < 2:
                self.report.dropped["no supervised token"] += 1
                continue
            self.report.kept += 1
            if len(tokens) > self.max_length:
                yield from self._packed(waiting)
                waiting, room = [], self.max_length
                yield from self._pieces(document, text, tokens)
                continue
            if waiting and (not self.packing or len(tokens) + 2 > room):
                yield from self._packed(waiting)
                waiting, room = [], self.max_length
            waiting.append((document, text))
            room -= len(tokens) + 2
        yield from self._packed(waiting)

    def _packed(self, waiting: Sequence[tuple[Conversation, str]]) -> Iterator[Block]:
        """Short documents as one block; as one each where together they are longer than they were apart."""
        if not waiting:
            return
        text = DOCUMENTS_APART.join(text for _, text in waiting)
        tokens = self.tokenizer.encode([text])[0]
        if len(tokens) > self.max_length and len(waiting) > 1:
            for one in waiting:
                yield from self._packed([one])
            return
        made = self._block(waiting[0][0], 0, (), Rendered(text, (whole_text(len(text.encode())),)), tokens)
        if made:
            yield made

    def _pieces(self, whole: Conversation, text: str, tokens: Tokens) -> Iterator[Block]:
        raw, start, number = text.encode(), 0, 0
        most = room = max(1, self.max_length - len(self.tokenizer.prefix))
        while start < len(raw):
            last = int(np.searchsorted(tokens.ends, start, "right")) + room - 1
            stop = len(raw) if last >= len(tokens) else int(tokens.ends[last])
            head = _head(raw[start:stop]) or _head(raw[start : start + 4])[:1]
            piece = self.tokenizer.encode([head])[0]
            if len(piece) > self.max_length and room > 1:
                room = max(1, room - (len(piece) - self.max_length))
                continue
            size = len(head.encode())
            made = self._block(whole, number, (), Rendered(head, (whole_text(size),)), piece)
            if made:
                yield made
                number += 1
            start, room = start + size, most


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system turns at the head, and the rest in pieces that end with an answer no tool turn follows."""
    head = 0
    while head < len(messages) and messages[head].role == "system":
        head += 1
    pieces: list[list[Message]] = [[]]
    for message, following in zip(messages[head:], [*messages[head + 1 :], None], strict=True):
        pieces[-1].append(message)
        if message.role == "assistant" and following and following.role != "tool":
            pieces.append([])
    return list(messages[:head]), pieces


def _as_rendered(
    rendered: Rendered, messages: Sequence[Message]
) -> tuple[tuple[Answer, ...], tuple[Message, ...]]:
    """The answers and the turns, the content of each answer being what the template kept of it."""
    raw, answers, turns = rendered.text.encode(), [], list(messages)
    for answer in rendered.answers:
        parts, pieces, done = [], [], 0
        for start, stop, _ in answer.pieces:
            pieces.append((start, stop, done))
            parts.append(raw[start:stop])
            done += stop - start
        answers.append(replace(answer, pieces=tuple(pieces)))
        if turns and pieces:
            turns[answer.turn] = replace(turns[answer.turn], content=b"".join(parts).decode(errors="ignore"))
    for number in set(rendered.contents) - {answer.turn for answer in answers}:  # rendered, not learnt
        turns[number] = replace(turns[number], content=rendered.contents[number])
    for number in rendered.silent:
        extra = {key: value for key, value in turns[number].extra.items() if key != "reasoning_content"}
        turns[number] = replace(turns[number], extra=extra)
    return tuple(answers), tuple(turns)


def _head(raw: bytes) -> str:
    """The characters that lie whole within UTF-8 that may be cut."""
    return raw.decode(errors="ignore")
