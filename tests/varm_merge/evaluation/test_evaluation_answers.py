"""``varm-merge evaluate answers``: a model's answers, in the files that the judges of both benchmarks read."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import judge_server
import pytest
import tiny_sources
import torch
from click.testing import CliRunner, Result
from programs import BIN, ENVIRONMENT, forked, wait_for
from safetensors.torch import load_file, save_file
from tiny_sources import END_OF_TURN
from transformers import AutoModelForCausalLM, AutoTokenizer

from varm_common.errors import UserError
from varm_merge.cli import main
from varm_merge.evaluation.answers import Answer, Prompt
from varm_merge.evaluation.journal import Journal
from varm_merge.evaluation.local import LocalModel, Sampler

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    f"{END_OF_TURN}{{% endfor %}}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
)
LIMIT = 10
CATEGORIES = ("math", "coding", "reasoning", "extraction", "math", "coding")


def turns_of(number: int) -> list[str]:
    words = tiny_sources.WORDS
    return [" ".join(words[number : number + 2 + 5 * number]), " ".join(words[number + 3 : number + 8])]


QUESTIONS = [
    {"question_id": 81 + number, "category": category, "turns": turns_of(number)}
    for number, category in enumerate(CATEGORIES)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny chat model of a layout, with a tokenizer of a kind, saved once."""
    folder = tmp_path_factory.mktemp("sources")

    def get(layout: str, kind: str = "byte_level_bpe") -> Path:
        path = folder / f"{layout}-{kind}"
        if not path.exists():
            tiny_sources.save_source(path, layout, kind, special=[END_OF_TURN], template=TEMPLATE)
        return path

    return get


@pytest.fixture(scope="module")
def llama(source: Callable[..., Path]) -> Path:
    return source("llama")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "question.jsonl", QUESTIONS)


def answer(model: object, questions: Path, output: Path, *more: object) -> Result:
    arguments = ["evaluate", "answers", model, "--questions", questions, "--output", output, "--quiet"]
    arguments += ["--max-new-tokens", LIMIT, *more]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_in(path: Path) -> dict[int, list[list[str]]]:
    return {row["question_id"]: [choice["turns"] for choice in row["choices"]] for row in rows(path)}


