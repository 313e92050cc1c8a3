"""Models: a Hub id or folder becomes a local folder, a fingerprint, and a loaded causal language model."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varm_common import checkpoints
from varm_common.errors import UserError, reason_of, some
from varm_common.files import fingerprint, json_entry, read_mapping, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TOKENIZER_FILES",
    "config_fingerprint",
    "is_path",
    "load_causal_lm",
    "local_folder",
    "read_tokenizer",
    "resolved_dtype",
    "weight_files",
    "weights_fingerprint",
]

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
NOT_NEEDED = ["consolidated*", "*/*"]
"""Second copies of the weights in some repositories of the Hub."""
SETTINGS = ("config", "generation_config", "tokenizer_config", "special_tokens_map", "added_tokens")
"""JSON files in which transformers expects an object."""
SPACES = ("▁", "Ġ", " ")
"""How tokens write a space: SentencePiece, byte-level BPE, plainly."""
NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
"""Keys of a config that do not change what the model computes."""


def local_folder(
    model: str, revision: str | None = None, *, weights: bool = True, code: bool = False
) -> tuple[Path, str | None]:
    """The folder of a model and, if it was downloaded from the Hub, the commit.

    Raises:
        UserError: It is neither a folder nor a model of the Hub, or a settings file is damaged.
    """
    if Path(model).is_dir():
        if revision:
            raise UserError(f"`{model}` is a folder, which has no revision `{revision}`")
        folder, commit = Path(model), None
    else:
        folder = _downloaded(model, revision, weights, code)
        commit = folder.name
    for name in SETTINGS:
        if (path := folder / f"{name}.json").exists():
            read_mapping(path)
    return folder, commit


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template."""
    if (folder / "chat_template.jinja").is_file() or (folder / "additional_chat_templates").is_dir():
        return True
    return bool(json_entry(folder / "tokenizer_config.json", "chat_template"))


def is_path(model: str) -> bool:
    """Whether the name of a model can only be that of a folder, not a Hub id."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def _downloaded(model: str, revision: str | None, weights: bool, code: bool) -> Path:
    if is_path(model):
        raise UserError(f"no model folder `{model}`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*TOKENIZER_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]

    download = partial(snapshot_download, model, ignore_patterns=NOT_NEEDED)
    try:
        folder = Path(download(revision=revision, allow_patterns=patterns))
        names = checkpoints.weight_files(folder).names or [checkpoints.PICKLED]
        if weights and not names[0].endswith(".safetensors"):  # pickles, only where there is nothing else
            download(revision=folder.name, allow_patterns=names)
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"`{model}`{at} is not a folder, and the Hub replied: {reason}") from error


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """The weight files that transformers reads. ``name`` names the model in messages."""
    chosen = checkpoints.weight_files(folder)
    if chosen.problems:
        raise UserError(f"the weights of `{name or folder}`: {'; '.join(chosen.problems)}")
    return [folder / file for file in chosen.names]


def weights_fingerprint(folder: Path, name: str) -> str:
    """SHA-256 over the names and contents of the weight files, which are safetensors or pickles.

    Raises:
        UserError: There are none, one is missing or damaged, a pickle would run code, or it is not certain which
            they are.
    """
    files = weight_files(folder, name)
    if not files:
        whole = f"no {checkpoints.WHOLE}, no {checkpoints.PICKLED}"
        raise UserError(f"{name} has no weights in `{folder}`: {whole}, and no index of shards")
    _demand_readable(files, name)
    return checkpoints.fingerprint(folder)


def _demand_readable(files: Sequence[Path], name: str) -> None:
    for file in files:
        try:
            list(checkpoints.file_tensors(file))
        except ValueError as error:
            raise UserError(f"the weights of `{name}`: {error}") from error


def config_fingerprint(folder: Path, code: bool) -> str:
    """SHA-256 of a model's config and, with ``code``, of its Python files.

    Raises:
        UserError: The config is missing or damaged.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"`{folder}` has no config.json; copy it, or download the model again")
    config = read_mapping(folder / "config.json")
    config = {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}
    sources = {path.name: sha256_of(path) for path in sorted(folder.glob("*.py"))} if code else {}
    return fingerprint([config, sources])


def resolved_dtype(folder: Path, dtype: str, code: bool = False) -> str:
    """The dtype that a checkpoint is loaded in: ``dtype``; for ``auto`` the one in its config, if it has one."""
    if dtype != "auto":
        return dtype
    from transformers import AutoConfig

    try:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=code).dtype
    except Exception as error:
        raise UserError(f"`{folder / 'config.json'}` cannot be used: {reason_of(error)}") from error
    return str(own).removeprefix("torch.") if own is not None else dtype


