"""Every divergence: value and gradient are those of a dense float64 reference over {ids, the rest}."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_trainer.config import TrainConfig, read_config
from fusion_trainer.pipeline.builder import _decisive
from fusion_trainer.training.divergences import LEAST_TAIL, divergence_named
from fusion_trainer.training.loss import Targets, sparse_terms
from varm_common.errors import UserError

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SCALES = [0.01, 1.0, 10.0]
CASES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("js", 0.5), ("js", 0.1), ("js", 0.9)]
Outcomes = list[tuple[Tensor, Tensor]]


def kl(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return sum((p * (p / q).log() for p, q in zip(one, other, strict=True) if p > 0), torch.zeros(()).double())


def by_definition(name: str, beta: float, p: list[Tensor], q: list[Tensor]) -> Tensor:
    if name == "forward_kl":
        return -sum((a * b.log() for a, b in zip(p, q, strict=True) if a > 0), torch.zeros(()).double())
    if name == "reverse_kl":
        return kl(q, [*p[:-1], p[-1].clamp_min(LEAST_TAIL)])
    middle = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def dense(name: str, beta: float, logits_SV: Tensor, targets: Targets) -> Tensor:
    """Position by position, outcome by outcome."""
    assert targets.tail is not None
    values = []
    for logits_V, ids, shares, tail in zip(
        logits_SV.double(),
        targets.ids.tolist(),
        targets.probabilities.double(),
        targets.tail.double(),
        strict=True,
    ):
        q_V = logits_V.softmax(0)
        named = {token: share for token, share in zip(ids, shares, strict=True) if share > 0}
        others = [token for token in range(len(q_V)) if token not in named]
        p, q = [*named.values(), tail], [*(q_V[token] for token in named), q_V[others].sum()]
        values.append(by_definition(name, beta, p, q) if named else 0.0 * q_V.sum())
    return torch.stack(values)


def random_case(seed: int, scale: float, entries: int = 5, vocabulary: int = 23) -> tuple[Tensor, Targets]:
    """Some entries and some positions have no probability; at some the rest has none."""
    rng, size = np.random.default_rng(seed), 7
    ids = np.array([rng.permutation(vocabulary)[:entries] for _ in range(size)])
    shares = rng.dirichlet(np.full(entries + 1, 0.5), size)
    shares[rng.random(shares.shape) < 0.2] = 0.0
    shares[:, 0] = np.maximum(shares[:, 0], 1e-3)
    shares /= shares.sum(1, keepdims=True)
    shares[0] = 0.0
    logits_SV = torch.from_numpy(rng.normal(0, scale, (size, vocabulary))).requires_grad_()
    return logits_SV, Targets(
        positions=torch.arange(size),
        gold=torch.from_numpy(rng.integers(vocabulary, size=size)),
        ids=torch.from_numpy(ids),
        probabilities=torch.from_numpy(shares[:, :-1]).float(),
        tail=torch.from_numpy(shares[:, -1]).float(),
        clm_weight=torch.from_numpy(rng.random(size)).float(),
    )


def both_gradients(
    case: tuple[str, float], logits_SV: Tensor, targets: Targets, chunk: int | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The fusion term and the gradient of the weighted sum, ours and by definition."""
    targets.divergence = divergence_named(*case)  # type: ignore[arg-type]
    found = sparse_terms(lambda hidden: hidden, logits_SV, targets, chunk)
    clm_S = -logits_SV.double().log_softmax(1)[torch.arange(len(logits_SV)), targets.gold]
    results = []
    for clm, fusion in ((found.clm, found.fusion), (clm_S, dense(*case, logits_SV, targets))):
        weight = targets.clm_weight.to(clm.dtype)
        (gradient,) = torch.autograd.grad((weight * clm + (1 - weight) * fusion).sum(), logits_SV)
        results.append((fusion.detach().double(), gradient.double()))
    return results[0], results[1]


