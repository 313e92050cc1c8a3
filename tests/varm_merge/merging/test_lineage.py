"""From targets to a recipe and to a merge: only targets of one pivot are merged, and only onto that pivot."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import runs
import tiny_models
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts import run_yaml
from safetensors.torch import save
from tiny_fusion import World
from tiny_models import Family
from transformers import AutoModelForCausalLM

from fusion_trainer.cli import main
from fusion_trainer.training.train import train
from varm_common import models
from varm_merge.merging.lineage import Place, foreign_targets, weights_fingerprint
from varm_merge.recipes.check import check

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fingerprint_of(**files: str) -> str:
    """As documented: of the JSON list of [name, SHA-256 of the content], ascending by name."""
    return sha256(
        json.dumps([[f"{name}.safetensors", content] for name, content in sorted(files.items())]).encode()
    )


def tell(target: Path, pivot: Path, **changed: Any) -> Path:
    """Write what ``fusion-trainer train`` would, as far as a merge looks at it."""
    told = {"model": str(pivot), "revision": None, "weights": weights_fingerprint(Place(str(pivot)))}
    told |= {"config": "c", "tokenizer": "t", **changed}
    (target / "fusion.json").write_text(json.dumps({"pivot": told, "stores": []}))
    return target


@pytest.fixture
def told(mistral: Family, tmp_path: Path) -> Family:
    """A pivot and two targets that tell it."""
    pivot = shutil.copytree(mistral.pivot, tmp_path / "pivot")
    targets = [tell(shutil.copytree(one, tmp_path / one.name), pivot) for one in mistral.targets]
    return Family(pivot, tuple(targets))


def moved(pivot: Path, folder: Path) -> Path:
    """Another model of the same architecture."""
    shutil.copytree(pivot, folder)
    model = AutoModelForCausalLM.from_pretrained(pivot)
    tiny_models.move(model.parameters(), seed=9)
    model.save_pretrained(folder)
    return folder


# The fingerprint


def weights(name: str) -> bytes:
    """A file of one tensor, another for every name."""
    return save({name: torch.zeros(1)})


def sharded(folder: Path) -> None:
    """Two files with an index, and one that is no part of it."""
    for name in ("model-00001-of-00002", "model-00002-of-00002", "training"):
        (folder / f"{name}.safetensors").write_bytes(weights(name))
    first, second = "model-00001-of-00002", "model-00002-of-00002"
    index = {"weight_map": {first: f"{first}.safetensors", second: f"{second}.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LAYOUTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "whole": (lambda folder: (folder / "model.safetensors").write_bytes(weights("model")), ("model",)),
    "sharded": (sharded, ("model-00001-of-00002", "model-00002-of-00002")),
    "once more": (
        lambda folder: [
            (folder / f"{n}.safetensors").write_bytes(weights(n)) for n in ("consolidated", "model", "x")
        ],
        ("model",),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_packages_tell_the_fingerprint_that_is_documented(layout: str, tmp_path: Path) -> None:
    write, names = LAYOUTS[layout]
    write(tmp_path)
    expected = fingerprint_of(**{name: sha256(weights(name)) for name in names})
    assert weights_fingerprint(Place(str(tmp_path))) == expected
    assert models.weights_fingerprint(tmp_path, "a model") == expected


def test_a_large_file_is_read_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * (3 << 12) + b"end"
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_fingerprint(Place(str(tmp_path))) == fingerprint_of(model=sha256(content))


def test_a_folder_without_weights_that_transformers_reads_has_none(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.safetensors").write_bytes(b"other names")
    (tmp_path / "a.safetensors").write_bytes(b"other names")
    assert weights_fingerprint(Place(str(tmp_path))) == ""


# The Hub


def cached(cache: Path, model: str, files: dict[str, tuple[bytes, str]], commit: str = COMMIT) -> Path:
    """A model as the Hub's cache keeps it, names pointing to blobs that are named by their hash; its snapshot."""
    folder = cache / f"models--{model.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, (content, blob) in files.items():
        (folder / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def git_blob(content: bytes) -> tuple[bytes, str]:
    """A small file, which git names by its SHA-1."""
    return content, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """``org/pivot`` of two files whose blobs' names are believed: their content is another."""
    index = json.dumps({"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}).encode()
    files = {"config.json": git_blob(b"{}"), "model.safetensors.index.json": git_blob(index)}
    files |= {"model-1.safetensors": (weights("b"), "1" * 64), "model-2.safetensors": (weights("a"), "2" * 64)}
    cached(tmp_path / "cache", "org/pivot", files)
    return tmp_path / "cache"


ON_THE_HUB = {"model-1": "1" * 64, "model-2": "2" * 64}


def test_what_the_hub_has_sent_is_known_by_its_name(cache: Path) -> None:
    expected = fingerprint_of(**ON_THE_HUB)
    assert weights_fingerprint(Place("org/pivot", None, str(cache))) == expected
    assert weights_fingerprint(Place("org/pivot", COMMIT, str(cache))) == expected
    snapshot = cache / "models--org--pivot" / "snapshots" / COMMIT
    assert weights_fingerprint(Place(str(snapshot))) == models.weights_fingerprint(snapshot, "") == expected
    shutil.copytree(snapshot, cache / "copied")
    assert (
        weights_fingerprint(Place(str(cache / "copied"))) != expected
    )  # of files without such a name the content


class Hub:
    """Answers ``model_info`` as the Hub does: large files have their SHA-256, small ones are git's."""

    asked: list[tuple[str, str | None]]

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: dict[str, str | None]) -> None:
        self.asked = []

        def model_info(_api: Any, model: str, revision: str | None = None, files_metadata: bool = False) -> Any:
            assert files_metadata
            self.asked.append((model, revision))
            siblings = [
                SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=sha) if sha else None)
                for name, sha in files.items()
            ]
            return SimpleNamespace(siblings=siblings)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


