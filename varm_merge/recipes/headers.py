"""The header of a model: its config, and the names, shapes and dtypes of its tensors.

No weight is read. The headers of a model on the Hub come over HTTP ranges, a few kilobytes for each file.
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

from varm_common.checkpoints import PICKLED, Tensors, read_header
from varm_common.errors import some
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
"""Bytes of an element, by safetensors' name of the dtype; all other dtypes take one byte."""
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "BOOL")
QUANTISED_NAMES = re.compile(r"(.*\.)?(qweight|qzeros|weight_packed|weight_scale(_inv)?|absmax|quant_map|SCB)")
"""Tensors that only a quantised checkpoint has."""
NARROW = re.compile(r"F[468](_|$)|float[468]_")
"""Dtypes of quantised weights; a dtype of torch that safetensors does not know has torch's name."""


@dataclass(frozen=True)
class Model:
    """A model's header.

    Attributes:
        name: The folder or Hub id.
        config: Its config.json; empty if there is none.
        tensors: Shape and dtype (as safetensors writes it) by name; empty if there are no weight files.
        files: The file of each tensor; empty for a model on the Hub that is not in the cache.
        remarks: Weight files that are not read.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @property
    def layers(self) -> int | None:
        """Number of transformer blocks; None if the config does not say."""
        text = self.config.get("text_config") or self.config
        names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        return next((text[name] for name in names if name in text), None)

    @property
    def bytes(self) -> int:
        """Size of all tensors as they are stored."""
        return sum(math.prod(shape) * STORED_BYTES.get(dtype, 1) for shape, dtype in self.tensors.values())


def read_model(place: Place, hub: Hub | None = None) -> Model:
    """The header of a model in a folder, in the Hub's cache or on the Hub.

    Raises:
        ValueError: A file is damaged or missing, or the Hub does not answer.
    """
    try:
        path = place.file("config.json")
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
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
        missing = f"no model.safetensors, no {PICKLED}, and no index of shards"
        raise ValueError(f"`{place.path}` has no weights: {missing}")
    return Model(place.path, config, header.tensors, header.files, header.remarks)


def _tensors_on_the_hub(place: Place, hub: Hub) -> Tensors:
    if hub.unreachable:
        raise ValueError(f"the Hub did not answer: {hub.unreachable}")
    try:
        api = huggingface_hub.HfApi()
        siblings = api.model_info(place.path, revision=place.revision).siblings or []
        chosen = files_on_the_hub(place, {file.rfilename for file in siblings})
        if chosen.problems:
            raise ValueError("; ".join(chosen.problems))
        metadata = api.get_safetensors_metadata(place.path, revision=place.revision)
    except NotASafetensorsRepoError:
        return {}  # the header of a pickle is not known before it is downloaded
    except ValueError:
        raise
    except Exception as error:  # the HTTP client raises errors of many kinds
        raise ValueError(f"the Hub did not answer: {hub.why_not(error)}") from error
    return {
        name: (tuple(tensor.shape), str(tensor.dtype))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def why_quantised(model: Model) -> str | None:
    """Why a model's tensors are quantised codes and cannot be merged, and what to do; None if they are weights."""
    parts = [model.config, *(part for part in model.config.values() if isinstance(part, dict))]
    settings: Any = next(filter(None, (part.get("quantization_config") for part in parts)), {})
    codes = [
        name
        for name, (_, dtype) in model.tensors.items()
        if NARROW.match(dtype)
        or QUANTISED_NAMES.fullmatch(name)
        or (name.endswith((".weight", "_blocks", "_proj")) and dtype not in WEIGHT_DTYPES)
    ]
    if not settings and not codes:
        return None
    method = str(settings.get("quant_method") or "") if isinstance(settings, dict) else ""
    what = f"quantised ({method or 'by its config'})" if settings else "quantised"
    if codes:
        what += f": {some(codes)}"
    else:
        what += ". If its weights are in full precision all the same, remove that entry from its config.json"
    return (
        f"`{model.name}` is {what}. Codes cannot be merged as weights: merge the checkpoint it was made from, or "
        "load it with transformers in full precision (`dequantize=True` in its quantization_config, or "
        "model.dequantize()) and save that"
    )


def why_whole(model: Model) -> str | None:
    """Why a model's weights cannot be averaged although they are not quantised: they are whole numbers."""
    whole = [n for n, (_, dtype) in model.tensors.items() if n.endswith(".weight") and dtype in ("I64", "BOOL")]
    if not whole:
        return None
    dtype = model.tensors[whole[0]][1]
    return f"`{model.name}` has whole numbers ({dtype}) as weights: {some(whole)}. Save them in a floating dtype"


def other_dtypes(base: Model, other: Model) -> str | None:
    """A remark on a model that is stored in other dtypes than the base model."""
    ours, theirs = ({dtype for _, dtype in model.tensors.values()} for model in (base, other))
    if ours == theirs or not ours or not theirs:
        return None
    both = " and ".join("/".join(sorted(dtypes)) for dtypes in (theirs, ours))
    return f"{other.name} and {base.name} have the dtypes {both}; set `dtype`, the dtype in which they are merged"


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer that older versions of transformers saved and no model reads."""
    return name.endswith(BUFFERS)


def other_tokens(base: str, other: str) -> int:
    """How many ids mean another token in the folder ``other``; 0 if either has no tokenizer.json."""
    if base == other or (ours := _vocabulary(base)) is None or (theirs := _vocabulary(other)) is None:
        return 0
    return sum(theirs[number] != token for number, token in ours.items() if number in theirs)


def _vocabulary(folder: str) -> dict[int, str] | None:
    """The token of each id; None without a tokenizer.json that lists them."""
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
    """``parameters``, ``read_bytes``, ``written_bytes`` and ``largest_tensor_bytes`` (in all models and output).

    Args:
        models: All models that are read.
        outputs: Shape and bytes of an element, for every tensor that is written.
    """
    sizes = [(math.prod(shape), width) for shape, width in outputs.values()]
    largest = max((elements * width for elements, width in sizes), default=0)
    return {
        "parameters": sum(elements for elements, _ in sizes),
        "read_bytes": sum(model.bytes for model in models),
        "written_bytes": sum(elements * width for elements, width in sizes),
        "largest_tensor_bytes": largest * (len(models) + 1),
    }