def read_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder, as transformers loads it. A repository's own code may raise anything.

    Tokenizer code that was written for transformers 4 (InternLM2's) drops spaces in transformers 5. If the
    tokenizer keeps them without its code, the code is not used, and a warning is logged.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if trust_remote_code and not _keeps_spaces(tokenizer):
        with suppress(Exception):  # it may need the code
            without_code = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if _keeps_spaces(without_code):
                logger.warning("the tokenizer code of %s does not work with this transformers: not used", name)
                return without_code
    return tokenizer


def _keeps_spaces(tokenizer: Any) -> bool:
    """Whether a fast tokenizer has tokens for the spaces of a text."""
    pieces = "".join(tokenizer.tokenize("one two three"))
    return bool(getattr(tokenizer, "is_fast", False)) and sum(map(pieces.count, SPACES)) >= 2


def load_causal_lm(
    folder: Path,
    name: str,
    *,
    dtype: str,
    device: Any,
    attention: str | None = None,
    device_map: str | None = None,
    tensor_parallel: int | None = None,
    load_in: str | None = None,
    trust_remote_code: bool = False,
    tensors: "Mapping[str, Tensor] | None" = None,
) -> Any:
    """A causal language model in evaluation mode, on its device or devices. ``name`` names it in messages.

    Pickled weights are read without running their code. With ``tensor_parallel``, that many processes share the
    model: each loads a part of every layer. With ``tensors``, these are its weights, by their names in weight
    files, and only its config is read.

    Raises:
        UserError: It cannot be loaded, has no lm head, or its files lack weights.
    """
    import torch

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention:
        options["attn_implementation"] = attention
    if load_in:
        options["quantization_config"] = _quantisation(load_in, options["dtype"])
    if tensor_parallel:
        _demand_divisible(folder, name, tensor_parallel, trust_remote_code)
        options |= _shared_by(tensor_parallel)
    elif device_map or load_in or device.type == "cuda":  # weights go straight to the device
        options["device_map"] = device_map or {"": device}
    try:
        load, source, how = _source_of(folder, name, trust_remote_code, tensors)
        with _without_bars():
            model, info = load(source, output_loading_info=True, **options, **how)
        _fill_computed_buffers(model)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        advice = "try --device-map auto or --load-in 8bit"
        raise UserError(f"{name} does not fit into the GPU's memory; {advice}") from error
    except Exception as error:  # transformers checks few values of a config before it uses them
        if tensor_parallel and "tp_plan" in str(error):
            raise UserError(
                f"transformers has no plan to divide {name} for --tensor-parallel: use --engine vllm, or "
                "--device-map auto"
            ) from error
        raise UserError(f"{name} cannot be loaded as a causal language model: {reason_of(error)}") from error
    _demand_all_weights(model, name, info)
    placed = tensor_parallel or "device_map" in options
    if not placed and device.type != "cpu":  # FSDP leaves most processes' weights unmade
        model.to(device)
    return model.eval()


def _source_of(
    folder: Path, name: str, trust_remote_code: bool, tensors: "Mapping[str, Tensor] | None"
) -> tuple[Callable[..., Any], Path | None, dict[str, Any]]:
    """What loads the model, from where, and with which options: from the folder's files, or from ``tensors``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if tensors is None:
        pickles = [file for file in weight_files(folder, name) if file.suffix != ".safetensors"]
        _demand_readable(pickles, name)
        safe = {"use_safetensors": not pickles, "weights_only": True, "trust_remote_code": trust_remote_code}
        return AutoModelForCausalLM.from_pretrained, folder, safe
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):  # a class takes tensors in place of files; AutoModel does not
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return type(empty).from_pretrained, None, {"config": config, "state_dict": dict(tensors)}


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _fill_computed_buffers(model: Any) -> None:
    """Give a model with code of its own the buffers that are in no file, such as rotary tables.

    transformers 5 builds a model without memory and fills what the files hold. Code that was written for
    transformers 4 computes the other buffers in ``__init__``, where their values are lost without an error.
    """
    from accelerate import init_empty_weights

    if not type(model).__module__.startswith("transformers_modules."):
        return
    saved = model.state_dict().keys()
    unsaved = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta and name not in saved}
    if not unsaved:
        return
    with init_empty_weights(include_buffers=False):
        computed = dict(type(model)(model.config).named_buffers())
    for name in unsaved.keys() & computed.keys():
        unsaved[name].copy_(computed[name])


def _demand_divisible(folder: Path, name: str, processes: int, trust_remote_code: bool) -> None:
    """Check that every process gets whole attention heads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    heads = getattr(config, "num_attention_heads", None) or processes
    own = getattr(config, "num_key_value_heads", None) or heads
    if heads % processes or own % processes:
        possible = [number for number in range(2, own + 1) if not heads % number and not own % number]
        choice = f"it can be {', '.join(map(str, possible))}" if possible else "no number divides both"
        raise UserError(
            f"--tensor-parallel {processes} has to divide the {heads} attention heads and the {own} key/value "
            f"heads of {name}: {choice}"
        )


def _shared_by(processes: int) -> dict[str, Any]:
    """How transformers is asked to divide a model by its own plan."""
    from transformers.distributed import DistributedConfig

    plan: dict[str, Any] = {"tp_plan": "auto", "tp_size": processes}
    try:
        return {"distributed_config": DistributedConfig(**plan)}
    except TypeError:  # older versions take it as it is
        return plan


def _demand_all_weights(model: Any, name: str, info: dict[str, Any]) -> None:
    if mismatched := info.get("mismatched_keys"):
        raise UserError(f"{name}: the shapes of its weights do not match its config: {next(iter(mismatched))}")
    if missing := sorted(info["missing_keys"]):
        no_head = any("lm_head" in key or "embed_out" in key for key in missing)
        what = "no lm head" if no_head else "not all weights"
        raise UserError(f"{name} has {what}: its files lack {some(missing)}; give a causal language model")
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} ({type(model).__name__}) has no lm head; give a causal language model")


def _quantisation(load_in: str, dtype: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load-in needs bitsandbytes: pip install bitsandbytes")
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
