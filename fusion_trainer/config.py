"""The settings of each stage: one pydantic model, read from YAML or given as flags.

A YAML file is checked whole before anything runs; every problem is told with its line.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from varm_common.errors import UserError, listed

__all__ = [
    "NOT_OF_THE_RESULT",
    "AlignConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "PrepareConfig",
    "TrainConfig",
    "explained",
    "one_or_more",
    "read_config",
    "read_yaml",
]

Config = TypeVar("Config", bound=BaseModel)

NOT_OF_THE_RESULT = frozenset(
    name
    for line in (
        "output_dir disable_tqdm do_eval resume_from_checkpoint ddp_timeout",
        "gradient_checkpointing gradient_checkpointing_kwargs",
        "activation_checkpointing activation_checkpointing_kwargs",
        "logging_dir logging_strategy logging_first_step logging_steps log_level log_level_replica",
        "log_on_each_node report_to run_name project trackio_space_id",
        "save_strategy save_steps save_total_limit save_on_each_node",
        "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps",
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers",
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision",
    )
    for name in line.split()
)
"""Arguments of transformers that may change between the parts of one training."""


def one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


def _training_arguments(given: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainingArguments

    return _arguments_of(TrainingArguments, given)


def _lora_arguments(given: dict[str, Any] | None) -> dict[str, Any] | None:
    from peft import LoraConfig

    return None if given is None else _arguments_of(LoraConfig, given)


def _arguments_of(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a dataclass, with numbers and switches checked.

    YAML reads ``5e-6`` as a text and ``no`` as false; here they are what they are meant to be.
    """
    known: dict[str, Any] = {field.name: field.type for field in fields(kind) if field.init}
    unknown = [(name, *get_close_matches(name, known, 1)) for name in given if name not in known]
    made, wrong = {}, []
    for name, value in given.items():
        plain = _number(value) if "float" in str(known.get(name)) else value
        plain = "no" if value is False and name.endswith("_strategy") else plain
        made[name] = plain
        if known.get(name) in (int, float, bool):
            try:
                made[name] = TypeAdapter(known[name]).validate_python(plain)
            except ValidationError as error:
                wrong.append((name, f"`{name}` cannot be {value!r}: {error.errors()[0]['msg']}"))
        elif (choices := _choices(kind, name)) and plain is not None and plain not in choices:
            wrong.append((name, f"`{name}` cannot be {value!r}; there are {', '.join(choices)}"))
        number = made[name]
        if name in AT_LEAST_ONE and isinstance(number, int) and number < 1:
            wrong.append((name, f"`{name}` cannot be {value!r}: it is at least 1"))
    if unknown or wrong:
        raise PydanticCustomError(
            "arguments", "arguments", {"of": kind.__name__, "unknown": unknown, "wrong": wrong}
        )
    return made


AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def _choices(kind: Any, name: str) -> list[str]:
    """The values of an argument that has so many."""
    if kind.__name__ != "TrainingArguments":
        return []
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    enumerations: dict[str, Any] = {
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "save_strategy": SaveStrategy,
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
    }
    return [one.value for one in enumerations.get(name, ())]


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class PrepareConfig(BaseModel):
    """Chat data → dialogues: rendered with the pivot's template, split to the pivot's length."""

    model_config = ConfigDict(extra="forbid")

    data: Annotated[list[str], BeforeValidator(one_or_more)] = Field(
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
    source_template: str = Field(
        "own",
        description="Template in which a source is queried: own, pivot (the papers': it reads the pivot's text), "
        "a built-in name or a Jinja file.",
    )
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
    dtw_cost: Literal["fusechat", "fusechat_v2", "fusellm"] = Field(
        "fusechat", description="Weight of an edit when one token contains the other: 0.1, or 1 (the other two)."
    )
    map: Literal["exact", "min_edit_distance", "statistics", "statistics_published", "prefix"] = Field(
        "prefix", description="Which ids of the pivot an id stands for."
    )
    most: int = Field(0, ge=0, description="Of `statistics`: images per id, by count; 0 takes the nearest one.")
    unpaired: Literal["pivot", "gold"] = Field(
        "pivot", description="Positions without partner: the pivot's own distribution, or all on the next token."
    )
    maps: Path | None = Field(
        None, description="Folder where maps and counts are kept; default beside the output."
    )
    pivot_tokenizer: str | None = Field(None, description="Folder or Hub id, if the pivot has moved since.")
    source_tokenizer: str | None = Field(None, description="Folder or Hub id, if the source has moved since.")
    workers: int | None = Field(None, ge=1, description="Processes; default one per core.")
    trust_remote_code: bool = Field(False, description="Run code that the model repositories bring along.")


class TrainConfig(BaseModel):
    """The pivot, fine-tuned on the fused distributions: a target."""

    model_config = ConfigDict(extra="forbid")

    pivot: str = Field(description="Folder or Hub id of the model to fine-tune.")
    pivot_revision: str | None = Field(None, description="Branch, tag or commit of the pivot.")
    aligned_stores: Annotated[list[Path], BeforeValidator(one_or_more)] = Field(
        [], description="The sources' aligned stores: one for a pairwise target, several for Multi."
    )
    pivot_store: Path | None = Field(
        None, description="The pivot's own store; its distributions take part in the fusion."
    )
    dialogues: Path | None = Field(None, description="Prepared dialogues; default those beside the stores.")
    fusion: Literal["min_ce", "avg_ce"] = Field(
        "min_ce", description="The distribution with the least cross-entropy, or their weighted mean."
    )
    compare: Literal["conversation", "token"] = Field(
        "conversation", description="Cross-entropies are compared by conversation or at each token."
    )
    unit: Literal["token", "byte"] = Field(
        "byte", description="They are per byte, which compares tokenizers, or per token, as in the papers."
    )
    temperature: float = Field(1.0, gt=0, description="Of the fused models' distributions.")
    tail: Literal["renormalise", "bucket"] = Field(
        "renormalise", description="Probability outside the top k is dropped, or kept as one outcome."
    )
    clm_weight: float = Field(0.9, ge=0, le=1, description="λ in λ·CLM + (1−λ)·fusion; 1 is CLM alone.")
    clm_weight_schedule: Literal["constant", "hard_and_decay", "soft"] = Field(
        "constant", description="λ stays; grows to 1 with the steps; or is 1 − exp(−CE) of what is fused."
    )
    held_out: float = Field(0.0, ge=0, lt=1, description="Share of the conversations kept for evaluation.")
    packing: bool = Field(False, description="Several blocks in one row, with attention kept inside each.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="Of the weights while they are trained; mixed precision is bf16 in `training`."
    )
    output_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Of the target's weights; auto is the pivot's. 16 bits round most of a light fine-tune away.",
    )
    attention: str | None = Field(None, description="transformers' attn_implementation, for instance sdpa.")
    load_in: Literal["8bit", "4bit"] | None = Field(
        None, description="QLoRA: the pivot quantised by bitsandbytes (extra `quant`); needs `lora`."
    )
    lora: Annotated[dict[str, Any] | None, AfterValidator(_lora_arguments)] = Field(
        None, description="Arguments of peft's LoraConfig; full fine-tuning if not set."
    )
    training: Annotated[dict[str, Any], AfterValidator(_training_arguments)] = Field(
        description="TrainingArguments of transformers; output_dir is the target's folder."
    )
    _places: dict[str, str] = {}
    trust_remote_code: bool = Field(False, description="Run code that the model repositories bring along.")


