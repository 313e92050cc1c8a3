"""The settings of each stage, as one pydantic model, read from a YAML file or from flags.

A YAML file is checked completely before anything runs. Every problem is reported with its line.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, ValidationError

from varm_common.errors import UserError, did_you_mean, listed
from varm_common.yaml_file import read_yaml

__all__ = [
    "BUILT_IN_TEMPLATES",
    "NOT_OF_THE_RESULT",
    "AlignConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "ImportConfig",
    "PrepareConfig",
    "Texts",
    "TrainConfig",
    "explained",
    "one_or_more",
    "read_config",
    "recorded",
    "unknown_setting",
]

Config = TypeVar("Config", bound=BaseModel)

BUILT_IN_TEMPLATES = ("openchat", "chatml", "vicuna", "mistral", "llama-3", "zephyr")
"""Chat templates that come with the package."""
HOW_IT_RUNS = """
    output_dir disable_tqdm do_eval resume_from_checkpoint ddp_timeout
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    logging_dir logging_strategy logging_first_step logging_steps log_level log_level_replica log_on_each_node
    report_to run_name project trackio_space_id save_strategy save_steps save_total_limit save_on_each_node
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps
    dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers
    push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision
"""
NOT_OF_THE_RESULT = frozenset(HOW_IT_RUNS.split())
"""Arguments of transformers that do not change the target; they may differ when a training is resumed."""
ONLY_IF_USED = frozenset({"divergence", "js_beta", "alm_weight", "alm_temperature", "chunks", "spread"})
"""Settings that a record leaves out at their default, where they change nothing."""


def recorded(settings: BaseModel, *left_out: str) -> dict[str, Any]:
    """Settings as a record holds them, without those in ``left_out``."""
    fields, dumped = type(settings).model_fields, settings.model_dump(mode="json", exclude={*left_out})
    unused = {name for name in ONLY_IF_USED & dumped.keys() if dumped[name] == fields[name].default}
    return {name: value for name, value in dumped.items() if name not in unused}


def one_or_more(value: Any) -> Any:
    """A list, also of a single text or path."""
    return [value] if isinstance(value, (str, Path)) else value


def _arguments_of(name: str) -> AfterValidator:
    """Checks that a mapping holds arguments of the class ``name``."""

    def check(given: dict[str, Any] | None) -> dict[str, Any] | None:
        from fusion_trainer.training.arguments import checked  # ast is not needed for --help

        return None if given is None else checked(name, given)

    return AfterValidator(check)


Texts = Annotated[list[str], BeforeValidator(one_or_more)]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Quantisation = Literal["8bit", "4bit"]
MapKind = Literal["exact", "min_edit_distance", "co_occurrence", "statistics", "statistics_published", "prefix"]
TrustRemoteCode = Annotated[bool, Field(description="Run Python code from the model repositories.")]


class Settings(BaseModel):
    """Base of all settings: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", defer_build=True, use_attribute_docstrings=True)


class PrepareConfig(Settings):
    """Chat data → dialogues: rendered with the pivot's chat template, split into blocks."""

    data: Texts = Field(min_length=1)
    """Chat data: JSON, JSONL or Parquet files, dataset folders or Hub ids."""
    data_name: str | None = None
    """Configuration of a Hub dataset that has more than one."""
    data_split: str = "train"
    """Split of a dataset folder or Hub dataset."""
    bad_rows: Literal["error", "skip"] = "error"
    """If rows cannot be used: stop, or skip and count them."""
    pivot: str
    """Folder or Hub id of the pivot; its tokenizer and chat template are used."""
    pivot_revision: str | None = None
    """Branch, tag or commit of the pivot."""
    template: str | None = Field(
        None,
        description=f"Chat template to render with: {', '.join(BUILT_IN_TEMPLATES)}, or a Jinja file. "
        "Default: the pivot's.",
    )
    max_length: int = Field(2048, ge=16)
    """Maximum length of a block (a conversation, or a part of a long one), in pivot tokens."""
    fit_tokenizers: Texts = []
    """Folders or Hub ids (`name@revision`) of other models: a block's text is at most max_length tokens of their
    tokenizers, too. Name the sources whose context is no longer than max_length."""
    packing: bool = True
    """For plain text: put several short documents into one block."""
    dialogues: Path | None = None
    """Folder of the prepared dialogues, shared by all models. Default for `extract`: next to its output."""
    trust_remote_code: TrustRemoteCode = False


