"""Chat data of any usual format → conversations, every row checked.

Files, folders and Hub ids are read by ``datasets``, except JSON and JSONL: there ``datasets`` turns an answer
like "2024-03-05" into a timestamp and names no line when a file is broken, so those two are read line by line.
A bad row is never skipped unless the user chose that; all of them are reported together, by file and row.
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


# Files, folders, datasets of the Hub


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
        there = sorted(other.name for other in path.parent.glob(f"*{path.suffix}"))
        beside = f"; beside it are {', '.join(there[:5])}" if there else ""
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

    def rows() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(dataset, 1):
            yield f"{path.name}, row {number}", _without_nulls(row)

    return Source(path.name, sha256_of(path) if path.is_file() else str(dataset._fingerprint), rows)


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
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            yield f"{path.name}, row {number}", row
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}, line {number}", line


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


# Rows


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
            try:
                conversation, keys = _conversation(row, str(number), where)
            except RowError as error:
                if skipped is not None:
                    skipped[BAD_ROW] += 1
                else:
                    problems.append((where, str(error)))
                if len(problems) == MOST_PROBLEMS:
                    raise UserError(_bad_rows(problems)) from error
                continue
            if not problems:
                if unused is not None:
                    unused.update(keys)
                yield conversation
    if problems:
        raise UserError(_bad_rows(problems))


def _bad_rows(problems: Sequence[tuple[str, str]]) -> str:
    """Each kind of problem once, with the rows that have it."""
    kinds: dict[str, list[str]] = {}
    for where, problem in problems:
        rows = kinds.setdefault(re.sub(r"\d+", "0", problem), [])
        rows.append(where if rows else f"{where}: {problem}")
    lines = []
    for first, *more in kinds.values():
        others = f"{'; '.join(more[: EXAMPLES - 1])}{' …' * (len(more) >= EXAMPLES)}"
        lines.append(first + f"\n    {len(more) + 1} rows of this kind, also {others}" * bool(more))
    return (
        f"the data has {len(problems)} bad row{'s' * (len(problems) > 1)}:{listed(lines)}\n"
        "Correct them, or leave them out with --bad-rows skip."
    )


class _Keys:
    """The keys of a row or a turn that are not null and have not been used yet."""

    def __init__(self, given: Mapping[str, Any], name: str) -> None:
        self.left = {key: value for key, value in given.items() if value is not None}
        self.name = name

    def take(self, names: Sequence[str]) -> Any:
        """The value of whichever of ``names`` is there; None if none is."""
        there = {name: self.left.pop(name) for name in names if name in self.left}
        there = {name: value for name, value in there.items() if _filled(value)} or there
        value = next(iter(there.values()), None)
        if any(other != value for other in there.values()):
            raise RowError(f"`{'` and `'.join(there)}` of {self.name} contradict each other")
        return value

    def learn(self) -> bool:
        """Whether the marks, which are taken out, say that it is learnt."""
        marks = {key: self.left.pop(key) for key in LEARNT_IF if key in self.left}
        for key, value in marks.items():
            if value not in (0, 1):
                raise RowError(f"`{key}` of {self.name} is {value!r:.40}: an answer can be learnt (1) or not (0)")
        learnt = {value == LEARNT_IF[key] for key, value in marks.items()}
        if len(learnt) > 1:
            raise RowError(f"`{'` and `'.join(marks)}` of {self.name} contradict each other")
        return learnt != {False}

    def refuse_unusable(self) -> None:
        """Refuse keys without which something else would be learnt than the user meant."""
        for key, value in self.left.items():
            if key in REFUSED and _filled(value) and (key != "label" or isinstance(value, bool)):
                raise RowError(f"{self.name} has `{key}`: {REFUSED[key]}")
            entries = value if isinstance(value, list) and key not in COLUMNS else []
            objects = ({*entry} for entry in entries if isinstance(entry, Mapping))
            if any({*ROLE_KEYS} & entry and {*CONTENT_KEYS} & entry for entry in objects):
                raise RowError(
                    f"{self.name} has turns in `{key}`, which would be lost; known are {', '.join(FORMATS)}"
                )

    def unused(self) -> list[str]:
        return [key for key, value in self.left.items() if _filled(value)]


def _conversation(row: Any, number: str, where: str) -> tuple[Conversation, list[str]]:
    """One row's conversation, and its keys that are not used."""
    row = _parsed(row) if isinstance(row, bytes) else row
    if not isinstance(row, Mapping):
        raise RowError(f"a {type(row).__name__}, not an object")
    keys = _Keys(row, "the row")
    keys.refuse_unusable()
    name, columns, others = _format(keys)
    identity = next((keys.left.pop(column) for column in ID_COLUMNS if column in keys.left), number)
    learn, tools, system = keys.learn(), _tools(keys), keys.take(SYSTEM_COLUMNS)
    if name == "text":
        text = _string(columns["text"], "`text`")
        if not learn or tools or _filled(system):
            raise RowError("`text` is learnt as a whole: it cannot have a system prompt, tools, or be left out")
        messages, unused = (), []
    else:
        text = None
        messages, unused = _messages(name, columns)
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
    unused += [key for key in keys.unused() if key not in ID_COLUMNS]
    if not learn:
        messages = tuple(replace(message, learn=False) for message in messages)
    return Conversation(str(identity), messages, text, where, tools), [*unused, *others]


