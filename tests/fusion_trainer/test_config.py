"""The fusion trainer's settings, from YAML and flags, and ``fusion-trainer prepare`` from data to a folder."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from peft import LoraConfig
from pydantic import BaseModel
from tiny_tokenizers import shared
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from fusion_trainer.cli import main
from fusion_trainer.config import AlignConfig, ExtractConfig, ImportConfig, PrepareConfig, TrainConfig, read_config
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.training.arguments import declared
from varm_common.errors import UserError

SOUND = "data: chats.jsonl\npivot: org/pivot\n"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    """``config(text, kind, **flags)``: the settings read from a file that holds ``text``."""

    def read(text: str, kind: type[PrepareConfig] = PrepareConfig, **flags: Any) -> PrepareConfig:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return read_config(kind, path, flags)

    return read


def refusal(read: Callable[..., Any], text: str, *of: Any, **flags: Any) -> str:
    with pytest.raises(UserError) as error:
        read(text, *of, **flags)
    return str(error.value)


def test_a_file_sets_what_it_says_and_defaults_the_rest(config: Callable[..., Any]) -> None:
    settings = config(f"{SOUND}max_length: 512\npacking: false\ndialogues: out/dialogues\n")
    assert settings == PrepareConfig(
        data=["chats.jsonl"], pivot="org/pivot", max_length=512, packing=False, dialogues=Path("out/dialogues")
    )
    assert config("data: [a.json, b.jsonl]\npivot: p").data == ["a.json", "b.jsonl"]
    extract = config(f"{SOUND}model: org/source\noutput: store", ExtractConfig)
    assert (extract.top_k, extract.dtype, extract.trust_remote_code, extract.max_length) == (
        10,
        "auto",
        False,
        2048,
    )


def test_a_flag_wins_over_the_file(config: Callable[..., Any]) -> None:
    settings = config(f"{SOUND}max_length: 512\nbad_rows: skip\n", max_length=64, data=["other.json"])
    assert (settings.max_length, settings.data, settings.bad_rows) == (64, ["other.json"], "skip")
    assert config(f"{SOUND}max_length: many\n", max_length=64).max_length == 64


def test_flags_alone_are_enough() -> None:
    assert read_config(PrepareConfig, None, {"data": ["a.json"], "pivot": "p"}).data == ["a.json"]
    with pytest.raises(UserError, match=r"the settings cannot be used:\n  `pivot` is not set \(--pivot\)"):
        read_config(PrepareConfig, None, {"data": ["a.json"]})


def test_every_mistake_of_a_file_is_told_at_once_with_its_line(config: Callable[..., Any], tmp_path: Path) -> None:
    text = """\
# what to prepare
data: []
max_lenght: 12
max_length: 8

