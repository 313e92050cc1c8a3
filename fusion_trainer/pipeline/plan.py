"""One file → every stage from chat data to the merged model, and the scores of all models.

    prepare → extract (pivot, each source) → align (each source) → train (each target) → merge → evaluate

Every stage is a command with a config of its own in ``work/configs``. Here the file is checked as a whole and
turned into the list of stages; ``runner`` runs them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from fusion_trainer.config import (
    BUILT_IN_TEMPLATES,
    AlignConfig,
    EvaluateConfig,
    ExtractConfig,
    PrepareConfig,
    TrainConfig,
    explained,
    unknown_setting,
)
from fusion_trainer.pipeline.builder import Builder, PipelineConfig, Settings
from fusion_trainer.pipeline.launch import accelerate_config
from fusion_trainer.pipeline.merges import add_merges
from fusion_trainer.pipeline.stage import KINDS, Stage
from fusion_trainer.representations.engines import unused_settings
from varm_common.errors import UserError, listed
from varm_common.models import has_chat_template
from varm_common.yaml_file import read_yaml

__all__ = ["chosen", "read_pipeline"]

OF_THE_SOURCE = ("own", "pivot", "pivot_own_end", *BUILT_IN_TEMPLATES)
"""Names that `template` of a source may have instead of a file."""


def read_pipeline(path: Path) -> tuple[PipelineConfig, list[Stage]]:
    """A pipeline's settings and its stages, in the order they run.

    Raises:
        UserError: Something in the file is wrong. Lists all problems with their lines and places in the file.
    """
    settings, lines = read_yaml(path)
    known = PipelineConfig.model_fields
    problems = [(str(name), unknown_setting(PipelineConfig, str(name))) for name in settings if name not in known]
    try:
        config = PipelineConfig.model_validate(settings)
    except ValidationError as error:
        problems += _places(error)
    else:
        builder = Builder(config)
        _build(builder)
        problems += builder.problems.items()
    if problems:
        raise UserError(f"{path} cannot be used:{listed(_with_lines(problems, lines))}")
    return config, builder.stages


def chosen(stages: Sequence[Stage], until: str | None, only: str | None) -> list[Stage]:
    """The stages to run.

    Args:
        stages: All stages.
        until: The last kind of stage to run.
        only: A target; it and what it needs are run.

    Raises:
        UserError: There is no such target.
    """
    if only is not None:
        targets = [stage.name for stage in stages if stage.kind == "train"]
        if only not in targets:
            raise UserError(f"there is no target `{only}`; there are {', '.join(targets)}")
        needed = {f"train {only}"}
        for stage in reversed(stages):
            if stage.title in needed:
                needed |= set(stage.needs)
        stages = [stage for stage in stages if stage.title in needed]
    kinds = list(KINDS)
    last = kinds.index(until or kinds[-1])
    return [stage for stage in stages if kinds.index(stage.kind) <= last]


def _places(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Problems at the top of the file, each with the path of its place."""
    for problem in error.errors():
        parts = [part for part in problem["loc"][1:] if part != "[key]"]
        inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
        for place, text in explained(PipelineConfig, problem):
            yield f"{place}{inner}", text


def _with_lines(problems: Iterable[tuple[str, str]], lines: Mapping[str, int]) -> list[str]:
    """Each problem with the line of its place, or of what contains it, in the order of the file."""
    numbered = []
    for where, what in problems:
        place = where
        while place and place not in lines:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        line = lines.get(place, 0)
        numbered.append((line, f"{f'line {line}: ' if line else ''}{f'{where}: ' if where else ''}{what}"))
    return [text for _, text in sorted(numbered, key=lambda pair: pair[0])]


