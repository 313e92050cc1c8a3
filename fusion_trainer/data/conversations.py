"""Rows of chat data of any usual format → conversations, every row checked.

A bad row is never skipped unless the user chose that; all of them are reported together, by file and row.
Keys that change what is learnt are used, or the row is bad; all other keys that were not used are counted.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from fusion_trainer.data.sources import COLUMNS, CONTENT_KEYS, FORMATS, SYSTEM_COLUMNS, TURNS, Source
from varm_common.errors import UserError, listed

__all__ = ["BAD_ROW", "Conversation", "Message", "bad_rows_message", "conversations", "kinds_of_problems"]

ID_COLUMNS, TOOL_KEYS, ROLE_KEYS = ("id", "conversation_id"), ("tools", "functions"), ("role", "from")
CALL_KEYS, REASONING_KEYS = ("tool_calls", "function_call"), ("reasoning_content", "reasoning", "thinking")
CALL_ROLES, TEXT_PARTS = ("function_call", "tool_call"), ("text", "input_text", "output_text")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {"system": "system", "developer": "system"} | dict.fromkeys(CALL_ROLES, "assistant")
ROLES |= dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool")
LEARNT_IF = {"weight": 1, "train": 1, "loss": 1, "loss_mask": 1, "loss_scale": 1, "masked": 0}
"""Marks of OpenAI and Mistral, axolotl, ms-swift and torchtune, and the value at which an answer is learnt."""
ROW_KEYS = {*ID_COLUMNS, *COLUMNS, *TOOL_KEYS, *LEARNT_IF}
TURN_KEYS = {*ROLE_KEYS, *CONTENT_KEYS, *CALL_KEYS, *REASONING_KEYS, *LEARNT_IF, "name", "tool_call_id"}
"""The keys that are used. Others are counted."""

PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag", "label")
REFUSED = dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text can be used")
REFUSED |= dict.fromkeys(PREFERENCES, "preferences cannot be used; give the answers to learn as `messages`")
REFUSED |= {
    "mask": "it is unclear whether 1 means learnt or left out; use `train` with true or false",
    "train_detail": "an answer is learnt as a whole or not at all; use `train` with true or false",
}
BAD_ROW = "not a usable row"
MOST_PROBLEMS, EXAMPLES = 1000, 3
"""Reading stops after so many bad rows: the format is wrong, not the rows. Of each kind, so many are named."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: The text; empty only where ``extra`` has ``reasoning_content`` or ``tool_calls``.
        learn: Whether an answer is learnt from; if not, it is only rendered.
        extra: What else the chat template gets of this turn, as plain JSON values: ``reasoning_content``,
            ``tool_calls``, ``tool_call_id``, ``name``.
    """

    role: str
    content: str
    learn: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Conversation:
    """A dialogue, or a document of plain text (then there are no messages).

    Attributes:
        id: The row's ``id`` or ``conversation_id``, else its number.
        messages: The turns.
        text: A document's text; everything in it is supervised.
        where: File and row, for messages to the user.
        tools: The functions that the chat template is given, as JSON schemas.
    """

    id: str
    messages: tuple[Message, ...]
    text: str | None
    where: str
    tools: list[Any] | None = field(default=None, hash=False)


class RowError(Exception):
    """The problem of one row, without its place."""


def conversations(
    sources: Iterable[Source], skipped: Counter[str] | None = None, unused: Counter[str] | None = None
) -> Iterator[Conversation]:
    """Every row of every source, checked.

    Args:
        sources: The inputs, in order.
        skipped: If given, bad rows are counted here and left out.
        unused: If given, the keys of good rows that were not used are counted here.

    Raises:
        UserError: Some rows are bad and ``skipped`` is None; all rows are read first, and each kind named once.
    """
    problems: list[tuple[str, str]] = []
    for source in sources:
        for number, (where, row) in enumerate(source.rows(), 1):
            keys: Counter[str] = Counter()
            try:
                conversation = _conversation(row, str(number), where, keys)
            except RowError as error:
                if skipped is not None:
                    skipped[BAD_ROW] += 1
                else:
                    problems.append((where, str(error)))
                if len(problems) == MOST_PROBLEMS:
                    raise UserError(bad_rows_message(problems)) from error
                continue
            if not problems:
                if unused is not None:
                    unused.update(keys)
                yield conversation
    if problems:
        raise UserError(bad_rows_message(problems))


def kinds_of_problems(problems: Sequence[tuple[str, str]]) -> list[str]:
    """Each kind of problem once, with the rows that have it, from the place and the reason of each row."""
    kinds: dict[str, list[str]] = {}
    for where, problem in problems:
        rows = kinds.setdefault(re.sub(r"\d+", "0", problem), [])
        rows.append(where if rows else f"{where}: {problem}")
    lines = []
    for first, *more in kinds.values():
        others = f"{'; '.join(more[: EXAMPLES - 1])}{' …' * (len(more) >= EXAMPLES)}"
        lines.append(first + f"\n    {len(more) + 1} rows of this kind, also {others}" * bool(more))
    return lines


def bad_rows_message(problems: Sequence[tuple[str, str]]) -> str:
    """How many rows are bad, and each kind of problem."""
    return (
        f"the data has {len(problems)} bad row{'s' * (len(problems) > 1)}:{listed(kinds_of_problems(problems))}\n"
        "Correct them, or leave them out with --bad-rows skip."
    )


def _conversation(row: Any, number: str, where: str, unused: Counter[str]) -> Conversation:
    given = _demand(_parsed(row) if isinstance(row, bytes) else row, Mapping, "the row", "an object")
    row = {key: value for key, value in given.items() if value is not None}
    _refuse_unusable(row, "the row")
    name, others = _format(row)
    learn, tools = _learnt(row, "the row"), _tools(_one_of(row, TOOL_KEYS, "the row"))
    system = _one_of(row, SYSTEM_COLUMNS, "the row")
    messages: tuple[Message, ...] = ()
    text = None
    if name == "text":
        text = _string(row["text"], "`text`")
        if not learn or tools or _filled(system):
            raise RowError("`text` is learnt as a whole: it cannot have a system prompt, tools, or be left out")
    else:
        messages = _messages(name, row, unused)
    for column, value in others.items():
        if not _repeats(value, [text] if text else [message.content for message in messages]):
            raise RowError(f"has both `{name}` and `{column}`, and one of them would be lost: remove one")
    if _filled(system) and messages[0].role != "system":
        messages = (Message("system", _string(system, "the system column")), *messages)
    elif _filled(system) and messages[0].content != system:
        raise RowError("the system column and the system turn contradict each other")
    try:
        json.dumps([tools, [message.extra for message in messages]], ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"the tools or calls cannot be written as JSON: {error}") from error
    unused.update([*others, *_unknown(row, ROW_KEYS)])
    messages = messages if learn else tuple(replace(message, learn=False) for message in messages)
    identity = next((row[column] for column in ID_COLUMNS if column in row), number)
    return Conversation(str(identity), messages, text, where, tools)


def _format(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The row's format, and what columns of other formats hold."""
    there = {name: [column for column in columns if column in row] for name, columns in FORMATS.items()}
    filled = [name for name, columns in there.items() if any(_filled(row[column]) for column in columns)]
    filled = filled or [name for name, columns in there.items() if columns]
    if not filled:
        keys = ", ".join(map(repr, row)) or "none"
        raise RowError(f"missing keys: has {keys}; one of {', '.join(FORMATS)} is needed")
    # A row that is whole in one format may have a column or two of another.
    name = max(filled, key=lambda name: all(_filled(row.get(column)) for column in name.split("/")))
    if missing := [column for column in name.split("/") if column not in row]:
        raise RowError(f"no `{missing[0]}`")
    others = {column: row[column] for other in there if other != name for column in there[other]}
    return name, {column: value for column, value in others.items() if _filled(value)}


