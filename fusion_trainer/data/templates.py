"""Renders a conversation with any chat template, and counts what the template leaves out."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusion_trainer.data.answer_finder import AnswerFinder, Found, name_of_tool
from fusion_trainer.data.answers import Answer, supervised_spans
from fusion_trainer.data.conversations import Message
from fusion_trainer.data.template_frame import TemplateError
from fusion_trainer.text.tokenizer import Span
from varm_common.errors import UserError

__all__ = [
    "BUILT_IN",
    "OWN",
    "PIVOT",
    "Rendered",
    "Template",
    "find_template",
]

FOLDER = Path(__file__).parent / "templates"
OWN, PIVOT = "own", "pivot"
"""A source's own template; the pivot's rendering, which a source reads as plain text."""
BUILT_IN = ("openchat", "chatml", "vicuna", "mistral", "llama-3", "zephyr")


@dataclass(frozen=True)
class Rendered:
    """A conversation as one model reads it.

    Attributes:
        text: With the BOS that the template writes, unless the tokenizer puts one before every text.
        answers: The answers to be learnt, ascending.
        bos: Bytes of BOS at the head of ``text``.
        folded: Whether the template refuses a system turn, and its text was put before the first user turn.
        left_out: Bytes of the conversation that the template does not write, by kind, and ``<kind>, turns``.
        contents: What is left of each answer's content, learnt or not, by turn; nothing where it was rewritten.
        silent: The turns whose separate reasoning is not rendered.
    """

    text: str
    answers: tuple[Answer, ...]
    bos: int = 0
    folded: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    contents: Mapping[int, str] = field(default_factory=dict)
    silent: frozenset[int] = frozenset()

    @property
    def spans(self) -> tuple[Span, ...]:
        """The supervised bytes of ``text``, ascending."""
        return tuple(supervised_spans(self.answers))


@dataclass(frozen=True)
class Template(AnswerFinder):
    """A chat template that renders conversations, with the places of their answers."""

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """Render a conversation that ends with an answer.

        A template that refuses a system turn gets its text before that of the first user turn.

        Args:
            messages: The turns.
            tools: What the template is given under this name.

        Raises:
            TemplateError: The template raises, or changes the text around an answer with the answer's content.
        """
        try:
            return self._render(messages, tools)
        except TemplateError:
            folded = _without_system(messages)
            if folded is None:
                raise
            try:
                rendered = self._render(folded, tools)
            except TemplateError:
                rendered = None
            if rendered is None:
                raise
            moved = tuple(replace(answer, turn=answer.turn + 1) for answer in rendered.answers)
            contents = {turn + 1: content for turn, content in rendered.contents.items()}
            silent = frozenset(turn + 1 for turn in rendered.silent)
            return replace(rendered, answers=moved, folded=True, contents=contents, silent=silent)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Rendered:
        text = self._apply(messages, tools)
        found = self._by_one_marking(text, messages, tools)
        if found is None:
            found = list(self._by_one_marking_each(text, messages, tools))
        answers = []
        for number, one in enumerate(found):
            following = found[number + 1].start if number + 1 < len(found) else len(text)
            last = one.turn == len(messages) - 1
            if messages[one.turn].learn:
                answers.append(self._answer(text, messages, tools, one, text[one.stop : following], last))
        silent = frozenset(
            number
            for number, message in enumerate(messages)
            if message.extra.get("reasoning_content") and not self._reasons(messages, tools, number)
        )
        left_out = self._left_out(text, messages, tools, found, silent)
        contents = {one.turn: "".join(text[a:b] for a, b, _ in one.content) for one in found if one.content}
        rendered = self._in_bytes(text, answers, left_out)
        return replace(rendered, contents=contents, silent=silent)

    def _reasons(self, messages: Sequence[Message], tools: Sequence[Any] | None, number: int) -> bool:
        """Whether the separate reasoning of a turn is rendered."""
        changed, mark = list(messages), "\ue000thought\ue000"
        extra = {**messages[number].extra, "reasoning_content": mark}
        changed[number] = replace(messages[number], extra=extra)
        try:
            return mark in self._apply(changed, tools)
        except TemplateError:
            return False

    def _left_out(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        found: Sequence[Found],
        silent: frozenset[int],
    ) -> dict[str, int]:
        """Bytes and turns that the template does not write, by kind."""
        missing: Counter[str] = Counter()

        def lost(kind: str, what: str) -> None:
            missing[kind] += len(what.encode())
            missing[f"{kind}, turns"] += 1

        answers = {one.turn: one for one in found}
        written = set(_written_between(text, messages, found))
        for number, message in enumerate(messages):
            if message.role == "assistant" and message.content.strip():
                if number not in answers:
                    lost("answers", message.content)
                elif content := answers[number].content:
                    kept = "".join(text[start:stop] for start, stop, _ in content)
                    if len("".join(kept.split())) < len("".join(message.content.split())):
                        gone = len(message.content.encode()) - len(kept.encode())
                        missing["parts of answers (reasoning)"] += gone
                        missing["parts of answers (reasoning), turns"] += 1
                elif message.extra.get("tool_calls") and not (
                    message.content.strip() in text or self._writes(messages, tools, number)
                ):
                    lost("answers", message.content)
            elif (
                message.role != "assistant" and number not in written and not self._writes(messages, tools, number)
            ):
                lost(f"{message.role} turns", message.content)
            if number in silent:
                lost("reasoning", str(message.extra["reasoning_content"]))
            for call in message.extra.get("tool_calls") or ():
                if (
                    number not in answers
                    or name_of_tool(call) not in text[answers[number].start : answers[number].stop]
                ):
                    lost("tool calls", json.dumps(call))
        if tools:
            names = [
                str((tool.get("function") or tool).get("name", "")) for tool in tools if isinstance(tool, dict)
            ]
            if not all(name in text for name in names):
                lost("tools", json.dumps(list(tools)))
        return dict(missing)

    def _writes(self, messages: Sequence[Message], tools: Sequence[Any] | None, number: int) -> bool:
        """Whether a turn is rendered, as it is or changed."""
        changed = list(messages)
        mark = "\ue000turn\ue000"
        changed[number] = replace(messages[number], content=mark)
        try:
            return mark in self._apply(changed, tools)
        except TemplateError:
            return True

    def _in_bytes(self, text: str, answers: Sequence[Answer], left_out: Mapping[str, int]) -> Rendered:
        """The answers in bytes; BOS is cut from the text where the tokenizer puts one before every text."""
        bos = self.tokenizer.bos_token or ""
        head = len(text) - len(text.lstrip()) + len(bos) if bos and text.lstrip().startswith(bos) else 0
        cut = head if self._adds_bos else 0
        kept = len(text[: head - cut].encode())
        text = text[cut:]

        def size(place: int) -> int:
            return len(text[: place - cut].encode())

        written = [
            replace(
                answer,
                open=size(answer.open),
                pieces=tuple((size(start), size(stop), at) for start, stop, at in answer.pieces),
                mark=size(answer.mark),
                end=size(answer.end),
            )
            for answer in answers
        ]
        return Rendered(text, tuple(written), kept, left_out=left_out)


def find_template(choice: str | None, tokenizer: Any, model: str) -> Template:
    """The template the user chose, or the model's own.

    Args:
        choice: A built-in name, the path of a Jinja file, or None for the chat template of the tokenizer.
        tokenizer: The model's tokenizer, as transformers loads it.
        model: The model's name, for messages.

    Raises:
        UserError: No such template; or none chosen, and the tokenizer has none.
    """
    known = ", ".join(BUILT_IN)
    if choice is None:
        templates = tokenizer.chat_template
        named = templates if isinstance(templates, dict) else {"default": templates}
        own, with_tools = named.get("default"), named.get("tool_use")
        if not own:
            raise UserError(f"{model} has no chat template; choose one with --template: {known}, or a Jinja file")
        return Template("of the pivot", own, tokenizer, with_tools)
    if choice in BUILT_IN:
        return Template(choice, (FOLDER / f"{choice}.jinja").read_text(encoding="utf-8"), tokenizer)
    path = Path(choice)
    if not path.is_file():
        raise UserError(f"no template `{choice}`: neither a Jinja file nor one of {known}")
    return Template(path.name, path.read_text(encoding="utf-8"), tokenizer)


def _without_system(messages: Sequence[Message]) -> list[Message] | None:
    """The system turn's text before that of the first user turn; None where there are no such two turns."""
    if [message.role for message in messages[:2]] != ["system", "user"]:
        return None
    system, user = messages[:2]
    return [replace(user, content=f"{system.content}\n\n{user.content}"), *messages[2:]]


def _written_between(text: str, messages: Sequence[Message], answers: Sequence[Found]) -> Iterator[int]:
    """The turns that surely are in the text: all those between two answers stand there, in their order."""
    bounds = [Found(-1, 0, 0), *answers, Found(len(messages), len(text), len(text))]
    for before, after in pairwise(bounds):
        numbers = [n for n in range(before.turn + 1, after.turn) if messages[n].role != "assistant"]
        place = before.stop
        for number in numbers:
            content = messages[number].content.strip()
            place = text.find(content, place, after.start)
            if place < 0:
                break
            place += len(content)
        else:
            yield from numbers
