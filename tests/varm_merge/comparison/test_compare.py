"""``varm-merge compare``: real merges side by side, against oracles; failed, killed and resumed."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_models
import torch
import transformers
import yaml
from click.testing import CliRunner
from programs import BIN
from runs import checkpoint

from fusion_trainer.cli import main as fusion_trainer
from varm_common.forked import run_forked, run_module
from varm_common.process_usage import CommandError, Run, measured
from varm_merge.cli import main
from varm_merge.comparison import runner
from varm_merge.comparison.harness import Run as ModelRun
from varm_merge.comparison.harness import evaluate
from varm_merge.comparison.suites import Task
from varm_merge.comparison.tasks import Tasks

pytestmark = pytest.mark.slow

GROUPS = ("red", "grey")
CHATS = [
    {"id": f"{group}/{number}", "text": f"the {group} fox jumps over dog number {number} {'again ' * number}"}
    for group in GROUPS
    for number in range(4)
]
QUESTIONS = [
    {"question": f"the {group} fox", "choices": ["jumps over", "again", "dog number"], "answer": number % 3}
    for number, group in enumerate(GROUPS * 4)
]
TASK = {
    "task": "jumps",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
EVALUATIONS = ("--held-out", "held_out.jsonl", "--tasks", "jumps", "--include-path", "tasks")
SPOILED = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class World:
    """A folder with the models ``pivot``, ``target_1``, ``target_2`` and ``spoiled``, data and a task."""

    folder: Path

    def compare(self, *arguments: str) -> tuple[int, str]:
        """Run it here; its exit code, and all that it said."""
        done = CliRunner().invoke(main, ["compare", *arguments], catch_exceptions=False)
        return done.exit_code, done.output

    def recipe(
        self, name: str, method: str, targets: tuple[str, ...] = ("target_1", "target_2"), **own: Any
    ) -> str:
        content = {"merge_method": method, "models": [{"model": target} for target in targets], **own}
        (self.folder / name).write_text(yaml.safe_dump(content))
        return name

    def report(self, out: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / out / "report.json").read_text())
        return found

    def row(self, out: str, name: str) -> dict[str, Any]:
        (found,) = [one for one in self.report(out)["rows"] if one["name"] == name]
        return dict(found)


def merged_in_a_fork(command: list[str], *, log: Path, environment: Mapping[str, str]) -> Run:
    """mergekit's own program without the seconds of its imports; the numbers are made up."""
    run_forked(run_module, "mergekit.scripts.run_yaml", *command[1:], log=log, environment=environment)
    return Run(1.0, 1.0, 100.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, fork_server: None) -> Iterator[World]:
    """Paths are relative to it."""
    folder = tmp_path_factory.mktemp("compare") / "wörld of models"
    members = tiny_models.save_family(folder, "llama", max_position_embeddings=64)
    spoiled = tiny_models.damaged(members, folder / "spoiled", SPOILED, float("nan")).targets[-1]
    for model in (members.pivot, *members.targets, spoiled):
        tiny_models.train_tokenizer(model, " ".join(chat["text"] for chat in CHATS))
    for name, rows in (("held_out.jsonl", CHATS), ("questions.jsonl", QUESTIONS)):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "jumps.yaml").write_text(yaml.safe_dump(TASK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(runner, "measured", merged_in_a_fork)
        patch.chdir(folder)
        yield World(folder)


@pytest.fixture(scope="module")
def whole(world: World) -> str:
    """A comparison of all kinds into ``report``; what it said."""
    recipes = [
        world.recipe("mine.yaml", "varm", base_model="pivot", parameters={"granularity": "layer"}),
        world.recipe("nan.yaml", "varm", ("target_1", "spoiled"), base_model="pivot"),
        world.recipe("typo.yaml", "ties", base_model="pivot", parameters={"weight": 1, "densty": 0.5}),
        world.recipe("average.yaml", "linear", parameters={"weight": 1}),
    ]
    code, said = world.compare(*recipes, "--out", "report", *EVALUATIONS)
    assert code == 1, said
    return said


def stamps(folder: Path, *without: str) -> dict[str, int]:
    """When each file below the folder was written last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in without]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


REPORTS = ("report.json", "report.md", "report.html", ".varm-merge-compare")


# One comparison, of everything


def test_recipes_that_fail_are_reported_and_the_rest_still_run(world: World, whole: str) -> None:
    (typo,) = world.row("report", "typo")["problems"]
    assert typo.endswith("unknown parameter `densty` of ties; did you mean `density`?")
    (nan,) = world.row("report", "nan")["problems"]
    assert nan.startswith("mergekit-yaml: ")
    assert f"NaN in tensor `{SPOILED}`" in nan
    (spoiled,) = [one for one in world.row("report", "spoiled")["problems"] if "tensor" in one]
    assert spoiled == f"NaN or Inf in the tensor `{SPOILED}` of the model"
    for problem in (typo, nan, spoiled):
        assert problem in whole
    assert not Path("report/logs/typo.txt").exists()
    assert "mergekit-yaml nan.yaml" in Path("report/logs/nan.txt").read_text()
    assert not list(Path("report/models").glob(".*"))
    for name in ("mine", "average"):
        row = world.row("report", name)
        assert row["problems"] == []
        assert row["runs"] == [{"wall_s": 1.0, "cpu_s": 1.0, "anonymous_mib": 100.0}]
        assert Path(row["model"], "model.safetensors").is_file()


def flat(model: str) -> np.ndarray:
    tensors = checkpoint(Path(model))
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


@pytest.mark.parametrize("name", ["mine", "average", "target_1"])
@pytest.mark.usefixtures("whole")
def test_distances_are_those_of_the_flat_models(name: str, world: World) -> None:
    found = world.row("report", name)["distances"]
    model, pivot = flat(world.row("report", name)["model"]), flat("pivot")
    delta, size = model - pivot, np.linalg.norm(pivot)
    assert found["elements"] == pivot.size
    assert found["pivot"] == pytest.approx(np.linalg.norm(delta) / size, rel=1e-9)
    for target in ("target_1", "target_2"):
        vector = flat(target) - pivot
        own = found["targets"][target]
        assert own["distance"] == pytest.approx(np.linalg.norm(delta - vector) / size, rel=1e-9)
        cosine = delta @ vector / np.linalg.norm(delta) / np.linalg.norm(vector)
        assert own["cosine"] == pytest.approx(cosine, rel=1e-9)
        moved = vector != 0
        assert own["sign_agreement"] == np.mean(np.sign(delta[moved]) == np.sign(vector[moved]))
    assert found["targets"]["spoiled"] == {"distance": None, "cosine": None, "sign_agreement": None}


@pytest.mark.parametrize("name", ["pivot", "average"])
@pytest.mark.usefixtures("whole")
def test_held_out_loss_is_that_of_fusion_trainer(name: str, world: World, tmp_path: Path) -> None:
    model, scores = world.row("report", name)["model"], tmp_path / "scores.json"
    dialogues = str(tmp_path / "dialogues")
    prepare = ["--data", "held_out.jsonl", "--pivot", "pivot", "--max-length", "64", "--dialogues", dialogues]
    score = ["--model", model, "--dialogues", dialogues, "--output", str(scores)]
    for command in (["prepare", *prepare], ["evaluate", *score]):
        done = CliRunner().invoke(fusion_trainer, command)
        assert done.exit_code == 0, done.output
    found = world.row("report", name)["held_out"]
    own = {group: {key: value for key, value in of.items() if key != "against"} for group, of in found.items()}
    assert own == json.loads(scores.read_text())["groups"]
    assert list(found) == ["all", *sorted(GROUPS)]


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    context, both = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (question, f"{question} {choice}")
    )
    logs = model(torch.tensor([both])).logits[0].log_softmax(-1)
    return sum(float(logs[place - 1, both[place]]) for place in range(len(context), len(both)))


@pytest.mark.parametrize("name", ["target_2", "mine"])
@pytest.mark.usefixtures("whole")
def test_a_local_task_has_the_score_that_the_models_own_likelihoods_give(name: str, world: World) -> None:
    row = world.row("report", name)
    model = transformers.AutoModelForCausalLM.from_pretrained(row["model"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(row["model"])
    right = [
        np.argmax([likelihood(model, tokenizer, one["question"], choice) for choice in one["choices"]])
        == one["answer"]
        for one in QUESTIONS
    ]
    (measure,) = row["tasks"]["jumps"]
    assert (measure["metric"], measure["value"]) == ("acc", np.mean(right))
    error = np.std(right, ddof=1) / np.sqrt(len(right))
    assert measure["standard_error"] == pytest.approx(error)


@pytest.mark.usefixtures("whole")
def test_a_model_that_cannot_be_scored_is_reported_and_shows_no_number(world: World) -> None:
    """Damaged weights are found before anything is scored; a task's first choice would win among NaN."""
    row = world.row("report", "spoiled")
    assert row["problems"] == [f"NaN or Inf in the tensor `{SPOILED}` of the model"]
    assert (row["held_out"], row["tasks"]) == (None, {})
    markdown = Path("report/report.md").read_text()
    (line,) = [one for one in markdown.splitlines() if one.startswith("| spoiled (target)")][:1]
    assert "nan" not in line


@pytest.mark.usefixtures("world")
def test_a_task_that_a_model_answers_with_nan_has_no_score(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    task = Task("jumps")
    arguments = (Tasks((task,)), task, [str(Path("tasks"))], ModelRun(Path("spoiled"), "cpu"), output)
    with pytest.raises(CommandError, match=r"\nError: the model gives NaN as likelihoods.*$"):
        run_forked(evaluate, *arguments, log=tmp_path / "log.txt")
    assert not output.exists()


def test_the_table_shows_every_row_and_marks_the_best(world: World, whole: str) -> None:
    rows = {line.split()[0]: line for line in whole.partition("Side by side\n")[2].split("\n\n")[0].splitlines()}
    assert list(rows) == ["model", "pivot", "target_1", "target_2", "spoiled", "mine", "nan", "typo", "average"]
    assert "typo (failed)" in rows["typo"]
    losses = {
        one["name"]: one["held_out"]["all"]["nats_per_byte"]
        for one in world.report("report")["rows"]
        if one["held_out"]
    }
    best = min(losses, key=losses.__getitem__)
    against = [of["nats_per_byte"] for of in world.row("report", best)["held_out"]["all"]["against"].values()]
    assert len(against) == len(losses) - 1
    stands_out = all(gap < -2 * error for gap, error in against)
    starred = [name for name, loss in losses.items() if f"{loss:.4f}*" in rows[name]]
    assert starred == ([best] if stands_out else [])
    assert "**" in Path("report/report.md").read_text()


@pytest.mark.usefixtures("whole")
def test_differences_on_held_out_text_are_paired_over_conversations(world: World, tmp_path: Path) -> None:
    scores = {}
    for name, model in (("target_1", "target_1"), ("mine", "report/models/mine")):
        flags = ["--dialogues", str(next(Path("report/work").glob("dialogues-*"))), "--output"]
        output = tmp_path / f"{name}.json"
        CliRunner().invoke(fusion_trainer, ["evaluate", "--model", model, *flags, str(output)])
        scores[name] = json.loads(output.read_text())["conversations"]
    for group in ("all", "red"):
        rows = [
            (scores["mine"][name]["nats"], of["nats"], of["bytes"])
            for name, of in scores["target_1"].items()
            if group in ("all", of["group"])
        ]
        ours, theirs, size = np.array(rows, float).T
        gap = (ours - theirs).sum() / size.sum()
        error = np.sqrt(len(size) / (len(size) - 1) * ((ours - theirs - gap * size) ** 2).sum()) / size.sum()
        found = world.row("report", "mine")["held_out"][group]["against"]["target_1"]["nats_per_byte"]
        assert found == pytest.approx([gap, error], rel=1e-6)
    markdown = Path("report/report.md").read_text()
    assert "Held-out loss less the pivot's" in markdown


# Resuming


@pytest.mark.usefixtures("whole")
def test_a_second_run_does_nothing_and_prints_the_same(world: World) -> None:
    command = ["mine.yaml", "average.yaml", "--out", "report", "--base", "pivot", *EVALUATIONS]
    code, said = world.compare(*command)
    assert (code, "merging" in said, "held-out" in said.partition("Side")[0]) == (0, False, False), said
    before, table = stamps(Path("report"), *REPORTS), said.partition("Side by side")[2].strip()
    assert world.compare(*command, "--quiet")[1].partition("Side by side")[2].strip() == table
    code, said = world.compare(*command, "--quiet", "--json")
    assert stamps(Path("report"), *REPORTS) == before
    assert json.loads(said) == world.report("report")


@pytest.mark.usefixtures("whole")
def test_only_what_is_new_or_has_changed_is_done(world: World) -> None:
    before = stamps(Path("report"), *REPORTS)
    world.recipe("average.yaml", "linear", ("target_1",), parameters={"weight": 1})
    shutil.rmtree("report/models/mine/")  # removed by the user
    tasks = EVALUATIONS[2:]
    code, said = world.compare("mine.yaml", "average.yaml", "--out", "report", "--base", "pivot", *tasks)
    assert code == 0, said
    assert "average: merged again, because of other recipe" in said
    after = stamps(Path("report"), *REPORTS)
    changed = {name for name, stamp in after.items() if before.get(name) != stamp}
    done = {name for name in changed if name.startswith("steps")}
    rows = ("merge-mine", "merge-average")
    assert done == {
        *(f"steps/merge/{name}.json" for name in rows),
        "steps/distances/merge-average.json",
        "steps/task jumps/merge-average.json",
    }
    assert len(world.row("report", "mine")["runs"]) == 2


def test_killed_in_a_merge_it_resumes_and_uses_nothing_half_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the installed programs."""
    monkeypatch.setattr(runner, "measured", measured)
    world.recipe("one.yaml", "linear", parameters={"weight": 1})
    command = [BIN / "varm-merge", "compare", "one.yaml", "--base", "pivot", "--out", "killed", "--no-keep"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(psutil.Process(process.pid).children, process)
    (merge,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not merge.is_running() or merge.status() == psutil.STATUS_ZOMBIE, process)
    assert not Path("killed/report.json").exists()
    Path("killed/models/one").mkdir(parents=True)  # as if killed before the record was written
    shutil.copy("target_1/model.safetensors", "killed/models/one")
    shutil.copy("one.yaml", "killed/models/one/mergekit_config.yml")
    code, said = world.compare("one.yaml", "--base", "pivot", "--out", "killed", "--no-keep")
    assert code == 0, said
    row = world.row("killed", "one")
    (run,) = row["runs"]
    assert run["wall_s"] > run["cpu_s"] / 4 > 0
    assert run["anonymous_mib"] > 50
    average = (flat("target_1") + flat("target_2")) / 2 - flat("pivot")
    expected = np.linalg.norm(average) / np.linalg.norm(flat("pivot"))
    assert row["distances"]["pivot"] == pytest.approx(expected, rel=1e-6)
    assert row["model"] is None
    assert not list(Path("killed/models").iterdir())


def until(what: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert process.poll() is None or process.returncode == -signal.SIGKILL
        assert time.monotonic() < end
        time.sleep(0.005)
