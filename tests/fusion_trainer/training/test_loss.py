"""The sparse loss: value and gradients are those of a dense float64 reference, for every layout of model."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny_sources
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_trainer.representations import split_model
from fusion_trainer.training import loss
from fusion_trainer.training.loss import Targets, Terms, give_fusion_loss, sparse_terms

property_test = settings(max_examples=120, deadline=None, derandomize=True, database=None)
LAYOUTS = list(tiny_sources.LAYOUTS)
ROWS = 61
LENGTHS = (23, 17, 9)
WIDTH = max(LENGTHS)
IGNORED = -100


# The reference


def dense_terms(logits_SV: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Both terms at S positions by their definitions, every distribution a whole row of the vocabulary."""
    logarithms_SV = logits_SV.double().log_softmax(1)
    rows = torch.arange(len(targets.gold))
    shares_SV = torch.zeros_like(logarithms_SV)
    if targets.ids.numel():
        where = rows[:, None].expand_as(targets.ids), targets.ids
        shares_SV = shares_SV.index_put(where, targets.probabilities.double(), accumulate=True)
    fusion_S = -(shares_SV * logarithms_SV).sum(1)
    if targets.tail is not None:
        others_SV = logarithms_SV.exp().masked_fill(shares_SV > 0, 0.0)
        fusion_S = fusion_S - targets.tail.double() * others_SV.sum(1).log()
    return -logarithms_SV[rows, targets.gold], fusion_S


def weighted(clm_S: Tensor, fusion_S: Tensor, targets: Targets) -> Tensor:
    weight_S = targets.clm_weight.to(clm_S.dtype)
    return (weight_S * clm_S + (1 - weight_S) * fusion_S).sum()


def assert_near(found: Tensor, expected: Tensor, precision: float, what: str = "") -> None:
    """Equal to ``precision`` of the largest element."""
    assert found.shape == expected.shape, what
    found, expected = found.detach().double(), expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    np.testing.assert_allclose(found, expected, rtol=0, atol=precision * scale, err_msg=what)


def random_targets(
    rng: np.random.Generator,
    positions: list[int],
    vocabulary: int,
    entries: int = 6,
    *,
    bucket: bool = False,
    spread: float = 1.0,
    empty: float = 0.3,
    clm_weight: float | None = None,
    norms: bool = False,
) -> Targets:
    """Random golds and sparse distributions over them.

    Some entries have no probability, and an id that another entry has; some positions have none at all; at most
    others the gold is among the ids. ``clm_weight`` None is a random one at each position.
    """
    size = len(positions)
    ids = np.zeros((size, entries), np.int64)
    probabilities, tail = np.zeros((size, entries)), np.zeros(size)
    gold = rng.integers(vocabulary, size=size)
    for place in range(size):
        order = rng.permutation(vocabulary)
        if rng.random() < 0.7:
            order = np.concatenate([[gold[place]], order[order != gold[place]]])
        named = rng.random(entries) >= empty
        shares = rng.dirichlet(np.full(entries + 1, spread))
        total = shares[:-1][named].sum() + (shares[-1] if bucket else 0.0)
        ids[place] = order[:entries] if entries else []
        if named.any() and rng.random() >= 0.1:
            probabilities[place] = np.where(named, shares[:-1], 0) / total
            tail[place] = shares[-1] / total if bucket else 0.0
            ids[place, ~named] = rng.choice(ids[place], (~named).sum())
        rng.shuffle(mixed := np.arange(entries))
        ids[place], probabilities[place] = ids[place, mixed], probabilities[place, mixed]
    weight = np.full(size, clm_weight) if clm_weight is not None else rng.random(size)
    return Targets(
        positions=torch.tensor(positions, dtype=torch.int64),
        gold=torch.from_numpy(gold),
        ids=torch.from_numpy(ids),
        probabilities=torch.from_numpy(probabilities).float(),
        tail=torch.from_numpy(tail).float() if bucket else None,
        clm_weight=torch.from_numpy(weight).float(),
        norms=norms,
    )


# Both terms, of hidden states


class CappedHead(nn.Module):
    """A linear head with soft-capping."""

    def __init__(self, hidden: int, vocabulary: int, scale: float, rng: np.random.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(rng.normal(0, scale, (vocabulary, hidden))))
        self.bias = nn.Parameter(torch.from_numpy(rng.normal(0, scale, vocabulary)))

    def forward(self, hidden_CH: Tensor) -> Tensor:
        return 40.0 * torch.tanh((hidden_CH @ self.weight.T + self.bias) / 40.0)


