"""Where the answers are in a rendered conversation, for any chat template.

A turn is found by rendering the conversation again with a mark in its place: what surrounds the mark is the
template's, what the mark replaces is the turn's. So no user can write a text that is mistaken for the template.
Usually one rendering with all turns marked finds all of them. Where the template does more to answers than trim
them, each is found by renderings of its own. An answer whose place cannot be proven is refused, not guessed.

An answer begins where the generation prompt ends: the model has to write everything between that and its content
(the tag that opens its reasoning). It ends with the marker that follows it; nothing after that belongs to it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from fusion_trainer.data.answers import Answer, Piece
from fusion_trainer.data.conversations import Message
from fusion_trainer.data.markers import Markers, TemplateError, common_start

__all__ = ["AnswerFinder", "FoundAnswer"]

MOST_PLACES = 32
"""How many characters at either end of an answer may be markup that the template takes out."""


@dataclass(frozen=True)
class FoundAnswer:
    """Where an answer is. All numbers count characters, of the text or (the third of a piece) of the content."""

    turn: int
    start: int
    stop: int
    pieces: tuple[Piece, ...] = ()


class AnswerFinder:
    """Finds the answers in one rendered conversation, and the parts of the conversation that are not rendered.

    Attributes:
        text: The rendering.
        found_answers: The answers that are in it, ascending.
        silent: The turns whose separate reasoning is not rendered.
    """

    def __init__(self, apply: Callable[..., str], markers: Markers, messages: Sequence[Message]) -> None:
        """Render and search.

        Args:
            apply: Renders messages, with the generation prompt behind them if called with ``prompt=True``.
            markers: What the template writes around answers.
            messages: The conversation.

        Raises:
            TemplateError: The template refuses the conversation, or changes the text around an answer when the
                answer changes.
        """
        self._apply, self._markers, self._messages = apply, markers, messages
        contents = "".join(message.content for message in messages)
        self._edge = next(chr(point) for point in range(0xE000, 0xF8FF) if chr(point) not in contents)
        self.text = apply(messages)
        at_once = self._all_at_once()
        self.found_answers = list(self._one_by_one()) if at_once is None else at_once
        self._all_written = at_once is not None
        self.silent = frozenset(
            number
            for number, message in enumerate(messages)
            if message.extra.get("reasoning_content") and not self._writes_reasoning(number)
        )

    # Rendering with marks

    def _mark(self, number: int) -> str:
        return f"{self._edge}{number}{self._edge}"

    def _with(self, number: int, **changes: Any) -> str:
        """The rendering with one message changed."""
        changed = list(self._messages)
        changed[number] = replace(changed[number], **changes)
        return self._apply(changed)

    def _marked(self, number: int) -> tuple[str, str, str]:
        """The rendering with a mark in place of one content: what is before the mark, the mark, the rest."""
        return self._with(number, content=self._mark(number)).partition(self._mark(number))

    def _place_of(self, number: int) -> int | None:
        """Where the content of a turn begins; None if that is uncertain."""
        before, mark, _ = self._marked(number)
        return len(before) if mark and self.text.startswith(before) else None

    def _writes(self, number: int) -> bool:
        """Whether the content of a turn is rendered, as it is or changed."""
        try:
            return self._marked(number)[1] != ""
        except TemplateError:
            return True

    def _writes_reasoning(self, number: int) -> bool:
        extra = {**self._messages[number].extra, "reasoning_content": self._mark(number)}
        try:
            return self._mark(number) in self._with(number, extra=extra)
        except TemplateError:
            return False

    # Finding answers

    def _all_at_once(self) -> list[FoundAnswer] | None:
        """One rendering with all turns marked.

        None unless putting the contents back, trimmed or not, gives exactly the text.
        """
        if any(m.role == "assistant" and (not m.content or m.extra) for m in self._messages):
            return None  # the template decides by more than the content
        marked = [replace(m, content=self._mark(number)) for number, m in enumerate(self._messages)]
        try:
            head, *parts = re.split(f"{self._edge}(\\d+){self._edge}", self._apply(marked))
        except TemplateError:
            return None
        numbers = [int(number) for number in parts[::2]]
        if sorted(numbers) != list(range(len(marked))) or not self.text.startswith(head):
            return None
        answers, position = [], len(head)
        for number, following in zip(numbers, parts[1::2], strict=True):
            content = self._messages[number].content
            for written in (content, content.strip(), content.lstrip(), content.rstrip()):
                if self.text.startswith(written + following, position):
                    break
            else:
                return None
            stop = position + len(written)
            if self._messages[number].role == "assistant":
                answers.append(FoundAnswer(number, position, stop, ((position, stop, content.find(written)),)))
            position = stop + len(following)
        return answers if position == len(self.text) else None

    def _one_by_one(self) -> Iterator[FoundAnswer]:
        """One rendering for each answer: the text in the place of its mark is the answer."""
        done = 0
        for number, message in enumerate(self._messages):
            if message.role != "assistant":
                continue
            answer = None
            if message.extra.get("tool_calls") or not message.content:
                answer = self._with_calls(number)
            if answer is None and message.content:
                answer = self._in_place_of_mark(number)
            if answer and done <= answer.start < answer.stop:
                yield answer
                done = answer.stop

    def _in_place_of_mark(self, number: int) -> FoundAnswer | None:
        """An answer without calls; None if the template leaves it out."""
        before, mark, after = self._marked(number)
        if not mark:
            return None
        text, content = self.text, self._messages[number].content
        if mark not in after and text.startswith(before) and text.endswith(after):
            start, stop = len(before), len(text) - len(after)
            if start >= stop:
                return None
            pieces = _same(text[start:stop], content, start) or _kept(text[start:stop], content, start)
            return FoundAnswer(number, start, stop, pieces)
        if answer := self._around_what_remains(number):
            return answer
        raise TemplateError(
            f"changes the text around turn {number + 1} when that turn changes: its answer cannot be located"
        )

    def _around_what_remains(self, number: int) -> FoundAnswer | None:
        """The part of an answer that is kept by a template that takes it apart (Qwen3: its reasoning).

        A mark put into the answer, rather than in its place, shows where a character of it is written. The first
        and the last place near its ends where a mark stays are its edges. What the template wrote before the first
        belongs to the answer as far as the answer's own words are there.
        """
        content = self._messages[number].content
        size = len(content)
        head = self._first_place(number, range(min(size, MOST_PLACES)))
        tail = self._first_place(number, range(size, max(0, size - MOST_PLACES), -1))
        if head is None or tail is None or tail[1] <= head[1]:
            return None
        (first, start), (last, stop) = head, tail
        pieces = _same(self.text[start:stop], content[first:last], start, first)
        if not pieces:
            return None
        backwards = _same(self.text[:start][::-1], content[:first][::-1], 0, whole=False)
        ahead = [(start - b, start - a, first - at - (b - a)) for a, b, at in reversed(backwards)]
        pieces = (*ahead, *pieces)
        return FoundAnswer(number, pieces[0][0], stop, pieces)

    def _first_place(self, number: int, places: Sequence[int]) -> tuple[int, int] | None:
        """The first of ``places`` in the content where a mark stays and changes nothing else; and where it is."""
        content, mark = self._messages[number].content, self._mark(number)
        for place in places:
            marked = self._with(number, content=content[:place] + mark + content[place:])
            before, there, after = marked.partition(mark)
            if there and before + after == self.text:
                return place, len(before)
        return None

    def _with_calls(self, number: int) -> FoundAnswer | None:
        """An answer with calls of tools: from the end of its generation prompt to the marker of its end."""
        text, message = self.text, self._messages[number]
        start, _ = self._end_of_prompt(number)
        whole = self._apply(self._messages[: number + 1])
        names = _names(message.extra.get("tool_calls"))
        calls = [text.find(name, start) for name in names]
        ending = self._markers.token_at_end_of(whole)
        written = whole.rstrip().removesuffix(ending) if ending else whole
        if text.startswith(written):
            stop = len(written)
        else:  # later turns change what precedes the last call
            last = written[written.rfind(names[-1]) :] if names else ""
            found = text.find(last or ending, max(calls, default=start))
            stop = found + len(last)
            is_last = number + 1 == len(self._messages)
            next_turn = len(text) if is_last else self._place_of(number + 1) or 0
            if found < start or stop > next_turn:
                return None
        if min(calls, default=start) < start:
            return None
        content = message.content.strip()
        pieces: tuple[Piece, ...] = ()
        place = self._place_of(number) if content else None
        if place is not None and start <= place <= stop - len(content) and text.startswith(content, place):
            pieces = ((place, place + len(content), message.content.find(content)),)
        return FoundAnswer(number, start, stop, pieces)

    def _end_of_prompt(self, number: int) -> tuple[int, bool]:
        """Where the generation prompt of an answer ends in the text (true), or the text departs from it."""
        before = self._apply(self._messages[:number], prompt=True)
        if self.text.startswith(before):
            return len(before), True
        if not number:
            return len(self.text), False
        # Later turns change what precedes the answer, or the prompt opens reasoning that the answer does not have.
        last, mark = number - 1, self._mark(number - 1)
        asked = [*self._messages[:last], replace(self._messages[last], content=mark)]
        prompt, after = self._apply(asked, prompt=True).partition(mark)[2], self._marked(last)[2]
        if not self.text.endswith(after):
            return len(self.text), False
        same = common_start(prompt, after)
        size = len(same if same == prompt else re.sub("<[^>]*$", "", same))  # not a part of a tag
        return len(self.text) - len(after) + size, same == prompt

    # Answers

    def answers(self) -> list[Answer]:
        """The answers to be learnt. Places count characters; where in the content a piece begins counts bytes."""
        nothing = FoundAnswer(len(self._messages), len(self.text), len(self.text))
        return [
            self._answer(answer, self.text[answer.stop : following.start])
            for answer, following in pairwise([*self.found_answers, nothing])
            if self._messages[answer.turn].learn
        ]

    def _answer(self, answer: FoundAnswer, following: str) -> Answer:
        content = self._messages[answer.turn].content
        opened, start = self._opening(answer)
        pieces = tuple(
            (max(a, start), b, len(content[: at + max(0, start - a)].encode()))
            for a, b, at in answer.pieces
            if b > start
        )
        whole = bool(pieces) and not self.text[pieces[-1][1] : answer.stop].strip()
        marker = self._marker_after(answer, following)
        tokens = self._markers.tokens_in(marker)
        end = answer.stop + len(marker)
        mark = end - len(tokens[-1] if tokens else marker.lstrip())
        if tokens and tokens[-1] in self._markers.take_space_after:
            end = self._after_space(end)
        return Answer(answer.turn, min(opened, mark), pieces, mark, end, whole and bool(marker))

    def _marker_after(self, answer: FoundAnswer, following: str) -> str:
        markers = self._markers
        usual = [markers.between, markers.last]
        if answer.turn == len(self._messages) - 1:
            usual.reverse()
        for marker in usual:
            if marker and following.startswith(marker):
                return marker
        other = markers.token_ahead(following) or ""
        names = _names(self._messages[answer.turn].extra.get("tool_calls"))
        written = self.text[answer.start : answer.stop]
        usable = all(name in written for name in names) if names else other.strip() in markers.special
        return other if usable else ""

    def _opening(self, answer: FoundAnswer) -> tuple[int, int]:
        """Where an answer begins (with text that the model has to write first), and where its content begins.

        The content is neither in the generation prompt, nor in a token that swallows white space.
        """
        text, start = self.text, answer.start
        header = text[:start].rstrip()
        if any(header.endswith(token) for token in self._markers.take_space_after):
            start = min(self._after_space(start), answer.stop)
        if not self._markers.prompt or text.endswith(self._markers.prompt, 0, answer.start):
            return start, start
        try:
            prompted, whole = self._end_of_prompt(answer.turn)
        except TemplateError:
            return start, start
        reasoning = self._messages[answer.turn].extra.get("reasoning_content", "").strip()
        reasons = reasoning and reasoning in text[prompted : answer.start]
        if not (whole or reasons) or prompted > answer.stop:
            return start, start
        if answer.turn + 1 < len(self._messages) and (self._place_of(answer.turn + 1) or start) < start:
            return start, start  # the next turn is written between the prompt and the content (Gemma 4)
        if prompted > answer.start:
            return prompted, prompted
        return (prompted if text[prompted : answer.start].strip() else start), start

    def _after_space(self, place: int) -> int:
        return len(self.text) - len(self.text[place:].lstrip())

    # What is not rendered

    def left_out(self, tools: Sequence[Any] | None) -> dict[str, int]:
        """Bytes of the conversation that are not in the text, by kind, and turns under ``<kind>, turns``."""
        missing: Counter[str] = Counter()
        for kind, size in self._losses(tools):
            missing[kind] += size
            missing[f"{kind}, turns"] += 1
        return dict(missing)

    def _losses(self, tools: Sequence[Any] | None) -> Iterator[tuple[str, int]]:
        by_turn = {answer.turn: answer for answer in self.found_answers}
        for number, message in enumerate(self._messages):
            answer = by_turn.get(number)
            if message.role == "assistant":
                yield from self._lost_of_answer(number, answer)
            elif not self._all_written and not self._writes(number):
                yield f"{message.role} turns", len(message.content.encode())
            if number in self.silent:
                yield "reasoning", len(message.extra["reasoning_content"].encode())
            written = self.text[answer.start : answer.stop] if answer else ""
            calls = message.extra.get("tool_calls") or ()
            for call, name in zip(calls, _names(calls), strict=True):
                if not answer or name not in written:
                    yield "tool calls", len(json.dumps(call).encode())
        if tools and not all(name in self.text for name in _names(tools)):
            yield "tools", len(json.dumps(list(tools)).encode())

    def _lost_of_answer(self, number: int, answer: FoundAnswer | None) -> Iterator[tuple[str, int]]:
        message = self._messages[number]
        content, size = message.content.strip(), len(message.content.encode())
        calls = message.extra.get("tool_calls")
        if not content:
            return
        if answer and answer.pieces:
            kept = self.content_of(answer)
            if len("".join(kept.split())) < len("".join(content.split())):
                yield "parts of answers (reasoning)", size - len(kept.encode())
        elif not answer or (calls and content not in self.text and not self._writes(number)):
            yield "answers", size

    def content_of(self, answer: FoundAnswer) -> str:
        """The part of an answer's content that is rendered."""
        return "".join(self.text[start:stop] for start, stop, _ in answer.pieces)