packing: sometimes
bad_rows: ignore
colour: blue
template: [chatml]
"""
    message = refusal(config, text)
    assert message.startswith(f"{tmp_path / 'config.yaml'} cannot be used:")
    problems = message.splitlines()[1:]
    expected = [
        "  line 2: `data` cannot be []: ",
        "  line 3: unknown setting `max_lenght`; did you mean `max_length`?",
        "  line 4: `max_length` cannot be 8: ",
        "  line 6: `packing` cannot be 'sometimes': ",
        "  line 7: `bad_rows` cannot be 'ignore': ",
        "  line 8: unknown setting `colour`; known are data, ",
        "  line 9: `template` cannot be ['chatml']: ",
        "  `pivot` is not set (--pivot): ",
    ]
    assert len(problems) == len(expected)
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, start


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("top_k: 0", "`top_k` cannot be 0: Input should be greater than or equal to 1"),
        ("top_k: ten", "`top_k` cannot be 'ten'"),
        ("top_k: 2.5", "`top_k` cannot be 2.5"),
        ("dtype: bf16", "`dtype` cannot be 'bf16': Input should be 'auto', 'bfloat16', 'float16' or 'float32'"),
        ("load_in: 2bit", "`load_in` cannot be '2bit': Input should be '8bit' or '4bit'"),
        ("batch_tokens: -1", "`batch_tokens` cannot be -1"),
        ("model: 7", "`model` cannot be 7"),
        ("modle: a", "unknown setting `modle`; did you mean `model`?"),
        ("data: {a: b}", "`data` cannot be {'a': 'b'}"),
        ("data: [a.json, 3]", "`data` cannot be"),
        ("1: 2", "`1`"),
    ],
)
def test_a_mistake_is_explained(config: Callable[..., Any], line: str, part: str) -> None:
    settings = {"data": "chats.jsonl", "pivot": "org/pivot", "model": "org/source", "output": "store"}
    kept = "".join(f"{key}: {value}\n" for key, value in settings.items() if not line.startswith(f"{key}:"))
    message = refusal(config, f"{kept}{line}\n", ExtractConfig)
    assert f"line {kept.count(chr(10)) + 1}: " in message
    assert part in message
    assert message.count("\n") == 1


def test_a_setting_written_twice_is_refused(config: Callable[..., Any]) -> None:
    message = refusal(config, f"{SOUND}max_length: 64\n\nmax_length: 128\n")
    assert "line 5" in message
    assert "`max_length`" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("data: [a.json\npivot: p\n", "is not YAML"),
        ("data: 'a.json\n", "is not YAML"),
        ("- data\n- pivot\n", "is not a mapping of settings but a list"),
        ("just words\n", "is not a mapping of settings but a str"),
        ("? [a, b]\n: c\n", "config.yaml"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(config: Callable[..., Any], text: str, part: str) -> None:
    assert part in refusal(config, text)


def test_an_empty_file_sets_nothing(config: Callable[..., Any]) -> None:
    for text in ("", "# nothing yet\n"):
        assert config(text, data=["a.json"], pivot="p") == PrepareConfig(data=["a.json"], pivot="p")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(UserError, match=f"cannot read the config `{path}`"):
            read_config(PrepareConfig, path, {})
    (tmp_path / "latin.yaml").write_bytes(b"data: \xfc.json\n")
    with pytest.raises(UserError, match=r"latin.yaml is not YAML"):
        read_config(PrepareConfig, tmp_path / "latin.yaml", {})


COMMANDS: dict[str, type[BaseModel]] = {"prepare": PrepareConfig, "extract": ExtractConfig, "import": ImportConfig}
COMMANDS |= {"align": AlignConfig, "train": TrainConfig}


@pytest.mark.parametrize(("command", "kind"), COMMANDS.items())
def test_every_setting_has_a_flag_with_its_help(command: str, kind: type[BaseModel]) -> None:
    result = CliRunner().invoke(main, [command, "--help"], terminal_width=1000)
    assert result.exit_code == 0
    shown = [" ".join(option.split()) for option in result.output.split("\n  --")]
    for name, field in kind.model_fields.items():
        (option,) = (option for option in shown if option.split()[0] == name.replace("_", "-"))
        assert " ".join(str(field.description).split()) in option
        if not field.is_required() and field.default not in (None, []):
            assert f"[default: {field.default}]" in option


# Settings of a training, with transformers' and peft's arguments in them


@pytest.mark.parametrize("kind", [TrainingArguments, LoraConfig], ids=lambda kind: kind.__name__)
def test_the_arguments_read_from_source_code_are_those_of_the_class(kind: Any) -> None:
    types, choices = declared(kind.__name__)
    fields = {field.name: field.type for field in dataclasses.fields(kind) if field.init}
    assert types.keys() == fields.keys()
    for name, type_ in fields.items():
        if type_ in (int, float, bool):
            assert types[name] == type_.__name__
    if kind is TrainingArguments:
        assert choices["SchedulerType"] == [one.value for one in SchedulerType]
        assert types["lr_scheduler_type"] == "SchedulerType | str"


TRAINING = "pivot: org/pivot\ntraining:\n  output_dir: target\n"


def test_numbers_that_yaml_takes_for_texts_are_numbers(config: Callable[..., Any]) -> None:
    """YAML 1.1 reads 5e-6 as a text; what is to be a text stays one."""
    text = f"{TRAINING}  learning_rate: 5e-6\n  weight_decay: 1e-1\n  run_name: 5e-6\n  max_grad_norm: 1\n"
    settings = config(f"{text}lora:\n  lora_dropout: 1e-2\n  r: 4\n", TrainConfig)
    assert settings.training == {
        "output_dir": "target",
        "learning_rate": 5e-6,
        "weight_decay": 0.1,
        "run_name": "5e-6",
        "max_grad_norm": 1,
    }
    assert settings.lora == {"lora_dropout": 0.01, "r": 4}
    assert read_config(TrainConfig, None, {"pivot": "p", "training": {"learning_rate": "1e-5"}}).training == {
        "learning_rate": 1e-5
    }


def test_the_papers_settings_are_the_defaults(config: Callable[..., Any]) -> None:
    settings = config(TRAINING, TrainConfig)
    rule = (settings.fusion, settings.compare, settings.unit, settings.temperature, settings.tail)
    assert rule == ("min_ce", "conversation", "byte", 1.0, "renormalise")  # the papers compare per token
    assert (settings.clm_weight, settings.clm_weight_schedule, settings.held_out) == (0.9, "constant", 0.0)
    assert (settings.packing, settings.lora, settings.load_in, settings.dtype) == (False, None, None, "float32")
    assert settings.output_dtype == "float32"  # ours: bfloat16 rounds a light fine-tune away
    assert config(f"{TRAINING}aligned_stores: aligned/a\n", TrainConfig).aligned_stores == [Path("aligned/a")]


def test_every_mistake_of_a_training_is_told_at_once_with_its_line(
    config: Callable[..., Any], tmp_path: Path
) -> None:
    text = """\
