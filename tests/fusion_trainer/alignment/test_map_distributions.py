"""Distributions through a vocabulary map: all probability is kept or in the tail, and in the right place."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from fusion_trainer.alignment.map_distributions import Mixture, map_distributions, transfer
from fusion_trainer.representations.store import Representation

property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)
SOURCE_IDS, PIVOT_IDS = 40, 30


@dataclass(frozen=True)
class Case:
    """Distributions of a source, and a map for them."""

    ids: np.ndarray
    probabilities: np.ndarray
    tail: np.ndarray
    matrix: csr_array
    k: int


def random_map(rng: np.random.Generator, empty: float, crowded: bool) -> csr_array:
    """Rows of up to four images, some empty; ``crowded`` sends all ids to a few."""
    dense = np.zeros((SOURCE_IDS, PIVOT_IDS), np.float32)
    for row in dense:
        if rng.random() >= empty:
            images = rng.choice(4 if crowded else PIVOT_IDS, rng.integers(1, 5), replace=False)
            row[images] = rng.dirichlet(np.ones(len(images)))
    return csr_array(dense)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    positions, width = draw(st.integers(0, 6)), draw(st.integers(1, 12))
    ids = np.stack([rng.permutation(SOURCE_IDS)[:width] for _ in range(positions)] or [np.zeros(width)])
    shares = -np.sort(
        -rng.dirichlet(np.full(width + 1, draw(st.sampled_from([0.1, 1.0, 10.0]))), max(1, positions))
    )
    matrix = random_map(rng, draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.booleans()))
    ids, shares = ids.astype(np.uint16)[:positions], shares[:positions]
    return Case(ids, shares[:, :width], shares[:, width], matrix, draw(st.integers(1, 15)))


def mapped_densely(case: Case) -> np.ndarray:
    """float64 [positions, pivot ids]: each distribution as a whole row times the whole map."""
    whole = np.zeros((len(case.ids), SOURCE_IDS))
    for position, row in enumerate(case.ids.tolist()):
        for token, share in zip(row, case.probabilities[position], strict=True):
            whole[position, token] += share
    return whole @ case.matrix.toarray().astype(np.float64)


@property_test
@given(cases())
def test_what_is_kept_is_the_largest_of_the_dense_product(case: Case) -> None:
    found = map_distributions(case.ids, case.probabilities, case.tail, case.matrix, case.k)
    dense = mapped_densely(case)
    assert found.ids.shape == found.probabilities.shape == (len(case.ids), case.k)
    best = -np.sort(-dense, axis=1)[:, : case.k]
    np.testing.assert_allclose(found.probabilities, best, rtol=1e-12, atol=1e-15)
    for ids, shares, whole in zip(found.ids, found.probabilities, dense, strict=True):
        np.testing.assert_allclose(shares, whole[ids], rtol=1e-12, atol=1e-15)


@property_test
@given(cases())
def test_no_mass_is_lost(case: Case) -> None:
    found = map_distributions(case.ids, case.probabilities, case.tail, case.matrix, case.k)
    before = case.probabilities.sum(1) + case.tail
    np.testing.assert_allclose(found.probabilities.sum(1) + found.tail, before, atol=2e-7)  # weights are float32
    np.testing.assert_allclose(found.tail, case.tail + found.unmapped + found.beyond, atol=1e-15)
    empty = np.flatnonzero(np.diff(case.matrix.indptr) == 0)
    without_image = np.where(np.isin(case.ids, empty), case.probabilities, 0).sum(1)
    np.testing.assert_allclose(found.unmapped, without_image, atol=1e-15)
    np.testing.assert_allclose(found.beyond, mapped_densely(case).sum(1) - found.probabilities.sum(1), atol=1e-12)


@property_test
@given(cases())
def test_ids_are_different_and_those_without_mass_come_last(case: Case) -> None:
    found = map_distributions(case.ids, case.probabilities, case.tail, case.matrix, case.k)
    assert all(len(set(ids)) == case.k for ids in found.ids.tolist())
    assert (found.ids >= 0).all()
    assert (found.ids < max(PIVOT_IDS, case.k)).all()
    assert (np.diff(found.probabilities, axis=1) <= 0).all()
    assert (found.probabilities >= 0).all()


def through(matrix: Sequence[Sequence[float]], row: dict[int, float], tail: float, k: int) -> dict[str, list]:
    """One distribution through a map written out."""
    ids, shares = np.array([list(row)], np.uint32), np.array([list(row.values())])
    found = map_distributions(ids, shares, np.array([tail]), csr_array(np.array(matrix, np.float32)), k)
    return {name: np.round(getattr(found, name)[0], 12).tolist() for name in vars(found)}


def test_mass_that_meets_is_added_worked_by_hand() -> None:
    """Two ids of 0.3 and 0.25 outdo one of 0.4."""
    matrix = [[0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = through(matrix, {0: 0.4, 1: 0.3, 2: 0.25, 3: 0.04}, tail=0.01, k=2)
    assert (found["ids"], found["probabilities"]) == ([0, 2], [0.55, 0.4])
    assert (found["tail"], found["unmapped"], found["beyond"]) == (0.05, 0.04, 0.0)


def test_an_id_is_divided_over_its_images_worked_by_hand() -> None:
    matrix = [[0.5, 0.25, 0, 0.25], [0, 0.5, 0.5, 0]]
    found = through(matrix, {0: 0.8, 1: 0.2}, tail=0.0, k=3)
    assert (found["ids"], found["probabilities"]) == ([0, 1, 3], [0.4, 0.3, 0.2])
    assert (found["tail"], found["beyond"]) == (0.1, 0.1)


def test_places_without_mass_get_the_lowest_ids_that_are_not_there() -> None:
    matrix = [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    found = through(matrix, {1: 0.6, 0: 0.4}, tail=0.0, k=5)
    assert (found["ids"], found["probabilities"]) == ([3, 1, 0, 2, 4], [0.6, 0.4, 0, 0, 0])
    nothing = through([[0, 0, 0]], {0: 0.9}, tail=0.1, k=3)
    assert (nothing["ids"], nothing["probabilities"], nothing["tail"]) == ([0, 1, 2], [0, 0, 0], 1.0)


def test_of_equal_masses_the_first_of_the_source_comes_first() -> None:
    identity = np.eye(6).tolist()
    found = through(identity, {4: 0.25, 1: 0.25, 5: 0.25, 0: 0.25}, tail=0.0, k=3)
    assert (found["ids"], found["beyond"]) == ([4, 1, 5], 0.25)


# A conversation's row


def distributions(rng: np.random.Generator, positions: int, k: int, vocabulary: int) -> Representation:
    ids = np.stack([rng.permutation(vocabulary)[:k] for _ in range(positions)]).astype(np.uint16)
    logprobs = np.sort(-rng.gamma(1.0, 2.0, (positions, k)) - np.log(k))[:, ::-1].astype(np.float16)
    tail = np.maximum(0, 1 - np.exp(logprobs.astype(np.float64)).sum(1)).astype(np.float16)
    return Representation(ids, logprobs, tail, -rng.gamma(1.0, 2.0, positions).astype(np.float16))


def assert_same_bits(
    found: Representation, expected: Representation, where: np.ndarray | slice = slice(None)
) -> None:
    for name in ("ids", "logprobs", "tail", "gold_logprob"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype, name
        assert one[where].tobytes() == other[where].tobytes(), name


@pytest.mark.parametrize("seed", range(20))
def test_the_identity_map_returns_every_bit_of_the_source(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pivot, source = (distributions(rng, 50, 10, PIVOT_IDS) for _ in range(2))
    identity = csr_array(np.eye(PIVOT_IDS, dtype=np.float32))
    row, paired, mapped = transfer(pivot, source, [[(place, 1.0)] for place in range(50)], identity)
    assert paired.all()
    assert not mapped.unmapped.any()
    assert not mapped.beyond.any()
    assert_same_bits(row, source)


def test_every_log_probability_of_float16_goes_through_the_identity_map_as_it_is() -> None:
    """All that has a probability in float64."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = np.unique(every[(every > -740) & (every <= 0)])[:, None]
    shape = len(every)
    ids, nothing = np.zeros((shape, 1), np.uint16), np.zeros(shape, np.float16)
    source = Representation(ids, every, nothing, nothing)
    identity = csr_array(np.eye(2, dtype=np.float32))
    row, _, _ = transfer(source, source, [[(place, 1.0)] for place in range(shape)], identity)
    wrong = every[row.logprobs != every]
    assert not len(wrong), (len(wrong), wrong.min(), wrong.max())


