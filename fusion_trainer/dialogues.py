"""Conversations → blocks of text of at most ``max_length`` tokens of the pivot, in a folder all models share.

The folder is the common ground of every model: each block's text as the pivot reads it, where the answers are in
it, and the turns themselves, which a source renders with its own template. The answers in these turns are what the
pivot's template kept of them, so that every model reads the same bytes. The n-th row of every store stands for the
n-th block.

A long dialogue is split between turns (paper, appendix A): each block is rendered on its own, with the system
turn at its head, and holds as many exchanges as fit. Only an exchange that is too long alone is cut, and counted.

    blocks.arrow    Arrow IPC file; a row is a block (``SCHEMA``)
    manifest.json   where the blocks come from, their fingerprint, the report
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fusion_trainer.answers import Answer, supervised_spans, whole_text
from fusion_trainer.conversations import BAD_ROW, Conversation, Message
from fusion_trainer.errors import FusionError, listed
from fusion_trainer.files import (
    read_json,
    remove_abandoned,
    sha256_of,
    sync_folder,
    temporary_name,
    whole_file,
    write_json,
    written_to,
)
from fusion_trainer.templates import Rendered, Template, TemplateError, find_template
from fusion_trainer.tokens import Span, TextTokenizer, Tokens, supervised_positions

__all__ = ["Block", "Dialogues", "Preparation", "Report", "write_dialogues"]

FORMAT = "fusion-trainer dialogues"
VERSION = 2
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
ROWS_PER_BATCH = 1024
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


COUNTERS = ("dropped", "left_out", "unused")
"""Of a report."""


@dataclass
class Report:
    """What became of the data; all numbers of tokens are the pivot's.

    Attributes:
        dropped: Conversations left out, by reason.
        cut_turns: Answers cut because their exchange alone is longer than ``max_length``.
        cut_tokens: Tokens lost by that.
        open_turns: Turns left out because no answer follows them.
        folded: Blocks whose system text stands before the first user turn: the template has no system turn.
        left_out: What the template does not write: bytes by kind, and turns under ``<kind>, turns``.
        unused: Keys of the data that were not used.
        lengths: Blocks by length: upper bound (a power of two) → number.
    """

    conversations: int = 0
    kept: int = 0
    turns: int = 0
    open_turns: int = 0
    blocks: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    cut_turns: int = 0
    cut_tokens: int = 0
    folded: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Report":
        lengths = Counter({int(bound): number for bound, number in plain["lengths"].items()})
        counters = {name: Counter(plain[name]) for name in COUNTERS}
        return cls(**{**plain, **counters, "lengths": lengths})

    def as_dict(self) -> dict[str, Any]:
        plain = {**vars(self), **{name: dict(sorted(getattr(self, name).items())) for name in COUNTERS}}
        return {**plain, "lengths": {str(bound): self.lengths[bound] for bound in sorted(self.lengths)}}

    def __str__(self) -> str:
        lines = [
            f"conversations      {self.conversations:>12,}  of which kept {self.kept:,}",
            f"turns              {self.turns:>12,}  without an answer after them, left out {self.open_turns:,}",
            f"blocks             {self.blocks:>12,}",
            f"tokens             {self.tokens:>12,}",
            f"supervised tokens  {self.supervised_tokens:>12,}",
            f"answers cut        {self.cut_turns:>12,}  by {self.cut_tokens:,} tokens",
            *(f"dropped            {number:>12,}  {reason}" for reason, number in sorted(self.dropped.items())),
            *self._template_lines(),
            *(
                [f"keys not used      {', '.join(f'{key} ({n:,})' for key, n in self.unused.most_common())}"]
                * bool(self.unused)
            ),
            "length of a block in tokens:",
        ]
        most = max(self.lengths.values(), default=1)
        for bound in sorted(self.lengths):
            bar = "█" * max(1, round(40 * self.lengths[bound] / most))
            lines.append(f"  ≤ {bound:<7,} {self.lengths[bound]:>9,}  {bar}")
        return "\n".join(lines)

    def _template_lines(self) -> Iterator[str]:
        if self.folded:
            yield f"system turns       {self.folded:>12,}  put before the first user turn: the template has none"
        for kind in sorted(self.left_out):
            if kind.endswith(", turns"):
                what = kind.removesuffix(", turns")
                size, turns = self.left_out[what], self.left_out[kind]
                lost = f"bytes of {what} in {turns:,} turns, left out by the template"
                yield f"not rendered       {size:>12,}  {lost}"


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
            FusionError: The template refuses some conversations (all are named), or most conversations have
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
            raise FusionError(
                f"{len(self._problems)} conversations cannot be rendered:{listed(self._problems)}\n"
                "Correct them, choose another --template, or leave them out with --bad-rows skip."
            )
        if not report.conversations:
            raise FusionError("the data is empty")
        if 2 * report.kept <= report.conversations:
            reasons = "; ".join(f"{number} {reason}" for reason, number in report.dropped.most_common())
            raise FusionError(
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


def write_dialogues(
    folder: Path, blocks: Iterable[Block], preparation: Preparation, request: dict[str, Any]
) -> None:
    """Write the blocks and their manifest; the folder appears whole or not at all.

    Args:
        folder: Where; nothing may be there yet.
        blocks: What ``preparation`` makes.
        preparation: Its report goes into the manifest.
        request: What the blocks were asked to be made of, by fingerprints.
    """
    making = temporary_name(folder)
    with written_to(folder):
        _write(making, folder, blocks, preparation, request)


def _write(
    making: Path, folder: Path, blocks: Iterable[Block], preparation: Preparation, request: dict[str, Any]
) -> None:
    remove_abandoned(folder.parent, folder.name)
    made_parents = [parent for parent in folder.parents if not parent.exists()]
    making.mkdir(parents=True)
    try:
        digest = hashlib.sha256()
        with whole_file(making / "blocks.arrow") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            iterator = iter(blocks)
            while some := list(islice(iterator, ROWS_PER_BATCH)):
                for block in some:
                    row = {name: value for name, value in block.as_row().items() if name not in NOT_OF_THE_CONTENT}
                    digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
                writer.write_batch(pa.RecordBatch.from_pylist([block.as_row() for block in some], SCHEMA))
        manifest = {"format": FORMAT, "version": VERSION, "fingerprint": digest.hexdigest(), "request": request}
        template = preparation.template
        ends = template.end_ids if template and preparation.report.turns else []
        described = {**manifest, "sha256": sha256_of(making / "blocks.arrow"), "ends": ends}
        write_json(making / "manifest.json", {**described, "report": preparation.report.as_dict()})
        _give_name(making, folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):
                parent.rmdir()
        raise
    sync_folder(folder.parent)


def _give_name(making: Path, folder: Path) -> None:
    """Rename; if another process has made the same meanwhile, keep that."""
    try:
        making.replace(folder)
    except OSError:
        if not (folder / "manifest.json").is_file():
            raise
        shutil.rmtree(making)


class Dialogues:
    """A prepared folder, memory-mapped. Its blocks are held against the manifest's hash when first read."""

    def __init__(self, folder: Path) -> None:
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise FusionError(f"`{folder}` holds no dialogues: no manifest.json in it")
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = dict(read_json(manifest))
            described = self.manifest.get("format"), self.manifest.get("version")
            if described != (FORMAT, VERSION):
                raise FusionError(f"`{folder}` is not a folder of {FORMAT}, version {VERSION}")
        except FusionError:
            raise
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise FusionError(f"the dialogues in `{folder}` are damaged: {error}; remove that folder") from error

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        path = self.folder / "blocks.arrow"
        try:
            if sha256_of(path) != self.manifest["sha256"]:
                raise ValueError("the bytes of blocks.arrow are not those that were written")
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source)
                return [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
            raise FusionError(
                f"the dialogues in `{self.folder}` are damaged: {error}; remove that folder and run the same "
                "command again"
            ) from error

    @classmethod
    def beside(cls, store: Path, data: str) -> "Dialogues | None":
        """The folder beside a store whose fingerprint is ``data``."""
        folder = store.resolve().parent
        for manifest in sorted((*folder.glob("*/manifest.json"), *folder.parent.glob("*/manifest.json"))):
            try:
                found = cls(manifest.parent)
            except (FusionError, ValueError):
                continue
            if found.fingerprint == data:
                return found
        return None

    @property
    def report(self) -> Report:
        return Report.from_dict(self.manifest["report"])

    @property
    def fingerprint(self) -> str:
        """Of all conversation ids, texts, answers and turns, in order."""
        return str(self.manifest["fingerprint"])

    @property
    def ends(self) -> list[int]:
        """Ids of the pivot that end an answer in its template; that of an earlier answer first."""
        return [int(token) for token in self.manifest["ends"]]

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [blocks]: tokens of the pivot, with BOS."""
        columns = [batch.column("tokens").to_numpy() for batch in self._batches]
        return np.concatenate(columns) if columns else np.empty(0, np.int32)

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def __getitem__(self, number: int) -> Block:
        if not 0 <= number < len(self):
            raise IndexError(f"block {number} of {len(self)}")
        row = self._batches[number // ROWS_PER_BATCH].slice(number % ROWS_PER_BATCH, 1).to_pylist()[0]
        return Block.from_row(row)
