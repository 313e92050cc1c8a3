"""MT-Bench's single-answer grading: a judge rates each turn of each answer from 1 to 10.

The judgments are those that FastChat writes, line by line, so that its ``show_result`` reads them. The judge's
prompts are FastChat's, from its file. A judgment without a rating counts as -1, which all averages leave out.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from varm_merge.errors import VarmError
from varm_merge.evaluation.endpoint import Endpoint, Failed, Judged, Load, Reply, in_parallel
from varm_merge.evaluation.journal import Lines
from varm_merge.evaluation.questions import Question, Questions, read_answers, refuse, rows_of

__all__ = ["MAX_TOKENS", "Game", "games", "judge", "rating"]

MAX_TOKENS = 2048
"""Of a judgment, as FastChat asks for."""
WITH_REFERENCE = frozenset({"math", "reasoning", "coding", "arena-hard-200"})
"""Categories whose judge is shown an answer that is right."""
PROMPTS = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
"""FastChat's names of its prompts, by turn and whether there is a reference."""
NO_RATING = -1
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Game:
    """One request to the judge: a model's answer to a question, at a turn."""

    model: str
    question: Question
    turn: int
    prompt: str
    system: str
    text: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.text}]


def rating(judgment: str) -> float:
    """The rating in a judgment as FastChat reads it: ``[[7]]``, else ``[7]``, whatever the number; -1 for none."""
    for pattern in RATINGS:
        if found := pattern.search(judgment):
            value = float(found[1])
            return int(value) if value.is_integer() else value
    return NO_RATING