class Oracle:
    """One answer at a time, token by token, without padding, batch or cache."""

    def __init__(self, folder: Path, stops: Sequence[int] = ()) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.stops = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids(END_OF_TURN), *stops}

    @torch.no_grad()
    def ids(self, text: str, limit: int = LIMIT) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = len(ids)
        while len(ids) < begin + limit:
            token = int(self.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in self.stops:
                break
            ids = [*ids, token]
        return ids[begin:]

    def answers(self, turns: Sequence[str]) -> list[str]:
        text, answers = "", []
        for turn in turns:
            text += f"user: {turn}{END_OF_TURN}"
            answers.append(self.tokenizer.decode(self.ids(text + "assistant:"), skip_special_tokens=True).strip())
            text += f"assistant: {answers[-1]}{END_OF_TURN}"
        return answers


# What is answered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("llama", "byte_level_bpe"),
        ("gemma2", "unigram"),
        ("gpt_neox", "byte_level_bpe"),
        ("mixtral", "sentencepiece_bpe"),
        ("mpt", "byte_level_bpe"),
        ("qwen2", "byte_level_bpe"),
    ],
)
def test_both_turns_are_what_one_question_at_a_time_gives(
    layout: str, kind: str, source: Callable[..., Path], questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model_answer" / "tiny.jsonl"
    model = source(layout, kind)
    done = answer(model, questions, output, "--batch-size", 4, "--name", "tiny")
    assert done.exit_code == 0, done.output
    oracle = Oracle(model)
    assert answers_in(output) == {row["question_id"]: [oracle.answers(row["turns"])] for row in QUESTIONS}
    for row in rows(output):
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == "tiny"
        assert [choice["index"] for choice in row["choices"]] == [0]
    assert len({row["answer_id"] for row in rows(output)}) == len(QUESTIONS)
    assert [row["question_id"] for row in rows(output)] == [row["question_id"] for row in QUESTIONS]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_samples_do_not_depend_on_the_batch(batch_size: int, llama: Path, tmp_path: Path) -> None:
    rows_ = [{**row, "category": "writing"} for row in QUESTIONS[:4]]
    questions = write_lines(tmp_path / "question.jsonl", rows_)
    output = tmp_path / "samples.jsonl"
    more = ("--num-choices", 3, "--temperature", 1.3)
    done = answer(llama, questions, output, *more, "--batch-size", batch_size)
    assert done.exit_code == 0, done.output
    reversed_ = write_lines(tmp_path / "reversed.jsonl", rows_[::-1])
    expected = tmp_path / "expected.jsonl"
    assert answer(llama, reversed_, expected, *more, "--batch-size", 5).exit_code == 0
    assert answers_in(output) == answers_in(expected)
    assert [row["question_id"] for row in rows(expected)] == [81, 82, 83, 84]
    for choices in answers_in(output).values():
        assert len({tuple(turns) for turns in choices}) == 3
    other = tmp_path / "other.jsonl"
    assert answer(llama, questions, other, *more, "--seed", 1).exit_code == 0
    assert answers_in(other) != answers_in(output)


def test_temperatures_are_those_of_the_categories(llama: Path, tmp_path: Path) -> None:
    """Math is greedy: all choices are one. Writing is not."""
    rows_ = [{**QUESTIONS[0], "category": "math"}, {**QUESTIONS[1], "category": "writing"}]
    questions = write_lines(tmp_path / "question.jsonl", [*rows_, {**QUESTIONS[2], "category": "unheard of"}])
    output = tmp_path / "tiny.jsonl"
    assert answer(llama, questions, output, "--num-choices", 3).exit_code == 0
    distinct = [len({tuple(turns) for turns in choices}) for choices in answers_in(output).values()]
    assert distinct[0] == 1
    assert min(distinct[1:]) > 1


def test_a_sample_is_drawn_from_the_distribution_at_its_temperature() -> None:
    logits_V, temperature, draws = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 0.9]), 0.7, 6000
    prompts = [Prompt((), temperature, f"{draw}") for draw in range(draws)]
    sampled = Sampler(prompts, top_k=5, top_p=0.95)(torch.zeros(draws, 1), logits_V.repeat(draws, 1)).argmax(1)
    expected = torch.softmax(logits_V / temperature, 0)
    expected[expected.argsort()[:2]] = 0  # the last by top-k; what lies beyond 95% of the others is the next
    counts = torch.bincount(sampled, minlength=6)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chances = expected[kept] / expected.sum() * draws
    chi_square = float(((counts[kept] - chances) ** 2 / chances).sum())
    assert chi_square < 16.3  # one in a thousand, at 3 degrees of freedom