@pytest.mark.slow
@property_test
@given(st.sampled_from(CASES), st.integers(0, 1 << 32), st.sampled_from(SCALES), st.sampled_from([None, 3]))
def test_value_and_gradient_are_those_of_the_definition(
    case: tuple[str, float], seed: int, scale: float, chunk: int | None
) -> None:
    ours, expected = both_gradients(case, *random_case(seed, scale), chunk)
    for found, exact in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_with_no_ids_or_all_of_them_nothing_is_lost(case: tuple[str, float]) -> None:
    for entries in (0, 22):
        ours, expected = both_gradients(case, *random_case(1, 2.0, entries or 1, 23))
        np.testing.assert_allclose(ours[0], expected[0], rtol=2e-5, atol=2e-5)
    logits_SV, targets = random_case(2, 1.0)
    targets.ids, targets.probabilities = targets.ids[:, :0], targets.probabilities[:, :0]
    targets.divergence = divergence_named(*case)  # type: ignore[arg-type]
    assert torch.isfinite(sparse_terms(lambda hidden: hidden, logits_SV, targets).fusion).all()


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "forward_kl"])
def test_a_divergence_is_zero_at_the_fused_distribution_and_positive_elsewhere(case: tuple[str, float]) -> None:
    """And its gradient is zero there."""
    rng = np.random.default_rng(0)
    p_V = rng.dirichlet(np.ones(11))
    logits_SV = torch.from_numpy(np.log([p_V, rng.dirichlet(np.ones(11))])).requires_grad_()
    targets = Targets(
        positions=torch.arange(2),
        gold=torch.tensor([0, 0]),
        ids=torch.tensor([[3, 5, 8]] * 2),
        probabilities=torch.from_numpy(np.array([p_V[[3, 5, 8]]] * 2)).float(),
        tail=torch.full((2,), 1.0 - p_V[[3, 5, 8]].sum()),
        clm_weight=torch.zeros(2),
        divergence=divergence_named(*case),  # type: ignore[arg-type]
    )
    fusion_S = sparse_terms(lambda hidden: hidden, logits_SV, targets).fusion
    (gradient_SV,) = torch.autograd.grad(fusion_S.sum(), logits_SV)
    assert fusion_S[0].item() == pytest.approx(0.0, abs=1e-6)
    assert gradient_SV[0].abs().max() < 1e-6
    assert fusion_S[1].item() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_a_student_that_is_certain_or_masks_ids_gives_finite_numbers(case: tuple[str, float]) -> None:
    logits_SV, targets = random_case(3, 1.0)
    with torch.no_grad():
        logits_SV[1] = -200.0
        logits_SV[1, targets.ids[1, 0]] = 200.0
        unnamed = [token for token in range(23) if token not in targets.ids[2].tolist()]
        logits_SV[2, unnamed[:4]] = -torch.inf
    targets.divergence = divergence_named(*case)  # type: ignore[arg-type]
    targets.norms = True
    found = sparse_terms(lambda hidden: hidden, logits_SV, targets)
    (gradient_SV,) = torch.autograd.grad(found.fusion.sum(), logits_SV)
    assert torch.isfinite(found.fusion).all()
    assert torch.isfinite(gradient_SV).all()
    assert torch.allclose(found.squares[:, 1], gradient_SV.square().sum(1).float(), rtol=1e-4, atol=1e-6)


def test_js_with_a_small_beta_learns_as_forward_kl_and_with_a_large_one_as_reverse_kl() -> None:
    """D(β)/β → KL(p ‖ q) as β → 0 (arXiv 2306.13649); symmetrically for 1 − β."""
    logits_SV, targets = random_case(4, 1.0)
    targets.probabilities, targets.tail = targets.probabilities + 0.02, targets.tail + 0.02
    total = targets.probabilities.sum(1) + targets.tail
    targets.probabilities, targets.tail = targets.probabilities / total[:, None], targets.tail / total
    targets.clm_weight = torch.zeros(len(logits_SV))
    gradient: Callable[[str, float], Tensor] = lambda *case: both_gradients(case, logits_SV, targets)[0][1]  # noqa: E731
    for name, beta, scale in (("forward_kl", 0.001, 0.001), ("reverse_kl", 0.999, 0.001)):
        exact = gradient(name, 0.5)
        assert float((gradient("js", beta) / scale - exact).norm() / exact.norm()) < 0.02


# The settings


def config_with(tmp_path: Path, text: str) -> TrainConfig:
    path = tmp_path / "train.yaml"
    path.write_text(f"pivot: p\naligned_stores: a\n{text}\ntraining: {{output_dir: t}}\n")
    return read_config(TrainConfig, path, {})


@pytest.mark.parametrize("name", ["reverse_kl", "js"])
def test_a_divergence_that_needs_the_rest_says_so_with_the_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"line 3: `divergence` cannot be .*: .* set `tail: bucket`"):
        config_with(tmp_path, f"divergence: {name}")
    assert config_with(tmp_path, f"tail: bucket\ndivergence: {name}").divergence == name
    assert config_with(tmp_path, f"divergence: {name}\ntail: bucket").divergence == name


def test_beta_is_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 3: `js_beta` cannot be 0.3: only `divergence: js` uses it"):
        config_with(tmp_path, "js_beta: 0.3")
    assert config_with(tmp_path, "tail: bucket\ndivergence: js\njs_beta: 0.3").js_beta == 0.3


def test_a_record_names_new_settings_only_where_they_are_used(tmp_path: Path) -> None:
    assert "divergence" not in _decisive(config_with(tmp_path, "tail: bucket"))
    used = _decisive(config_with(tmp_path, "tail: bucket\ndivergence: js\njs_beta: 0.3"))
    assert (used["divergence"], used["js_beta"]) == ("js", 0.3)