def _build(builder: Builder) -> None:
    """Add every stage, and note every problem."""
    config = builder.config
    for kind, launch in config.launch.items():
        if (file := accelerate_config(launch)) and not Path(file).is_file():
            builder.wrong(f"launch.{kind}", f"no file `{file}`")
    builder.check_model("pivot", config.pivot)
    template = config.prepare.get("template")
    if isinstance(template, str) and template not in BUILT_IN_TEMPLATES and not Path(template).is_file():
        builder.wrong("prepare.template", f"no file `{template}`, and none of {', '.join(BUILT_IN_TEMPLATES)}")
    for model in builder.texts("prepare.fit_tokenizers", config.prepare.get("fit_tokenizers")):
        name = model if Path(model).is_dir() else model.partition("@")[0]
        builder.check_model("prepare.fit_tokenizers", name)
    _add_prepare(builder, "dialogues", "data", config.data)
    names = _add_extractions(builder)
    chunks: list[str] = []
    for number, (name, source) in enumerate(zip(names, config.sources, strict=True)):
        own = {
            "source_store": builder.work / "stores" / name,
            "pivot_store": builder.work / "stores" / "pivot",
            "output": builder.work / "aligned" / name,
            "dialogues": builder.work / "dialogues",
            "maps": builder.work / "maps",
            **builder.common,
        }
        given = builder.mapping(f"sources[{number}].align", source.get("align"))
        settings = builder.settings(AlignConfig, own, ("align", config.align), (f"sources[{number}].align", given))
        if isinstance(settings, AlignConfig) and settings.chunks:
            chunks.append(name)
        builder.add("align", name, own["output"], settings, ["extract pivot", f"extract {name}"], {})
    add_merges(builder, *_add_trainings(builder, names, chunks))
    if config.evaluate is not None:
        _add_evaluations(builder, names, dict(config.evaluate))


def _add_prepare(builder: Builder, name: str, where: str, data: list[str]) -> None:
    own = {**builder.of_pivot, "data": data, "dialogues": builder.work / name}
    settings = builder.settings(PrepareConfig, own, ("prepare", builder.config.prepare))
    files = builder.data_files(where, data)
    builder.add("prepare", name, own["dialogues"], settings, (), {"pivot": builder.pivot}, files)


def _add_extractions(builder: Builder) -> list[str]:
    """Add the extraction of the pivot and of each source. Returns the sources' names."""
    config = builder.config
    own = {**builder.of_pivot, "data": config.data, "dialogues": builder.work / "dialogues"}

    def add(name: str, model: str, *given: tuple[str, Settings], **files: str) -> None:
        output = builder.work / "stores" / name
        ours = {**own, "model": model, "output": output}
        revision = given[-1][1].get("revision")
        if name == "pivot":
            ours["revision"] = revision = config.pivot_revision
        parts = [("prepare", config.prepare), *given]
        settings = builder.settings(ExtractConfig, ours, *parts, elsewhere=PrepareConfig.model_fields)
        if isinstance(settings, ExtractConfig) and (problem := unused_settings(settings)):
            builder.wrong(given[-1][0], problem)
        builder.add("extract", name, output, settings, ["prepare dialogues"], {"model": (model, revision)}, files)

    # the pivot reads the dialogues as they are
    add("pivot", config.pivot, ("extract", {k: v for k, v in config.extract.items() if k != "template"}))
    names: list[str] = []
    for number, source in enumerate(config.sources):
        where, model = f"sources[{number}]", source.get("model")
        name = str(source.get("name") or Path(str(model or number)).name)
        if name in names:
            builder.wrong(f"{where}.name", f"`{name}` is the name of another source, too; give a `name`")
        if name == "pivot":
            builder.wrong(f"{where}.name", "`pivot` is the pivot's name; give a `name`")
        builder.check_name(f"{where}.name", name)
        names.append(name)
        if not isinstance(model, str):
            builder.wrong(where, "names no `model`")
            continue
        builder.check_model(f"{where}.model", model)
        files = _template_file(builder, where, source, model)
        source = {key: value for key, value in source.items() if key not in ("name", "model", "align")}
        add(name, model, ("extract", _own_template(config.extract)), (where, _own_template(source)), **files)
    return names


def _own_template(settings: Settings) -> Settings:
    """Under ``extract``, ``template`` is that of the source; the pivot's is set under ``prepare``."""
    return {"source_template" if name == "template" else name: value for name, value in settings.items()}


def _template_file(builder: Builder, where: str, source: Settings, model: str) -> dict[str, str]:
    """The Jinja file in which a source is queried, if it is one. A wrong choice is noted."""
    place = f"{where}.template" if "template" in source else "extract.template"
    template = source.get("template", builder.config.extract.get("template", "own"))
    if isinstance(template, str) and template not in OF_THE_SOURCE:
        if Path(template).is_file():
            return {"template": template}
        builder.wrong(place, f"no file `{template}`, and none of {', '.join(OF_THE_SOURCE)}")
    lacks_template = Path(model).is_dir() and not has_chat_template(Path(model))
    if template == "own" and lacks_template and _are_chats(builder.config.data):
        choices = ", ".join(OF_THE_SOURCE[1:])
        builder.wrong(where, f"`{model}` has no chat template: set `template` to {choices} or a Jinja file")
    return {}


