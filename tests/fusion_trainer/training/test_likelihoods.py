"""Likelihood matching: its terms and gradients are those of the definition, in batches and in a training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_fusion
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fusion_trainer.alignment.align import align
from fusion_trainer.config import AlignConfig
from fusion_trainer.representations.store import Representation
from fusion_trainer.training.batches import Collator, FusionData
from fusion_trainer.training.fusion import Rule
from fusion_trainer.training.likelihoods import CERTAIN, Chunks, alm, chunks_of
from fusion_trainer.training.loss import Targets, sparse_terms
from fusion_trainer.training.train import train
from varm_common.errors import UserError

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def by_definition(teacher: float, student: Tensor, temperature: float) -> Tensor:
    """τ · KL of two outcomes, float64; both are log-probabilities."""
    p = torch.tensor(teacher - CERTAIN).double().div(temperature).exp()
    q = (student.double() - CERTAIN).div(temperature).exp()
    return temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


def random_chunks(seed: int, positions: int) -> Chunks:
    """Neighbouring chunks of one to four positions; some positions are in none."""
    rng = np.random.default_rng(seed)
    bounds = np.flatnonzero(rng.random(positions) < 0.6)
    ranges = [range(a, b) for a, b in zip(bounds, [*bounds[1:], positions], strict=True) if b - a <= 4]
    ranges += [range(2)]  # of another model
    return Chunks(
        torch.tensor([each[0] for each in ranges]),
        torch.tensor([place for each in ranges for place in each]),
        torch.tensor([number for number, each in enumerate(ranges) for _ in each]),
        torch.from_numpy(-rng.exponential(3.0, len(ranges)) * (rng.random(len(ranges)) > 0.1)).float(),
        torch.from_numpy(rng.random(len(ranges))).float(),
    )


@pytest.mark.slow
@property_test
@given(st.integers(0, 1 << 32), st.sampled_from([1.0, 10.0, 100.0]), st.sampled_from([0.1, 2.0]))
def test_value_and_gradient_are_those_of_the_definition(seed: int, temperature: float, scale: float) -> None:
    rng, positions = np.random.default_rng(seed), 12
    chunks = random_chunks(seed, positions)
    logits_SV = torch.from_numpy(rng.normal(0, scale, (positions, 7))).requires_grad_()
    gold_S = torch.from_numpy(rng.integers(7, size=positions))
    targets = Targets(
        positions=torch.arange(positions),
        gold=gold_S,
        ids=torch.zeros(positions, 0, dtype=torch.int64),
        probabilities=torch.zeros(positions, 0),
        tail=None,
        clm_weight=torch.full((positions,), 0.3),
        chunks=chunks,
        alm_weight=0.5,
        alm_temperature=temperature,
    )
    terms = sparse_terms(lambda hidden: hidden, logits_SV, targets, 5)
    assert terms.alm is not None
    logprobs_S = logits_SV.double().log_softmax(1)[torch.arange(positions), gold_S]
    expected_S = torch.zeros(positions).double()
    for number, (first, teacher, weight) in enumerate(
        zip(chunks.first.tolist(), chunks.logprob.tolist(), chunks.weight.tolist(), strict=True)
    ):
        student = logprobs_S[chunks.positions[chunks.chunk == number]].sum()
        expected_S = expected_S + weight * by_definition(teacher, student, temperature) * (
            torch.arange(positions) == first
        )
    np.testing.assert_allclose(terms.alm.detach(), expected_S.detach(), rtol=2e-4, atol=2e-4)
    whole = 0.3 * -logprobs_S + 0.7 * 0.5 * expected_S
    np.testing.assert_allclose(targets.weighted(terms).detach(), whole.detach(), rtol=2e-4, atol=2e-4)
    (ours,) = torch.autograd.grad(targets.weighted(terms).sum(), logits_SV)
    (exact,) = torch.autograd.grad(whole.sum(), logits_SV)
    np.testing.assert_allclose(ours, exact, rtol=1e-2, atol=2e-3)


def test_at_a_student_that_is_certain_the_gradient_in_the_logits_is_bounded() -> None:
    """It is T there: that of the term in S grows as T / S, and that of S in the logits is as small as S."""
    logits_SV = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int64)
    targets = Targets(
        gold=zero,
        ids=zero[:, None],
        probabilities=torch.zeros(1, 1),
        tail=None,
        chunks=Chunks(zero, zero, zero, torch.tensor([-2.0]), torch.ones(1)),
    )
    terms = sparse_terms(lambda hidden: hidden, logits_SV, targets)
    assert terms.alm is not None
    (gradient_SV,) = torch.autograd.grad(terms.alm.sum(), logits_SV)
    assert torch.isfinite(terms.alm).all()
    assert gradient_SV.abs().max() <= 2.0


def one_chunk(teacher: float, nll: float) -> tuple[float, float]:
    """Term and slope of a chunk of one position, at τ = 1e5."""
    nll_S = torch.tensor([nll], requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int64)
    term_S = alm(nll_S, Chunks(zero, zero, zero, torch.tensor([teacher]), torch.ones(1)), 1e4)
    term_S.sum().backward()
    assert nll_S.grad is not None
    return term_S.item(), nll_S.grad.item()


def test_the_limit_of_a_large_temperature_worked_by_hand() -> None:
    """S − T + T·log(T/S), and 1 − T/S: the cross-entropy's slope at a certain teacher, negative above it."""
    assert one_chunk(-2.0, 4.0) == pytest.approx((4 - 2 + 2 * np.log(0.5), 0.5), rel=1e-2)
    assert one_chunk(-2.0, 2.0) == pytest.approx((0.0, 0.0), abs=1e-3)
    assert one_chunk(0.0, 3.0) == pytest.approx((3.0, 1.0), rel=1e-2)
    assert one_chunk(-2.0, 1.0) == pytest.approx((1 - 2 + 2 * np.log(2), -1.0), rel=1e-2)


