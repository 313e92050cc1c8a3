"""The comparison of fusions and merges: its pipelines are read whole, and its tables are those of its scores."""

import json
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
            assert len(stages[f"merge default-{name}"].needs) == 4
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
