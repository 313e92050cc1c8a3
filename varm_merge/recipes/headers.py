"""What the models of a recipe are made of, by their configs and the headers of their weight files.

No weight is read. Of a Hub model the headers come over HTTP ranges, a few kilobytes for each file.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from safetensors import SafetensorError

from varm_common.checkpoints import PICKLED, Tensors, read_header, some
from varm_merge.merging.lineage import Place, files_on_the_hub
from varm_merge.recipes.locate import Hub

__all__ = [
    "Model",
    "estimate",
    "is_buffer",
    "other_dtypes",
    "other_tokens",
    "read_model",
    "why_quantised",
    "why_whole",
]

STORED_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Of an element, by safetensors' names of dtypes; all others are one byte wide."""
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
QUANTISED_NAMES = {
    "qweight",
    "qzeros",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "absmax",
    "quant_map",
    "SCB",
}
"""Last parts of the names of tensors that only a quantised checkpoint has."""
NARROW = re.compile(r"F[468](_|$)|float[468]_")
"""Dtypes of codes; a dtype of torch that safetensors has no name for goes by torch's."""
WHOLE_WEIGHTS = ("I64", "BOOL")
DEQUANTISED = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(run_compressed=False)",
}
"""How transformers loads a checkpoint in full precision, by the method that quantised it."""


@dataclass(frozen=True)
class Model:
    """A model's header.

    Attributes:
        name: The folder or Hub id.
        config: Its config.json; empty if it has none.
        tensors: Shape and dtype (as safetensors writes it) by name; empty if it has no weight files.
        files: The file of each tensor; empty for a model on the Hub that is not in the cache.
        remarks: Weight files that nothing reads.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @property
    def layers(self) -> int | None:
        """Number of its transformer blocks; None if the config does not tell."""
        text = self.config.get("text_config") or self.config
        names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        return next((text[name] for name in names if name in text), None)

    @property
    def bytes(self) -> int:
        """Of all tensors, as they are stored."""
        return sum(math.prod(shape) * STORED_BYTES.get(dtype, 1) for shape, dtype in self.tensors.values())


def read_model(place: Place, hub: Hub | None = None) -> Model:
    """The header of a model; ``hub`` is asked if it answers.

    Raises:
        ValueError: A file of it is damaged or missing, or the Hub does not answer.
    """
    try:
        config = json.loads(found.read_text(encoding="utf-8")) if (found := place.file("config.json")) else {}
        if not isinstance(config, dict):
            raise ValueError("config.json holds no mapping")
        folder = Path(place.path) if Path(place.path).is_dir() else place.folder() if place.weights() else None
        if folder is None:
            return Model(place.path, config, _tensors_on_the_hub(place, hub or Hub()))
        header = read_header(folder)
    except (SafetensorError, HfHubHTTPError, OSError, ValueError, AttributeError) as error:
        raise ValueError(f"the header of `{place.path}` cannot be read: {error}") from error
    if header.problems:
        raise ValueError(f"the weights of `{place.path}` cannot be read: {'; '.join(header.problems)}")
    if not header.tensors:
        raise ValueError(
            f"`{place.path}` has no weights: no model.safetensors, no {PICKLED}, and no index of shards"
        )
    return Model(place.path, config, header.tensors, header.files, header.remarks)


def _tensors_on_the_hub(place: Place, hub: Hub) -> Tensors:
    if hub.unreachable:
        raise ValueError(f"the Hub could not be asked: {hub.unreachable}")
    try:
        api = huggingface_hub.HfApi()
        siblings = api.model_info(place.path, revision=place.revision).siblings or []
        chosen = files_on_the_hub(place, {file.rfilename for file in siblings})
        if chosen.problems:
            raise ValueError("; ".join(chosen.problems))
        found = api.get_safetensors_metadata(place.path, revision=place.revision)
    except NotASafetensorsRepoError:
        return {}  # pickled: their headers are not known before they are downloaded
    except ValueError:
        raise
    except Exception as error:  # whatever the HTTP client raises without a network
        raise ValueError(f"the Hub could not be asked: {hub.why_not(error)}") from error
    return {
        name: (tuple(tensor.shape), str(tensor.dtype))
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def why_quantised(model: Model) -> str | None:
    """Why a model's tensors are codes and not weights, and what to do; None if they are weights."""
    quantised = model.config.get("quantization_config") or {}
    for part in model.config.values():
        quantised = quantised or (part.get("quantization_config") if isinstance(part, dict) else None) or {}
    method = str(quantised.get("quant_method") or "") if isinstance(quantised, dict) else "unknown"
    codes = [
        name
        for name, (_, dtype) in model.tensors.items()
        if NARROW.match(dtype)
        or name.rpartition(".")[2] in QUANTISED_NAMES
        or (
            name.endswith((".weight", "_blocks", "_proj"))
            and dtype not in (*WHOLE_WEIGHTS, "F64", "F32", "F16", "BF16")
        )
    ]
    if not quantised and not codes:
        return None
    what = f"quantised ({method or 'its config has a quantization_config'})" if quantised else "quantised"
    shown = f": {some(codes)}" if codes else ""
    if not codes:
        shown = ". If its weights are in full precision all the same, remove that entry from its config.json"
    how = f"quantization_config={DEQUANTISED[method]}" if method in DEQUANTISED else "then model.dequantize()"
    return (
        f"`{model.name}` is {what}{shown}. Codes cannot be merged as weights: merge the checkpoint it was made "
        f"from, or load it with transformers in full precision ({how}) and save that"
    )


def why_whole(model: Model) -> str | None:
    """Why a model's weights cannot be averaged though they are no codes: they are whole numbers."""
    whole = [n for n, (_, dtype) in model.tensors.items() if n.endswith(".weight") and dtype in WHOLE_WEIGHTS]
    if not whole:
        return None
    dtype = model.tensors[whole[0]][1]
    return f"`{model.name}` has whole numbers ({dtype}) as weights: {some(whole)}. Save them in a floating dtype"


def other_dtypes(base: Model, other: Model) -> str | None:
    """Remark on a model that is stored in other dtypes than the base."""
    ours, theirs = ({dtype for _, dtype in model.tensors.values()} for model in (base, other))
    if ours == theirs or not ours or not theirs:
        return None
    told = " and ".join("/".join(sorted(dtypes)) for dtypes in (theirs, ours))
    return f"{other.name} and {base.name} have the dtypes {told}; `dtype` says in which they meet"


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer that older versions of transformers have saved and no model reads."""
    return name.endswith(BUFFERS)


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


def estimate(models: Sequence[Model], outputs: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Any]:
    """What a merge takes.

    Args:
        models: All that are read.
        outputs: Shape and bytes of an element of every tensor that is written.

    Returns:
        ``parameters``, and in bytes: ``read_bytes``, ``written_bytes``, and ``largest_tensor_bytes``, the largest
        tensor of every model and of the output at once.
    """
    sizes = [(math.prod(shape), width) for shape, width in outputs.values()]
    return {
        "parameters": sum(elements for elements, _ in sizes),
        "read_bytes": sum(model.bytes for model in models),
        "written_bytes": sum(elements * width for elements, width in sizes),
        "largest_tensor_bytes": max((elements * width for elements, width in sizes), default=0)
        * (len(models) + 1),
    }