# From stores to batches


@pytest.fixture(scope="module")
def with_chunks(fusion: tiny_fusion.World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both sources, aligned with chunks."""
    folder = tmp_path_factory.mktemp("chunks")
    stores = fusion.folder / "stores"
    for name in tiny_fusion.SOURCES:
        settings = {
            "source_store": stores / name,
            "pivot_store": stores / "pivot",
            "dialogues": fusion.dialogues.folder,
        }
        align(AlignConfig(**settings, output=folder / name, workers=1, chunks=True))
    return {name: folder / name for name in tiny_fusion.SOURCES}


def row(golds: list[float], **chunks: NDArray[Any]) -> Representation:
    gold = np.array(golds, np.float16)
    return Representation(np.zeros((len(gold), 1), np.uint16), gold[:, None], gold * 0, gold, **chunks)


def test_a_block_learns_the_chunks_of_the_models_that_take_part() -> None:
    """The pivot's tokens are chunks; a source's where it has a share at their beginning."""
    pivot = row([-1.0, -2.0, -3.0, -4.0])
    sizes, logprobs = np.array([2, 0, 1, 1], np.uint16), np.array([-5.0, 0.0, -6.0, -7.0], np.float16)
    source = row([-9.0] * 4, chunk_size=sizes, chunk_logprob=logprobs)
    shares = np.array([[0.0, 1.0], [0.25, 0.75], [0.0, 1.0], [1.0, 0.0]], np.float32)
    found = chunks_of([pivot, source], shares)
    assert [column.tolist() for column in found] == [[1, 3, 0, 2], [1, 1, 2, 1], [-2, -4, -5, -6], [0.25, 1, 1, 1]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_has_every_chunk_of_its_blocks(
    packed: bool, fusion: tiny_fusion.World, with_chunks: dict[str, Path]
) -> None:
    stores = [*fusion.stores()[:1], *map(tiny_fusion.RepresentationStore, with_chunks.values())]
    groups = [[0, 1], [2]] if packed else [[0], [1], [2]]
    data = FusionData(fusion.tokens, stores, Rule("avg_ce"), groups, chunks=True)
    batch = Collator(0, packed)([data[item] for item in range(len(groups))] + [data[None]])
    chunks = Chunks.of(batch)
    assert chunks is not None
    expected, start = [], 0
    for block in range(3):
        example = data.example(block)
        assert example.fused is not None
        for model, store in enumerate(stores):
            stored = store[block]
            for at in range(len(stored)):
                size = 1 if stored.chunk_size is None else int(stored.chunk_size[at])
                logprob = stored.gold_logprob[at] if stored.chunk_logprob is None else stored.chunk_logprob[at]
                places = range(start + at, start + at + size)
                if size:
                    expected.append((tuple(places), float(logprob), float(example.fused.shares[at, model])))
        start += len(example.tokens.positions)
    assert [
        (tuple(chunks.positions[chunks.chunk == number].tolist()), logprob, weight)
        for number, (logprob, weight) in enumerate(
            zip(chunks.logprob.tolist(), chunks.weight.tolist(), strict=True)
        )
    ] == expected
    assert chunks.first.tolist() == [places[0] for places, *_ in expected]
    assert Chunks.of(Collator(0)([data[None]])) is None


# A training


def config_of(fusion: tiny_fusion.World, with_chunks: dict[str, Path], output: Path, **changed: Any) -> Any:
    stores = [str(with_chunks["bytes"])]
    return fusion.config(output, **{"aligned_stores": stores, "compare": "token", **changed})


@pytest.mark.slow
def test_a_training_matches_likelihoods_and_logs_them(
    fusion: tiny_fusion.World, with_chunks: dict[str, Path], tmp_path: Path
) -> None:
    """With a weight of 0 the chunks change no weight of the target; alone they are the whole loss."""
    plain = train(fusion.config(tmp_path / "plain", compare="token"))
    unused = train(config_of(fusion, with_chunks, tmp_path / "unused"))
    same = (tiny_fusion.weights(folder) for folder in (plain, unused))
    assert all(map(torch.equal, *(found.values() for found in same)))
    assert "alm_weight" not in json.loads((plain / "fusion.json").read_text())["config"]

    steps = {"training": {"max_steps": 12, "logging_steps": 1}}
    config = config_of(
        fusion, with_chunks, tmp_path / "alone", alm_weight=1.0, clm_weight=0.0, held_out=0.2, **steps
    )
    alone = train(config)
    record = json.loads((alone / "fusion.json").read_text())
    assert record["config"]["alm_weight"] == 1.0
    assert 0 < record["results"]["eval_alm"] == pytest.approx(record["results"]["eval_loss"])


def test_stores_without_chunks_are_refused_with_what_to_do(fusion: tiny_fusion.World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)stores have none:.*bytes.*Align their sources again.*--chunks"):
        train(fusion.config(tmp_path / "target", alm_weight=0.5))
    assert not (tmp_path / "target").exists()
