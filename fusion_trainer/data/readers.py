"""How one model reads the blocks of the dialogues: the pivot as they are, a source in its own template.

A source reads the same answers with other text around them. Two things are compared with the pivot: the content
of an answer as far as both have it, and its end if both close it right after the content.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusion_trainer.data.answers import Answer, comparable_spans
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.conversations import Message
from fusion_trainer.data.report import left_out_by_kind
from fusion_trainer.data.templates import BUILT_IN, OWN, PIVOT, Template, TemplateError, find_template
from fusion_trainer.text.tokenizer import Span, TextTokenizer
from varm_common.errors import UserError
from varm_common.files import fingerprint

__all__ = [
    "DIALOGUES",
    "Reader",
    "Reading",
    "end_ids",
    "own_end",
    "reader_of_store",
    "reader_with_own_end",
    "source_reader",
    "template_notes",
]

DIALOGUES = "dialogues"
"""The way of the pivot: it reads the blocks as they are."""
LEFT_OUT = "left_out_"


@dataclass(frozen=True)
class Reading:
    """A block as one model reads it.

    Attributes:
        text: The text.
        answers: The answers that are compared with the pivot's.
        spans: The bytes of ``text`` at which the model is queried.
    """

    text: str
    answers: tuple[Answer, ...]
    spans: tuple[Span, ...]


@dataclass
class Reader:
    """Renders blocks for one model.

    Attributes:
        tokenizer: The model's.
        way: ``dialogues`` for the pivot; for a source ``pivot`` (it reads the pivot's text) or ``own``.
        template: With ``own``: how conversations are rendered; None if there is nothing but plain text.
        marker: With ``pivot``: the pivot's end-of-turn marker, and the source's own that it reads instead, as in
            FuseChat's code.
        counts: Blocks that were refused, system turns that were moved, bytes and turns that were left out.
    """

    tokenizer: TextTokenizer
    way: str
    template: Template | None = None
    marker: tuple[str, str] | None = None
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def identity(self) -> dict[str, Any]:
        """The part of a store's identity that says how its model read the dialogues."""
        if self.marker is not None:
            return {"reading": fingerprint([self.way, *self.marker]), "jinja": None, "marker": [*self.marker]}
        if self.template is None or self.way != OWN:
            return {"reading": self.way, "jinja": None}
        with_tools = {"jinja_with_tools": self.template.with_tools} if self.template.with_tools else {}
        return {"reading": self.template.sha256, "jinja": self.template.jinja, **with_tools}

    def read(self, block: Block) -> Reading:
        """The block's text, and its answers as far as they can be compared with the pivot's."""
        if self.way == DIALOGUES:
            return Reading(block.text, block.answers, block.spans)
        if self.way == PIVOT or not block.messages:
            block = block.without_bos()
            block = block.with_marker(*self.marker) if self.marker else block
            return self._reading(block.text, block.answers)
        assert self.template is not None
        try:
            rendered = self.template.render(block.messages, block.tools)
        except TemplateError:
            self.counts["refused"] += 1
            return Reading("", (), ())
        self.counts["folded"] += rendered.folded
        self.counts.update({f"{LEFT_OUT}{kind}": size for kind, size in rendered.left_out.items()})
        theirs = {answer.turn: answer for answer in rendered.answers}
        answers = [
            _compared(theirs[own.turn], own, block.messages[own.turn], own.turn in rendered.silent)
            for own in block.answers
            if own.turn in theirs
        ]
        return self._reading(rendered.text, answers)

    def _reading(self, text: str, answers: Iterable[Answer]) -> Reading:
        """A reading in which no answer has a marker for which this model has no token."""
        raw, added = text.encode(), self.tokenizer.tokenizer.get_added_vocab()
        known = tuple(
            answer
            if raw[answer.mark : answer.end].decode() in added
            else replace(answer, end=answer.mark, closed=False)
            for answer in answers
        )
        return Reading(text, known, comparable_spans(known))


def _compared(answer: Answer, own: Answer, message: Message, silent: bool) -> Answer:
    """The answer with the pieces up to which both models have read the same; none if its reasoning is missing."""
    if not own.pieces or silent:
        return replace(answer, pieces=(), closed=False)
    content = message.content.encode()
    done = 0
    for number, (start, stop, at) in enumerate(answer.pieces):
        if content[done:at].strip():  # the template leaves this out
            return replace(answer, pieces=answer.pieces[:number], closed=False)
        done = at + stop - start
    return replace(answer, closed=answer.closed and own.closed and not content[done:].strip())


def template_notes(counts: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about what a source's template did to the conversations, from the counts in a store's manifest."""
    if refused := counts.get("refused"):
        yield f"the source's template refuses {refused:,} blocks: the store has no distributions for them"
    if folded := counts.get("folded"):
        yield f"{folded:,} system turns were put before the first user turn: the source's template refuses them"
    left_out = {name.removeprefix(LEFT_OUT): counts[name] for name in counts if name.startswith(LEFT_OUT)}
    for kind, size, turns in left_out_by_kind(left_out):
        yield f"the source's template leaves out {size:,} bytes of {kind} in {turns:,} turns"


def source_reader(choice: str, tokenizer: TextTokenizer, chats: bool = True) -> Reader:
    """The reader of a source.

    Args:
        choice: ``own``, ``pivot``, a built-in template's name or a Jinja file.
        tokenizer: The source's.
        chats: Whether the data has conversations, not only plain text.

    Raises:
        UserError: There is no such template.
    """
    if choice == PIVOT:
        return Reader(tokenizer, PIVOT)
    if choice == OWN and not tokenizer.tokenizer.chat_template:
        if chats:
            raise UserError(
                f"{tokenizer.name} has no chat template. Choose one with --source-template: "
                f"{', '.join(BUILT_IN)}, a Jinja file, or `pivot` to let it read the pivot's text"
            )
        return Reader(tokenizer, OWN)
    template = find_template(None if choice == OWN else choice, tokenizer.tokenizer, tokenizer.name)
    return Reader(tokenizer, OWN, replace(template, name=f"of {tokenizer.name}" if choice == OWN else choice))


def reader_with_own_end(source: TextTokenizer, end: int | None, pivot: TextTokenizer, ends: list[int]) -> Reader:
    """The reader of a source that reads the pivot's text, but ends answers with its own token, as in FuseChat.

    Args:
        source: The source's tokenizer.
        end: Its token for the end of an answer; None if it has none.
        pivot: The pivot's tokenizer.
        ends: The pivot's tokens for the end of an answer.
    """
    if end is None or not ends:
        return Reader(source, PIVOT)
    old, new = pivot.surfaces[ends[0]].decode(), source.surfaces[end].decode()
    return Reader(source, PIVOT, marker=(old, new) if old != new else None)


def own_end(source: TextTokenizer) -> int | None:
    """The token that ends an answer in a source's own chat template, else its EOS token.

    The published code takes the EOS token, and the template's where they differ: InternLM2, Llama 3, Gemma.
    """
    eos: int | None = source.tokenizer.eos_token_id
    try:
        ends = source_reader(OWN, source, chats=False).template
    except UserError:  # its template cannot be used
        return eos
    return next(iter(ends.end_ids), eos) if ends else eos


def reader_of_store(identity: Mapping[str, Any], tokenizer: TextTokenizer) -> Reader:
    """The reader that a store was made with."""
    if marker := identity.get("marker"):
        return Reader(tokenizer, PIVOT, marker=tuple(marker))
    if identity["jinja"] is None:
        return Reader(tokenizer, identity["reading"])
    jinja, with_tools = identity["jinja"], identity.get("jinja_with_tools")
    template = Template(f"of {tokenizer.name}", jinja, tokenizer.tokenizer, with_tools)
    if template.sha256 != identity["reading"]:
        what = "its template does not match its hash; extract again"
        raise UserError(f"the manifest of {tokenizer.name}'s store is damaged: {what}")
    return Reader(tokenizer, OWN, template)


def end_ids(reader: Reader, folder: Path) -> list[int]:
    """Every id that ends a turn of a model: by its template, the folder's generation config and the tokenizer."""
    from transformers import GenerationConfig

    configured = None
    with suppress(OSError, ValueError, TypeError):
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
    ends = reader.template.end_ids if reader.template else []
    ends = [*ends, *(configured if isinstance(configured, list) else [configured])]
    ends.append(reader.tokenizer.tokenizer.eos_token_id)
    return [end for end in dict.fromkeys(ends) if end in reader.tokenizer.vocabulary]
