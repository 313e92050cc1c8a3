"""Where the answers stand in a rendered conversation, for any chat template.

The conversation is rendered twice, the second time with a mark in place of each answer: what stands between the
marks is the template's, the rest is the answers'. Text of a user that looks like a template cannot be mistaken for
one. Where the template changes answers by more than trimming them, each answer is found by a rendering of its own.
A place that cannot be proven so is refused, not guessed.

An answer begins where the generation prompt ends: what stands between that and its content (the tag that opens
its reasoning) the model has to write itself. It ends with the marker that follows it in the rendering. Nothing
after that marker belongs to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion_trainer.data.answers import Answer
from fusion_trainer.data.conversations import Message
from fusion_trainer.data.template_frame import TemplateError, TemplateFrame, shared

__all__ = [
    "AnswerFinder",
    "Found",
    "name_of_tool",
]

MOST_PLACES = 32
"""How many characters of an answer may be taken for markup by the template, at either end."""
Piece = tuple[int, int, int]
"""First character in the text, the one after the last, and where in the answer the piece begins."""


@dataclass(frozen=True)
class Found:
    """Where an answer stands in characters; ``content`` are pieces of text and where they stand in the answer."""

    turn: int
    start: int
    stop: int
    content: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class AnswerFinder(TemplateFrame):
    """Finds the answers in what a template renders."""

    def _by_one_marking(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> list[Found] | None:
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
                    found.append(Found(number, position, stop, ((position, stop, answer.find(candidate)),)))
                    position = stop + len(piece)
                    break
            else:
                return None
        return found if position == len(text) else None

    def _by_one_marking_each(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> Iterator[Found]:
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
    ) -> Found | None:
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
            return Found(number, start, stop, content or _kept(text[start:stop], answer, start))
        found = self._around_what_remains(text, messages, tools, number)
        if found is None:
            raise TemplateError(
                f"the template {self.name} changes the text around turn {number + 1} with its content, so "
                "that the assistant's characters cannot be told"
            )
        return found

    def _around_what_remains(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, number: int
    ) -> Found | None:
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
        return Found(number, joined[0][0], tail[1], joined)

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
    ) -> Found | None:
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
            names = [name_of_tool(call) for call in messages[number].extra.get("tool_calls") or ()]
            places = [text.find(name, start) for name in names]
            stop = text.find(ending, max(places, default=start)) if ending else -1
            if min([stop, *places]) < start or stop > self._next_turn(text, messages, tools, number):
                return None
        content = messages[number].content
        piece = self._place_of_content(text, messages, tools, number, start, stop) if content.strip() else ()
        return Found(number, start, stop, piece)

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

    def _answer(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        found: Found,
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

    def _has_calls(self, text: str, messages: Sequence[Message], found: Found) -> bool:
        calls = messages[found.turn].extra.get("tool_calls") or ()
        return all(name_of_tool(call) in text[found.start : found.stop] for call in calls)

    def _opening(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, found: Found
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


def name_of_tool(of_tool: Any) -> str:
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
        if size := shared(written[here:], answer[there:]):
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
