"""A model's answers to MT-Bench or AlpacaEval, in the files that FastChat's and alpaca_eval's judges read.

A later turn is asked after the model's own answers to the earlier ones. What was answered is kept when a run is
killed; the file itself appears when the last answer is there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from varm_merge.evaluation.endpoint import Endpoint, Failed, in_parallel
from varm_merge.evaluation.journal import Journal
from varm_merge.evaluation.questions import Answer, Prompt, Question, Questions, by_id

if TYPE_CHECKING:
    from varm_merge.evaluation.local import LocalModel

__all__ = ["TEMPERATURES", "Asking", "Outcome", "answer_at_endpoint", "answer_locally"]

FORMAT = "varm-merge answers"
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
"""Of MT-Bench's categories, as FastChat has them."""
OTHER_TEMPERATURE = 0.7
"""Of other categories, as FastChat has it."""


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        name: What the model is called in the file.
        max_new_tokens: Most tokens of one answer.
        choices: Answers to each question.
        temperature: For all questions; None for FastChat's by category, and 0 for AlpacaEval.
        seed: Of the sampling.
    """

    name: str
    max_new_tokens: int = 1024
    choices: int = 1
    temperature: float | None = None
    seed: int = 0

    def temperature_of(self, question: Question) -> float:
        if self.temperature is not None:
            return self.temperature
        return TEMPERATURES.get(question.category, OTHER_TEMPERATURE) if question.category else 0.0

    def seed_of(self, question: Question, choice: int, turn: int) -> str:
        return f"{self.seed}/{question.id}/{choice}/{turn}"


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        there: Questions that were answered before.
        answered: Now.
        failed: Why others were not, by question.
        ends: How many answers ended how: ``stop``, ``length``, ``context``, ``no room``.
    """

    there: int
    answered: int
    failed: dict[str, str]
    ends: Counter[str]


