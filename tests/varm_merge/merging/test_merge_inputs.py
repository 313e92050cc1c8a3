"""What a run reads: checkpoints of any dtype and file format, adapters, other vocabularies, missing tensors."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import peft
import pytest
import runs
import tiny_models
import torch
import transformers
from tiny_models import Family

from varm_common.errors import UserError

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("granularity", ["layer", "matrix", "parameter"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_checkpoints(
    dtype: torch.dtype, granularity: str, family: Callable[..., Family], tmp_path: Path
) -> None:
    checkpoints = family("mistral", dtype=dtype)
    merged = runs.merge(runs.recipe(checkpoints, granularity=granularity), tmp_path)
    unit_of = {"layer": runs.LAYER, "matrix": runs.MATRIX, "parameter": None}[granularity]
    assert {tensor.dtype for tensor in merged.tensors.values()} == {dtype}
    runs.assert_merges(merged, checkpoints, unit_of)


@pytest.mark.parametrize("granularity", ["layer", "matrix"])
@pytest.mark.parametrize(
    ("stored", "line", "measured", "written"),
    [
        (F32, "dtype: bfloat16", BF16, BF16),  # mergekit casts the inputs before the method sees them
        (F32, "out_dtype: bfloat16", F32, BF16),
        (BF16, "dtype: float32", BF16, F32),
        (BF16, "{dtype: float32, out_dtype: float16}", BF16, F16),
    ],
)
def test_dtype_is_of_the_inputs_and_out_dtype_of_the_output(
    stored: torch.dtype,
    line: str,
    measured: torch.dtype,
    written: torch.dtype,
    granularity: str,
    family: Callable[..., Family],
    tmp_path: Path,
) -> None:
    checkpoints = family("mistral", dtype=stored)
    lines = line.strip("{}").split(", ")
    merged = runs.merge(runs.recipe(checkpoints, *lines, granularity=granularity), tmp_path)
    assert {tensor.dtype for tensor in merged.tensors.values()} == {written}
    unit_of = {"layer": runs.LAYER, "matrix": runs.MATRIX}[granularity]
    runs.assert_merges(merged, checkpoints, unit_of, lambda folder: runs.checkpoint(folder, measured))


def test_checkpoints_of_different_dtypes_are_merged_in_the_wider(
    family: Callable[..., Family], tmp_path: Path
) -> None:
    wide, narrow = family("mistral"), family("mistral", dtype=BF16)
    checkpoints = Family(wide.pivot, (narrow.targets[0], wide.targets[1]))
    merged = runs.merge(runs.recipe(checkpoints, granularity="module"), tmp_path)
    assert {tensor.dtype for tensor in merged.tensors.values()} == {F32}
    runs.assert_merges(merged, checkpoints, runs.MODULE)


@pytest.mark.parametrize("options", [{}, {"lazy_unpickle": True}])
def test_shards_and_pickles_are_read_like_single_safetensors_files(
    options: dict[str, bool], mistral: Family, tmp_path: Path
) -> None:
    sharded = tiny_models.resave(mistral.pivot, tmp_path / "sharded", shard_size="5KB")
    pickled = tiny_models.resave(mistral.targets[0], tmp_path / "pickled", pickled=True)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    checkpoints = Family(sharded, (pickled, mistral.targets[1]))
    merged = runs.merge(runs.recipe(checkpoints, granularity="layer"), tmp_path / "out", **options)
    runs.assert_merges(merged, checkpoints, runs.LAYER)


def test_paths_may_have_spaces(mistral: Family, tmp_path: Path) -> None:
    checkpoints = Family(
        *(
            shutil.copytree(mistral.pivot, tmp_path / "my pivot"),
            tuple(shutil.copytree(target, tmp_path / f"my {target.name}") for target in mistral.targets),
        )
    )
    merged = runs.merge(runs.recipe(checkpoints, granularity="layer"), tmp_path / "my merge")
    runs.assert_merges(merged, checkpoints, runs.LAYER)


@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
def test_adapters_are_targets(granularity: str, mistral: Family, tmp_path: Path) -> None:
    unit_of = {"model": runs.whole_model, "layer": runs.LAYER, "matrix": runs.MATRIX}[granularity]
    adapters = [tiny_models.save_adapter(mistral.pivot, tmp_path / f"adapter_{seed}", seed) for seed in (1, 2)]
    targets = tuple(Path(f"{mistral.pivot}+{adapter}") for adapter in adapters)
    text = runs.recipe(Family(mistral.pivot, targets), granularity=granularity)
    merged = runs.merge(text, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))

    def adapted(adapter: Path) -> runs.Arrays:
        model = transformers.AutoModelForCausalLM.from_pretrained(mistral.pivot)
        return runs.arrays(peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())

    inputs = {target: adapted(adapter) for target, adapter in zip(targets, adapters, strict=True)}
    runs.assert_oracle(merged, runs.checkpoint(mistral.pivot), inputs, unit_of)


VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def tokenized(mistral: Family, tmp_path: Path) -> tuple[Family, dict[Path, dict[str, int]]]:
    """A pivot and two targets; the second target's tokenizer orders tokens differently and has some of its own."""
    one, other = "the cat sat on the mat", "a mat is on the cat, that is the dog"
    texts = dict(zip([mistral.pivot, *mistral.targets], [one, one, other], strict=True))
    vocabularies = {}
    for source, text in texts.items():
        folder = shutil.copytree(source, tmp_path / source.name)
        vocabularies[folder] = tiny_models.train_tokenizer(folder, text)
    pivot, *targets = vocabularies
    assert vocabularies[pivot].keys() - vocabularies[targets[1]].keys()
    assert vocabularies[targets[1]].keys() - vocabularies[pivot].keys()
    return Family(pivot, tuple(targets)), vocabularies