pivot: org/pivot
clm_wieght: 0.5
temperature: 0
held_out: 1
training:
  output_dir: target
  learning_rat: 5e-6

  per_device_batch: 4
  lr_scheduler_type: cosine
lora:
  r: 8
  alpha: 16
fusion: max_ce
"""
    message = refusal(config, text, TrainConfig)
    assert message.startswith(f"{tmp_path / 'config.yaml'} cannot be used:")
    problems = message.splitlines()[1:]
    expected = [
        "  line 2: unknown setting `clm_wieght`; did you mean `clm_weight`?",
        "  line 3: `temperature` cannot be 0: ",
        "  line 4: `held_out` cannot be 1: ",
        "  line 7: `training`: TrainingArguments has no `learning_rat`; did you mean `learning_rate`?",
        "  line 9: `training`: TrainingArguments has no `per_device_batch`",
        "  line 13: `lora`: LoraConfig has no `alpha`",
        "  line 14: `fusion` cannot be 'max_ce': ",
    ]
    assert len(problems) == len(expected)
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, start


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("layer_replication: [[0, 1], [0, 1]]", "a target has the pivot's layers"),
        ("alora_invocation_tokens: [5]", "adapters that depend on the text cannot be merged into a target"),
        ("inference_mode: true", "it trains nothing"),
    ],
)
def test_adapters_that_give_no_target_are_refused(line: str, what: str, config: Callable[..., Any]) -> None:
    message = refusal(config, f"{TRAINING}lora:\n  {line}\n", TrainConfig)
    assert f"`lora`: `{line.partition(':')[0]}` cannot be" in message
    assert message.endswith(what)


def test_a_training_must_be_set(config: Callable[..., Any]) -> None:
    message = refusal(config, "pivot: org/pivot\n", TrainConfig)
    assert "`training` is not set (--training): Arguments of transformers' TrainingArguments" in message
    assert "`training` cannot be 'fast'" in refusal(config, "pivot: p\ntraining: fast\n", TrainConfig)


def test_flags_change_single_arguments_of_a_training(config: Callable[..., Any]) -> None:
    settings = config(f"{TRAINING}  seed: 3\n", TrainConfig, training={"seed": 4, "max_steps": 2})
    assert settings.training == {"output_dir": "target", "seed": 4, "max_steps": 2}
    message = refusal(config, f"{TRAINING}  sed: 3\n", TrainConfig, training={"max_step": 2})
    assert "line 4: `training`: TrainingArguments has no `sed`; did you mean `seed`?" in message
    assert "\n  `training`: TrainingArguments has no `max_step`; did you mean `max_steps`?" in message


def test_an_argument_given_as_a_flag_is_read_as_yaml(tmp_path: Path) -> None:
    arguments = ["train", "--pivot", "nowhere/at/all", "--clm-weight", "1"]
    output = ["--training", f"output_dir={tmp_path}"]
    wrong = CliRunner().invoke(main, [*arguments, *output, "--training", "seed"])
    assert (wrong.exit_code, "'seed' is not NAME=VALUE" in wrong.output) == (2, True), wrong.output
    wrong = CliRunner().invoke(main, [*arguments, *output, "--training", "learning_rate=fast"])
    assert wrong.exit_code == 1
    assert isinstance(wrong.exception, SystemExit), wrong.exception
    wrong = CliRunner().invoke(main, [*arguments, *output, "--training", "bf16=false"])
    assert "no model folder `nowhere/at/all`" in wrong.output


# fusion-trainer prepare


@pytest.fixture(scope="module")
def pivot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pivot")
    shared("sentencepiece_bpe").save_pretrained(folder)
    return folder


def chat(question: str, answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FINE = [chat(f"What is {n} + 1?", f"It is {n + 1}. 🙂") for n in range(20)]
BAD = [chat("Hi.", ""), chat("Hi.", 7), {"question": "Hi."}, 12]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(data: Path, pivot: Path, *flags: str, template: str | None = "chatml") -> Result:
    chosen = ["--template", template] if template else []
    arguments = ["prepare", "--data", str(data), "--pivot", str(pivot), *chosen, *flags]
    return CliRunner().invoke(main, arguments)


def check_refused(result: Result, folder: Path, *parts: str) -> None:
    """An error message, exit code 1, no traceback, and of the folder no trace."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Error: " in result.output
    for part in parts:
        assert part in result.output
    assert not list(folder.parent.glob(f"{folder.name}*"))


