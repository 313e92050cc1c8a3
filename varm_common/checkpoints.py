"""Which files hold a model's weights, and what their headers say: one rule for all programs of this project.

transformers and mergekit look for ``model.safetensors`` or the shards of its index, then for the pickled
``pytorch_model.bin`` or the shards of its index. Where the two programs would read different files, and where an
index is damaged or names a missing file, there is a problem: no file is chosen silently. No weight is read.
"""

import hashlib
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = [
    "INDEX",
    "WEIGHT_FILE",
    "WHOLE",
    "Header",
    "WeightFiles",
    "choose_weight_files",
    "content_sha256",
    "fingerprint",
    "read_header",
    "some",
    "weight_files",
]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?")
"""Names under which transformers and mergekit save weights."""
SHA256_LENGTH = 64
CHUNK_BYTES = 1 << 20

Tensors = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype (as safetensors writes it: F32, BF16, …) by name."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one checkpoint.

    Attributes:
        names: The files that transformers would load, in ascending order.
        named: The shard of each tensor, by the index; None where one file holds all.
        problems: Why it is not certain, or not possible, to read them.
        remarks: What else lies there and is not read.
    """

    names: list[str]
    named: Mapping[str, str] | None = None
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def choose_weight_files(names: set[str], read: Callable[[str], str | bytes]) -> WeightFiles:
    """Which of a checkpoint's files hold its weights.

    Args:
        names: All its files.
        read: The content of one of them; called for an index only.
    """
    shards = {name for name in names if SHARD.fullmatch(name)}
    pairs = ((WHOLE, INDEX), (PICKLED, PICKLED_INDEX))
    whole, index = next((pair for pair in pairs if names & {*pair}), (None, None))
    if whole is None or index is None:
        if shards:
            return WeightFiles([], problems=[f"there are shards ({some(sorted(shards))}) and no {INDEX}: copy it"])
        return WeightFiles([])
    if index not in names:
        return WeightFiles([whole], remarks=_not_read(shards, whole))
    try:
        text = content if isinstance(content := read(index), str) else content.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark, which mergekit does not read")
        weight_map = json.loads(text)["weight_map"]
        named = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else repr(error)
        return WeightFiles([], problems=[f"`{index}` is damaged ({why}): copy it again"])
    files = sorted(set(named.values()))
    if whole in names and files != [whole]:
        problem = (
            f"both `{whole}` and `{index}` are there: transformers reads the first, mergekit the shards of the "
            "second. Remove the one that is out of date"
        )
        return WeightFiles([whole], problems=[problem])
    problems = []
    if outside := [name for name in files if "/" in name or "\\" in name]:
        problems.append(f"`{index}` names files outside the folder: {some(outside)}")
    elif missing := [name for name in files if name not in names]:
        problems.append(f"`{index}` names {some(missing)}, and that file is not there: copy it, or save again")
    elif not files:
        problems.append(f"`{index}` names no tensor: copy it again")
    return WeightFiles(files, named, problems, _not_read(shards - {*files}, index))


def weight_files(folder: Path) -> WeightFiles:
    """The weight files of a local checkpoint."""
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    chosen = choose_weight_files(names, lambda name: (folder / name).read_bytes())
    if chosen.names:
        chosen.problems.extend(_read_otherwise(folder, chosen.names))
    return chosen


def _read_otherwise(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """What makes transformers load something else than the weight files that mergekit reads."""

    def entry(file: str, key: str) -> Any:
        try:
            return json.loads((folder / file).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            return None

    other = entry("config.json", "transformers_weights")
    if other and [other] != [*names]:
        yield (
            f"transformers reads `{other}` (`transformers_weights` in config.json), mergekit {some(names)}: "
            "remove that entry, or give the file the name that mergekit reads"
        )
    if (folder / "adapter_config.json").is_file():
        base = entry("adapter_config.json", "base_model_name_or_path")
        yield (
            f"an adapter lies beside {some(names)}: transformers loads that adapter on `{base}`, mergekit the "
            "weights without it. Keep the adapter in a folder of its own, and merge `model+adapter` if it is meant"
        )


@dataclass(frozen=True)
class Header:
    """What the weight files of a local checkpoint hold.

    Attributes:
        tensors: Shape and dtype of each tensor.
        files: The file of each tensor.
        problems: What is wrong with the files, a sentence each.
        remarks: What else lies there and is not read.
    """

    tensors: Tensors = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_header(folder: Path) -> Header:
    """The tensors of a local checkpoint, by index and headers. A pickle is read without running its code."""
    chosen = weight_files(folder)
    header = Header(problems=[*chosen.problems], remarks=[*chosen.remarks])
    kinds: dict[tuple[tuple[int, ...], str], tuple[tuple[int, ...], str]] = {}
    for name in chosen.names:
        if not (folder / name).is_file():
            continue  # a problem already
        try:
            tensors = dict(file_tensors(folder / name))
        except ValueError as error:
            header.problems.append(str(error))
            continue
        if chosen.named is not None:
            header.problems.extend(_disagreements(name, chosen.named, tensors))
        for tensor, described in tensors.items():  # names and shapes repeat, within a model and between models
            header.tensors[sys.intern(tensor)] = kinds.setdefault(described, described)
        header.files.update(dict.fromkeys(map(sys.intern, tensors), folder / name))
    return header


def file_tensors(path: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Name, shape and dtype of each tensor of one weight file.

    Raises:
        ValueError: It cannot be read.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  no mapping
                    part = file.get_slice(name)
                    yield name, (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"`{path.name}` is cut off or damaged ({path.stat().st_size:,} bytes; {error}): copy it again"
            ) from error
        return
    for name, tensor in _pickled(path).items():
        yield name, (tuple(tensor.shape), DTYPES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype)))


DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""safetensors' names of dtypes, by torch's."""