def in_vocabulary(
    vocabulary: Mapping[str, int], folder: Path, family: Family, vocabularies: Mapping[Path, Mapping[str, int]]
) -> runs.Arrays:
    """The tensors of one model in a new vocabulary; a token it lacks has the pivot's row, or its only owner's."""
    tensors = runs.checkpoint(folder)
    donors = [folder, family.pivot, family.targets[1]]
    for name in VOCABULARY_TENSORS:
        rows = np.zeros((len(vocabulary), tensors[name].shape[1]))
        for token, row in vocabulary.items():
            donor = next(donor for donor in donors if token in vocabularies[donor])
            rows[row] = runs.checkpoint(donor)[name][vocabularies[donor][token]]
        tensors[name] = rows
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
@pytest.mark.parametrize("source", ["base", "union"])
def test_vocabulary_tensors_are_measured_after_they_are_remapped(
    source: str,
    granularity: str,
    tokenized: tuple[Family, dict[Path, dict[str, int]]],
    tmp_path: Path,
) -> None:
    checkpoints, vocabularies = tokenized
    unit_of = {"model": runs.whole_model, "layer": runs.LAYER, "matrix": runs.MATRIX}[granularity]
    text = runs.recipe(checkpoints, f"tokenizer: {{source: {source}}}", granularity=granularity)
    merged = runs.merge(text, tmp_path / "out")
    vocabulary = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert len(vocabulary) == len(merged.tensors["lm_head.weight"])
    runs.assert_merges(
        merged,
        checkpoints,
        unit_of,
        lambda folder: in_vocabulary(vocabulary, folder, checkpoints, vocabularies),
    )


@pytest.mark.parametrize("granularity", ["model", "matrix"])
def test_vocabulary_tensors_are_measured_after_they_are_truncated(
    granularity: str, mistral: Family, tmp_path: Path
) -> None:
    def lengthen(tensors: dict[str, torch.Tensor]) -> None:
        for name in VOCABULARY_TENSORS:
            tensors[name] = torch.cat([tensors[name], torch.ones(8, tensors[name].shape[1])])

    longer = shutil.copytree(mistral.targets[1], tmp_path / "longer")
    tiny_models.edit(longer, lengthen)
    checkpoints = Family(mistral.pivot, (mistral.targets[0], longer))
    text = runs.recipe(checkpoints, granularity=granularity)
    merged = runs.merge(text, tmp_path / "out", unsafe_truncate_embeddings=True)

    def truncated(folder: Path) -> runs.Arrays:
        tensors = runs.checkpoint(folder)
        return tensors | {name: tensors[name][: tiny_models.VOCABULARY] for name in VOCABULARY_TENSORS}

    unit_of = {"model": runs.whole_model, "matrix": runs.MATRIX}[granularity]
    runs.assert_merges(merged, checkpoints, unit_of, truncated)


