"""The demo: its questions and answers, its tokenizers, its pipeline, its tables."""

import random
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusion_trainer.data.conversations import Message
from fusion_trainer.data.templates import Template
from fusion_trainer.pipeline.plan import read_pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "small_world")]

import demo  # noqa: E402
import world  # noqa: E402

UNITS = {"m cm": 2, "km m": 3, "kg g": 3, "cm mm": 1, "decades years": 1, "centuries years": 2}
"""Zeros to append."""


def answer(skill: str, question: str) -> str | None:
    """What is right, found another way than the generator's."""
    words = question.split()
    match skill:
        case "sort":
            return " ".join(letter for letter in "abcdefgh" for word in words[1:] if word == letter)
        case "reverse":
            return " ".join(words[:0:-1])
        case "twice":
            return " ".join(words[1:] * 2)
        case "add":
            return str(int(words[1]) + int(words[3]))
        case "units":
            number, unit, _, other = words
            return f"{number}{'0' * UNITS[f'{unit} {other}']} {other}"
        case "dates":
            return datetime.strptime(" ".join(words[:3]), "%d %B %Y").date().isoformat()
    return None


@pytest.mark.parametrize("skill", world.SKILLS)
def test_every_answer_is_right(skill: str) -> None:
    for question, given in islice(world.questions(skill, random.Random(1), held_out=False), 300):
        assert skill == "facts" or given == answer(skill, question), question


def test_a_fact_is_the_same_in_every_wording_and_every_world() -> None:
    known: dict[tuple[str, str], set[str]] = {}
    for seed in range(3):
        for question, given in islice(world.questions("facts", random.Random(seed), held_out=False), 2000):
            (person,) = [one for one in world.PEOPLE if one in question.split()]
            (what,) = [one for one in world.ABOUT if one in question.split()]
            known.setdefault((person, what), set()).add(given)
    assert len(known) == len(world.PEOPLE) * len(world.ABOUT)
    assert all(len(answers) == 1 for answers in known.values())


def test_what_is_held_out_is_asked_nowhere_else() -> None:
    rows = world.held_out(100, random.Random("held out"))
    held_out = {question for _, ((question, _),) in rows}
    assert len(held_out) == len(rows)
    assert {skill for skill, _ in rows} == set(world.SKILLS)
    mixture = dict.fromkeys(world.SKILLS, 1.0)
    asked = {q for _, chat in world.chats(mixture, 5000, random.Random(2)) for q, _ in chat}
    assert len(asked) > 3000
    assert not asked & held_out


def test_a_quarter_of_the_answers_is_replaced_by_others_of_the_skill() -> None:
    right = world.chats(dict.fromkeys(world.SKILLS, 1.0), 4000, random.Random(3))
    wrong = world.spoiled(right, 0.25, random.Random(4))
    pairs = [
        (skill, one, other)
        for (skill, chat), (same, spoiled) in zip(right, wrong, strict=True)
        for one, other in zip(chat, spoiled, strict=True)
        if skill == same
    ]
    assert len(pairs) == 8000
    assert all(one[0] == other[0] for _, one, other in pairs)
    changed = [other[1] for _, one, other in pairs if one != other]
    assert 0.2 < len(changed) / len(pairs) < 0.26  # some are drawn that are right
    assert world.spoiled(right, 0.0, random.Random(4)) == right


# Tokenizers and models


def tokenizers() -> Iterator[tuple[str, PreTrainedTokenizerFast]]:
    rng = random.Random(5)
    seen = [
        "".join(t for t, _ in world.rendered(c))
        for _, c in world.chats(dict.fromkeys(world.SKILLS, 1.0), 1500, rng)
    ]
    for kind, size in ((world.pieces, 320), (world.byte_level, 400), (world.halves, 300)):
        special = {} if kind is world.byte_level else {"bos_token": "<s>", "unk_token": "<unk>"}
        fast = PreTrainedTokenizerFast(tokenizer_object=kind(seen, size), eos_token="</s>", **special)
        yield kind.__name__, fast


