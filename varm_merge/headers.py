"""What the models of a recipe are made of, by their configs and safetensors headers: no weight is read.

Of a Hub model the headers come over HTTP ranges, a few kilobytes for each file.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open

from varm_merge.lineage import Place, weight_files

__all__ = ["Difference", "Model", "differences", "estimate", "read_model"]

BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
"""Of the dtypes that are not one byte wide."""
BYTES_OF = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
WRITTEN_TWICE = 1.02
"""A merge writes a temporary shard before it takes its name, and the tokenizer beside."""
VOCABULARY = ("embed_tokens", "lm_head", "embed_in", "embed_out", "wte", "shared", "word_embeddings")
"""Parts of the names of tensors with a row for each token."""


@dataclass(frozen=True)
class Model:
    """A model's header.

    Attributes:
        name: The folder or Hub id.
        architecture: Of its config; empty if it has none.
        layers: Number of its transformer blocks; None if the config does not tell.
        tensors: Shape and dtype (as safetensors writes them) by name; empty if it has no safetensors files.
    """

    name: str
    architecture: str
    layers: int | None
    tensors: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * BITS.get(dtype, 8) // 8 for shape, dtype in self.tensors.values())


@dataclass(frozen=True)
class Difference:
    """Something in which a model is not like the base; a merge fails of it if it is not ``harmless``."""

    message: str
    harmless: bool


def read_model(place: Place) -> Model:
    """The header of a model.

    Raises:
        ValueError: A file of it is damaged, or the Hub does not answer.
    """
    try:
        config = json.loads(found.read_text(encoding="utf-8")) if (found := place.file("config.json")) else {}
        text = config.get("text_config") or config
        layers = next(
            (text[key] for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in text), None
        )
        architecture = (config.get("architectures") or [""])[0]
        return Model(place.path, architecture, layers, dict(_tensors(place)))
    except (SafetensorError, HfHubHTTPError, OSError, ValueError, AttributeError) as error:
        raise ValueError(f"the header of `{place.path}` cannot be read: {error}") from error


def _tensors(place: Place) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    folder = Path(place.path)
    if not folder.is_dir():
        try:
            found = huggingface_hub.get_safetensors_metadata(place.path, revision=place.revision)
        except NotASafetensorsRepoError:
            return
        for file in found.files_metadata.values():
            for name, tensor in file.tensors.items():
                yield name, (tuple(tensor.shape), tensor.dtype)
        return
    for name in weight_files(folder):
        if not (folder / name).is_file():
            raise ValueError(f"`{folder / name}` is named in the index and is not there")
        with safe_open(folder / name, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118  no mapping
                part = file.get_slice(tensor)
                yield tensor, (tuple(part.get_shape()), part.get_dtype())


def differences(base: Model, other: Model) -> Iterator[Difference]:
    """In what a model is not like the base, as far as a merge cares."""
    if base.architecture != other.architecture:
        yield Difference(
            f"{other.name} is a {other.architecture or 'model without architecture'}, {base.name} a "
            f"{base.architecture or 'model without one'}: mergekit merges models of one architecture",
            False,
        )
        return
    if base.layers != other.layers:
        yield Difference(f"{other.name} has {other.layers} layers, {base.name} {base.layers}", False)
    if not base.tensors or not other.tensors:
        return
    lacks = [name for name in base.tensors if name not in other.tensors and not _of_the_vocabulary(name)]
    if lacks:
        yield Difference(f"{other.name} has no {_some(lacks)}, which {base.name} has", False)
    for name, (shape, _) in base.tensors.items():
        if name not in other.tensors:
            continue
        other_shape, _ = other.tensors[name]
        if shape != other_shape:
            rows = _of_the_vocabulary(name) and shape[1:] == other_shape[1:]
            what = f"`{name}` has the shape {list(other_shape)} in {other.name} and {list(shape)} in {base.name}"
            advice = ": without `tokenizer:` mergekit cuts both to the smaller vocabulary" if rows else ""
            yield Difference(what + advice, rows)
    dtypes = {dtype for _, dtype in base.tensors.values()}, {dtype for _, dtype in other.tensors.values()}
    if dtypes[0] != dtypes[1]:
        told = " and ".join("/".join(sorted(some)) for some in reversed(dtypes))
        yield Difference(
            f"{other.name} and {base.name} have the dtypes {told}; `dtype` says in which they meet", True
        )


def _of_the_vocabulary(name: str) -> bool:
    return any(part in VOCABULARY for part in name.split("."))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def estimate(models: Sequence[Model], base: Model, dtype: str | None) -> dict[str, Any]:
    """Bytes that a merge of the models reads, writes, and at least holds at a time: the largest tensor of all."""
    elements = sum(math.prod(shape) for shape, _ in base.tensors.values())
    largest = max((math.prod(shape) for shape, _ in base.tensors.values()), default=0)
    width = BYTES_OF.get(dtype or "", base.bytes / elements if elements else 0)
    return {
        "parameters": elements,
        "read_bytes": sum(model.bytes for model in models),
        "written_bytes": round(WRITTEN_TWICE * elements * width),
        "largest_tensor_bytes": round(largest * width * (len(models) + 1)),
    }