@dataclass
class Case:
    head: CappedHead
    hidden_SH: Tensor
    targets: Targets
    chunk: int | None
    cached_rows: int

    def gradients(self, terms: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Both terms and the gradients of their weighted sum in hidden states, weights and bias."""
        hidden_SH, parameters = self.hidden_SH, [self.hidden_SH, *self.head.parameters()]
        assert hidden_SH.requires_grad
        clm_S, fusion_S, *_ = terms()
        with patch.object(split_model, "CACHED_BYTES", self.cached_bytes):
            gradients = torch.autograd.grad(weighted(clm_S, fusion_S, self.targets), parameters)
        return clm_S, fusion_S, list(gradients)

    def sparse(self, chunk: int | None) -> Terms:
        with patch.object(split_model, "CACHED_BYTES", self.cached_bytes):
            return sparse_terms(self.head, self.hidden_SH, self.targets, chunk)

    @property
    def cached_bytes(self) -> int:
        return 4 * len(self.head.bias) * self.cached_rows

    def dense(self) -> tuple[Tensor, Tensor]:
        return dense_terms(self.head(self.hidden_SH), self.targets)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    positions, vocabulary, hidden = draw(st.integers(0, 12)), draw(st.integers(2, 40)), 6
    entries = draw(st.integers(0, min(9, vocabulary - 1)))
    targets = random_targets(
        rng,
        list(range(positions)),
        vocabulary,
        entries,
        bucket=draw(st.booleans()),
        spread=draw(st.sampled_from([0.1, 1.0, 10.0])),
        empty=draw(st.sampled_from([0.0, 0.3, 0.9])),
        clm_weight=draw(st.sampled_from([None, 0.0, 0.9, 1.0])),
        norms=draw(st.booleans()),
    )
    head = CappedHead(hidden, vocabulary, draw(st.sampled_from([0.01, 1.0, 10.0])), rng)
    hidden_SH = torch.from_numpy(rng.normal(size=(positions, hidden))).requires_grad_()
    return Case(head, hidden_SH, targets, draw(st.sampled_from([None, 1, 3, 100])), draw(st.integers(1, 12)))


@pytest.mark.slow
@property_test
@given(cases())
def test_value_and_gradients_are_those_of_the_dense_reference(case: Case) -> None:
    *terms, gradients = case.gradients(lambda: case.sparse(case.chunk)[:2])
    *expected, exact = case.gradients(case.dense)
    for found, reference in zip([*terms, *gradients], [*expected, *exact], strict=True):
        assert_near(found, reference, 1e-5)
    assert {term.dtype for term in terms} == {torch.float32}
    with torch.no_grad():
        again = case.sparse(case.chunk)
    assert all(torch.equal(one, other) for one, other in zip(again[:2], terms, strict=True))


@pytest.mark.slow
@property_test
@given(cases(), st.sampled_from([1, 2, 5, 13]))
def test_the_chunk_changes_nothing(case: Case, chunk: int) -> None:
    *terms, gradients = case.gradients(lambda: case.sparse(None)[:2])
    *others, again = case.gradients(lambda: case.sparse(chunk)[:2])
    for found, other in zip([*terms, *gradients], [*others, *again], strict=True):
        assert_near(found, other, 1e-6)


@property_test
@given(cases())
def test_squares_are_the_squared_norms_of_the_true_gradients_in_the_logits(case: Case) -> None:
    found = case.sparse(case.chunk).squares
    assert found.shape == (len(case.targets.gold), 2)
    assert not found.requires_grad
    if not case.targets.norms:
        assert not found.any()
        return
    logits_SV = case.head(case.hidden_SH).detach().requires_grad_()
    for column, term_S in enumerate(dense_terms(logits_SV, case.targets)):
        (gradient_SV,) = torch.autograd.grad(term_S.sum(), logits_SV, retain_graph=True)
        assert_near(found[:, column], gradient_SV.square().sum(1), 1e-5)


def test_the_loss_worked_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8; gold the second; fused 0.75 and 0.25 on the first and third."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]])).requires_grad_()
    entry = {"ids": torch.tensor([[0, 2, 0]]), "probabilities": torch.tensor([[0.75, 0.25, 0.0]])}
    place = {"positions": torch.tensor([0]), "gold": torch.tensor([1])}
    targets = Targets(**place, **entry, tail=None, clm_weight=torch.tensor([0.9]), norms=True)
    found = sparse_terms(lambda hidden: hidden, logits, targets)
    two = np.log(2)
    assert found.clm.tolist() == pytest.approx([2 * two], rel=1e-6)
    assert found.fusion.tolist() == pytest.approx([0.75 * two + 0.25 * 3 * two], rel=1e-6)
    of_clm, of_fusion = np.array([0.5, -0.75, 0.125, 0.125]), np.array([-0.25, 0.25, -0.125, 0.125])
    assert found.squares[0].tolist() == pytest.approx([(of_clm**2).sum(), (of_fusion**2).sum()], rel=1e-6)
    weighted(found.clm, found.fusion, targets).backward()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad[0], 0.9 * of_clm + 0.1 * of_fusion, atol=1e-7)

    bucket = Targets(**place, **entry, tail=torch.tensor([0.5]), clm_weight=torch.tensor([0.0]))
    bucket.probabilities = bucket.probabilities / 2
    found = sparse_terms(lambda hidden: hidden, logits, bucket)  # all else has 1/4 + 1/8
    expected = 0.375 * two + 0.125 * 3 * two - 0.5 * np.log(0.375)
    assert found.fusion.tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bucket", [False, True])
def test_sums_over_bf16_logits_are_float32(bucket: bool, autocast: bool) -> None:
    """The terms of those very logits in float64, over a vocabulary of real size."""
    rng, vocabulary = np.random.default_rng(0), 32000
    logits_SV = torch.from_numpy(rng.normal(0, 3, (7, vocabulary))).bfloat16().requires_grad_()
    targets = random_targets(rng, list(range(7)), vocabulary, 20, bucket=bucket)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = sparse_terms(lambda hidden: hidden, logits_SV, targets, 3)
    expected = dense_terms(logits_SV, targets)
    for term, exact in zip((found.clm, found.fusion), expected, strict=True):
        assert term.dtype == torch.float32
        np.testing.assert_allclose(term.detach(), exact.detach(), rtol=1e-6, atol=1e-6)
    (ours,) = torch.autograd.grad(weighted(found.clm, found.fusion, targets), logits_SV)
    (exact,) = torch.autograd.grad(weighted(*expected, targets), logits_SV)
    assert ours.dtype == torch.bfloat16  # what the head's own backward pass takes
    np.testing.assert_allclose(ours.double(), exact.double(), rtol=2**-7, atol=1e-9)


# A model's loss, every layout


def new_model(layout: str, dtype: torch.dtype | None = None, **own: Any) -> Any:
    """In train mode, in float64 where the layout can be run in it."""
    wide = torch.float32 if layout == "mixtral" else torch.float64
    return tiny_sources.new_source(layout, ROWS, **own).to(dtype or wide).train()


def precision_of(layout: str) -> float:
    return 2e-5 if layout == "mixtral" else 2e-6


def batch(seed: int = 3) -> dict[str, Tensor]:
    """Random tokens, padded at the end."""
    ids_BL = torch.randint(ROWS, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(seed))
    mask_BL = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids_BL * mask_BL, "attention_mask": mask_BL.long()}


def some_positions(rng: np.random.Generator, share: float = 0.6) -> list[int]:
    """In the flattened batch, each with a next token."""
    every = [row * WIDTH + place for row, length in enumerate(LENGTHS) for place in range(length - 1)]
    return [position for position in every if rng.random() < share]


def gradients_of(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
        parameter.grad = None
    return found


def taught(model: Any, chunk: int | None = 5) -> Any:
    """A copy that takes ``targets``."""
    learner = copy.deepcopy(model)
    give_fusion_loss(learner, chunk)
    return learner


@dataclass
class Learned:
    """What a model says about its targets."""

    loss: Tensor
    clm: Tensor
    fusion: Tensor
    squares: Tensor


def run(learner: Any, targets: Targets, **inputs: Tensor) -> Learned:
    """The loss, to be differentiated, and the terms."""
    outputs = learner(**inputs, targets=targets)
    assert list(outputs) == ["loss"]
    assert targets.terms is not None
    assert targets.loss is not None
    found = Learned(outputs["loss"], targets.terms.clm, targets.terms.fusion, targets.terms.squares)
    for tensor in (targets.loss, found.clm, found.fusion, found.squares):
        assert not tensor.requires_grad
        assert tensor.dtype == torch.float32
    assert torch.equal(targets.loss, found.loss.detach())
    return found


def learned(learner: Any, targets: Targets, **inputs: Tensor) -> tuple[Learned, dict[str, Tensor]]:
    """What the model says, and the gradients of its loss."""
    found = run(learner, targets, **inputs)
    found.loss.backward()
    return found, gradients_of(learner)


def dense_loss(model: Any, targets: Targets, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum and both terms, from all of the model's own logits."""
    logits_SV = model(**inputs, use_cache=False).logits.flatten(0, 1)[targets.positions]
    clm_S, fusion_S = dense_terms(logits_SV, targets)
    return weighted(clm_S, fusion_S, targets), clm_S, fusion_S


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], precision: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert_near(found[name] / scale, gradient / scale, precision, name)


