"""The model card of a merge: its parents, its weights and how to reproduce it.

The card follows from the files of the folder and from the parents' cards, so the same folder gets the same card.
It ends with a checksum. A card that does not match its checksum was edited by a person, and is kept.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from mergekit.card import CARD_TEMPLATE
from mergekit.config import MergeConfiguration

from varm_common.errors import UserError
from varm_common.files import read_text
from varm_merge.merging import weight_log

__all__ = ["Card", "Findings", "Options", "Parent", "is_generated", "make", "only_renews", "parents_of"]

README, PICTURE, RECIPE = "README.md", "weights.png", "mergekit_config.yml"
TEMPLATE = Path(__file__).with_name("card.md.j2")
ANY_LINES = r"[\s\S]*?"
PARTS = {"metadata": f"(?P<metadata>{ANY_LINES})", "model_list": r"(\* .*\n?)*", "config_yaml": ANY_LINES}
ESCAPED = re.escape(CARD_TEMPLATE.strip())
MERGEKIT_CARD = re.compile(re.sub(r"\\{(\w+)\\}", lambda part: PARTS.get(part[1], ".*"), ESCAPED))
"""The whole card that mergekit writes. A card with one more sentence was edited by a person."""
CHECKSUM = re.compile(r"\n<!-- varm-merge card ([0-9a-f]{16}) -->\n*$")
LICENSE = ("license", "license_name", "license_link")
RENEWED = (*LICENSE, "base_model", "base_model_relation", "merge_method")


@dataclass(frozen=True)
class Parent:
    """A model that was merged: its name in the recipe, and its id on the Hub (None for a folder).

    ``role`` is ``pivot``, ``target``, ``model`` or ``adapter``. ``license`` has its card's ``license…`` entries.
    """

    name: str
    role: str
    hub_id: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)

    @property
    def link(self) -> str:
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id})" if self.hub_id else f"`{self.name}`"

    @property
    def license_name(self) -> str:
        return self.license.get("license_name") or self.license.get("license", "")


@dataclass(frozen=True)
class Card:
    """README.md and the picture in it; ``generated`` unless a person wrote the text."""

    text: str = ""
    picture: bytes | None = None
    generated: bool = True


@dataclass
class Findings:
    """Problems that stop a push, and remarks that do not."""

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """The options of ``varm-merge push``."""

    public: bool
    license_id: str | None
    comparison: Path | None
    exclude: Sequence[str]
    overwrite_card: bool
    allow_pickle: bool
    revision: str | None
    create_pr: bool
    message: str


def read_recipe(folder: Path) -> tuple[str, dict[str, Any]]:
    """Read text and content of the recipe that produced a folder.

    Raises:
        UserError: There is no recipe, or it is not one.
    """
    path = next((path for name in (RECIPE, weight_log.FILE_NAME) if (path := folder / name).is_file()), None)
    if path is None:
        other = f"`hf upload user/name {folder}` uploads any folder."
        raise UserError(f"`{folder}` has no {RECIPE}, so it was not merged by mergekit. {other}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == RECIPE:
            content = yaml.safe_load(text)
        else:
            content = json.loads(text)["recipe"]["content"]
            text = yaml.safe_dump(content, sort_keys=False)
        if not isinstance(content, dict) or "merge_method" not in content:
            raise ValueError("it has no `merge_method`")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"`{path}` is not a merge recipe: {error}") from error
    return text.strip(), content


def parents_of(folder: Path) -> list[tuple[str, str]]:
    """List name and role of each model of the recipe that produced a folder, the pivot first.

    Raises:
        UserError: There is no recipe, or mergekit does not accept it.
    """
    _, content = read_recipe(folder)
    try:
        config = MergeConfiguration.model_validate({key: content[key] for key in content if key != "name"})
        models = config.referenced_models()
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"mergekit does not accept {RECIPE}: {error}") from error
    roles: dict[str, str] = {}
    pivot = config.base_model.model.path if config.base_model else None
    text = json.dumps(content)
    for model in sorted(models, key=lambda model: (model.model.path != pivot, text.find(json.dumps(str(model))))):
        role = "pivot" if model.model.path == pivot else "target" if pivot else "model"
        roles.setdefault(model.model.path, role)
        if model.lora:
            roles.setdefault(model.lora.path, "adapter")
    return list(roles.items())


def make(folder: Path, repository: str, parents: Sequence[Parent], findings: Findings, options: Options) -> Card:
    """Write the card of a merge, with problems and remarks in ``findings``.

    A README.md that a person wrote keeps its text and gets metadata, unless it may be overwritten. The licence is
    that of the options, or the one that all parents share.

    Raises:
        UserError: The folder has no recipe, or the comparison cannot be read.
    """
    comparison = read_comparison(options.comparison) if options.comparison else None
    text, content = read_recipe(folder)
    own = None if options.overwrite_card else _own_card(folder, findings)
    metadata = _metadata(folder, content, parents) | _license(parents, options.license_id, own, findings)
    if own is not None:
        advice = "only its metadata changes; --overwrite-card writes a new card"
        findings.remarks.append(f"{README} is your own: {advice}")
        return Card(_with_metadata(own, metadata), generated=False)
    weights = _weights(folder, findings)
    has_picture = (folder / PICTURE).is_file()
    picture = _drawn(weights, findings) if weights and not has_picture else None
    settings = content.get("parameters") or {}
    body = ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=repository.partition("/")[2],
        method=content["merge_method"],
        is_sce=content["merge_method"] == "sce" or "select_topk" in settings or settings.get("erase_minority"),
        parents=parents,
        weights=weights,
        picture=PICTURE if picture or has_picture else None,
        comparison=comparison,
        packages=_packages(weights),
        recipe=text,
        fence="`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0)),
    )
    unmarked = str(body).rstrip()
    return Card(f"{unmarked}\n\n<!-- varm-merge card {_checksum(unmarked)} -->\n", picture)


def is_generated(text: str) -> bool:
    """Whether a card is as mergekit or ``varm-merge push`` wrote it."""
    if checksum := CHECKSUM.search(text):
        return checksum[1] == _checksum(text[: checksum.start()])
    card = MERGEKIT_CARD.fullmatch(text.replace("\r\n", "\n").strip())
    return card is not None and set(yaml.safe_load(card["metadata"])) <= {"base_model", "library_name", "tags"}


def _checksum(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]


def _own_card(folder: Path, findings: Findings) -> ModelCard | None:
    """Read the README.md if a person wrote it."""
    try:
        text = (folder / README).read_text(encoding="utf-8-sig")
        return None if is_generated(text) else ModelCard(text)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        findings.problems.append(f"the metadata of {README} cannot be read: {str(error).splitlines()[0]}")
        return None


def _metadata(folder: Path, content: Mapping[str, Any], parents: Sequence[Parent]) -> dict[str, Any]:
    hub_ids = [parent.hub_id for parent in parents if parent.hub_id]
    method = str(content["merge_method"])
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"] or []
    except (OSError, ValueError, KeyError, TypeError):
        architectures = []
    generates = any(str(architecture).endswith("ForCausalLM") for architecture in architectures)
    return {
        **({"base_model": hub_ids, "base_model_relation": "merge"} if hub_ids else {}),
        "library_name": "transformers",
        **({"pipeline_tag": "text-generation"} if generates else {}),
        "merge_method": method,
        "tags": list(dict.fromkeys(["mergekit", "merge", method])),
    }


def _license(
    parents: Sequence[Parent], license_id: str | None, own: ModelCard | None, findings: Findings
) -> dict[str, str]:
    """The licence of the merge: the user's choice, or the one that all parents share."""
    if license_id:
        return {"license": license_id}
    if own is not None and own.data.get("license"):
        return {}
    known = [dict(parent.license) for parent in parents]
    if known and known[0] and all(license_ == known[0] for license_ in known):
        return known[0]
    listed = "; ".join(f"{parent.name}: {parent.license_name or 'unknown'}" for parent in parents)
    findings.problems.append(f"the licence is not clear ({listed}): choose one, for instance --license apache-2.0")
    return {}