def _refuse_unusable(keys: Mapping[str, Any], what: str) -> None:
    """Refuse keys without which something else would be learnt than the user meant."""
    for key, value in keys.items():
        if key in REFUSED and _filled(value) and (key != "label" or isinstance(value, bool)):
            raise RowError(f"{what} has `{key}`: {REFUSED[key]}")
        entries = value if isinstance(value, list) and key not in COLUMNS else []
        objects = ({*entry} for entry in entries if isinstance(entry, Mapping))
        if any({*ROLE_KEYS} & entry and {*CONTENT_KEYS} & entry for entry in objects):
            raise RowError(f"{what} has turns in `{key}`, which would be lost; known are {', '.join(FORMATS)}")


def _learnt(keys: Mapping[str, Any], what: str) -> bool:
    """Whether ``what`` is learnt, by its marks."""
    marks = {key: keys[key] for key in LEARNT_IF if keys.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1):
            allowed = "can only be 1 (the answer is learnt) or 0 (it is not)"
            raise RowError(f"`{key}` of {what} is {value!r:.40}, but {allowed}")
    learnt = {value == LEARNT_IF[key] for key, value in marks.items()}
    if len(learnt) > 1:
        raise RowError(f"`{'` and `'.join(marks)}` of {what} contradict each other")
    return learnt != {False}