def test_tied_embeddings_stand_in_for_a_head_that_only_one_target_has(
    family: Callable[..., Family], tmp_path: Path
) -> None:
    tied = family("qwen2")
    assert "lm_head.weight" not in runs.checkpoint(tied.pivot)
    untied = shutil.copytree(tied.targets[1], tmp_path / "untied")
    tiny_models.edit(untied, lambda tensors: tensors.update({"lm_head.weight": torch.ones(40, 16)}))
    checkpoints = Family(tied.pivot, (tied.targets[0], untied))
    merged = runs.merge(runs.recipe(checkpoints, granularity="model"), tmp_path / "out")

    def read(folder: Path) -> runs.Arrays:
        tensors = runs.checkpoint(folder)
        return {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}

    runs.assert_merges(merged, checkpoints, runs.whole_model, read)


def test_a_target_without_an_optional_tensor_is_averaged_over_what_it_has(
    family: Callable[..., Family], tmp_path: Path
) -> None:
    complete, missing = family("mpt"), "transformer.blocks.1.norm_2.weight"
    partial = shutil.copytree(complete.targets[1], tmp_path / "partial")
    tiny_models.edit(partial, lambda tensors: tensors.pop(missing))
    checkpoints = Family(complete.pivot, (complete.targets[0], partial))
    merged = runs.merge(runs.recipe(checkpoints, granularity="layer"), tmp_path / "out")

    def mean_square(target: Path) -> float:
        tensors = runs.checkpoint(target)
        deltas = [tensors[name] - pivot[name] for name in tensors if "blocks.1." in name]
        return float(np.mean(np.concatenate([delta.ravel() for delta in deltas]) ** 2))

    pivot = runs.checkpoint(checkpoints.pivot)
    statistics = [mean_square(target) for target in checkpoints.targets]
    weights = merged.weights("transformer.blocks.1")
    np.testing.assert_allclose(weights, np.array(statistics) / sum(statistics), rtol=1e-9)
    assert torch.equal(merged.tensors[missing], runs.read_tensors(complete.targets[0])[missing])
    name = "transformer.blocks.1.ffn.up_proj.weight"
    expected = sum(
        weight * runs.checkpoint(target)[name] for weight, target in zip(weights, checkpoints.targets, strict=True)
    )
    runs.assert_rounded(merged.tensors[name], expected, name)


def test_an_optional_tensor_that_only_the_pivot_has_is_kept(family: Callable[..., Family], tmp_path: Path) -> None:
    complete, missing = family("mpt"), "transformer.blocks.1.norm_2.weight"
    targets = [shutil.copytree(target, tmp_path / target.name) for target in complete.targets]
    for target in targets:
        tiny_models.edit(target, lambda tensors: tensors.pop(missing))
    merged = runs.merge(runs.recipe(Family(complete.pivot, tuple(targets)), granularity="layer"), tmp_path / "out")
    assert torch.equal(merged.tensors[missing], runs.read_tensors(complete.pivot)[missing])
    assert missing not in json.dumps(merged.log["units"])


def test_a_tensor_that_the_pivot_lacks_is_an_error(family: Callable[..., Family], tmp_path: Path) -> None:
    complete, missing = family("mpt"), "transformer.blocks.1.norm_2.weight"
    pivot = shutil.copytree(complete.pivot, tmp_path / "pivot")
    tiny_models.edit(pivot, lambda tensors: tensors.pop(missing))
    text = runs.recipe(Family(pivot, complete.targets), granularity="layer")
    with pytest.raises(UserError, match=f"the pivot {pivot} has no tensor `{missing}`"):
        runs.merge(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("granularity", ["model", "matrix"])
def test_buffers_of_integers_are_copied_and_weigh_nothing(
    granularity: str, family: Callable[..., Family], tmp_path: Path
) -> None:
    checkpoints = family("gpt_neox")
    merged = runs.merge(runs.recipe(checkpoints, granularity=granularity), tmp_path)
    mask = "gpt_neox.layers.1.attention.bias"
    assert torch.equal(merged.tensors[mask], runs.read_tensors(checkpoints.pivot)[mask])
    assert f'"{mask}"' not in json.dumps(merged.log["units"])