@pytest.mark.parametrize("there", ["nothing", "config", "one file of two"])
def test_what_the_hub_has_not_sent_it_is_asked_for(
    there: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are not downloaded for it."""
    snapshot = cache / "models--org--pivot" / "snapshots" / COMMIT
    if there == "nothing":
        shutil.rmtree(cache / "models--org--pivot")
    else:
        (snapshot / "model-2.safetensors").unlink()
        if there == "config":
            (snapshot / "model-1.safetensors").unlink()
            (snapshot / "model.safetensors.index.json").unlink()
    files = {"config.json": None, "model.safetensors": "3" * 64, "onnx/model.safetensors": "4" * 64}
    hub = Hub(monkeypatch, files)
    assert weights_fingerprint(Place("org/pivot", None, str(cache))) == fingerprint_of(model="3" * 64)
    assert hub.asked == [("org/pivot", None)]


def test_of_a_sharded_model_on_the_hub_only_the_index_is_fetched(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = (cache / "models--org--pivot" / "snapshots" / COMMIT / "model.safetensors.index.json").read_bytes()
    shutil.rmtree(cache / "models--org--pivot")
    files = {"model.safetensors.index.json": None, "training.safetensors": "5" * 64}
    Hub(monkeypatch, {**files, **{f"{name}.safetensors": sha for name, sha in ON_THE_HUB.items()}})

    def fetched(model: str, name: str, **named: Any) -> str:
        assert (model, name, named["revision"]) == ("org/pivot", "model.safetensors.index.json", OTHER_COMMIT)
        (tmp_path / "index.json").write_bytes(index)
        return str(tmp_path / "index.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    place = Place("org/pivot", OTHER_COMMIT, str(cache))
    assert weights_fingerprint(place) == fingerprint_of(**ON_THE_HUB)


def test_a_target_on_the_hub_tells_its_pivot(cache: Path) -> None:
    pivot = {"model": "org/pivot", "weights": fingerprint_of(**ON_THE_HUB)}
    for name, told_pivot in (("fits", pivot), ("foreign", {**pivot, "weights": "6" * 64})):
        content = json.dumps({"pivot": told_pivot}).encode()
        cached(cache, f"org/{name}", {"fusion.json": git_blob(content)})
    cached(cache, "org/silent", {"config.json": git_blob(b"{}")})
    targets = [Place(f"org/{name}", None, str(cache)) for name in ("fits", "foreign", "silent")]
    assert list(foreign_targets(Place("org/pivot", None, str(cache)), targets)) == [(1, "org/pivot")]


# What varm refuses


def problems(text: str, cache: Path | None = None) -> list[tuple[int, str]]:
    return [
        (problem.line, problem.message)
        for problem in check(text, cache_dir=str(cache) if cache is not None else None)
    ]


def test_targets_of_the_base_model_or_of_a_copy_of_it_are_merged(told: Family, tmp_path: Path) -> None:
    assert problems(runs.recipe(told)) == []
    elsewhere = shutil.copytree(told.pivot, tmp_path / "elsewhere")
    shutil.rmtree(told.pivot)
    text = runs.recipe(Family(elsewhere, told.targets))
    assert problems(text) == []
    runs.assert_merges(runs.merge(text, tmp_path / "out"), Family(elsewhere, told.targets), runs.MATRIX)


def test_with_another_base_model_each_target_is_refused_at_its_line(told: Family, tmp_path: Path) -> None:
    other = moved(told.pivot, tmp_path / "other")
    text = runs.recipe(Family(other, told.targets))
    found = problems(text)
    lines = text.splitlines()
    assert [line for line, _ in found] == [lines.index(f"  - model: {one}") + 1 for one in told.targets]
    for (_, message), target in zip(found, told.targets, strict=True):
        assert message.startswith(
            f"`{target}` was fine-tuned from `{told.pivot}` (its fusion.json), whose weights "
        )
        assert f"are not those of the base_model `{other}`" in message


def test_only_targets_that_tell_another_pivot_are_refused(told: Family, tmp_path: Path) -> None:
    first, second = told.targets
    other = moved(told.pivot, tmp_path / "other")
    (first / "fusion.json").unlink()
    tell(second, other)
    ((line, message),) = problems(runs.recipe(told))
    assert f"`{second}` was fine-tuned from `{other}`" in message
    assert runs.recipe(told).splitlines()[line - 1] == f"  - model: {second}"
    (second / "fusion.json").unlink()
    assert problems(runs.recipe(told)) == []


def test_sources_of_slices_are_looked_at_too(told: Family, tmp_path: Path) -> None:
    other = moved(told.pivot, tmp_path / "other")
    sources = "".join(f"      - {{model: {one}, layer_range: [0, 2]}}\n" for one in (other, *told.targets))
    text = f"merge_method: varm\nbase_model: {other}\nslices:\n  - sources:\n{sources}"
    assert [line for line, _ in problems(text)] == [6, 7]
    fine = text.replace(str(other), str(told.pivot))
    assert problems(fine) == []


@pytest.mark.parametrize("content", ["", "[]", '{"pivot": "org/pivot"}', '{"pivot": {"model": "m"}}', "{"])
def test_a_fusion_json_that_tells_nothing_is_a_problem(content: str, told: Family) -> None:
    path = told.targets[1] / "fusion.json"
    path.write_text(content)
    ((_, message),) = problems(runs.recipe(told))
    assert f"`{path}` does not name a pivot" in message


def test_a_pivot_of_which_nothing_is_known_is_a_problem(told: Family, cache: Path) -> None:
    """The Hub cannot be asked."""
    snapshot = cache / "models--org--pivot" / "snapshots" / COMMIT
    for path in snapshot.glob("model*"):
        path.unlink()
    text = runs.recipe(Family(Path("org/pivot"), told.targets))
    ((_, message),) = problems(text, cache)
    assert "the header of `org/pivot` cannot be read: the Hub did not answer: " in message


def test_mergekit_yaml_stops_before_it_writes(told: Family, tmp_path: Path) -> None:
    other = moved(told.pivot, tmp_path / "other")
    (tmp_path / "recipe.yaml").write_text(runs.recipe(Family(other, told.targets)))
    result = CliRunner().invoke(run_yaml.main, [str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 1
    assert "has 2 problems:" in result.output
    assert not (tmp_path / "out").exists()


# fusion-trainer recipe


def recipe(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["recipe", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: object) -> str:
    result = recipe(*arguments)
    assert result.exit_code == 1, result.output
    return result.output


@pytest.fixture(scope="module")
def made(fusion: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one`` and ``other``, targets of a pivot; ``foreign``, of another; ``begun``, not finished."""
    folder = tmp_path_factory.mktemp("made")
    train(fusion.config(folder / "one"))
    train(fusion.config(folder / "other", "none", clm_weight=1.0))
    moved(fusion.folder / "pivot", folder / "another pivot")
    train(fusion.config(folder / "foreign", "none", clm_weight=1.0, pivot=str(folder / "another pivot")))
    shutil.copytree(folder / "one", folder / "begun")
    (folder / "begun" / "fusion.json").rename(folder / "begun" / "training.json")
    return folder


@pytest.mark.slow
def test_the_recipe_names_pivot_targets_and_what_they_were_fused_of(made: Path, fusion: World) -> None:
    pivot = fusion.folder / "pivot"
    result = recipe(made / "one", made / "other")
    assert result.exit_code == 0
    assert yaml.safe_load(result.output) == {
        "merge_method": "varm",
        "base_model": str(pivot),
        "models": [{"model": str(made / "one")}, {"model": str(made / "other")}],
        "parameters": {"granularity": "matrix"},
        "dtype": "float32",
    }
    assert f"#   {made / 'one'}: {fusion.folder / 'bytes'}\n" in result.output
    assert f"#   {made / 'other'}: none, only the pivot and the chats\n" in result.output
    assert problems(result.output) == []


@pytest.mark.slow
def test_the_recipe_may_be_of_another_granularity_and_dtype_and_in_a_file(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    flags = ["--granularity", "layer", "--dtype", "bfloat16", "--out", out]
    result = recipe(made / "one", made / "other", *flags)
    assert f"{out}: 2 targets; merge them with `mergekit-yaml {out} OUTPUT/`" in result.output
    content = yaml.safe_load(out.read_text())
    assert content["parameters"] == {"granularity": "layer"}
    assert (content["dtype"], content["out_dtype"]) == ("float32", "bfloat16")
    assert recipe(made / "one", "--granularity", "row").exit_code == 2


@pytest.mark.slow
def test_the_dtype_is_that_of_the_targets(made: Path, tmp_path: Path) -> None:
    target = shutil.copytree(made / "one", tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(target, dtype="bfloat16").save_pretrained(target)
    assert "dtype: bfloat16\n" in recipe(target).output


@pytest.mark.slow
def test_folders_are_not_taken_for_models_of_the_hub(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "pivot"):
        shutil.copytree(made / "one", Path("targets") / name)
    content = yaml.safe_load(recipe("targets/one").output)
    assert content["models"] == [{"model": "./targets/one"}]
    for name in ("a+b", "a@b"):
        shutil.copytree(made / "one", Path("targets") / name)
        assert f"mergekit gives the `{name[1]}` in `targets/{name}` a meaning of its own" in refused(
            f"targets/{name}"
        )


@pytest.mark.slow
def test_targets_of_different_pivots_are_refused_with_both(made: Path, fusion: World) -> None:
    said = refused(made / "one", made / "foreign", made / "other")
    assert "these targets were trained from different pivots:" in said
    for target, pivot in (("one", fusion.folder / "pivot"), ("foreign", made / "another pivot")):
        told = json.loads((made / target / "fusion.json").read_text())["pivot"]["weights"]
        assert f"`{made / target}`: {pivot} (weights {told[:12]}…)" in said


@pytest.mark.slow
@pytest.mark.parametrize("key", ["config", "tokenizer"])
def test_a_pivot_of_the_same_weights_may_be_another(key: str, made: Path, tmp_path: Path) -> None:
    target = shutil.copytree(made / "other", tmp_path / "other")
    told = json.loads((target / "fusion.json").read_text())
    told["pivot"][key] = "another"
    (target / "fusion.json").write_text(json.dumps(told))
    assert "these targets were trained from different pivots" in refused(made / "one", target)


@pytest.mark.slow
def test_what_is_no_finished_target_is_refused(made: Path, fusion: World, tmp_path: Path) -> None:
    assert f"`{made / 'begun'}` has no fusion.json yet: its training is not finished" in refused(
        made / "one", made / "begun"
    )
    said = refused(fusion.folder / "pivot")
    assert (
        f"`{fusion.folder / 'pivot'}` has no fusion.json; give folders that `fusion-trainer train` has written"
        in said
    )
    assert f"`{tmp_path / 'nothing'}` has no fusion.json" in refused(tmp_path / "nothing")
    assert recipe().exit_code == 2
    target = shutil.copytree(made / "one", tmp_path / "one")
    for content in ("{", "[]", '{"pivot": {}}', '{"pivot": {"weights": 1}}'):
        (target / "fusion.json").write_text(content)
        assert f"`{target / 'fusion.json'}` is not what `fusion-trainer train` writes" in refused(target)


@pytest.mark.slow
@pytest.mark.parametrize("was", ["/models/gone", "gone", "models/gone"])
def test_a_pivot_that_has_moved_is_named(was: str, made: Path, fusion: World, tmp_path: Path) -> None:
    """Or was named from another folder: a model of the Hub would have a commit."""
    target = shutil.copytree(made / "one", tmp_path / "one")
    told = json.loads((target / "fusion.json").read_text())
    told["pivot"]["model"] = was
    (target / "fusion.json").write_text(json.dumps(told))
    said = refused(target)
    assert f"the pivot's folder `{was}` does not exist; give its new folder with --pivot" in said
    assert yaml.safe_load(recipe(target, "--pivot", fusion.folder / "pivot").output)["base_model"] == str(
        fusion.folder / "pivot"
    )
    said = refused(target, "--pivot", made / "another pivot")
    assert "is not the pivot that these targets were trained from: its weights differ" in said


@pytest.mark.slow
def test_a_pivot_of_the_hub_is_named_with_its_commit(
    made: Path, fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained from the Hub's cache and merged from it: nobody has to be asked."""
    files = {
        path.name: (content, sha256(content)) if path.suffix == ".safetensors" else git_blob(content)
        for path in (fusion.folder / "pivot").iterdir()
        for content in [path.read_bytes()]
    }
    cached(tmp_path / "cache", "org/pivot", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    target = train(fusion.config(tmp_path / "target", pivot="org/pivot"))
    told = json.loads((target / "fusion.json").read_text())["pivot"]
    assert (told["model"], told["revision"]) == ("org/pivot", COMMIT)
    assert told["weights"] == weights_fingerprint(Place(str(fusion.folder / "pivot")))
    text = recipe(target).output
    assert yaml.safe_load(text)["base_model"] == f"org/pivot@{COMMIT}"
    assert problems(text, tmp_path / "cache") == []
    together = recipe(target, made / "one")
    assert together.exit_code == 0
    other = moved(fusion.folder / "pivot", tmp_path / "other")
    assert len(problems(text.replace(f"org/pivot@{COMMIT}", str(other)), tmp_path / "cache")) == 1
