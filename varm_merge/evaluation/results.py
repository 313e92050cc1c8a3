"""Tables of judgments: MT-Bench's scores as in the papers, AlpacaEval's win rates, several models side by side."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel, field_validator

from varm_common.errors import UserError
from varm_merge.evaluation.alpaca_eval import EQUAL
from varm_merge.evaluation.mt_bench import NO_RATING, Judgment
from varm_merge.evaluation.questions import checked, read_questions, rows_of

__all__ = ["alpaca_eval", "is_alpaca_eval", "mt_bench", "remarks", "table", "win_rate"]

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""MT-Bench's categories in the papers' order; others follow."""
TURNS = {1: "1st turn", 2: "2nd turn"}
AVERAGE = "average"
DRAW = 0
"""A draw in the files of alpaca_eval's other annotators; it counts as ``EQUAL``."""


class Annotation(BaseModel, strict=True):
    generator_1: str
    generator_2: str
    output_2: str
    annotator: str
    preference: Any

    @field_validator("preference")
    @classmethod
    def is_preference(cls, value: Any) -> Any:
        if value is None or value != value:  # pandas makes NaN of null
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value == DRAW or 1 <= value <= 2):
            raise ValueError("it must be from 1 to 2, 0 (a draw), or null")
        return value


def is_alpaca_eval(path: Path) -> bool:
    """Whether a file has AlpacaEval's annotations, and not MT-Bench's judgments.

    Raises:
        UserError: It has neither.
    """
    row = rows_of(path)[0][1]
    if "preference" not in row and "score" not in row:
        kinds = "neither judgments of MT-Bench (`score`) nor AlpacaEval's annotations (`preference`)"
        raise UserError(f"`{path}` has {kinds}")
    return "preference" in row


def mt_bench(judgments: Sequence[Path], questions: Path | None, baseline: str | None) -> dict[str, Any]:
    """Average the scores of every judged model, by category (if there are questions), turn and overall.

    Returns:
        JSON: ``judge``, ``baseline`` and ``models``. Each model has ``scores`` (None where nothing was rated), the
        ``improvement`` over the baseline in percent, and the numbers of ``judgments``, of ``unrated`` ones, and of
        ratings ``outside`` 1 to 10.

    Raises:
        UserError: The files have judgments of several judges, or none of the baseline.
    """
    rows = [row for path in judgments for row in checked(path, Judgment)]
    # the last judgment of each turn counts
    latest = {(row["model"], row["question_id"], row["turn"], row["judge"][0]): row for row in rows}
    judges = sorted({judge for *_, judge in latest})
    if len(judges) > 1:
        raise UserError(f"the judgments come from several judges: {', '.join(judges)}; show one at a time")
    category = {item.id: item.category for item in read_questions(questions).questions} if questions else {}
    if unknown := sorted({str(id_) for _, id_, *_ in latest if category and id_ not in category}):
        raise UserError(f"`{questions}` has no question {', '.join(unknown[:5])}, which was judged")
    names = dict.fromkeys(name for name, *_ in latest)
    models = {name: _scores([row for row in latest.values() if row["model"] == name], category) for name in names}
    if baseline is not None and baseline not in models:
        raise UserError(f"no model `{baseline}` was judged; there are {', '.join(f'`{name}`' for name in models)}")
    for name, model in models.items():
        if baseline not in (None, name):
            base = models[baseline]["scores"]
            model["improvement"] = {
                group: 100 * (score - base[group]) / base[group] if score is not None and base[group] else None
                for group, score in model["scores"].items()
            }
    return {"benchmark": "MT-Bench", "judge": judges[0], "baseline": baseline, "models": models}


def _scores(rows: Sequence[Mapping[str, Any]], category: Mapping[Any, str]) -> dict[str, Any]:
    rated = [row for row in rows if row["score"] != NO_RATING]
    present = {*category.values()}
    categories = [name for name in CATEGORIES if name in present] + sorted(present.difference(CATEGORIES))
    groups: dict[str, list[float]] = {name: [] for name in (*categories, *TURNS.values(), AVERAGE)}
    for row in rated:
        for name in (category.get(row["question_id"]), TURNS.get(row["turn"]), AVERAGE):
            if name is not None:
                groups[name].append(float(row["score"]))
    return {
        "scores": {name: fmean(scores) if scores else None for name, scores in groups.items()},
        "judgments": len(rows),
        "unrated": len(rows) - len(rated),
        "outside": sum(not 1 <= row["score"] <= 10 for row in rated),
    }


