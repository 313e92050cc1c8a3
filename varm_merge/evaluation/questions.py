"""Reads and checks the files of MT-Bench and AlpacaEval. All problems of a file are reported at once.

A file is JSON lines or a JSON list. MT-Bench's questions have ``question_id``, ``category`` and ``turns``;
AlpacaEval's have ``instruction``. Every function that reads a file raises a UserError if it cannot be used.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from varm_common.errors import UserError, listed
from varm_common.files import fingerprint, read_text

__all__ = ["Question", "Questions", "checked", "problems_of", "read_questions", "refuse", "rows_of"]


class MTBenchQuestion(BaseModel, strict=True):
    question_id: int | str
    category: str
    turns: list[str] = Field(min_length=1)


class Instruction(BaseModel, strict=True):
    instruction: str
    input: str | None = Field(None, max_length=0)


@dataclass(frozen=True)
class Question:
    """The user's messages of one chat, and the row of the file; AlpacaEval has row numbers as ids, from 0."""

    id: int | str
    turns: list[str]
    category: str
    row: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.id)


@dataclass(frozen=True)
class Questions:
    """A file of questions."""

    benchmark: Literal["MT-Bench", "AlpacaEval"]
    questions: Sequence[Question]

    @property
    def sha256(self) -> str:
        """A hash of ids, categories and turns; other keys of the rows do not matter."""
        return fingerprint([[question.id, question.category, question.turns] for question in self.questions])


def rows_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the objects of a file and their places ("line 3")."""
    text = read_text(path)
    rows: list[tuple[str, Any]] = []
    problems = []
    is_list = text.lstrip().startswith("[")
    for number, part in enumerate([text] if is_list else text.split("\n"), 1):
        try:
            if is_list:
                rows = [(f"row {number}", row) for number, row in enumerate(json.loads(part), 1)]
            elif part.strip():
                rows.append((f"line {number}", json.loads(part)))
        except ValueError as error:
            problems.append(f"{'' if is_list else f'line {number}: '}not JSON: {error}")
    problems += [f"{where}: not a JSON object" for where, row in rows if not isinstance(row, dict)]
    refuse(path, problems if problems or rows else ["it is empty"])
    return rows


def checked(path: Path, kind: type[BaseModel]) -> list[dict[str, Any]]:
    """Read the rows of a file. Each must have the entries of ``kind``; other entries are kept."""
    rows = rows_of(path)
    refuse(path, [problem for where, row in rows for problem in problems_of(where, row, kind)])
    return [row for _, row in rows]


def problems_of(where: str, row: Any, kind: type[BaseModel]) -> Iterator[str]:
    """Describe the entries of a row that ``kind`` does not allow."""
    try:
        kind.model_validate(row)
    except ValidationError as error:
        for problem in error.errors():
            yield f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raise a UserError that lists the problems of a file, if there are any."""
    if problems:
        raise UserError(f"`{path}` cannot be used:{listed(problems)}")


def read_questions(path: Path) -> Questions:
    """Read the questions of either benchmark."""
    keys = {key for _, row in rows_of(path) for key in row}
    if "turns" in keys:
        rows = checked(path, MTBenchQuestion)
        ids = [row["question_id"] for row in rows]
        refuse(path, [f"question {id_} occurs twice" for id_ in dict.fromkeys(ids) if ids.count(id_) > 1])
        questions = [Question(row["question_id"], row["turns"], row["category"], row) for row in rows]
        return Questions("MT-Bench", questions)
    if "instruction" in keys:
        numbered = enumerate(checked(path, Instruction))
        return Questions("AlpacaEval", [Question(n, [row["instruction"]], "", row) for n, row in numbered])
    raise UserError(
        f"`{path}` has neither MT-Bench's questions (`question_id`, `category`, `turns`) nor AlpacaEval's "
        f"(`instruction`); its rows have {', '.join(f'`{key}`' for key in sorted(keys)) or 'nothing'}"
    )
