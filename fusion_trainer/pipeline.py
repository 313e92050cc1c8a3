"""One file → every stage from chat data to the merged model, and the scores of all models on the way.

    prepare → extract (pivot, each source) → align (each source) → train (each target) → merge → evaluate

Every stage is a command of its own with a config of its own (``work/configs``), started by what ``launch`` names
for it. Here the file is checked as a whole and turned into the list of stages; ``stages`` runs them.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fusion_trainer.config import (
    NOT_OF_THE_RESULT,
    AlignConfig,
    EvaluateConfig,
    ExtractConfig,
    PrepareConfig,
    TrainConfig,
    explained,
    one_or_more,
    read_yaml,
)
from fusion_trainer.errors import FusionError, listed
from fusion_trainer.processes import MERGEKIT, OWN
from fusion_trainer.stages import KINDS, Stage
from fusion_trainer.templates import BUILT_IN, PIVOT
from fusion_trainer.templates import OWN as OWN_TEMPLATE

__all__ = ["PipelineConfig", "chosen", "read_pipeline"]

Settings = dict[str, Any]
WITHOUT_PIVOT = ("linear",)
"""Merge methods that take no base model."""
BETWEEN_TWO = ("slerp",)
"""Merge methods whose base model is one of the two they merge."""
ACCELERATE = (".yaml", ".yml")
HARMLESS = {
    "workers",
    "batch_tokens",
    "output",
    "dialogues",
    "maps",
    "source_store",
    "pivot_store",
    "aligned_stores",
}
"""Settings that do not change what a stage makes, or are places of what it depends on."""


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


class _Builder:
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
        decides = _of_the_result(settings.model_dump(mode="json"))
        launch = self.config.launch.get(kind)  # type: ignore[call-overload]
        divides = _divides(launch) if kind == "train" and launch else {}
        config = self.config.work / "configs" / f"{kind}-{name}.yaml"
        content = settings.model_dump(mode="json", exclude_unset=True)
        self.stages.append(
            Stage(
                kind,
                name,
                output,
                [*_launched(launch), kind, str(config)],
                {config: yaml.safe_dump(content, sort_keys=False, allow_unicode=True)},
                {**decides, **({"launch": divides} if divides else {})},
                list(needs),
                models,
                files or {},
            )
        )


def read_pipeline(path: Path) -> tuple[PipelineConfig, list[Stage]]:
    """A pipeline's file and its stages, in the order they run.

    Raises:
        FusionError: Something in the file is wrong: all of it is told, with lines and paths in the file.
    """
    settings, lines = read_yaml(path)
    known = {name: value for name, value in settings.items() if name in PipelineConfig.model_fields}
    try:
        builder = _Builder(PipelineConfig.model_validate(known))
        _plan(builder)
        problems = builder.problems
    except ValidationError as error:
        problems = list(_of_pydantic(error))
    try:
        PipelineConfig.model_validate(settings)
    except ValidationError as error:
        problems = [one for one in _of_pydantic(error) if one not in problems] + problems
    if problems:
        raise FusionError(f"{path} cannot be used:{listed(_told(problems, lines))}")
    return builder.config, builder.stages


def _of_pydantic(error: ValidationError) -> Iterator[tuple[str, str]]:
    """What is wrong with the top of the file, each with the whole path to it."""
    for problem in error.errors():
        inner = [f"[{one}]" if isinstance(one, int) else f".{one}" for one in problem["loc"][1:] if one != "[key]"]
        for place, text in explained(PipelineConfig, problem, ""):
            yield f"{place}{''.join(inner)}", text


def chosen(stages: Sequence[Stage], until: str | None, only: str | None) -> list[Stage]:
    """The stages to run.

    Args:
        stages: All.
        until: The last kind of stage.
        only: A target; it, and what it needs.

    Raises:
        FusionError: There is no such target.
    """
    if only is not None:
        targets = [stage.name for stage in stages if stage.kind == "train"]
        if only not in targets:
            raise FusionError(f"there is no target `{only}`; there are {', '.join(targets)}")
        by_title = {stage.title: stage for stage in stages}
        wanted, found = [f"train {only}"], set[str]()
        while wanted:
            found.add(title := wanted.pop())
            wanted += by_title[title].needs
        stages = [stage for stage in stages if stage.title in found]
    last = KINDS.index(until) if until else len(KINDS)
    return [stage for stage in stages if KINDS.index(stage.kind) <= last]


def _told(problems: Iterable[tuple[str, str]], lines: Mapping[str, int]) -> list[str]:
    """Each problem with its line, or that of what it is in, in the order of the file."""
    told = []
    for where, what in problems:
        place = where
        while place and place not in lines:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        line = lines.get(place, 0)
        told.append((line, f"{f'line {line}: ' if line else ''}{f'{where}: ' if where else ''}{what}"))
    return [text for _, text in sorted(told, key=lambda one: one[0])]


def _plan(builder: _Builder) -> None:
    """Add every stage of the file, and note every problem."""
    config, work = builder.config, builder.config.work
    names = _names(builder)
    for place, launch in config.launch.items():
        if (config_file := _accelerate_config(launch)) and not Path(config_file).is_file():
            builder.wrong(f"launch.{place}", f"no file `{config_file}`")
    _demand_model(builder, "pivot", config.pivot)
    template = config.prepare.get("template")
    if isinstance(template, str) and template not in BUILT_IN and not Path(template).is_file():
        builder.wrong("prepare.template", f"no file `{template}`, and none of {', '.join(BUILT_IN)}")
    common: Settings = {"data": config.data, "pivot": config.pivot, "pivot_revision": config.pivot_revision}
    common |= {"trust_remote_code": config.trust_remote_code}
    pivot = (config.pivot, config.pivot_revision)
    dialogues = work / "dialogues"
    prepared = builder.settings(PrepareConfig, {**common, "dialogues": dialogues}, ("prepare", config.prepare))
    files = _files(builder, "data", config.data)
    builder.add("prepare", "dialogues", dialogues, prepared, (), {"pivot": pivot}, files)

    asked: list[tuple[str, Settings, str, str, str | None]] = [
        ("pivot", {}, "pivot", config.pivot, config.pivot_revision)
    ]
    for number, (source, name) in enumerate(zip(config.sources, names, strict=True)):
        where = f"sources[{number}]"
        model = source.get("model")
        if not isinstance(model, str):
            builder.wrong(where, "names no `model`")
            continue
        _demand_model(builder, f"{where}.model", model)
        asked.append((name, source, where, model, source.get("revision")))
    for name, source, where, model, revision in asked:
        stored: Settings = {**common, "dialogues": dialogues, "model": model, "output": work / "stores" / name}
        if name == "pivot":
            stored["revision"] = revision
        special = {key: value for key, value in source.items() if key not in ("name", "model")}
        given = [("prepare", config.prepare), ("extract", _own(config.extract)), (where, _own(special))]
        if name == "pivot":  # it reads the dialogues as they are
            given[1] = ("extract", {key: value for key, value in config.extract.items() if key != "template"})
        extracted = builder.settings(ExtractConfig, stored, *given, not_here=PrepareConfig.model_fields)
        files = _template_file(builder, where, special, model) if name != "pivot" else {}
        asks = {"model": (model, revision)}
        builder.add("extract", name, work / "stores" / name, extracted, ["prepare dialogues"], asks, files)
    for name in names:
        own: Settings = {"source_store": work / "stores" / name, "pivot_store": work / "stores" / "pivot"}
        own |= {"output": work / "aligned" / name, "dialogues": dialogues, "maps": work / "maps"}
        own |= {"trust_remote_code": config.trust_remote_code}
        aligned = builder.settings(AlignConfig, own, ("align", config.align))
        builder.add("align", name, work / "aligned" / name, aligned, ["extract pivot", f"extract {name}"], {})
    _merges(builder, *_targets(builder, names, dialogues))
    _demand_options(builder)
    if config.evaluate is not None:
        _evaluations(builder, names, common)


def _template_file(builder: _Builder, where: str, source: Settings, model: str) -> dict[str, str]:
    """The Jinja file in which a source is queried, if it is one; what is wrong with the choice is noted."""
    place = f"{where}.template" if "template" in source else "extract.template"
    chosen = source.get("template", builder.config.extract.get("template", OWN_TEMPLATE))
    if not isinstance(chosen, str) or chosen in (*BUILT_IN, PIVOT):
        return {}
    if chosen != OWN_TEMPLATE:
        if not Path(chosen).is_file():
            builder.wrong(place, f"no file `{chosen}`, and none of {OWN_TEMPLATE}, {PIVOT}, {', '.join(BUILT_IN)}")
            return {}
        return {"template": chosen}
    if Path(model).is_dir() and not _has_template(Path(model)) and _are_chats(builder.config.data):
        what = f"`{model}` has no chat template: set `template` to {PIVOT}, {', '.join(BUILT_IN)} or a Jinja file"
        builder.wrong(where, what)
    return {}


def _are_chats(data: Sequence[str]) -> bool:
    """Whether the first row of a local JSON Lines file is known to be no plain text."""
    for path in map(Path, data):
        with suppress(OSError, ValueError):
            if path.suffix == ".jsonl":
                with path.open(encoding="utf-8") as file:
                    row = json.loads(file.readline())
                return isinstance(row, dict) and "text" not in row
    return False


def _has_template(folder: Path) -> bool:
    """Whether a folder's tokenizer has a chat template, as transformers saves it."""
    if (folder / "chat_template.jinja").is_file() or (folder / "additional_chat_templates").is_dir():
        return True
    try:
        return bool(
            json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        )
    except (OSError, ValueError, AttributeError):
        return False


