"""Judgments as tables: MT-Bench as the papers show it, AlpacaEval's win rates; several models side by side."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from varm_merge.errors import VarmError
from varm_merge.evaluation.alpaca_eval import win_rate
from varm_merge.evaluation.questions import read_questions, rows_of

__all__ = ["alpaca_eval", "is_alpaca_eval", "mt_bench", "tables"]

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""MT-Bench's, in the papers' order; others follow."""
TURNS = {1: "1st turn", 2: "2nd turn"}
AVERAGE = "average"
NAMES = {"stem": "STEM"}


def is_alpaca_eval(path: Path) -> bool:
    """Whether a file has annotations, and not judgments of MT-Bench.

    Raises:
        VarmError: It has neither.
    """
    row = rows_of(path)[0][1]
    if "preference" in row:
        return True
    if "score" in row:
        return False
    raise VarmError(
        f"`{path}` has neither judgments of MT-Bench (`score`) nor AlpacaEval's annotations (`preference`)"
    )


def mt_bench(judgments: Sequence[Path], questions: Path | None, baseline: str | None) -> dict[str, Any]:
    """The averages of every model that was judged.

    Args:
        judgments: Files as FastChat and ``evaluate judge mt-bench`` write them.
        questions: Tell the categories.
        baseline: A model to compare with.

    Returns:
        JSON: ``judge``, ``baseline``, ``models``: for each model ``scores`` by category, turn and on the
        whole (None where nothing was rated), ``improvement`` over the baseline in percent, ``judgments``,
        how many of them are ``unrated``, and how many rate ``outside`` 1 to 10.

    Raises:
        VarmError: The files have judgments of several judges, or none of the baseline.
    """
    rows = _rows(judgments)
    category = {one.id: one.category for one in read_questions(questions).questions} if questions else {}
    if unknown := sorted(
        {str(row["question_id"]) for row in rows if category and row["question_id"] not in category}
    ):
        raise VarmError(f"`{questions}` has no question {', '.join(unknown[:5])}, which was judged")
    order = sorted(set(category.values()), key=lambda one: (*_place(one), one))
    models: dict[str, Any] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        rated = [row for row in own if row["score"] != -1]
        groups: dict[str, list[float]] = {name: [] for name in (*order, *TURNS.values(), AVERAGE)}
        for row in rated:
            names = [category[row["question_id"]]] if category else []
            for name in (*names, TURNS.get(row["turn"], ""), AVERAGE):
                groups.setdefault(name, []).append(float(row["score"]))
        models[model] = {
            "scores": {name: fmean(scores) if scores else None for name, scores in groups.items()},
            "judgments": len(own),
            "unrated": len(own) - len(rated),
            "outside": sum(not 1 <= row["score"] <= 10 for row in rated),
        }
    if baseline is not None:
        _compare(models, baseline)
    return {"benchmark": "MT-Bench", "judge": rows[0]["judge"][0], "baseline": baseline, "models": models}


def _rows(judgments: Sequence[Path]) -> list[dict[str, Any]]:
    """The last judgment of each answer's turn."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in judgments:
        for where, row in rows_of(path):
            try:
                key = row["model"], row["question_id"], row["turn"], row["judge"][0]
                found[key] = {**row, "score": float(row["score"])}
                if not isfinite(found[key]["score"]):
                    raise ValueError(f"score {row['score']}")
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise VarmError(f"`{path}`, {where}: no judgment as FastChat writes it: {error!r}") from error
    judges = {judge for *_, judge in found}
    if len(judges) > 1:
        raise VarmError(f"these are judgments of several judges: {', '.join(sorted(judges))}; show one at a time")
    return list(found.values())


def _place(category: str) -> tuple[int]:
    return (CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES),)


def _compare(models: Mapping[str, Any], baseline: str) -> None:
    if baseline not in models:
        raise VarmError(f"no model `{baseline}` was judged; there are {', '.join(f'`{one}`' for one in models)}")
    base = models[baseline]["scores"]
    for name, model in models.items():
        if name == baseline:
            continue
        model["improvement"] = {
            group: 100 * (score - base[group]) / base[group] if score is not None and base.get(group) else None
            for group, score in model["scores"].items()
        }


def alpaca_eval(annotations: Iterable[Path]) -> dict[str, Any]:
    """The win rates of the models of files with annotations.

    Raises:
        VarmError: A file has none or a preference that is none, or two are of the same model.
    """
    models: dict[str, Any] = {}
    for path in annotations:
        rows = [row for _, row in rows_of(path)]
        try:
            keys = ("generator_2", "generator_1", "annotator")
            name, reference, judge = (str(rows[0][key]) for key in keys)
            found = {**win_rate(rows), "reference": reference, "judge": judge}
        except VarmError as error:
            raise VarmError(f"`{path}`, {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise VarmError(f"`{path}` has no annotations as alpaca_eval writes them: {error!r}") from error
        if name in models:
            raise VarmError(f"two files have annotations of `{name}`")
        models[name] = found
    return {"benchmark": "AlpacaEval", "models": models}


Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """What ``mt_bench`` or ``alpaca_eval`` has found, for a terminal."""
    models = found["models"]
    if found["benchmark"] == "MT-Bench":
        against = f", with the improvement over {found['baseline']}" if found["baseline"] else ""
        names = next(iter(models.values()))["scores"]
        rows = [
            [NAMES.get(name, name.capitalize()), *(_cell(of, name) for of in models.values())] for name in names
        ]
        yield f"MT-Bench, judged by {found['judge']}{against}", ["", *models], rows
    else:
        header = ["", "win rate, %", "± error", "wins", "losses", "draws", "unrated", "length"]
        rows = [
            [
                name,
                _number(of["win_rate"]),
                _number(of["standard_error"]),
                *(str(of[key]) for key in ("n_wins", "n_wins_base", "n_draws", "n_unrated", "avg_length")),
            ]
            for name, of in models.items()
        ]
        judge, reference = (" and ".join(_different(models, key)) for key in ("judge", "reference"))
        yield f"AlpacaEval 2, against {reference}, judged by {judge}", header, rows


def _different(models: Mapping[str, Any], key: str) -> list[str]:
    return list(dict.fromkeys(str(of[key]) for of in models.values()))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell(model: Mapping[str, Any], name: str) -> str:
    score = model["scores"].get(name)
    if score is None:
        return "–"
    change = model.get("improvement", {}).get(name)
    return _number(score) + (f" {change:+.2f}%" if change is not None else "")


def remarks(found: Mapping[str, Any]) -> Iterator[str]:
    """What one should know of the numbers."""
    models = found["models"]
    if found["benchmark"] == "AlpacaEval":
        for key, what in (
            ("judge", "judges"),
            ("reference", "reference outputs"),
            ("n_total", "numbers of pairs"),
        ):
            if len(some := _different(models, key)) > 1:
                yield f"the models have different {what}, and are no fair comparison: {', '.join(some)}"
        return
    for name, of in models.items():
        if of["unrated"]:
            yield f"{name}: {of['unrated']} of {of['judgments']} judgments have no rating and are in no average"
        if of["outside"]:
            yield f"{name}: {of['outside']} ratings are not from 1 to 10; they count, as with FastChat"
    if len({of["judgments"] for of in models.values()}) > 1:
        counts = ", ".join(f"{name} {of['judgments']}" for name, of in models.items())
        yield f"the models have different numbers of judgments, and are no fair comparison: {counts}"
