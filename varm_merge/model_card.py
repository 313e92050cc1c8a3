"""The model card of a merge: where it comes from, with which weights, and how to make it again.

Everything in it follows from the files of the folder and from the parents' own cards, so that the same folder gets
the same card. It ends with a mark of its content; a card that does not fit its mark was edited by a person, and is
theirs.
"""

import hashlib
import itertools
import json
import operator
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import ModelCard, ModelCardData

from varm_merge import report
from varm_merge.errors import VarmError
from varm_merge.lineage import FUSION

__all__ = [
    "PICTURE",
    "README",
    "Card",
    "Parent",
    "comparison_of",
    "is_generated",
    "make",
    "only_renews",
    "parents_of",
    "recipe_of",
]

README, PICTURE, RECIPE = "README.md", "weights.png", "mergekit_config.yml"
OF_MERGEKIT = re.compile(
    r"---\n(?P<metadata>.*?)\n---\n# [^\n]*\n\n"
    r"This is a merge of pre-trained language models created using \[mergekit\]\([^)\n]*\)\.\n\n"
    r"## Merge Details\n### Merge Method\n\nThis model was merged using the [^\n]* merge method[^\n]*\n\n"
    r"### Models Merged\n\nThe following models were included in the merge:\n(\* [^\n]*\n)*\n?"
    r"### Configuration\n\nThe following YAML configuration was used to produce this model:\n\n"
    r"```yaml\n.*?\n```\s*",
    re.DOTALL,
)
"""The whole of the card that mergekit writes: one with a sentence more is a person's."""
MARK = re.compile(r"\n<!-- varm-merge card ([0-9a-f]{16}) -->\n*$")
LICENSE = ("license", "license_name", "license_link")
RENEWED = (*LICENSE, "base_model", "base_model_relation", "merge_method")
CITATIONS = {
    "varm": "VaRM: *Knowledge Fusion of Chat LLMs: A Preliminary Technical Report*, Wan et al., 2024, "
    "[arXiv:2402.16107](https://arxiv.org/abs/2402.16107)",
    "sce": "SCE: *FuseChat: Knowledge Fusion of Chat Models*, Wan et al., 2024, "
    "[arXiv:2408.07990](https://arxiv.org/abs/2408.07990)",
    "mergekit": "mergekit: *Arcee's MergeKit: A Toolkit for Merging Large Language Models*, Goddard et al., 2024, "
    "[arXiv:2403.13257](https://arxiv.org/abs/2403.13257)",
}
COMPARISON_LIMIT_BYTES = 1_000_000


@dataclass(frozen=True)
class Parent:
    """A model that was merged.

    Attributes:
        name: As the recipe has it.
        role: pivot, target or model.
        hub_id: On the Hub; None for a folder.
        license: Its ``license`` metadata, with name and link of one that is ``other``; empty if unknown.
        told: What its ``fusion.json`` tells.
    """

    name: str
    role: str
    hub_id: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    told: str = ""

    def shown(self) -> dict[str, str]:
        link = f"[{self.hub_id}](https://huggingface.co/{self.hub_id})" if self.hub_id else f"`{self.name}`"
        license_name = self.license.get("license_name") or self.license.get("license", "")
        return {"role": self.role, "shown": link, "license": license_name, "told": self.told}


@dataclass
class Card:
    """README.md and the picture that it shows, and what is wrong with them."""

    text: str = ""
    picture: bytes | None = None
    generated: bool = True
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


# The recipe and its models