def _own(settings: Settings) -> Settings:
    """Settings of ``extract``, where ``template`` is that of the source; the pivot's stands under ``prepare``."""
    return {"source_template" if name == "template" else name: value for name, value in settings.items()}


def _names(builder: _Builder) -> list[str]:
    """The sources' names, each once; ``pivot`` is taken."""
    names: list[str] = []
    for number, source in enumerate(builder.config.sources):
        name = str(source.get("name") or Path(str(source.get("model", number))).name)
        where = f"sources[{number}].name"
        if name in names:
            builder.wrong(where, f"`{name}` is the name of another source, too; give a `name`")
        if name == "pivot":
            builder.wrong(where, "`pivot` is the pivot's name; give a `name`")
        _demand_name(builder, where, name)
        names.append(name)
    return names


def _demand_name(builder: _Builder, where: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        builder.wrong(where, f"`{name}` cannot be the name of a folder: letters, digits and . + - _ alone")


def _files(builder: _Builder, where: str, data: Sequence[str]) -> dict[str, str]:
    """Data and template by their places in the file."""
    found = {f"{where}[{number}]": one for number, one in enumerate(data)}
    for place, value in found.items():
        if value.endswith((".json", ".jsonl", ".parquet")) and not Path(value).is_file():
            builder.wrong(place, f"no file `{value}`")
    template = builder.config.prepare.get("template")
    return {**found, "template": template} if isinstance(template, str) and Path(template).is_file() else found


def _demand_model(builder: _Builder, where: str, model: str, later: Sequence[Path] = ()) -> None:
    """See that a model's folder is there, or is one of those made ``later``."""
    is_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    will_be = any(Path(model).is_relative_to(folder) for folder in later)
    if is_path and not will_be and not Path(model).is_dir():
        builder.wrong(where, f"no model folder `{model}`")


def _targets(builder: _Builder, names: list[str], dialogues: Path) -> tuple[list[str], list[str]]:
    """The stages of the targets; the names of all, and of the pairwise ones, which merges take by default."""
    config, work = builder.config, builder.config.work
    wanted = config.targets or {name: {"sources": [name]} for name in names}
    pairwise = []
    for target, given in wanted.items():
        where = f"targets.{target}" if config.targets else "train"
        if config.targets:
            _demand_name(builder, where, target)
        sources = builder.texts(f"{where}.sources", given.get("sources"))
        for unknown in [source for source in sources if source not in names]:
            builder.wrong(f"{where}.sources", f"no source `{unknown}`; there are {', '.join(names)}")
        folder = work / "targets" / target
        own: Settings = {"pivot": config.pivot, "pivot_revision": config.pivot_revision, "dialogues": dialogues}
        own |= {"trust_remote_code": config.trust_remote_code}
        needs = ["prepare dialogues"]
        if sources:
            own |= {"pivot_store": work / "stores" / "pivot"}
            own |= {"aligned_stores": [work / "aligned" / source for source in sources]}
            needs += ["extract pivot", *(f"align {source}" for source in sources)]
        special = {key: value for key, value in given.items() if key != "sources"}
        parts = [("", {"training": {"output_dir": str(folder)}}), ("train", config.train), (where, special)]
        for place, part in parts[1:]:
            training = part.get("training")
            if isinstance(training, dict) and "output_dir" in training:
                builder.wrong(f"{place}.training.output_dir", "is set by the pipeline itself")
        settings = builder.settings(TrainConfig, own, *parts)
        if isinstance(settings, TrainConfig) and not sources and settings.clm_weight < 1:
            builder.wrong(where, "names no `sources`; for CLM alone set `clm_weight: 1`")
        if isinstance(settings, TrainConfig) and settings.load_in and settings.lora is None:
            builder.wrong(f"{where}.load_in", "needs `lora`: quantised weights themselves cannot be trained")
        builder.add("train", target, folder, settings, needs, {"pivot": (config.pivot, config.pivot_revision)})
        if len(sources) == 1:
            pairwise.append(target)
    return list(wanted), pairwise


def _merges(builder: _Builder, trained: list[str], pairwise: list[str]) -> None:
    config, work = builder.config, builder.config.work
    for name, given in config.merges.items():
        where, before = f"merges.{name}", len(builder.problems)
        _demand_name(builder, where, name)
        targets = builder.texts(f"{where}.targets", given["targets"]) if "targets" in given else pairwise
        for unknown in [target for target in targets if target not in trained]:
            builder.wrong(f"{where}.targets", f"no target `{unknown}`; there are {', '.join(trained)}")
        if not targets:
            builder.wrong(f"{where}.targets", "there is no target to merge")
        own = given.get("model_parameters") or {}
        if not isinstance(own, dict):
            builder.wrong(f"{where}.model_parameters", "is no mapping of targets to parameters")
            own = {}
        for unknown in [target for target in own if target not in targets]:
            builder.wrong(f"{where}.model_parameters.{unknown}", f"no target `{unknown}` in this merge")
        if "models" in given:
            builder.wrong(f"{where}.models", "is set by the pipeline itself; name `targets`")
        method = given.get("merge_method")
        if not isinstance(method, str):
            builder.wrong(where, "names no `merge_method`")
            continue
        folders = {target: work / "targets" / target for target in targets}
        content = {key: value for key, value in given.items() if key not in ("targets", "model_parameters")}
        if method in BETWEEN_TWO and len(targets) != 2:
            builder.wrong(where, f"{method} is between two targets, not {len(targets)}; name them in `targets`")
        if method in BETWEEN_TWO and targets:
            content.setdefault("base_model", _place(folders[targets[0]]))
        elif method not in WITHOUT_PIVOT:
            content.setdefault("base_model", _reference(config))
        content["models"] = [
            {"model": _place(folder), **({"parameters": own[target]} if target in own else {})}
            for target, folder in folders.items()
        ]
        if len(builder.problems) == before:
            _demand_recipe(builder, where, content)
        recipe = work / "recipes" / f"{name}.yaml"
        output = work / "merges" / name
        text = f"# mergekit-yaml {recipe} {output}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"
        command = [*MERGEKIT, str(recipe), str(output), *config.merge_options]
        needs = [f"train {target}" for target in targets]
        settings = {**given, "targets": targets, "options": config.merge_options}
        pivot = {"pivot": (config.pivot, config.pivot_revision)}
        builder.stages.append(Stage("merge", name, output, command, {recipe: text}, settings, needs, pivot, {}))


def _demand_recipe(builder: _Builder, where: str, content: Settings) -> None:
    """See that mergekit takes the recipe."""
    from varm_merge import recipe

    if isinstance(base := content.get("base_model"), str) and Path(base) != Path(builder.config.pivot):
        _demand_model(builder, f"{where}.base_model", base, [builder.config.work])
    for problem in recipe.check(yaml.safe_dump(content, sort_keys=False), models=False, every=True):
        builder.wrong(".".join([where, *map(str, problem.path)]), problem.message)


def _demand_options(builder: _Builder) -> None:
    """See that mergekit-yaml takes the options."""
    from mergekit.scripts.run_yaml import main

    try:
        main.make_context("mergekit-yaml", ["recipe.yaml", "out", *builder.config.merge_options])
    except click.ClickException as error:
        builder.wrong("merge_options", f"mergekit-yaml does not take them: {error.format_message()}")
    except click.exceptions.Exit:
        builder.wrong("merge_options", "with these mergekit-yaml does not merge")


def _evaluations(builder: _Builder, names: list[str], common: Settings) -> None:
    """The held-out dialogues, and a score of every model."""
    config, work = builder.config, builder.config.work
    given = dict(config.evaluate or {})
    data = builder.texts("evaluate.data", given.pop("data", None))
    if not data:
        builder.wrong("evaluate", "names no held-out `data`")
    files = _files(builder, "evaluate.data", data)
    folder = work / "held_out"
    prepared = builder.settings(
        PrepareConfig, {**common, "data": data, "dialogues": folder}, ("prepare", config.prepare)
    )
    pivot = {"pivot": (config.pivot, config.pivot_revision)}
    builder.add("prepare", "held_out", folder, prepared, (), pivot, files)
    models: list[tuple[str, str, str | None, list[str]]] = [("pivot", config.pivot, config.pivot_revision, [])]
    for name, source in zip(names, config.sources, strict=True):
        models.append((f"source {name}", str(source.get("model")), source.get("revision"), []))
    for stage in [stage for stage in builder.stages if stage.kind in ("train", "merge")]:
        label = "target" if stage.kind == "train" else "merge"
        models.append((f"{label} {stage.name}", str(stage.output), None, [f"{stage.kind} {stage.name}"]))
    for label, model, revision, needs in models:
        slug = label.replace(" ", "-")
        output = work / "scores" / slug
        own: Settings = {
            "model": model,
            "revision": revision,
            "dialogues": folder,
            "output": output / "scores.json",
        }
        own |= {"trust_remote_code": config.trust_remote_code}
        settings = builder.settings(EvaluateConfig, own, ("evaluate", given))
        outside = {} if needs else {"model": (model, revision)}
        builder.add("evaluate", slug, output, settings, ["prepare held_out", *needs], outside)


def _launched(launch: str | None) -> list[str]:
    if not launch:
        return OWN
    if config := _accelerate_config(launch):
        head = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    else:
        head = _words(launch)
    return [*head, "-m", "fusion_trainer"]


def _divides(launch: str) -> dict[str, Any]:
    """What of a launch decides a target: in what precision, and how many processes share an update."""
    found: dict[str, Any] = {}
    words = _words(launch)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.endswith(ACCELERATE):
            with suppress(OSError, yaml.YAMLError, AttributeError):  # that it is not there is told elsewhere
                content = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
                found |= {name: content.get(name) for name in ("num_processes", "mixed_precision")}
        elif named := re.search(r"(num_processes|mixed_precision)(=.*)?$", word, re.IGNORECASE):
            found[named[1].lower()] = (named[2] or following).lstrip("=")
    return found


def _words(command: str) -> list[str]:
    """As a shell reads it; what it cannot read is one word, and no program."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]


def _accelerate_config(launch: str) -> str | None:
    """The file, if that is what is named; a command may end with one, too."""
    words = _words(launch)
    return words[0] if len(words) == 1 and words[0].endswith(ACCELERATE) else None


def _of_the_result(settings: Settings) -> Settings:
    found = {name: value for name, value in settings.items() if name not in HARMLESS}
    if "training" in found:
        training = found["training"]
        found["training"] = {
            k: v for k, v in training.items() if k not in NOT_OF_THE_RESULT and k[-6:] != "_token"
        }
    for name in ("data", "pivot", "model"):  # they are known by their content
        found.pop(name, None)
    return found


def _place(folder: Path) -> str:
    """A folder in a form that mergekit does not take for a Hub id."""
    return str(folder) if folder.is_absolute() else f"./{folder}"


def _reference(config: PipelineConfig) -> str:
    if Path(config.pivot).is_dir():
        return _place(Path(config.pivot))
    return f"{config.pivot}@{config.pivot_revision}" if config.pivot_revision else config.pivot