class EvaluateConfig(BaseModel):
    """A model on held-out dialogues."""

    model_config = ConfigDict(extra="forbid")

    model: str | list[str] = Field(
        description="Folder or Hub id of the model to score. May be given several times."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the model.")
    dialogues: Path = Field(description="Prepared dialogues, held out: the same for all models compared.")
    output: Path | list[Path] = Field(description="JSON file of the scores; one for each model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of the weights; auto is the checkpoint's."
    )
    attention: str | None = Field(None, description="transformers' attn_implementation, for instance sdpa.")
    batch_tokens: int = Field(16384, ge=1, description="Most tokens in a batch, padding included.")
    trust_remote_code: bool = Field(False, description="Run code that the model repositories bring along.")


def read_config(kind: type[Config], path: Path | None, flags: Mapping[str, Any]) -> Config:
    """The settings of ``path``, with ``flags`` in place of what the file says.

    Raises:
        UserError: The file is no YAML, or some settings are unknown, missing or out of range: all of them are
            told, with their lines.
    """
    settings, lines = read_yaml(path) if path else ({}, {})
    both = {
        name for name, value in flags.items() if isinstance(value, dict) and isinstance(settings.get(name), dict)
    }
    try:
        made = kind.model_validate({**settings, **flags, **{name: settings[name] | flags[name] for name in both}})
        if isinstance(made, TrainConfig):  # some arguments are only found wrong when the training begins
            made._places = {name: f"{path}, line {line}" for name, line in lines.items()}
        return made
    except ValidationError as error:
        from_file = {name: line for name, line in lines.items() if name.split(".")[0] not in flags.keys() - both}
        found = [one for problem in error.errors() for one in explained(kind, problem, "")]
        problems = [f"line {from_file[at]}: {text}" if at in from_file else text for at, text in found]
        where = f"{path} cannot be used" if path else "the settings cannot be used"
        raise UserError(f"{where}:{listed(problems)}") from error


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping of a YAML file, and the line of each key: ``training.learning_rate``, ``sources[1].model``.

    Raises:
        UserError: It is no YAML file, no mapping, or a key is there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        settings = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"cannot read the config `{path}`: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a mapping of settings but a {type(settings).__name__}")
    lines: dict[str, int] = {}
    for name, line in _keys(root) if root else ():
        if name in lines:
            raise UserError(f"{path}, line {line}: `{name}` was already set")
        lines[name] = line
    return settings, lines


def _keys(mapping: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every key of a mapping and of what is in it, with its line."""
    for key, value in mapping.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _keys(value, f"{name}.")
        elif isinstance(value, yaml.SequenceNode):
            for number, item in enumerate(value.value):
                yield f"{name}[{number}]", item.start_mark.line + 1
                if isinstance(item, yaml.MappingNode):
                    yield from _keys(item, f"{name}[{number}].")


def explained(kind: type[BaseModel], problem: Any, where: str) -> Iterator[tuple[str, str]]:
    """One of pydantic's errors in words, with the place of what is wrong; one for each argument that is unknown.

    Args:
        kind: The settings' model.
        problem: The error.
        where: Where in the file the settings stand; empty for its top.
    """
    prefix = f"{where}." if where else ""
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "arguments":
        for key, message in problem["ctx"]["wrong"]:
            yield f"{prefix}{name}.{key}", f"`{name}`: {message}"
        for key, *near in problem["ctx"]["unknown"]:
            meant = f"; did you mean `{near[0]}`?" if near else ""
            yield f"{prefix}{name}.{key}", f"`{name}`: {problem['ctx']['of']} has no `{key}`{meant}"
    elif problem["type"] == "extra_forbidden":
        near = get_close_matches(name, kind.model_fields, 1)
        known = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(kind.model_fields)}"
        yield f"{prefix}{name}", f"unknown setting `{name}`; {known}"
    elif problem["type"] == "missing":
        what = kind.model_fields[name].description
        yield where, f"`{name}` is not set (--{name.replace('_', '-')}): {what}"
    else:
        yield f"{prefix}{name}", f"`{name}` cannot be {problem['input']!r}: {problem['msg']}"
