"""``varm-merge tune``: its figures are those of the stock programs, and a repeated run scores nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny_models
import yaml
from click.testing import CliRunner, Result

from fusion_trainer.cli import main as fusion_trainer
from varm_common.forked import run_forked
from varm_merge.cli import main
from varm_merge.comparison import scores
from varm_merge.tuning.scorer import Scorer

pytestmark = pytest.mark.slow

CHATS = [
    {"id": f"fox/{number}", "text": f"the red fox jumps over dog number {number} {'again and again ' * 15}"}
    for number in range(24)
]
SEARCH = ("--parameter", "lambda", "--parameter", "weight:target", "--evaluations", "5")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``pivot``, ``target_1``, ``target_2`` and ``held_out.jsonl``."""
    folder = tmp_path_factory.mktemp("tune")
    members = tiny_models.save_family(folder, "llama", max_position_embeddings=64)
    for model in (members.pivot, *members.targets):
        tiny_models.train_tokenizer(model, " ".join(chat["text"] for chat in CHATS))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    run_forked(print, log=folder / "server.txt", preload=scores.PRELOAD)
    return folder


def recipe(folder: Path, method: str, **own: Any) -> Path:
    models = [{"model": str(folder / target)} for target in ("target_1", "target_2")]
    content = {"merge_method": method, "base_model": str(folder / "pivot"), "models": models, **own}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def tune(world: Path, path: Path, out: Path, *more: str) -> Result:
    arguments = ["tune", str(path), "--held-out", str(world / "held_out.jsonl"), "--out", str(out), *more]
    return CliRunner().invoke(main, arguments)


def stock_score(world: Path, out: Path, merged: Path) -> dict[str, dict[str, float]]:
    """The conversations' sums by ``fusion-trainer evaluate``."""
    (dialogues,) = (out / "work").glob("dialogues-*")
    output = merged.with_suffix(".json")
    arguments = ["--model", str(merged), "--dialogues", str(dialogues), "--output", str(output)]
    done = CliRunner().invoke(fusion_trainer, ["evaluate", *arguments])
    assert done.exit_code == 0, done.output
    found: dict[str, dict[str, float]] = json.loads(output.read_text())["conversations"]
    return found


def test_the_figures_are_those_of_the_stock_programs_and_a_rerun_scores_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(world, "varm", parameters={"granularity": "layer"})
    out = tmp_path / "out"
    done = tune(world, path, out, *SEARCH)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "tuned.json").read_text())
    assert len(report["evaluations"]) == 5
    best = min(report["evaluations"], key=lambda one: one["nats_per_byte"])
    assert best["minus_best"] == [0, 0]
    assert best["values"] == [one["found"] for one in report["numbers"] if one["searched"]]

    text = (out / "recipe.yaml").read_text()
    assert yaml.safe_load(text) == report["tuned"]
    merged = runs.merge(text, tmp_path / "merged", copy_tokenizer=True)
    conversations = stock_score(world, out, merged.folder)
    losses = [one["nats_per_byte"] for one in (best, report["models"][-1])]
    parts = report["conversations"]
    sizes = {name: sums["bytes"] for name, sums in conversations.items()}
    assert parts["choosing"] + parts["reporting"] == len(sizes)
    names = {part["about"]["conversations"]: part["result"]["conversations"] for part in steps(out)}
    (one, other) = (frozenset(own) for own in names.values())
    assert one.isdisjoint(other)
    assert one | other == sizes.keys()
    expected = [
        sum(conversations[name]["nats"] for name in part) / sum(sizes[name] for name in part)
        for part in sorted((one, other), key=len)
    ]
    assert sorted(losses) == pytest.approx(sorted(expected), rel=1e-6)
    assert [row["name"] for row in report["models"]] == ["pivot", "target_1", "target_2", "recipe", "tuned"]
    pivot = stock_score(world, out, world / "pivot")
    difference = report["models"][0]["tuned_minus"][0]
    assert math.isclose(report["models"][0]["nats_per_byte"] + difference, report["models"][-1]["nats_per_byte"])
    assert any(math.isclose(report["models"][0]["nats_per_byte"], ratio(pivot, part)) for part in (one, other))

    def again(*_: Any) -> None:
        raise AssertionError("merged or scored again")

    monkeypatch.setattr(Scorer, "merge", again)
    monkeypatch.setattr(Scorer, "model", again)
    repeated = tune(
        world, path, out, "--parameter", "lambda", "--parameter", "weight:target", "--evaluations", "5"
    )
    assert repeated.exit_code == 0, repeated.output
    assert (out / "recipe.yaml").read_text() == text


