"""Chat templates: how a model reads a conversation, and where in that text the answers are."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fusion_trainer.config import BUILT_IN_TEMPLATES as BUILT_IN
from fusion_trainer.data.answer_finder import AnswerFinder
from fusion_trainer.data.answers import Answer, supervised_spans
from fusion_trainer.data.conversations import Message
from fusion_trainer.data.markers import Markers, TemplateError
from fusion_trainer.text.tokenizer import Span
from varm_common.errors import UserError

__all__ = ["BUILT_IN", "OWN", "PIVOT", "PIVOT_OWN_END", "Rendered", "Template", "TemplateError", "find_template"]

FOLDER = Path(__file__).parent / "templates"
OWN, PIVOT, PIVOT_OWN_END = "own", "pivot", "pivot_own_end"
"""A source's own template; the pivot's rendering, which a source reads as text, and that with its own EOS."""
TODAY = datetime(2024, 7, 26)
"""The date in templates that write one (Llama 3.1's own default), so that a text is always the same."""
DIRECTIVES = "aAbBdefHIjmMpSyYZ"


@dataclass(frozen=True)
class Rendered:
    """A conversation as one model reads it.

    Attributes:
        text: With the BOS that the template writes, unless the tokenizer puts one before every text.
        answers: The answers to be learnt, ascending.
        bos: Bytes of BOS at the head of ``text``.
        folded: Whether the template refuses a system turn, and its text was put before the first user turn.
        left_out: Bytes of the conversation that the template does not write, by kind, and ``<kind>, turns``.
        contents: The rendered part of each answer's content, learnt or not, by turn; none where it is rewritten.
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
        return supervised_spans(self.answers)


@dataclass(frozen=True)
class Template:
    """A chat template and the tokenizer whose special tokens it may name.

    Attributes:
        name: For messages.
        jinja: The template.
        tokenizer: The model's, as transformers loads it.
        with_tools: The template of conversations with tools, where the tokenizer has one of its own for them.
    """

    name: str
    jinja: str
    tokenizer: Any
    with_tools: str | None = None

    @property
    def sha256(self) -> str:
        jinja = self.jinja if self.with_tools is None else f"{self.jinja}\0{self.with_tools}"
        tokens = f"{self.tokenizer.bos_token or ''}\0{self.tokenizer.eos_token or ''}"
        return hashlib.sha256(f"{jinja}\0{tokens}".encode()).hexdigest()

    @property
    def end_ids(self) -> list[int]:
        """Ids of the single tokens that end an answer, that of an earlier answer first."""
        return self._markers.end_ids

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """Render a conversation that ends with an answer.

        A template that refuses a system turn gets its text before that of the first user turn.

        Args:
            messages: The turns.
            tools: The functions that the template is given, as JSON schemas.

        Raises:
            TemplateError: The template raises, or changes the text around an answer when the answer changes.
        """
        try:
            return self._render(messages, tools)
        except TemplateError as error:
            if [message.role for message in messages[:2]] == ["system", "user"]:
                system, user, *others = messages
                folded = [replace(user, content=f"{system.content}\n\n{user.content}"), *others]
                with suppress(TemplateError):  # the first error is the one that the user can act on
                    return self._render(folded, tools, moved=1)
            raise TemplateError(f"the template {self.name} {error}") from error

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, moved: int = 0) -> Rendered:
        """Render and find the answers; all numbers of turns are ``moved`` further on."""
        finder = AnswerFinder(partial(self._apply, tools=tools), self._markers, messages)
        bos = self.tokenizer.bos_token or ""
        blank = len(finder.text) - len(finder.text.lstrip())
        head = blank + len(bos) if bos and finder.text.startswith(bos, blank) else 0
        cut = head if self._adds_bos else 0
        text = finder.text[cut:]

        def size(place: int) -> int:
            return len(text[: place - cut].encode())

        return Rendered(
            text,
            tuple(replace(answer.moved(size), turn=answer.turn + moved) for answer in finder.answers()),
            bos=size(head),
            folded=bool(moved),
            left_out=finder.left_out(tools),
            contents={own.turn + moved: finder.content_of(own) for own in finder.found_answers if own.pieces},
            silent=frozenset(turn + moved for turn in finder.silent),
        )

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, prompt: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content, **message.extra} for message in messages]
        options = {"tools": list(tools) if tools else None, "tokenize": False, "add_generation_prompt": prompt}
        jinja = self.with_tools if tools and self.with_tools else self.jinja
        apply = partial(self.tokenizer.apply_chat_template, chat_template=_dated(jinja), **options)
        try:
            return str(apply(turns))
        except Exception as error:
            if any("tool_calls" in turn for turn in turns):
                with suppress(Exception):
                    return str(apply([_with_json_arguments(turn) for turn in turns]))
            raise TemplateError(f"refuses it: {error}") from error

    @cached_property
    def _markers(self) -> Markers:
        return Markers(self.tokenizer, self._apply)

    @cached_property
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a").input_ids
        return bool(ids) and ids[0] == self.tokenizer.bos_token_id


def _with_json_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose calls have their arguments as JSON, for templates that take only a string (DeepSeek V3)."""
    if "tool_calls" not in turn:
        return turn
    functions = [call["function"] for call in turn["tool_calls"]]
    written = [{**each, "arguments": json.dumps(each["arguments"], ensure_ascii=False)} for each in functions]
    calls = [{**call, "function": each} for call, each in zip(turn["tool_calls"], written, strict=True)]
    return {**turn, "tool_calls": calls}


def _dated(jinja: str) -> str:
    """A template for which it is always ``TODAY``: transformers gives it the day on which it is rendered."""
    if "strftime_now" not in jinja:
        return jinja
    known = "".join(f" | replace('%{letter}', '{TODAY.strftime('%' + letter)}')" for letter in DIRECTIVES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{known} }}}}{{%- endmacro -%}}{jinja}"


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
