"""The comparison of fusions and merges: its pipelines are read whole, and its tables are those of its scores."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fusion_trainer.pipeline.plan import read_pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "evidence")]

import evidence  # noqa: E402


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> evidence.World:
    """The small world before anything has run: its models are empty folders."""

    def make_world(folder: Path, seed: int) -> None:
        for model in ("pivot", "letters", "numbers", "almanac"):
            (folder / "world" / model).mkdir(parents=True)
            (folder / "world" / model / "chat_template.jinja").write_text("")
        chat = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
        rows = [json.dumps({"id": f"add/{number}", **chat}) + "\n" for number in range(12)]
        for name in ("chats", "held_out"):
            (folder / "world" / f"{name}.jsonl").write_text("".join(rows))

    monkeypatch.setattr(evidence.demo, "make_world", make_world)
    monkeypatch.chdir(EXAMPLES.parent)
    return evidence.small_world(tmp_path / "seed-1", 1)


@pytest.mark.slow
def test_every_fusion_and_every_merge_is_a_stage(small: evidence.World) -> None:
    path = small.folder / "evidence.yaml"
    path.write_text(yaml.safe_dump(small.settings))
    stages = {stage.title: stage for stage in read_pipeline(path)[1]}
    for fusion, (_, own) in evidence.FUSIONS.items():
        for kind in (*small.sources, "multi"):
            settings = stages[f"train {fusion}-{kind}"].settings
            assert own.items() <= settings.items()
            assert f"evaluate target-{fusion}-{kind}" in stages
    aligned = {stage.name: stage.settings for stage in stages.values() if stage.kind == "align"}
    assert {(own["positions"], own["map"]) for name, own in aligned.items() if name.startswith("papers-")} == {
        ("dtw", "min_edit_distance")
    }
    assert stages["train papers-multi"].needs[2:] == [f"align papers-{name}" for name in small.sources]
    for case, targets in small.cases.items():
        for name in evidence.AS_PUBLISHED:
            assert stages[f"merge {case}-{name}"].needs == [f"train {target}" for target in targets]
        for name in evidence.TUNED:
            start = evidence.STARTS.get(name, name)
            assert f"merge {case}-{start}" in stages
    assert len(small.choosing.read_text().splitlines()) == 4  # every third


@pytest.mark.slow
def test_the_real_models_have_every_fusion_and_every_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_models(folder: Path) -> dict[str, Path]:
        for name in evidence.real.DIRECTIONS:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "chat_template.jinja").write_text("")
        return {name: folder / name for name in evidence.real.DIRECTIONS}

    monkeypatch.setattr(evidence.real, "make_models", make_models)
    for pivot in evidence.real.DIRECTIONS:
        world = evidence.real_world(tmp_path, pivot, 0)
        path = world.folder / "evidence.yaml"
        path.write_text(yaml.safe_dump(world.settings))
        stages = {stage.title: stage for stage in read_pipeline(path)[1]}
        for fusion, (_, own) in evidence.FUSIONS.items():
            settings = stages[f"train {fusion}-own"].settings
            assert ({"clm_weight": 0.5} | own).items() <= settings.items()
            assert f"evaluate target-{fusion}-own" in stages
        assert {"evaluate pivot", "evaluate target-clm"} <= stages.keys()
        for name in (*evidence.AS_PUBLISHED, *(evidence.STARTS.get(name, name) for name in evidence.TUNED)):
            assert len(stages[f"merge real-{name}"].needs) == 4
        ids = [json.loads(row)["id"] for row in world.choosing.read_text().splitlines()]
        assert ids
        assert all(name.startswith("choosing-") for name in ids)


def scores(losses: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        model: {
            f"data/held_out.jsonl: add/{number}": {
                "group": "add",
                "nats": nats,
                "bytes": 2,
                "rows": 1,
                "matched": 1,
            }
            for number, nats in enumerate(own)
        }
        for model, own in losses.items()
    }


def test_what_chooses_is_not_reported(small: evidence.World) -> None:
    """The best target is the best where it is chosen, whatever it is elsewhere."""
    generator = np.random.default_rng(0)
    names = [name for targets in small.cases.values() for name in targets]
    losses = {f"target-{name}": generator.uniform(1, 2, 12).tolist() for name in names}
    losses["target-default-numbers"] = [0.5 if number % 3 == 0 else 9.0 for number in range(12)]
    run = evidence.reported(small, scores(losses))
    assert {len(rows) for rows in run.values()} == {8}
    assert run["best-default"] == run["target-default-numbers"]
    assert evidence.real.loss([run], "best-default", evidence.anything) == "4.5000"


def test_the_mean_of_targets_is_their_mean_in_every_conversation() -> None:
    run = scores({"a": [1.0, 2.0], "b": [3.0, 6.0]})
    rows = evidence.averaged(run, ["a", "b"])
    assert [row["nats"] for row in rows.values()] == [2.0, 4.0]
    assert [row["bytes"] for row in rows.values()] == [2, 2]


@pytest.mark.parametrize("sources", [["own"], ["letters", "numbers"]])
def test_the_report_has_a_row_for_every_model(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are known, so each difference is, too."""
    kinds = [*sources, *(["multi"] if len(sources) > 1 else [])]
    targets = [f"{fusion}-{kind}" for fusion in evidence.FUSIONS for kind in kinds]
    case = "default" if len(sources) > 1 else "real"
    world = evidence.World("w", tmp_path, {"work": "work"}, sources, {case: targets[:2]}, tmp_path, 1)
    merges = [f"merge-{case}-{name}" for name in evidence.AS_PUBLISHED]
    tuned = [f"tuned-{case}-{name}" for name in evidence.TUNED]
    singles = ["pivot", "target-clm", f"best-{case}", *(f"source-{name}" for name in sources)]
    models = [*singles, *(f"target-{name}" for name in targets), *merges, *tuned]
    run = scores({model: [2.0 * place, 2.0 * place] for place, model in enumerate(models)})
    monkeypatch.setattr(evidence, "found_values", lambda *_: "0.5")
    text = evidence.report("python evidence.py", [world], [run])
    for model in ("pivot", *(f"target-{name}" for name in targets[:2])):
        title = {"pivot": "the pivot"}.get(model, model.replace("-", " ", 1))
        own, linear = models.index(model), models.index(f"merge-{case}-linear")
        cells = [cell.strip() for cell in row_of(text, title)]
        assert cells[2:6] == [f"{own:.4f}", f"{own:.4f}", "100.0", f"{own - linear:+.4f} ± 0.0000"]
    found = [cell.strip() for cell in row_of(text, "Does VaRM beat linear as it is?")]
    difference = models.index(f"merge-{case}-varm") - models.index(f"merge-{case}-linear")
    assert found[2:5] == [f"{difference:+.4f} ± 0.0000", "worse", "+0.0 ± 0.0"]
    for title, _ in (*evidence.FUSIONS.values(), *evidence.TUNED.values()):
        assert f"| {title} " in text


