"""Extraction, training and scoring on GPUs, without one: no two devices meet, and numbers are those of the CPU.

The last test removes each copy to a device from the source, and an error follows.
"""

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_fusion
import tiny_sources
import torch
from pretend_gpu import GpuTensor, module_on_gpu, on_gpu, pretend_gpu
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fusion_trainer.representations import split_model, topk_model, transformers_engine
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.representations.topk import TopK, top_k
from fusion_trainer.training import evaluate, loss, rounding
from fusion_trainer.training.batches import Collator, TokenFile
from fusion_trainer.training.fusion import Rule
from fusion_trainer.training.loss import Targets, give_fusion_loss
from fusion_trainer.training.trainer import FusionTrainer
from varm_common.errors import UserError
from varm_merge.evaluation.answers import Prompt
from varm_merge.evaluation.local import Sampler

TOKENS, ROWS = 400, 424
IDS_BL = torch.randint(TOKENS, (3, 23), generator=torch.Generator().manual_seed(3))
MASK_BL = torch.ones_like(IDS_BL).index_put((torch.tensor(1), torch.arange(17, 23)), torch.tensor(0))
POSITIONS_S = torch.tensor([1, 5, 22 + 7, 30, 46, 60])
GOLD_S = torch.tensor([1, 2, 3, 4, 5, 6])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same few positions at a time on both devices."""
    for module in (topk_model, loss, evaluate):
        monkeypatch.setattr(module, "positions_at_a_time", lambda *_: 4)


def values(result: Any) -> list[Any]:
    """The numbers of a result's tensors."""
    parts = vars(result).values() if isinstance(result, TopK) else result
    return [part.tolist() for part in parts if isinstance(part, Tensor)]


def assert_near(found: list[Any], expected: list[Any]) -> None:
    """Equal but for the order of sums: attention has another kernel."""
    for one, other in zip(found, expected, strict=True):
        scale = max(1e-3, float(np.abs(other).max(initial=0.0)))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("vocabulary", [300, 70])
def test_top_k(vocabulary: int) -> None:
    reserve = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(5, vocabulary, generator=reserve),
        torch.randint(vocabulary, (5,), generator=reserve),
        torch.tensor([3, 64]),
    )
    logits_CV, gold_C, absent = inputs
    expected = values(top_k(logits_CV.clone(), gold_C, 2, absent))
    with pretend_gpu():
        logits_CV, gold_C, absent = map(on_gpu, inputs)
        assert values(top_k(logits_CV, gold_C, 2, absent)) == expected


def queried(model: Any) -> list[Any]:
    """What an extraction computes of a batch; its inputs are where the token ids go."""
    made = topk_model.TopKModel(model, frozenset(range(TOKENS)) - {5})
    inputs = [tensor.to(made.device) for tensor in (IDS_BL, MASK_BL, POSITIONS_S, GOLD_S)]
    return values(made.distributions(*inputs, 7))