def games(questions: Questions, answers: Sequence[Path], prompts: Path, references: Path | None) -> list[Game]:
    """All that is to be asked of the judge, a model after the other.

    Args:
        questions: MT-Bench's.
        answers: A file for each model, named after it.
        prompts: FastChat's ``judge_prompts.jsonl``.
        references: Right answers, in the format of answers; needed if there are questions of math, reasoning or
            coding.

    Raises:
        VarmError: All that is missing in the files.
    """
    names = [path.stem for path in answers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise VarmError(
            f"several files of answers have the name {', '.join(twice)}, by which models are told apart"
        )
    if questions.benchmark != "MT-Bench":
        raise VarmError("these are AlpacaEval's questions; judge their answers by `evaluate judge alpaca-eval`")
    templates = _templates(prompts)
    with_reference = [one for one in questions.questions if one.category in WITH_REFERENCE]
    right: Mapping[int | str, Sequence[str]] = {}
    if with_reference:
        if references is None:
            raise VarmError(
                f"{len(with_reference)} questions are of math, reasoning or coding, whose judge is shown a right "
                "answer: give the reference answers by --references FILE"
            )
        right = read_answers(references)
        _complete(references, right, with_reference)
    found = []
    for path in answers:
        said = read_answers(path)
        _complete(path, said, questions.questions)
        for question in questions.questions:
            for turn in (1, 2)[: 2 if len(question.turns) == 2 else 1]:
                shown = right.get(question.id, ()) if question.category in WITH_REFERENCE else ()
                template = templates[PROMPTS[turn, bool(shown)]]
                text = _filled(prompts, template, question, turn, said[question.id], shown)
                found.append(Game(path.stem, question, turn, template["name"], template["system_prompt"], text))
    return found


def _complete(path: Path, said: Mapping[int | str, Sequence[str]], questions: Sequence[Question]) -> None:
    problems = []
    for question in questions:
        if question.id not in said:
            problems.append(f"no answer to question {question.id}")
        elif len(said[question.id]) < len(question.turns[:2]):
            problems.append(f"question {question.id} has {len(question.turns)} turns, its answer fewer")
    refuse(path, problems)


def _templates(path: Path) -> dict[str, dict[str, Any]]:
    found = {row.get("name"): row for _, row in rows_of(path)}
    problems = []
    for name in PROMPTS.values():
        row = found.get(name)
        if row is None:
            problems.append(f"no prompt `{name}`; there are {', '.join(f'`{one}`' for one in found)}")
            continue
        if row.get("output_format") != "[[rating]]":
            problems.append(f"`{name}` has the output_format {row.get('output_format')!r}, not '[[rating]]'")
        problems += [
            f"`{name}` has no `{key}`"
            for key in ("system_prompt", "prompt_template")
            if not isinstance(row.get(key), str)
        ]
    refuse(path, problems)
    return {str(name): row for name, row in found.items()}


def _filled(
    path: Path,
    template: Mapping[str, Any],
    question: Question,
    turn: int,
    said: Sequence[str],
    shown: Sequence[str],
) -> str:
    if turn == 1:
        values = {"question": question.turns[0], "answer": said[0]}
    else:
        values = {
            "question_1": question.turns[0],
            "question_2": question.turns[1],
            "answer_1": said[0],
            "answer_2": said[1],
        }
    values |= {f"ref_answer_{number}": text for number, text in enumerate(shown[:turn], 1)}
    try:
        return str(template["prompt_template"]).format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise VarmError(
            f"`{path}`: the prompt `{template['name']}` has a place that nothing fills: {error}"
        ) from error


def missing(games: Sequence[Game], judge: str, output: Path, rows: Sequence[Any]) -> list[Game]:
    """The games that ``output`` has no judgment of; ``rows`` are what it has.

    Raises:
        VarmError: It has judgments of other answers, or by other prompts.
    """
    there = _there(output, rows)
    other: dict[str, int] = {}
    for game in games:
        text = there.get(_key(game, judge))
        if text is not None and text != game.text:
            other[game.model] = other.get(game.model, 0) + 1
    if other:
        told = ", ".join(f"{count} of `{model}`" for model, count in other.items())
        raise VarmError(
            f"`{output}` has judgments of other answers, or by other prompts: {told}. Give another --output, or "
            "remove those lines."
        )
    return [game for game in games if _key(game, judge) not in there]


def _there(output: Path, rows: Sequence[Any]) -> dict[Key, str]:
    problems, found = [], {}
    for number, row in enumerate(rows, 1):
        try:
            found[_key_of(row)] = str(row["user_prompt"])
        except (KeyError, TypeError) as error:
            problems.append(f"judgment {number} is none as FastChat writes it: {error!r}")
    refuse(output, problems)
    return found


def _key_of(row: Mapping[str, Any]) -> Key:
    return row["model"], row["question_id"], row["turn"], tuple(row["judge"])


def _key(game: Game, judge: str) -> Key:
    return game.model, game.question.id, game.turn, (judge, game.prompt)


def load(games: Sequence[Game]) -> Load:
    """What they will ask of the judge at most."""
    found = Load()
    for game in games:
        found.add(game.messages, MAX_TOKENS)
    return found


def judge(games: Sequence[Game], endpoint: Endpoint, output: Path, threads: int, quiet: bool = False) -> Judged:
    """Ask the judge what is missing in ``output``, and append it there.

    Raises:
        VarmError: The endpoint takes no request, or ``output`` cannot be written.
    """
    lines = Lines(output)
    try:
        asked = missing(games, endpoint.model, output, lines.rows)
        lines.mend()
        own = {_key(game, endpoint.model) for game in games}
        unrated = sum(row["score"] == NO_RATING for row in lines.rows if _key_of(row) in own)
        outcome = Judged(len(games) - len(asked), 0, unrated, {})
        with tqdm(total=len(games), initial=outcome.there, unit="judgment", disable=quiet) as bar:
            for game, reply in in_parallel(
                lambda game: endpoint.ask(game.messages, MAX_TOKENS, temperature=0), asked, threads
            ):
                if isinstance(reply, Failed):
                    outcome.failed[f"{game.model}, question {game.question.id}, turn {game.turn}"] = str(reply)
                    continue
                row = _row(game, endpoint.model, reply)
                lines.add(row)
                outcome.asked += 1
                outcome.unrated += row["score"] == NO_RATING
                bar.update()
    finally:
        lines.close()
    return outcome


def _row(game: Game, judge: str, reply: Reply) -> dict[str, Any]:
    return {
        "question_id": game.question.id,
        "model": game.model,
        "judge": [judge, game.prompt],
        "user_prompt": game.text,
        "judgment": reply.text,
        "score": rating(reply.text),
        "turn": game.turn,
        "tstamp": time.time(),
    }
