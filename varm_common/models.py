"""Checkpoints: where they lie, what they are by hash, and how they are loaded to be asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varm_common import checkpoints
from varm_common.errors import UserError
from varm_common.files import fingerprint, read_mapping, sha256_of

__all__ = [
    "TOKENIZER_FILES",
    "config_fingerprint",
    "load_causal_lm",
    "local_folder",
    "resolved_dtype",
    "weights_fingerprint",
]

TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
WEIGHT_FILES = ("*.safetensors",)
NOT_NEEDED = ("consolidated*", "*/*")
"""The same weights once more, as some repositories of the Hub have them."""
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Read by transformers, which expects a JSON object in each that is there."""
NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
"""Keys of a config that do not change what the model computes."""


def local_folder(
    model: str, revision: str | None = None, *, weights: bool = True, code: bool = False
) -> tuple[Path, str | None]:
    """The folder of a model, downloaded if it is on the Hub, and the commit it was downloaded at.

    Raises:
        UserError: Neither a folder nor a model of the Hub, or one of its settings files is damaged.
    """
    path = Path(model)
    if path.is_dir():
        if revision:
            raise UserError(f"`{model}` is a folder, which has no revision `{revision}`")
        _demand_settings(path)
        return path, None
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"no model folder `{model}`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*TOKENIZER_FILES, *(WEIGHT_FILES if weights else ()), *(("*.py",) if code else ())]
    try:
        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=list(NOT_NEEDED))
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"`{model}`{at} is no folder, and the Hub gave: {str(error).strip() or type(error).__name__}"
        ) from error
    _demand_settings(folder)
    return folder, folder.name


def _demand_settings(folder: Path) -> None:
    for name in SETTINGS_FILES:
        if (folder / name).exists():
            read_mapping(folder / name)


def weights_fingerprint(folder: Path, name: str) -> str:
    """SHA-256 over the names and contents of the weight files (a Hub download's names tell their content).

    Raises:
        UserError: There are none, one is missing or damaged, or it is not certain which they are; pickled ones
            are not loaded.
    """
    files = weight_files(folder, name)
    if not files:
        raise UserError(f"{name} has no .safetensors weights in `{folder}`, and no {checkpoints.INDEX}")
    if pickled := [file.name for file in files if file.suffix != ".safetensors"]:
        raise UserError(
            f"{name} has no .safetensors weights in `{folder}` but {pickled[0]}; pickled weights are not loaded: "
            "convert them, or name a --revision that has .safetensors"
        )
    for file in files:
        try:
            list(checkpoints.file_tensors(file))
        except ValueError as error:
            raise UserError(f"the weights of `{name}`: {error}") from error
    return checkpoints.fingerprint(folder)


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """The weight files of a checkpoint that transformers reads.

    Raises:
        UserError: It is not certain which they are, or one is missing.
    """
    chosen = checkpoints.weight_files(folder)
    if chosen.problems:
        raise UserError(f"the weights of `{name or folder}`: {'; '.join(chosen.problems)}")
    return [folder / file for file in chosen.names]


def config_fingerprint(folder: Path, code: bool) -> str:
    """SHA-256 of what a model computes beside its weights: its config, and its own code if that is run.

    Raises:
        UserError: The config is missing or damaged.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"`{folder}` has no config.json; copy it, or download the model again")
    config = read_mapping(folder / "config.json")
    config = {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}
    sources = {path.name: sha256_of(path) for path in sorted(folder.glob("*.py"))} if code else {}
    return fingerprint([config, sources])


def load_causal_lm(
    folder: Path,
    name: str,
    *,
    dtype: str,
    attention: str | None,
    device: Any,
    device_map: str | None,
    load_in: str | None,
    trust_remote_code: bool,
) -> Any:
    """A causal language model in evaluation mode, on its device or devices.

    Raises:
        UserError: It cannot be loaded, or its weights lack an lm head or anything else.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention:
        options["attn_implementation"] = attention
    if load_in:
        options["quantization_config"] = _quantisation(load_in, options["dtype"])
    if device_map or load_in or device.type == "cuda":  # so that weights go straight to the device
        options["device_map"] = device_map or {"": device}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{name} does not fit into the GPU's memory; try --device-map auto or --load-in 8bit"
        ) from error
    except Exception as error:  # transformers checks few of a config's values before it computes with them
        raise UserError(f"{name} cannot be loaded as a causal language model: {_reason(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    _demand_head(model, name, sorted(info["missing_keys"]), info.get("mismatched_keys") or ())
    if "device_map" not in options and device.type != "cpu":  # FSDP leaves weights of most processes unmade
        model.to(device)
    return model.eval()


def resolved_dtype(folder: Path, dtype: str, code: bool = False) -> str:
    """The dtype a checkpoint is loaded in: ``dtype``, or for ``auto`` its own."""
    from transformers import AutoConfig

    if dtype != "auto":
        return dtype
    try:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=code).dtype
    except Exception as error:
        raise UserError(f"`{folder / 'config.json'}` cannot be used: {_reason(error)}") from error
    return str(own).removeprefix("torch.") if own is not None else dtype


def _reason(error: Exception) -> str:
    """The error on one line; its kind as well, where its message may be a bare key or value."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def _demand_head(model: Any, name: str, missing: Sequence[str], mismatched: Sequence[Any]) -> None:
    if mismatched:
        raise UserError(f"{name}: weights of other shapes than its config says: {mismatched[0]}")
    if missing:
        what = (
            "no lm head" if any("lm_head" in key or "embed_out" in key for key in missing) else "not all weights"
        )
        some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise UserError(f"{name} has {what}: its files lack {some}; give a causal language model")
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} ({type(model).__name__}) has no lm head; give a causal language model")


def _quantisation(load_in: str, dtype: Any) -> Any:
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load-in needs bitsandbytes: pip install 'varm-merge[quant]'")
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    import torch

    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
