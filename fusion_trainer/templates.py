"""A conversation → one text, and where in it each answer's content and end lie, for any chat template.

No template is taught where its answers are. The conversation is rendered twice, the second time with a mark in
place of each answer: what stands between the marks is the template's, the rest is the answers'. Text of a user
that looks like a template cannot be mistaken for one. Where the template changes answers by more than trimming
them, each answer is found by a rendering of its own. A mask that cannot be proven so is refused, not guessed.

An answer begins where the generation prompt ends: what stands between that and its content (the tag that opens
its reasoning) the model has to write itself. It ends with the marker that follows it in the rendering. Nothing
after that marker belongs to it.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusion_trainer.answers import Answer, supervised_spans
from fusion_trainer.conversations import Message
from fusion_trainer.errors import FusionError
from fusion_trainer.tokens import Span

__all__ = ["BUILT_IN", "OWN", "PIVOT", "Rendered", "Template", "TemplateError", "find_template"]

FOLDER = Path(__file__).parent / "templates"
OWN, PIVOT = "own", "pivot"
"""A source's own template; the pivot's rendering, which a source reads as plain text."""
BUILT_IN = ("openchat", "chatml", "vicuna", "mistral", "llama-3", "zephyr")

TODAY = datetime(2024, 7, 26)
"""What templates are told that ask for the date (Llama 3.1's own default): one text, whenever it is rendered."""
DIRECTIVES = "aAbBdefHIjmMpSyYZ"
MOST_PLACES = 32
"""How many characters of an answer may be taken for markup by the template, at either end."""

Piece = tuple[int, int, int]
"""First character in the text, the one after the last, and where in the answer the piece begins."""


class TemplateError(Exception):
    """What the template said to a conversation it refuses."""


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
class _Found:
    """Where an answer stands in characters; ``content`` are pieces of text and where they stand in the answer."""

    turn: int
    start: int
    stop: int
    content: tuple[Piece, ...] = ()


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
class Template:
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

    # Where the answers are

    def _by_one_marking(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> list[_Found] | None:
        """All answers marked at once; None unless the text is the marked one with the answers put back."""
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if any(not messages[number].content or messages[number].extra for number in answers):
            return None  # the template decides by more than the content
        marked, marks = _marked(messages, answers)
        try:
            pieces = _split(self._apply(marked, tools), marks)
        except TemplateError:
            return None
        if pieces is None or not text.startswith(pieces[0]):
            return None
        found, position = [], len(pieces[0])
        for number, piece in zip(answers, pieces[1:], strict=True):
            answer = messages[number].content
            for candidate in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
                if text.startswith(candidate + piece, position):
                    stop = position + len(candidate)
                    found.append(_Found(number, position, stop, ((position, stop, answer.find(candidate)),)))
                    position = stop + len(piece)
                    break
            else:
                return None
        return found if position == len(text) else None

    def _by_one_marking_each(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> Iterator[_Found]:
        """One answer marked at a time: whatever stands where its mark stands is what became of it."""
        done = 0
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            called = message.extra.get("tool_calls") or not message.content
            found = self._calls(text, messages, tools, number) if called else None
            if found is None and message.content:
                found = self._by_its_mark(text, messages, tools, number)
            if found is not None and found.start < found.stop and done <= found.start:
                yield found
                done = found.stop

    def _by_its_mark(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, number: int
    ) -> _Found | None:
        marked, marks = _marked(messages, [number])
        rendered = self._apply(marked, tools)
        if marks[0] not in rendered:
            return None  # the template leaves this answer out
        answer = messages[number].content
        pieces = _split(rendered, marks)
        if pieces is not None and text.startswith(pieces[0]) and text.endswith(pieces[1]):
            start, stop = len(pieces[0]), len(text) - len(pieces[1])
            if start >= stop:
                return None
            content = _same(text[start:stop], answer, start)
            return _Found(number, start, stop, content or _kept(text[start:stop], answer, start))
        found = self._around_what_remains(text, messages, tools, number)
        if found is None:
            raise TemplateError(
                f"the template {self.name} changes the text around turn {number + 1} with its content, so "
                "that the assistant's characters cannot be told"
            )
        return found

    def _around_what_remains(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, number: int
    ) -> _Found | None:
        """For templates that take an answer apart (Qwen3: its reasoning): the part they keep.

        A mark put into the answer, rather than in its place, tells where a character of it came to stand. The
        first and the last place near its ends where a mark stays are its edges. What the template wrote before
        the first belongs to the answer as far as the answer's own words stand there.
        """
        answer = messages[number].content
        size = len(answer)
        head = self._first_place(text, messages, tools, number, range(min(size, MOST_PLACES)))
        tail = self._first_place(text, messages, tools, number, range(size, max(0, size - MOST_PLACES), -1))
        if head is None or tail is None or tail[1] <= head[1]:
            return None
        content = _same(text[head[1] : tail[1]], answer[head[0] : tail[0]], head[1], head[0])
        if not content:
            return None
        backwards = _same(text[: head[1]][::-1], answer[: head[0]][::-1], 0, whole=False)
        pieces = [
            (head[1] - stop, head[1] - start, head[0] - at - (stop - start)) for start, stop, at in backwards
        ]
        joined = (*reversed(pieces), *content)
        return _Found(number, joined[0][0], tail[1], joined)

    def _first_place(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        number: int,
        places: Sequence[int],
    ) -> tuple[int, int] | None:
        """The first of ``places`` in the answer where a mark stays and changes nothing else; and its place."""
        answer = messages[number].content
        (mark,) = _marked(messages, [number])[1]
        for place in places:
            changed = list(messages)
            changed[number] = replace(messages[number], content=answer[:place] + mark + answer[place:])
            before, found, after = self._apply(changed, tools).partition(mark)
            if found and before + after == text:
                return place, len(before)
        return None

    def _calls(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, number: int
    ) -> _Found | None:
        """An answer with calls of tools: from the end of the prompt for it to the next marker of an end."""
        before, after = (
            self._apply(messages[:number], tools, prompt=True),
            self._apply(messages[: number + 1], tools),
        )
        if not (text.startswith(before) and after.startswith(before)):
            return None
        start = len(before)
        ending = self._last_token(after[start:])
        if text.startswith(after):
            stop = start + len(after[start:].rstrip().removesuffix(ending)) if ending else len(after)
        else:  # later turns change it: its end is the first one after its last call, before the next turn
            names = [_name(call) for call in messages[number].extra.get("tool_calls") or ()]
            places = [text.find(name, start) for name in names]
            stop = text.find(ending, max(places, default=start)) if ending else -1
            if min([stop, *places]) < start or stop > self._next_turn(text, messages, tools, number):
                return None
        content = messages[number].content
        piece = self._place_of_content(text, messages, tools, number, start, stop) if content.strip() else ()
        return _Found(number, start, stop, piece)

    def _place_of_content(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        number: int,
        start: int,
        stop: int,
    ) -> tuple[Piece, ...]:
        """Where the content stands in an answer with calls: where a mark in its place stands."""
        marked, marks = _marked(messages, [number])
        before, found, _ = self._apply(marked, tools).partition(marks[0])
        content = messages[number].content
        part = content.strip()
        if not found or not text.startswith(before) or not text.startswith(part, len(before)):
            return ()
        at = len(before)
        return ((at, at + len(part), content.find(part)),) if start <= at and at + len(part) <= stop else ()

    def _next_turn(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, number: int) -> int:
        """Where the content of the next turn begins; the text's end if there is none, 0 if it cannot be told."""
        if number + 1 == len(messages):
            return len(text)
        marked, marks = _marked(messages, [number + 1])
        before, found, _ = self._apply(marked, tools).partition(marks[0])
        return len(before) if found and text.startswith(before) else 0

    def _last_token(self, written: str) -> str:
        """The special token that a text ends with; empty if there is none."""
        shorter = written.rstrip()
        marks = [mark for mark in self._tokens if shorter.endswith(mark) and mark in self._special]
        return max(marks, key=len, default="")

    @cached_property
    def _special(self) -> frozenset[str]:
        return frozenset(one.content for one in self.tokenizer.added_tokens_decoder.values() if one.special)

    # Where an answer opens and ends

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
            middle = between.removesuffix(first_header) if owned else between[: _shared(between, closing)]
            middle = middle.rstrip()
        last = self._marker(closing, prompt, closing)
        if last is None:
            header = text.partition(second)[0]
            is_header = closing[len(closing) - _shared(closing[::-1], header[::-1]) :].strip()
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

    def _answer(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        found: _Found,
        following: str,
        last: bool,
    ) -> Answer:
        """In characters."""
        frame = self._frame
        usual = [frame.last, frame.between] if last else [frame.between, frame.last]
        marker = next((mark for mark in usual if mark and following.startswith(mark)), "")
        other = self._marker(following, frame.prompt)
        calls = bool(messages[found.turn].extra.get("tool_calls"))
        whole_calls = calls and self._has_calls(text, messages, found)
        if not marker and other and (whole_calls or (other.strip() in self._special and not calls)):
            marker = other
        content = messages[found.turn].content
        opened, start = self._opening(text, messages, tools, found)
        pieces = tuple(
            (max(begin, start), stop, len(content[: at + max(0, start - begin)].encode()))
            for begin, stop, at in found.content
            if stop > start
        )
        whole = bool(pieces) and not text[pieces[-1][1] : found.stop].strip()
        tokens = self._any_token.findall(marker) if self._any_token else []
        mark = found.stop + len(marker) - len(tokens[-1] if tokens else marker.lstrip())
        end = found.stop + len(marker)
        if tokens and tokens[-1] in self._takes_space_after:
            end = len(text) - len(text[end:].lstrip())
        return Answer(found.turn, min(opened, mark), pieces, mark, end, whole and bool(marker))

    def _has_calls(self, text: str, messages: Sequence[Message], found: _Found) -> bool:
        calls = messages[found.turn].extra.get("tool_calls") or ()
        return all(_name(call) in text[found.start : found.stop] for call in calls)

    @cached_property
    def _takes_space_after(self) -> frozenset[str]:
        """Added tokens that take the white space after them."""
        return frozenset(one.content for one in self.tokenizer.added_tokens_decoder.values() if one.rstrip)

    def _opening(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, found: _Found
    ) -> tuple[int, int]:
        """Where the generation prompt ends, if text that has to be written stands between it and the answer.

        And where its content begins: not within the prompt, nor within a token that takes white space along.
        """
        prompt, start = self._frame.prompt, found.start
        header = text[:start].rstrip()
        if any(header.endswith(token) for token in self._takes_space_after):
            start += len(text[start : found.stop]) - len(text[start : found.stop].lstrip())
        if not prompt or text.endswith(prompt, 0, found.start):
            return start, start
        try:
            before = self._apply(messages[: found.turn], tools, prompt=True)
        except TemplateError:
            return start, start
        if not text.startswith(before) or len(before) > found.stop:
            return start, start
        if len(before) > found.start:
            return len(before), len(before)
        return (len(before) if text[len(before) : found.start].strip() else start), start

    # What is missing

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
        found: Sequence[_Found],
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
                if number not in answers or _name(call) not in text[answers[number].start : answers[number].stop]:
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

    # In bytes

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

    @cached_property
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a").input_ids
        return bool(ids) and ids[0] == self.tokenizer.bos_token_id


def find_template(choice: str | None, tokenizer: Any, model: str) -> Template:
    """The template the user chose, or the model's own.

    Args:
        choice: A built-in name, the path of a Jinja file, or None for the chat template of the tokenizer.
        tokenizer: The model's tokenizer, as transformers loads it.
        model: The model's name, for messages.

    Raises:
        FusionError: No such template; or none chosen, and the tokenizer has none.
    """
    known = ", ".join(BUILT_IN)
    if choice is None:
        templates = tokenizer.chat_template
        named = templates if isinstance(templates, dict) else {"default": templates}
        own, with_tools = named.get("default"), named.get("tool_use")
        if not own:
            raise FusionError(
                f"{model} has no chat template; choose one with --template: {known}, or a Jinja file"
            )
        return Template("of the pivot", own, tokenizer, with_tools)
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


def _without_system(messages: Sequence[Message]) -> list[Message] | None:
    """The system turn's text before that of the first user turn; None where there are no such two turns."""
    if [message.role for message in messages[:2]] != ["system", "user"]:
        return None
    system, user = messages[:2]
    return [replace(user, content=f"{system.content}\n\n{user.content}"), *messages[2:]]


def _written_between(text: str, messages: Sequence[Message], answers: Sequence[_Found]) -> Iterator[int]:
    """The turns that surely are in the text: all those between two answers stand there, in their order."""
    bounds = [_Found(-1, 0, 0), *answers, _Found(len(messages), len(text), len(text))]
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


def _name(of_tool: Any) -> str:
    """The name in a call or a description of a tool."""
    return str((of_tool.get("function") or of_tool).get("name", "")) if isinstance(of_tool, dict) else ""


def _marked(messages: Sequence[Message], which: Sequence[int]) -> tuple[list[Message], list[str]]:
    """``messages`` with a mark in place of each answer among ``which``, and the marks in order."""
    everything = "".join(message.content for message in messages)
    edge = next(chr(point) for point in range(0xE000, 0xF8FF) if chr(point) not in everything)
    marked, marks = list(messages), []
    for number in which:
        marks.append(f"{edge}{number}{edge}")
        marked[number] = replace(messages[number], content=marks[-1])
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


def _same(written: str, answer: str, start: int, at: int = 0, *, whole: bool = True) -> tuple[Piece, ...]:
    """The pieces of a text that are an answer's, if the answer is all there, but for white space.

    Args:
        written: A part of the text.
        answer: A part of the answer.
        start: Where in the text that part begins.
        at: Where in the answer that part begins.
        whole: Nothing else may stand in ``written``.
    """
    pieces: list[Piece] = []
    here = there = 0
    while there < len(answer):
        if size := _shared(written[here:], answer[there:]):
            pieces.append((start + here, start + here + size, at + there))
            here, there = here + size, there + size
        elif here < len(written) and written[here].isspace():
            here += 1
        elif answer[there].isspace():
            there += 1
        else:
            return ()
    return () if whole and written[here:].strip() else tuple(pieces)


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _kept(written: str, answer: str, start: int) -> tuple[Piece, ...]:
    """The piece of a text that is a part of an answer: what a template that drops reasoning keeps."""
    part = written.strip()
    at = answer.rfind(part)
    if not part or at < 0:
        return ()
    start += written.find(part)
    return ((start, start + len(part), at),)