def row_of(text: str, first: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return row.strip("|").split("|")


def test_a_search_is_made_again_if_its_command_or_a_target_changed(tmp_path: Path) -> None:
    target, tuned = tmp_path / "fusion.json", tmp_path / "tuned.json"
    target.touch()
    assert not evidence.is_tuned(tuned, ["a.yaml"], [target])
    tuned.write_text(json.dumps({"command": "varm-merge tune a.yaml --evaluations 3"}))
    assert evidence.is_tuned(tuned, [Path("a.yaml"), "--evaluations", "3"], [target])
    assert not evidence.is_tuned(tuned, [Path("a.yaml"), "--evaluations", "4"], [target])
    os.utime(target, (tuned.stat().st_mtime + 1,) * 2)
    assert not evidence.is_tuned(tuned, [Path("a.yaml"), "--evaluations", "3"], [target])


def test_clm_is_scaled_by_the_recipe_of_the_merges(tmp_path: Path) -> None:
    recipe = tmp_path / "real-varm.yaml"
    settings = {"merge_method": "varm", "base_model": "pivot", "parameters": {"granularity": "matrix"}}
    recipe.write_text(yaml.safe_dump({**settings, "models": [{"model": "a"}, {"model": "b"}]}))
    written = evidence.recipe_of_one(recipe, tmp_path / "clm")
    assert yaml.safe_load(written.read_text()) == {**settings, "models": [{"model": str(tmp_path / "clm")}]}