def _names(tools: Sequence[Any] | None) -> list[str]:
    """The names in calls or descriptions of tools."""
    return [str((tool.get("function") or tool).get("name", "")) for tool in tools or () if isinstance(tool, dict)]


def _same(written: str, answer: str, start: int, at: int = 0, *, whole: bool = True) -> tuple[Piece, ...]:
    """The pieces of a text that are an answer's, if the answer is all there, but for white space.

    Args:
        written: A part of the text.
        answer: A part of the answer.
        start: Where in the text that part begins.
        at: Where in the answer that part begins.
        whole: Nothing else may be in ``written``.
    """
    pieces: list[Piece] = []
    here = there = 0
    while there < len(answer):
        if size := len(common_start(written[here:], answer[there:])):
            pieces.append((start + here, start + here + size, at + there))
            here, there = here + size, there + size
        elif here < len(written) and written[here].isspace():
            here += 1
        elif answer[there].isspace():
            there += 1
        else:
            return ()
    return () if whole and written[here:].strip() else tuple(pieces)


def _kept(written: str, answer: str, start: int) -> tuple[Piece, ...]:
    """The piece of a text that is a part of an answer: what a template that drops reasoning keeps."""
    part = written.strip()
    at = answer.rfind(part)
    if not part or at < 0:
        return ()
    start += written.find(part)
    return ((start, start + len(part), at),)
