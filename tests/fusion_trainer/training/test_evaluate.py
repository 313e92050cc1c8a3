"""``fusion-trainer evaluate`` against the whole forward pass in float64, row by row, and against ``generate``."""

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sources
import tiny_tokenizers
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny_sources import END_OF_TURN, WORDS
from tokenizer_zoo import Kind
from transformers import AutoModelForCausalLM

import fusion_trainer.training.evaluate as evaluation
from fusion_trainer.cli import main
from fusion_trainer.config import EvaluateConfig, PrepareConfig
from fusion_trainer.data.prepare import prepare
from fusion_trainer.training.evaluate import evaluate
from varm_common.errors import UserError
from varm_common.standard_errors import difference, standard_error

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 1}
MODELS: dict[str, tuple[str, Kind, dict[str, Any]]] = {
    "pivot": ("llama", Kind("pivot", tiny_tokenizers.shared("sentencepiece_bpe"), before="pieces"), GROUPED),
    "bytes": ("gpt_neox", Kind("bytes", tiny_tokenizers.shared("byte_level_bpe", (END_OF_TURN,))), SMALL),
    "unigram": (
        "gemma2",
        Kind("unigram", tiny_tokenizers.shared("unigram"), before="first", unless_there=True),
        {**GROUPED, "head_dim": 8},
    ),
}
"""Architecture, tokenizer, settings: BOS or none, rows beyond the vocabulary, capped logits."""
NAMES = ["sorting/1", "dates/a/b", "sorting/2", "alone", "dates/3", "sorting/10", "sums/1", "x"]
CHATS = tiny_sources.made_up_chats(len(NAMES), seed=11, words=12, turns=2)


@dataclass(frozen=True)
class World:
    """Folders ``<model>`` and ``held_out``; for reading only."""

    folder: Path

    def config(self, model: str, output: Path, **changed: Any) -> EvaluateConfig:
        paths = {"model": str(self.folder / model), "dialogues": self.folder / "held_out", "output": output}
        return EvaluateConfig(**{**paths, **changed})


def write_chats(path: Path, chats: Sequence[Sequence[tuple[str, str]]], names: Sequence[str]) -> Path:
    tiny_sources.write_sharegpt(path, chats)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**r, "id": n}) + "\n" for r, n in zip(rows, names, strict=True)))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    for number, (name, (layout, kind, settings)) in enumerate(MODELS.items()):
        kind.tokenizer.save_pretrained(folder / name)
        rows = len(kind.tokenizer) + 7 * number
        tiny_sources.new_source(layout, rows, seed=number, **settings).save_pretrained(folder / name)
    learn_by_heart(folder / "pivot", CHATS[:5])
    data = write_chats(folder / "held_out.jsonl", CHATS, NAMES)
    common = {"data": [str(data)], "pivot": str(folder / "pivot"), "template": "openchat"}
    prepare(PrepareConfig(**common, dialogues=folder / "held_out"), folder, quiet=True)
    return World(folder)


