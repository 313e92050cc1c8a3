"""Settings of a pipeline file, and the list of stages that is built from them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fusion_trainer.config import (
    explained,
    one_or_more,
)
from fusion_trainer.pipeline.launch import divides_work, launched, of_the_result
from fusion_trainer.pipeline.stage import Stage

__all__ = [
    "Builder",
    "PipelineConfig",
    "Settings",
    "data_files",
    "demand_model",
    "demand_name",
    "folder_name",
    "names_of",
    "own_settings",
    "reference",
]

Settings = dict[str, Any]


class PipelineConfig(BaseModel):
    """The whole of a fusion."""

    model_config = ConfigDict(extra="forbid")

    work: Path = Field(description="Folder of everything that is made.")
    pivot: str = Field(description="Folder or Hub id of the model to fuse into.")
    pivot_revision: str | None = Field(None, description="Branch, tag or commit of the pivot.")
    data: Annotated[list[str], BeforeValidator(one_or_more)] = Field(min_length=1, description="Chat data.")
    sources: list[Settings] = Field(
        min_length=1, description="Source models: `model`, a `name`, and settings of `extract` for this one."
    )
    prepare: Settings = Field({}, description="Settings of `fusion-trainer prepare`.")
    extract: Settings = Field({}, description="Settings of `fusion-trainer extract`.")
    align: Settings = Field({}, description="Settings of `fusion-trainer align`.")
    train: Settings = Field({}, description="Settings of `fusion-trainer train`, for all targets.")
    targets: dict[str, Settings] | None = Field(
        None, description="Targets: `sources` by name, and settings of `train`; default one per source."
    )
    merges: dict[str, Settings] = Field(
        {"varm": {"merge_method": "varm"}},
        description="Merges: `targets` by name (default the pairwise ones), and what else stands in the recipe.",
    )
    merge_options: list[str] = Field([], description="Options of mergekit-yaml.")
    evaluate: Settings | None = Field(
        None, description="Held-out `data`, and settings of `fusion-trainer evaluate`; left out if not set."
    )
    launch: dict[Literal["extract", "align", "train", "evaluate"], str] = Field(
        {}, description="How a kind of stage is started: an accelerate config, or a command to put before `-m`."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model repositories bring along.")


class Builder:
    """Collects stages, and all that is wrong with the settings they are made of."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.stages: list[Stage] = []
        self.problems: list[tuple[str, str]] = []

    def wrong(self, where: str, what: str) -> None:
        """Note a problem; a place in the file is told once, though many stages read it."""
        if where not in {place for place, _ in self.problems}:
            self.problems.append((where, what))

    def texts(self, where: str, value: Any) -> list[str]:
        """The texts of a setting that is one, a list of them, or left out."""
        found = [] if value is None else one_or_more(value)
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            self.wrong(where, f"is {value!r}, neither a text nor a list of them")
            return []
        return found

    def settings(
        self,
        kind: type[BaseModel],
        own: Settings,
        *given: tuple[str, Mapping[str, Any]],
        not_here: Iterable[str] = (),
    ) -> BaseModel | None:
        """A stage's config.

        Args:
            kind: Its model.
            own: What the pipeline sets.
            given: Places in the file and what they say; a later one wins, and adds to a mapping.
            not_here: Settings that have a place of their own, ``prepare``.
        """
        merged: Settings = {}
        origin: dict[str, str] = {}
        for where, part in given:
            for name, value in part.items():
                if name in own:
                    self.wrong(f"{where}.{name}", "is set by the pipeline itself")
                elif name in not_here and where != "prepare":
                    self.wrong(f"{where}.{name}", "is set under `prepare`, for all models alike")
                both = isinstance(value, dict) and isinstance(merged.get(name), dict)
                merged[name] = {**merged[name], **value} if both else value
                inner = {f"{name}.{key}": where for key in value} if isinstance(value, dict) else {}
                origin |= {name: where, **inner}
        try:
            return kind.model_validate({**merged, **own})
        except ValidationError as error:
            for problem in error.errors():
                for place, text in explained(kind, problem, ""):
                    where = origin.get(place, given[-1][0] if given else "")
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
        """A stage that runs a command of this program."""
        if settings is None:
            return
        decides = of_the_result(settings.model_dump(mode="json"))
        launch = self.config.launch.get(kind)  # type: ignore[call-overload]
        divides = divides_work(launch) if kind == "train" and launch else {}
        config = self.config.work / "configs" / f"{kind}-{name}.yaml"
        content = settings.model_dump(mode="json", exclude_unset=True)
        self.stages.append(
            Stage(
                kind,
                name,
                output,
                [*launched(launch), kind, str(config)],
                {config: yaml.safe_dump(content, sort_keys=False, allow_unicode=True)},
                {**decides, **({"launch": divides} if divides else {})},
                list(needs),
                models,
                files or {},
            )
        )


def own_settings(settings: Settings) -> Settings:
    """Settings of ``extract``, where ``template`` is that of the source; the pivot's stands under ``prepare``."""
    return {"source_template" if name == "template" else name: value for name, value in settings.items()}


def names_of(builder: Builder) -> list[str]:
    """The sources' names, each once; ``pivot`` is taken."""
    names: list[str] = []
    for number, source in enumerate(builder.config.sources):
        name = str(source.get("name") or Path(str(source.get("model", number))).name)
        where = f"sources[{number}].name"
        if name in names:
            builder.wrong(where, f"`{name}` is the name of another source, too; give a `name`")
        if name == "pivot":
            builder.wrong(where, "`pivot` is the pivot's name; give a `name`")
        demand_name(builder, where, name)
        names.append(name)
    return names


def demand_name(builder: Builder, where: str, name: str) -> None:
    """Note a problem if a name cannot be that of a folder."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        builder.wrong(where, f"`{name}` cannot be the name of a folder: letters, digits and . + - _ alone")


def data_files(builder: Builder, where: str, data: Sequence[str]) -> dict[str, str]:
    """Data and template by their places in the file."""
    found = {f"{where}[{number}]": one for number, one in enumerate(data)}
    for place, value in found.items():
        if value.endswith((".json", ".jsonl", ".parquet")) and not Path(value).is_file():
            builder.wrong(place, f"no file `{value}`")
    template = builder.config.prepare.get("template")
    return {**found, "template": template} if isinstance(template, str) and Path(template).is_file() else found


def demand_model(builder: Builder, where: str, model: str, later: Sequence[Path] = ()) -> None:
    """See that a model's folder is there, or is one of those made ``later``."""
    is_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    will_be = any(Path(model).is_relative_to(folder) for folder in later)
    if is_path and not will_be and not Path(model).is_dir():
        builder.wrong(where, f"no model folder `{model}`")


def folder_name(folder: Path) -> str:
    """A folder in a form that mergekit does not take for a Hub id."""
    return str(folder) if folder.is_absolute() else f"./{folder}"


def reference(config: PipelineConfig) -> str:
    """The pivot as a recipe names it: a folder, or a Hub id with its revision."""
    if Path(config.pivot).is_dir():
        return folder_name(Path(config.pivot))
    return f"{config.pivot}@{config.pivot_revision}" if config.pivot_revision else config.pivot
