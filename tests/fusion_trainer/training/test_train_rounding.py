"""How much of a training 16 bits keep: the share that is measured when a target is written, and its sentence."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sources
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny_fusion import World, weights
from transformers import AutoModelForCausalLM

import fusion_trainer.training.target as targets
from fusion_trainer.cli import main
from fusion_trainer.training.rounding import rounding, rounding_sentence
from fusion_trainer.training.train import train

CLM = {"kind": "none", "clm_weight": 1.0}
LIGHT = {"learning_rate": 2e-5}
"""Three steps that move weights by up to 6e-5: the pivot's are of the order 0.02, and 1 in the norms."""
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def recorded(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((target / "fusion.json").read_text())["rounding"]
    return found


def bfloat16_bits(tensor: torch.Tensor) -> Any:
    """The upper half of float32, to the nearest and of two equally near to the even."""
    bits = tensor.float().numpy().view(np.uint32).astype(np.int64)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def share_kept(pivot: Path, target: Path) -> tuple[int, float]:
    """Elements of the tensors that a float32 target has moved, and which share of them bfloat16 tells apart."""
    start, end = weights(pivot), weights(target)
    moved = [name for name in start if (end[name].double() - start[name].double()).abs().max() > 0]
    differ = np.concatenate([(bfloat16_bits(end[n]) != bfloat16_bits(start[n])).ravel() for n in moved])
    return len(differ), float(differ.mean())


@pytest.fixture(scope="module")
def pivot(fusion: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16; for reading only."""
    folder = shutil.copytree(fusion.folder / "pivot", tmp_path_factory.mktemp("narrow") / "pivot")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def light(fusion: World, pivot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A light fine-tune of it, written as by default; for reading only."""
    return train(
        fusion.config(tmp_path_factory.mktemp("light") / "target", **CLM, pivot=str(pivot), training=LIGHT)
    )


def test_the_share_that_the_pivots_dtype_would_keep_is_measured(light: Path, pivot: Path) -> None:
    elements, share = share_kept(pivot, light)
    assert 0.01 < share < 0.9
    assert recorded(light) == {
        "dtype": "bfloat16",
        "written": "float32",
        "elements": elements,
        "share": pytest.approx(share, rel=1e-12),
        "trained_in_dtype": False,
    }
    assert rounding_sentence(light) == (
        f"In bfloat16, the pivot's dtype, {100 * share:.1f}% of the elements in the tensors that training moved "
        "would differ from the pivot; the target is written in float32."
    )


def test_the_command_prints_the_share_at_the_end_and_again_when_nothing_is_left_to_do(
    fusion: World, pivot: Path, tmp_path: Path
) -> None:
    settings = fusion.settings(tmp_path / "target", **CLM, pivot=str(pivot), training=LIGHT)
    (tmp_path / "target.yaml").write_text(json.dumps(settings))
    for _ in range(2):
        result = CliRunner().invoke(main, ["train", str(tmp_path / "target.yaml")])
        assert result.exit_code == 0, result.output
        last = [f"the target is in {tmp_path / 'target'}", rounding_sentence(tmp_path / "target")]
        assert result.stdout.splitlines()[-2:] == last


def test_of_a_target_in_16_bits_it_is_all_that_is_left(
    fusion: World, light: Path, pivot: Path, tmp_path: Path
) -> None:
    """The same share, also where rounding has brought whole tensors back to the pivot."""
    target = train(fusion.config(tmp_path / "t", **CLM, pivot=str(pivot), training=LIGHT, output_dtype="bfloat16"))
    start, end = weights(pivot), weights(target)
    assert any(torch.equal(tensor, start[name]) for name, tensor in end.items())
    differ = sum(int((tensor != start[name]).sum()) for name, tensor in end.items())
    assert recorded(target) == {**recorded(light), "written": "bfloat16"}
    assert recorded(target)["share"] == pytest.approx(differ / recorded(target)["elements"], rel=1e-12)
    assert rounding_sentence(target) == (
        f"The target is written in bfloat16: {recorded(target)['share']:.1%} of the elements in the tensors that "
        "training moved differ from the pivot. This is all that is left; `output_dtype: float32` keeps the rest."
    )


def test_a_pivot_in_float32_loses_only_what_output_dtype_rounds_away(fusion: World, tmp_path: Path) -> None:
    """Nothing is reported for float32; a target in bfloat16 is compared with the pivot rounded likewise."""
    wide = train(fusion.config(tmp_path / "wide", **CLM, training=LIGHT))
    assert "rounding" not in json.loads((wide / "fusion.json").read_text())
    assert rounding_sentence(wide) is None
    narrow = train(fusion.config(tmp_path / "narrow", **CLM, training=LIGHT, output_dtype="bfloat16"))
    elements, share = share_kept(fusion.folder / "pivot", wide)
    assert (recorded(narrow)["elements"], recorded(narrow)["dtype"]) == (elements, "bfloat16")
    assert recorded(narrow)["share"] == pytest.approx(share, rel=1e-12)
    assert 0.01 < share < 0.9


def test_float32_keeps_no_more_of_a_training_in_16_bits(fusion: World, pivot: Path, tmp_path: Path) -> None:
    target = train(fusion.config(tmp_path / "t", **CLM, pivot=str(pivot), training=LIGHT, dtype="bfloat16"))
    assert {tensor.dtype for tensor in weights(target).values()} == {torch.float32}
    assert (recorded(target)["elements"], recorded(target)["share"]) == share_kept(pivot, target)
    assert str(rounding_sentence(target)).startswith(
        "The trained weights are bfloat16 values, so float32 keeps no more"
    )


@pytest.mark.parametrize("load_in", [None, "8bit"])
def test_with_lora_the_adapted_tensors_are_counted(
    load_in: str | None, fusion: World, pivot: Path, tmp_path: Path
) -> None:
    """After the adapters were merged."""
    if load_in:
        pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    settings = {"lora": LORA, "load_in": load_in, "training": {"learning_rate": 1e-3}}
    target = train(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), **settings))
    start = weights(pivot)
    adapted = [name for name in start if "q_proj" in name or "down_proj" in name]
    elements, share = share_kept(pivot, target)
    assert recorded(target)["elements"] == elements == sum(start[name].numel() for name in adapted)
    assert recorded(target)["share"] == pytest.approx(share, rel=1e-12)
    assert 0 < share < 1