def _one_of(keys: Mapping[str, Any], names: Sequence[str], what: str) -> Any:
    """The value of whichever of ``names`` is there; None if none is."""
    there = {name: keys[name] for name in names if keys.get(name) is not None}
    there = {name: value for name, value in there.items() if _filled(value)} or there
    value = next(iter(there.values()), None)
    if any(other != value for other in there.values()):
        raise RowError(f"`{'` and `'.join(there)}` of {what} contradict each other")
    return value


def _unknown(keys: Mapping[str, Any], known: Collection[str]) -> list[str]:
    return [key for key, value in keys.items() if key not in known and _filled(value)]


def _tools(value: Any) -> list[Any] | None:
    """The functions in the form of ``transformers``' templates: ``{"type": "function", "function": schema}``."""
    tools = _parsed(value or [], "`tools` is ")
    tools = [_parsed(tool, "a tool is ") for tool in tools] if isinstance(tools, list) else [None]
    if not all(isinstance(tool, Mapping) and ("name" in tool or "type" in tool) for tool in tools):
        raise RowError("`tools` is not a list of functions that have a `name`")
    return [tool if "type" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _repeats(value: Any, texts: Sequence[str]) -> bool:
    """Whether a column only repeats one of the texts, or is a rendering of all their paragraphs."""
    place = 0 if isinstance(value, str) else -1
    for part in (part for text in texts for part in text.strip().split("\n\n")):
        place = value.find(part, place) if place >= 0 else -1
    return place >= 0 or value in texts


def _messages(name: str, row: Mapping[str, Any], unused: Counter[str]) -> tuple[Message, ...]:
    """The turns in the columns of a format."""
    if name in TURNS:
        return _turns(row[name], name, unused)
    if name == "instruction/output":
        texts = _alpaca_texts(row)
    else:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            turns = _turns([*prompt, *completion], "prompt` + `completion", unused)
            given = [replace(turn, learn=turn.learn and turn.role != "assistant") for turn in turns[: len(prompt)]]
            return (*given, *turns[len(prompt) :])  # answers in a prompt are not learnt, as in TRL
        if not isinstance(prompt, str) or not isinstance(completion, str):
            both = f"`prompt` is a {type(prompt).__name__} and `completion` a {type(completion).__name__}"
            raise RowError(f"{both}; both must be strings, or both lists of messages")
        texts = [_string(prompt, "`prompt`"), _string(completion, "`completion`")]
    return tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))


def _alpaca_texts(row: Mapping[str, Any]) -> list[str]:
    question = _string(row["instruction"], "`instruction`")
    if _filled(row.get("input")):
        question += f"\n\n{_string(row['input'], '`input`')}"
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("`history` is not a list of pairs of question and answer")
    before = [_string(text, "an entry of `history`") for pair in history for text in pair]
    return [*before, question, _string(row["output"], "`output`")]


