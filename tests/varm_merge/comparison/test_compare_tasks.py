"""``varm-merge compare --tasks``: suites, examples, code, backends; by the installed lm-evaluation-harness."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import model_server
import pytest
import tiny_models
import tiny_sources
import yaml
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from varm_common.errors import UserError
from varm_common.forked import run_forked
from varm_common.process_usage import CommandError, Run
from varm_merge.cli import main
from varm_merge.comparison import harness, suites
from varm_merge.comparison.backends import CHAT, COMPLETIONS, VLLM
from varm_merge.comparison.harness import Run as ModelRun
from varm_merge.comparison.servers import Servers
from varm_merge.comparison.suites import SUITES, Task, read
from varm_merge.comparison.task_models import demand_template, short_contexts
from varm_merge.comparison.tasks import Tasks

FOLDERS = (
    *("bbh/cot_fewshot", "arc", "super_glue/boolq", "hellaswag", "openbookqa", "triviaqa", "drop", "lambada"),
    *("llama3", "mmlu-redux", "gpqa", "gsm8k", "minerva_math", "benchmarks", "humaneval", "mbpp", "aime"),
    "mmlu_pro",
)
"""The folders of the harness that hold the tasks of the suites; to read all of them takes ten seconds."""


# The suites


@pytest.fixture(scope="module")
def index() -> Any:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_path=[root / one for one in FOLDERS], include_defaults=False)
    return manager.task_index


ALL = [(name, task) for name, suite in SUITES.items() for task in suite.tasks]


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task"), ALL, ids=[f"{name}-{task.name}" for name, task in ALL])
def test_the_harness_has_every_task_of_a_suite_with_its_metric_and_number_of_examples(
    suite: str, task: Task, index: Any
) -> None:
    leaves = [leaf for leaf in harness._leaves(task.name, index) if leaf.settings]
    assert leaves
    assert suite not in index
    for leaf in leaves:
        fixed = leaf.settings.get("num_fewshot")
        assert task.shots == 0 or fixed != 0  # it would be ignored
        assert task.metric
        metric, which = re.fullmatch(r"([^ ]+)(?: \((.+)\))?", task.metric).groups()  # type: ignore[union-attr]
        metrics = [str(one["metric"]).rpartition(".")[-1] for one in leaf.settings["metric_list"]]
        assert metric.replace("pass@1", "pass_at_k") in metrics
        filters = [one["name"] for one in leaf.settings.get("filter_list", ())]
        assert which in filters if which else not filters


def test_suites_are_listed_with_tasks_examples_source_and_what_the_harness_lacks() -> None:
    done = CliRunner().invoke(main, ["compare", "--tasks", "list"])
    assert done.exit_code == 0
    for suite in SUITES.values():
        assert f"{suite.name}: {suite.source}" in done.output
    assert re.search(r"\| BBH +\| bbh_cot_fewshot +\| 3 ", done.output)
    assert re.search(r"\| MultiPL-E +\| – +\| – +\| – +\| bigcode-evaluation-harness", done.output)


def test_a_suite_is_read_with_other_tasks() -> None:
    tasks = read(["fusellm", "mmlu:5", "mine", "arc_easy:25"], 2, chat=True)
    labels = [task.label for task in tasks]
    assert labels[:2] == ["bbh_cot_fewshot:3", "arc_easy:0"]
    assert labels[-3:] == ["mmlu:5", "mine:2", "arc_easy:25"]
    assert [task.chat for task in tasks] == [False] * (len(tasks) - 3) + [True] * 3
    assert all(task.chat and task.max_tokens for task in read(["fusechat"]))
    assert [task.label for task in read(["mine"])] == ["mine"]
    (sentence,) = suites.missing(["mine", "fusellm", "fusellm"])
    assert "MultiPL-E (bigcode-evaluation-harness (multiple-*))" in sentence
    assert "SciBench (OpenCompass)" in sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "fusellm:5"], "`fusellm` is a suite and has its own numbers of examples, so no `fusellm:5`"),
        (["--tasks", "gsm8k_cot_zeroshot:0,fusechat"], "`gsm8k_cot_zeroshot:0` is named twice"),
        (["--tasks", "mine", "--batch-size", "0"], "`0` is neither a number above 0 nor auto"),
        (["--server-url", "http://localhost"], "--server-url needs --tasks"),
        (["--tasks", "mine", "--server-url", "http://localhost"], "--server-url needs --backend completions or"),
        (["--tasks", "mine", "--backend", "vllm"], "--tasks --backend vllm needs vllm: pip install"),
        (
            ["--tasks", "mine", "--model-args", "dtype=float32,model=x"],
            "--model-args: `model` is set by varm-merge",
        ),
        (["--tasks", "mine", "--server-url", "a=b"], "`a=b` is neither URL nor NAME=URL"),
        (["--tasks", "mine", "--server-url", "http://me:key@host"], "--server-url contains a key"),
        (["--tasks", "mine", "--server-url", "http://a", "--server-url", "http://b"], "two URLs for all models"),
        (
            ["--tasks", "mine", "--server-key-env", "NO_SUCH_KEY"],
            "needs a key: set the environment variable NO_SUCH_KEY",
        ),
    ],
)
def test_options_of_tasks_that_do_not_fit_end_in_a_sentence(
    options: list[str], message: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(main, ["compare", "--out", str(tmp_path / "out"), *options])
    assert message in done.output
    assert done.exit_code in (1, 2)
    assert not (tmp_path / "out").exists()


# By the harness, on tiny models


QUESTIONS = [
    {"question": f"the {word} fox", "choices": ["jumps over", "again", "dog number"], "answer": number % 3}
    for number, word in enumerate(("red", "grey") * 4)
]
DATA = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl", "train": "train.jsonl"}},
}
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
CHOICE = {
    **DATA,
    "training_split": "train",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [ACCURACY, {**ACCURACY, "metric": "acc_norm"}],
}
LIKELIHOOD = {
    **DATA,
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " jumps over",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
}
GENERATED = {
    **DATA,
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "fox",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
    "metric_list": [{**ACCURACY, "metric": "exact_match"}],
}
PROGRAM = "!function utils.passes"
UTILS = """
import os, subprocess, sys