@property_test
@given(st.integers(0, 1 << 32))
def test_positions_without_partner_keep_the_pivots_own_bits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pivot, source = distributions(rng, 30, 7, PIVOT_IDS), distributions(rng, 40, 5, SOURCE_IDS)
    partners: list[Mixture | None] = [
        [(int(rng.integers(40)), 1.0)] if rng.random() < 0.5 else None for _ in range(30)
    ]
    before = [getattr(pivot, name).copy() for name in ("ids", "logprobs", "tail", "gold_logprob")]
    row, paired, _ = transfer(pivot, source, partners, random_map(rng, 0.2, False))
    assert paired.tolist() == [partner is not None for partner in partners]
    assert_same_bits(row, pivot, ~paired)
    assert row.ids.shape == pivot.ids.shape
    assert_same_bits(Representation(*before), pivot)  # and the pivot's own row is not written to


@property_test
@given(st.integers(0, 1 << 32))
def test_a_row_is_that_of_the_dense_product_mixtures_and_all(seed: int) -> None:
    """To the rounding of float16; the gold's is the mixture of the source's own."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 12))
    pivot, source = distributions(rng, 25, k, PIVOT_IDS), distributions(rng, 30, 6, SOURCE_IDS)
    matrix = random_map(rng, 0.3, bool(rng.integers(2)))
    partners: list[Mixture | None] = []
    for _ in range(25):
        number = int(rng.integers(0, 4))
        places, weights = rng.choice(30, number, replace=False).tolist(), rng.dirichlet(np.ones(max(1, number)))
        partners.append(list(zip(places, weights.tolist(), strict=True)) if number else None)
    row, paired, _ = transfer(pivot, source, partners, matrix)
    for position in np.flatnonzero(paired).tolist():
        mixture = partners[position]
        assert mixture
        whole = np.zeros(PIVOT_IDS)
        outside = gold = 0.0
        for place, weight in mixture:
            shares = np.zeros(SOURCE_IDS)
            shares[source.ids[place]] = np.exp(source.logprobs[place].astype(np.float64))
            image = shares @ matrix.toarray().astype(np.float64)
            whole += weight * image
            outside += weight * (shares.sum() - image.sum() + float(source.tail[place]))
            gold += weight * float(source.gold_logprob[place])
        kept = np.exp(row.logprobs[position].astype(np.float64))
        best = -np.sort(-whole)[:k]
        np.testing.assert_allclose(kept, best, rtol=4e-3, atol=1e-7)
        np.testing.assert_allclose(whole[row.ids[position]], best, rtol=1e-6, atol=1e-9)
        assert float(row.tail[position]) == pytest.approx(min(1, outside + whole.sum() - best.sum()), abs=6e-4)
        assert float(row.gold_logprob[position]) == pytest.approx(gold, rel=1e-3, abs=1e-6)


def test_no_position_has_a_partner() -> None:
    rng = np.random.default_rng(0)
    pivot, source = distributions(rng, 6, 4, PIVOT_IDS), distributions(rng, 3, 4, SOURCE_IDS)
    row, paired, mapped = transfer(pivot, source, [None] * 6, random_map(rng, 0.0, False))
    assert not paired.any()
    assert len(mapped.tail) == 0
    assert_same_bits(row, pivot)
