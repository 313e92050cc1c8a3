"""The settings of a pipeline's file, and the builder that turns them into stages and collects all problems."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusion_trainer.config import NOT_OF_THE_RESULT, Texts, explained, one_or_more, recorded
from fusion_trainer.pipeline.launch import accelerate_config, beginning, division
from fusion_trainer.pipeline.stage import Stage
from varm_common.models import is_path

__all__ = ["Builder", "PipelineConfig", "Settings"]

Settings = dict[str, Any]

SERVERS = {"server_url", "server_model", "server_key_env", "server_timeout", "server_concurrency"}
HARMLESS = {"workers", "batch_tokens", *SERVERS}
"""Settings that do not change a result."""
KNOWN_OTHERWISE = {
    *("output", "dialogues", "maps", "source_store", "pivot_store", "aligned_stores"),
    *("data", "pivot", "model"),
}
"""Places of what a stage reads and writes. What is there counts, not where it is."""


class PipelineConfig(BaseModel):
    """A whole fusion. ``read_pipeline`` reports unknown settings together with all other problems."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    work: Path
    """Folder of all results."""
    pivot: str
    """Folder or Hub id of the model to fuse into."""
    pivot_revision: str | None = None
    """Branch, tag or commit of the pivot."""
    data: Texts = Field(min_length=1)
    """Chat data."""
    sources: list[Settings] = Field(min_length=1)
    """Source models: `model`, a `name`, settings of `extract` for this source, and settings of `align` for it
    under `align`."""
    prepare: Settings = {}
    """Settings of `fusion-trainer prepare`."""
    extract: Settings = {}
    """Settings of `fusion-trainer extract`."""
    align: Settings = {}
    """Settings of `fusion-trainer align`."""
    train: Settings = {}
    """Settings of `fusion-trainer train`, for all targets."""
    targets: dict[str, Settings] | None = None
    """Targets: `sources` by name, and settings of `train`. Default: one target per source."""
    merges: dict[str, Settings] = {"varm": {"merge_method": "varm"}}
    """Merges: `targets` by name (default: the pairwise ones), and the rest of the recipe."""
    merge_options: list[str] = []
    """Options of mergekit-yaml."""
    evaluate: Settings | None = None
    """Held-out `data`, and settings of `fusion-trainer evaluate`. Default: no evaluation."""
    launch: dict[Literal["extract", "align", "train", "evaluate"], str] = {}
    """How to start a kind of stage: an accelerate config, or a command to put before `-m`. A source with
    `device_map`, or with vLLM in this process, is extracted by one process, without an accelerate config."""
    trust_remote_code: bool = False
    """Run Python code from the model repositories."""


