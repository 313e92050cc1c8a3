"""MT-Bench's single-answer grading: a judge rates each turn of each answer from 1 to 10.

Prompts and judgments are FastChat's, so its ``show_result`` reads them. A judgment without a rating gets the score
-1, which all averages leave out.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from varm_common.errors import UserError
from varm_merge.evaluation.collect import Judging
from varm_merge.evaluation.endpoint import Reply
from varm_merge.evaluation.journal import Lines
from varm_merge.evaluation.questions import Question, Questions, checked, problems_of, refuse

__all__ = ["Game", "Judgment", "games", "judgments", "rating"]

WITH_REFERENCE = frozenset({"math", "reasoning", "coding", "arena-hard-200"})
"""Categories whose judge is shown a reference answer."""
PROMPTS = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
"""FastChat's prompts, by turn and whether there is a reference answer."""
NO_RATING = -1
Templates = dict[str, dict[str, Any]]
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


class Choice(BaseModel, strict=True):
    turns: list[str]


class MTBenchAnswer(BaseModel, strict=True):
    question_id: int | str
    choices: list[Choice] = Field(min_length=1)


class JudgePrompt(BaseModel, strict=True):
    name: str
    system_prompt: str
    prompt_template: str
    output_format: str


class Judgment(BaseModel, strict=True):
    model: str
    question_id: int | str
    turn: int
    judge: list[str] = Field(min_length=1)
    score: float = Field(allow_inf_nan=False)


@dataclass(frozen=True)
class Game:
    """One judgment to make: a model's answer to a question, at a turn."""

    model: str
    question_id: int | str
    turn: int
    prompt: str
    system: str
    text: str

    def key(self, judge: str) -> tuple[Any, ...]:
        """The values that identify its judgment in FastChat's file."""
        return self.model, self.question_id, self.turn, judge, self.prompt

    @property
    def name(self) -> str:
        return f"{self.model}, question {self.question_id}, turn {self.turn}"

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.text}]


def rating(judgment: str) -> float:
    """Read a rating as FastChat does: ``[[7]]``, else ``[7]``, whatever the number; -1 without one."""
    for pattern in RATINGS:
        if match := pattern.search(judgment):
            value = float(match[1])
            return int(value) if value.is_integer() else value
    return NO_RATING


def games(questions: Questions, answers: Sequence[Path], prompts: Path, references: Path | None) -> list[Game]:
    """List all judgments to make, model by model; each file of answers is named after its model.

    Raises:
        UserError: The files are incomplete; all gaps are listed.
    """
    models = Counter(path.stem for path in answers)
    if twice := ", ".join(name for name, count in models.items() if count > 1):
        rule = "the file's name is the model's name"
        raise UserError(f"several files of answers are called {twice}; rename them, because {rule}")
    if questions.benchmark != "MT-Bench":
        raise UserError("these are AlpacaEval's questions; use `evaluate judge alpaca-eval`")
    templates = _read_templates(prompts)
    with_reference = [question for question in questions.questions if question.category in WITH_REFERENCE]
    if with_reference and references is None:
        lack = f"{len(with_reference)} questions of math, reasoning or coding need reference answers"
        raise UserError(f"{lack}: give them with --references FILE")
    known = _read_complete(references, with_reference) if references else {}
    shown = {question.id: known[question.id] for question in with_reference}
    return [
        _game(path.stem, question, turn, turns[question.id], shown.get(question.id, [])[:turn], templates)
        for path in answers
        for turns in [_read_complete(path, questions.questions)]
        for question in questions.questions
        for turn in ((1, 2) if len(question.turns) == 2 else (1,))
    ]


def _read_complete(path: Path, questions: Sequence[Question]) -> dict[int | str, list[str]]:
    """Read answers that cover all questions."""
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in checked(path, MTBenchAnswer)}
    problems = []
    for question in questions:
        if question.id not in answers:
            problems.append(f"no answer to question {question.id}")
        elif len(answers[question.id]) < len(question.turns[:2]):
            problems.append(f"question {question.id} has {len(question.turns)} turns, its answer fewer")
    refuse(path, problems)
    return answers


def _read_templates(path: Path) -> Templates:
    templates = {row["name"]: row for row in checked(path, JudgePrompt) if row["output_format"] == "[[rating]]"}
    missing = [name for name in PROMPTS.values() if name not in templates]
    names = ", ".join(f"`{name}`" for name in templates)
    refuse(path, [f"no prompt `{name}`; there are {names} with the output_format [[rating]]" for name in missing])
    return templates


def _game(
    model: str, question: Question, turn: int, answers: list[str], references: list[str], templates: Templates
) -> Game:
    name = PROMPTS[turn, bool(references)]
    template = templates[name]
    values = {f"ref_answer_{number}": text for number, text in enumerate(references, 1)}
    if turn == 1:
        values |= {"question": question.turns[0], "answer": answers[0]}
    else:
        values |= {f"question_{number}": text for number, text in enumerate(question.turns, 1)}
        values |= {f"answer_{number}": text for number, text in enumerate(answers, 1)}
    try:
        text = str(template["prompt_template"]).format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(f"the prompt `{name}` has a placeholder that nothing fills: {error}") from error
    return Game(model, question.id, turn, name, template["system_prompt"], text)


@contextmanager
def judgments(games: Sequence[Game], judge: str, output: Path) -> Iterator[Judging]:
    """Open FastChat's file of judgments, which grows line by line and may hold others.

    Raises:
        UserError: It holds something else, or judgments of other answers or by other prompts.
    """
    scores: dict[Any, float] = {}

    def read_scores(rows: Sequence[Any], _: bytes) -> None:
        refuse(output, [text for n, row in enumerate(rows, 1) for text in problems_of(f"line {n}", row, Judgment)])
        known = {(row["model"], row["question_id"], row["turn"], *row["judge"]): row for row in rows}
        judged = [(game, row) for game in games if (row := known.get(game.key(judge)))]
        if other := Counter(game.model for game, row in judged if row.get("user_prompt") != game.text):
            counts = ", ".join(f"{count} of `{model}`" for model, count in other.items())
            reason = f"has judgments of other answers, or with other prompts: {counts}"
            raise UserError(f"`{output}` {reason}. Give another --output, or remove those lines.")
        scores.update((game.key(judge), row["score"]) for game, row in judged)

    with Lines(output, read_scores) as lines:

        def add(game: Game, reply: Reply) -> None:
            score = rating(reply.text)
            row: dict[str, Any] = {"question_id": game.question_id, "model": game.model}
            row |= {"judge": [judge, game.prompt], "user_prompt": game.text, "judgment": reply.text}
            row |= {"score": score, "turn": game.turn, "tstamp": time.time()}
            lines.add(row)
            scores[game.key(judge)] = score

        yield Judging(
            requests=[game for game in games if game.key(judge) not in scores],
            already=len(scores),
            max_tokens=2048,
            settings={"temperature": 0},
            add=add,
            unrated=lambda: list(scores.values()).count(NO_RATING),
        )
