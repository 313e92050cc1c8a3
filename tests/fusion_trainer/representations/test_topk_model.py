"""A model queried at some positions gives what its plain forward pass gives, for every layout."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tiny_sources
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusion_trainer.representations.split_model import positions_at_a_time
from fusion_trainer.representations.topk_model import TopKModel

TOKENS, ROWS = 400, 424
"""Ids of the tokenizer, and rows of the models: the last rows stand for nothing."""
KNOWN = frozenset(range(TOKENS)) - {5, 130}
"""Two ids within the range stand for nothing either."""
LENGTHS = (23, 17, 9)


@contextlib.contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def batch(lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Random tokens [B, L], padded at the end, and the mask; no mask where nothing is padded."""
    ids_BL = torch.randint(TOKENS, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    mask_BL = torch.zeros_like(ids_BL)
    for row, length in enumerate(lengths):
        mask_BL[row, :length] = 1
    return ids_BL * mask_BL, None if mask_BL.all() else mask_BL


def queried_positions(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Some (row, position), the first and the last that have a next token among them."""
    return [
        (row, p) for row, length in enumerate(lengths) for p in range(length - 1) if p % 3 != 1 or p == length - 2
    ]


@torch.no_grad()
def assert_answers_as_the_plain_model(topk_model: TopKModel, lengths: Sequence[int], k: int = 10) -> None:
    """Row by row through the plain model, unpadded, and the softmax in float64."""
    ids_BL, mask_BL = batch(lengths)
    places = queried_positions(lengths)
    flat = torch.tensor([row * ids_BL.shape[1] + position for row, position in places])
    gold = torch.tensor([int(ids_BL[row, position + 1]) for row, position in places])
    found = topk_model.distributions(ids_BL, mask_BL, flat, gold, k)
    logits = [
        topk_model.model(input_ids=ids_BL[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)
    ]
    dense_SV = torch.stack([logits[row][position] for row, position in places]).double().log_softmax(-1).numpy()
    assert dense_SV.shape[1] == topk_model.rows == ROWS
    ranked_SV = np.full_like(dense_SV, -np.inf)
    ranked_SV[:, sorted(KNOWN)] = dense_SV[:, sorted(KNOWN)]
    ids_SK = found.ids_CK.numpy()
    assert set(ids_SK.flatten().tolist()) <= KNOWN
    best_SK = -np.sort(-ranked_SV, axis=1)[:, :k]
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(found.logprobs_CK.numpy(), best_SK, **close)
    np.testing.assert_allclose(np.take_along_axis(dense_SV, ids_SK, 1), best_SK, **close)
    kept = np.exp(np.take_along_axis(dense_SV, ids_SK, 1)).sum(1)
    np.testing.assert_allclose(found.tail_C.numpy(), 1 - kept, **close)
    np.testing.assert_allclose(found.gold_logprob_C.numpy(), dense_SV[np.arange(len(places)), gold], **close)


@pytest.fixture(scope="module", params=list(tiny_sources.LAYOUTS))
def topk_model(request: pytest.FixtureRequest) -> TopKModel:
    with no_warning():
        return TopKModel(tiny_sources.new_source(request.param, ROWS), KNOWN)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("lengths", [LENGTHS, (12, 12)], ids=["padded", "unpadded"])
def test_distributions_are_those_of_the_plain_forward_pass(
    topk_model: TopKModel, lengths: tuple[int, ...], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk:
        monkeypatch.setattr(topk_model, "chunk", chunk)
    assert topk_model.separable
    assert_answers_as_the_plain_model(topk_model, lengths)


@torch.no_grad()
def test_a_query_leaves_the_model_as_it_was(topk_model: TopKModel) -> None:
    ids_BL, mask_BL = batch(LENGTHS)
    before = topk_model.model(input_ids=ids_BL, attention_mask=mask_BL).logits
    assert torch.equal(topk_model.bare_forward(ids_BL, mask_BL), before)
    topk_model.distributions(ids_BL, mask_BL, torch.tensor([0, 1]), torch.tensor([1, 2]), 5)
    assert "forward" not in vars(topk_model.split.layers)
    assert torch.equal(topk_model.model(input_ids=ids_BL, attention_mask=mask_BL).logits, before)
    greedy = topk_model.model.generate(
        ids_BL[:1, :5], attention_mask=torch.ones(1, 5).long(), max_new_tokens=4, do_sample=False
    )
    for length in range(5, 9):
        assert greedy[0, length] == topk_model.model(input_ids=greedy[:, :length]).logits[0, -1].argmax()


def test_a_forward_that_others_have_put_in_place_is_put_back() -> None:
    """accelerate does that to the parts of a model that is spread over devices."""
    model = tiny_sources.new_source("llama", ROWS)
    calls = []
    plain = model.model.forward

    def hooked(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return plain(*args, **kwargs)

    model.model.forward = hooked
    topk_model = TopKModel(model, KNOWN)
    assert model.model.forward is hooked
    assert_answers_as_the_plain_model(topk_model, LENGTHS)
    assert model.model.forward is hooked
    assert calls


@pytest.mark.parametrize(("layout", "setting"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_what_a_model_does_after_its_head_changes_its_distributions(layout: str, setting: str) -> None:
    """So the layouts above do test it."""
    plain, other = (
        TopKModel(tiny_sources.new_source(layout, ROWS, **own), KNOWN) for own in ({}, {setting: 0.125})
    )
    ids_BL, mask_BL = batch(LENGTHS)
    flat, gold = torch.tensor([0, 3]), torch.tensor([1, 2])
    one, two = (model.distributions(ids_BL, mask_BL, flat, gold, 10).logprobs_CK for model in (plain, other))
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_separate_too_and_are_reduced_in_float32(dtype: torch.dtype) -> None:
    model = tiny_sources.new_source("mistral", ROWS).to(dtype)
    with no_warning():
        topk_model = TopKModel(model, KNOWN)
    assert topk_model.separable
    ids_BL, _ = batch((12, 12))
    flat, gold = torch.arange(11), ids_BL[0, 1:]
    found = topk_model.distributions(ids_BL, None, flat, gold, 10)
    with torch.no_grad():
        dense = model(input_ids=ids_BL).logits[0, :11].double().log_softmax(-1)
    assert found.logprobs_CK.dtype == torch.float32
    total = found.logprobs_CK.double().exp().sum(1) + found.tail_C
    torch.testing.assert_close(total, torch.ones(11).double(), rtol=0, atol=1e-5)
    gold_logprob = dense.gather(1, gold[:, None])[:, 0]
    scale = {torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]  # a logit's last place
    torch.testing.assert_close(found.gold_logprob_C.double(), gold_logprob, rtol=0, atol=scale)


class SkippingModel(LlamaForCausalLM):
    """Its logits come from its layers' output and, past the layers, from the tokens themselves."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.shortcut = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        output = super().forward(input_ids=input_ids, **options)
        output.logits = output.logits + self.shortcut(input_ids)
        return output


def test_a_model_whose_head_cannot_be_separated_warns_and_is_right() -> None:
    torch.manual_seed(0)
    model = SkippingModel(tiny_sources.LAYOUTS["llama"](vocab_size=ROWS)).eval()
    with pytest.warns(UserWarning, match=r"SkippingModel .* every position.*--batch-tokens"):
        topk_model = TopKModel(model, KNOWN)
    assert not topk_model.separable
    for chunk in (topk_model.chunk, 4):
        topk_model.chunk = chunk
        assert_answers_as_the_plain_model(topk_model, LENGTHS)


def test_logits_exist_for_a_chunk_of_supervised_positions_only() -> None:
    model = tiny_sources.new_source("llama", ROWS)
    topk_model = TopKModel(model, KNOWN)
    topk_model.chunk = 8
    seen: list[tuple[int, ...]] = []
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(tuple(logits.shape)))
    ids_BL, mask_BL = batch(LENGTHS)
    topk_model.distributions(ids_BL, mask_BL, torch.arange(20), torch.zeros(20).long(), 10)
    hook.remove()
    assert seen == [(1, 8, ROWS), (1, 8, ROWS), (1, 4, ROWS)]


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "gpt_bigcode", "mamba2"])
def test_a_model_that_passes_on_more_than_hidden_states_is_separated_too(architecture: str) -> None:
    """Image features, cross-attentions and caches of the layers do not change the logits."""
    torch.manual_seed(0)
    _, config = ARCHITECTURES[architecture]()
    with no_warning():
        topk_model = TopKModel(AutoModelForCausalLM.from_config(config).eval(), frozenset(range(48)))
    ids_BL = torch.arange(24).reshape(2, 12)
    found = topk_model.distributions(ids_BL, None, torch.arange(11), ids_BL[0, 1:], 10)
    dense = topk_model.bare_forward(ids_BL, None)[0, :11].double().log_softmax(-1)
    torch.testing.assert_close(found.logprobs_CK.double(), dense.topk(10).values, rtol=1e-4, atol=1e-4)


class AttentiveModel(LlamaForCausalLM):
    """Its logits come from its layers' output and from their attentions."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        output = super().forward(input_ids=input_ids, output_attentions=True, **options)
        output.logits = output.logits * output.attentions[0].mean()
        return output


def test_a_model_whose_head_needs_more_than_hidden_states_is_queried_whole() -> None:
    torch.manual_seed(0)
    config = tiny_sources.LAYOUTS["llama"](vocab_size=ROWS, attn_implementation="eager")
    with pytest.warns(UserWarning, match="every position"):
        topk_model = TopKModel(AttentiveModel(config).eval(), KNOWN)
    assert "forward" not in vars(topk_model.split.layers)
    assert_answers_as_the_plain_model(topk_model, (12,))


@pytest.mark.parametrize(
    ("device", "vocabulary", "expected"),
    [
        ("cpu", 32_000, 262),
        ("cpu", 262_144, 256),  # with 32 MiB of logits it were 32, at 2.5 times the cost of each
        ("cuda", 262_144, 512),
        ("xpu", 32_000, 4194),
    ],
)
def test_positions_that_go_through_a_head_at_once(device: str, vocabulary: int, expected: int) -> None:
    assert positions_at_a_time(torch.device(device), vocabulary) == expected