def _pickled(path: Path) -> dict[str, Any]:
    import torch

    try:
        try:
            content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except RuntimeError:  # a file in the format of torch before 1.6 cannot be mapped
            content = torch.load(path, map_location="meta", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`{path.name}` cannot be read without running code of its own, or is damaged ({reason}): "
            "save the model as safetensors"
        ) from error
    if isinstance(content, dict):
        odd = [n for n, v in content.items() if isinstance(v, torch.Tensor) and v.layout != torch.strided]
        if odd:
            raise ValueError(f"`{path.name}` has sparse tensors: {some(odd)}. Save them dense, by .to_dense()")
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        where = " under `state_dict`" if isinstance(content, dict) and "state_dict" in content else ""
        raise ValueError(
            f"`{path.name}` is no flat mapping of names to tensors{where and f': they lie{where}'}. "
            "Load it with torch.load(weights_only=True) and save its tensors as safetensors"
        )
    return content


def _disagreements(shard: str, named: Mapping[str, str], tensors: Tensors) -> Iterator[str]:
    """Where the index and the header of one shard differ: transformers goes by headers, mergekit by the index."""
    if lacks := [name for name, where in named.items() if where == shard and name not in tensors]:
        yield f"`{shard}` lacks {some(lacks)}, which the index puts there: copy it again"
    if foreign := [name for name in tensors if named.get(name) != shard]:
        yield f"`{shard}` has {some(foreign)}, which the index does not put there: save the model again"


def _not_read(shards: set[str], beside: str) -> list[str]:
    return [f"{some(sorted(shards))}: not read, beside `{beside}`"] if shards else []


def fingerprint(folder: Path) -> str:
    """SHA-256 over the JSON list of [file name, SHA-256 of its content] of the weight files; empty without any.

    Raises:
        ValueError: It is not certain which files those are.
    """
    chosen = weight_files(folder)
    if chosen.problems:
        raise ValueError(f"`{folder}`: {'; '.join(chosen.problems)}")
    with ThreadPoolExecutor(4) as threads:
        sums = threads.map(content_sha256, [folder / name for name in chosen.names])
        return fingerprint_of(list(zip(chosen.names, sums, strict=True)))


def fingerprint_of(sums: Sequence[tuple[str, str]]) -> str:
    """The fingerprint of files whose names and SHA-256 are known, ascending by name."""
    text = json.dumps([list(one) for one in sums], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest() if sums else ""


def content_sha256(path: Path) -> str:
    """SHA-256 of a file; the Hub's cache names its blobs by it."""
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == SHA256_LENGTH:
        return blob
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
