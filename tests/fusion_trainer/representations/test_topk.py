"""Top-k, tail and gold log-probability of logits, against a dense computation in float64."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_trainer.representations import split_model
from fusion_trainer.representations.topk import TopK, top_k

property_test = settings(max_examples=120, deadline=None, derandomize=True)
VOCABULARIES = sorted({64 * groups + more for groups in (1, 2, 3, 6, 20, 41) for more in (-1, 0, 1, 37)})


def dense(logits_CV: Tensor, absent: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities over all rows [C, V], and the same with -inf where no token is: float64."""
    z_CV = logits_CV.to(torch.float64).numpy()
    z_CV = z_CV - z_CV.max(1, keepdims=True)
    logprobs_CV = z_CV - np.log(np.exp(z_CV).sum(1, keepdims=True))
    ranked_CV = logprobs_CV.copy()
    if absent is not None:
        ranked_CV[:, absent.numpy()] = -np.inf
    return logprobs_CV, ranked_CV


def assert_dense(found: TopK, logits_CV: Tensor, gold_C: Tensor, k: int, absent: Tensor | None = None) -> None:
    """``found`` is what float64 gives for ``logits_CV``; among equal logits any ids will do."""
    logprobs_CV, ranked_CV = dense(logits_CV, absent)
    rows = np.arange(len(logits_CV))
    ids_CK = found.ids_CK.numpy()
    assert ids_CK.shape == (len(logits_CV), k)
    assert all(len(set(ids)) == k for ids in ids_CK.tolist())
    best_CK = -np.sort(-ranked_CV, axis=1)[:, :k]
    np.testing.assert_allclose(found.logprobs_CK.numpy(), best_CK, rtol=1e-5, atol=3e-6)
    np.testing.assert_array_equal(ranked_CV[rows[:, None], ids_CK], best_CK)
    others_CV = np.exp(logprobs_CV)
    others_CV[rows[:, None], ids_CK] = 0
    np.testing.assert_allclose(found.tail_C.numpy(), others_CV.sum(1), rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(
        found.gold_logprob_C.numpy(), logprobs_CV[rows, gold_C.numpy()], rtol=1e-5, atol=3e-6
    )


def logits_of(
    seed: int, positions: int, vocabulary: int, dtype: torch.dtype, spread: float, levels: int | None
) -> tuple[Tensor, Tensor]:
    """Random logits [positions, vocabulary] and gold tokens; with ``levels`` only so many values occur."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(positions, vocabulary, generator=generator)
    if levels:
        logits = spread * torch.randint(levels, (positions, vocabulary), generator=generator).float()
    return logits.to(dtype), torch.randint(vocabulary, (positions,), generator=generator)


@property_test
@given(
    seed=st.integers(0, 2**32),
    positions=st.integers(1, 5),
    vocabulary=st.sampled_from(VOCABULARIES) | st.integers(33, 3000),
    k=st.integers(1, 33),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([1e-3, 1.0, 8.0, 100.0]),
    levels=st.none() | st.integers(1, 6),
)
@example(seed=0, positions=2, vocabulary=1280, k=10, dtype=torch.float32, spread=1.0, levels=1)
@example(seed=0, positions=2, vocabulary=1279, k=10, dtype=torch.float32, spread=1.0, levels=2)
def test_values_ids_tail_and_gold_are_those_of_a_dense_float64_computation(
    seed: int, positions: int, vocabulary: int, k: int, dtype: torch.dtype, spread: float, levels: int | None
) -> None:
    logits, gold = logits_of(seed, positions, vocabulary, dtype, spread, levels)
    assert_dense(top_k(logits.clone(), gold, k), logits, gold, k)


@property_test
@given(
    data=st.data(),
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from(VOCABULARIES),
    k=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_without_a_token_win_no_place_but_keep_their_mass(
    data: st.DataObject, seed: int, vocabulary: int, k: int, dtype: torch.dtype
) -> None:
    logits, gold = logits_of(seed, 3, vocabulary, dtype, 4.0, None)
    at_the_end = data.draw(st.integers(0, vocabulary - k), label="padded rows at the end")
    holes = data.draw(
        st.lists(st.integers(0, vocabulary - 1), max_size=vocabulary // 2, unique=True), label="holes"
    )
    rows = {*range(vocabulary - at_the_end, vocabulary), *holes[: max(0, vocabulary - k - at_the_end)]}
    absent = torch.tensor(sorted(rows), dtype=torch.long)
    logits[:, absent] += 5  # the likeliest rows are those that no token has
    found = top_k(logits.clone(), gold, k, absent)
    assert not rows & set(found.ids_CK.flatten().tolist())
    assert_dense(found, logits, gold, k, absent)


@pytest.mark.parametrize("vocabulary", [640, 32003])
def test_as_many_places_as_tokens_leave_a_tail_of_zero_or_the_padding(vocabulary: int) -> None:
    logits, gold = logits_of(1, 2, vocabulary, torch.float32, 1.0, None)
    absent = torch.arange(10, vocabulary)
    found = top_k(logits.clone(), gold, 10, absent)
    assert sorted(found.ids_CK[0].tolist()) == list(range(10))
    assert_dense(found, logits, gold, 10, absent)
    everything = top_k(logits.clone()[:, :600], gold % 600, 600)
    assert everything.tail_C.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [100, 2000])
def test_a_tail_of_one_in_a_million_has_five_right_digits(dtype: torch.dtype, vocabulary: int) -> None:
    """Subtracting the kept probabilities from 1 in float32 would leave one digit, or none."""
    logits = torch.zeros(3, vocabulary, dtype=dtype)
    logits[:, 7] = torch.tensor([18.0, 21.0, 25.0])
    gold = torch.tensor([7, 0, 99])
    found = top_k(logits.clone(), gold, 10)
    assert 1e-10 < found.tail_C.min() < found.tail_C.max() < 1e-4
    assert_dense(found, logits, gold, 10)


@pytest.mark.parametrize("shift", [-3e4, 0.0, 3e4])
def test_adding_a_constant_to_all_logits_changes_nothing(shift: float) -> None:
    logits = torch.randint(-40, 40, (3, 777), generator=torch.Generator().manual_seed(0)).float()
    gold = torch.tensor([1, 2, 3])
    found, shifted = top_k(logits.clone(), gold, 10), top_k(logits + shift, gold, 10)
    assert torch.equal(found.ids_CK, shifted.ids_CK)
    assert torch.equal(found.logprobs_CK, shifted.logprobs_CK)
    assert torch.equal(found.tail_C, shifted.tail_C)


def test_types_are_those_the_docstring_names_and_16_bit_logits_are_left_as_they_were() -> None:
    logits, gold = logits_of(0, 3, 1500, torch.bfloat16, 1.0, None)
    before = logits.clone()
    found = top_k(logits, gold, 10)
    assert torch.equal(logits, before)
    assert found.ids_CK.dtype == torch.int64
    assert {found.logprobs_CK.dtype, found.tail_C.dtype, found.gold_logprob_C.dtype} == {torch.float32}
    assert found.tail_C.shape == found.gold_logprob_C.shape == (3,)


def test_more_positions_than_a_cache_holds_are_reduced_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_CV, gold_C = logits_of(3, 37, 700, torch.float32, 3.0, None)
    absent = torch.arange(650, 700)
    whole = top_k(logits_CV.clone(), gold_C, 5, absent)
    monkeypatch.setattr(split_model, "CACHED_BYTES", 4 * 700 * 8)
    for dtype in (torch.float32, torch.bfloat16):
        found = top_k(logits_CV.to(dtype, copy=True), gold_C, 5, absent)
        assert_dense(found, logits_CV.to(dtype), gold_C, 5, absent)
    assert torch.equal(top_k(logits_CV.clone(), gold_C, 5, absent).logprobs_CK, whole.logprobs_CK)


def test_a_position_does_not_depend_on_the_positions_beside_it() -> None:
    logits, gold = logits_of(0, 7, 1500, torch.float32, 3.0, None)
    whole = top_k(logits.clone(), gold, 10)
    for row in range(7):
        alone = top_k(logits[row : row + 1].clone(), gold[row : row + 1], 10)
        assert torch.equal(alone.ids_CK[0], whole.ids_CK[row])
        torch.testing.assert_close(alone.logprobs_CK[0], whole.logprobs_CK[row], rtol=1e-6, atol=1e-6)