def recipe_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """Text and content of the recipe that a folder was merged by.

    Raises:
        VarmError: There is none, or it is no recipe.
    """
    try:
        if (path := folder / RECIPE).is_file():
            text = path.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        elif (path := folder / report.FILE_NAME).is_file():
            content = json.loads(path.read_text(encoding="utf-8"))["recipe"]["content"]
            text = yaml.safe_dump(content, sort_keys=False)
        else:
            raise VarmError(
                f"`{folder}` has no {RECIPE}: it was not merged by mergekit; "
                f"`hf upload user/name {folder}` uploads any folder"
            )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        if isinstance(error, VarmError):
            raise
        raise VarmError(f"`{path}` is no recipe: {error}") from error
    if not isinstance(content, dict) or "merge_method" not in content:
        raise VarmError(f"`{path}` is no recipe of one merge: it has no `merge_method`")
    return text.strip(), content


def parents_of(content: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Name, role and whether it may be a Hub id, of each model of a recipe; the pivot first.

    Raises:
        VarmError: mergekit does not take the recipe.
    """
    from mergekit.config import MergeConfiguration

    try:
        config = MergeConfiguration.model_validate({key: content[key] for key in content if key != "name"})
        models = config.referenced_models()
    except (ValueError, RuntimeError, TypeError) as error:
        raise VarmError(f"{RECIPE} is no recipe that mergekit takes: {error}") from error
    found: dict[str, str] = {}
    pivot = config.base_model.model.path if config.base_model else None
    text = json.dumps(content)
    for model in sorted(models, key=lambda one: (one.model.path != pivot, text.find(json.dumps(str(one))))):
        role = "pivot" if model.model.path == pivot else "target" if pivot else "model"
        found.setdefault(model.model.path, role)
        if model.lora:
            found.setdefault(model.lora.path, "adapter")
    return [(name, role, _may_be_hub_id(name)) for name, role in found.items()]


def _may_be_hub_id(name: str) -> bool:
    if name[:1] in "./~\\" or Path(name).exists():
        return False
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


# The card


def make(
    folder: Path,
    name: str,
    parents: Sequence[Parent],
    *,
    license_id: str | None = None,
    comparison: str | None = None,
    overwrite: bool = False,
) -> Card:
    """The card of a merge.

    Args:
        folder: Of the merged model. A README.md of its own is kept, with metadata added, unless mergekit or
            ``varm-merge push`` wrote it.
        name: The title.
        parents: Its models, the pivot first.
        license_id: Said by the user; else that of all parents, if it is one.
        comparison: Markdown to put in.
        overwrite: Write over the user's own README.md, too.

    Raises:
        VarmError: The folder tells no recipe.
    """
    text, content = recipe_of(folder)
    card = Card()
    own = _own_card(folder, card) if not overwrite else None
    metadata = _metadata(folder, content, parents)
    metadata |= _license(parents, license_id, own, card)
    if card.problems:
        return card
    if own is not None:
        card.generated = False
        card.text = _merged(own, metadata)
        card.remarks.append(f"{README} is your own: it gets metadata only; --overwrite-card writes a new one")
        return card
    weights = _weights_of(folder, card)
    if weights and not (folder / PICTURE).is_file():
        card.picture = _drawn(weights, card)
    picture = PICTURE if card.picture or (folder / PICTURE).is_file() else None
    made = ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=_template(),
        name=name,
        opening=_opening(content),
        parents=[parent.shown() for parent in parents],
        comparison=comparison,
        install=_install(weights),
        recipe=text,
        fence=_fence(text),
        citations=_citations(content),
        **_summary(weights, picture),
    )
    card.text = _marked(str(made))
    return card


def _template() -> str:
    return (Path(__file__).parent / "model_card.md.j2").read_text(encoding="utf-8")


def is_generated(text: str) -> bool:
    """Whether nobody has edited this card since mergekit or ``varm-merge push`` wrote it."""
    if found := MARK.search(text):
        return found[1] == _sum(text[: found.start()])
    found = OF_MERGEKIT.fullmatch(text.replace("\r\n", "\n"))
    return found is not None and set(yaml.safe_load(found["metadata"])) <= {"base_model", "library_name", "tags"}


def _marked(text: str) -> str:
    text = text.rstrip()
    return f"{text}\n\n<!-- varm-merge card {_sum(text)} -->\n"


def _sum(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]


def _own_card(folder: Path, card: Card) -> ModelCard | None:
    """The README.md that a person wrote; None if there is none."""
    if not (folder / README).is_file():
        return None
    try:
        text = (folder / README).read_text(encoding="utf-8-sig")
        return None if is_generated(text) else ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        card.problems.append(f"the metadata of {README} cannot be read: {str(error).splitlines()[0]}")
        return None


def _metadata(folder: Path, content: Mapping[str, Any], parents: Iterable[Parent]) -> dict[str, Any]:
    found = [parent.hub_id for parent in parents if parent.hub_id]
    method = str(content["merge_method"])
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        architectures = []
    generates = any(str(one).endswith("ForCausalLM") for one in architectures or [])
    return {
        **({"base_model": found, "base_model_relation": "merge"} if found else {}),
        "library_name": "transformers",
        **({"pipeline_tag": "text-generation"} if generates else {}),
        "merge_method": method,
        "tags": list(dict.fromkeys(["mergekit", "merge", method])),
    }


def _license(
    parents: Sequence[Parent], license_id: str | None, own: ModelCard | None, card: Card
) -> dict[str, str]:
    """The merge's licence: said, or that of all parents."""
    known = [dict(parent.license) for parent in parents]
    if license_id or (own is not None and vars(own.data).get("license")):
        return {"license": license_id} if license_id else {}
    if known and all(known) and all(one == known[0] for one in known):
        return known[0]
    listed = "; ".join(
        f"{parent.name}: {parent.license.get('license_name') or parent.license.get('license') or 'unknown'}"
        for parent in parents
    )
    card.problems.append(f"the licence is not clear ({listed}): say yours, for instance --license apache-2.0")
    return {}


def _merged(own: ModelCard, metadata: Mapping[str, Any]) -> str:
    """The user's card with the metadata it lacks."""
    given = vars(own.data)
    for key, value in metadata.items():
        if key == "tags":
            setattr(own.data, key, list(dict.fromkeys([*(given.get(key) or []), *value])))
        elif given.get(key) in (None, [], "") or key in LICENSE:
            setattr(own.data, key, value)
    return str(own)


def only_renews(text: str, old: str) -> bool:
    """Whether a person's card has the words of the old one, and of its metadata all but what a push knows anew."""
    new, had = ModelCard(text), ModelCard(old)
    if new.text.strip().splitlines() != had.text.strip().splitlines():
        return False
    given = vars(new.data)
    return all(
        key in RENEWED or (set(value) <= set(given.get(key) or []) if key == "tags" else given.get(key) == value)
        for key, value in vars(had.data).items()
        if value not in (None, [], "")
    )


def comparison_of(path: Path) -> str:
    """A comparison's report, its headings one level below the card's.

    Raises:
        VarmError: It cannot be read as text.
    """
    try:
        if path.stat().st_size > COMPARISON_LIMIT_BYTES:
            raise VarmError(f"`{path}` is too long for a model card: {path.stat().st_size:,} bytes")
        lines = path.read_text(encoding="utf-8").strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VarmError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if lines and lines[0].startswith("# "):
        del lines[0]  # its title; the card has one
    fences = itertools.accumulate((line.lstrip().startswith("```") for line in lines), operator.xor, initial=False)
    levels = [0 if fenced else _level(line) for line, fenced in zip(lines, fences, strict=False)]
    deeper = "#" * max(0, 3 - min(filter(None, levels), default=3))
    return "\n".join(deeper + line if level else line for line, level in zip(lines, levels, strict=True)).strip()


def _level(line: str) -> int:
    """Of a heading; 0 if it is none."""
    found = re.match(r"(#{1,6}) ", line)
    return len(found[1]) if found else 0


# What the card says


def _opening(content: Mapping[str, Any]) -> str:
    method = str(content["merge_method"])
    if method != "varm":
        return f"A merge by `{method}`, made with [mergekit](https://github.com/arcee-ai/mergekit)."
    return (
        "A merge by VaRM (Variation Ratio Merge), made with [mergekit](https://github.com/arcee-ai/mergekit) and "
        "varm-merge: a target that moved further from the pivot in some part of the model has more of that part."
    )


def _install(weights: Mapping[str, Any] | None) -> str:
    """Versions are those that the merge was made with, where it tells them."""
    if not weights:
        return "pip install mergekit varm-merge"
    told = {name: str(number).partition("+")[0] for name, number in weights.get("versions", {}).items()}
    return "pip install " + " ".join(
        f"'{name}=={number}'" for name, number in told.items() if number[:1].isdigit()
    )


def _fence(text: str) -> str:
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _citations(content: Mapping[str, Any]) -> list[str]:
    method, settings = content["merge_method"], content.get("parameters") or {}
    is_sce = method == "sce" or "select_topk" in settings or settings.get("erase_minority")
    wanted = {"varm": method == "varm", "sce": bool(is_sce), "mergekit": True}
    return [CITATIONS[name] for name, cited in wanted.items() if cited]


# Weights


def _weights_of(folder: Path, card: Card) -> dict[str, Any] | None:
    path = folder / report.FILE_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _rows(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        card.problems.append(f"`{report.FILE_NAME}` does not tell the weights of a merge: {error!r}")
        return None
    return dict(found)


def _drawn(weights: Mapping[str, Any], card: Card) -> bytes | None:
    from varm_merge import picture

    granularity = _granularity(weights)
    found = {"targets": weights["targets"], "units": {granularity: weights["units"]}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PICTURE
        try:
            picture.draw(found, granularity, path)
        except VarmError as error:
            card.remarks.append(f"the card has no picture: {error}")
            return None
        return path.read_bytes()


def _granularity(weights: Mapping[str, Any]) -> str:
    return " and ".join(dict.fromkeys(str(unit["granularity"]) for unit in weights["units"]))


def _rows(weights: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for target in weights["targets"]:
        some = [
            (float(unit["targets"][target]["weight"]), int(unit["elements"]))
            for unit in weights["units"]
            if target in unit["targets"]
        ]
        if not some:
            continue
        alone = [weight for weight, _ in some]
        mean = sum(weight * size for weight, size in some) / max(sum(size for _, size in some), 1)
        rows.append([f"`{target}`", *(f"{x:.3f}" for x in (min(alone), median(alone), max(alone), mean))])
    return rows


def _summary(weights: Mapping[str, Any] | None, picture: str | None) -> dict[str, Any]:
    if not weights:
        return {"rows": [], "picture": None}
    told = {"units": len(weights["units"]), "granularity": _granularity(weights)}
    return {"rows": _rows(weights), "picture": picture, **told}


# Parents


def told_by(folder: Path) -> str:
    """What the ``fusion.json`` of a target tells of where it comes from, in words; empty if there is none."""
    try:
        found = json.loads((folder / FUSION).read_text(encoding="utf-8"))
        sources = [Path(str(one["model"])).name for one in found.get("stores", []) if one.get("kind") == "aligned"]
        pivot = Path(str(found["pivot"]["model"])).name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f"`{pivot}` fine-tuned on what {' and '.join(f'`{one}`' for one in sources) or 'the chats'} knows"


def license_in(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """The licence that a card's metadata tell."""
    found = {key: str(metadata[key]) for key in LICENSE if metadata and metadata.get(key)}
    return found if "license" in found else {}


def local_parent(name: str, role: str) -> Parent:
    """A parent that is a folder, or was one."""
    folder = Path(name).expanduser()
    try:
        metadata = huggingface_hub.metadata_load(folder / README) if (folder / README).is_file() else None
    except (ValueError, OSError, yaml.YAMLError):
        metadata = None
    return Parent(name, role, None, license_in(metadata), told_by(folder))