def test_texts_are_those_of_the_template_and_what_is_learned_is_the_answers() -> None:
    chats = world.chats(dict.fromkeys(world.SKILLS, 1.0), 60, random.Random(6))
    segmented = set()
    for name, tokenizer in tokenizers():
        template = Template("chat.jinja", world.TEMPLATE.read_text(), tokenizer)
        for _, chat in chats:
            messages = [
                Message(role, text)
                for pair in chat
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            rendered = template.render(messages)
            parts = world.rendered(chat)
            assert rendered.text == "".join(text for text, _ in parts)
            (ids, labels), *_ = world.encoded(tokenizer, [chat])
            assert ids == tokenizer(rendered.text)["input_ids"], name
            learned = tokenizer.decode([token for token in labels if token >= 0])
            assert learned.replace(" ", "") == "".join(f"{a}</s>" for _, a in chat).replace(" ", "")
            spans = [rendered.text.encode()[start:stop].decode() for start, stop in rendered.spans]
            assert spans == [f"{a}</s>" for _, a in chat]
        segmented.add(tuple(tokenizer.tokenize("Q: reverse a b\nA: b a</s>\nQ: decades")))
    assert len(segmented) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", world.MODELS)
def test_a_model_of_the_world_is_a_checkpoint_that_reads_its_own_tokens(name: str, tmp_path: Path) -> None:
    told = world.make_model(name, tmp_path / name, 2, 0)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name),
        AutoTokenizer.from_pretrained(tmp_path / name),
    )
    assert f"{type(model).__name__}, " in told
    text = "Q: reverse a b\nA: b a</s>\n"
    assert tokenizer(text)["input_ids"] == world.encoded(tokenizer, [[("reverse a b", "b a")]])[0][0]
    assert model(**tokenizer(text, return_tensors="pt")).logits.shape[-1] == len(tokenizer)


# The pipeline and the tables


def test_the_pipeline_is_sound_and_all_that_the_tables_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    settings = yaml.safe_load(
        demo.PIPELINE.read_text().replace("./demo_out", "demo_out").replace("demo_out", str(tmp_path))
    )
    for folder in (settings["pivot"], *(source["model"] for source in settings["sources"])):
        Path(folder).mkdir(parents=True)
    for name in ("chats", "held_out"):
        (tmp_path / "world" / f"{name}.jsonl").touch()
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("fusion_trainer.pipeline.merges.output_of", tiny_pipeline.check_in_process)
    _, stages = read_pipeline(tmp_path / "pipeline.yaml")
    scored = {stage.name for stage in stages if stage.kind == "evaluate"}
    assert scored == {*demo.TABLE_1, *demo.TABLE_2}
    assert {len(stage.needs) for stage in stages if stage.kind == "merge"} == {3}


def scores(shift: float) -> dict[str, Any]:
    """Made up: each model's answers are right so often as its place among the models tells."""
    names = [*demo.TABLE_1, *demo.TABLE_2]
    return {
        model: {
            skill: {
                "exact_match": (number + (skill == "sort") * 2 + shift) / 100,
                "nats_per_byte": number / 10,
                "rows": 7,
            }
            for skill in ("all", "add", "sort")
        }
        for number, model in enumerate(dict.fromkeys(names))
    }


def test_the_tables_are_means_over_skills_and_spreads_over_worlds(tmp_path: Path) -> None:
    found = {"": [scores(0.0), scores(1.0), scores(2.0)], "λ = 0.9": [scores(0.0), scores(1.0), scores(2.0)]}
    table = demo.table(found[""], demo.TABLE_1, "exact_match").splitlines()
    assert table[0] == "|  | add | sort | average |"
    assert table[2] == "| pivot (Llama) | 1.0 ± 1.0 | 3.0 ± 1.0 | 2.0 ± 1.0 |"
    assert table[-1].startswith("| VaRM | 16.0 ± 1.0 | 18.0 ± 1.0 | 17.0 ± 1.0 |")
    assert (
        demo.table([scores(0.0)], demo.TABLE_1, "exact_match").splitlines()[2]
        == "| pivot (Llama) | 0.0 | 2.0 | 1.0 |"
    )
    assert "| VaRM − CLM | 11.0 ± 0.0 | 1.100 ± 0.000 |" in demo.differences(found[""])  # place 15 less place 4
    row = next(line for line in demo.variants(found).splitlines() if line.startswith("| λ = 0.9"))
    assert [float(cell) for cell in re.findall(r"([\d.]+) ±", row)] == [6.0, 9.0, 7.0, 11.0, 17.0]
    demo.draw(tmp_path / "scores.png", found[""])
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
