"""Fused distributions: worked by hand, and against a dense float64 oracle."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_trainer.representations.store import Representation
from fusion_trainer.training.fusion import Fused, Rule, cross_entropies, fuse

property_test = settings(max_examples=150, deadline=None, derandomize=True, database=None)
VOCABULARY = 24
FLOAT32 = {"rtol": 2e-6, "atol": 2e-7}
NOTHING: dict[int, float] = {}
UNREAD = math.nan


def a_row(
    *positions: Mapping[int, float],
    golds: Sequence[float] | None = None,
    k: int = 3,
    gold_bytes: Sequence[int] | None = None,
    ce_per_token: float | None = None,
    ce_per_byte: float | None = None,
    pivot_ce_per_token: float | None = None,
    pivot_ce_per_byte: float | None = None,
) -> Representation:
    """A row from {id: probability} for each position; what they leave is the tail, other places are empty."""
    ids, logprobs = np.zeros((len(positions), k), np.uint16), np.full((len(positions), k), -np.inf, np.float16)
    for place, position in enumerate(positions):
        ids[place, : len(position)] = list(position)
        logprobs[place, : len(position)] = np.log(list(position.values()))
    tail = np.array([1 - sum(position.values()) for position in positions], np.float16)
    read = [0.0] * len(positions) if golds is None else golds
    return Representation(
        ids,
        logprobs,
        tail,
        np.array(read, np.float16),
        "chat-0",
        0,
        gold_bytes=None if gold_bytes is None else np.array(gold_bytes, np.uint16),
        ce_per_token=ce_per_token,
        ce_per_byte=ce_per_byte,
        pivot_ce_per_token=pivot_ce_per_token,
        pivot_ce_per_byte=pivot_ce_per_byte,
    )


def dense(fused: Fused, vocabulary: int = VOCABULARY) -> np.ndarray:
    """[positions, vocabulary]; probability that one id has in two entries fails the test."""
    found = np.zeros((len(fused.ids), vocabulary))
    for row, ids, shares in zip(found, fused.ids.tolist(), fused.probabilities.tolist(), strict=True):
        heard = [token for token, share in zip(ids, shares, strict=True) if share]
        assert len(set(heard)) == len(heard)
        for token, share in zip(ids, shares, strict=True):
            row[token] += share
    return found


def as_dicts(fused: Fused) -> list[dict[int, float]]:
    """What each position learns, to three places."""
    return [{int(t): round(float(row[t]), 3) for t in np.flatnonzero(row)} for row in dense(fused)]


# Cross-entropies

PIVOT = a_row({1: 0.75}, {2: 0.5}, {3: 1.0}, golds=[-0.5, -1.0, -3.0])
"""Its cross-entropy is 1.5 nats per token of the whole row, 0.75 over the first two."""
PIVOT_BYTES = np.array([1, 4, 2], np.int32)
SOURCE = a_row(
    *({10: 1.0}, {11: 1.0}, {12: 1.0}),
    golds=[-0.75, -0.5, -2.0],
    gold_bytes=[1, 1, 2],
    ce_per_token=0.625,
    ce_per_byte=0.35,
    pivot_ce_per_token=0.75,
    pivot_ce_per_byte=0.3,
)
"""Over the bytes that both predict, those of the first two tokens; the rest is in neither cross-entropy."""

COMPARED = {  # of the first two tokens the pivot has 1.5 nats over 5 bytes
    ("conversation", "token"): ([0.75] * 3, [0.625] * 3, "sss"),
    ("conversation", "byte"): ([0.3] * 3, [0.35] * 3, "ppp"),
    ("token", "token"): ([0.5, 1.0, 3.0], [0.75, 0.5, 2.0], "pss"),
    ("token", "byte"): ([0.5, 0.25, 1.5], [0.75, 0.5, 1.0], "pps"),
}


@pytest.mark.parametrize(("compare", "unit"), COMPARED)
def test_min_ce_takes_the_lower_cross_entropy_worked_by_hand(compare: Any, unit: Any) -> None:
    of_pivot, of_source, winners = COMPARED[compare, unit]
    rule = Rule(compare=compare, unit=unit)
    entropies_MP = cross_entropies([PIVOT, SOURCE], rule, 7, PIVOT_BYTES)
    np.testing.assert_allclose(entropies_MP, [of_pivot, of_source], rtol=1e-12)
    fused = fuse([PIVOT, SOURCE], entropies_MP, rule)
    pivots, sources = [{1: 1.0}, {2: 1.0}, {3: 1.0}], [{10: 1.0}, {11: 1.0}, {12: 1.0}]
    expected = [{"p": pivots, "s": sources}[winner][place] for place, winner in enumerate(winners)]
    assert as_dicts(fused) == expected
    assert fused.shares.tolist() == [[float(winner == "p"), float(winner == "s")] for winner in winners]
    lowest = np.minimum(of_pivot, of_source)
    np.testing.assert_allclose(fused.confidence, np.exp(-lowest), rtol=1e-6)


def test_avg_ce_weighs_by_the_softmax_of_the_likelihoods_worked_by_hand() -> None:
    """Likelihoods 1/2 and 1: weights e^0.5 and e^1 over their sum, 0.3775 and 0.6225."""
    one, other = a_row({1: 0.5, 2: 0.5}), a_row({2: 0.5, 3: 0.5})
    fused = fuse([one, other], np.array([[math.log(2)], [0.0]]), Rule("avg_ce"))
    assert as_dicts(fused) == [{1: 0.189, 2: 0.5, 3: 0.311}]
    np.testing.assert_allclose(fused.shares, [[0.3775407, 0.6224593]], rtol=1e-6)
    np.testing.assert_allclose(fused.confidence, [0.75], rtol=1e-6)


def test_avg_ce_of_three_models_compared_by_token_worked_by_hand() -> None:
    """Likelihoods 1, 1/2, 1/4 at the first position, all 1 at the second."""
    rows = [a_row({token: 1.0}, {7: 0.5, token: 0.5}) for token in (1, 2, 3)]
    entropies_MP = np.array([[0.0, 0.0], [math.log(2), 0.0], [math.log(4), 0.0]])
    fused = fuse(rows, entropies_MP, Rule("avg_ce", "token"))
    weights = np.exp([1, 0.5, 0.25]) / np.exp([1, 0.5, 0.25]).sum()
    np.testing.assert_allclose(dense(fused)[0, 1:4], weights, rtol=1e-6)
    assert as_dicts(fused)[1] == {1: 0.167, 2: 0.167, 3: 0.167, 7: 0.5}
    np.testing.assert_allclose(fused.confidence, [1.75 / 3, 1.0], rtol=1e-6)


def test_the_pivots_mean_is_over_the_positions_it_has_read() -> None:
    """Its store may end before the block does; ``size`` is then that of the part."""
    rule = Rule(unit="byte")
    np.testing.assert_allclose(cross_entropies([PIVOT], rule, 9, PIVOT_BYTES), [[0.5, 0.5, 0.5]])
    empty = a_row()
    for compare in ("conversation", "token"):
        unread = a_row(ce_per_token=UNREAD, ce_per_byte=UNREAD)
        found = cross_entropies([empty, unread], Rule(compare=compare), 0, PIVOT_BYTES[:0])
        assert found.shape == (2, 0)


def test_sources_that_have_other_bytes_in_common_with_the_pivot_lie_as_far_from_it_as_they_do_there() -> None:
    """The pivot has 0.4 and 0.8 nats per byte there: each source differs from their mean by its own difference."""
    first = replace(SOURCE, ce_per_byte=0.5, pivot_ce_per_byte=0.4)
    second = replace(SOURCE, ce_per_byte=0.7, pivot_ce_per_byte=0.8)
    found = cross_entropies([PIVOT, first, NOT_COMPARED, second], Rule(unit="byte"), 7, PIVOT_BYTES)
    np.testing.assert_allclose(found, np.repeat([[0.6], [0.7], [np.inf], [0.5]], 3, 1), rtol=1e-12)
    fused = fuse([PIVOT, first, second], found[[0, 1, 3]], Rule())
    assert fused.shares.tolist() == [[0.0, 0.0, 1.0]] * 3


def test_a_gold_token_of_no_bytes_counts_as_one_byte() -> None:
    rule = Rule(compare="token", unit="byte")
    found = cross_entropies([PIVOT], rule, 7, np.array([0, 4, 2], np.int32))
    assert found.tolist() == [[0.5, 0.25, 1.5]]


# Ties, sources that have read nothing, positions that say nothing


@pytest.mark.parametrize("compare", ["conversation", "token"])
def test_a_tie_goes_to_the_pivot(compare: Any) -> None:
    equal = replace(SOURCE, gold_logprob=PIVOT.gold_logprob, gold_bytes=PIVOT_BYTES, ce_per_byte=0.3)
    rule = Rule(compare=compare)
    fused = fuse([PIVOT, equal], cross_entropies([PIVOT, equal], rule, 7, PIVOT_BYTES), rule)
    assert as_dicts(fused) == [{1: 1.0}, {2: 1.0}, {3: 1.0}]
    assert fused.shares.tolist() == [[1.0, 0.0]] * 3


def test_of_equal_sources_the_first_wins() -> None:
    rows = [a_row({token: 1.0}) for token in (1, 2, 3)]
    assert as_dicts(fuse(rows, np.array([[2.0], [1.0], [1.0]]), Rule())) == [{2: 1.0}]


NOT_COMPARED = replace(
    SOURCE, ce_per_token=UNREAD, ce_per_byte=UNREAD, pivot_ce_per_token=UNREAD, pivot_ce_per_byte=UNREAD
)


def test_a_source_that_has_read_nothing_never_wins() -> None:
    for unit in ("token", "byte"):
        entropies_MP = cross_entropies([PIVOT, NOT_COMPARED], Rule(unit=unit), 7, PIVOT_BYTES)
        np.testing.assert_allclose(entropies_MP[0], 4.5 / 7 if unit == "byte" else 1.5)
        assert np.isinf(entropies_MP[1]).all()
        assert fuse([PIVOT, NOT_COMPARED], entropies_MP, Rule(unit=unit)).shares[:, 0].all()


@pytest.mark.parametrize("function", ["min_ce", "avg_ce"])
def test_where_nobody_has_read_anything_the_first_is_heard(function: Any) -> None:
    """What an aligned row keeps there is the pivot's."""
    fused = fuse([SOURCE, PIVOT, PIVOT], np.full((3, 3), np.inf), Rule(function))
    assert as_dicts(fused) == [{10: 1.0}, {11: 1.0}, {12: 1.0}]
    assert fused.shares.tolist() == [[1.0, 0.0, 0.0]] * 3
    assert not fused.confidence.any()


