"""``fusion-trainer convert``: pickled weights become safetensors, bit by bit, and no code is run."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import Family

from fusion_trainer.cli import main
from varm_common import conversion
from varm_common.checkpoints import CONVERSION, file_tensors, fingerprint, read_header
from varm_common.conversion import convert
from varm_common.errors import UserError
from varm_common.models import load_causal_lm, weights_fingerprint
from varm_common.stored_tensors import pickled_tensors, stored_tensor
from varm_merge.merging.lineage import Place, foreign_targets

SHARD = 3000
Tensors = dict[str, torch.Tensor]


def unusual(tensors: Tensors) -> Tensors:
    """Ties, views, slices of one storage, and dtypes that checkpoints have besides float32."""
    flat = torch.arange(1000.0)
    return {
        **tensors,
        "tied": tensors["lm_head.weight"],
        "transposed": torch.arange(24.0).view(4, 6).T,
        "slice.1": flat[10:20],
        "slice.2": flat[15:40],
        "half": torch.randn(3, 5).bfloat16(),
        "whole": torch.arange(4),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
    }


@pytest.fixture
def pickled(mistral: Family, tmp_path: Path) -> Path:
    """A model in two ``.bin`` shards, one in the format of torch before 1.6, with all that is unusual."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(mistral.pivot / "config.json", folder)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (folder / "generation_config.json").write_text("{}")
    (folder / "modeling_own.py").write_text("raise SystemExit('code was run')")
    tensors = unusual(load_file(mistral.pivot / "model.safetensors"))
    places = {}
    for number, names in enumerate(([*tensors][::2], [*tensors][1::2]), 1):
        shard = f"pytorch_model-{number:05}-of-00002.bin"
        own = {name: tensors[name] for name in names}
        torch.save(own, folder / shard, _use_new_zipfile_serialization=number == 1)
        places |= dict.fromkeys(names, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def tensors_of(folder: Path) -> Tensors:
    """Read by the libraries themselves."""
    pickles = [torch.load(path, weights_only=True) for path in folder.glob("*.bin")]
    found = [*pickles, *(load_file(path) for path in folder.glob("*.safetensors"))]
    return {name: tensor for part in found for name, tensor in part.items()}


def test_out_may_be_a_link_but_not_what_cannot_be_replaced(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_disk: Callable[[int], Path]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert convert(str(pickled), tmp_path / "link")
    assert not convert(str(pickled), tmp_path / "link")
    assert tensors_of(tmp_path / "real").keys() == tensors_of(pickled).keys()
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="is the current folder, which cannot be replaced: give a folder in it"):
        convert(str(pickled), Path())
    with pytest.raises(UserError, match="is a mount point, which cannot be replaced: give a folder in it"):
        convert(str(pickled), small_disk(1 << 20))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.booleans(), st.integers(0, 2999), st.integers(0, 255), st.booleans())