def _with_metadata(own: ModelCard, metadata: Mapping[str, Any]) -> str:
    """A person's card with the metadata that it lacks."""
    for key, value in metadata.items():
        if key == "tags":
            own.data[key] = list(dict.fromkeys([*(own.data.get(key) or []), *value]))
        elif key in LICENSE or not own.data.get(key):
            own.data[key] = value
    return str(own)


def only_renews(text: str, old: str) -> bool:
    """Whether a card keeps the text of the old one, and all its metadata but licence and parents."""
    new_card, old_card = ModelCard(text), ModelCard(old)
    if new_card.text.strip().splitlines() != old_card.text.strip().splitlines():
        return False
    new = vars(new_card.data)
    return all(
        key in RENEWED or (set(value) <= set(new.get(key) or []) if key == "tags" else new.get(key) == value)
        for key, value in vars(old_card.data).items()
        if value not in (None, [], "")
    )


def read_comparison(path: Path) -> str:
    """Read a report for the card: without its title, its headings one level deeper.

    Raises:
        UserError: It is not readable text.
    """
    text = read_text(path)
    lines, in_code = [], False
    for line in re.sub(r"\A\s*# .*", "", text).strip().splitlines():
        in_code ^= line.lstrip().startswith("```")
        lines.append(f"#{line}" if re.match(r"#{1,5} ", line) and not in_code else line)
    return "\n".join(lines)