@pytest.mark.parametrize("function", ["min_ce", "avg_ce"])
def test_a_source_that_has_read_nothing_changes_nothing(function: Any) -> None:
    rule = Rule(function)
    without, more = [PIVOT, SOURCE], [PIVOT, SOURCE, NOT_COMPARED]
    expected = fuse(without, cross_entropies(without, rule, 7, PIVOT_BYTES), rule)
    fused = fuse(more, cross_entropies(more, rule, 7, PIVOT_BYTES), rule)
    np.testing.assert_array_equal(dense(fused), dense(expected))
    np.testing.assert_array_equal(fused.shares, np.column_stack([expected.shares, np.zeros(3)]))
    np.testing.assert_array_equal(fused.confidence, expected.confidence)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("function", ["min_ce", "avg_ce"])
def test_where_a_model_names_no_id_the_others_are_heard(function: Any, tail: Any) -> None:
    """The best one's mass is all tail at the first position, the two best ones' at the second, all at the last."""
    best = a_row(NOTHING, NOTHING, {1: 1.0}, NOTHING)
    second = a_row({2: 1.0}, NOTHING, {2: 1.0}, NOTHING)
    third = a_row({3: 1.0}, {3: 1.0}, {3: 1.0}, NOTHING)
    entropies_MP = np.tile(np.array([[0.0], [math.log(2)], [math.log(4)]]), 4)
    fused = fuse([best, second, third], entropies_MP, Rule(function, tail=tail))
    if function == "min_ce":
        assert as_dicts(fused) == [{2: 1.0}, {3: 1.0}, {1: 1.0}, {}]
        np.testing.assert_allclose(fused.confidence, [0.5, 0.25, 1.0, 0.0])
    else:
        weights = np.exp([0.5, 0.25]) / np.exp([0.5, 0.25]).sum()
        np.testing.assert_allclose(dense(fused)[0, 2:4], weights, rtol=1e-6)
        assert as_dicts(fused)[1::2] == [{3: 1.0}, {}]
        np.testing.assert_allclose(fused.confidence, [0.375, 0.25, 1.75 / 3, 0.0], rtol=1e-6)
    assert not fused.tail.any()
    np.testing.assert_allclose(fused.shares.sum(1), [1, 1, 1, 0], rtol=1e-6)