def test_answers_end_at_the_generation_configs_tokens_and_at_the_templates(llama: Path, tmp_path: Path) -> None:
    oracle = Oracle(llama)
    text = f"user: {QUESTIONS[0]['turns'][0]}{END_OF_TURN}assistant:"
    whole = oracle.ids(text)
    prompts = [Prompt(({"role": "user", "content": QUESTIONS[0]["turns"][0]},), 0.0, "")]
    stop = next(token for number, token in enumerate(whole) if number > 2 and token not in whole[:number])

    by_config = shutil.copytree(llama, tmp_path / "config")
    (by_config / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    (answer,) = LocalModel(str(by_config), max_new_tokens=LIMIT).answer(prompts)
    expected = oracle.tokenizer.decode(whole[: whole.index(stop)]).strip()
    assert answer == Answer(expected, "stop")

    by_template = shutil.copytree(llama, tmp_path / "template")
    tensors = load_file(by_template / "model.safetensors")
    end = oracle.tokenizer.convert_tokens_to_ids(END_OF_TURN)
    tensors["lm_head.weight"][end] = 2 * tensors["lm_head.weight"][stop]
    save_file(tensors, by_template / "model.safetensors", metadata={"format": "pt"})
    model = LocalModel(str(by_template), max_new_tokens=LIMIT)
    assert end in model.stops
    ids = Oracle(by_template).ids(text)
    assert len(ids) < LIMIT
    assert model.answer(prompts) == [Answer(oracle.tokenizer.decode(ids).strip(), "stop")]

    by_tokenizer = shutil.copytree(llama, tmp_path / "tokenizer")
    tensors = load_file(by_tokenizer / "model.safetensors")
    eos = oracle.tokenizer.eos_token_id
    assert eos != end
    tensors["lm_head.weight"][eos] = 2 * tensors["lm_head.weight"][stop]
    save_file(tensors, by_tokenizer / "model.safetensors", metadata={"format": "pt"})
    (by_tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    model = LocalModel(str(by_tokenizer), max_new_tokens=LIMIT)
    assert model.stops == {end, eos}
    ids = Oracle(by_tokenizer).ids(text)
    assert len(ids) < LIMIT
    assert model.answer(prompts) == [Answer(oracle.tokenizer.decode(ids).strip(), "stop")]


def test_answers_that_exceed_the_context_are_cut_and_counted(llama: Path, tmp_path: Path) -> None:
    short = shutil.copytree(llama, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = [f"user: {row['turns'][0]}{END_OF_TURN}assistant:" for row in QUESTIONS]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    middle = sorted(lengths)[3]
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": middle + 2}))
    single = [{**row, "turns": row["turns"][:1]} for row in QUESTIONS]
    questions, output = write_lines(tmp_path / "question.jsonl", single), tmp_path / "tiny.jsonl"
    done = answer(short, questions, output)
    assert done.exit_code == 0, done.output
    oracle = Oracle(llama)
    for row, text, length in zip(single, texts, lengths, strict=True):
        limit = max(0, min(LIMIT, middle + 2 - length))
        expected = oracle.tokenizer.decode(oracle.ids(text, limit), skip_special_tokens=True).strip()
        assert answers_in(output)[row["question_id"]] == [[expected]]
    counts = {
        line.rpartition(": ")[0]: int(line.rpartition(": ")[2]) for line in done.stdout.splitlines() if "!" in line
    }
    assert counts["! empty answers, because the question fills the model's context"] == sum(
        length >= middle + 2 for length in lengths
    )
    assert counts["! answers cut at the end of the model's context"] >= 1


def test_alpaca_evals_outputs_have_its_keys_and_order(llama: Path, tmp_path: Path) -> None:
    asked_ = [{"instruction": row["turns"][0], "dataset": "koala", "output": "x"} for row in QUESTIONS]
    questions, output = tmp_path / "alpaca_eval.json", tmp_path / "out" / "outputs.json"
    questions.write_text(json.dumps(asked_))
    done = answer(llama, questions, output, "--name", "VaRM", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answered"] == len(asked_)
    oracle = Oracle(llama)
    assert json.loads(output.read_text()) == [
        {
            "instruction": row["instruction"],
            "dataset": "koala",
            "output": oracle.answers([row["instruction"]])[0],
            "generator": "VaRM",
        }
        for row in asked_
    ]


def test_the_batch_is_halved_when_memory_runs_out(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated, sizes, warnings = LocalModel._generated, [], []

    def scarce(self: LocalModel, rows: Sequence[list[int]], *more: Any) -> list[Answer]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generated(self, rows, *more)

    prompts = [Prompt(({"role": "user", "content": row["turns"][0]},), 0.0, "") for row in QUESTIONS]
    expected = LocalModel(str(llama), max_new_tokens=4).answer(prompts)
    monkeypatch.setattr(LocalModel, "_generated", scarce)
    model = LocalModel(str(llama), max_new_tokens=4, batch_size=5, warn=warnings.append)
    assert model.answer(prompts) == expected
    assert sizes == [5, 2, 2, 2]
    assert warnings == ["out of memory for 5 answers at a time; continuing with 2"]
    monkeypatch.setattr(LocalModel, "_generated", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match="out of memory for one answer of 4 tokens"):
        model.answer(prompts)


# Runs that were stopped


@pytest.mark.slow
def test_a_killed_run_resumes_and_writes_the_same_bytes(llama: Path, questions: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    more = ("--num-choices", 2, "--temperature", 0.9, "--batch-size", 4, "--max-new-tokens", 150, "--name", "tiny")
    partial = tmp_path / "killed.jsonl.partial"
    process = forked(lambda: answer(llama, questions, killed, *more))
    wait_for(lambda: partial.exists() and partial.stat().st_size, process)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert not killed.exists()
    there = len(partial.read_bytes().splitlines())
    assert 0 < there < len(QUESTIONS)
    with partial.open("ab") as file:
        file.write(b'[86, [["torn')
    assert answer(llama, questions, whole, *more).exit_code == 0
    done = answer(llama, questions, killed, *more)
    assert done.exit_code == 0, done.output
    assert f"{len(QUESTIONS) - there} of {len(QUESTIONS)} questions answered, {there} before" in done.output
    began = json.loads((tmp_path / "killed.jsonl.settings.json").read_text())["began"]
    assert {row["tstamp"] for row in rows(killed)} == {began}
    unbroken = [row | {"tstamp": began} for row in rows(whole)]
    assert killed.read_text() == "".join(json.dumps(row) + "\n" for row in unbroken)
    assert not partial.exists()
    again = answer(llama, questions, killed, *more)
    assert again.exit_code == 0
    assert f"0 of {len(QUESTIONS)} questions answered, {len(QUESTIONS)} before" in again.output


def test_another_model_or_setting_for_the_same_file_is_refused(
    llama: Path, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tiny.jsonl"
    assert answer(llama, questions, output).exit_code == 0
    before = output.read_bytes()
    other = shutil.copytree(llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    name = ("--name", llama.name)
    fewer = write_lines(tmp_path / "fewer.jsonl", QUESTIONS[:3])
    (template := tmp_path / "chat.jinja").write_text(TEMPLATE + " ")
    for arguments, what in (
        ((other, questions, output, *name), "weights "),
        ((llama, questions, output, "--max-new-tokens", 9), "max_new_tokens +9 +10"),
        ((llama, questions, output, "--seed", 3), "seed +3 +0"),
        ((llama, fewer, output), "questions "),
        ((llama, questions, output, "--chat-template", template), "chat template "),
    ):
        done = answer(*arguments)
        assert done.exit_code == 1
        first, *differences = done.output.partition("\nGive another --output")[0].splitlines()
        assert first == f"Error: `{output}` was started with other settings:"
        assert [bool(re.match(f" *{what}", line)) for line in differences[1:]] == [True]
    moved = shutil.copytree(llama, tmp_path / "moved")
    assert answer(moved, questions, output, *name).exit_code == 0
    assert output.read_bytes() == before
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("mine\n")
    assert (
        "exists without foreign.jsonl.settings.json; give another --output"
        in answer(llama, questions, foreign).output
    )
    assert foreign.read_text() == "mine\n"


@pytest.mark.parametrize("content", ["mine", "[1]", '{"began": 1.5}', '{"format": "varm-merge answers"}', ""])
def test_a_settings_file_of_another_program_is_not_changed(content: str, tmp_path: Path) -> None:
    output, settings = tmp_path / "out.jsonl", tmp_path / "out.jsonl.settings.json"
    settings.write_text(content)
    with pytest.raises(
        UserError, match=r"out\.jsonl\.settings\.json` is not from this program|was started with other settings"
    ):
        Journal(output, {"format": "varm-merge answers"})
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_an_incomplete_line_is_removed_only_beside_matching_settings(tmp_path: Path) -> None:
    output, about = tmp_path / "out.jsonl", {"format": "varm-merge answers"}
    partial, settings = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.settings.json"
    for content, message in ((b"my notes", "line 1: not JSON"), (b"[my notes", "exists without out")):
        partial.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Journal(output, about)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]
    settings.write_text(json.dumps({"began": 1.5, **about}))
    with Journal(output, about) as journal:
        assert journal.records == {}
        journal.keep(1, "text")
    assert partial.read_bytes() == b'[1, "text"]\n'


def test_two_processes_do_not_write_the_same_file(llama: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny.jsonl"
    with Journal(output, {"by": "another"}) as journal:
        done = answer(llama, questions, output)
        assert done.exit_code == 1
        assert f"`{output}.partial` is being written by another process" in done.output
        journal.keep(81, [["text"]])
    assert "`tiny.jsonl` was started with other settings" in answer(llama, questions, output).output.replace(
        f"{tmp_path}/", ""
    )
    with Journal(output, {"by": "another"}) as journal:
        assert journal.records == {81: [["text"]]}


def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_room(
    llama: Path, questions: Path, small_disk: Callable[[int], Path]
) -> None:
    folder = small_disk(8192)
    (folder / "ballast").write_bytes(b"x" * 4096)
    output = folder / "tiny.jsonl"
    done = answer(llama, questions, output, "--batch-size", 1)
    assert done.exit_code == 1
    assert "cannot be written" in done.output
    small_disk(1 << 20)
    done = answer(llama, questions, output, "--batch-size", 1)
    assert done.exit_code == 0, done.output
    assert len(rows(output)) == len(QUESTIONS)


# What cannot be used


def test_a_model_without_chat_template_is_reported_and_can_take_one_from_a_file(
    llama: Path, questions: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(llama, tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    output, template = tmp_path / "tiny.jsonl", tmp_path / "chat.jinja"
    done = answer(bare, questions, output)
    assert f"`{bare}` has no chat template; give one with --chat-template FILE" in done.output
    # a template without a generation prompt: what it writes before an answer serves as one
    template.write_text(TEMPLATE.partition("{% if")[0])
    done = answer(bare, questions, output, "--chat-template", template)
    assert done.exit_code == 0, done.output
    expected = tmp_path / "expected.jsonl"
    assert answer(llama, questions, expected).exit_code == 0
    assert answers_in(output) == answers_in(expected)
    template.write_text("{{ raise_exception('roles must alternate') }}")
    broken = answer(bare, questions, tmp_path / "broken.jsonl", "--chat-template", template)
    assert broken.exit_code == 1
    assert "cannot be rendered: roles must alternate" in broken.output


def test_models_that_cannot_be_loaded_are_reported(llama: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny.jsonl"
    coded = shutil.copytree(llama, tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
    (coded / "config.json").write_text(json.dumps(config | own))
    (coded / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    pickled = shutil.copytree(llama, tmp_path / "pickled")
    tensors = load_file(pickled / "model.safetensors")
    torch.save({**tensors, "code": print}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    cut = shutil.copytree(llama, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"\x00" * 100)
    for model, message in (
        (coded, f"`{coded}` has its own code, which runs only with --trust-remote-code"),
        (pickled, "`pytorch_model.bin` cannot be read without running code of its own (`print`)"),
        (cut, f"the weights of `{cut}`: "),
        (tmp_path, f"the folder `{tmp_path}` has no config.json: it is not a model"),
        (tmp_path / "nowhere", f"no model folder `{tmp_path / 'nowhere'}`"),
    ):
        done = answer(model, questions, output)
        assert done.exit_code == 1, done.output
        assert message in done.output
        assert "Traceback" not in done.output
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("tiny.jsonl*"))


def test_all_problems_of_a_file_of_questions_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(
        '{"question_id": 1, "category": "math", "turns": ["a"]}\n'
        '{"question_id": 1, "category": 3, "turns": []}\n\n'
        '{"turns": "?"}\n'
    )
    done = answer("nowhere", path, tmp_path / "out.jsonl")
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        f"Error: `{path}` cannot be used:",
        "  line 2: category: Input should be a valid string",
        "  line 2: turns: List should have at least 1 item after validation, not 0",
        "  line 4: question_id: Field required",
        "  line 4: category: Field required",
        "  line 4: turns: Input should be a valid list",
    ]
    for content, message in (
        ("", "it is empty"),
        ("[1]", "row 1: not a JSON object"),
        ("{", "line 1: not JSON: "),
        ('[{"instruction": "a", "input": "b"}]', "row 1: input: "),
        ('{"question_id": 1, "category": "a", "turns": ["b"]}\n' * 2, "question 1 occurs twice"),
        ('{"prompt": "a"}', "its rows have `prompt`"),
    ):
        path.write_text(content)
        assert message in answer("nowhere", path, tmp_path / "out.jsonl").output
    path.write_bytes(b"\xff\xfe{}")
    assert "cannot be read: 'utf-8'" in answer("nowhere", path, tmp_path / "out.jsonl").output


# Through an endpoint


def echo(body: dict[str, Any]) -> str:
    return f"answer to {len(body['messages'])}: {body['messages'][-1]['content'][:20].strip()}"


def test_an_endpoint_is_queried_by_turn_and_again_for_missing_answers(questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "served.jsonl"
    refused = judge_server.Fault(400, body={"error": {"message": "too long"}})
    with judge_server.serving(echo, [refused]) as server:
        more = ("--url", server.url, "--concurrency", 1, "--num-choices", 2)
        done = answer("org/served", questions, output, *more)
        assert done.exit_code == 1
        assert "✗ 81: 400 too long" in done.output
        assert "✗ 1 are missing; run the same command again to request only these" in done.output
        assert not output.exists()
        server.requests.clear()
        done = answer("org/served", questions, output, *more)
        assert done.exit_code == 0, done.output
        assert len(server.requests) == 4
    first, second = server.requests[:2]
    turns = QUESTIONS[0]["turns"]
    assert first["messages"] == [{"role": "user", "content": turns[0]}]
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": echo(first)},
        {"role": "user", "content": turns[1]},
    ]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("org/served", LIMIT, 0)
    assert len({body["seed"] for body in server.requests}) == 4
    for row in QUESTIONS:
        expected = [f"answer to {1 + 2 * turn}: {row['turns'][turn][:20].strip()}" for turn in (0, 1)]
        assert answers_in(output)[row["question_id"]] == [expected] * 2
    assert {row["model_id"] for row in rows(output)} == {"served"}
    with judge_server.serving(echo) as another:
        done = answer("org/served", questions, output, "--url", another.url, "--num-choices", 2)
        assert done.exit_code == 1
        assert re.search(f"endpoint +{another.url} +{server.url}", done.output)
        assert another.requests == []


@pytest.mark.parametrize(
    ("reason", "warning"), [("length", "cut at --max-new-tokens: 1"), ("content_filter", "content filter: 1")]
)
def test_a_reply_that_was_cut_before_its_text_is_an_empty_answer(
    reason: str, warning: str, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "served.jsonl"
    with judge_server.serving(echo, [judge_server.Fault(trick=reason)]) as server:
        done = answer("served", questions, output, "--url", server.url, "--concurrency", 1)
        assert len(server.requests) == 2 * len(QUESTIONS)
    assert done.exit_code == 0, done.output
    assert warning in done.output
    assert sum(text == "" for turns in answers_in(output).values() for text in turns[0]) == 1


def test_options_without_effect_are_refused(questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for more, message in (
        (("--url", "http://127.0.0.1:1/v1", "--dtype", "float16"), "--dtype has no effect with --url"),
        (("--concurrency", 4), "--concurrency needs --url"),
        (("--key-env", "NAME"), "--key-env needs --url"),
    ):
        done = answer("nowhere", questions, output, *more)
        assert done.exit_code == 2
        assert message in done.output
    assert list(tmp_path.iterdir()) == [questions]


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_the_endpoint(questions: Path, tmp_path: Path) -> None:
    hanging = [judge_server.Fault(trick="sleep")] * 100
    with judge_server.serving(echo, hanging, hanging=30) as server:
        arguments = ["evaluate", "answers", "served", "--questions", questions, "--output", tmp_path / "out.jsonl"]
        process = subprocess.Popen(
            [BIN / "varm-merge", *map(str, arguments), "--url", server.url],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        wait_for(lambda: server.requests, process.pid)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert time.monotonic() - began < 5
        assert process.returncode == 1
        assert errors.endswith("Aborted!\n")
        assert "Traceback" not in errors
