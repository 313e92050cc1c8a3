"""Writes a model's answers to MT-Bench or AlpacaEval, in the files that FastChat's and alpaca_eval's judges read.

A later turn follows the model's own answers to the earlier ones. Finished answers survive a crash; the file
appears when the last answer is there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from varm_merge.evaluation.chat import Answer, Prompt
from varm_merge.evaluation.endpoint import Endpoint, Failed, in_parallel
from varm_merge.evaluation.journal import Journal
from varm_merge.evaluation.questions import Question, Questions

if TYPE_CHECKING:
    from varm_merge.evaluation.local import LocalModel

__all__ = ["Outcome", "Settings", "answer_at_endpoint", "answer_locally", "write_answers"]

FORMAT = "varm-merge answers"
GREEDY = ("extraction", "math", "coding", "reasoning", "arena-hard-200")
TEMPERATURES = {**dict.fromkeys(GREEDY, 0.0), "stem": 0.1, "humanities": 0.1}
"""FastChat's temperatures for MT-Bench's categories."""
OTHER_TEMPERATURE = 0.7
"""FastChat's temperature for writing, roleplay and unknown categories."""

Choices = list[list[Answer]]
"""The answers to a question: for each choice, one for each turn."""
Answers = Iterator[tuple[Question, Choices | Failed]]


@dataclass(frozen=True)
class Settings:
    """How questions are answered.

    Attributes:
        name: The model's name in the file.
        max_new_tokens: The longest answer.
        choices: Answers to each question.
        temperature: For all questions; None for FastChat's by category, and 0 for AlpacaEval.
        seed: The seed of the sampling.
    """

    name: str
    max_new_tokens: int = 1024
    choices: int = 1
    temperature: float | None = None
    seed: int = 0

    def prompt(self, chat: Sequence[dict[str, str]], question: Question, choice: int, turn: int) -> Prompt:
        """The prompt for the next answer of a chat."""
        temperature = self.temperature
        if temperature is None:
            temperature = TEMPERATURES.get(question.category, OTHER_TEMPERATURE) if question.category else 0.0
        return Prompt(tuple(chat), temperature, f"{self.seed}/{question.id}/{choice}/{turn}")


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        there: Questions that were answered before.
        answered: Questions answered now.
        failed: Why the others were not, by question.
        ends: How many answers ended how: ``stop``, ``length``, ``context``, ``no room``.
    """

    there: int
    answered: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)


def write_answers(
    questions: Questions,
    settings: Settings,
    model: Mapping[str, Any],
    answer: Callable[[Container[Any]], Answers],
    output: Path,
    quiet: bool = False,
) -> Outcome:
    """Write the answers that ``output`` lacks.

    Args:
        questions: All questions.
        settings: How they are answered.
        model: What identifies the model.
        answer: Answers the questions whose ids are not in a container.
        output: The file to write.
        quiet: Whether to hide progress.

    Raises:
        UserError: The model cannot answer, or the output was made with other settings.
    """
    about = {"format": FORMAT, **model, "questions": questions.sha256, **vars(settings)}
    number = len(questions.questions)
    with Journal(output, about) as journal:
        if journal.finished:
            return Outcome(number)
        outcome = Outcome(len(journal.records))
        with tqdm(total=number, initial=outcome.there, unit="question", disable=quiet) as bar:
            for question, choices in answer(journal.records):
                if isinstance(choices, Failed):
                    outcome.failed[str(question.id)] = str(choices)
                    continue
                journal.add(question.id, [[answer.text for answer in turns] for turns in choices])
                outcome.answered += 1
                outcome.ends.update(answer.end for turns in choices for answer in turns)
                bar.update()
        if not outcome.failed:
            journal.finish(_content(questions, settings, journal))
    return outcome


def _content(questions: Questions, settings: Settings, journal: Journal) -> str:
    """The file as FastChat or alpaca_eval reads it."""
    said = journal.records
    if questions.benchmark == "AlpacaEval":
        rows = [
            {**question.row, "output": said[question.id][0][0], "generator": settings.name}
            for question in questions.questions
        ]
        return json.dumps(rows, indent=2) + "\n"
    rows = []
    for question in sorted(questions.questions, key=lambda question: question.sort_key):
        identity = json.dumps([settings.name, question.id, said[question.id]])
        row = {
            "question_id": question.id,
            "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
            "model_id": settings.name,
            "choices": [{"index": index, "turns": turns} for index, turns in enumerate(said[question.id])],
            "tstamp": journal.began,
        }
        rows.append(row)
    return "".join(json.dumps(row) + "\n" for row in rows)


# A model on this machine


def answer_locally(
    questions: Sequence[Question], settings: Settings, model: "LocalModel", done: Container[Any]
) -> Answers:
    """Answer questions in batches of similar length.

    The longest come first, so a lack of memory shows at once. A batch of which only a part is done is answered as
    a whole: in another batch, the last bits of the logits would differ.
    """
    lengths = {question.id: len(model.tokens([_user(question.turns[0])])) for question in questions}
    ordered = sorted(questions, key=lambda question: (-lengths[question.id], question.sort_key))
    size = max(1, model.batch_size // settings.choices)
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        if any(question.id not in done for question in batch):
            for question, choices in zip(batch, _answer_batch(batch, settings, model), strict=True):
                if question.id not in done:
                    yield question, choices


def _answer_batch(batch: Sequence[Question], settings: Settings, model: "LocalModel") -> list[Choices]:
    places = [(question, choice) for question in batch for choice in range(settings.choices)]
    chats: list[list[dict[str, str]]] = [[] for _ in places]
    answers: list[list[Answer]] = [[] for _ in places]
    for turn in range(max(len(question.turns) for question in batch)):
        active = [number for number, (question, _) in enumerate(places) if turn < len(question.turns)]
        for number in active:
            chats[number].append(_user(places[number][0].turns[turn]))
        prompts = [settings.prompt(chats[number], *places[number], turn) for number in active]
        for number, answer in zip(active, model.answer(prompts), strict=True):
            chats[number].append({"role": "assistant", "content": answer.text})
            answers[number].append(answer)
    return [answers[start : start + settings.choices] for start in range(0, len(places), settings.choices)]


# A model behind an endpoint


def answer_at_endpoint(
    questions: Sequence[Question], settings: Settings, endpoint: Endpoint, concurrency: int, done: Container[Any]
) -> Answers:
    """Answer questions at an endpoint, several at a time."""

    def choices(question: Question) -> Choices:
        return [_chat(question, choice, settings, endpoint) for choice in range(settings.choices)]

    missing = [question for question in questions if question.id not in done]
    return in_parallel(choices, missing, concurrency)


def _chat(question: Question, choice: int, settings: Settings, endpoint: Endpoint) -> list[Answer]:
    chat: list[dict[str, str]] = []
    answers = []
    for turn, text in enumerate(question.turns):
        chat.append(_user(text))
        prompt = settings.prompt(chat, question, choice, turn)
        seed = int(hashlib.sha256(prompt.seed.encode()).hexdigest()[:7], 16)
        reply = endpoint.ask(chat, settings.max_new_tokens, temperature=prompt.temperature, seed=seed)
        end = "length" if reply.choice.get("finish_reason") == "length" else "stop"
        answers.append(Answer(reply.text.strip(), end))
        chat.append({"role": "assistant", "content": answers[-1].text})
    return answers


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