# Tail and temperature


def test_the_tail_is_dropped_or_one_outcome_more() -> None:
    row = a_row({1: 0.5, 2: 0.25})
    nothing = np.zeros((1, 1))
    dropped = fuse([row], nothing, Rule(tail="renormalise"))
    assert as_dicts(dropped) == [{1: 0.667, 2: 0.333}]
    assert dropped.tail.tolist() == [0.0]
    kept = fuse([row], nothing, Rule(tail="bucket"))
    assert as_dicts(kept) == [{1: 0.5, 2: 0.25}]
    assert kept.tail == pytest.approx([0.25], abs=1e-3)


def test_avg_ce_mixes_the_tails_too() -> None:
    rows = [a_row({1: 0.5}), a_row({1: 0.25, 2: 0.5})]
    fused = fuse(rows, np.zeros((2, 1)), Rule("avg_ce", tail="bucket"))
    assert as_dicts(fused) == [{1: 0.375, 2: 0.25}]
    assert fused.tail == pytest.approx([0.375], abs=1e-3)


def test_temperature_worked_by_hand() -> None:
    """0.64, 0.16 and a rest of 0.2 at temperature 2: 0.8, 0.4, 0.447, and of their sum; at 1/2: 16 to 1."""
    row, nothing = a_row({1: 0.64, 2: 0.16}), np.zeros((1, 1))
    assert as_dicts(fuse([row], nothing, Rule(temperature=2.0))) == [{1: 0.667, 2: 0.333}]
    assert as_dicts(fuse([row], nothing, Rule(temperature=2.0, tail="bucket"))) == [{1: 0.486, 2: 0.243}]
    assert as_dicts(fuse([row], nothing, Rule(temperature=0.5))) == [{1: 0.941, 2: 0.059}]


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_the_least_likely_of_float16_still_sum_to_one(temperature: float) -> None:
    """Log-probabilities whose exponentials are 0 in float64."""
    row = a_row({1: 1.0, 2: 1.0, 3: 1.0})
    row.logprobs[:] = [-2000, -2010, -np.inf]
    fused = fuse([row], np.zeros((1, 1)), Rule(temperature=temperature))
    expected = 1 / (1 + math.exp(-10 / temperature))
    np.testing.assert_allclose(dense(fused)[0, 1:3], [expected, 1 - expected], **FLOAT32)


