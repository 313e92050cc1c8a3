"""AlpacaEval 2: a judge says which of two outputs is better, and how sure it is.

The annotator is asked for one token, ``m`` or ``M``; the preference is the share that the second output's name has
in the probability of both. Which output is shown first is drawn as alpaca_eval draws it. The annotations have its
keys and order, so that it computes the length-controlled win rate from the file; that rate needs data of its own.
"""

import hashlib
import json
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from varm_merge.errors import VarmError
from varm_merge.evaluation.endpoint import Endpoint, Failed, Judged, Load, Reply, in_parallel
from varm_merge.evaluation.journal import Journal
from varm_merge.evaluation.questions import read_outputs, refuse
from varm_merge.version import __version__

__all__ = ["Pair", "annotate", "load", "pairs", "preference", "read_prompt", "win_rate"]

FORMAT = "varm-merge annotations"
FIRST, SECOND = "m", "M"
"""What the prompt calls the output that is shown first, and the other."""
SETTINGS = {"temperature": 1, "logprobs": True, "top_logprobs": 5}
MAX_TOKENS = 1
EQUAL = 1.5
"""The preference of two outputs that are the same: 1 is the reference's, 2 the model's."""
DRAW = 0
"""A draw in the files of alpaca_eval's other annotators; it counts as ``EQUAL``."""
PLACES = ("instruction", "output_1", "output_2")
MESSAGE = re.compile(r"<\|im_start\|>(\w+)[^\n]*\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """A row of the reference and the model's answer to it; ``number`` is that of the reference."""

    number: int
    reference: Mapping[str, Any]
    model: Mapping[str, Any]

    def swapped(self, seed: int) -> bool:
        """Whether the model's output is shown first: alpaca_eval's draw for this instruction."""
        draw = random.Random(f"is_switched_outputs{self.reference['instruction']}{seed}")
        return draw.choices([False, True], k=1)[0]


def read_prompt(path: Path) -> list[dict[str, str]]:
    """The messages of an annotator's prompt file, with places for instruction and outputs.

    Raises:
        VarmError: It is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VarmError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    messages = [{"role": role, "content": content.strip()} for role, content in MESSAGE.findall(text)]
    places = Counter(re.findall(r"{(\w+)}", text))
    problems = [
        f"`{{{place}}}` is there {places[place]} times, not once" for place in PLACES if places[place] != 1
    ]
    if not messages:
        problems.append("no message between <|im_start|> and <|im_end|>")
    refuse(path, problems)
    return messages


def pairs(outputs: Path, references: Path) -> list[Pair]:
    """The rows of the reference, each with the model's answer to the same instruction.

    Raises:
        VarmError: An answer is missing, or there are answers of several models.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    rows = read_outputs(outputs)
    for row in rows:
        found[row["instruction"], seen[row["instruction"]]] = row
        seen[row["instruction"]] += 1
    if len(names := {row["generator"] for row in rows}) > 1:
        raise VarmError(f"`{outputs}` has answers of several generators: {', '.join(sorted(names))}")
    problems, made, times = [], [], Counter[str]()
    for number, reference in enumerate(read_outputs(references)):
        instruction = reference["instruction"]
        row_or_none = found.get((instruction, times[instruction]))
        times[instruction] += 1
        if row_or_none is None:
            problems.append(f"no answer to row {number + 1} of `{references}`: {instruction[:60]!r}")
        else:
            made.append(Pair(number, reference, row_or_none))
    refuse(outputs, problems)
    return made


def messages(pair: Pair, prompt: Sequence[Mapping[str, str]], seed: int) -> list[dict[str, str]]:
    """The annotator's prompt of a pair."""
    outputs = [str(pair.reference["output"]), str(pair.model["output"])]
    if pair.swapped(seed):
        outputs.reverse()
    values = dict(zip(PLACES, (pair.reference["instruction"], *outputs), strict=True))
    return [
        {
            "role": message["role"],
            "content": re.sub(
                r"{(\w+)}", lambda place: str(values.get(place[1], place[0])), message["content"]
            ).strip(),
        }
        for message in prompt
    ]


def preference(choice: Mapping[str, Any]) -> float | None:
    """What an answer prefers, from 1 (the output shown first) to 2; None if it names neither."""
    try:
        told = choice["logprobs"]["content"][0]["top_logprobs"]
        logprobs = {one["token"]: float(one["logprob"]) for one in told}
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    if FIRST not in logprobs and SECOND not in logprobs:
        return None
    odds = logprobs.get(SECOND, -math.inf) - logprobs.get(FIRST, -math.inf)
    if math.isnan(odds):
        return None
    return 2 - 1 / (1 + math.exp(min(odds, 700.0)))


def unequal(pairs: Sequence[Pair]) -> list[Pair]:
    """Those that the annotator is asked about."""
    return [pair for pair in pairs if pair.reference["output"] != pair.model["output"]]


def load(pairs: Sequence[Pair], prompt: Sequence[Mapping[str, str]], seed: int) -> Load:
    """What they will ask of the annotator at most."""
    found = Load()
    for pair in unequal(pairs):
        found.add(messages(pair, prompt, seed), MAX_TOKENS)
    return found


def annotate(
    pairs: Sequence[Pair],
    prompt: Sequence[Mapping[str, str]],
    endpoint: Endpoint,
    output: Path,
    threads: int,
    seed: int = 0,
    quiet: bool = False,
) -> Judged:
    """Ask the annotator what is missing, and write ``output`` when all pairs have a preference or cannot have one.

    Raises:
        VarmError: The endpoint takes no request, or ``output`` is of something else.
    """
    with Journal(output, about(pairs, prompt, endpoint.model, seed)) as journal:
        if journal.finished:
            return Judged(len(unequal(pairs)), 0, _unrated(output), {})
        asked = [pair for pair in unequal(pairs) if pair.number not in journal.records]
        outcome = Judged(len(unequal(pairs)) - len(asked), 0, 0, {})
        done = in_parallel(
            lambda pair: endpoint.ask(messages(pair, prompt, seed), MAX_TOKENS, **SETTINGS), asked, threads
        )
        with tqdm(total=len(asked) + outcome.there, initial=outcome.there, unit="pair", disable=quiet) as bar:
            for pair, reply in done:
                if isinstance(reply, Failed):
                    outcome.failed[f"row {pair.number + 1}"] = str(reply)
                    continue
                journal.add(pair.number, _told(pair, reply, seed))
                outcome.asked += 1
                bar.update()
        if not outcome.failed:
            rows = [_annotation(pair, journal.records.get(pair.number), endpoint.model) for pair in pairs]
            journal.finish(json.dumps(rows, indent=2) + "\n")
            outcome.unrated = _unrated(output)
    return outcome


def about(pairs: Sequence[Pair], prompt: Any, judge: str, seed: int) -> dict[str, Any]:
    """What the annotations in a file are of."""
    shown = [[pair.reference["instruction"], pair.reference["output"], pair.model["output"]] for pair in pairs]
    return {
        "format": FORMAT,
        "judge": judge,
        "seed": seed,
        "prompt": _sha256(prompt),
        "outputs and references": _sha256(shown),
    }


def there(pairs: Sequence[Pair], prompt: Any, judge: str, seed: int, output: Path) -> set[int]:
    """The numbers of the pairs that ``output``, or what is there of it, has an annotation of.

    Raises:
        VarmError: It is of something else.
    """
    with Journal(output, about(pairs, prompt, judge, seed)) as journal:
        return {pair.number for pair in pairs if journal.finished or pair.number in journal.records}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _unrated(output: Path) -> int:
    return sum(row["preference"] is None for row in json.loads(output.read_text(encoding="utf-8")))


def _told(pair: Pair, reply: Reply, seed: int) -> dict[str, Any]:
    told = preference(reply.choice)
    if told is not None and pair.swapped(seed):
        told = 3 - told
    raw = {**reply.choice, "text": reply.text, "total_tokens": reply.total_tokens}
    date = datetime.now(timezone.utc).isoformat()
    return {"preference": told, "raw_completion": raw, "date": date, "time_per_example": reply.seconds}


def _annotation(pair: Pair, told: Mapping[str, Any] | None, annotator: str) -> dict[str, Any]:
    """A row with alpaca_eval's keys."""
    others = {
        key: value for key, value in {**pair.reference, **pair.model}.items() if key not in ("output", "generator")
    }
    return {
        **others,
        "output_1": pair.reference["output"],
        "generator_1": pair.reference["generator"],
        "output_2": pair.model["output"],
        "generator_2": pair.model["generator"],
        "annotator": annotator,
        "preference": told["preference"] if told else EQUAL,
        "preference_raw_completion": told["raw_completion"] if told else None,
        "preference_version": f"varm-merge=={__version__}",
        "preference_price_per_example": None,
        "preference_time_per_example": told["time_per_example"] if told else None,
        "preference_date": told["date"] if told else None,
    }


def _rated(number: int, value: Any) -> float | None:
    """A preference as it counts; None, and the NaN that pandas makes of it, is none."""
    if value is None or value != value:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == DRAW:
            return EQUAL
        if 1 <= value <= 2:
            return float(value)
    raise VarmError(f"row {number}: `preference` is {value!r}; it must be from 1 to 2, 0 (a draw), or null")


def win_rate(annotations: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """In percent, with its standard error; annotations without a preference are left out, and counted.

    Returns:
        ``win_rate``, ``standard_error``, ``discrete_win_rate``, ``n_wins``, ``n_wins_base``, ``n_draws``,
        ``n_total``, as alpaca_eval calls them; ``n_unrated``, and ``avg_length`` of the model's outputs. What
        cannot be computed is None.

    Raises:
        VarmError: A preference is none.
    """
    rated = [_rated(number, row["preference"]) for number, row in enumerate(annotations, 1)]
    shares = [one - 1 for one in rated if one is not None]
    wins, losses = sum(share > 0.5 for share in shares), sum(share < 0.5 for share in shares)
    draws = len(shares) - wins - losses
    spread = statistics.stdev(shares) if len(shares) > 1 else None
    return {
        "win_rate": 100 * statistics.fmean(shares) if shares else None,
        "standard_error": 100 * spread / math.sqrt(len(shares)) if spread is not None else None,
        "discrete_win_rate": 100 * (wins + draws / 2) / len(shares) if shares else None,
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": len(shares),
        "n_unrated": len(annotations) - len(shares),
        "avg_length": int(statistics.fmean(len(str(row["output_2"])) for row in annotations)),
    }
