"""The settings of each stage: one pydantic model, read from YAML or given as flags.

A YAML file is checked whole before anything runs; every problem is told with its line.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fusion_trainer.errors import FusionError, listed

__all__ = ["AlignConfig", "ExtractConfig", "PrepareConfig", "read_config"]

Config = TypeVar("Config", bound=BaseModel)


class PrepareConfig(BaseModel):
    """Chat data → dialogues: rendered with the pivot's template, split to the pivot's length."""

    model_config = ConfigDict(extra="forbid")

    data: Annotated[list[str], BeforeValidator(lambda data: [data] if isinstance(data, str) else data)] = Field(
        min_length=1, description="JSON, JSONL or Parquet files, dataset folders or Hub ids."
    )
    data_name: str | None = Field(None, description="Configuration of a Hub dataset that has several.")
    data_split: str = Field("train", description="Split of a dataset folder or Hub dataset.")
    bad_rows: Literal["error", "skip"] = Field("error", description="What to do about rows that cannot be used.")
    pivot: str = Field(description="Folder or Hub id; its tokenizer counts, its chat template renders.")
    pivot_revision: str | None = Field(None, description="Branch, tag or commit of the pivot.")
    template: str | None = Field(
        None,
        description="openchat, chatml, vicuna, mistral, llama-3, zephyr or a Jinja file; default: the pivot's",
    )
    max_length: int = Field(2048, ge=16, description="Most tokens of the pivot in a block.")
    packing: bool = Field(True, description="Plain text: several short documents in one block.")
    dialogues: Path | None = Field(
        None, description="Folder of the prepared dialogues; default beside the output, shared by all models."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model repositories bring along.")


class ExtractConfig(PrepareConfig):
    """One model's top-k distributions over the dialogues."""

    model: str = Field(description="Folder or Hub id of the source (or the pivot) to ask.")
    revision: str | None = Field(None, description="Branch, tag or commit of the model.")
    output: Path = Field(description="Folder of the store.")
    top_k: int = Field(10, ge=1, le=1024, description="Distribution entries kept per position.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of the weights; auto is the checkpoint's."
    )
    attention: str | None = Field(None, description="transformers' attn_implementation, for instance sdpa.")
    batch_tokens: int = Field(16384, ge=1, description="Most tokens in a batch, padding included.")
    shard_tokens: int = Field(262144, ge=1, description="Tokens (the pivot's) whose rows make one shard.")
    device_map: str | None = Field(None, description="accelerate's, for models larger than one GPU: auto.")
    load_in: Literal["8bit", "4bit"] | None = Field(None, description="Quantised by bitsandbytes (extra `quant`).")


class AlignConfig(BaseModel):
    """A source's store onto the pivot's positions and vocabulary."""

    model_config = ConfigDict(extra="forbid")

    source_store: Path = Field(description="The source's store.")
    pivot_store: Path = Field(description="The pivot's store, over the same dialogues.")
    output: Path = Field(description="Folder of the aligned store.")
    dialogues: Path | None = Field(None, description="Prepared dialogues; default those beside the pivot's store.")
    positions: Literal["boundary", "dtw"] = Field(
        "boundary", description="Pair where both have read the same bytes, or by the papers' time warping."
    )
    dtw_cost: Literal["fusechat", "fusellm"] = Field(
        "fusechat", description="Weight of an edit when one token contains the other: 0.1 or 1."
    )
    map: Literal["exact", "min_edit_distance", "statistics", "prefix"] = Field(
        "prefix", description="Which ids of the pivot an id stands for."
    )
    most: int = Field(0, ge=0, description="Of `statistics`: images per id, by count; 0 takes the nearest one.")
    unpaired: Literal["pivot", "gold"] = Field(
        "pivot", description="Positions without partner: the pivot's own distribution, or all on the next token."
    )
    maps: Path | None = Field(
        None, description="Folder where vocabulary maps are kept; default beside the output."
    )
    pivot_tokenizer: str | None = Field(None, description="Folder or Hub id, if the pivot has moved since.")
    source_tokenizer: str | None = Field(None, description="Folder or Hub id, if the source has moved since.")
    workers: int | None = Field(None, ge=1, description="Processes; default one per core.")
    trust_remote_code: bool = Field(False, description="Run code that the model repositories bring along.")


def read_config(kind: type[Config], path: Path | None, flags: Mapping[str, Any]) -> Config:
    """The settings of ``path``, with ``flags`` in place of what the file says.

    Raises:
        FusionError: The file is no YAML, or some settings are unknown, missing or out of range: all of them are
            told, with their lines.
    """
    settings, lines = _read(path) if path else ({}, {})
    try:
        return kind.model_validate({**settings, **flags})
    except ValidationError as error:
        from_file = {name: line for name, line in lines.items() if name not in flags}
        problems = [_explained(kind, problem, from_file) for problem in error.errors()]
        where = f"{path} cannot be used" if path else "the settings cannot be used"
        raise FusionError(f"{where}:{listed(problems)}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping of a YAML file, and the line of each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        settings = yaml.safe_load(text) or {}
    except OSError as error:
        raise FusionError(f"cannot read the config `{path}`: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FusionError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise FusionError(f"{path} is not a mapping of settings but a {type(settings).__name__}")
    lines: dict[str, int] = {}
    for key, _ in root.value if root else []:
        if key.value in lines:
            raise FusionError(f"{path}, line {key.start_mark.line + 1}: `{key.value}` was already set")
        lines[key.value] = key.start_mark.line + 1
    return settings, lines


def _explained(kind: type[BaseModel], problem: Any, lines: Mapping[str, int]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    where = f"line {lines[name]}: " if name in lines else ""
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(name, kind.model_fields, 1)
        known = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(kind.model_fields)}"
        return f"{where}unknown setting `{name}`; {known}"
    if problem["type"] == "missing":
        return f"`{name}` is not set (--{name.replace('_', '-')}): {kind.model_fields[name].description}"
    return f"{where}`{name}` cannot be {problem['input']!r}: {problem['msg']}"