# Against a dense oracle


@dataclass(frozen=True)
class Case:
    rows: list[Representation]
    entropies_MP: np.ndarray
    rule: Rule


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One to five models; some entries and some whole positions are empty, and empty places repeat ids."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    models, positions, k = draw(st.integers(1, 5)), draw(st.integers(0, 5)), draw(st.integers(1, 8))
    spread, empty = draw(st.sampled_from([0.1, 1.0, 10.0])), draw(st.sampled_from([0.0, 0.3, 0.9]))
    rows = []
    for _ in range(models):
        row = a_row(*[NOTHING] * positions, k=k)
        for place in range(positions):
            shares = rng.dirichlet(np.full(k + 1, spread))
            shares[:k][rng.random(k) < empty] = 0
            row.ids[place] = np.where(shares[:k] > 0, rng.permutation(VOCABULARY)[:k], row.ids[place, 0])
            with np.errstate(divide="ignore"):
                row.logprobs[place] = np.log(shares[:k])
            row.tail[place] = 1 - shares[:k].sum()
        rows.append(row)
    entropies_MP = rng.exponential(2.0, (models, positions))
    entropies_MP[rng.random((models, positions)) < draw(st.sampled_from([0.0, 0.4]))] = np.inf
    if draw(st.booleans()):
        entropies_MP = np.minimum(entropies_MP, 1.0)  # ties
    rule = Rule(
        draw(st.sampled_from(["min_ce", "avg_ce"])),
        temperature=draw(st.sampled_from([0.5, 1.0, 3.0])),
        tail=draw(st.sampled_from(["renormalise", "bucket"])),
    )
    return Case(rows, entropies_MP, rule)


def one_dense(row: Representation, place: int, rule: Rule) -> tuple[np.ndarray, float]:
    """A model's distribution over the whole vocabulary in float64, and its tail; zeros if it names no id."""
    powers = np.zeros(VOCABULARY)
    for token, logprob in zip(row.ids[place].tolist(), row.logprobs[place].tolist(), strict=True):
        powers[token] += math.exp(logprob) ** (1 / rule.temperature)
    tail = float(row.tail[place]) ** (1 / rule.temperature) if rule.tail == "bucket" else 0.0
    if not powers.any():
        return powers, 0.0
    return powers / (powers.sum() + tail), tail / (powers.sum() + tail)