class Builder:
    """Collects the stages of a pipeline and every problem of its file."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.work = config.work
        self.pivot = (config.pivot, config.pivot_revision)
        self.common: Settings = {"trust_remote_code": config.trust_remote_code}
        self.of_pivot: Settings = {"pivot": config.pivot, "pivot_revision": config.pivot_revision, **self.common}
        self.stages: list[Stage] = []
        self.problems: dict[str, str] = {}
        """A sentence by the place in the file, the first one only: many stages read the same place."""

    def wrong(self, where: str, what: str) -> None:
        self.problems.setdefault(where, what)

    def texts(self, where: str, value: Any) -> list[str]:
        """The texts of a setting that is a text, a list of texts, or missing."""
        texts = [] if value is None else one_or_more(value)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            self.wrong(where, f"is {value!r}, but must be a text or a list of texts")
            return []
        return texts

    def mapping(self, where: str, value: Any) -> Settings:
        """The settings under a key that may be missing."""
        if value is None or isinstance(value, dict):
            return value or {}
        self.wrong(where, f"is {value!r}, but must be settings by name")
        return {}

    def check_name(self, where: str, name: str) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            self.wrong(where, f"`{name}` cannot be the name of a folder: use letters, digits and . + - _")

    def check_model(self, where: str, model: str) -> None:
        """A model that is a path has to exist, unless it is in the work folder, where a stage may write it."""
        if is_path(model) and not Path(model).is_relative_to(self.work) and not Path(model).is_dir():
            self.wrong(where, f"no model folder `{model}`")

    def data_files(self, where: str, data: list[str]) -> dict[str, str]:
        """Data by its place in the pipeline's file, with the template that renders it if that is a file."""
        files = {f"{where}[{number}]": file for number, file in enumerate(data)}
        for place, file in files.items():
            if file.endswith((".json", ".jsonl", ".parquet")) and not Path(file).is_file():
                self.wrong(place, f"no file `{file}`")
        template = self.config.prepare.get("template")
        return {**files, "template": template} if isinstance(template, str) and Path(template).is_file() else files

    def settings(
        self, kind: type[BaseModel], own: Settings, *given: tuple[str, Settings], elsewhere: Iterable[str] = ()
    ) -> BaseModel | None:
        """The settings of a stage; None if they are wrong.

        Args:
            kind: Their model.
            own: What the pipeline sets itself.
            given: Places in the file and the settings there. Later places win, and add to mappings.
            elsewhere: Settings that may only be set under ``prepare``.
        """
        merged: Settings = {}
        origin: dict[str, str] = {}
        for where, part in given:
            for name, value in part.items():
                if name in own:
                    self.wrong(f"{where}.{name}", "is set by the pipeline itself")
                elif name in elsewhere and where != "prepare":
                    self.wrong(f"{where}.{name}", "is set under `prepare`, for all models alike")
                if isinstance(value, dict):
                    origin |= {f"{name}.{key}": where for key in value}
                    value = {**merged[name], **value} if isinstance(merged.get(name), dict) else value
                merged[name], origin[name] = value, where
        try:
            return kind.model_validate({**merged, **own})
        except ValidationError as error:
            for problem in error.errors():
                for place, text in explained(kind, problem):
                    where = origin.get(place, given[-1][0])
                    self.wrong(".".join(part for part in (where, place) if part), text)
            return None

    def add(
        self,
        kind: str,
        name: str,
        output: Path,
        settings: BaseModel | None,
        needs: Iterable[str],
        models: Mapping[str, tuple[str, str | None]],
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Add a stage that runs a command of this program."""
        if settings is None:
            return
        launch = {str(key): value for key, value in self.config.launch.items()}.get(kind)
        if launch and accelerate_config(launch) and _uses_all_gpus(settings):
            launch = None
        decisive = _decisive(settings)
        if kind == "train" and (divided := division(launch)):
            decisive["launch"] = divided
        config = self.work / "configs" / f"{kind}-{name}.yaml"
        content = settings.model_dump(mode="json", exclude_unset=True)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        command = [*beginning(launch), kind, str(config)]
        stage = Stage(kind, name, output, command, {config: text}, decisive, list(needs), models, files or {})
        self.stages.append(stage)


def _uses_all_gpus(settings: BaseModel) -> bool:
    """Whether one process spreads the model over all GPUs."""
    in_process = getattr(settings, "engine", None) == "vllm" and not getattr(settings, "server_url", None)
    return bool(getattr(settings, "device_map", None)) or in_process


def _decisive(settings: BaseModel) -> Settings:
    """The settings that decide the result of a stage."""
    skipped = HARMLESS | KNOWN_OTHERWISE
    if getattr(settings, "engine", None) == "transformers":  # then results of earlier versions are up to date
        skipped |= {"engine", "engine_options"}
    decisive = {name: value for name, value in recorded(settings).items() if name not in skipped}
    if "training" in decisive:
        decisive["training"] = {
            name: value
            for name, value in decisive["training"].items()
            if name not in NOT_OF_THE_RESULT and not name.endswith("_token")
        }
    return decisive