def test_a_damaged_pickle_is_read_or_refused(new: bool, place: int, byte: int, cut: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, buffer, _use_new_zipfile_serialization=new)
    content = bytearray(buffer.getvalue())
    place %= len(content)
    content = content[:place] if cut else content[:place] + bytes([byte]) + content[place + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pytorch_model.bin")
        path.write_bytes(content)
        with suppress(ValueError):
            pickled_tensors(path)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(ValueError, match="pointer of Git LFS, not the file: run `git lfs pull`"):
            list(file_tensors(tmp_path / name))


def test_every_tensor_keeps_its_name_dtype_and_bits(pickled: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "out"
    assert convert(str(pickled), out, shard_bytes=SHARD)
    expected, found = tensors_of(pickled), tensors_of(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    header = read_header(out)
    assert header.problems == []
    assert len({*header.files.values()}) > 5
    small = {"config.json", "generation_config.json", "tokenizer_config.json", "modeling_own.py", CONVERSION}
    assert {path.name for path in out.iterdir() if not path.name.startswith("model")} == small - {
        "modeling_own.py"
    }
    assert (out / "modeling_own.py").is_file()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    one = load_causal_lm(pickled, "x", dtype="auto", device=torch.device("cpu")).state_dict()
    other = load_causal_lm(out, "x", dtype="auto", device=torch.device("cpu")).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_conversion_stands_for_the_original(pickled: Path, mistral: Family, tmp_path: Path) -> None:
    convert(str(pickled), tmp_path / "out", shard_bytes=SHARD)
    assert fingerprint(tmp_path / "out") == fingerprint(pickled) == weights_fingerprint(pickled, "x")
    target = shutil.copytree(mistral.targets[0], tmp_path / "target")
    pivot = {"model": "x", "weights": fingerprint(pickled)}
    (target / "fusion.json").write_text(json.dumps({"pivot": pivot}))
    assert not [*foreign_targets(Place(str(tmp_path / "out")), [Place(str(target))])]
    assert [*foreign_targets(Place(str(mistral.pivot)), [Place(str(target))])] == [(0, "x")]
    shard = next((tmp_path / "out").glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(tmp_path / "out") != fingerprint(pickled)


def test_it_is_made_once_and_nothing_else_is_overwritten(pickled: Path, mistral: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(str(pickled), out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not convert(str(pickled), out)
    assert not convert(os.path.relpath(pickled), out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    (pickled / "config.json").write_text((pickled / "config.json").read_text().replace("silu", "gelu"))
    with pytest.raises(UserError, match="was made with other settings"):
        convert(str(pickled), out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(`notes.txt`\)"):
        convert(str(pickled), foreign)
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="are safetensors already"):
        convert(str(mistral.pivot), tmp_path / "again")
    next(out.glob("*.safetensors")).unlink()
    (pickled / "config.json").write_text((pickled / "config.json").read_text().replace("gelu", "silu"))
    with pytest.raises(UserError, match="lacks `model"):
        convert(str(pickled), out)


def test_an_interrupted_conversion_resumes(pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops before its fourth weight file: OUT is not there, and the first three are not written again."""
    out = tmp_path / "out"
    write, written = conversion._write_shard, []

    def stopped(header: Any, names: list[str], path: Path) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        write(header, names, path)
        written.append(path)

    monkeypatch.setattr(conversion, "_write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(str(pickled), out, shard_bytes=SHARD)
    monkeypatch.setattr(conversion, "_write_shard", write)
    assert not out.exists()
    inodes = {path.name: path.stat().st_ino for path in written}
    assert convert(str(pickled), out, shard_bytes=SHARD)
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes
    assert tensors_of(out).keys() == tensors_of(pickled).keys()


def test_what_another_model_left_is_not_used(pickled: Path, tmp_path: Path) -> None:
    left = tmp_path / "out.converting.tmp"
    left.mkdir()
    (left / CONVERSION).write_text(json.dumps({"format": "safetensors conversion", "weights": "another"}))
    (left / "model-00001-of-00009.safetensors").write_bytes(b"of another model")
    assert convert(str(pickled), tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(pickled).keys()


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "of old"])
def test_a_pickle_with_code_is_refused_and_not_run(zipped: bool, pickled: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    shard = pickled / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(shard, weights_only=True)
    torch.save({**tensors, "x": Code(ran)}, shard, _use_new_zipfile_serialization=zipped)
    done = CliRunner().invoke(main, ["convert", str(pickled), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert f"`{shard.name}` cannot be read without running code of its own (`posix.mkdir`)" in done.output
    assert "weights_only" not in done.output  # torch's advice is to read it unsafely
    assert "Traceback" not in done.output
    with pytest.raises(UserError, match="without running code of its own"):
        load_causal_lm(pickled, "x", dtype="auto", device=torch.device("cpu"))
    with pytest.raises(ValueError, match="without running code of its own"):
        stored_tensor(shard, "x")
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02 not a pickle", b"PK\x03\x04 cut off"])
def test_a_damaged_pickle_is_a_sentence(content: bytes, pickled: Path, tmp_path: Path) -> None:
    (pickled / "pytorch_model-00002-of-00002.bin").write_bytes(content)
    done = CliRunner().invoke(main, ["convert", str(pickled), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "`pytorch_model-00002-of-00002.bin` cannot be read" in done.output
    assert "or is damaged" in done.output
    assert "Traceback" not in done.output


def test_the_command_says_what_it_did(pickled: Path, tmp_path: Path) -> None:
    command = ["convert", str(pickled), str(tmp_path / "out")]
    assert CliRunner().invoke(main, [*command, "--quiet"]).output == f"{tmp_path / 'out'}: written\n"
    assert "is there already" in CliRunner().invoke(main, command).output