def programs(answers, docs):
    return [[doc["program"] + "#" + " ".join(one.split()) for one in own] for own, doc in zip(answers, docs)]

def passes(references, predictions, **_):
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    return float(subprocess.run([sys.executable, "-c", predictions[0][0]]).returncode == 0)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, fork_server: None) -> Iterator[Path]:
    """A folder with the models ``pivot``, ``target_1`` and ``target_2``, and tasks; paths are relative to it."""
    folder = tmp_path_factory.mktemp("tasks of models")
    members = tiny_models.save_family(folder, "llama", max_position_embeddings=64)
    for model in (members.pivot, *members.targets):
        tiny_models.train_tokenizer(model, "the red grey fox jumps over dog number again")
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS[:5]))
    program = {"question": "the fox", "program": f"open({str(folder / 'ran')!r}, 'a').write('x')"}
    (folder / "programs.jsonl").write_text(json.dumps(program) + "\n")
    (folder / "tasks").mkdir()
    code = GENERATED | {"unsafe_code": True, "dataset_kwargs": {"data_files": {"test": "programs.jsonl"}}}
    code |= {"metric_list": [{**ACCURACY, "metric": "PASSES"}], "num_fewshot": 0}
    code |= {"filter_list": [{"name": "f", "filter": [{"function": "custom", "filter_fn": "PROGRAMS"}]}]}
    group = {"group": "bbh_cot_fewshot", "task": ["part_1", {"task": "part_2", "num_fewshot": 2}]}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    made: dict[str, dict[str, Any]] = {
        **{name: {"task": name, **CHOICE} for name in ("jumps", "hellaswag", "part_1", "part_2")},
        "words": {"task": "words", **LIKELIHOOD},
        "answers": {"task": "answers", **GENERATED},
        "fixed": {"task": "fixed", **CHOICE, "num_fewshot": 0},
        "writes": {"task": "writes", **code},
        "bbh": group,
        "both": {"group": "both", "task": [{"task": "jumps", "num_fewshot": 1}, "words"]},
        "broken": {"task": "broken", **CHOICE, "process_docs": "BROKEN"},
    }
    for name, content in made.items():
        text = yaml.safe_dump(content).replace("PASSES", "!function utils.passes")
        text = text.replace("PROGRAMS", "!function utils.programs").replace("BROKEN", "!function broken.code")
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    (folder / "tasks" / "utils.py").write_text(UTILS)
    (folder / "tasks" / "broken.py").write_text("import no_such_package_for_math\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("varm_merge.comparison.runner.measured", averaged)
        patch.chdir(folder)
        yield folder


def averaged(command: list[str], **_options: Any) -> Run:
    """In place of mergekit: a copy of the second target."""
    shutil.copytree("target_2", command[command.index("--quiet") - 1])
    return Run(1.0, 1.0, 1.0)


def compare(out: str, *options: str) -> Result:
    models = ["--base", "pivot", "--models", "target_1"]
    own = ["--methods", "linear", *models, "--include-path", "tasks", "--device", "cpu", "--out", out]
    return CliRunner().invoke(main, ["compare", *own, *options], catch_exceptions=False)


def measures(out: str, name: str, task: str) -> list[dict[str, Any]]:
    rows = json.loads(Path(out, "report.json").read_text())["rows"]
    (found,) = [row["tasks"].get(task, []) for row in rows if row["name"] == name]
    return list(found)


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_a_suite_runs_with_its_numbers_of_examples_and_its_metric_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of the suite, which here are a local group and a local task of these names."""
    fusellm = SUITES["fusellm"]
    some = replace(fusellm, benchmarks=(fusellm.benchmarks[0], fusellm.benchmarks[4], fusellm.benchmarks[-1]))
    monkeypatch.setitem(SUITES, "fusellm", some)
    done = compare("suite", "--tasks", "fusellm", "--limit", "2")
    assert done.exit_code == 0, done.output
    assert "fusellm: lm-evaluation-harness does not have Vicuna Bench (FastChat's llm_judge)" in done.output
    for name in ("pivot", "target_1", "linear"):
        bbh, hellaswag = (measures("suite", name, label) for label in ("bbh_cot_fewshot:3", "hellaswag:0"))
        shots = {measure["task"]: measure["shots"] for measure in (*bbh, *hellaswag)}
        assert shots == {"part_1": 3, "part_2": 3, "bbh_cot_fewshot": 3, "hellaswag": 0}
        assert [measure["metric"] for measure in hellaswag] == ["acc_norm", "acc"]
    header = Path("suite/report.md").read_text()
    assert " bbh_cot_fewshot:3, acc " in header
    assert " hellaswag:0, acc_norm " in header


@pytest.mark.slow
@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "jumps,writes"], "writes runs code that the models write: add --allow-code-execution"),
        (["--tasks", "fixed:2"], "its file fixes the examples of fixed at 0, and .* name it `fixed:0`"),
        (["--tasks", "fixed", "--num-fewshot", "1"], "fixed:1: its file fixes the examples of fixed at 0"),
        (["--tasks", "broken"], "its code in .* cannot be loaded: No module named 'no_such_package_for_math'"),
        (["--tasks", "words", "--backend", CHAT, "--server-url", "http://127.0.0.1:9"], "compares likelihoods"),
        (["--tasks", "answers", "--backend", CHAT, "--server-url", "lin=http://127.0.0.1:9"], "is called `lin`"),
        (["--tasks", "answers", "--backend", CHAT, "--server-url", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_tasks_that_cannot_run_are_refused_before_the_first_merge(options: list[str], message: str) -> None:
    if CHAT in options:
        pytest.importorskip("tenacity")
    shutil.rmtree("refused", ignore_errors=True)
    done = compare("refused", *options)
    assert done.exit_code == 1
    assert re.search(message, done.output.splitlines()[-1])
    assert done.output.splitlines()[-1].startswith("Error: ")
    assert "merging" not in done.output
    assert not Path("ran").exists()


@pytest.mark.slow
def test_code_runs_only_if_it_was_allowed(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(CommandError, match="marked as unsafe"):  # the harness's own guard
        run_forked(
            *(harness.evaluate, Tasks((Task("writes"),)), Task("writes"), [str(world / "tasks")]),
            *(ModelRun(world / "pivot", "cpu"), tmp_path / "out.json"),
            log=tmp_path / "log.txt",
        )
    assert not (world / "ran").exists()
    done = compare("code", "--tasks", "writes", "--allow-code-execution")
    assert done.exit_code == 0, done.output
    assert "! writes: code that the models write runs on this machine" in done.output
    assert (world / "ran").read_text() == "xxx"  # once for each model
    assert [measures("code", name, "writes")[0]["value"] for name in ("pivot", "linear")] == [1.0, 1.0]
    (world / "ran").unlink()


# Servers


@pytest.mark.slow
def test_a_server_gives_the_scores_of_transformers(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tenacity")
    monkeypatch.setenv("OUR_KEY", "secret")
    tasks = ["--tasks", "both", "--limit", "4"]
    done = compare("served", *tasks)
    assert done.exit_code == 0, done.output
    expected = {name: measures("served", name, "both") for name in ("pivot", "target_1", "linear")}
    folders = {"pivot": Path("pivot"), "target_1": Path("target_1"), "linear": Path("served/models/linear")}
    with model_server.serving(folders) as server:
        own = ["--backend", COMPLETIONS, "--server-url", server.url, "--batch-size", "2"]
        done = compare("served", *tasks, *own, "--server-key-env", "OUR_KEY")
        assert done.exit_code == 0, done.output
        assert {path for path, _ in server.requests} == {"/v1/completions"}
        assert server.keys == {"Bearer secret"}
        for name, measured in expected.items():
            found = measures("served", name, "both")
            for key in ("task", "metric", "shots"):
                assert [one[key] for one in found] == [one[key] for one in measured]
            assert [one["value"] for one in found] == pytest.approx([one["value"] for one in measured], rel=1e-5)
    values = {measure["value"] for found in expected.values() for measure in found if measure["task"] == "words"}
    assert len(values) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_a_model_that_was_just_merged_is_not_scored_by_a_server_of_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tenacity")
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")  # which this server must not see
    with model_server.serving({"pivot": Path("pivot"), "linear": Path("pivot")}) as server:
        options = ["--tasks", "answers", "--backend", CHAT, "--server-url"]
        done = compare("new", *options, f"linear={server.url}")
        assert done.exit_code == 1
        assert "linear: task answers: merged just now: start its server with `new/models/linear`" in done.output
        assert "no --server-url, so no tasks: pivot, target_1" in done.output
        assert compare("new", *options, f"linear={server.url}").exit_code == 0
        assert [len(measures("new", name, "answers")) for name in ("pivot", "linear")] == [0, 1]
        assert measures("new", "linear", "answers")[0]["value"] == 1.0  # the server repeats the last word
        assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
        assert server.keys <= {None, "Bearer ", "Bearer"}
        assert [{"role": "user", "content": "the red fox"}] in [body["messages"] for _, body in server.requests]
        server.silent = True  # as when a reasoning model is cut before its answer
        done = compare("new", *options, f"linear={server.url}", "--limit", "1")
        assert (done.exit_code, measures("new", "linear", "answers")) == (1, [])
        assert "✗ linear: task answers: no reply of the server has a text" in done.output


def test_a_server_is_asked_what_it_serves(mistral: tiny_models.Family, tmp_path: Path) -> None:
    one, two = mistral.targets
    plain = tmp_path / "plain"
    shutil.copytree(one, plain)
    tiny_models.train_tokenizer(plain, "the fox")
    with model_server.serving({"whatever": plain}, {"whatever": str(one)}) as server:
        assert Servers({"merged": server.url}).served_name("merged", one) == "whatever"
        with pytest.raises(UserError, match="lists whatever, but not `merged`; serve"):
            Servers({"": server.url}).served_name("merged", one)
        with pytest.raises(UserError, match=f"has loaded `{re.escape(str(one))}`, not `{re.escape(str(two))}`"):
            Servers({"merged": server.url}).served_name("merged", two)
        with pytest.raises(UserError, match=r"answers 404 to .*/v2/models: is the URL right"):
            Servers({"merged": server.url[:-1] + "2"}).served_name("merged", one)


# Arguments of the harness


def test_every_backend_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_adds_bos", lambda run, chat: True)
    run = ModelRun(Path("m"), "cpu", url="http://host/v1", served_name="s", length=99)
    task, long = Task("t"), Task("t", chat=True, max_tokens=32768)
    tasks = Tasks((task,), model_args="dtype=float32,tensor_parallel_size=2")
    own = {"dtype": "float32", "tensor_parallel_size": 2}
    model = {"pretrained": "m", "trust_remote_code": False, **own}
    assert harness._model(tasks, task, run) == {
        "model": "hf",
        "model_args": model,
        "batch_size": 8,
        "device": "cpu",
    }
    assert harness._model(tasks, task, replace(run, device="cuda"))["batch_size"] == "auto"
    assert harness._model(replace(tasks, batch_size="3"), task, run)["batch_size"] == "3"
    on_vllm = harness._model(replace(tasks, backend=VLLM), task, run)
    assert on_vllm == {"model": "vllm", "model_args": model, "batch_size": "auto"}
    served = harness._model(replace(tasks, backend=COMPLETIONS), task, run)
    assert (served["model"], served["batch_size"]) == ("local-completions", 1)
    assert served["model_args"]["base_url"] == "http://host/v1/completions"
    assert (served["model_args"]["num_concurrent"], served["model_args"]["max_length"]) == (16, 99)
    chat = harness._model(replace(tasks, backend=CHAT, batch_size="4"), long, run)["model_args"]
    assert (chat["base_url"], chat["num_concurrent"]) == ("http://host/v1/chat/completions", 4)
    assert "tokenizer" not in chat
    assert (served["model_args"]["timeout"], chat["timeout"]) == (300, 6553)


BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize("template", [BOS_TEMPLATE, BOS_TEMPLATE.removeprefix("{{ bos_token }}")])
@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "byte_level_bpe"])
def test_a_server_gets_the_tokens_that_transformers_gets(kind: str, template: str, tmp_path: Path) -> None:
    """The first kind of tokenizer adds BOS, the second does not; a template may have one of its own."""
    pytest.importorskip("tenacity")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tiny_sources.save_source(tmp_path, "llama", kind, template=template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    run = ModelRun(tmp_path, "cpu", url="http://host/v1", served_name="s", length=99)
    tasks = Tasks((Task("t"),), backend=COMPLETIONS)
    ours = HFLM(pretrained=str(tmp_path), device="cpu")
    turns = [{"role": "user", "content": "the red fox"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False)
    for text, task in (("the red fox", Task("t")), (chat, Task("t", chat=True))):
        served = LocalCompletionsAPI(**harness._model(tasks, task, run)["model_args"])
        assert served._encode_pair(text, " jumps") == ours._encode_pair(text, " jumps")
        generated = served.tok_encode([text], add_special_tokens=served.add_bos_token)[0]
        assert generated == ours.tok_batch_encode([text])[0][0].tolist()
        assert generated.count(tokenizer.bos_token_id) == (kind == "sentencepiece_bpe")


def test_an_answer_leaves_room_for_the_question() -> None:
    task = Task("t", max_tokens=32768)
    assert [harness.answer_tokens(task, length) for length in (None, 131072, 33792, 32768, 2048, 256)] == [
        32768,
        32768,
        32768,
        31744,
        1024,
        128,
    ]


def test_chat_tasks_need_a_model_with_a_chat_template(tmp_path: Path) -> None:
    tasks = Tasks((Task("asked", chat=True, max_tokens=512), Task("plain")))
    with pytest.raises(UserError, match="asked need a chat template, and no model has one"):
        demand_template(tasks, [tmp_path], [{"merge_method": "varm"}])
    demand_template(tasks, [tmp_path], [{"merge_method": "varm", "chat_template": "chatml"}])
    demand_template(replace(tasks, backend=CHAT), [tmp_path], [])
    demand_template(Tasks((Task("plain"),)), [tmp_path], [])
    (tmp_path / "chat_template.jinja").write_text(BOS_TEMPLATE)
    demand_template(tasks, [tmp_path], [])
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    assert [*short_contexts(tasks, {"pivot": tmp_path})] == [
        "asked: answers of pivot have at most 128 tokens: its context is 256"
    ]


class _Locked(BaseHTTPRequestHandler):
    """A server that needs a key."""

    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_that_needs_a_key_says_so(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Locked) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        with pytest.raises(UserError, match=r"answers 401 .*--server-key-env"):
            Servers({"": f"http://127.0.0.1:{server.server_port}/v1"}).served_name("merged", tmp_path)
        server.shutdown()
