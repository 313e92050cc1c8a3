"""Which files are a model's weights: those that transformers loads, or a sentence where that is not certain."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import Family

from varm_common.checkpoints import fingerprint, read_header, weight_files
from varm_common.errors import UserError
from varm_common.models import weights_fingerprint

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def sharded(folder: Path) -> dict[str, str]:
    """Split ``model.safetensors`` into two shards with an index; returns the shard of each tensor."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: ONE if number % 2 else TWO for number, name in enumerate(tensors)}
    for shard in (ONE, TWO):
        own = {name: tensors[name] for name, where in names.items() if where == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "one file": lambda folder: None,
    "shards": sharded,
    "a pickle": as_pickle,
    "a pickle beside": lambda f: torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin"),
    "consolidated beside shards": lambda f: [
        shutil.copy(f / "model.safetensors", f / "consolidated.safetensors"),
        sharded(f),
    ],
    "an index of one file": lambda folder: (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")})
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_those_that_transformers_loads(layout: str, mistral: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(mistral.targets[0], tmp_path / "model")
    LAYOUTS[layout](folder)
    header = read_header(folder)
    assert (header.problems, header.remarks) == ([], [])
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert {name: shape for name, (shape, _) in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    family = Family(mistral.pivot, (folder, mistral.targets[1]))
    runs.assert_merges(runs.merge(runs.recipe(family), tmp_path / "out"), family, runs.MATRIX)


def stale_index(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    sharded(folder)
    (folder / "model.safetensors").write_bytes(whole)


def edited_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    names = sharded(folder)
    change(names)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def moved(names: dict[str, str]) -> None:
    first = next(iter(names))
    names[first] = ONE if names[first] == TWO else TWO


def other_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")


FAULTS: dict[str, Callable[[Path], object]] = {
    "transformers reads the first, mergekit the shards": stale_index,
    f"`{INDEX}` is damaged": lambda f: [sharded(f), (f / INDEX).write_text('{"weight_map": {')],
    f"`{INDEX}` is damaged ": lambda f: [sharded(f), (f / INDEX).write_text('["weight_map"]')],
    f"names `{TWO}`, and that file is not there": lambda f: [sharded(f), (f / TWO).unlink()],
    "names files outside the folder": lambda f: edited_index(f, lambda n: n.update(dict.fromkeys(n, f"../{ONE}"))),
    "which the index puts there": lambda f: edited_index(f, moved),
    "which the index does not put there": lambda f: edited_index(f, lambda names: names.pop(next(iter(names)))),
    f"there are shards (`{ONE}`, `{TWO}`) and no {INDEX}": lambda f: [sharded(f), (f / INDEX).unlink()],
    "it begins with a byte order mark": lambda f: [
        sharded(f),
        (f / INDEX).write_text("\ufeff" + (f / INDEX).read_text()),
    ],
    "transformers reads `other.safetensors`": lambda f: other_weights(f),
    "an adapter is in the same folder as `model.safetensors`": lambda f: (f / "adapter_config.json").write_text(
        "{}"
    ),
    "is cut off or damaged": lambda f: (f / "model.safetensors").write_bytes(b"\0" * 64),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_certain_is_a_sentence_everywhere(fault: str, mistral: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(mistral.targets[0], tmp_path / "model")
    FAULTS[fault](folder)
    assert fault.strip() in " ".join(read_header(folder).problems)
    with pytest.raises(UserError) as refused:
        runs.merge(runs.recipe(Family(mistral.pivot, (folder, mistral.targets[1]))), tmp_path / "out")
    assert "line 5: " in str(refused.value)
    assert fault.strip() in str(refused.value)
    if weight_files(folder).problems:
        with pytest.raises(UserError) as unknown:
            weights_fingerprint(folder, "the pivot")
        assert fault.strip() in str(unknown.value)
        with pytest.raises(ValueError, match=r".+"):
            fingerprint(folder)


def test_shards_that_no_index_names_are_remarked_on(mistral: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(mistral.targets[0], tmp_path / "model")
    names = sharded(folder)
    shutil.copy(folder / ONE, folder / "model-00003-of-00003.safetensors")
    header = read_header(folder)
    assert header.problems == []
    assert header.remarks == [f"`model-00003-of-00003.safetensors`: not read, beside `{INDEX}`"]
    assert header.tensors.keys() == names.keys()


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda tensors: {"state_dict": tensors}, "they lie under `state_dict`"),
        (lambda tensors: {"epoch": 3, **tensors}, "is not a flat mapping of names to tensors"),
        (lambda tensors: [*tensors.values()], "is not a flat mapping of names to tensors"),
        (lambda tensors: {name: tensor.to_sparse() for name, tensor in tensors.items()}, "has sparse tensors"),
        (lambda tensors: {**tensors, "x": Code()}, "cannot be read without running code of its own"),
    ],
)
def test_a_pickle_that_is_more_than_tensors_is_refused(
    content: Callable[[dict[str, torch.Tensor]], object],
    reason: str,
    mistral: Family,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(mistral.targets[0], tmp_path / "model")
    torch.save(content(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (problem,) = read_header(folder).problems
    assert reason in problem
    assert "must not run" not in capsys.readouterr().out
    with pytest.raises(UserError, match=reason.split("`")[0]):
        runs.merge(runs.recipe(Family(mistral.pivot, (folder, mistral.targets[1]))), tmp_path / "out")


def test_a_pickle_of_old_and_shards_of_pickles_are_read(mistral: Family, tmp_path: Path) -> None:
    """torch before 1.6 wrote files that cannot be mapped."""
    folder = shutil.copytree(mistral.targets[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {}
    for number, half in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(
            {name: tensors[name] for name in half}, folder / shard, _use_new_zipfile_serialization=number == 1
        )
        names |= dict.fromkeys(half, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    family = Family(mistral.pivot, (folder, mistral.targets[1]))
    runs.assert_merges(runs.merge(runs.recipe(family), tmp_path / "out"), family, runs.MATRIX)
