"""Chat data of any usual format → conversations, every row checked.

Files, folders and Hub ids are read by ``datasets``, except JSON and JSONL: there ``datasets`` turns an answer
like "2024-03-05" into a timestamp and names no line when a file is broken, so those two are read line by line.
A bad row is never skipped unless the user asked for it; all of them are reported together, by file and row.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusion_trainer.errors import FusionError, listed
from fusion_trainer.files import sha256_of

__all__ = ["BAD_ROW", "FORMATS", "Conversation", "Message", "Source", "conversations", "open_source"]

FORMATS = ("conversations", "messages", "prompt/completion", "text")
"""The columns that tell a format: ShareGPT, OpenAI, prompt and completion, plain text."""

COLUMNS = ("conversations", "messages", "prompt", "completion", "text")
CALLS = ("tool_calls", "function_call")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system", "tool": "tool"}
SHAREGPT_KEYS, OPENAI_KEYS = ("from", "value"), ("role", "content")
ID_COLUMNS = ("id", "conversation_id")
BAD_ROW = "not a usable row"
MOST_PROBLEMS = 1000
"""Reading stops after so many bad rows: the format is wrong, not the rows."""


@dataclass(frozen=True)
class Message:
    """One turn; ``role`` is ``system``, ``user``, ``assistant`` or ``tool``."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A dialogue, or a document of plain text (then there are no messages).

    Attributes:
        id: The row's ``id`` or ``conversation_id``, else its number.
        messages: The turns.
        text: A document's text; everything in it is supervised.
        where: File and row, for messages to the user.
    """

    id: str
    messages: tuple[Message, ...]
    text: str | None
    where: str


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
        FusionError: There is no such file or dataset, or ``datasets`` cannot read it.
    """
    path = Path(data)
    if path.suffix in (".json", ".jsonl"):
        _demand_file(path)
        return Source(path.name, sha256_of(path), lambda: _json_rows(path))
    dataset = _load(path, name, split)
    used = {name: kind for name, kind in (dataset.features or {}).items() if name in COLUMNS}
    if "timestamp" in str(list(used.values())):
        raise FusionError(
            f"{data}: `datasets` has read strings as timestamps ({used}); give the dataset's JSON "
            "files by their paths, or a Parquet file whose columns are strings"
        )
    own = sha256_of(path) if path.is_file() else str(dataset._fingerprint)
    rows = lambda: ((f"{path.name}, row {number}", row) for number, row in enumerate(dataset, 1))  # noqa: E731
    return Source(path.name, own, rows)


def conversations(sources: Iterable[Source], skipped: Counter[str] | None = None) -> Iterator[Conversation]:
    """Every row of every source, checked.

    Args:
        sources: The inputs, in order.
        skipped: If given, bad rows are counted here and left out.

    Raises:
        FusionError: Some rows are bad and ``skipped`` is None. Raised after all rows were read, with file,
            row and reason of each.
    """
    problems: list[str] = []
    for source in sources:
        for number, (where, row) in enumerate(source.rows(), 1):
            if len(problems) == MOST_PROBLEMS:
                break
            try:
                conversation = _conversation(row, str(number), where)
            except RowError as error:
                if skipped is not None:
                    skipped[BAD_ROW] += 1
                    continue
                problems.append(f"{where}: {error}")
                continue
            if not problems:
                yield conversation
    if problems:
        raise FusionError(
            f"the data has {len(problems)} bad row{'s' * (len(problems) > 1)}:{listed(problems)}\n"
            "Correct them, or leave them out with --bad-rows skip."
        )


def _demand_file(path: Path) -> None:
    if not path.is_file():
        there = sorted(other.name for other in path.parent.glob("*") if other.suffix == path.suffix)
        beside = f"; beside it lie {', '.join(there[:5])}" if there else ""
        raise FusionError(f"no file `{path}`{beside}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array, or JSON Lines: told by the first character, not by the name."""
    with path.open("rb") as file:
        first = file.read(1)
        if first == b"\xef" and file.read(2) == b"\xbb\xbf":
            first = file.read(1)
        while first.isspace():
            first = file.read(1)
    if first == b"[":
        try:
            rows = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise FusionError(f"{path.name} is not JSON: {error}") from error
        yield from ((f"{path.name}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}, line {number}", _json_line(line)


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {error}")


def _load(path: Path, name: str | None, split: str) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    failures = (OSError, ValueError, KeyError, StopIteration, HfHubHTTPError, datasets.exceptions.DatasetsError)
    try:
        if path.suffix == ".parquet":
            _demand_file(path)
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if (path.is_dir() and (path / "state.json").is_file()) or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(str(path), name, split=split)
    except FusionError:
        raise
    except failures as error:
        kind = "folder" if path.is_dir() else "file" if path.exists() else "Hub dataset, and no file or folder"
        raise FusionError(f"cannot read the {kind} `{path}`: {error or type(error).__name__}") from error


def _conversation(row: Any, number: str, where: str) -> Conversation:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"a {type(row).__name__}, not an object")
    row = {key: value for key, value in row.items() if value is not None}
    identity = str(next((row[column] for column in ID_COLUMNS if column in row), number))
    if "conversations" in row:
        return Conversation(identity, _turns(row["conversations"], "conversations", SHAREGPT_KEYS), None, where)
    if "messages" in row:
        return Conversation(identity, _turns(row["messages"], "messages", OPENAI_KEYS), None, where)
    if "prompt" in row or "completion" in row:
        return Conversation(identity, _prompt_and_completion(row), None, where)
    if "text" in row:
        return Conversation(identity, (), _string(row["text"], "`text`"), where)
    raise RowError(
        f"missing keys: has {', '.join(map(repr, row)) or 'none'}; one of {', '.join(FORMATS)} is needed"
    )


def _turns(turns: Any, column: str, keys: tuple[str, str]) -> tuple[Message, ...]:
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise RowError(f"`{column}` is a {type(turns).__name__}, not a list of turns")
    if not turns:
        raise RowError(f"`{column}` is empty")
    messages = tuple(_message(turn, f"turn {number}", keys) for number, turn in enumerate(turns, 1))
    for number, (before, after) in enumerate(pairwise(messages), 2):
        if before.role == after.role and after.role in ("user", "assistant"):
            raise RowError(f"two {after.role} turns in a row: turns {number - 1} and {number}")
    return messages


def _message(turn: Any, which: str, keys: tuple[str, str]) -> Message:
    role_key, content_key = keys
    if not isinstance(turn, Mapping):
        raise RowError(f"{which} is a {type(turn).__name__}, not an object")
    for key in keys:
        if turn.get(key) is None:
            raise RowError(f"{which} has no `{key}`")
    for call in CALLS:
        if turn.get(call):
            raise RowError(f"{which} has `{call}`, which is not rendered: write the call into `{content_key}`")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{which} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    return Message(ROLES[role], _string(turn[content_key], f"`{content_key}` of {which}"))


def _prompt_and_completion(row: Mapping[str, Any]) -> tuple[Message, ...]:
    for key in ("prompt", "completion"):
        if key not in row:
            raise RowError(f"no `{key}`")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        texts = (_string(row[key], f"`{key}`") for key in ("prompt", "completion"))
        return tuple(Message(role, text) for role, text in zip(("user", "assistant"), texts, strict=True))
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns([*prompt, *completion], "prompt` + `completion", OPENAI_KEYS)
    both = f"`prompt` is a {type(prompt).__name__} and `completion` a {type(completion).__name__}"
    raise RowError(f"{both}; both must be strings, or both lists of messages")


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