def test_a_tied_pivot_in_several_files_is_measured(fusion: World, tmp_path: Path) -> None:
    """The shared weight counts once."""
    pivot = shutil.copytree(fusion.folder / "pivot", tmp_path / "pivot")
    (pivot / "model.safetensors").unlink()
    tied = tiny_sources.new_source(
        "llama", len(fusion.tokenizer.tokenizer), hidden_size=16, num_attention_heads=2, tie_word_embeddings=True
    )
    tied.to(torch.bfloat16).save_pretrained(pivot, max_shard_size="10KB")
    assert len(list(pivot.glob("*.safetensors"))) > 1
    target = train(fusion.config(tmp_path / "target", **CLM, pivot=str(pivot), training=LIGHT))
    whole = tmp_path / "whole"
    tied.save_pretrained(whole)
    assert (recorded(target)["elements"], recorded(target)["share"]) == share_kept(whole, target)
    assert recorded(target)["elements"] == sum(weight.numel() for weight in tied.parameters())


def test_names_and_shapes_that_only_one_side_has_are_left_out(tmp_path: Path) -> None:
    """And what is float32 on both sides, or no number with a fraction; the dtype is that of most elements."""
    start = {
        "moved": torch.ones(4).bfloat16(),
        "half": torch.ones(2).half(),
        "still": torch.ones(4).bfloat16(),
        "wide": torch.ones(4),
        "count": torch.ones(4).int(),
        "resized": torch.ones(2, 2).bfloat16(),
        "pivot alone": torch.ones(4).bfloat16(),
    }
    end = {
        "moved": torch.tensor([1.0, 1 + 2**-9, 1 + 2**-7, 1 - 2**-8]),  # two of them by enough
        "half": torch.tensor([1.0, 1 + 2**-10]),
        "still": torch.ones(4),
        "wide": torch.zeros(4),
        "count": torch.zeros(4).int(),
        "resized": torch.zeros(4),
        "target alone": torch.zeros(4),
    }
    for name, tensors in (("pivot", start), ("target", end)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for trained in ({}, end):
        assert rounding(tmp_path / "pivot", tmp_path / "target", trained) == {
            "dtype": "bfloat16",
            "written": "float32",
            "elements": 6,
            "share": 3 / 6,
            "trained_in_dtype": False,
        }


def test_a_training_is_not_lost_over_what_cannot_be_measured(
    fusion: World,
    pivot: Path,
    light: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The pivot's weights are gone, damaged, or those of another model by then."""
    write = targets._write_target
    for name, content in (("gone", None), ("damaged", b"not weights"), ("another", None)):
        moved = shutil.copytree(pivot, tmp_path / name)
        file = moved / "model.safetensors"

        def spoiled(*given: Any, name: str = name, content: bytes | None = content, file: Path = file) -> Any:
            trained = write(*given)
            file.unlink()
            if content:
                file.write_bytes(content)
            elif name == "another":
                save_file({"other": torch.ones(2)}, file)
            return trained

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            caplog.clear()
            patch.setattr(targets, "_write_target", spoiled)
            target = train(fusion.config(tmp_path / f"of {name}", **CLM, pivot=str(moved), training=LIGHT))
        assert "cannot measure how much of the training survives in 16 bits: " in caplog.text
        assert rounding_sentence(target) is None
        assert (target / "model.safetensors").read_bytes() == (light / "model.safetensors").read_bytes()
