"""Chat data in files, folders and on the Hub → rows.

``datasets`` reads them, except JSON and JSONL: there it turns an answer like "2024-03-05" into a timestamp and
names no line when a file is broken, so those two are read line by line.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varm_common.errors import UserError, some
from varm_common.files import sha256_of

__all__ = ["COLUMNS", "FORMATS", "Source", "load_table", "open_source"]

TURNS = ("conversations", "messages", "conversation")
FORMATS = {
    **{column: (column,) for column in TURNS},
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "input", "output", "history"),
    "text": ("text",),
}
"""Each format's columns: lists of turns, prompt and completion, Alpaca, plain text. A row must have those that the
format's name lists."""

SYSTEM_COLUMNS = ("system", "system_prompt")
COLUMNS = (*SYSTEM_COLUMNS, *(column for columns in FORMATS.values() for column in columns))
READ_AT_ONCE = 1 << 20
"""Characters of a JSON array that are read at a time."""
LINE_START = 4096
"""Bytes of a line that are enough to tell what it begins with."""
DECODER, SPACES = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
LONGEST_LITERAL = len("-Infinity")
CONTENT_KEYS = ("content", "value")


@dataclass(frozen=True)
class Source:
    """One opened input: what identifies its content, and its rows, each with its name for the user."""

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
        beside = f"; the folder has {', '.join(there[:5])}" if there else ""
        raise UserError(f"no file `{path}`{beside}")
    if path.suffix in (".json", ".jsonl"):
        return Source(sha256_of(path), lambda: _json_rows(path))
    dataset = load_table(data, name, split)
    used = {name: kind for name, kind in (dataset.features or {}).items() if name in COLUMNS}
    if any(map(_reads_timestamps, used.values())):
        raise UserError(
            f"{data}: `datasets` has read strings as timestamps ({used}); give the dataset's JSON "
            "files by their paths, or a Parquet file whose columns are strings"
        )

    def rows() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(dataset.with_format(None), 1):
            yield f"{path.name}, row {number}", _without_nulls(row)

    return Source(sha256_of(path) if path.is_file() else str(dataset._fingerprint), rows)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array, or JSON Lines as bytes, whatever the name; an object over many lines is one row."""
    with path.open("rb") as file:
        starts = iter(lambda: file.readline(LINE_START), b"")
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in starts)
        first = next((line for line in lines if line), b"")
    if first.startswith(b"[") or first == b"{":
        try:
            for number, row in enumerate(_array_items(path) if first[:1] == b"[" else _only_item(path), 1):
                yield f"{path.name}, row {number}", row
        except _NotJsonError as error:
            raise UserError(f"{path.name} is not JSON: {error}") from error
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}, line {number}", line


class _NotJsonError(Exception):
    """Why a file is not JSON."""


def _only_item(path: Path) -> Iterator[Any]:
    try:
        yield json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _NotJsonError(error) from error


def _array_items(path: Path) -> Iterator[Any]:
    """The items of a JSON array, one after the other; little more of the file is held than the longest of them."""
    with path.open(encoding="utf-8-sig") as file:
        text, at, number, lines = "", 0, 0, 1
        try:
            while not (text := text.lstrip()):
                text = file.read(READ_AT_ONCE)
            while True:
                found = _next_item(text, at + 1)
                if isinstance(found, json.JSONDecodeError):
                    more = file.read(max(READ_AT_ONCE, len(text) - at)) if _may_be_cut(found) else ""
                    if not more:
                        raise found
                    lines += text.count("\n", 0, at)
                    text, at = text[at:] + more, 0
                    continue
                items, at = found
                number += len(items)
                yield from items
                if text[at] == "]":
                    break
            if (text[at + 1 :] + file.read(READ_AT_ONCE)).strip():
                raise _NotJsonError(f"there is more after the array of {number:,} items")
        except (ValueError, RecursionError) as error:
            what = str(error)
            if isinstance(error, json.JSONDecodeError):
                here = f"line {lines + error.doc.count(chr(10), 0, error.pos)}"
                what = f"{here}: {error.msg}: {error.doc[error.pos : error.pos + 40]!r}"
            raise _NotJsonError(f"row {number + 1}: {what}") from error


def _next_item(text: str, start: int) -> tuple[list[Any], int] | json.JSONDecodeError:
    """The item that begins at ``start`` (none in an empty array), and where its comma or bracket is."""
    start = SPACES.match(text, start).end()  # type: ignore[union-attr]
    if text[start : start + 1] == "]" and text[0] == "[" and not text[1:start].strip():
        return [], start
    try:
        item, stop = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        return error
    stop = SPACES.match(text, stop).end()  # type: ignore[union-attr]
    if text[stop : stop + 1] not in (",", "]"):
        return json.JSONDecodeError("Expecting ',' delimiter", text, stop)
    return [item], stop


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Whether more text could mend it: a string without its end, or a problem at the very end."""
    return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - LONGEST_LITERAL


def load_table(data: str, name: str | None, split: str) -> Any:
    """A Parquet or Arrow file, a dataset folder or a Hub dataset, as ``datasets`` reads it.

    Raises:
        UserError: It cannot be read.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    path = Path(data)
    failures = (OSError, ValueError, KeyError, StopIteration, HfHubHTTPError, datasets.exceptions.DatasetsError)
    try:
        if path.suffix in (".parquet", ".arrow"):
            return datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
        if path.is_file():
            raise ValueError("only .json, .jsonl, .parquet and .arrow are known; unpack or convert it")
        if (path.is_dir() and (path / "state.json").is_file()) or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict) and split not in saved:
                raise ValueError(f"no split `{split}`, but {some(list(saved))}: choose with --data-split")
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(str(path), name, split=split)
    except failures as error:
        on_the_hub = "Hub dataset (there is no such file or folder)"
        kind = "folder" if path.is_dir() else "file" if path.exists() else on_the_hub
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
