"""One file → every stage from chat data to the merged model, and the scores of all models on the way.

    prepare → extract (pivot, each source) → align (each source) → train (each target) → merge → evaluate

Every stage is a command of its own with a config of its own (``work/configs``), started by what ``launch`` names
for it. Here the file is checked as a whole and turned into the list of stages; ``stages`` runs them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from fusion_trainer.config import (
    AlignConfig,
    EvaluateConfig,
    ExtractConfig,
    PrepareConfig,
    TrainConfig,
    explained,
    read_yaml,
)
from fusion_trainer.data.templates import BUILT_IN, PIVOT
from fusion_trainer.data.templates import OWN as OWN_TEMPLATE
from fusion_trainer.pipeline.builder import (
    Builder,
    PipelineConfig,
    Settings,
    data_files,
    demand_model,
    demand_name,
    names_of,
    own_settings,
)
from fusion_trainer.pipeline.launch import accelerate_config
from fusion_trainer.pipeline.merge_stages import demand_options, merge_stages
from fusion_trainer.pipeline.stage import KINDS, Stage
from varm_common.errors import UserError, listed

__all__ = [
    "chosen",
    "read_pipeline",
]


def read_pipeline(path: Path) -> tuple[PipelineConfig, list[Stage]]:
    """A pipeline's file and its stages, in the order they run.

    Raises:
        UserError: Something in the file is wrong: all of it is told, with lines and paths in the file.
    """
    settings, lines = read_yaml(path)
    known = {name: value for name, value in settings.items() if name in PipelineConfig.model_fields}
    try:
        builder = Builder(PipelineConfig.model_validate(known))
        _plan(builder)
        problems = builder.problems
    except ValidationError as error:
        problems = list(_of_pydantic(error))
    try:
        PipelineConfig.model_validate(settings)
    except ValidationError as error:
        problems = [one for one in _of_pydantic(error) if one not in problems] + problems
    if problems:
        raise UserError(f"{path} cannot be used:{listed(_told(problems, lines))}")
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
        UserError: There is no such target.
    """
    if only is not None:
        targets = [stage.name for stage in stages if stage.kind == "train"]
        if only not in targets:
            raise UserError(f"there is no target `{only}`; there are {', '.join(targets)}")
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


def _plan(builder: Builder) -> None:
    """Add every stage of the file, and note every problem."""
    config, work = builder.config, builder.config.work
    names = names_of(builder)
    for place, launch in config.launch.items():
        if (config_file := accelerate_config(launch)) and not Path(config_file).is_file():
            builder.wrong(f"launch.{place}", f"no file `{config_file}`")
    demand_model(builder, "pivot", config.pivot)
    template = config.prepare.get("template")
    if isinstance(template, str) and template not in BUILT_IN and not Path(template).is_file():
        builder.wrong("prepare.template", f"no file `{template}`, and none of {', '.join(BUILT_IN)}")
    common: Settings = {"data": config.data, "pivot": config.pivot, "pivot_revision": config.pivot_revision}
    common |= {"trust_remote_code": config.trust_remote_code}
    pivot = (config.pivot, config.pivot_revision)
    dialogues = work / "dialogues"
    prepared = builder.settings(PrepareConfig, {**common, "dialogues": dialogues}, ("prepare", config.prepare))
    files = data_files(builder, "data", config.data)
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
        demand_model(builder, f"{where}.model", model)
        asked.append((name, source, where, model, source.get("revision")))
    for name, source, where, model, revision in asked:
        stored: Settings = {**common, "dialogues": dialogues, "model": model, "output": work / "stores" / name}
        if name == "pivot":
            stored["revision"] = revision
        special = {key: value for key, value in source.items() if key not in ("name", "model")}
        given = [
            ("prepare", config.prepare),
            ("extract", own_settings(config.extract)),
            (where, own_settings(special)),
        ]
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
    merge_stages(builder, *_targets(builder, names, dialogues))
    demand_options(builder)
    if config.evaluate is not None:
        _evaluations(builder, names, common)


def _template_file(builder: Builder, where: str, source: Settings, model: str) -> dict[str, str]:
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


def _targets(builder: Builder, names: list[str], dialogues: Path) -> tuple[list[str], list[str]]:
    """The stages of the targets; the names of all, and of the pairwise ones, which merges take by default."""
    config, work = builder.config, builder.config.work
    wanted = config.targets or {name: {"sources": [name]} for name in names}
    pairwise = []
    for target, given in wanted.items():
        where = f"targets.{target}" if config.targets else "train"
        if config.targets:
            demand_name(builder, where, target)
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


def _evaluations(builder: Builder, names: list[str], common: Settings) -> None:
    """The held-out dialogues, and a score of every model."""
    config, work = builder.config, builder.config.work
    given = dict(config.evaluate or {})
    data = builder.texts("evaluate.data", given.pop("data", None))
    if not data:
        builder.wrong("evaluate", "names no held-out `data`")
    files = data_files(builder, "evaluate.data", data)
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