def _are_chats(data: Sequence[str]) -> bool:
    """Whether the first row of the first readable JSON Lines file is not plain text."""
    for path in map(Path, data):
        with suppress(OSError, ValueError):
            if path.suffix == ".jsonl":
                with path.open(encoding="utf-8") as file:
                    row = json.loads(file.readline())
                return isinstance(row, dict) and "text" not in row
    return False


def _add_trainings(builder: Builder, names: list[str], chunks: list[str]) -> tuple[list[str], list[str]]:
    """Add the training of each target. Returns the names of all targets, and of the pairwise ones.

    Args:
        builder: What the stages are added to.
        names: The sources.
        chunks: Those that are aligned with `chunks: true`.
    """
    config, work = builder.config, builder.work
    targets = config.targets or {name: {"sources": [name]} for name in names}
    pairwise = []
    for target, given in targets.items():
        where = f"targets.{target}" if config.targets else "train"
        if config.targets:
            builder.check_name(where, target)
        sources = builder.texts(f"{where}.sources", given.get("sources"))
        for unknown in [source for source in sources if source not in names]:
            builder.wrong(f"{where}.sources", f"no source `{unknown}`; there are {', '.join(names)}")
        own = {**builder.of_pivot, "dialogues": work / "dialogues"}
        needs = ["prepare dialogues"]
        if sources:
            own["pivot_store"] = work / "stores" / "pivot"
            own["aligned_stores"] = [work / "aligned" / source for source in sources]
            needs += ["extract pivot", *(f"align {source}" for source in sources)]
        output = work / "targets" / target
        special = {key: value for key, value in given.items() if key != "sources"}
        for place, part in (("train", config.train), (where, special)):
            if isinstance(training := part.get("training"), dict) and "output_dir" in training:
                builder.wrong(f"{place}.training.output_dir", "is set by the pipeline itself")
        ours = ("", {"training": {"output_dir": str(output)}})
        settings = builder.settings(TrainConfig, own, ours, ("train", config.train), (where, special))
        if isinstance(settings, TrainConfig):
            if not sources and settings.clm_weight < 1:
                builder.wrong(where, "has no `sources`; for CLM alone set `clm_weight: 1`")
            if settings.alm_weight and not {*sources} <= {*chunks}:
                builder.wrong(f"{where}.alm_weight", "needs chunks; set `chunks: true` under `align`")
            if settings.load_in and settings.lora is None:
                builder.wrong(f"{where}.load_in", "needs `lora`: quantised weights themselves cannot be trained")
        builder.add("train", target, output, settings, needs, {"pivot": builder.pivot})
        if len(sources) == 1:
            pairwise.append(target)
    return list(targets), pairwise


def _add_evaluations(builder: Builder, names: list[str], given: Settings) -> None:
    """Add the held-out dialogues, and the score of every model."""
    config = builder.config
    data = builder.texts("evaluate.data", given.pop("data", None))
    if not data:
        builder.wrong("evaluate", "names no held-out `data`")
    _add_prepare(builder, "held_out", "evaluate.data", data)

    def add(label: str, model: str, revision: str | None, *needs: str) -> None:
        output = builder.work / "scores" / label
        own = {"model": model, "revision": revision, "dialogues": builder.work / "held_out", **builder.common}
        own["output"] = output / "scores.json"
        settings = builder.settings(EvaluateConfig, own, ("evaluate", given))
        models = {} if needs else {"model": (model, revision)}
        builder.add("evaluate", label, output, settings, ["prepare held_out", *needs], models)

    add("pivot", *builder.pivot)
    for name, source in zip(names, config.sources, strict=True):
        if "server_url" not in source:  # this program may have no weights of it
            add(f"source-{name}", str(source.get("model")), source.get("revision"))
    for stage in [stage for stage in builder.stages if stage.kind in ("train", "merge")]:
        label = "target" if stage.kind == "train" else "merge"
        add(f"{label}-{stage.name}", str(stage.output), None, stage.title)
