"""Questions, answers and prompts of others, read and checked: all that is wrong with a file is told at once.

MT-Bench's questions are JSON lines with ``question_id``, ``category`` and ``turns``; AlpacaEval's a JSON list with
``instruction``. Which of the two a file is, its rows tell.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from varm_merge.errors import VarmError

__all__ = [
    "Answer",
    "Benchmark",
    "Prompt",
    "Question",
    "Questions",
    "by_id",
    "read_answers",
    "read_outputs",
    "read_questions",
    "refuse",
    "rows_of",
]

Benchmark = Literal["MT-Bench", "AlpacaEval"]
SHOWN = 10
"""Problems of a file that are told; the others are counted."""


@dataclass(frozen=True)
class Question:
    """What one chat asks.

    Attributes:
        id: MT-Bench's ``question_id``; of AlpacaEval the number of the row, from 0.
        turns: The user's messages, one after the other.
        category: MT-Bench's; empty for AlpacaEval.
        row: As the file has it.
    """

    id: int | str
    turns: tuple[str, ...]
    category: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Questions:
    """A file of questions."""

    benchmark: Benchmark
    questions: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        """Of what is asked; other keys of the rows do not change it."""
        asked = [[one.id, one.category, list(one.turns)] for one in self.questions]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass(frozen=True)
class Prompt:
    """What is asked: a conversation whose last message is the user's, how hot, and the seed of the sampling."""

    messages: tuple[dict[str, str], ...]
    temperature: float
    seed: str


@dataclass(frozen=True)
class Answer:
    """What was said; ``end`` tells how it came to its end: ``stop``, ``length``, ``context`` or ``no room``."""

    text: str
    end: str


def rows_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, JSON lines or a JSON list, and where each stands ("line 3").

    Raises:
        VarmError: The file cannot be read, or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VarmError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    rows: list[tuple[str, Any]] = []
    problems = []
    if text.lstrip().startswith("["):
        try:
            rows = [(f"row {number}", row) for number, row in enumerate(json.loads(text), 1)]
        except ValueError as error:
            problems.append(f"no JSON: {error}")
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    problems.append(f"line {number}: no JSON: {error}")
    problems += [f"{where}: no JSON object" for where, row in rows if not isinstance(row, dict)]
    refuse(path, problems)
    if not rows:
        raise VarmError(f"`{path}` is empty")
    return rows


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raise what is wrong with a file, if something is."""
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise VarmError(f"`{path}` cannot be used:\n  " + "\n  ".join([*problems[:SHOWN], *more]))


def read_questions(path: Path) -> Questions:
    """The questions of a file of either benchmark.

    Raises:
        VarmError: It is none; all that is wrong with it is told.
    """
    rows = rows_of(path)
    if any("turns" in row for _, row in rows):
        return Questions("MT-Bench", tuple(_mt_bench(path, rows)))
    if any("instruction" in row for _, row in rows):
        return Questions("AlpacaEval", tuple(_alpaca_eval(path, rows)))
    raise VarmError(
        f"`{path}` has neither MT-Bench's questions (`question_id`, `category`, `turns`) nor AlpacaEval's "
        f"(`instruction`); its first row has {', '.join(f'`{key}`' for key in rows[0][1]) or 'nothing'}"
    )


def _mt_bench(path: Path, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Question]:
    problems, found = [], {}
    for where, row in rows:
        id_, category, turns = row.get("question_id"), row.get("category"), row.get("turns")
        if not _is_id(id_):
            problems.append(f"{where}: `question_id` is {id_!r}, not a whole number or a text")
        elif id_ in found:
            problems.append(f"{where}: question {id_} is there twice")
        if not isinstance(category, str):
            problems.append(f"{where}: `category` is {category!r}, not a text")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            problems.append(f"{where}: `turns` is not a list of texts")
            continue
        found[id_] = Question(id_, tuple(turns), str(category), row)  # type: ignore[arg-type]
    refuse(path, problems)
    return list(found.values())


def _alpaca_eval(path: Path, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Question]:
    problems, found = [], []
    for number, (where, row) in enumerate(rows):
        if not isinstance(row.get("instruction"), str):
            problems.append(f"{where}: `instruction` is {row.get('instruction')!r}, not a text")
        elif row.get("input"):
            problems.append(f"{where}: has an `input` beside its `instruction`; make them one text")
        else:
            found.append(Question(number, (row["instruction"],), "", row))
    refuse(path, problems)
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def by_id(id_: Any) -> tuple[bool, Any]:
    """A sort key of question ids, numbers before texts."""
    return isinstance(id_, str), id_


def read_answers(path: Path) -> dict[int | str, tuple[str, ...]]:
    """The turns of the first choice of each answer, by question, of a file as FastChat's judge reads it.

    Raises:
        VarmError: It is none.
    """
    problems, found = [], {}
    for where, row in rows_of(path):
        try:
            turns = row["choices"][0]["turns"]
            if not _is_id(row["question_id"]) or not all(isinstance(turn, str) for turn in turns):
                raise TypeError
            found[row["question_id"]] = tuple(turns)
        except (KeyError, IndexError, TypeError):
            problems.append(f"{where}: no `question_id` with `choices`, of which the first has `turns`")
    refuse(path, problems)
    return found


def read_outputs(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as alpaca_eval reads it: ``instruction``, ``output``, ``generator``.

    Raises:
        VarmError: It is none.
    """
    problems, rows = [], []
    for where, row in rows_of(path):
        for key in ("instruction", "output", "generator"):
            if not isinstance(row.get(key), str):
                problems.append(f"{where}: `{key}` is {row.get(key)!r}, not a text")
        rows.append(row)
    refuse(path, problems)
    return rows