def weights_of(entropies: Sequence[float], speaks: Sequence[bool], function: str) -> list[float]:
    """How much each of the models is heard at a position."""
    able = [model for model, ce in enumerate(entropies) if math.isfinite(ce) and speaks[model]]
    if not able:
        able = [0] if speaks[0] else []
    if function == "min_ce" and able:
        best = min(able, key=lambda model: entropies[model])
        return [float(model == best) for model in range(len(entropies))]
    heights = [math.exp(math.exp(-entropies[m])) if m in able else 0.0 for m in range(len(entropies))]
    return [height / (sum(heights) or 1.0) for height in heights]


@property_test
@given(cases())
def test_what_is_fused_is_the_dense_mixture(case: Case) -> None:
    fused = fuse(case.rows, case.entropies_MP, case.rule)
    assert fused.ids.dtype == np.int64
    assert fused.ids.shape == fused.probabilities.shape
    assert {a.dtype for a in (fused.probabilities, fused.tail, fused.shares, fused.confidence)} == {
        np.dtype("float32")
    }
    found_PV = dense(fused)
    for place, entropies in enumerate(case.entropies_MP.T.tolist()):
        sides = [one_dense(row, place, case.rule) for row in case.rows]
        weights = weights_of(entropies, [bool(shares.any()) for shares, _ in sides], case.rule.function)
        expected = sum(weight * shares for weight, (shares, _) in zip(weights, sides, strict=True))
        np.testing.assert_allclose(found_PV[place], expected, **FLOAT32)
        tail = sum(weight * rest for weight, (_, rest) in zip(weights, sides, strict=True))
        np.testing.assert_allclose(fused.tail[place], tail, **FLOAT32)
        np.testing.assert_allclose(fused.shares[place], weights, **FLOAT32)


@property_test
@given(cases())
def test_all_sums_to_one_wherever_anything_has_mass(case: Case) -> None:
    fused = fuse(case.rows, case.entropies_MP, case.rule)
    total = fused.probabilities.sum(1) + fused.tail
    shares = fused.shares.sum(1)
    np.testing.assert_allclose(total, shares, rtol=1e-5)
    assert ((np.abs(total - 1) < 1e-5) | (total == 0)).all()
    names_an_id = np.array([np.isfinite(row.logprobs).any(1) for row in case.rows])
    read = np.isfinite(case.entropies_MP) & names_an_id
    assert (shares[read.any(0)] > 0.99).all()
    assert ((fused.confidence > 0) == read.any(0)).all()
    assert (fused.confidence <= 1 + 1e-6).all()


@pytest.mark.slow
@property_test
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_models_changes_nothing_but_the_order_of_their_shares(case: Case, random: Any) -> None:
    order = random.sample(range(len(case.rows)), len(case.rows))
    read_MP = np.where(np.isfinite(case.entropies_MP), case.entropies_MP, 3.0)  # else the first is special
    entropies_MP = read_MP + np.arange(len(case.rows))[:, None] * 1e-3  # no ties
    fused = fuse(case.rows, entropies_MP, case.rule)
    other = fuse([case.rows[model] for model in order], entropies_MP[order], case.rule)
    np.testing.assert_allclose(other.shares, fused.shares[:, order], **FLOAT32)
    np.testing.assert_allclose(dense(other), dense(fused), **FLOAT32)
    np.testing.assert_allclose(other.tail, fused.tail, **FLOAT32)
    np.testing.assert_allclose(other.confidence, fused.confidence, **FLOAT32)


@property_test
@given(cases(), st.integers(1, 4))
def test_avg_ce_of_one_model_many_times_is_that_model(case: Case, times: int) -> None:
    rule = replace(case.rule, function="avg_ce")
    alone = fuse(case.rows[:1], case.entropies_MP[:1], rule)
    many = fuse(case.rows[:1] * times, np.repeat(case.entropies_MP[:1], times, 0), rule)
    np.testing.assert_allclose(dense(many), dense(alone), **FLOAT32)
    np.testing.assert_allclose(many.confidence, alone.confidence, **FLOAT32)


@property_test
@given(cases())
def test_the_models_rows_are_not_written_to(case: Case) -> None:
    before = [(row.ids.tobytes(), row.logprobs.tobytes(), row.tail.tobytes()) for row in case.rows]
    fuse(case.rows, case.entropies_MP, case.rule)
    assert [(row.ids.tobytes(), row.logprobs.tobytes(), row.tail.tobytes()) for row in case.rows] == before