def test_prepare_writes_the_dialogues_and_reports(tmp_path: Path, pivot: Path) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", FINE), tmp_path / "dialogues"
    result = prepare(data, pivot, "--dialogues", str(folder))
    assert result.exit_code == 0, result.output
    dialogues = Dialogues(folder)
    assert len(dialogues) == 20
    assert dialogues[3].text == (
        "<|im_start|>user\nWhat is 3 + 1?<|im_end|>\n<|im_start|>assistant\nIt is 4. 🙂<|im_end|>\n"
    )
    assert f"20 blocks in {folder}" in result.output
    for line in ("conversations", "turns", "tokens", "supervised tokens", "answers cut", "length of a block"):
        assert line in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl", "dialogues"}


def test_preparing_again_gives_the_same_and_writes_nothing(tmp_path: Path, pivot: Path) -> None:
    data = jsonl(tmp_path / "chats.jsonl", FINE)
    for name in "ab":
        assert prepare(data, pivot, "--dialogues", str(tmp_path / name)).exit_code == 0
    files = ("blocks.arrow", "manifest.json")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    before = [(tmp_path / "a" / name).stat().st_mtime_ns for name in files]
    assert prepare(data, pivot, "--dialogues", str(tmp_path / "a")).exit_code == 0
    assert [(tmp_path / "a" / name).stat().st_mtime_ns for name in files] == before