def learn_by_heart(folder: Path, chats: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Train until most answers of these chats are what the model would say."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    rows = [torch.tensor([read("pivot", chat).ids]) for chat in chats]
    for step in range(220):
        ids = rows[step % len(rows)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Read:
    """A chat as a model reads it: its ids, and of every answer where it begins, where it ends, and its bytes."""

    ids: list[int]
    answers: list[tuple[int, int]]
    bytes: int


def read(model: str, chat: Sequence[tuple[str, str]]) -> Read:
    """From the truth about the tokenizer, not from the product's reading of it."""
    kind = MODELS[model][1]
    text, spans = tiny_sources.openchat(chat)
    (tokens,) = kind.reader.encode([text])
    ends = kind.truth(tokens, text)
    answers = []
    for start, stop in spans:
        inside = [place for place, end in enumerate(ends) if start < end <= stop]
        answers.append((inside[0], inside[-1] + 1))
    return Read(tokens.ids.tolist(), answers, sum(stop - start for start, stop in spans))


def oracle(folder: Path, model: str) -> dict[str, dict[str, float]]:
    """Sums of each group from one forward pass per chat in float64."""
    network = AutoModelForCausalLM.from_pretrained(folder / model).double()
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, chat in zip(NAMES, CHATS, strict=True):
        row = read(model, chat)
        with torch.no_grad():
            logprobs_LV = network(torch.tensor([row.ids])).logits[0].log_softmax(1)
        places = [place for start, stop in row.answers for place in range(start, stop)]
        golds = [row.ids[place] for place in places]
        before = logprobs_LV[[place - 1 for place in places]]
        nats = -float(before[range(len(golds)), golds].sum())
        matched = before.argmax(1).tolist() == golds
        for group in {"all", name.split("/")[0] if "/" in name else "all"}:
            for key, value in (
                ("rows", 1),
                ("tokens", len(golds)),
                ("bytes", row.bytes),
                ("nats", nats),
                ("matched", matched),
            ):
                sums[group][key] += value
    return sums


@pytest.mark.parametrize("batch_tokens", [1, 16384])
@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_a_whole_forward_pass_in_float64(
    model: str, batch_tokens: int, world: World, tmp_path: Path
) -> None:
    wanted = oracle(world.folder, model)
    found = evaluate(world.config(model, tmp_path / "scores.json", batch_tokens=batch_tokens))["groups"]
    assert [*found] == ["all", "dates", "sorting", "sums"]
    for group, sums in wanted.items():
        for key in ("rows", "tokens", "bytes", "matched"):
            assert found[group][key] == sums[key], (group, key)
        assert found[group]["nats"] == pytest.approx(sums["nats"], rel=1e-5)
        assert found[group]["nats_per_byte"] == pytest.approx(sums["nats"] / sums["bytes"], rel=1e-5)
        assert found[group]["exact_match"] == sums["matched"] / sums["rows"]
        assert found[group]["cut_tokens"] == 0
    if model == "pivot":
        assert 0 < found["all"]["matched"] < len(NAMES)


def test_a_row_is_matched_when_greedy_decoding_gives_its_answers_token_by_token(
    world: World, tmp_path: Path
) -> None:
    network = AutoModelForCausalLM.from_pretrained(world.folder / "pivot")
    network.generation_config.eos_token_id = None
    greedy = []
    for chat in CHATS:
        row = read("pivot", chat)
        answers = []
        for start, stop in row.answers:
            head = torch.tensor([row.ids[:start]])
            more = {"max_new_tokens": stop - start, "do_sample": False, "pad_token_id": 0}
            written = network.generate(head, attention_mask=torch.ones_like(head), **more)[0]
            answers.append(written.tolist() == row.ids[:stop])
        greedy.append(all(answers))
    assert 0 < sum(greedy) < len(NAMES)
    found = evaluate(world.config("pivot", tmp_path / "scores.json"))["groups"]
    assert found["all"]["matched"] == sum(greedy)
    for group in ("sorting", "dates"):
        wanted = sum(one for one, name in zip(greedy, NAMES, strict=True) if name.startswith(f"{group}/"))
        assert found[group]["matched"] == wanted


def test_logits_are_made_a_chunk_at_a_time(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(world.config("pivot", tmp_path / "whole.json"))["groups"]
    monkeypatch.setattr(evaluation, "positions_at_a_time", lambda *_: 5)
    heads: list[int] = []
    head = evaluation.SplitModel.head
    monkeypatch.setattr(evaluation.SplitModel, "head", lambda *given: heads.append(len(given[1])) or head(*given))
    parts = evaluate(world.config("pivot", tmp_path / "parts.json"))["groups"]
    assert max(heads[1:]) <= 5  # the first is the trial
    assert parts["all"]["nats"] == pytest.approx(whole["all"]["nats"], rel=1e-6)
    assert parts["all"]["matched"] == whole["all"]["matched"]


def test_what_lies_beyond_the_context_is_counted_and_not_scored(world: World, tmp_path: Path) -> None:
    """Of a model that cannot read on: MPT's distances are made for so many tokens."""
    folder = tmp_path / "short"
    kind = MODELS["bytes"][1]
    kind.tokenizer.save_pretrained(folder)
    limit = 60
    short = tiny_sources.new_source("mpt", len(kind.tokenizer), max_seq_len=limit, n_layers=1)
    short.save_pretrained(folder)
    found = evaluate(world.config(str(folder), tmp_path / "scores.json"))["groups"]["all"]
    network = AutoModelForCausalLM.from_pretrained(folder).double()
    tokens = cut = nats = size = 0.0
    for chat in CHATS:
        row = read("bytes", chat)
        ids = row.ids[:limit]
        with torch.no_grad():
            logprobs_LV = network(torch.tensor([ids])).logits[0].log_softmax(1)
        places = [place for start, stop in row.answers for place in range(start, stop)]
        kept = [place for place in places if place < limit]
        nats -= float(sum(logprobs_LV[place - 1, ids[place]] for place in kept))
        tokens, cut = tokens + len(kept), cut + len(places) - len(kept)
        text = kind.surfaces
        size += row.bytes if kept == places else sum(len(text[row.ids[place]]) for place in kept)
    assert 0 < cut < tokens
    assert (found["tokens"], found["cut_tokens"], found["rows"]) == (tokens, cut, len(CHATS))
    assert found["bytes"] == size
    assert found["nats"] == pytest.approx(nats, rel=1e-5)


@pytest.mark.slow
def test_a_row_that_is_cut_is_not_matched(tmp_path: Path) -> None:
    """Even when all that was read of it is."""
    kind = MODELS["pivot"][1]
    folder = tmp_path / "short"
    kind.tokenizer.save_pretrained(folder)
    chats = [[("a", " ".join(WORDS[:6]))]]
    ids = read("pivot", chats[0]).ids
    for name, limit in (("long", 512), ("short", len(ids) - 2)):
        model = tiny_sources.new_source("llama", len(kind.tokenizer), **GROUPED, max_position_embeddings=limit)
        model.save_pretrained(folder)
        learn_by_heart(folder, chats)
        data = write_chats(tmp_path / "chats.jsonl", chats, ["only"])
        common = {"data": [str(data)], "pivot": str(folder), "template": "openchat"}
        prepare(PrepareConfig(**common, dialogues=tmp_path / "one"), tmp_path, quiet=True)
        config = EvaluateConfig(model=str(folder), dialogues=tmp_path / "one", output=tmp_path / f"{name}.json")
        found = evaluate(config)["groups"]["all"]
        assert (found["matched"], found["cut_tokens"]) == ((1, 0) if name == "long" else (0, 2))


# The program


def program(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def flags(world: World, model: str, output: Path) -> list[object]:
    paths = {"--model": world.folder / model, "--dialogues": world.folder / "held_out", "--output": output}
    return [part for pair in paths.items() for part in pair]


def test_the_program_prints_a_line_per_group_and_does_not_score_twice(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "deep" / "scores.json"
    result = program(*flags(world, "bytes", output))
    assert result.exit_code == 0
    groups = json.loads(output.read_text())["groups"]
    for name, of in groups.items():
        error = "" if of["nats_per_byte_error"] is None else f" ± {of['nats_per_byte_error']:.4f}"
        line = f"{name:24} {of['rows']:>7,} rows  {of['nats_per_byte']:.4f}{error} nats/byte  0.0% matched"
        assert line in result.stdout.splitlines()
    before = output.stat().st_mtime_ns
    monkeypatch.setattr(evaluation.models, "load_causal_lm", None)
    assert program(*flags(world, "bytes", output)).stdout == result.stdout
    assert output.stat().st_mtime_ns == before


def test_several_models_are_scored_by_one_run_as_each_by_its_own(world: World, tmp_path: Path) -> None:
    """One result per model, in the order of the flags; ``--json`` prints a list."""
    names = ("pivot", "bytes")
    own = [program(*flags(world, name, tmp_path / f"{name}-alone.json")).stdout for name in names]
    together = [flag for name in names for flag in flags(world, name, tmp_path / f"{name}.json")]
    result = program(*together)
    titles = [f"{world.folder / name}:\n" for name in names]
    assert result.stdout == "".join(title + lines for title, lines in zip(titles, own, strict=True))
    for name in names:
        assert (tmp_path / f"{name}.json").read_bytes() == (tmp_path / f"{name}-alone.json").read_bytes()
    printed = json.loads(program(*together, "--json").stdout)
    assert printed == [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]


def test_a_model_that_cannot_be_scored_leaves_the_others_scored(world: World, tmp_path: Path) -> None:
    broken(world, tmp_path / "broken", float("nan"))
    models = (tmp_path / "nowhere", tmp_path / "broken", world.folder / "bytes")
    outputs = [tmp_path / f"{number}.json" for number in range(3)]
    paired = [
        flag for model, output in zip(models, outputs, strict=True) for flag in flags(world, str(model), output)
    ]
    result = program(*paired)
    assert result.exit_code == 1
    assert f"no model folder `{models[0]}`" in result.stderr
    assert f"the loss of `{models[1]}` is not finite" in result.stderr
    assert [output.exists() for output in outputs] == [False, False, True]
    result = program(*paired[:-2])
    assert "3 models and 2 outputs: give one --output for each --model" in result.stderr


def test_scores_of_something_else_are_left_alone(world: World, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    evaluate(world.config("bytes", output))
    before = output.read_bytes()
    edited = shutil.copytree(world.folder / "bytes", tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    for changed, key in (
        (flags(world, "pivot", output), "weights"),
        (flags(world, str(edited), output), "config"),
        ([*flags(world, "bytes", output), "--dtype", "bfloat16"], "dtype"),
        ([*flags(world, "bytes", output), "--attention", "eager"], "attention"),
    ):
        result = program(*changed)
        assert result.exit_code == 1
        assert f"`{output}` was made with other settings:" in result.stderr
        assert f"\n  {key} " in result.stderr
        assert output.read_bytes() == before
    for text in ("years of work", '["years of work"]', '{"groups": {}}'):
        output.write_text(text)
        result = program(*flags(world, "bytes", output))
        assert (result.exit_code, output.read_text()) == (1, text)
        assert "holds something else" in result.stderr


def test_a_model_that_cannot_be_scored_is_an_error(world: World, tmp_path: Path) -> None:
    result = program(*flags(world, "nowhere", tmp_path / "scores.json"))
    assert "no model folder" in result.stderr
    result = program(*flags(world, "pivot", tmp_path / "scores.json"), "--dialogues", tmp_path)
    assert "holds no dialogues" in result.stderr
    few = tmp_path / "few"
    MODELS["bytes"][1].tokenizer.save_pretrained(few)
    tiny_sources.new_source("llama", 100, **GROUPED).save_pretrained(few)
    with pytest.raises(UserError, match="the tokenizer does not belong to these weights"):
        evaluate(world.config(str(few), tmp_path / "scores.json"))
    assert not (tmp_path / "scores.json").exists()


def test_the_order_of_the_rows_does_not_matter(world: World, tmp_path: Path) -> None:
    order = [*range(len(NAMES))]
    random.Random(3).shuffle(order)
    data = write_chats(tmp_path / "held_out.jsonl", [CHATS[n] for n in order], [NAMES[n] for n in order])
    common = {"data": [str(data)], "pivot": str(world.folder / "pivot"), "template": "openchat"}
    prepare(PrepareConfig(**common, dialogues=tmp_path / "shuffled"), tmp_path, quiet=True)
    one = evaluate(world.config("unigram", tmp_path / "one.json"))["groups"]
    other = evaluate(world.config("unigram", tmp_path / "other.json", dialogues=tmp_path / "shuffled"))["groups"]
    assert one.keys() == other.keys()
    for group, sums in one.items():
        known = {key: value for key, value in sums.items() if value is not None}  # of one conversation: no error
        assert known == pytest.approx({key: other[group][key] for key in known}, rel=1e-6)


# Standard errors


def oracle_error(tops: Sequence[float], bottoms: Sequence[float]) -> float:
    ratio, number = sum(tops) / sum(bottoms), len(tops)
    spread = sum((top - ratio * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    return float((number / (number - 1) * spread) ** 0.5 / sum(bottoms))


def test_standard_errors_are_over_conversations_whose_blocks_count_as_one(world: World, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "held_out.jsonl", CHATS, NAMES)
    common = {"data": [str(data)], "pivot": str(world.folder / "pivot"), "template": "openchat"}
    cut = prepare(PrepareConfig(**common, max_length=64, dialogues=tmp_path / "cut"), tmp_path, quiet=True)
    assert len(cut) > len(CHATS)
    found = evaluate(world.config("bytes", tmp_path / "scores.json", dialogues=cut.folder))
    parts = found["conversations"]
    assert len(parts) == found["groups"]["all"]["conversations"] == len(CHATS)
    for group, of in found["groups"].items():
        own = [one for one in parts.values() if group in ("all", one["group"])]
        assert sum(one["nats"] for one in own) == pytest.approx(of["nats"])
        if len(own) == 1:
            assert of["nats_per_byte_error"] is None
            continue
        nats, size = [one["nats"] for one in own], [one["bytes"] for one in own]
        assert of["nats_per_byte_error"] == pytest.approx(oracle_error(nats, size))
        matched, rows = [one["matched"] for one in own], [one["rows"] for one in own]
        assert of["exact_match_error"] == pytest.approx(oracle_error(matched, rows))


def test_the_error_is_that_of_repeated_draws_and_pairing_removes_what_both_share() -> None:
    """4000 draws of 50 conversations from a known world: their scores spread as the error of one draw says."""
    draw = np.random.default_rng(0)
    size = draw.integers(50, 500, (4000, 50)).astype(float)
    hard = draw.normal(0.5, 0.2, size.shape) * size
    other = hard + draw.normal(0.01, 0.02, size.shape) * size
    losses = hard.sum(1) / size.sum(1)
    gaps = other.sum(1) / size.sum(1) - losses
    errors = [standard_error((top, bottom)) for top, bottom in zip(hard[:200], size[:200], strict=True)]
    assert np.mean(np.array(errors, float)) == pytest.approx(losses.std(), rel=0.05)
    pairs = [difference((b, n), (a, n)) for a, b, n in zip(hard[:200], other[:200], size[:200], strict=True)]
    assert np.mean(np.array(pairs, float)[:, 1]) == pytest.approx(gaps.std(), rel=0.05)
    assert gaps.std() < losses.std() / 5


# What is no score


def broken(world: World, folder: Path, value: float) -> str:
    """The pivot with one value of ``value``; the name of its tensor."""
    shutil.copytree(world.folder / "pivot", folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    tensors[name][0, 0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_score(value: float, world: World, tmp_path: Path) -> None:
    name = broken(world, tmp_path / "broken", value)
    result = program(*flags(world, str(tmp_path / "broken"), tmp_path / "scores.json"))
    assert result.exit_code == 1
    assert f"the loss of `{tmp_path / 'broken'}` is not finite, first on the conversation `" in result.stderr
    assert f"its tensor `{name}` holds NaN or infinite values" in result.stderr
    assert "nats/byte" not in result.stdout
    assert not (tmp_path / "scores.json").exists()


def test_an_overflow_in_16_bits_is_distinguished_from_broken_weights(world: World, tmp_path: Path) -> None:
    broken(world, tmp_path / "large", 6e4)
    tensors = load_file(tmp_path / "large" / "model.safetensors")
    tensors["model.norm.weight"].fill_(6e4)
    save_file(tensors, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    result = program(*flags(world, str(tmp_path / "large"), tmp_path / "scores.json"), "--dtype", "float16")
    assert "its weights are finite, so its arithmetic overflows; try --dtype float32" in result.stderr


def test_a_model_that_reads_no_answer_has_no_score(world: World, tmp_path: Path) -> None:
    """Nought nats in nought bytes would be the best of all losses."""
    folder = tmp_path / "short"
    MODELS["bytes"][1].tokenizer.save_pretrained(folder)
    tiny_sources.new_source("mpt", len(MODELS["bytes"][1].tokenizer), max_seq_len=8, n_layers=1).save_pretrained(
        folder
    )
    with pytest.raises(UserError, match="no token of an answer lies within the context of"):
        evaluate(world.config(str(folder), tmp_path / "scores.json"))


def damage(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    if what == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "an error page":
        weights.write_text("<html>not found</html>")
    elif what == "a missing shard":
        names = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(load_file(weights))}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        weights.rename(folder / "model-00001-of-00002.safetensors")
    elif what == "no config":
        (folder / "config.json").unlink()
    else:
        name, text = what.split("=")
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("cut off", "`model.safetensors` is cut off or damaged ("),
        ("an error page", "`model.safetensors` is cut off or damaged (22 bytes"),
        ("a missing shard", "names `model-00002-of-00002.safetensors`, and that file is not there: copy it"),
        ("no config", "has no config.json; copy it"),
        ("config.json=[]", "config.json` is not a JSON object but `[]`"),
        ("config.json=", "config.json` is not JSON (0 bytes"),
        ("config.json={}", "config.json` cannot be used: Unrecognized model"),
        ('tokenizer_config.json="x"', "tokenizer_config.json` is not a JSON object but `x`"),
        ("generation_config.json=[1]", "generation_config.json` is not a JSON object but `[1]`"),
        ("generation_config.json={", "generation_config.json` is not JSON (1 bytes"),
    ],
)
def test_half_a_checkpoint_is_a_sentence_that_names_the_file(
    what: str, part: str, world: World, tmp_path: Path
) -> None:
    folder = shutil.copytree(world.folder / "pivot", tmp_path / "half")
    damage(folder, what)
    result = program(*flags(world, str(folder), tmp_path / "scores.json"))
    assert (result.exit_code, part in result.stderr) == (1, True), result.stderr
