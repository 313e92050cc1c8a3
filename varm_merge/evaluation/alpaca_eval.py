"""AlpacaEval 2: a judge says which of two outputs is better, and how sure it is.

The judge answers with one token, ``m`` or ``M``. The preference is the second output's share of both
probabilities. alpaca_eval's own rule decides which output is shown first. The annotations have its keys and order,
so it can compute the length-controlled win rate from them.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from varm_common.errors import UserError
from varm_common.files import fingerprint, read_text
from varm_merge.evaluation.collect import Judging
from varm_merge.evaluation.endpoint import Reply
from varm_merge.evaluation.journal import Journal
from varm_merge.evaluation.questions import checked, refuse
from varm_merge.version import __version__

__all__ = ["EQUAL", "Pair", "annotations", "pairs", "preference", "read_prompt"]

FORMAT = "varm-merge annotations"
FIRST, SECOND = "m", "M"
"""The prompt's names for the output shown first, and for the other."""
EQUAL = 1.5
"""The preference between two identical outputs: 1 is the reference's, 2 the model's."""
PLACES = ("instruction", "output_1", "output_2")
MESSAGE = re.compile(r"<\|im_start\|>(\w+)[^\n]*\n(.*?)<\|im_end\|>", re.DOTALL)
Messages = list[dict[str, str]]


class Output(BaseModel, strict=True):
    instruction: str
    output: str
    generator: str


@dataclass(frozen=True)
class Pair:
    """A row of the reference, the model's output for it, and the judge's prompt.

    ``number`` counts the reference's rows from 0; ``swapped`` says that the model's output is shown first.
    """

    number: int
    reference: Mapping[str, Any]
    model: Mapping[str, Any]
    swapped: bool
    messages: Messages

    @property
    def name(self) -> str:
        return f"row {self.number + 1}"


def read_prompt(path: Path) -> Messages:
    """Read the messages of a prompt file of alpaca_eval, with places for instruction and outputs.

    Raises:
        UserError: It is not such a file.
    """
    text = read_text(path)
    messages = [{"role": role, "content": content.strip()} for role, content in MESSAGE.findall(text)]
    counts = Counter(re.findall(r"{(\w+)}", text))
    problems = [f"`{{{place}}}` occurs {counts[place]} times, not once" for place in PLACES if counts[place] != 1]
    if not messages:
        problems.append("no message between <|im_start|> and <|im_end|>")
    refuse(path, problems)
    return messages


def pairs(outputs: Path, references: Path, prompt: Messages, seed: int) -> list[Pair]:
    """Pair each row of the reference with the model's output for the same instruction.

    Raises:
        UserError: An output is missing, or the outputs are of several models.
    """
    rows = checked(outputs, Output)
    if len(names := {row["generator"] for row in rows}) > 1:
        raise UserError(f"`{outputs}` has outputs of several generators: {', '.join(sorted(names))}")
    left: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        left.setdefault(row["instruction"], []).append(row)
    problems, result = [], []
    for number, reference in enumerate(checked(references, Output)):
        instruction = reference["instruction"]
        if not left.get(instruction):
            problems.append(f"no output for row {number + 1} of `{references}`: {instruction[:60]!r}")
            continue
        model = left[instruction].pop(0)
        swapped = random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True], k=1)[0]
        shown = [model["output"], reference["output"]] if swapped else [reference["output"], model["output"]]
        messages = [{**message, "content": _filled(message["content"], instruction, *shown)} for message in prompt]
        result.append(Pair(number, reference, model, swapped, messages))
    refuse(outputs, problems)
    return result


def _filled(template: str, *texts: str) -> str:
    """Put the texts into their places, whatever braces they contain."""
    values = dict(zip(PLACES, texts, strict=True))
    return re.sub(r"{(\w+)}", lambda place: values.get(place[1], place[0]), template).strip()


def preference(choice: Mapping[str, Any]) -> float | None:
    """Read a preference from 1 (the output shown first) to 2; None if the judge names neither."""
    try:
        tokens = choice["logprobs"]["content"][0]["top_logprobs"]
        logprobs = {token["token"]: float(token["logprob"]) for token in tokens}
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    odds = logprobs.get(SECOND, -math.inf) - logprobs.get(FIRST, -math.inf)
    return None if math.isnan(odds) else 2 - 1 / (1 + math.exp(min(odds, 700.0)))


@contextmanager
def annotations(pairs: Sequence[Pair], prompt: Messages, judge: str, output: Path, seed: int) -> Iterator[Judging]:
    """Open alpaca_eval's ``annotations.json``, which appears when every pair is judged.

    Identical outputs are not sent to the judge.

    Raises:
        UserError: The file is of other outputs, or was made with other settings.
    """
    texts = [[pair.reference["instruction"], pair.reference["output"], pair.model["output"]] for pair in pairs]
    about = {"format": FORMAT, "judge": judge, "seed": seed, "prompt": fingerprint(prompt)}
    about |= {"outputs and references": fingerprint(texts)}
    unequal = [pair for pair in pairs if pair.reference["output"] != pair.model["output"]]
    with Journal(output, about) as journal:

        def finish() -> None:
            if not journal.finished:
                rows = [_annotation(pair, judge, journal.records.get(pair.number, {})) for pair in pairs]
                journal.finish(json.dumps(rows, indent=2) + "\n")

        def unrated() -> int:
            rows = json.loads(output.read_text(encoding="utf-8")) if journal.finished else journal.records.values()
            return sum(row["preference"] is None for row in rows)

        requests = [] if journal.finished else [pair for pair in unequal if pair.number not in journal.records]
        yield Judging(
            requests=requests,
            already=len(unequal) - len(requests),
            max_tokens=1,
            settings={"temperature": 1, "logprobs": True, "top_logprobs": 5},
            add=lambda pair, reply: journal.keep(pair.number, _record(pair, reply)),
            finish=finish,
            unrated=unrated,
        )


def _record(pair: Pair, reply: Reply) -> dict[str, Any]:
    value = preference(reply.choice)
    return {
        "preference": 3 - value if value is not None and pair.swapped else value,
        "raw_completion": {**reply.choice, "text": reply.text, "total_tokens": reply.total_tokens},
        "date": datetime.now(timezone.utc).isoformat(),
        "time_per_example": reply.seconds,
    }


def _annotation(pair: Pair, judge: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``annotations.json``; the record of identical outputs is empty."""
    both = {**pair.reference, **pair.model}
    return {
        **{key: value for key, value in both.items() if key not in ("output", "generator")},
        "output_1": pair.reference["output"],
        "generator_1": pair.reference["generator"],
        "output_2": pair.model["output"],
        "generator_2": pair.model["generator"],
        "annotator": judge,
        "preference": record.get("preference", EQUAL),
        "preference_raw_completion": record.get("raw_completion"),
        "preference_version": f"varm-merge=={__version__}",
        "preference_price_per_example": None,
        "preference_time_per_example": record.get("time_per_example"),
        "preference_date": record.get("date"),
    }
