"""Checks a recipe together with its models: their headers, lineage, tokenizers, and mergekit's plan."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import (
    MergeConfiguration,
)

from varm_merge.merging.lineage import FUSION, Place, base_models_told, foreign_targets
from varm_merge.merging.method import SPEC
from varm_merge.recipes import by_name, headers
from varm_merge.recipes import inputs as recipe_models
from varm_merge.recipes.locate import means_otherwise, near
from varm_merge.recipes.recipe_file import identity, model_names, one_spelling, overwritten
from varm_merge.recipes.structure import StructureChecker, last_part
from varm_merge.recipes.yaml_lines import DUPLICATE, nodes
from varm_merge.recipes.yaml_lines import Path as TreePath

__all__ = [
    "Checker",
]


@dataclass
class Checker(StructureChecker):
    """All that is wrong with a recipe, its models included."""

    def run(self, models: bool) -> None:
        self._method()
        for path in self.lines:
            if path and path[-1] == DUPLICATE:
                self.add(path, f"`{path[-2]}` is written twice; YAML would keep the last")
        for path, node, what in nodes(self.document):
            self._known_keys(path, node, self._keys_of(what), what)
            self._parameters((*path, "parameters"), node.get("parameters"), what)
        self._dtypes()
        if self._structure():
            for path, node, what in nodes(self.document):
                key = "sources" if what == "key of a slice" else "models"
                if node.get(key) is not None:
                    self._inputs((*path, key), node[key], node.get("base_model") if key == "sources" else None)
        if self.out is not None:
            for path, message in overwritten(self.document, self.out, self.kind == "raw"):
                self.add(path, message)
        if self.by_name:
            for path, message in by_name.obstacles(self.document):
                self.add(path, message)
        if models:
            self._models()
            steps = (self._headers, self._template, self._plan, self._pivots, self._tokens, self._cards)
            for step in steps if self.kind != "raw" else ():
                if not self.problems:
                    step()

    def _headers(self) -> None:
        """Read the headers of all models, the base's first."""
        from varm_merge.merging import adapters

        content = {key: value for key, value in self.document.items() if key != "name"}
        config = one_spelling(MergeConfiguration.model_validate(content))
        references = [family.base for family in self.families] + config.referenced_models()
        for reference in dict.fromkeys(self._known(reference) for reference in references):
            if reference.model.path in self.names:
                continue
            where = self._place_of(reference)
            place = Place(reference.model.path, reference.model.revision, self.cache_dir)
            if reference.lora is not None:
                cache = self.options.lora_merge_cache
                made = adapters.merged_adapter(reference, cache) if cache else None
                place = Place(str(made)) if made is not None and made.is_dir() else place
                if message := adapters.why_unfit(reference, self.options):
                    self.add(where, message)
                    continue
            try:
                model = headers.read_model(place, self.hub)
            except ValueError as error:
                self.add(where, f"{error}{'' if place.path == reference.model.path else '; remove that folder'}")
                continue
            self.looked.models[reference] = model
            self.looked.lines[reference] = self.lines.get(where, 1)
            kept = Path(place.path) if place.path != reference.model.path else None
            stale = adapters.why_stale(reference, kept, self.cache_dir) if kept else None
            for why in (stale, headers.why_quantised(model), headers.why_whole(model)):
                if why:
                    self.tell(where, why)
            for message in model.remarks:
                self.remark(where, f"{message} (`{model.name}`)")
            base = next(iter(self.looked.models.values()))
            if message := headers.other_dtypes(base, model):
                self.remark(where, message)

    def _template(self) -> None:
        """The chat template is one, and there is a tokenizer to carry it."""
        content = {key: value for key, value in self.document.items() if key != "name"}
        config = MergeConfiguration.model_validate(content)
        if not config.chat_template:
            return
        has_tokenizer = bool(config.tokenizer or config.tokenizer_source)
        if found := recipe_models.why_no_template(config):
            message, raises = found  # with a tokenizer of its own; it copies one without a word about the template
            (self.add if raises and has_tokenizer else self.tell)(("chat_template",), message)
        elif not has_tokenizer:
            model = (config.base_model or config.referenced_models()[0]).model
            if model.path in self.names:
                return
            if why := self.hub.why_no_tokenizer(model.path, model.revision, self.cache_dir):
                self.tell(("chat_template",), f"there is no tokenizer to write the `chat_template` into: {why}")

    def _plan(self) -> None:
        """Let mergekit plan the merge, and judge its plan."""
        from varm_merge.merging.loading import patterns
        from varm_merge.recipes.dry_plan import dry_plan

        models = self.looked.models
        if self.names or not all(model.tensors for model in models.values()):
            return  # made by another recipe of the file first, or pickled on the Hub: known when they are here
        content = {key: value for key, value in self.document.items() if key != "name"}
        config = one_spelling(MergeConfiguration.model_validate(content))
        spelled = {identity(reference): reference for reference in config.referenced_models()}
        models = {spelled.get(identity(reference), reference): model for reference, model in models.items()}
        plan = dry_plan(config, self.options, models, by_name=self.by_name)
        for finding in plan.problems:
            self.add(self._place_of(finding.model), finding.message)
        for finding in plan.remarks:
            self.remark(self._place_of(finding.model), finding.message)
        for message in plan.faults:
            keys = ("slices", "modules", "tokenizer", "tokenizer_source", "merge_method")
            self.tell((next(key for key in keys if key in self.document),), message)
        if plan.lost:
            self.tell(
                ("merge_method",),
                f"mergekit's definition of {plan.architecture} leaves out {patterns(plan.lost)} of "
                f"`{next(iter(models))}`; the merge would load with random weights there",
            )
        if (plan.lost or plan.problems) and not self.by_name and not [*by_name.obstacles(self.document)]:
            other = dry_plan(config, self.options, models, by_name=True)
            if not (other.problems or other.faults or other.remarks or plan.mixed):
                self.tell(("merge_method",), by_name.next_step(self.document, models, self.path, self.out))
        if not plan.problems:
            self.looked.estimate = headers.estimate(list(models.values()), plan.outputs)
            self.looked.has_base = self.families[0].has_pivot

    def _place_of(self, model: ModelReference | None) -> TreePath:
        """Where the recipe first names a model; its ``merge_method`` for none."""
        for path, value in model_names(self.document):
            with suppress(RuntimeError, ValueError):
                if model is not None and identity(self._reference(value))[:2] == identity(model)[:2]:
                    return path
        return ("merge_method",)

    def _tokens(self) -> None:
        """Remark on models whose ids stand for other tokens."""
        if self.document.get("tokenizer") or self.document.get("tokenizer_source"):
            return
        for path, base, models, _ in self.families:
            for index, reference in enumerate(models):
                if other := headers.other_tokens(base.model.path, reference.model.path):
                    ids = "id stands" if other == 1 else "ids stand"
                    self.remark(
                        (*path, index),
                        f"{other} {ids} for other tokens in {reference} than in {base}: rows of different "
                        "tokens are merged; `tokenizer:` puts them in one order",
                    )

    def _pivots(self) -> None:
        """Targets that tell their pivot must tell this one, unless the base_model is one of two to merge."""
        if self.spec is not None and self.spec.contract.max_inputs == 2:
            return
        for path, pivot, models, has_pivot in self.families:
            known = [i for i, m in enumerate(models) if m.model.path not in self.names and m != pivot]
            if pivot.model.path in self.names or not has_pivot:
                continue
            base, *targets = (
                Place(model.model.path, model.model.revision, self.cache_dir)
                for model in (pivot, *(models[index] for index in known))
            )
            try:
                for number, told in foreign_targets(base, targets):
                    self.add(
                        (*path, known[number]),
                        f"`{targets[number].path}` was fine-tuned from `{told}` (its {FUSION}), whose weights are "
                        f"not those of the base_model `{base.path}`; make that pivot the base_model, or remove "
                        f"{FUSION} from the target if you know they fit",
                    )
            except (ValueError, OSError) as error:
                self.add(path, f"whether the targets come from `{base.path}` cannot be told: {error}")

    def _cards(self) -> None:
        """Remark on targets without a fusion.json whose cards name another base model.

        No problem: a card may name the base of the base, or the pivot by another name; weights are not compared.
        """
        for path, pivot, models, has_pivot in self.families:
            known = {last_part(pivot.model.path)}
            for index, model in enumerate(models if has_pivot and self.spec is SPEC else ()):
                place = Place(model.model.path, model.model.revision, self.cache_dir)
                if model == pivot or model.model.path in self.names or place.file(FUSION) is not None:
                    continue
                named = base_models_told(place)
                if named and not known & {last_part(one) for one in named}:
                    told = ", ".join(f"`{one}`" for one in named)
                    message = (
                        f"the card of `{model}` says that it comes from {told}, and the base_model is `{pivot}`: "
                        "varm needs the model that the target was fine-tuned from"
                    )
                    self.remark((*path, index), message)

    def _models(self) -> None:
        seen: set[str] = set()
        for path, node, _ in nodes(self.document):
            for key in ("base_model", "model"):
                value = node.get(key)
                if self.kind != "raw" and isinstance(value, str) and (otherwise := means_otherwise(value)):
                    if value not in seen:
                        self.add((*path, key), otherwise)
                    seen.add(value)
                    continue
                try:
                    reference = self._reference(node[key])
                except (KeyError, RuntimeError, ValueError):
                    continue  # not there, or reported with the structure
                for part, wanted in ((reference.model, "config.json"), (reference.lora, "adapter_config.json")):
                    if part is None or str(part) in seen or part.path in self.names:
                        continue
                    seen.add(str(part))
                    if self.kind == "raw":
                        found = Path(part.path).is_file()
                        message = None if found else f"no checkpoint file `{part.path}`{near(part.path)}"
                    else:
                        message = self.hub.why_missing(part.path, part.revision, wanted, self.cache_dir)
                        folder = Path(part.path)
                        if message is None and part is reference.lora and folder.is_dir():
                            found = any(
                                (folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")
                            )
                            message = (
                                None if found else f"the adapter `{part.path}` has no adapter_model.safetensors"
                            )
                    if message:
                        self.add((*path, key), message)
        self._tokenizers()

    def _tokenizers(self) -> None:
        """Tokenizers are there, and rows of single tokens are those of models that are merged."""
        merged = {model for family in self.families for model in (family.base, *family.models)}
        for path, source, whole in recipe_models.tokenizers(self.document):
            try:
                reference = self._reference(source)
            except (RuntimeError, ValueError):
                continue  # reported with the structure
            model = reference.model
            if not whole:
                if merged and reference not in merged:
                    self.add(path, f"`{reference}` is not among the models, so it has no row for a token")
            elif model.path not in self.names and (
                message := self.hub.why_no_tokenizer(model.path, model.revision, self.cache_dir)
            ):
                self.add(path, message)