def _packages(weights: Mapping[str, Any]) -> list[str]:
    """The packages to install, in the versions that merged the model if they are known."""
    versions = {name: str(number).partition("+")[0] for name, number in weights.get("versions", {}).items()}
    known = [f"'{name}=={number}'" for name, number in versions.items() if number[:1].isdigit()]
    return known or ["mergekit", "varm-merge"]


def _weights(folder: Path, findings: Findings) -> dict[str, Any]:
    """``varm_weights.json`` with ``rows`` for the card and its ``granularity``; empty without that file.

    A row has the lowest, median, highest and mean weight of a target. The mean is weighted by the units' sizes.
    """
    try:
        log = dict(json.loads((folder / weight_log.FILE_NAME).read_text(encoding="utf-8")))
        rows = []
        for target in log["targets"]:
            units = [unit for unit in log["units"] if target in unit["targets"]]
            shares = [float(unit["targets"][target]["weight"]) for unit in units]
            sizes = [int(unit["elements"]) for unit in units]
            if shares:
                mean = sum(share * size for share, size in zip(shares, sizes, strict=True)) / max(sum(sizes), 1)
                cells = (f"{number:.3f}" for number in (min(shares), median(shares), max(shares), mean))
                rows.append([f"`{target}`", *cells])
        granularities = dict.fromkeys(str(unit["granularity"]) for unit in log["units"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        findings.problems.append(f"`{weight_log.FILE_NAME}` does not hold the merge weights of a merge: {error!r}")
        return {}
    return {**log, "rows": rows, "granularity": " and ".join(granularities)}


def _drawn(weights: Mapping[str, Any], findings: Findings) -> bytes | None:
    """A picture of the weights as a PNG; None without matplotlib."""
    from varm_merge.inspection import heatmap

    granularity = weights["granularity"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PICTURE
        try:
            heatmap.draw({**weights, "units": {granularity: weights["units"]}}, granularity, path)
        except UserError as error:
            findings.remarks.append(f"the card has no picture: {error}")
            return None
        return path.read_bytes()


def license_in(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The licence entries of a card's metadata; empty without a licence, or with a list of several."""
    license_ = metadata.get("license")
    if isinstance(license_, list):
        license_ = license_[0] if len(license_) == 1 else None
    entries = {**metadata, "license": license_}
    return {key: str(entries[key]) for key in LICENSE if entries.get(key)} if license_ else {}
