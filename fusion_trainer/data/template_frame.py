"""What a chat template puts around answers: the generation prompt, and the marker that ends a turn.

Both are found by rendering two exchanges of made-up words. No list of known markers is needed."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from fusion_trainer.data.conversations import Message

__all__ = [
    "TemplateError",
    "TemplateFrame",
    "shared",
]

TODAY = datetime(2024, 7, 26)
"""What templates are told that ask for the date (Llama 3.1's own default): one text, whenever it is rendered."""
DIRECTIVES = "aAbBdefHIjmMpSyYZ"


class TemplateError(Exception):
    """What the template said to a conversation it refuses."""


@dataclass(frozen=True)
class _Frame:
    """What a template puts around answers, from a conversation of two exchanges.

    Attributes:
        prompt: The generation prompt.
        between: Marker after an answer that a turn follows, as text.
        last: Marker after the last answer, as text.
    """

    prompt: str = ""
    between: str = ""
    last: str = ""


@dataclass(frozen=True)
class TemplateFrame:
    """A chat template and the tokenizer whose special tokens it may name.

    Attributes:
        name: For messages.
        jinja: The template.
        tokenizer: Of the model.
        with_tools: The template of conversations with tools, where the tokenizer has one of its own for them.
    """

    name: str
    jinja: str
    tokenizer: Any
    with_tools: str | None = None

    @property
    def sha256(self) -> str:
        bos = self.tokenizer.bos_token or ""
        jinja = self.jinja if self.with_tools is None else f"{self.jinja}\0{self.with_tools}"
        return hashlib.sha256(f"{jinja}\0{bos}\0{self.tokenizer.eos_token or ''}".encode()).hexdigest()

    @property
    def end_ids(self) -> list[int]:
        """Ids of the single tokens that end an answer, that of an earlier answer first."""
        tokens = [
            self._any_token.findall(mark) for mark in (self._frame.between, self._frame.last) if self._any_token
        ]
        marks = [some[-1] for some in tokens if some]
        known = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}
        return list(dict.fromkeys(known[mark] for mark in marks if mark in known))

    def _apply(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False
    ) -> str:
        turns = [{"role": message.role, "content": message.content, **message.extra} for message in messages]
        options = {"tools": list(tools) if tools else None, "tokenize": False, "add_generation_prompt": prompt}
        jinja = self.with_tools if tools and self.with_tools else self.jinja
        try:
            return str(self.tokenizer.apply_chat_template(turns, chat_template=_dated(jinja), **options))
        except Exception as error:
            raise TemplateError(f"the template {self.name} refuses it: {error}") from error

    def _last_token(self, written: str) -> str:
        """The special token that a text ends with; empty if there is none."""
        shorter = written.rstrip()
        marks = [mark for mark in self._tokens if shorter.endswith(mark) and mark in self._special]
        return max(marks, key=len, default="")

    @cached_property
    def _special(self) -> frozenset[str]:
        return frozenset(one.content for one in self.tokenizer.added_tokens_decoder.values() if one.special)

    @cached_property
    def _tokens(self) -> list[str]:
        """Added tokens that may end an answer: not BOS, and not the tags of a pair, which hold something."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()}
        tags = {tag for name in added if (closing := f"</{name[1:]}") in added for tag in (name, closing)}
        ends = (added - tags - {self.tokenizer.bos_token}) | (added & {self.tokenizer.eos_token})
        return sorted(ends, key=len, reverse=True)

    @cached_property
    def _token_ahead(self) -> re.Pattern[str] | None:
        return re.compile(r"\s*(?:" + "|".join(map(re.escape, self._tokens)) + ")") if self._tokens else None

    @cached_property
    def _frame(self) -> _Frame:
        user, answer, again, second = (f"\ue000{number}\ue000" for number in range(4))
        turns = [
            Message(("user", "assistant")[n % 2], text) for n, text in enumerate((user, answer, again, second))
        ]
        system = [Message("system", "\ue0009\ue000")]
        for head, exchanges in (([], 4), (system, 4), ([], 2), (system, 2)):  # what a template may demand
            try:
                text = self._apply([*head, *turns[:exchanges]])
                before, with_prompt = (self._apply([*head, turns[0]], prompt=asked) for asked in (False, True))
                break
            except TemplateError:
                continue
        else:
            return _Frame()
        prompt = with_prompt.removeprefix(before) if with_prompt.startswith(before) else ""
        if exchanges == 2:
            return _Frame(prompt, "", self._marker(text.partition(answer)[2], prompt) or "")
        if not all(mark in text for mark in (user, answer, again)):
            return _Frame(prompt)
        first_header = text.partition(user)[0].removeprefix(self.tokenizer.bos_token or "")
        between = text.partition(answer)[2].partition(again)[0]
        closing = text.partition(second)[2] if second in text else ""
        middle = self._marker(between, prompt, closing)
        if middle is None:
            owned = first_header.strip() and between.endswith(first_header)
            middle = between.removesuffix(first_header) if owned else between[: shared(between, closing)]
            middle = middle.rstrip()
        last = self._marker(closing, prompt, closing)
        if last is None:
            header = text.partition(second)[0]
            is_header = closing[len(closing) - shared(closing[::-1], header[::-1]) :].strip()
            last = "" if is_header else closing.rstrip()
            last = middle if middle and closing.startswith(middle) else last
        return _Frame(prompt, middle, last)

    def _marker(self, following: str, prompt: str, closing: str = "") -> str | None:
        """The added token at the head of what follows an answer, with the white space before it.

        Several that follow each other are one marker where nothing else follows the last answer (``closing``).
        """
        ahead = self._token_ahead and self._token_ahead.match(following)
        if not ahead or ahead[0].strip() in prompt:
            return None
        run = re.fullmatch(rf"({self._any_token.pattern})+\s*", closing) if self._any_token else None
        if run and following.strip().startswith(closing.strip()):
            return following[: following.find(closing.strip()) + len(closing.strip())]
        return ahead[0]

    @cached_property
    def _any_token(self) -> re.Pattern[str] | None:
        return re.compile("(?:" + "|".join(map(re.escape, self._tokens)) + ")") if self._tokens else None

    @cached_property
    def _takes_space_after(self) -> frozenset[str]:
        """Added tokens that take the white space after them."""
        return frozenset(one.content for one in self.tokenizer.added_tokens_decoder.values() if one.rstrip)

    @cached_property
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a").input_ids
        return bool(ids) and ids[0] == self.tokenizer.bos_token_id


def _dated(jinja: str) -> str:
    """A template to which it is always ``TODAY``: transformers would tell it the day it is rendered."""
    if "strftime_now" not in jinja:
        return jinja
    known = "".join(f" | replace('%{letter}', '{TODAY.strftime('%' + letter)}')" for letter in DIRECTIVES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{known} }}}}{{%- endmacro -%}}{jinja}"


def shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