def _turns(turns: Any, column: str, unused: Counter[str]) -> tuple[Message, ...]:
    if not _demand(turns, list, f"`{column}`", "a list of turns"):
        raise RowError(f"`{column}` is empty")
    messages = tuple(_message(turn, f"turn {number}") for number, turn in enumerate(turns, 1))
    for number, (before, after) in enumerate(pairwise(messages), 2):
        if before.role == after.role and after.role in ("user", "assistant"):
            raise RowError(f"two {after.role} turns in a row: turns {number - 1} and {number}")
    unused.update(f"{key} (of a turn)" for turn in turns for key in _unknown(turn, TURN_KEYS))
    return messages


def _message(turn: Any, name: str) -> Message:
    _demand(turn, Mapping, name, "an object")
    given, content = _one_of(turn, ROLE_KEYS, name), _one_of(turn, CONTENT_KEYS, name)
    calls = _one_of(turn, CALL_KEYS, name)
    if given is None:
        raise RowError(f"{name} has no `role` or `from`")
    if not isinstance(given, str) or given.lower() not in ROLES:
        raise RowError(f"{name} has the unknown role {given!r}; known are {', '.join(ROLES)}")
    role, learn = ROLES[given.lower()], _learnt(turn, name)
    _refuse_unusable(turn, name)
    if given.lower() in CALL_ROLES:
        calls, content = content, ""
    extra = _extra(turn, role, calls, name)
    if isinstance(content, list):
        content = _joined(content, f"the content of {name}")
    if not _filled(content) and {"reasoning_content", "tool_calls"} & {*extra}:
        return Message(role, content or "", learn, extra)
    if content is None:
        raise RowError(f"{name} has no `content` or `value`")
    return Message(role, _string(content, f"the content of {name}"), learn, extra)


def _extra(turn: Mapping[str, Any], role: str, calls: Any, name: str) -> dict[str, Any]:
    """Reasoning, calls and names of one turn."""
    texts = {key: turn.get(key) for key in ("name", "tool_call_id")}
    texts["reasoning_content"] = _one_of(turn, REASONING_KEYS, name)
    extra: dict[str, Any] = {
        key: _string(text, f"`{key}` of {name}") for key, text in texts.items() if _filled(text)
    }
    if called := _calls(calls or [], f"a call of {name}"):
        extra["tool_calls"] = called
    for key in ("reasoning_content", "tool_calls"):
        if key in extra and role != "assistant":
            raise RowError(f"{name} has `{key}`, but its role is {role}, not assistant")
    return extra


def _calls(value: Any, what: str) -> list[Any]:
    """Calls in the form of ``transformers``' templates, the arguments as objects."""
    given, calls = _parsed(value, f"{what} is "), []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} has no `name`")
        arguments = _parsed(function.get("arguments") or {}, f"`arguments` of {what} is ")
        _demand(arguments, Mapping, f"`arguments` of {what}", "an object")
        identity = {"id": call["id"]} if "id" in call else {}
        named = {"name": function["name"], "arguments": arguments}
        calls.append({**identity, "type": "function", "function": named})
    return calls


def _joined(parts: Sequence[Any], what: str) -> str:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RowError(f"{what} has a part of type {kind!r}: only text can be used")
    return "".join(part["text"] for part in parts)


def _parsed(value: Any, what: str = "") -> Any:
    """A string or bytes read as JSON; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, (str, bytes)) else value
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what}not JSON: {error}") from error


def _filled(value: Any) -> bool:
    """Whether there is anything in a key: not null, not blank, not an empty list or object."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {})


def _string(value: Any, what: str) -> str:
    if not _demand(value, str, what, "a string").strip():
        raise RowError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} is not valid Unicode text: {error}") from error
    return str(value)


def _demand(value: Any, kind: type, what: str, wanted: str) -> Any:
    if not isinstance(value, kind):
        raise RowError(f"{what} is a {type(value).__name__}, not {wanted}")
    return value
