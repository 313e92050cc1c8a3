"""A conversation → one text, and the characters of it that are the assistant's, for any chat template.

No template is taught where its answers are. The conversation is rendered twice, the second time with a mark in
place of each answer: what stands between the marks is the template's, the rest is the answers'. Text of a user
that looks like a template cannot be mistaken for one. Where the template changes answers by more than trimming
them, each answer is found by a rendering of its own. A mask that cannot be proven so is refused, not guessed.

The end-of-turn marker that a template writes after every answer belongs to the answer: a model has to learn to
stop.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fusion_trainer.conversations import Message
from fusion_trainer.errors import FusionError
from fusion_trainer.tokens import Span, byte_spans

__all__ = ["BUILT_IN", "Rendered", "Template", "TemplateError", "find_template"]

FOLDER = Path(__file__).parent / "templates"
BUILT_IN = ("openchat", "chatml", "vicuna", "mistral", "llama-3", "zephyr")

TODAY = datetime(2024, 7, 26)
"""What templates are told that ask for the date (Llama 3.1's own default): one text, whenever it is rendered."""
DIRECTIVES = "aAbBdefHIjmMpSyYZ"
MOST_PLACES = 32
"""How many characters of an answer may be taken for markup by the template, at either end."""

Characters = tuple[int, int]


class TemplateError(Exception):
    """What the template said to a conversation it refuses."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, without BOS, and the spans of the assistant's bytes, ascending."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Template:
    """A chat template and the tokenizer whose special tokens it may name."""

    name: str
    jinja: str
    tokenizer: Any

    @property
    def sha256(self) -> str:
        bos = self.tokenizer.bos_token or ""
        return hashlib.sha256(f"{self.jinja}\0{bos}\0{self.tokenizer.eos_token or ''}".encode()).hexdigest()

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Render a conversation that ends with an answer.

        Raises:
            TemplateError: The template raises, or changes the text around an answer with the answer's content.
        """
        text = self._apply(messages)
        spans, last = self._spans_by_one_marking(text, messages), True
        if spans is None:
            spans, last = self._spans_by_one_marking_each(text, messages)
        closing = text[spans[-1][1] :] if spans and last else ""
        nexts = [*(start for start, _ in spans[1:]), len(text)][: len(spans)]
        ended = [
            (start, stop + self._end_of_turn(text[stop:following], closing))
            for (start, stop), following in zip(spans, nexts, strict=True)
        ]
        return self._without_bos(text, ended)

    def _apply(self, messages: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(turns, chat_template=_dated(self.jinja), tokenize=False))
        except Exception as error:
            raise TemplateError(f"the template {self.name} refuses it: {error}") from error

    def _spans_by_one_marking(self, text: str, messages: Sequence[Message]) -> list[Characters] | None:
        """All answers marked at once; None unless the text is the marked one with the answers put back."""
        marked, marks = _marked(messages, range(len(messages)))
        try:
            pieces = _split(self._apply(marked), marks)
        except TemplateError:
            return None
        if pieces is None:
            return None
        answers = [message.content for message in messages if message.role == "assistant"]
        if not text.startswith(pieces[0]):
            return None
        spans, position = [], len(pieces[0])
        for answer, piece in zip(answers, pieces[1:], strict=True):
            for candidate in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
                if text.startswith(candidate + piece, position):
                    spans.append((position, position + len(candidate)))
                    position += len(candidate) + len(piece)
                    break
            else:
                return None
        return spans if position == len(text) else None

    def _spans_by_one_marking_each(self, text: str, messages: Sequence[Message]) -> tuple[list[Characters], bool]:
        """One answer marked at a time: whatever stands where its mark stands is what became of it."""
        spans: list[Characters] = []
        last = False
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            last = False
            marked, marks = _marked(messages, [number])
            rendered = self._apply(marked)
            if marks[0] not in rendered:
                continue  # the template leaves this answer out
            pieces = _split(rendered, marks)
            if pieces is None or not (text.startswith(pieces[0]) and text.endswith(pieces[1])):
                pieces = self._around_what_remains(text, messages, number)
            if pieces is None:
                raise TemplateError(
                    f"the template {self.name} changes the text around turn {number + 1} with its content, so "
                    "that the assistant's characters cannot be told"
                )
            start, stop = len(pieces[0]), len(text) - len(pieces[1])
            if start < stop and (not spans or spans[-1][1] <= start):
                spans.append((start, stop))
                last = True
        return spans, last

    def _around_what_remains(self, text: str, messages: Sequence[Message], number: int) -> list[str] | None:
        """For templates that take an answer apart (Qwen3: its reasoning): what stands around the part they keep.

        A mark put into the answer, rather than in its place, tells where a character of it came to stand. The
        first and the last place near its ends where a mark stays are its edges.
        """
        answer = messages[number].content
        head = self._first_place(text, messages, number, range(min(len(answer), MOST_PLACES)))
        tail = self._first_place(text, messages, number, range(len(answer), max(0, len(answer) - MOST_PLACES), -1))
        if head is None or tail is None or text[head[1] : tail[1]] != answer[head[0] : tail[0]]:
            return None
        return [text[: head[1]], text[tail[1] :]]

    def _first_place(
        self, text: str, messages: Sequence[Message], number: int, places: Sequence[int]
    ) -> tuple[int, int] | None:
        """The first of ``places`` in the answer where a mark stays and changes nothing else; and its place."""
        answer = messages[number].content
        (mark,) = _marked(messages, [number])[1]
        for place in places:
            changed = list(messages)
            changed[number] = Message("assistant", answer[:place] + mark + answer[place:])
            before, found, after = self._apply(changed).partition(mark)
            if found and before + after == text:
                return place, len(before)
        return None

    def _end_of_turn(self, following: str, closing: str) -> int:
        """Length of the marker at the head of ``following``, which stands after an answer.

        ``closing`` stands after the last answer, where no next turn follows: the marker and white space.
        """
        marker = closing.rstrip()
        if following.startswith(marker):
            return len(marker)
        blank = len(following) - len(following.lstrip())
        if not closing.startswith(following[:blank]):
            return 0
        marks = [mark for mark in self.tokenizer.all_special_tokens if closing.startswith(mark, blank)]
        return max((blank + len(mark) for mark in marks if following.startswith(mark, blank)), default=0)

    def _without_bos(self, text: str, spans: Sequence[Characters]) -> Rendered:
        """Every tokenizer puts its own BOS before a text, so the text has none."""
        bos = self.tokenizer.bos_token
        if not bos or not text.startswith(bos):
            return Rendered(text, tuple(byte_spans(text, spans)))
        cut = len(bos)
        text = text[cut:]
        return Rendered(text, tuple(byte_spans(text, [(start - cut, stop - cut) for start, stop in spans])))


def find_template(choice: str | None, tokenizer: Any, model: str) -> Template:
    """The template the user chose, or the model's own.

    Args:
        choice: A built-in name, the path of a Jinja file, or None for the chat template of the tokenizer.
        tokenizer: The pivot's tokenizer, as transformers loads it.
        model: The pivot's name, for messages.

    Raises:
        FusionError: No such template; or none chosen, and the tokenizer has none.
    """
    known = ", ".join(BUILT_IN)
    if choice is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise FusionError(
                f"{model} has no chat template; choose one with --template: {known}, or a Jinja file"
            )
        return Template("of the pivot", own, tokenizer)
    if choice in BUILT_IN:
        return Template(choice, (FOLDER / f"{choice}.jinja").read_text(encoding="utf-8"), tokenizer)
    path = Path(choice)
    if not path.is_file():
        raise FusionError(f"no template `{choice}`: neither a Jinja file nor one of {known}")
    return Template(path.name, path.read_text(encoding="utf-8"), tokenizer)


def _dated(jinja: str) -> str:
    """A template to which it is always ``TODAY``: transformers would tell it the day it is rendered."""
    if "strftime_now" not in jinja:
        return jinja
    known = "".join(f" | replace('%{letter}', '{TODAY.strftime('%' + letter)}')" for letter in DIRECTIVES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{known} }}}}{{%- endmacro -%}}{jinja}"


def _marked(messages: Sequence[Message], which: Sequence[int]) -> tuple[list[Message], list[str]]:
    """``messages`` with a mark in place of each answer among ``which``, and the marks in order."""
    everything = "".join(message.content for message in messages)
    edge = next(chr(point) for point in range(0xE000, 0xF8FF) if chr(point) not in everything)
    marked, marks = list(messages), []
    for number in which:
        if messages[number].role == "assistant":
            marks.append(f"{edge}{number}{edge}")
            marked[number] = Message("assistant", marks[-1])
    return marked, marks


def _split(rendered: str, marks: Sequence[str]) -> list[str] | None:
    """The pieces between the marks; None unless each mark stands there once, in order."""
    pieces = []
    for mark in marks:
        head, found, rendered = rendered.partition(mark)
        if not found or mark in rendered:
            return None
        pieces.append(head)
    return [*pieces, rendered]