def spread(model: Any, places: dict[nn.Module, str]) -> None:
    """The model over several GPUs, as by ``device_map: auto``: inputs follow the weights."""

    def follow(module: nn.Module, device: str) -> None:
        def moved(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            move = torch.utils._pytree.tree_map_only(Tensor, lambda one: one.to(device), (args, kwargs))
            return move[0], move[1]

        module.register_forward_pre_hook(moved, with_kwargs=True)

    for module, device in places.items():
        module_on_gpu(module, device)
        follow(module, device)


def over_three_gpus(model: Any) -> Any:
    """Of a Llama: ids go to the first, hidden states come from the second, logits from the third."""
    layers = model.model
    places: dict[nn.Module, str] = {layers.embed_tokens: "cuda:0", layers.rotary_emb: "cuda:1"}
    spread(model, {**places, **dict.fromkeys([*layers.layers, layers.norm], "cuda:1"), model.lm_head: "cuda:2"})
    return model


@pytest.mark.parametrize("layout", ["llama", "gemma2", "mpt"])
def test_a_model_on_a_gpu_is_queried(layout: str) -> None:
    model = tiny_sources.new_source(layout, ROWS)
    expected = queried(model)
    with pretend_gpu():
        assert queried(module_on_gpu(model)) == expected


def test_a_model_over_several_gpus_is_queried() -> None:
    model = tiny_sources.new_source("llama", ROWS)
    expected = queried(model)
    with pretend_gpu():
        assert queried(over_three_gpus(model)) == expected


@pytest.fixture
def loads_onto_a_gpu(fusion: tiny_fusion.World, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An extraction of `bytes` has its model on a GPU."""
    model = AutoModelForCausalLM.from_pretrained(fusion.folder / "bytes").eval()
    with pretend_gpu():
        monkeypatch.setattr(transformers_engine, "load_causal_lm", lambda *_, **__: module_on_gpu(model))
        yield


def bytes_of(store: RepresentationStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.glob("*.arrow")}


@pytest.mark.slow
def test_a_store_is_the_same_to_the_byte(fusion: tiny_fusion.World, tmp_path: Path, request: Any) -> None:
    """The whole of an extraction: pinned copies to the GPU, copies to the host that are waited for, shards."""
    settings = {"dialogues": fusion.dialogues.folder, "batch_tokens": 300, "shard_tokens": 1500}
    expected = store_of(fusion, tmp_path / "cpu", **settings)
    request.getfixturevalue("loads_onto_a_gpu")
    found = store_of(fusion, tmp_path / "gpu", **settings)
    assert bytes_of(found) == bytes_of(expected)


@pytest.mark.slow
@pytest.mark.usefixtures("loads_onto_a_gpu")
def test_copies_to_the_host_that_are_not_waited_for_are_found(
    fusion: tiny_fusion.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda _self: None)
    with pytest.raises(UserError, match="NaN"):
        store_of(fusion, tmp_path / "gpu")


def store_of(fusion: tiny_fusion.World, output: Path, **changed: Any) -> RepresentationStore:
    return tiny_fusion.extract_store(fusion.folder, "bytes", output=output, **changed)


# Training and scoring


def batch_of(fusion: tiny_fusion.World, packed: bool) -> dict[str, Tensor]:
    data = fusion.data("multi", rule=Rule("avg_ce", tail="bucket"))
    examples = [data[item][0] for item in range(3)]
    rows = [[examples[0], examples[1]], [examples[2]]] if packed else [[example] for example in examples]
    return Collator(0, packed, tail=True)(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step(fusion: tiny_fusion.World, packed: bool) -> None:
    """Loss, both terms, the squares of their gradients, and the gradient of every weight."""

    def step(model: Any, batch: dict[str, Tensor]) -> list[Any]:
        targets = Targets(
            positions=batch["positions"],
            gold=batch["gold"],
            ids=batch["fused_ids"],
            probabilities=batch["fused_probabilities"],
            tail=batch["fused_tail"],
            clm_weight=torch.full_like(batch["confidence"], 0.7),
            norms=True,
        )
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        give_fusion_loss(model)
        loss = model(**inputs, targets=targets)["loss"]
        loss.backward()
        assert targets.terms is not None
        return values([loss, *targets.terms, *(weight.grad for weight in model.parameters())])

    batch = batch_of(fusion, packed)
    expected = step(fusion.model(), batch)
    model = fusion.model()
    with pretend_gpu():
        module_on_gpu(model)
        found = step(model, {name: on_gpu(tensor) for name, tensor in batch.items()})
        assert all(isinstance(weight.grad, GpuTensor) for weight in model.parameters())
    assert_near(found, expected)


def test_the_trainers_sums_and_evaluation(fusion: tiny_fusion.World, tmp_path: Path) -> None:
    def computed(trainer: FusionTrainer, model: Any, batch: dict[str, Tensor], count: Tensor) -> list[Any]:
        trainer._prepare_inputs = lambda inputs: inputs  # type: ignore[method-assign]  # they are in place
        give_fusion_loss(model)
        loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=count)
        _, sums, sizes = trainer.prediction_step(model.eval(), batch, False)
        return values([loss, sums, sizes, *trainer._sums.values()])

    batch, count = batch_of(fusion, packed=False), torch.tensor(40)
    models = [fusion.model(), fusion.model()]
    trainers = [fusion.trainer(tmp_path, models=("pivot", "bytes", "unigram")) for _ in models]
    expected = computed(trainers[0], models[0], batch, count)
    with pretend_gpu():
        there = {name: on_gpu(tensor) for name, tensor in batch.items()}
        found = computed(trainers[1], module_on_gpu(models[1]), there, on_gpu(count))
    assert_near(found, expected)


def test_rows_are_scored(fusion: tiny_fusion.World) -> None:
    file = TokenFile(fusion.tokens)
    rows = [file[number] for number in range(4)]

    def scored(model: Any) -> list[evaluate.Sums]:
        return list(evaluate._row_sums(split_model.SplitModel(model), rows, 512))

    model = fusion.model()
    expected = scored(model)
    with pretend_gpu():
        assert scored(module_on_gpu(model)) == expected


def test_a_trained_model_is_compared_with_its_pivot(fusion: tiny_fusion.World, tmp_path: Path) -> None:
    model = fusion.model()
    trained = {name: weight.detach() * (1 + 1e-3) for name, weight in model.state_dict().items()}
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    expected = rounding.rounding(fusion.folder / "pivot", tmp_path, trained)
    with pretend_gpu():
        there = {name: on_gpu(weight) for name, weight in trained.items()}
        assert rounding.rounding(fusion.folder / "pivot", tmp_path, there) == expected is not None


def test_answers_are_sampled() -> None:
    prompts = [Prompt([], 0.0, "a"), Prompt([], 0.7, "b"), Prompt([], 1.3, "c")]
    ids_BT, scores_BV = torch.zeros(3, 4, dtype=torch.long), torch.randn(3, 50)
    expected = Sampler(prompts, 20, 0.9)(ids_BT, scores_BV).tolist()
    with pretend_gpu():
        assert Sampler(prompts, 20, 0.9)(on_gpu(ids_BT), on_gpu(scores_BV)).tolist() == expected


# Without the copies


COPIES = re.findall(r"\w+\.to\(\w+\.device\)", inspect.getsource(topk_model))


def without(number: int) -> Any:
    """``topk_model`` without its copy of this number."""
    source, places = inspect.getsource(topk_model), re.compile(r"(\w+)\.to\(\w+\.device\)")
    start, stop = [match.span() for match in places.finditer(source)][number]
    changed = types.ModuleType("changed")
    exec(source[:start] + places.sub(r"\1", source[start:stop]) + source[stop:], vars(changed))
    return changed


@pytest.mark.parametrize("number", range(len(COPIES)), ids=COPIES)
def test_a_copy_that_is_left_out_is_found(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the head apart, and with logits at every position."""
    monkeypatch.setattr(topk_model, "TopKModel", without(number).TopKModel)
    model, error = tiny_sources.new_source("llama", ROWS), None
    with pretend_gpu():
        over_three_gpus(model)
        trial = split_model.SplitModel.trial
        for separable in (True, False):
            found = trial(split_model.SplitModel(model))[0], separable
            monkeypatch.setattr(split_model.SplitModel, "trial", lambda _split, found=found: found)
            try:
                queried(model)
            except RuntimeError as raised:
                error = raised
    assert "on the same device" in str(error)
