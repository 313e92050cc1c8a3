"""Writes a model's answers to MT-Bench or AlpacaEval, in the files that FastChat's and alpaca_eval's judges read.

A later turn follows the model's own answers to the earlier ones. Finished answers survive a crash; the file
appears when the last answer is there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varm_merge.evaluation.collect import Outcome, collect, in_parallel
from varm_merge.evaluation.endpoint import CUT, Endpoint, Failed
from varm_merge.evaluation.journal import Journal
from varm_merge.evaluation.questions import Question, Questions

__all__ = ["Answer", "Answers", "Chat", "Prompt", "Settings", "answer_at_endpoint", "write_answers"]

FORMAT = "varm-merge answers"
GREEDY = ("extraction", "math", "coding", "reasoning", "arena-hard-200")
TEMPERATURES = {**dict.fromkeys(GREEDY, 0.0), "stem": 0.1, "humanities": 0.1, "": 0.0}
"""FastChat's temperatures for MT-Bench's categories; AlpacaEval's questions have none."""
OTHER_TEMPERATURE = 0.7
"""FastChat's temperature for writing, roleplay and unknown categories."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's message, and how to sample the answer."""

    messages: Sequence[dict[str, str]]
    temperature: float
    seed: str


@dataclass(frozen=True)
class Answer:
    """A model's answer; ``end`` says why it ended: ``stop``, ``context``, ``no room``, or one of ``CUT``."""

    text: str
    end: str


Choices = list[list[Answer]]
"""The answers to a question: for each choice, one for each turn."""
Answers = Iterator[tuple[Question, Choices | Failed]]
Answering = Callable[[Container[Any]], Answers]
"""Answers the questions whose ids are not in its argument."""


@dataclass(frozen=True)
class Settings:
    """How questions are answered, by the options of ``varm-merge evaluate answers``; ``choices`` to each question.

    The temperature None means FastChat's by category, and 0 for AlpacaEval.
    """

    name: str
    max_new_tokens: int = 1024
    choices: int = 1
    temperature: float | None = None
    seed: int = 0


class Chat:
    """One choice of answers to a question, turn by turn."""

    def __init__(self, question: Question, choice: int, settings: Settings) -> None:
        self.question, self.answers = question, list[Answer]()
        self._messages: list[dict[str, str]] = []
        by_category = TEMPERATURES.get(question.category, OTHER_TEMPERATURE)
        self._temperature = by_category if settings.temperature is None else settings.temperature
        self._seed = f"{settings.seed}/{question.id}/{choice}"

    def prompt(self) -> Prompt:
        """The prompt for the next answer."""
        turn = len(self.answers)
        self._messages.append({"role": "user", "content": self.question.turns[turn]})
        return Prompt(tuple(self._messages), self._temperature, f"{self._seed}/{turn}")

    def add(self, answer: Answer) -> None:
        self._messages.append({"role": "assistant", "content": answer.text})
        self.answers.append(answer)


def write_answers(
    questions: Questions, settings: Settings, model: dict[str, Any], answer: Answering, output: Path, quiet: bool
) -> tuple[Outcome, Counter[str]]:
    """Write the answers that ``output`` lacks.

    ``model`` identifies the model.

    Returns:
        The outcome, and how many of the new answers ended how (see ``Answer``).

    Raises:
        UserError: The model cannot answer, or the output was made with other settings.
    """
    about = {"format": FORMAT, **model, "questions": questions.sha256, **vars(settings)}
    total, ends = len(questions.questions), Counter[str]()
    with Journal(output, about) as journal:
        if journal.finished:
            return Outcome(total), ends

        def keep(question: Question, choices: Choices) -> None:
            journal.keep(question.id, [[answer.text for answer in turns] for turns in choices])
            ends.update(answer.end for turns in choices for answer in turns)

        there = len(journal.records)
        outcome = collect(answer(journal.records), keep, there=there, total=total, unit="question", quiet=quiet)
        if not outcome.failed:
            journal.finish(_content(questions, settings, journal))
    return outcome, ends


def _content(questions: Questions, settings: Settings, journal: Journal) -> str:
    """The file as FastChat or alpaca_eval reads it."""
    rows: list[dict[str, Any]] = []
    name = settings.name
    if questions.benchmark == "AlpacaEval":
        for question in questions.questions:
            rows.append({**question.row, "output": journal.records[question.id][0][0], "generator": name})
        return json.dumps(rows, indent=2) + "\n"
    for question in sorted(questions.questions, key=lambda question: (isinstance(question.id, str), question.id)):
        choices = journal.records[question.id]
        identity = hashlib.sha256(json.dumps([name, question.id, choices]).encode()).hexdigest()[:22]
        shown = [{"index": index, "turns": turns} for index, turns in enumerate(choices)]
        row = {"question_id": question.id, "answer_id": identity, "model_id": name, "choices": shown}
        rows.append(row | {"tstamp": journal.began})
    return "".join(json.dumps(row) + "\n" for row in rows)


def answer_at_endpoint(
    questions: Sequence[Question], settings: Settings, endpoint: Endpoint, concurrency: int, done: Container[Any]
) -> Answers:
    """Answer questions at an endpoint, several at a time."""

    def choices(question: Question) -> Choices:
        chats = [Chat(question, choice, settings) for choice in range(settings.choices)]
        for chat in chats:
            for _ in question.turns:
                prompt = chat.prompt()
                seed = int(hashlib.sha256(prompt.seed.encode()).hexdigest()[:7], 16)
                limit, temperature = settings.max_new_tokens, prompt.temperature
                reply = endpoint.ask(prompt.messages, limit, temperature=temperature, seed=seed)
                end = reply.choice.get("finish_reason")
                chat.add(Answer(reply.text.strip(), end if end in CUT else "stop"))
        return [chat.answers for chat in chats]

    missing = [question for question in questions if question.id not in done]
    return in_parallel(choices, missing, concurrency)