@pytest.mark.parametrize("bucket", [False, True], ids=["renormalised", "bucket"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_models_loss_and_all_its_gradients_are_those_of_its_own_logits(layout: str, bucket: bool) -> None:
    model, rng = new_model(layout), np.random.default_rng(1)
    targets = random_targets(rng, some_positions(rng), ROWS, bucket=bucket)
    outputs, gradients = learned(taught(model), targets, **batch())
    loss, clm_S, fusion_S = dense_loss(model, targets, **batch())
    loss.backward()
    precision = precision_of(layout)
    for name, expected in (("loss", loss), ("clm", clm_S), ("fusion", fusion_S)):
        assert_near(getattr(outputs, name), expected, precision, name)
    assert_same_gradients(gradients, gradients_of(model), precision)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_clm_weight_of_one_loss_and_gradients_are_those_of_transformers(layout: str) -> None:
    model, rng, inputs = new_model(layout), np.random.default_rng(2), batch()
    targets = random_targets(rng, some_positions(rng), ROWS, clm_weight=1.0)
    labels = torch.full((len(LENGTHS) * WIDTH,), IGNORED)
    labels[targets.positions + 1] = targets.gold = inputs["input_ids"].flatten()[targets.positions + 1]
    outputs, gradients = learned(taught(model), targets, **inputs)
    plain = model(**inputs, labels=labels.reshape(len(LENGTHS), WIDTH), use_cache=False).loss * len(targets.gold)
    plain.backward()
    assert_near(outputs.loss, plain, precision_of(layout))
    assert_same_gradients(gradients, gradients_of(model), precision_of(layout))


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_of_the_layers_changes_no_bit(layout: str, reentrant: bool) -> None:
    model, rng = new_model(layout, torch.float32), np.random.default_rng(4)
    targets = random_targets(rng, some_positions(rng), ROWS)
    outputs, gradients = learned(taught(model), targets, **batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    learner, calls = taught(model), list[str]()
    within = next(part for part in learner.base_model.modules() if isinstance(part, nn.Linear))
    within.register_forward_hook(lambda *_: calls.append("forward"))
    with no_warning():
        again, others = learned(learner, targets, **batch())
    assert calls == ["forward", "forward"]  # once more in the backward pass
    assert torch.equal(outputs.loss, again.loss)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@pytest.mark.parametrize("layout", ["llama", "gemma2", "mixtral"])
def test_under_bf16_autocast_the_loss_is_that_of_float64_to_bf16(layout: str) -> None:
    model, rng = new_model(layout), np.random.default_rng(5)
    targets = random_targets(rng, some_positions(rng), ROWS, bucket=True)
    learner = taught(new_model(layout, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(learner, targets, **batch())
    outputs.loss.backward()
    loss, *_ = dense_loss(model, targets, **batch())
    loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(loss.item(), rel=2e-2)
    found, expected = gradients_of(learner), gradients_of(model)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        away = float((found[name] - gradient).norm() / gradient.norm())
        assert away < 0.25, (name, away)


@pytest.mark.parametrize("layout", ["llama", "gemma", "mixtral"])
def test_where_nothing_is_supervised_the_loss_is_zero_and_so_are_the_gradients(layout: str) -> None:
    model = new_model(layout)
    for entries in (0, 4):
        targets = random_targets(np.random.default_rng(0), [], ROWS, entries, bucket=True)
        outputs, gradients = learned(taught(model), targets, **batch())
        assert outputs.loss.item() == 0.0
        assert (outputs.clm.shape, outputs.fusion.shape, outputs.squares.shape) == ((0,), (0,), (0, 2))
        assert not any(gradient.any() for gradient in gradients.values())


def test_where_nothing_is_fused_the_fusion_term_is_zero() -> None:
    model, rng = new_model("llama"), np.random.default_rng(6)
    targets = random_targets(rng, some_positions(rng), ROWS, 0)
    outputs, gradients = learned(taught(model), targets, **batch())
    assert not outputs.fusion.any()
    dense_loss(model, targets, **batch())[0].backward()
    assert_same_gradients(gradients, gradients_of(model), 2e-6)


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_weights_get_no_gradient_and_the_others_theirs(frozen: str) -> None:
    model, rng = new_model("llama"), np.random.default_rng(7)
    getattr(model, frozen).requires_grad_(False)
    targets = random_targets(rng, some_positions(rng), ROWS)
    learner = taught(model)
    run(learner, targets, **batch()).loss.backward()
    dense_loss(model, targets, **batch())[0].backward()
    for (name, found), expected in zip(learner.named_parameters(), model.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None) == name.startswith(frozen), name
        if expected.grad is not None:
            assert found.grad is not None
            assert_near(found.grad, expected.grad, 2e-6, name)


def test_norms_are_measured_only_on_request() -> None:
    model, rng = new_model("gemma2"), np.random.default_rng(8)
    targets = random_targets(rng, some_positions(rng), ROWS, norms=True)
    outputs = run(taught(model), targets, **batch())
    logits_SV = model(**batch()).logits.flatten(0, 1)[targets.positions].detach().requires_grad_()
    for column, term_S in enumerate(dense_terms(logits_SV, targets)):
        (gradient_SV,) = torch.autograd.grad(term_S.sum(), logits_SV, retain_graph=True)
        assert_near(outputs.squares[:, column], gradient_SV.square().sum(1), 2e-6)


def test_norms_are_measured_once_and_not_again_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = new_model("llama"), np.random.default_rng(9)
    targets, calls = random_targets(rng, some_positions(rng), ROWS, norms=True), []
    gradient = loss._gradient
    monkeypatch.setattr(loss, "_gradient", lambda *given: (calls.append(1), gradient(*given))[1])
    found = taught(model)(**batch(), targets=targets)["loss"]
    chunks = len(calls) // 2
    found.backward()
    assert len(calls) == 3 * chunks


def test_what_a_head_drops_at_random_it_drops_again_in_the_backward_pass() -> None:
    rng = np.random.default_rng(10)
    targets, head = random_targets(rng, list(range(20)), ROWS), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, ROWS))
    gradients = []
    for alone in (False, True):
        head.zero_grad()
        hidden_SH = torch.arange(160.0).reshape(20, 8).sin().requires_grad_()
        torch.manual_seed(3)
        if alone:
            logits_SV = torch.cat([head(hidden_CH) for hidden_CH in torch.split(hidden_SH, 7)])
            clm_S, fusion_S = dense_terms(logits_SV, targets)
        else:
            found = sparse_terms(head, hidden_SH, targets, 7)
            clm_S, fusion_S = found.clm, found.fusion
        weighted(clm_S, fusion_S, targets).backward()
        gradients.append([hidden_SH.grad, head[1].weight.grad])
    for one, other in zip(*gradients, strict=True):
        assert_near(one, other, 2e-6)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_the_loss_and_its_gradients_are_scaled_and_the_terms_are_not(scale: Tensor | float) -> None:
    model = new_model("mixtral", torch.float32, output_router_logits=True)
    targets, scaled = (random_targets(np.random.default_rng(9), list(range(20)), ROWS) for _ in range(2))
    scaled.scale = scale
    whole, gradients = learned(taught(model), targets, **batch())
    quarter, others = learned(taught(model), scaled, **batch())
    assert_near(4 * quarter.loss, whole.loss, 1e-6)
    assert torch.equal(quarter.clm, whole.clm)
    assert torch.equal(quarter.fusion, whole.fusion)
    assert_same_gradients({name: 4 * gradient for name, gradient in others.items()}, gradients, 1e-6)


# A mixture of experts


@pytest.mark.parametrize("mask", ["padded", "unpadded"])
def test_the_load_balancing_loss_is_the_one_the_model_adds_itself(mask: str) -> None:
    model = new_model("mixtral", output_router_logits=True, router_aux_loss_coef=5.0)
    rng, inputs = np.random.default_rng(9), batch()
    if mask == "unpadded":
        del inputs["attention_mask"]
    targets = random_targets(rng, some_positions(rng), ROWS, clm_weight=1.0)
    labels = torch.full((len(LENGTHS) * WIDTH,), IGNORED)
    labels[targets.positions + 1] = targets.gold = inputs["input_ids"].flatten()[targets.positions + 1]
    outputs, gradients = learned(taught(model), targets, **inputs)
    plain = model(**inputs, labels=labels.reshape(len(LENGTHS), WIDTH), use_cache=False)
    added = (outputs.loss - outputs.clm.sum()).item()
    assert added == pytest.approx(5.0 * plain.aux_loss.item() * len(targets.gold), rel=1e-4)
    assert added > 0.1 * outputs.loss.item()
    (plain.loss * len(targets.gold)).backward()
    assert_near(outputs.loss, plain.loss * len(targets.gold), 2e-5)
    assert_same_gradients(gradients, gradients_of(model), 2e-5)


def test_there_is_no_load_balancing_loss_unless_the_config_wants_it() -> None:
    rng = np.random.default_rng(9)
    targets = random_targets(rng, some_positions(rng), ROWS)
    outputs = run(taught(new_model("mixtral")), targets, **batch())
    assert_near(outputs.loss, weighted(outputs.clm, outputs.fusion, targets), 1e-6)


# Without targets


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_targets_a_model_does_what_it_did(layout: str) -> None:
    model = new_model(layout, torch.float32).eval()
    learner, inputs = taught(model), batch()
    rng = np.random.default_rng(0)
    learner(**inputs, targets=random_targets(rng, some_positions(rng), ROWS))
    with torch.no_grad():
        assert torch.equal(learner(**inputs).logits, model(**inputs).logits)
        assert torch.equal(learner(inputs["input_ids"]).logits, model(inputs["input_ids"]).logits)
        labelled = {**inputs, "labels": inputs["input_ids"]}
        assert torch.equal(learner(**labelled).loss, model(**labelled).loss)
        assert learner(**inputs, return_dict=False)[0].shape == (len(LENGTHS), WIDTH, ROWS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generation_is_as_it_was(layout: str) -> None:
    """Padded in front, greedily, with cache and without."""
    model = new_model(layout, torch.float32).eval()
    learner, inputs = taught(model), {name: tensor.flip(1) for name, tensor in batch().items()}
    for cache in (True, False):
        asked = {**inputs, "max_new_tokens": 6, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
        assert torch.equal(learner.generate(**asked), model.generate(**asked))
    alone = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    padded = torch.cat([torch.zeros(1, 4).long(), batch()["input_ids"][:1]], 1)
    assert torch.equal(learner.generate(padded, **alone), model.generate(padded, **alone))


# Memory


class Largest(TorchDispatchMode):
    """The most elements that any tensor's memory holds, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // 4, one.numel())
        return found


VOCABULARY, AT_ONCE = 4000, 5


def largest(layout: str, chunk: int | None, autocast: bool = False) -> tuple[int, int, int]:
    """Elements of the largest tensor of a step, of the head's weights, and of all positions' logits."""
    model = tiny_sources.new_source(layout, VOCABULARY).train()
    give_fusion_loss(model, chunk)
    rng, inputs = np.random.default_rng(0), batch()
    targets = random_targets(rng, some_positions(rng, 1.0), VOCABULARY, bucket=True, norms=True)
    dtype = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with Largest() as seen:
        with dtype:
            loss = model(**inputs, targets=targets)["loss"]
        loss.backward()
    assert len(targets.gold) < len(LENGTHS) * WIDTH
    head = model.get_output_embeddings().weight.numel()
    return seen.elements, head, len(targets.gold) * VOCABULARY


@pytest.mark.parametrize("layout", ["llama", "gemma2", "mixtral"])
def test_no_tensor_is_as_large_as_the_logits_of_all_positions(layout: str) -> None:
    found, head, logits_SV = largest(layout, AT_ONCE)
    assert found == head > AT_ONCE * VOCABULARY  # nothing is larger than the head's weights
    assert head < logits_SV


@pytest.mark.parametrize("chunk", [1, 5])
def test_no_logits_are_kept_for_the_backward_pass(chunk: int) -> None:
    """All that is kept together is smaller than the logits of one position."""
    rng, kept = np.random.default_rng(0), list[int]()
    targets = random_targets(rng, list(range(40)), VOCABULARY, norms=True)
    hidden_SH = torch.randn(40, 16, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = sparse_terms(nn.Linear(16, VOCABULARY), hidden_SH, targets, chunk)
    assert sum(kept) < VOCABULARY
    weighted(found.clm, found.fusion, targets).backward()


def test_under_autocast_neither() -> None:
    found, head, logits_SV = largest("llama", AT_ONCE, autocast=True)
    assert found == head < logits_SV


def test_a_chunk_of_all_positions_would_be_noticed() -> None:
    found, _, logits_SV = largest("llama", 1 << 20)
    assert found >= logits_SV
