"""Chat data of any usual format → conversations, every row checked.

Files, folders and Hub ids are read by ``datasets``, except JSON and JSONL: there ``datasets`` turns an answer
like "2024-03-05" into a timestamp and names no line when a file is broken, so those two are read line by line.
A bad row is never skipped unless the user asked for it; all of them are reported together, by file and row.
Keys that change what is learnt are used, or the row is bad; all other keys that were not used are counted.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from varm_common.errors import UserError, listed
from varm_common.files import sha256_of

__all__ = ["BAD_ROW", "FORMATS", "Conversation", "Message", "Source", "conversations", "open_source"]

TURNS = ("conversations", "messages", "conversation")
FORMATS = {
    **{column: (column,) for column in TURNS},
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "input", "output", "history"),
    "text": ("text",),
}
"""Each format's columns: lists of turns, prompt and completion, Alpaca, plain text. A row must have those that the
format's name lists."""

ID_COLUMNS, SYSTEM_COLUMNS = ("id", "conversation_id"), ("system", "system_prompt")
COLUMNS = (*SYSTEM_COLUMNS, *(column for columns in FORMATS.values() for column in columns))
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
CALL_KEYS, REASONING_KEYS = ("tool_calls", "function_call"), ("reasoning_content", "reasoning", "thinking")
CALL_ROLES, TEXT_PARTS = ("function_call", "tool_call"), ("text", "input_text", "output_text")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {"system": "system", "developer": "system"} | dict.fromkeys(CALL_ROLES, "assistant")
ROLES |= dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool")
LEARNT_IF = {"weight": 1, "train": 1, "loss": 1, "loss_mask": 1, "loss_scale": 1, "masked": 0}
"""Marks of OpenAI and Mistral, axolotl, ms-swift and torchtune, and the value at which an answer is learnt."""

PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag", "label")
REFUSED = dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text can be used")
REFUSED |= dict.fromkeys(PREFERENCES, "preferences are not used: give the answers to learn as `messages`")
REFUSED |= {
    "mask": "it does not say whether 1 is learnt or left out: write `train`, true or false",
    "train_detail": "an answer is learnt as a whole or not at all: write `train`, true or false",
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
    """What is wrong with one row, without saying where it is."""


@dataclass(frozen=True)
class Source:
    """One opened input: its rows, how a row is named to the user, and what identifies its content."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[tuple[str, Any]]]


def open_source(data: str, *, name: str | None = None, split: str = "train") -> Source:
    """Open a JSON, JSONL or Parquet file, a folder with a dataset, or a dataset of the Hub.

    Args:
        data: A path or a Hub id.
        name: The configuration of a Hub dataset that has several.
        split: The split of a folder or Hub dataset.

    Raises:
        UserError: There is no such file or dataset, or ``datasets`` cannot read it.
    """
    path = Path(data)
    if path.suffix in (".json", ".jsonl", ".parquet") and not path.is_file():
        there = sorted(other.name for other in path.parent.glob("*") if other.suffix == path.suffix)
        beside = f"; beside it lie {', '.join(there[:5])}" if there else ""
        raise UserError(f"no file `{path}`{beside}")
    if path.suffix in (".json", ".jsonl"):
        return Source(path.name, sha256_of(path), lambda: _json_rows(path))
    dataset = _load(path, name, split)
    used = {name: kind for name, kind in (dataset.features or {}).items() if name in COLUMNS}
    if any(map(_reads_timestamps, used.values())):
        raise UserError(
            f"{data}: `datasets` has read strings as timestamps ({used}); give the dataset's JSON "
            "files by their paths, or a Parquet file whose columns are strings"
        )
    own = sha256_of(path) if path.is_file() else str(dataset._fingerprint)
    rows = lambda: ((f"{path.name}, row {number}", _without_nulls(row)) for number, row in enumerate(dataset, 1))  # noqa: E731
    return Source(path.name, own, rows)


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
    kinds: dict[str, list[str]] = {}
    problems = 0
    for source in sources:
        for number, (where, row) in enumerate(source.rows(), 1):
            if problems == MOST_PROBLEMS:
                break
            lost: Counter[str] = Counter()
            try:
                conversation = _conversation(row, str(number), where, lost)
            except RowError as error:
                if skipped is not None:
                    skipped[BAD_ROW] += 1
                else:
                    problems += 1
                    rows = kinds.setdefault(re.sub(r"\d+", "0", str(error)), [])
                    rows.append(where if rows else f"{where}: {error}")
                continue
            if not problems:
                if unused is not None:
                    unused.update(lost)
                yield conversation
    if problems:
        lines = []
        for first, *more in kinds.values():
            also = f"{'; '.join(more[: EXAMPLES - 1])}{' …' * (len(more) >= EXAMPLES)}"
            lines.append(first + f"\n    {len(more) + 1} rows of this kind, also {also}" * bool(more))
        raise UserError(
            f"the data has {problems} bad row{'s' * (problems > 1)}:{listed(lines)}\n"
            "Correct them, or leave them out with --bad-rows skip."
        )


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array, or JSON Lines as bytes, whatever the name; an object over many lines is one row."""
    with path.open("rb") as file:
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
        first = next((line for line in lines if line), b"")
    if first.startswith(b"[") or first == b"{":
        try:
            rows = _parsed(path.read_bytes())
        except RowError as error:
            raise UserError(f"{path.name} is {error}") from error
        rows = rows if isinstance(rows, list) else [rows]
        yield from ((f"{path.name}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    with path.open("rb") as file:
        yield from ((f"{path.name}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())


def _load(path: Path, name: str | None, split: str) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    failures = (OSError, ValueError, KeyError, StopIteration, HfHubHTTPError, datasets.exceptions.DatasetsError)
    try:
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if (path.is_dir() and (path / "state.json").is_file()) or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(str(path), name, split=split)
    except failures as error:
        kind = "folder" if path.is_dir() else "file" if path.exists() else "Hub dataset, and no file or folder"
        raise UserError(f"cannot read the {kind} `{path}`: {error or type(error).__name__}") from error


def _reads_timestamps(kind: Any) -> bool:
    """Whether a column's strings, or the contents of its turns, have become timestamps."""
    kind = getattr(kind, "feature", kind)
    if isinstance(kind, Mapping):
        return any(_reads_timestamps(kind[key]) for key in CONTENT_KEYS if key in kind)
    return "timestamp" in str(getattr(kind, "dtype", ""))


def _without_nulls(value: Any) -> Any:
    """Without the keys that are null: a table gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _conversation(row: Any, number: str, where: str, unused: Counter[str]) -> Conversation:
    row = _parsed(row) if isinstance(row, bytes) else row
    if not isinstance(row, Mapping):
        raise RowError(f"a {type(row).__name__}, not an object")
    rest = {key: value for key, value in row.items() if value is not None}
    identity = str(next((rest[column] for column in ID_COLUMNS if column in rest), number))
    _refuse(rest, "the row")
    name, columns, others = _format(rest)
    learn, tools, system = _learnt(rest, "the row"), _tools(rest), _one_of(rest, SYSTEM_COLUMNS, "the row")
    text = _string(columns["text"], "`text`") if name == "text" else None
    if text and (not learn or tools or _filled(system)):
        raise RowError("`text` is learnt as a whole: it cannot have a system prompt, tools, or be left out")
    messages = () if text else _messages(name, columns, unused)
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
    unused.update(key for key, value in {**rest, **others}.items() if key not in ID_COLUMNS and _filled(value))
    messages = messages if learn else tuple(replace(message, learn=False) for message in messages)
    return Conversation(identity, messages, text, where, tools)


def _format(rest: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The row's format, its columns, and what other formats' columns hold; all taken out of ``rest``."""
    keys = ", ".join(map(repr, rest)) or "none"
    there = {name: {key: rest.pop(key) for key in keys if key in rest} for name, keys in FORMATS.items()}
    filled = [name for name, columns in there.items() if any(map(_filled, columns.values()))]
    filled = filled or [name for name, columns in there.items() if columns]
    if not filled:
        raise RowError(f"missing keys: has {keys}; one of {', '.join(FORMATS)} is needed")
    # A row that is whole in one format may have a column or two of another.
    name = max(filled, key=lambda name: all(_filled(there[name].get(key)) for key in name.split("/")))
    if missing := [key for key in name.split("/") if key not in there[name]]:
        raise RowError(f"no `{missing[0]}`")
    columns = there.pop(name)
    others = {key: value for other in there.values() for key, value in other.items() if _filled(value)}
    return name, columns, others


def _refuse(keys: Mapping[str, Any], what: str) -> None:
    for key, value in keys.items():
        if key in REFUSED and _filled(value) and (key != "label" or isinstance(value, bool)):
            raise RowError(f"{what} has `{key}`: {REFUSED[key]}")
        entries = value if isinstance(value, list) and key not in COLUMNS else []
        objects = ({*entry} for entry in entries if isinstance(entry, Mapping))
        if any({*ROLE_KEYS} & entry and {*CONTENT_KEYS} & entry for entry in objects):
            raise RowError(f"{what} has turns in `{key}`, which would be lost; known are {', '.join(FORMATS)}")


def _learnt(keys: dict[str, Any], what: str) -> bool:
    """Whether ``what`` is learnt, by the marks that are taken out of ``keys``."""
    marks = {key: keys.pop(key) for key in LEARNT_IF if keys.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1):
            raise RowError(f"`{key}` of {what} is {value!r:.40}: an answer can be learnt (1) or not (0)")
    learnt = {value == LEARNT_IF[key] for key, value in marks.items()}
    if len(learnt) > 1:
        raise RowError(f"`{'` and `'.join(marks)}` of {what} contradict each other")
    return learnt != {False}


def _one_of(keys: dict[str, Any], names: Sequence[str], what: str) -> Any:
    """The value of whichever of ``names`` is there, taken out of ``keys``; None if none is."""
    there = {name: keys.pop(name) for name in names if keys.get(name) is not None}
    there = {name: value for name, value in there.items() if _filled(value)} or there
    value = next(iter(there.values()), None)
    if any(other != value for other in there.values()):
        raise RowError(f"`{'` and `'.join(there)}` of {what} contradict each other")
    return value


def _tools(rest: dict[str, Any]) -> list[Any] | None:
    """The functions in the form of ``transformers``' templates: ``{"type": "function", "function": schema}``."""
    tools = _parsed(_one_of(rest, ("tools", "functions"), "the row") or [], "`tools` is ")
    tools = [_parsed(tool, "a tool is ") for tool in tools] if isinstance(tools, list) else [None]
    if not all(isinstance(tool, Mapping) and ("name" in tool or "type" in tool) for tool in tools):
        raise RowError("`tools` is not a list of functions that have a `name`")
    return [tool if "type" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _repeats(value: Any, texts: Sequence[str]) -> bool:
    """Whether a column only repeats one of the texts, or is a rendering of all."""
    place = 0 if isinstance(value, str) else -1
    for text in texts:
        place = value.find(text.strip(), place) if place >= 0 else -1
    return place >= 0 or value in texts


def _messages(name: str, columns: Mapping[str, Any], unused: Counter[str]) -> tuple[Message, ...]:
    if name == "instruction/output":
        return _instruction_and_output(columns)
    if name in TURNS:
        return _turns(columns[name], name, unused)
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        question, answer = _string(prompt, "`prompt`"), _string(completion, "`completion`")
        return Message("user", question), Message("assistant", answer)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns([*prompt, *completion], "prompt` + `completion", unused)
    both = f"`prompt` is a {type(prompt).__name__} and `completion` a {type(completion).__name__}"
    raise RowError(f"{both}; both must be strings, or both lists of messages")


def _turns(turns: Any, column: str, unused: Counter[str]) -> tuple[Message, ...]:
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise RowError(f"`{column}` is a {type(turns).__name__}, not a list of turns")
    if not turns:
        raise RowError(f"`{column}` is empty")
    messages = tuple(_message(turn, f"turn {number}", unused) for number, turn in enumerate(turns, 1))
    for number, (before, after) in enumerate(pairwise(messages), 2):
        if before.role == after.role and after.role in ("user", "assistant"):
            raise RowError(f"two {after.role} turns in a row: turns {number - 1} and {number}")
    return messages


def _message(turn: Any, which: str, unused: Counter[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{which} is a {type(turn).__name__}, not an object")
    rest = {key: value for key, value in turn.items() if value is not None}
    sharegpt = bool({"from", "value"} & {*rest})
    content_key = next((key for key in CONTENT_KEYS if key in rest), CONTENT_KEYS[sharegpt])
    given, content = _one_of(rest, ROLE_KEYS, which), _one_of(rest, CONTENT_KEYS, which)
    if given is None:
        raise RowError(f"{which} has no `{ROLE_KEYS[sharegpt]}`")
    if not isinstance(given, str) or given.lower() not in ROLES:
        raise RowError(f"{which} has the unknown role {given!r}; known are {', '.join(ROLES)}")
    role, learn = ROLES[given.lower()], _learnt(rest, which)
    _refuse(rest, which)
    if given.lower() in CALL_ROLES:
        rest["function_call"], content = content, ""
    extra = _extra(rest, role, which)
    unused.update(f"{key} (of a turn)" for key, value in rest.items() if _filled(value))
    what = f"`{content_key}` of {which}"
    content = _joined(content, what) if isinstance(content, list) else content
    if not _filled(content) and {"reasoning_content", "tool_calls"} & {*extra}:
        return Message(role, content or "", learn, extra)
    if content is None:
        raise RowError(f"{which} has no `{content_key}`")
    return Message(role, _string(content, what), learn, extra)


def _extra(rest: dict[str, Any], role: str, which: str) -> dict[str, Any]:
    """Reasoning, calls and names of one turn, taken out of ``rest``."""
    extra: dict[str, Any] = {key: rest.pop(key) for key in ("name", "tool_call_id") if _filled(rest.get(key))}
    if _filled(reasoning := _one_of(rest, REASONING_KEYS, which)):
        extra["reasoning_content"] = reasoning
    extra = {key: _string(value, f"`{key}` of {which}") for key, value in extra.items()}
    if calls := _calls(_one_of(rest, CALL_KEYS, which) or [], f"a call of {which}"):
        extra["tool_calls"] = calls
    for key in ("reasoning_content", "tool_calls"):
        if key in extra and role != "assistant":
            raise RowError(f"{which} has `{key}`, but its role is {role}, not assistant")
    return extra


def _calls(value: Any, what: str) -> list[Any]:
    """Calls in the form of ``transformers``' templates, the arguments as objects."""
    calls, made = _parsed(value, f"{what} is "), []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} has no `name`")
        arguments = _parsed(function.get("arguments") or {}, f"`arguments` of {what} is ")
        if not isinstance(arguments, Mapping):
            raise RowError(f"`arguments` of {what} is a {type(arguments).__name__}, not an object")
        called = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        made.append({"id": call["id"], **called} if "id" in call else called)
    return made


def _instruction_and_output(row: Mapping[str, Any]) -> tuple[Message, ...]:
    question = _string(row["instruction"], "`instruction`")
    if _filled(row.get("input")):
        question += f"\n\n{_string(row['input'], '`input`')}"
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("`history` is not a list of pairs of question and answer")
    texts = [_string(text, "an entry of `history`") for pair in history for text in pair]
    texts += [question, _string(row["output"], "`output`")]
    return tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))


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
    if not isinstance(value, str):
        raise RowError(f"{what} is a {type(value).__name__}, not a string")
    if not value.strip():
        raise RowError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} is no Unicode text: {error}") from error
    return value