class ExtractConfig(PrepareConfig):
    """One model's top-k distributions over the dialogues."""

    model: str
    """Folder or Hub id of the model to query: a source or the pivot."""
    revision: str | None = None
    """Branch, tag or commit of the model."""
    output: Path
    """Folder of the store to write."""
    source_template: str = "own"
    """Chat template in which a source is queried: own (the source's), pivot (the source reads the pivot's
    rendering as plain text, as in FuseLLM), pivot_own_end (the same, but answers end with the source's own token,
    as in FuseChat), the name of a built-in template, or a Jinja file."""
    top_k: int = Field(10, ge=1, le=1024)
    """Number of probabilities kept per position."""
    dtype: Dtype = "auto"
    """Dtype of the weights. auto: the checkpoint's."""
    attention: str | None = None
    """transformers' attn_implementation, for example sdpa."""
    batch_tokens: int = Field(16384, ge=1)
    """Maximum size of a batch, in tokens with padding. Ignored for servers."""
    shard_tokens: int = Field(262144, ge=1)
    """Size of a shard of the store, in pivot tokens."""
    device_map: str | None = None
    """accelerate's device map. auto spreads a model that is larger than one GPU over all GPUs, which then take
    turns."""
    tensor_parallel: int | None = Field(None, ge=2)
    """Number of processes that share one model, each with a part of every layer. Start them with torchrun or
    `accelerate launch`."""
    load_in: Quantisation | None = None
    """Quantise the model with bitsandbytes, which has to be installed."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the model. vllm: the vLLM servers of server_url; without server_url, vLLM in this process."""
    engine_options: dict[str, Any] | None = None
    """For vLLM in this process: arguments of vllm.LLM, for example tensor_parallel_size=8."""
    server_url: Texts = []
    """For vllm: URL of a server that serves the model; several, separated by commas, share the work."""
    server_model: str | None = None
    """Name of the model at the server, if it is not that of `model`."""
    server_key_env: str | None = None
    """Environment variable with the key of the server."""
    server_timeout: float = Field(600, gt=0)
    """Maximum seconds of one request. If no server can be reached, the run waits as long, then stops."""
    server_concurrency: int = Field(32, ge=1)
    """Requests to each server at the same time."""


class ImportConfig(Settings):
    """Published representations → stores."""

    data: Texts = Field(min_length=1)
    """Published representations: folders of save_to_disk, Arrow or Parquet files, or Hub ids, in order."""
    data_name: str | None = None
    """Configuration of a Hub dataset that has more than one."""
    data_split: str = "train"
    """Split of a dataset folder or Hub dataset."""
    bad_rows: Literal["error", "skip"] = "error"
    """If rows cannot be used: stop, or leave them out and count them."""
    pivot: str
    """Folder or Hub id of the pivot."""
    pivot_revision: str | None = None
    """Branch, tag or commit of the pivot."""
    model: str | None = None
    """Folder or Hub id of the source whose distributions the data has; only its tokenizer is used. Default: the
    distributions are the pivot's own."""
    revision: str | None = None
    """Branch, tag or commit of the model."""
    output: Path
    """Folder of the store to write. It is an aligned store if the data is aligned to the pivot."""
    pivot_store: Path | None = None
    """For aligned data: folder of the pivot's store. It is written from the same data if it does not exist."""
    dialogues: Path | None = None
    """Folder of the dialogues. If it does not exist, it is made from the rows. Default: next to the output."""
    aligned_source: int | None = Field(None, ge=0)
    """For data that was aligned for several sources: the number of the source in the names of its columns."""
    unpaired: Literal["pivot", "gold"] = "pivot"
    """For positions that were not aligned: use the pivot's distribution, or, as the authors do, give the next
    token probability 1."""
    shard_tokens: int = Field(262144, ge=1)
    """Size of a shard of the store, in pivot tokens."""
    trust_remote_code: TrustRemoteCode = False