@pytest.mark.parametrize(
    ("flags", "wanted", "found"),
    [
        (["--max-length", "512"], "512", "2048"),
        (["--no-packing"], "False", "True"),
        (["--bad-rows", "skip"], "skip", "error"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_side_by_side(
    flags: list[str], wanted: str, found: str, tmp_path: Path, pivot: Path
) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", FINE), tmp_path / "dialogues"
    assert prepare(data, pivot, "--dialogues", str(folder)).exit_code == 0
    before = (folder / "manifest.json").read_bytes()
    result = prepare(data, pivot, "--dialogues", str(folder), *flags)
    assert result.exit_code == 1
    (line,) = (line for line in result.output.splitlines() if line.split()[1:] == [wanted, found])
    assert line.split()[0].replace("_", "-") in "".join(flags)
    assert "Give another --dialogues folder, or remove that one." in result.output
    assert (folder / "manifest.json").read_bytes() == before


def test_other_data_template_or_tokenizer_in_the_same_folder_is_refused(tmp_path: Path, pivot: Path) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", FINE), tmp_path / "dialogues"
    assert prepare(data, pivot, "--dialogues", str(folder)).exit_code == 0
    shared("unigram").save_pretrained(tmp_path / "other pivot")
    changed = jsonl(tmp_path / "changed.jsonl", FINE[1:])
    for other, key in [
        (prepare(changed, pivot, "--dialogues", str(folder)), "data"),
        (prepare(data, pivot, "--dialogues", str(folder), template="zephyr"), "template"),
        (prepare(data, tmp_path / "other pivot", "--dialogues", str(folder)), "tokenizer"),
    ]:
        assert other.exit_code == 1
        assert f"\n  {key} " in other.output


def test_blocks_fit_the_tokenizers_of_other_models_which_are_part_of_the_request(
    tmp_path: Path, pivot: Path
) -> None:
    data = jsonl(tmp_path / "chats.jsonl", [chat("Who sleeps?", "the lazy dog " * 40)])
    shared("unigram").save_pretrained(tmp_path / "other")
    folder, flags = tmp_path / "dialogues", ["--max-length", "256", "--fit-tokenizers", str(tmp_path / "other")]
    assert prepare(data, pivot, "--dialogues", str(folder), *flags).exit_code == 0
    (block,) = Dialogues(folder)
    longest = len(shared("unigram")(block.text).input_ids)
    assert block.tokens < 220 < longest <= 256
    without = prepare(data, pivot, "--dialogues", str(folder), *flags[:2])
    assert without.exit_code == 1
    assert "\n  fit_tokenizers " in without.output
    missing = prepare(data, pivot, "--fit-tokenizers", "./nowhere@main", "--dialogues", str(tmp_path / "none"))
    check_refused(missing, tmp_path / "none", "./nowhere")


def test_without_a_folder_named_each_request_gets_its_own(
    tmp_path: Path, pivot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = jsonl(tmp_path / "chats.jsonl", FINE)
    for flags in ([], ["--max-length", "64"], ["--max-length", "64"]):
        assert prepare(data, pivot, *flags).exit_code == 0
    assert len(list(tmp_path.glob("dialogues-*"))) == 2


def test_settings_may_come_from_a_file_and_a_flag_wins(tmp_path: Path, pivot: Path) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", FINE), tmp_path / "dialogues"
    config = tmp_path / "prepare.yaml"
    config.write_text(f"data: {data}\npivot: {pivot}\ntemplate: zephyr\nmax_length: 100\ndialogues: {folder}\n")
    result = CliRunner().invoke(main, ["prepare", str(config), "--max-length", "99"])
    assert result.exit_code == 0, result.output
    assert Dialogues(folder).manifest["request"]["max_length"] == 99
    assert Dialogues(folder)[0].text.startswith("<|user|>\n")


def test_bad_rows_are_all_named_and_no_folder_is_left(tmp_path: Path, pivot: Path) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", [*FINE, *BAD]), tmp_path / "dialogues"
    result = prepare(data, pivot, "--dialogues", str(folder))
    check_refused(
        result, folder, "the data has 4 bad rows", *(f"chats.jsonl, line {n}: " for n in (21, 22, 23, 24))
    )


def test_bad_rows_may_be_skipped_and_are_counted(tmp_path: Path, pivot: Path) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", [*BAD, *FINE]), tmp_path / "dialogues"
    result = prepare(data, pivot, "--dialogues", str(folder), "--bad-rows", "skip")
    assert result.exit_code == 0, result.output
    report = Dialogues(folder).manifest["report"]
    assert report["dropped"] == {"not a usable row": 4}
    assert (report["conversations"], report["kept"]) == (24, 20)
    assert "not a usable row" in result.output


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("chats.jsonl", b'{"messages": [}\n', ["chats.jsonl, line 1: not JSON"]),
        ("chats.json", b'[{"messages": }]', ["chats.json is not JSON"]),
        ("chats.jsonl", b"", ["the data is empty"]),
        ("chats.json", b"[]", ["the data is empty"]),
        ("chats.parquet", b"PAR1 is not enough", ["cannot read the file", "chats.parquet"]),
        ("chats.jsonl", b'{"prompt": "Hi.", "completion": "\\ud83d"}\n', ["chats.jsonl, line 1: "]),
        ("chats.jsonl", b"\xff\xfe\x00", ["chats.jsonl, line 1: not JSON"]),
        ("chats.jsonl", b'{"messages": ' + b"[" * 100_000, ["chats.jsonl, line 1: not JSON"]),
    ],
    ids=["line", "array", "empty", "empty array", "parquet", "surrogate", "not UTF-8", "nested"],
)
def test_a_broken_file_is_an_error_message(
    name: str, content: bytes, parts: list[str], tmp_path: Path, pivot: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    folder = tmp_path / "dialogues"
    check_refused(prepare(tmp_path / name, pivot, "--dialogues", str(folder)), folder, *parts)


def test_a_template_that_raises_names_the_rows(tmp_path: Path, pivot: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{% if '7' in m.content %}{{ raise_exception('no sevens') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    data, folder = jsonl(tmp_path / "chats.jsonl", FINE), tmp_path / "dialogues"
    result = prepare(data, pivot, "--dialogues", str(folder), template=str(template))
    rows = [f"chats.jsonl, line {n}: the template mine.jinja refuses it: no sevens" for n in (7, 8, 17, 18)]
    check_refused(result, folder, "4 conversations cannot be rendered", *rows)
    result = prepare(data, pivot, "--dialogues", str(folder), "--bad-rows", "skip", template=str(template))
    assert result.exit_code == 0, result.output
    assert Dialogues(folder).manifest["report"]["dropped"] == {"the template refuses it": 4}


def test_a_pivot_without_a_template_asks_for_one_unless_the_data_is_plain_text(
    tmp_path: Path, pivot: Path
) -> None:
    folder = tmp_path / "dialogues"
    chats = jsonl(tmp_path / "chats.jsonl", FINE)
    result = prepare(chats, pivot, "--dialogues", str(folder), template=None)
    check_refused(result, folder, "has no chat template; choose one with --template: openchat, chatml")
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": f"Document {n}."} for n in range(9)])
    result = prepare(texts, pivot, "--dialogues", str(folder), template=None)
    assert result.exit_code == 0, result.output
    assert Dialogues(folder)[0].text.startswith("Document 0.\n\nDocument 1.")


@pytest.mark.parametrize("broken", ["pivot", "data", "template"])
def test_what_is_not_there_is_an_error_message(broken: str, tmp_path: Path, pivot: Path) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", FINE), tmp_path / "dialogues"
    result = prepare(
        tmp_path / "nothing.jsonl" if broken == "data" else data,
        tmp_path / "nothing" if broken == "pivot" else pivot,
        "--dialogues",
        str(folder),
        template="nothing" if broken == "template" else "chatml",
    )
    check_refused(result, folder, "nothing")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, pivot: Path) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", FINE), tmp_path / "work"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of it")
    result = prepare(data, pivot, "--dialogues", str(folder))
    assert result.exit_code == 1
    assert f"`{folder}` holds no dialogues" in result.output
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_installed_program_ends_with_code_1_and_no_traceback(tmp_path: Path, pivot: Path) -> None:
    data, folder = jsonl(tmp_path / "chats.jsonl", [*FINE, *BAD]), tmp_path / "dialogues"
    command = [sys.executable, "-m", "fusion_trainer", "prepare", "--data", str(data), "--pivot", str(pivot)]
    done = subprocess.run(
        [*command, "--template", "chatml", "--dialogues", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "Error: the data has 4 bad rows:" in done.stderr
    assert "chats.jsonl, line 24: the row is a int, not an object" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


HEAVY = ("torch", "transformers", "datasets", "peft", "mergekit", "numpy", "pyarrow")


def imported(*arguments: str) -> set[str]:
    """The modules that a command of the program imports."""
    command = [sys.executable, "-X", "importtime", "-m", "fusion_trainer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.slow
def test_help_and_a_dry_run_import_no_large_library(tmp_path: Path) -> None:
    assert not imported("--help") & {*HEAVY, "pydantic", "yaml"}
    assert not imported("train", "--help") & {*HEAVY}
    pipeline = {"work": str(tmp_path), "pivot": "a/b", "data": "a/c", "sources": [{"model": "a/d"}], "merges": {}}
    pipeline["train"] = {"training": {"learning_rate": 1e-5}}
    (tmp_path / "pipeline.yaml").write_text(json.dumps(pipeline))
    modules = imported("run", str(tmp_path / "pipeline.yaml"), "--dry-run")
    assert "fusion_trainer.pipeline.runner" in modules
    assert not modules & {*HEAVY}


def test_a_setting_that_is_one_of_some_words_or_nothing_offers_the_words() -> None:
    help_text = CliRunner().invoke(main, ["extract", "--help"]).output
    assert "--load-in [8bit|4bit]" in help_text
    result = CliRunner().invoke(main, ["extract", "--load-in", "3bit"])
    assert result.exit_code == 2
    assert "'3bit' is not one of '8bit', '4bit'" in result.output