def about(questions: Questions, asking: Asking, model: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers in a file are of."""
    return {"format": FORMAT, **model, "questions": questions.sha256, **vars(asking)}


def answer_locally(
    questions: Questions, asking: Asking, model: "LocalModel", output: Path, quiet: bool = False
) -> Outcome:
    """Make the file ``output`` of the answers of a model on this machine, or what is missing in it.

    Raises:
        VarmError: The model cannot answer, or the output is of something else.
    """
    with Journal(output, about(questions, asking, model.about())) as journal:
        outcome = Outcome(_there(journal, questions), 0, {}, Counter())
        if journal.finished:
            return outcome
        model.load()
        bar = tqdm(total=len(questions.questions), initial=outcome.there, unit="question", disable=quiet)
        with bar:
            for batch in _batches(questions.questions, asking, model):
                missing = [one.id for one in batch if one.id not in journal.records]
                if not missing:
                    continue
                # the whole batch again, if part of it was lost: other company would change the last bits of logits
                for question, choices in zip(batch, _answered(batch, asking, model), strict=True):
                    if question.id in missing:
                        _keep(journal, question, choices, outcome)
                        bar.update()
        _finish(journal, questions, asking)
    return outcome


def _there(journal: Journal, questions: Questions) -> int:
    return len(questions.questions) if journal.finished else len(journal.records)


def _batches(questions: Sequence[Question], asking: Asking, model: "LocalModel") -> Iterator[list[Question]]:
    """Questions of like length, the longest first: if memory does not suffice, it is told at once."""
    lengths = {one.id: len(model.tokens([_user(one.turns[0])])) for one in questions}
    ordered = sorted(questions, key=lambda one: (-lengths[one.id], by_id(one.id)))
    size = max(1, model.batch_size // asking.choices)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _answered(batch: Sequence[Question], asking: Asking, model: "LocalModel") -> list[list[list[Answer]]]:
    """For each question of a batch its choices, each the answers to its turns."""
    chats: dict[tuple[int, int], list[dict[str, str]]] = {
        (number, choice): [] for number in range(len(batch)) for choice in range(asking.choices)
    }
    answers: dict[tuple[int, int], list[Answer]] = {place: [] for place in chats}
    for turn in range(max(len(question.turns) for question in batch)):
        places = [place for place in chats if turn < len(batch[place[0]].turns)]
        prompts = []
        for number, choice in places:
            question = batch[number]
            chats[number, choice].append(_user(question.turns[turn]))
            seed = asking.seed_of(question, choice, turn)
            prompts.append(Prompt(tuple(chats[number, choice]), asking.temperature_of(question), seed))
        for place, answer in zip(places, model.answer(prompts), strict=True):
            chats[place].append({"role": "assistant", "content": answer.text})
            answers[place].append(answer)
    return [[answers[number, choice] for choice in range(asking.choices)] for number in range(len(batch))]


def answer_at_endpoint(
    questions: Questions, asking: Asking, endpoint: Endpoint, output: Path, threads: int, quiet: bool = False
) -> Outcome:
    """Make the file ``output`` of the answers of a model behind an endpoint, or what is missing in it.

    Raises:
        VarmError: The endpoint takes no request, or the output is of something else.
    """
    identity = {"endpoint": endpoint.url, "model": endpoint.model}
    with Journal(output, about(questions, asking, identity)) as journal:
        outcome = Outcome(_there(journal, questions), 0, {}, Counter())
        if journal.finished:
            return outcome
        missing = [one for one in questions.questions if one.id not in journal.records]
        done = in_parallel(lambda question: _asked(question, asking, endpoint), missing, threads)
        bar = tqdm(total=len(questions.questions), initial=outcome.there, unit="question", disable=quiet)
        with bar:
            for question, choices in done:
                if isinstance(choices, Failed):
                    outcome.failed[str(question.id)] = str(choices)
                else:
                    _keep(journal, question, choices, outcome)
                    bar.update()
        if not outcome.failed:
            _finish(journal, questions, asking)
    return outcome


def _asked(question: Question, asking: Asking, endpoint: Endpoint) -> list[list[Answer]]:
    return [_choice(question, choice, asking, endpoint) for choice in range(asking.choices)]


def _choice(question: Question, choice: int, asking: Asking, endpoint: Endpoint) -> list[Answer]:
    chat: list[dict[str, str]] = []
    answers = []
    temperature = asking.temperature_of(question)
    for turn, text in enumerate(question.turns):
        chat.append(_user(text))
        seed = int(hashlib.sha256(asking.seed_of(question, choice, turn).encode()).hexdigest()[:7], 16)
        reply = endpoint.ask(chat, asking.max_new_tokens, temperature=temperature, seed=seed)
        end = "length" if reply.choice.get("finish_reason") == "length" else "stop"
        answers.append(Answer(reply.text.strip(), end))
        chat.append({"role": "assistant", "content": answers[-1].text})
    return answers


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# The files


def _keep(journal: Journal, question: Question, choices: Sequence[Sequence[Answer]], outcome: Outcome) -> None:
    journal.add(question.id, [[answer.text for answer in turns] for turns in choices])
    outcome.answered += 1
    outcome.ends.update(answer.end for turns in choices for answer in turns)


def _finish(journal: Journal, questions: Questions, asking: Asking) -> None:
    if questions.benchmark == "MT-Bench":
        ordered = sorted(questions.questions, key=lambda one: by_id(one.id))
        rows = [_mt_bench_row(one, journal.records[one.id], asking, journal.began) for one in ordered]
        journal.finish("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows = [
            {**one.row, "output": journal.records[one.id][0][0], "generator": asking.name}
            for one in questions.questions
        ]
        journal.finish(json.dumps(rows, indent=2) + "\n")


def _mt_bench_row(
    question: Question, choices: Sequence[Sequence[str]], asking: Asking, began: float
) -> dict[str, Any]:
    said = json.dumps([asking.name, question.id, choices])
    return {
        "question_id": question.id,
        "answer_id": hashlib.sha256(said.encode()).hexdigest()[:22],
        "model_id": asking.name,
        "choices": [{"index": index, "turns": list(turns)} for index, turns in enumerate(choices)],
        "tstamp": began,
    }