class AlignConfig(Settings):
    """A source's store → the pivot's positions and vocabulary."""

    source_store: Path
    """Folder of the source's store."""
    pivot_store: Path
    """Folder of the pivot's store, extracted from the same dialogues."""
    output: Path
    """Folder of the aligned store to write."""
    dialogues: Path | None = None
    """Folder of the prepared dialogues. Default: next to the pivot's store."""
    positions: Literal["boundary", "dtw"] = "boundary"
    """How positions are paired. boundary: where both models have read the same bytes; dtw: by dynamic time
    warping, as in the papers."""
    dtw_cost: Literal["fusechat", "fusechat_v2", "fusellm"] = "fusechat"
    """For dtw: cost of pairing two tokens if one contains the other. fusechat: 0.1; fusechat_v2, fusellm: 1."""
    map: MapKind = "prefix"
    """How ids of the source are mapped to ids of the pivot. prefix: to the first pivot token of their text; exact:
    to the same text; min_edit_distance: to the nearest text; co_occurrence: the same, ties decided by neighbouring
    tokens; statistics: to the ids they were paired with; statistics_published: the same as FuseChat's release."""
    spread: bool = False
    """For `prefix`: where the pivot stands inside a token of the source, derive a distribution from the source's
    previous position."""
    most: int = Field(0, ge=0)
    """For statistics: map an id to this number of its most frequent partners. 0: only to the nearest."""
    unpaired: Literal["pivot", "gold"] = "pivot"
    """For unpaired positions: use the pivot's distribution, or give the next token probability 1."""
    chunks: bool = False
    """Store also the source's likelihood of each chunk of text between common token boundaries, which `alm_weight`
    of `train` needs (4 bytes per position)."""
    maps: Path | None = None
    """Folder of vocabulary maps and counts. Default: next to the output."""
    pivot_tokenizer: str | None = None
    """Folder or Hub id of the pivot's tokenizer, if the pivot has moved."""
    source_tokenizer: str | None = None
    """Folder or Hub id of the source's tokenizer, if the source has moved."""
    workers: int | None = Field(None, ge=1)
    """Number of processes. Default: one per core."""
    trust_remote_code: TrustRemoteCode = False

    @field_validator("spread")
    @classmethod
    def _of_first_tokens(cls, spread: bool, others: ValidationInfo) -> bool:
        if spread and (others.data.get("map"), others.data.get("positions")) != ("prefix", "boundary"):
            raise PydanticCustomError("prefix", "it continues `map: prefix` with `positions: boundary`; set both")
        return spread


class TrainConfig(Settings):
    """The pivot, fine-tuned on the fused distributions: a target."""

    pivot: str
    """Folder or Hub id of the model to fine-tune."""
    pivot_revision: str | None = None
    """Branch, tag or commit of the pivot."""
    aligned_stores: Annotated[list[Path], BeforeValidator(one_or_more)] = []
    """Aligned stores of the sources: one for a pairwise target, several to fuse all of them into one target
    (Multi)."""
    pivot_store: Path | None = None
    """The pivot's store, if the pivot takes part in the fusion."""
    dialogues: Path | None = None
    """Folder of the prepared dialogues. Default: next to the stores."""
    fusion: Literal["min_ce", "avg_ce"] = "min_ce"
    """Fused distribution. min_ce: that of the model with the lowest cross-entropy; avg_ce: the weighted mean."""
    compare: Literal["conversation", "token"] = "conversation"
    """Compare the cross-entropies of whole conversations, or of each token."""
    unit: Literal["token", "byte"] = "byte"
    """Compare cross-entropies per byte, which does not depend on the tokenizer, or per token, as in the papers."""
    temperature: float = Field(1.0, gt=0)
    """Temperature applied to the distributions before they are fused."""
    tail: Literal["renormalise", "bucket"] = "renormalise"
    """Probability outside the top k. renormalise: dropped; bucket: kept as one more outcome."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """Divergence that the fusion term minimises. forward_kl: cross-entropy with the fused distribution, as in the
    papers; reverse_kl: KL(student ‖ fused); js: Jensen-Shannon, between the two. The last two need `tail:
    bucket`."""
    js_beta: float = Field(0.5, gt=0, lt=1)
    """For js: weight of the fused distribution in the mean. Towards 0 it learns as forward_kl, towards 1 as
    reverse_kl."""
    alm_weight: float = Field(0.0, ge=0, le=1)
    """Share of approximate likelihood matching (ALM) in the fusion term. 0: the divergence of the top k alone; 1:
    ALM alone. Needs stores that were aligned with `chunks: true`."""
    alm_temperature: float = Field(100.0, gt=0)
    """τ of ALM: the likelihoods p of chunks are compared as p^(1/τ)."""
    clm_weight: float = Field(0.9, ge=0, le=1)
    """λ in the loss λ·CLM + (1−λ)·fusion. 1: CLM (causal language modelling) alone."""
    clm_weight_schedule: Literal["constant", "hard_and_decay", "soft"] = "constant"
    """constant: keep λ; hard_and_decay: let λ grow to 1; soft: λ = 1 − exp(−CE) of the fused distribution."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the conversations held out for the evaluation loss."""
    packing: bool = False
    """Put several blocks into one row; attention does not cross blocks."""
    dtype: Dtype = "float32"
    """Dtype of the weights in training. For mixed precision set bf16 in `training`."""
    output_dtype: Dtype = "float32"
    """Dtype of the target. auto: the pivot's. 16 bits would round away most of a light fine-tune."""
    attention: str | None = None
    """transformers' attn_implementation, for example sdpa."""
    load_in: Quantisation | None = None
    """Quantise the pivot with bitsandbytes, which has to be installed. It needs `lora`."""
    lora: Annotated[dict[str, Any] | None, _arguments_of("LoraConfig")] = None
    """Arguments of peft's LoraConfig. Default: train all weights."""
    training: Annotated[dict[str, Any], _arguments_of("TrainingArguments")]
    """Arguments of transformers' TrainingArguments. output_dir is the target's folder."""
    trust_remote_code: TrustRemoteCode = False
    _places: dict[str, str] = {}
    """File and line of each setting, for errors that are only found when the training begins."""

    @field_validator("divergence")
    @classmethod
    def _with_the_rest(cls, divergence: str, others: ValidationInfo) -> str:
        if divergence != "forward_kl" and others.data.get("tail") == "renormalise":
            raise PydanticCustomError(
                "tail",
                "it also compares what both give to all other ids together; set `tail: bucket`, which keeps that "
                "probability",
            )
        return divergence

    @field_validator("js_beta")
    @classmethod
    def _of_js(cls, beta: float, others: ValidationInfo) -> float:
        if others.data.get("divergence", "js") != "js" and beta != cls.model_fields["js_beta"].default:
            raise PydanticCustomError("js", "only `divergence: js` uses it")
        return beta


