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
from varm_merge.presence import Hub

__all__ = ["Difference", "Model", "differences", "estimate", "other_tokens", "read_model"]

STORED_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Of an element, by safetensors' names of dtypes; all others are one byte wide."""
WRITTEN_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Of an element, by the names that a recipe's `dtype` has."""
VOCABULARY = ("embed_tokens", "lm_head", "embed_in", "embed_out", "wte", "shared", "word_embeddings")
"""Parts of the names of tensors with a row for each token."""
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")


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
        """Of all tensors, as they are stored."""
        return sum(math.prod(shape) * STORED_BYTES.get(dtype, 1) for shape, dtype in self.tensors.values())


@dataclass(frozen=True)
class Difference:
    """Something in which a model is not like the base; a merge fails of it if it is not ``harmless``."""

    message: str
    harmless: bool


def read_model(place: Place, hub: Hub | None = None) -> Model:
    """The header of a model; ``hub`` is asked if it answers.

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
        return Model(place.path, architecture, layers, dict(_tensors(place, hub or Hub())))
    except (SafetensorError, HfHubHTTPError, OSError, ValueError, AttributeError) as error:
        raise ValueError(f"the header of `{place.path}` cannot be read: {error}") from error


def _tensors(place: Place, hub: Hub) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    here = Path(place.path)
    if here.is_dir():
        for name in weight_files(here):
            if not (here / name).is_file():
                raise ValueError(f"`{here / name}` is named in the index and is not there")
    if not (weights := place.weights()):
        yield from _tensors_on_the_hub(place, hub) if not here.is_dir() else ()
    for path in weights:
        with safe_open(path, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118  no mapping
                part = file.get_slice(tensor)
                yield tensor, (tuple(part.get_shape()), part.get_dtype())


def _tensors_on_the_hub(place: Place, hub: Hub) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    if hub.unreachable:
        raise ValueError(f"the Hub could not be asked: {hub.unreachable}")
    try:
        found = huggingface_hub.HfApi().get_safetensors_metadata(place.path, revision=place.revision)
    except NotASafetensorsRepoError:
        return
    except Exception as error:  # whatever the HTTP client raises without a network
        raise ValueError(f"the Hub could not be asked: {hub.why_not(error)}") from error
    for file in found.files_metadata.values():
        for name, tensor in file.tensors.items():
            yield name, (tuple(tensor.shape), tensor.dtype)


def differences(base: Model, other: Model, whole: bool = True) -> Iterator[Difference]:
    """In what a model is not like the base, as far as a merge cares.

    Args:
        base: The model to compare with.
        other: The model.
        whole: Whether all of their layers are merged one by one, and not slices of them.
    """
    if base.architecture != other.architecture:
        yield Difference(
            f"{other.name} is a {other.architecture or 'model without architecture'}, {base.name} a "
            f"{base.architecture or 'model without one'}: mergekit merges models of one architecture",
            False,
        )
        return
    if not whole:
        return
    if base.layers != other.layers:
        yield Difference(f"{other.name} has {other.layers} layers, {base.name} {base.layers}", False)
    if not base.tensors or not other.tensors:
        return
    lacks = [name for name in base.tensors if name not in other.tensors and not _may_be_left_out(name)]
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


def other_tokens(base: str, other: str) -> int:
    """How many ids stand for other tokens in one folder's tokenizer.json than in the other's; 0 without both."""
    if base == other or (ours := _vocabulary(base)) is None or (theirs := _vocabulary(other)) is None:
        return 0
    return sum(theirs[number] != token for number, token in ours.items() if number in theirs)


def _vocabulary(folder: str) -> dict[int, str] | None:
    """The token of each id; None if there is no tokenizer.json, or none that tells."""
    try:
        content = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {number: token for token, number in vocabulary.items()}
        else:
            tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
        return tokens | {added["id"]: added["content"] for added in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _may_be_left_out(name: str) -> bool:
    """Tied to another, or a buffer that older versions of transformers have saved and nobody reads."""
    return _of_the_vocabulary(name) or name.endswith(BUFFERS)


def _of_the_vocabulary(name: str) -> bool:
    return any(part in VOCABULARY for part in name.split("."))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def estimate(models: Sequence[Model], base: Model, dtype: str | None) -> dict[str, Any]:
    """What a merge takes whose output is as large as its base.

    Returns:
        ``parameters``, and in bytes: ``read_bytes``, ``written_bytes``, and ``largest_tensor_bytes``, the largest
        tensor of every model and of the output at once.
    """
    elements = sum(math.prod(shape) for shape, _ in base.tensors.values())
    largest = max((math.prod(shape) for shape, _ in base.tensors.values()), default=0)
    width = WRITTEN_BYTES.get(dtype or "", base.bytes / elements if elements else 0)
    return {
        "parameters": elements,
        "read_bytes": sum(model.bytes for model in models),
        "written_bytes": round(elements * width),
        "largest_tensor_bytes": round(largest * width * (len(models) + 1)),
    }
