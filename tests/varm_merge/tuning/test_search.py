"""Which values a search tries, and how they get into a recipe."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from varm_common.errors import UserError
from varm_merge.tuning.parameters import numbers, parameters, written
from varm_merge.tuning.search import Values, search

TARGETS = {"models": [{"model": "a/one"}, {"model": "a/two"}, {"model": "pivot"}], "base_model": "pivot"}


def recipe(method: str, **own: Any) -> dict[str, Any]:
    return {"merge_method": method, **TARGETS, **own}


def found(
    content: dict[str, Any], given: list[str], loss: Callable[[Values], float], evaluations: int
) -> tuple[Values, dict[Values, float]]:
    """The best values, and all that were tried."""
    free = [number for number in numbers(content, parameters(content, given)) if not number.fixed]
    tried = search(free, loss, evaluations)
    return min(tried, key=lambda values: tried[values]), tried


@pytest.mark.parametrize("best", [0.0, 0.31, 1.0, 1.27, 2.0])
def test_lambda_is_found_in_ten_evaluations(best: float) -> None:
    values, tried = found(recipe("varm"), [], lambda values: 0.2 + (values[0] - best) ** 2, 10)
    assert values[0] == pytest.approx(best, abs=0.03)
    assert next(iter(tried)) == (1.0,)  # the recipe's own comes first
    assert len(tried) <= 10
    assert all(value == float(f"{value:.4g}") for (value,) in tried)


def test_several_numbers_are_found_together() -> None:
    def loss(values: Values) -> float:
        scale, ratio = values
        return 0.3 + 0.1 * (scale - 1.4) ** 2 + 0.05 * (math.log2(ratio) + 1) ** 2

    (scale, ratio), tried = found(recipe("varm"), ["lambda", "weight:target"], loss, 40)
    assert scale == pytest.approx(1.4, abs=0.1)
    assert ratio == pytest.approx(0.5, rel=0.1)
    assert len(tried) <= 40


@pytest.mark.parametrize("high", [2, 6, 20])
def test_a_wide_range_hides_no_near_optimum(high: int) -> None:
    best = (1.0, 0.6, 0.8)

    def loss(values: Values) -> float:
        return 0.2 + sum((value - one) ** 2 for value, one in zip(values, best, strict=True))

    values, _ = found(recipe("varm"), [f"lambda:depth=0:{high}"], loss, 20)
    assert loss(values) - 0.2 < 0.1 * (loss((1.0, 1.0, 1.0)) - 0.2)


@pytest.mark.parametrize("start", [0.0, 0.001, 0.01, 1.99])
def test_a_start_at_the_end_of_a_range_is_left(start: float) -> None:
    content = recipe("varm", parameters={"lambda": [start, start, start]})

    def loss(values: Values) -> float:
        return 0.2 + sum((value - 0.9) ** 2 for value in values)

    values, _ = found(content, ["lambda:depth"], loss, 30)
    assert loss(values) - 0.2 < 0.15 * (loss((start,) * 3) - 0.2)


def test_a_search_repeats_itself() -> None:
    def loss(values: Values) -> float:
        return sum((value - 0.7) ** 2 for value in values)

    for given in (["lambda"], ["lambda:depth"]):
        assert list(found(recipe("ties"), given, loss, 15)[1]) == list(found(recipe("ties"), given, loss, 15)[1])


def test_values_are_written_where_mergekit_reads_them() -> None:
    content = recipe("varm", parameters={"granularity": "layer"})
    every = numbers(content, parameters(content, ["lambda:depth", "weight:target"]))
    assert [number.label for number in every if not number.fixed] == [
        "lambda, first layer",
        "lambda, middle",
        "lambda, last layer",
        "weight of two",
    ]
    result = written(content, dict(zip(every, [0.5, 1.0, 1.5, 1.0, 2.5], strict=True)))
    assert result["parameters"] == {"granularity": "layer", "lambda": [0.5, 1.0, 1.5]}
    assert [model.get("parameters") for model in result["models"]] == [{"weight": 1.0}, {"weight": 2.5}, None]
    assert content == recipe("varm", parameters={"granularity": "layer"})


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *[(method, "lambda") for method in ("varm", "task_arithmetic", "ties", "dare_linear", "della")],
        ("sce", "select_topk"),
        ("slerp", "t"),
        ("linear", "weight:target"),
    ],
)
def test_every_method_has_a_default(method: str, name: str) -> None:
    assert [str(parameter) for parameter in parameters(recipe(method), [])] == [name]


def test_only_ratios_of_weights_are_searched_where_a_scale_does_the_rest() -> None:
    def free(method: str, *given: str) -> int:
        content = recipe(method)
        return sum(not number.fixed for number in numbers(content, parameters(content, given)))

    assert free("task_arithmetic", "weight:target") == 2
    assert free("task_arithmetic", "lambda", "weight:target") == 2
    assert free("varm", "weight:target") == free("ties", "weight:target") == 1


def test_a_recipe_keeps_its_own_values() -> None:
    """The usual range is widened; a target that has no weight is not the one that keeps it."""
    weights = [{"model": "a/one", "parameters": {"weight": 0}}, {"model": "a/two", "parameters": {"weight": 20}}]
    content = recipe("varm", models=weights, parameters={"lambda": 2.5})
    scale, one, two = numbers(content, parameters(content, ["lambda", "weight:target"]))
    assert (scale.start, scale.parameter.low, scale.parameter.high) == (2.5, 0.0, 2.5)
    assert (one.start, one.fixed, two.start, two.fixed) == (0.0, False, 20.0, True)
    tried = search([scale, one], lambda values: values[0] + values[1], 6)
    assert next(iter(tried)) == (2.5, 0.0)
    with pytest.raises(UserError, match=r"value 2.5 of `lambda` lies outside the range .* 0 to 2"):
        numbers(content, parameters(content, ["lambda=0:2"]))


def test_every_model_of_linear_has_a_weight_the_pivot_too() -> None:
    content = recipe("linear", parameters={"normalize": True})
    every = numbers(content, parameters(content, []))
    assert [(number.label, number.fixed) for number in every] == [
        ("weight of one", True),
        ("weight of two", False),
        ("weight of pivot", False),
    ]
    alone = recipe("linear", models=[{"model": "pivot"}, {"model": "a/one"}])
    assert [number.fixed for number in numbers(alone, parameters(alone, []))] == [True, False]


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        (recipe("varm"), ["lamda"], "did you mean `lambda`?"),
        (recipe("varm"), ["granularity"], "no number `granularity`"),
        (recipe("varm"), ["lambda:target"], "is one for all targets"),
        (recipe("varm"), ["weight"], "search weight:target"),
        (recipe("varm"), ["lambda=2:1"], "from a lower to a higher"),
        (recipe("varm"), ["weight:target=-1:2"], "greater than or equal to 0"),
        (recipe("varm"), ["temperature"], "--parameter temperature=LOW:HIGH"),
        (recipe("varm"), ["lambda", "lambda:depth"], "twice"),
        (recipe("varm", parameters={"lambda": [1, 2]}), [], "filters or a gradient"),
        (recipe("ties", models=[{"model": "a", "parameters": {"density": 0.2}}]), ["density"], "density:target"),
        (
            {"merge_method": "varm", "base_model": "p", "slices": []},
            ["weight:target"],
            "needs a recipe with `models`",
        ),
        (recipe("model_stock"), [], "no number to search"),
    ],
)
def test_what_cannot_be_searched_is_refused(content: dict[str, Any], given: list[str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        numbers(content, parameters(content, given))
    assert message in str(refusal.value)