def _format(keys: _Keys) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The row's format, its columns, and what columns of other formats hold."""
    had = ", ".join(map(repr, keys.left)) or "none"
    there = {
        name: {column: keys.left.pop(column) for column in columns if column in keys.left}
        for name, columns in FORMATS.items()
    }
    filled = [name for name, columns in there.items() if any(map(_filled, columns.values()))]
    filled = filled or [name for name, columns in there.items() if columns]
    if not filled:
        raise RowError(f"missing keys: has {had}; one of {', '.join(FORMATS)} is needed")
    # A row that is whole in one format may have a column or two of another.
    name = max(filled, key=lambda name: all(_filled(there[name].get(column)) for column in name.split("/")))
    columns = there.pop(name)
    if missing := [column for column in name.split("/") if column not in columns]:
        raise RowError(f"no `{missing[0]}`")
    others = {key: value for other in there.values() for key, value in other.items() if _filled(value)}
    return name, columns, others


def _tools(keys: _Keys) -> list[Any] | None:
    """The functions in the form of ``transformers``' templates: ``{"type": "function", "function": schema}``."""
    tools = _parsed(keys.take(("tools", "functions")) or [], "`tools` is ")
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


# Turns


def _messages(name: str, columns: Mapping[str, Any]) -> tuple[tuple[Message, ...], list[str]]:
    """The turns in the columns of a format, and the keys of turns that are not used."""
    if name in TURNS:
        return _turns(columns[name], name)
    if name == "instruction/output":
        return _alternating(_alpaca_texts(columns)), []
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _alternating([_string(prompt, "`prompt`"), _string(completion, "`completion`")]), []
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns([*prompt, *completion], "prompt` + `completion")
    both = f"`prompt` is a {type(prompt).__name__} and `completion` a {type(completion).__name__}"
    raise RowError(f"{both}; both must be strings, or both lists of messages")


def _alternating(texts: Sequence[str]) -> tuple[Message, ...]:
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


def _turns(turns: Any, column: str) -> tuple[tuple[Message, ...], list[str]]:
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise RowError(f"`{column}` is a {type(turns).__name__}, not a list of turns")
    if not turns:
        raise RowError(f"`{column}` is empty")
    read = [_message(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]
    messages = tuple(message for message, _ in read)
    for number, (before, after) in enumerate(pairwise(messages), 2):
        if before.role == after.role and after.role in ("user", "assistant"):
            raise RowError(f"two {after.role} turns in a row: turns {number - 1} and {number}")
    return messages, [f"{key} (of a turn)" for _, unused in read for key in unused]


def _message(turn: Any, name: str) -> tuple[Message, list[str]]:
    """One turn, and its keys that are not used."""
    if not isinstance(turn, Mapping):
        raise RowError(f"{name} is a {type(turn).__name__}, not an object")
    keys = _Keys(turn, name)
    sharegpt = "from" in keys.left or "value" in keys.left
    content_key = next((key for key in CONTENT_KEYS if key in keys.left), CONTENT_KEYS[sharegpt])
    given, content = keys.take(ROLE_KEYS), keys.take(CONTENT_KEYS)
    if given is None:
        raise RowError(f"{name} has no `{ROLE_KEYS[sharegpt]}`")
    if not isinstance(given, str) or given.lower() not in ROLES:
        raise RowError(f"{name} has the unknown role {given!r}; known are {', '.join(ROLES)}")
    role, learn = ROLES[given.lower()], keys.learn()
    keys.refuse_unusable()
    if given.lower() in CALL_ROLES:
        keys.left["function_call"], content = content, ""
    extra = _extra(keys, role)
    what = f"`{content_key}` of {name}"
    content = _joined(content, what) if isinstance(content, list) else content
    if not _filled(content) and {"reasoning_content", "tool_calls"} & {*extra}:
        content = content or ""
    elif content is None:
        raise RowError(f"{name} has no `{content_key}`")
    else:
        content = _string(content, what)
    return Message(role, content, learn, extra), keys.unused()


def _extra(keys: _Keys, role: str) -> dict[str, Any]:
    """Reasoning, calls and names of one turn."""
    texts = {"name": keys.take(["name"]), "tool_call_id": keys.take(["tool_call_id"])}
    texts["reasoning_content"] = keys.take(REASONING_KEYS)
    extra: dict[str, Any] = {
        key: _string(text, f"`{key}` of {keys.name}") for key, text in texts.items() if _filled(text)
    }
    if calls := _calls(keys.take(CALL_KEYS) or [], f"a call of {keys.name}"):
        extra["tool_calls"] = calls
    for key in ("reasoning_content", "tool_calls"):
        if key in extra and role != "assistant":
            raise RowError(f"{keys.name} has `{key}`, but its role is {role}, not assistant")
    return extra


def _calls(value: Any, what: str) -> list[Any]:
    """Calls in the form of ``transformers``' templates, the arguments as objects."""
    given, calls = _parsed(value, f"{what} is "), []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} has no `name`")
        arguments = _parsed(function.get("arguments") or {}, f"`arguments` of {what} is ")
        if not isinstance(arguments, Mapping):
            raise RowError(f"`arguments` of {what} is a {type(arguments).__name__}, not an object")
        identity = {"id": call["id"]} if "id" in call else {}
        function = {"name": function["name"], "arguments": arguments}
        calls.append({**identity, "type": "function", "function": function})
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
    if not isinstance(value, str):
        raise RowError(f"{what} is a {type(value).__name__}, not a string")
    if not value.strip():
        raise RowError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} is no Unicode text: {error}") from error
    return value