def alpaca_eval(annotations: Sequence[Path]) -> dict[str, Any]:
    """Compute the win rate of each file of annotations.

    Raises:
        UserError: A file has no annotations or an invalid preference, or two files are of the same model.
    """
    models: dict[str, Any] = {}
    for path in annotations:
        rows = checked(path, Annotation)
        name = rows[0]["generator_2"]
        if name in models:
            raise UserError(f"two files have annotations of `{name}`")
        models[name] = {**win_rate(rows), "reference": rows[0]["generator_1"], "judge": rows[0]["annotator"]}
    return {"benchmark": "AlpacaEval", "models": models}


def win_rate(annotations: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Compute the win rate in percent and its standard error, under the names that alpaca_eval uses.

    Annotations without a preference are left out and counted as ``n_unrated``. What cannot be computed is None.
    """
    preferences = [EQUAL if row["preference"] == DRAW else row["preference"] for row in annotations]
    shares = [value - 1 for value in preferences if value is not None and value == value]
    wins, losses = sum(share > 0.5 for share in shares), sum(share < 0.5 for share in shares)
    draws = len(shares) - wins - losses
    return {
        "win_rate": 100 * fmean(shares) if shares else None,
        "standard_error": 100 * stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None,
        "discrete_win_rate": 100 * (wins + draws / 2) / len(shares) if shares else None,
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": len(shares),
        "n_unrated": len(annotations) - len(shares),
        "avg_length": int(fmean(len(row["output_2"]) for row in annotations)),
    }


def table(results: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows of a table of ``mt_bench``'s or ``alpaca_eval``'s results."""
    models = results["models"]
    if results["benchmark"] == "MT-Bench":
        against = f", with the improvement over {results['baseline']}" if results["baseline"] else ""
        groups = next(iter(models.values()))["scores"]
        titles = {group: group.capitalize().replace("Stem", "STEM") for group in groups}
        rows = [[titles[group], *(_cell(model, group) for model in models.values())] for group in groups]
        return f"MT-Bench, judged by {results['judge']}{against}", ["", *models], rows
    judge, reference = (" and ".join(_distinct(models, key)) for key in ("judge", "reference"))
    title = f"AlpacaEval 2, against {reference}, judged by {judge}"
    header = ["", "win rate, %", "± error", "wins", "losses", "draws", "unrated", "length"]
    counts = ("n_wins", "n_wins_base", "n_draws", "n_unrated", "avg_length")
    rows = [
        [name, _number(model["win_rate"]), _number(model["standard_error"]), *(str(model[key]) for key in counts)]
        for name, model in models.items()
    ]
    return title, header, rows


def _distinct(models: Mapping[str, Any], key: str) -> list[str]:
    return list(dict.fromkeys(str(model[key]) for model in models.values()))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell(model: Mapping[str, Any], group: str) -> str:
    change = model.get("improvement", {}).get(group)
    return _number(model["scores"][group]) + (f" {change:+.2f}%" if change is not None else "")


def remarks(results: Mapping[str, Any]) -> Iterator[str]:
    """Sentences that a reader of the numbers has to know."""
    models = results["models"]
    compared = {"judge": "judges", "reference": "reference outputs", "n_total": "numbers of pairs"}
    if results["benchmark"] == "MT-Bench":
        compared = {"judgments": "numbers of judgments"}
        for name, model in models.items():
            if model["unrated"]:
                yield f"{name}: {model['unrated']} of {model['judgments']} judgments are unrated and do not count"
            if model["outside"]:
                yield f"{name}: {model['outside']} ratings are not from 1 to 10; they count, as with FastChat"
    for key, what in compared.items():
        if len(_distinct(models, key)) > 1:
            values = ", ".join(f"{name} {model[key]}" for name, model in models.items())
            yield f"the comparison is not fair, because the models have different {what}: {values}"
