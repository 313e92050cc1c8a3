"""Search the numbers of a recipe on one part of held-out conversations, and report the result on the other.

The choosing part alone decides which values are tried and kept. The reporting part is scored once at the end, so
its figures are not too good by selection. Every score is stored, and a search that is repeated reads it.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.options import MergeOptions

from varm_common.errors import UserError
from varm_common.files import fingerprint, write_file, write_json
from varm_common.process_usage import CommandError, machine
from varm_common.standard_errors import standard_error
from varm_common.tables import short_names
from varm_common.versions import versions
from varm_merge.comparison.cache import Steps
from varm_merge.comparison.inputs import model_folder, model_state, states
from varm_merge.comparison.recipes import Entry, family
from varm_merge.comparison.scores import HeldOut, Scorers, differences
from varm_merge.merging.weight_log import recipe_fingerprint
from varm_merge.recipes import recipe_file
from varm_merge.recipes.check import check
from varm_merge.recipes.problems import Looked, Problem, refuse
from varm_merge.tuning.parameters import DEFAULTS, Number, numbers, parameters, written
from varm_merge.tuning.scorer import Conversations, Scorer
from varm_merge.tuning.search import Values, search

__all__ = ["FORMAT", "VERSION", "Tuning", "tune"]

FORMAT, VERSION = "varm-merge tuning", 1
LEAST, FEW = 4, 20
"""Conversations that are needed, and those below which the standard errors of a part are uncertain."""
EVALUATIONS = 12
"""Evaluations for each number that is searched, by default."""
Rows = dict[str, Conversations]
"""The scores of each model, by its name in the report."""
TUNED, RECIPE = "tuned", "recipe"
"""Names of the tuned recipe, and of the one that was given."""


@dataclass(frozen=True)
class Tuning:
    """The settings of a search: the options of ``varm-merge tune``."""

    recipe: Path
    out: Path
    held_out: HeldOut
    base: str | None = None
    parameters: tuple[str, ...] = ()
    evaluations: int | None = None
    report_share: float = 0.5
    seed: int = 0
    device: str | None = None
    quiet: bool = False


def tune(tuning: Tuning, options: MergeOptions, command: str) -> dict[str, Any]:
    """Search, write ``recipe.yaml`` and ``tuned.json`` into the folder ``out``, and return the latter.

    Raises:
        UserError: The recipe, the data or a model cannot be used.
    """
    return _Search(tuning, options, command).run()


class _Search:
    def __init__(self, tuning: Tuning, options: MergeOptions, command: str) -> None:
        self.tuning, self.command = tuning, command
        own = {"quiet": True, "random_seed": tuning.seed, "write_model_card": False}
        self.options = options.model_copy(update={**own, "device": tuning.device or options.device})
        self.text = recipe_file.read(tuning.recipe)
        entry = Entry(tuning.recipe.stem, tuning.recipe, self.text)
        if not entry.content.get("merge_method"):
            refuse(check(self.text, every=True, models=False), tuning.recipe, "cannot be tuned")
        self.content = entry.content
        refuse(self._problems(), tuning.recipe, "cannot be tuned")
        self.numbers = numbers(self.content, parameters(self.content, tuning.parameters))
        self.free = [number for number in self.numbers if not number.fixed]
        self.failed: dict[Values, str] = {}
        if not self.free:
            raise UserError(
                "there is one target, and only the ratio of the targets' weights matters: search lambda"
            )
        self.evaluations = tuning.evaluations or EVALUATIONS * len(self.free)
        self.family = family([entry], tuning.base)
        self.cache_dir = options.transformers_cache
        self.inputs = states(entry, self.cache_dir)
        self.steps = Steps(tuning.out / "steps")
        self.log = tuning.out / "log.txt"

    def _problems(self) -> list[Problem]:
        """What is wrong with the recipe's structure. Missing parameters may be those that are searched."""
        problems = check(self.text, every=True, models=False)
        searched = {name.partition(":")[0].partition("=")[0] for name in self.tuning.parameters or DEFAULTS}
        return [problem for problem in problems if not any(f"`{name}`" in problem.message for name in searched)]

    def run(self) -> dict[str, Any]:
        start = self._recipe(tuple(number.start for number in self.free))
        text = yaml.safe_dump(start, sort_keys=False, allow_unicode=True)
        with ExitStack() as stack:
            if self.options.lora_merge_cache is None:
                cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="varm-merge-"))
                self.options = self.options.model_copy(update={"lora_merge_cache": cache})
            problems = check(text, every=True, options=self.options, looked=Looked())
            refuse(problems, self.tuning.recipe, "cannot be tuned")
            try:
                scorer = stack.enter_context(self._scorer())
                choosing, reporting = self._parts(scorer.conversations)
                tried = self._choose(scorer, choosing)
                best = min(tried, key=lambda values: tried[values])
                rows = self._rows(scorer, reporting, start, best)
            except CommandError as error:
                raise UserError(f"{error} ({self.log})") from error
            scored = [values for values in tried if values not in self.failed]
            chosen = {values: self._merge(scorer, self._recipe(values), "", choosing) for values in scored}
        sizes = {"choosing": len(choosing), "reporting": len(reporting)}
        return self._report(chosen, best, rows, sizes)

    # Parts

    def _scorer(self) -> Scorer:
        pivot = model_folder(self.family.pivot, self.cache_dir)
        scorers = Scorers(
            self.tuning.out / "work", self.tuning.device, self.options.trust_remote_code, with_tasks=False
        )
        self._print("preparing the held-out text")
        dialogues = scorers.prepare(self.tuning.held_out, pivot, self._text_inputs(), self.log)
        return Scorer(dialogues, self.options, self.tuning.device, self.log)

    def _text_inputs(self) -> dict[str, Any]:
        return {"pivot": model_state(self.family.pivot, self.cache_dir), **self.tuning.held_out.inputs()}

    def _parts(self, conversations: Sequence[str]) -> tuple[list[str], list[str]]:
        """The conversations that choose and those that report, by a hash of their names."""
        if len(conversations) < LEAST:
            raise UserError(
                f"--held-out has {len(conversations)} conversations; at least {LEAST} are needed, of which some "
                "choose the values and others report the result"
            )

        def draw(name: str) -> str:
            return hashlib.sha256(f"{self.tuning.seed}/{name}".encode()).hexdigest()

        number = round(len(conversations) * self.tuning.report_share)
        number = min(max(number, LEAST // 2), len(conversations) - LEAST // 2)
        shuffled = sorted(conversations, key=draw)
        return shuffled[number:], shuffled[:number]

    # Scores

    def _values(self, values: Values) -> dict[Number, float]:
        return {number: number.start for number in self.numbers} | dict(zip(self.free, values, strict=True))

    def _recipe(self, values: Values) -> dict[str, Any]:
        return written(self.content, self._values(values))

    def _choose(self, scorer: Scorer, choosing: Sequence[str]) -> dict[Values, float]:
        """The loss of every set of values that was tried, on the choosing part.

        The recipe's own values come first, and have to work. Others may fail: their loss is infinite.
        """
        own = tuple(number.start for number in self.free)

        def loss_of(values: Values) -> float:
            shown = ", ".join(f"{number.label} {value:g}" for number, value in zip(self.free, values, strict=True))
            try:
                scored = self._merge(scorer, self._recipe(values), shown, choosing)
            except UserError as error:
                if values == own:
                    raise
                self._print(f"{shown}: {error.message}")
                self.failed[values] = f"{shown}: {error.message}"
                return math.inf
            loss = _nats_per_byte(scored)
            self._print(f"{shown}: {loss:.5f} nats per byte")
            return loss

        return search(self.free, loss_of, self.evaluations)

    def _merge(
        self, scorer: Scorer, recipe: Mapping[str, Any], name: str, conversations: Sequence[str]
    ) -> Conversations:
        own = {"recipe": recipe_fingerprint(recipe), "inputs": self.inputs, "seed": self.tuning.seed}
        return self._scored(self._about(conversations, **own), partial(scorer.merge, recipe, name, conversations))

    def _about(self, conversations: Sequence[str], **model: Any) -> dict[str, Any]:
        """Everything that a score depends on."""
        part = {"conversations": fingerprint(sorted(conversations)), "text": self._text_inputs()}
        return {**model, **part, "device": self.tuning.device, "versions": versions()}

    def _scored(self, about: Mapping[str, Any], compute: Callable[[], Conversations]) -> Conversations:
        name = fingerprint(about)[:16]
        if (stored := self.steps.load("scores", name, about)) is None:
            stored = {"conversations": compute()}
            self.steps.save("scores", name, about, stored)
        return stored["conversations"]  # type: ignore[no-any-return]

    def _rows(self, scorer: Scorer, reporting: Sequence[str], start: Mapping[str, Any], best: Values) -> Rows:
        """The scores of pivot, targets and both recipes on the reporting part."""
        self._print("scoring the reporting part")
        rows: Rows = {}
        names = short_names(self.family.models, [RECIPE, TUNED])
        for model, name in zip(self.family.models, names, strict=True):
            try:
                folder = model_folder(model, self.cache_dir)
            except UserError as error:  # an adapter is merged, but not scored by itself
                self._print(str(error))
                continue
            about = self._about(reporting, model=model_state(model, self.cache_dir))
            rows[name] = self._scored(about, partial(scorer.model, folder, name, reporting))
        rows[RECIPE] = self._merge(scorer, start, RECIPE, reporting)
        rows[TUNED] = self._merge(scorer, self._recipe(best), TUNED, reporting)
        return rows

    # The report

    def _report(
        self, tried: Mapping[Values, Conversations], best: Values, rows: Rows, sizes: Mapping[str, int]
    ) -> dict[str, Any]:
        recipe = self._recipe(best)
        report: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "command": self.command,
            "machine": machine(),
            "versions": versions(),
            "recipe": {"path": str(self.tuning.recipe), "sha256": recipe_fingerprint(self.content)},
            "numbers": [_described(number, value) for number, value in self._values(best).items()],
            "conversations": sizes,
            "evaluations": [
                {"values": list(values), **_score(scored), "minus_best": _minus(scored, tried[best])}
                for values, scored in tried.items()
            ],
            "models": [
                {"name": name, **_score(scored), "tuned_minus": _minus(rows[TUNED], scored)}
                for name, scored in rows.items()
            ],
            "tuned": recipe,
        }
        report["remarks"] = list(self._remarks(report))
        tuned = ", ".join(f"{number['name']} {number['found']:g}" for number in report["numbers"])
        head = f"# {self.tuning.recipe.name}, tuned by varm-merge: {tuned}.\n"
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        write_file(self.tuning.out / "recipe.yaml", head + text)
        write_json(self.tuning.out / "tuned.json", report)
        return report

    def _remarks(self, report: Mapping[str, Any]) -> Sequence[str]:
        remarks = [f"a value that cannot be used; {reason}" for reason in self.failed.values()]
        for number, row in zip(self.numbers, report["numbers"], strict=True):
            low, high = row["range"]
            if not number.fixed and min(row["found"] - low, high - row["found"]) < 0.02 * (high - low):
                remarks.append(
                    f"the best {number.label} lies at the edge of its range {low:g} to {high:g}; "
                    f"--parameter {number.parameter}=LOW:HIGH gives a wider one"
                )
        if len(report["evaluations"]) + len(self.failed) >= self.evaluations:
            remarks.append(f"the search used all {self.evaluations} evaluations; --evaluations allows more")
        if min(report["conversations"].values()) < FEW:
            remarks.append(f"a part has fewer than {FEW} conversations, so the standard errors are uncertain")
        return remarks

    def _print(self, message: str) -> None:
        if not self.tuning.quiet:
            click.echo(message, err=True)


def _described(number: Number, value: float) -> dict[str, Any]:
    limits, searched = [number.parameter.low, number.parameter.high], not number.fixed
    return {"name": number.label, "range": limits, "searched": searched, "start": number.start, "found": value}


def _nats_per_byte(scored: Conversations) -> float:
    if not (size := sum(sums["bytes"] for sums in scored.values())):
        raise UserError("there is nothing to score: the conversations of a part have no byte of an answer")
    return float(sum(sums["nats"] for sums in scored.values()) / size)


def _score(scored: Conversations) -> dict[str, Any]:
    columns = [[sums[key] for sums in scored.values()] for key in ("nats", "bytes")]
    return {"nats_per_byte": _nats_per_byte(scored), "error": standard_error((columns[0], columns[1]))}


def _minus(scored: Conversations, other: Conversations) -> list[float | None]:
    """The difference in nats per byte, and its standard error over conversations."""
    return list(differences({"conversations": scored}, {"conversations": other}, "all")["nats_per_byte"])