class EvaluateConfig(Settings):
    """A model, scored on held-out dialogues."""

    model: str | list[str]
    """Folder or Hub id of the model to score. May be given several times."""
    revision: str | None = None
    """Branch, tag or commit of the model."""
    dialogues: Path
    """Folder of prepared held-out dialogues, the same for all models."""
    output: Path | list[Path]
    """JSON file for the scores, one for each model."""
    dtype: Dtype = "auto"
    """Dtype of the weights. auto: the checkpoint's."""
    attention: str | None = None
    """transformers' attn_implementation, for example sdpa."""
    batch_tokens: int = Field(16384, ge=1)
    """Maximum size of a batch, in tokens with padding."""
    trust_remote_code: TrustRemoteCode = False


def read_config(kind: type[Config], path: Path | None, flags: Mapping[str, Any]) -> Config:
    """The settings in the file ``path``. Flags replace settings, and add to those that are mappings.

    Args:
        kind: The settings' model.
        path: A YAML file.
        flags: Values by name; None and empty tuples stand for flags that were not given.

    Raises:
        UserError: The file is not YAML, or settings are unknown, missing or out of range. Lists all problems
            with their lines.
    """
    settings, lines = read_yaml(path) if path else ({}, {})
    flags = {name: value for name, value in flags.items() if value not in (None, ())}
    merged = {**settings, **flags}
    both = {name for name in flags if isinstance(flags[name], dict) and isinstance(settings.get(name), dict)}
    for name in both:
        merged[name] = settings[name] | flags[name]
    try:
        config = kind.model_validate(merged)
    except ValidationError as error:
        from_file = {name: line for name, line in lines.items() if name.split(".")[0] not in flags.keys() - both}
        problems = [problem for wrong in error.errors() for problem in explained(kind, wrong)]
        texts = [f"line {from_file[at]}: {text}" if at in from_file else text for at, text in problems]
        raise UserError(f"{path or 'the settings'} cannot be used:{listed(texts)}") from error
    if isinstance(config, TrainConfig):
        config._places = {name: f"{path}, line {line}" for name, line in lines.items()}
    return config


def explained(kind: type[BaseModel], problem: Any) -> Iterator[tuple[str, str]]:
    """One of pydantic's errors as pairs of a setting's path and a sentence, one pair for each wrong argument."""
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "arguments":
        for key, message in problem["ctx"]["wrong"]:
            yield f"{name}.{key}", f"`{name}`: {message}"
        for key, hint in problem["ctx"]["unknown"]:
            yield f"{name}.{key}", f"`{name}`: {problem['ctx']['of']} has no `{key}`{hint}"
    elif problem["type"] == "extra_forbidden":
        yield name, unknown_setting(kind, name)
    elif problem["type"] == "missing":
        description = kind.model_fields[name].description
        yield "", f"`{name}` is not set (--{name.replace('_', '-')}): {description}"
    else:
        yield name, f"`{name}` cannot be {problem['input']!r}: {problem['msg']}"


def unknown_setting(kind: type[BaseModel], name: str) -> str:
    """The sentence about a setting that does not exist."""
    return f"unknown setting `{name}`{did_you_mean(name, kind.model_fields, list_known=True)}"