def ratio(conversations: dict[str, dict[str, float]], part: frozenset[str]) -> float:
    return sum(conversations[name]["nats"] for name in part) / sum(conversations[name]["bytes"] for name in part)


def steps(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (out / "steps").rglob("*.json")]


def test_a_method_that_drops_at_random_is_tuned_with_the_masks_of_its_merge(world: Path, tmp_path: Path) -> None:
    path = recipe(world, "dare_linear", parameters={"weight": 0.5, "density": 0.5})
    out = tmp_path / "out"
    done = tune(world, path, out, "--evaluations", "3", "--seed", "7", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads((out / "tuned.json").read_text())
    assert [one["name"] for one in report["numbers"]] == ["lambda"]
    merged = runs.merge((out / "recipe.yaml").read_text(), tmp_path / "merged", copy_tokenizer=True, random_seed=7)
    conversations = stock_score(world, out, merged.folder)
    tuned = report["models"][-1]["nats_per_byte"]
    parts = {frozenset(part["result"]["conversations"]) for part in steps(out)}
    assert any(ratio(conversations, part) == pytest.approx(tuned, rel=1e-6) for part in parts)


def test_values_that_a_method_refuses_do_not_end_the_search(world: Path, tmp_path: Path) -> None:
    """della takes no density below its epsilon."""
    path = recipe(world, "della", parameters={"weight": 0.5, "density": 0.5, "epsilon": 0.3})
    out = tmp_path / "out"
    done = tune(world, path, out, "--parameter", "density", "--evaluations", "6")
    assert done.exit_code == 0, done.output
    report = json.loads((out / "tuned.json").read_text())
    failed = [one for one in report["remarks"] if "a value that cannot be used" in one]
    assert failed
    assert len(failed) + len(report["evaluations"]) == 6
    assert all(0.3 <= one["values"][0] <= 0.7 for one in report["evaluations"])
    assert math.isfinite(report["models"][-1]["nats_per_byte"])


def test_a_recipe_without_a_base_model_is_tuned_with_base(world: Path, tmp_path: Path) -> None:
    path = recipe(world, "linear", base_model=None)
    path.write_text(path.read_text().replace("base_model: null\n", ""))
    done = tune(world, path, tmp_path / "out", "--evaluations", "3")
    assert done.exit_code == 1
    assert "--base" in done.output
    done = tune(world, path, tmp_path / "out", "--evaluations", "3", "--base", str(world / "pivot"))
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert [row["name"] for row in report["models"]] == ["pivot", "target_1", "target_2", "recipe", "tuned"]


@pytest.mark.parametrize("models", [[{"modle": "./a"}], ["./a", "./b"]])
def test_a_malformed_recipe_is_refused_with_its_line(models: list[Any], world: Path, tmp_path: Path) -> None:
    for parameter in ("weight:target", "lambda"):
        done = tune(world, recipe(world, "varm", models=models), tmp_path / "out", "--parameter", parameter)
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit), done.exception
        assert "cannot be tuned" in done.output
        assert "line " in done.output


@pytest.mark.parametrize(
    ("parameters", "more", "message"),
    [
        ({"granularty": "layer"}, (), "did you mean `granularity`?"),
        ({}, ("--parameter", "lamda"), "did you mean `lambda`?"),
    ],
)
def test_a_users_mistake_is_reported_before_anything_is_scored(
    parameters: dict[str, Any], more: tuple[str, ...], message: str, world: Path, tmp_path: Path
) -> None:
    done = tune(world, recipe(world, "varm", parameters=parameters), tmp_path / "out", *more)
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "out" / "steps").exists()
