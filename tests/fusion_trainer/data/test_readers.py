"""A source that is queried in a chat template of its own, laid beside a pivot that reads another.

The oracle knows both templates by heart: where each writes an answer, and what ends it. Positions are named by the
answer and byte that they predict, from the text alone.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sources
import tiny_tokenizers
import torch
from click.testing import CliRunner
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusion_trainer.representations.extraction as extraction
from fusion_trainer.alignment.align import align
from fusion_trainer.alignment.saved_map import load_map
from fusion_trainer.cli import main
from fusion_trainer.config import AlignConfig, ExtractConfig
from fusion_trainer.data.answers import END, Answer, places
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.conversations import Message
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import Reader, source_reader
from fusion_trainer.data.templates import Template
from fusion_trainer.representations.extract import extract
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.representations.topk_model import TopKModel
from fusion_trainer.text.tokenizer import TextTokenizer, supervised_positions
from varm_common.errors import UserError

PIVOT_END, SOURCE_END = "<|im_end|>", "<turn|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
CHATS: list[list[tuple[str, str]]] = [
    [("Hello?", "Hello! 你好, café."), ("1 + 1?", "2")],
    [("Sort it.", "def sort(a):\n    return sorted(a)\n\n\nThat is all.")],
    [("  spaces ", "🙂🚀 and e\u0301"), ("Again<turn|>?", "<|im_end|> is a token too"), ("Bye", "thank you")],
    *tiny_sources.made_up_chats(5, seed=3, words=10, turns=2),
]


def rows() -> list[dict[str, Any]]:
    found = []
    for number, chat in enumerate(CHATS):
        turns = [{"role": "system", "content": "Be brief."}] if number % 2 else []
        for question, answer in chat:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
        found.append({"id": f"chat-{number}", "messages": turns})
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pivot with ChatML; ``gemma`` with turns of its own; ``bare`` without a template; their stores."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    own = {"special": ["<|im_start|>", PIVOT_END], "template": CHATML}
    tiny_sources.save_source(folder / "pivot", "llama", "byte_level_bpe", **own)
    own = {"special": ["<|turn>", SOURCE_END], "template": GEMMA}
    tiny_sources.save_source(folder / "gemma", "mistral", "sentencepiece_bpe", seed=1, **own)
    tiny_sources.save_source(folder / "bare", "gpt_neox", "unigram", seed=2)
    for name, how in (("pivot", {}), ("gemma", {}), ("bare", {"source_template": "pivot"})):
        extract_store(folder, name, **how)
    return folder


def extract_store(world: Path, name: str, **changed: Any) -> RepresentationStore:
    settings = {
        "data": [str(world / "chats.jsonl")],
        "pivot": str(world / "pivot"),
        "model": str(world / name),
        "top_k": 120,
    }
    return extract(ExtractConfig(**{**settings, "output": world / "stores" / name, **changed}))


def aligned(world: Path, source: str, output: Path, **changed: Any) -> RepresentationStore:
    stores = {"source_store": world / "stores" / source, "pivot_store": world / "stores" / "pivot"}
    return align(AlignConfig(**{**stores, "output": output, "workers": 1, **changed}))[0]


# The truth


def text_of(name: str, row: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as a model's template writes it, and the characters that are an answer's content."""
    messages, text = list(row["messages"]), ""
    if name == "gemma" and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
        messages[0] = {"role": "user", "content": f"{system}\n\n{messages[0]['content']}"}
    head, role, end = (
        ("<|turn>", "model", SOURCE_END) if name == "gemma" else ("<|im_start|>", "assistant", PIVOT_END)
    )
    spans = []
    for message in messages:
        content = message["content"].strip() if name == "gemma" else message["content"]
        text += f"{head}{role if message['role'] == 'assistant' else message['role']}\n"
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(content)))
        text += f"{content}{end}\n"
    return text, spans


def named(world: Path, name: str, row: dict[str, Any]) -> dict[tuple[int, int], int]:
    """Which position predicts which byte of which answer (−1: its end).

    A token of byte-level BPE has as many bytes as its name has characters; otherwise offsets tell where a token
    ends. Of several tokens of one character only the last has read it.
    """
    tokenizer = AutoTokenizer.from_pretrained(world / name)
    text, spans = text_of(name, row)
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if name == "pivot":
        names = tokenizer.convert_ids_to_tokens(read.input_ids)
        stops = np.cumsum([len(one) for one in names]).tolist()
    else:
        stops = [len(text[:stop].encode()) for _, stop in read.offset_mapping]
    shift = len(tokenizer("a").input_ids) - len(tokenizer("a", add_special_tokens=False).input_ids)
    found: dict[tuple[int, int], int] = {}
    for place, end in enumerate(stops):
        for number, span in enumerate(spans):
            start, stop = (len(text[:edge].encode()) for edge in span)
            if start <= end < stop:
                found[number, end - start] = place + shift
            elif end == stop:
                found[number, -1] = place + shift
    return found


def stored(world: Path, row: dict[str, Any]) -> list[int]:
    """The positions of ``gemma`` that are queried: from the start of each answer to its end."""
    names = named(world, "gemma", row)
    answers = sorted({answer for answer, _ in names})
    return [place for answer in answers for place in range(names[answer, 0], names[answer, -1] + 1)]


def supervised(world: Path) -> list[list[int]]:
    """The pivot's supervised positions of each row: from the start of each answer to its end."""
    every = [named(world, "pivot", row) for row in rows()]
    return [
        [
            place
            for answer in sorted({a for a, _ in names})
            for place in range(names[answer, 0], names[answer, -1] + 1)
        ]
        for names in every
    ]


@pytest.mark.parametrize("positions", ["boundary", "dtw"])
def test_the_end_of_each_answer_is_paired_and_nothing_else_is_mapped_to_it(
    positions: str, world: Path, tmp_path: Path
) -> None:
    """Stop to stop: what the source gives to its ends of turn goes to the pivot's."""
    store = aligned(world, "gemma", tmp_path / "aligned", positions=positions)
    tokenizer = AutoTokenizer.from_pretrained(world / "gemma")
    end = AutoTokenizer.from_pretrained(world / "pivot").convert_tokens_to_ids(PIVOT_END)
    ends = [tokenizer.convert_tokens_to_ids(SOURCE_END), tokenizer.eos_token_id]
    source = RepresentationStore(world / "stores" / "gemma")
    checked = heard = 0
    for row, other, data, positions_P in zip(store, source, rows(), supervised(world), strict=True):
        own, theirs, queried = named(world, "pivot", data), named(world, "gemma", data), stored(world, data)
        for (answer, byte), place in own.items():
            if byte != -1:
                continue
            at, there = positions_P.index(place), queried.index(theirs[answer, -1])
            assert row.paired[at] == 1
            mass = np.exp(other.logprobs[there].astype(float))[np.isin(other.ids[there], ends)].sum()
            shares = np.exp(row.logprobs[at].astype(float))
            found = shares[row.ids[at] == end].sum()
            assert found == pytest.approx(mass, rel=5e-3) or mass <= shares.min()
            checked += 1
            heard += found > 0
    assert checked == store.manifest["ends"] == store.manifest["ends_paired"] == sum(map(len, CHATS))
    assert heard > 3


def test_positions_are_paired_where_both_have_read_the_same_bytes_of_the_same_answer(
    world: Path, tmp_path: Path
) -> None:
    store = aligned(world, "gemma", tmp_path / "aligned")
    dense = load_map(next(tmp_path.glob("vocab-map-*.safetensors"))).map.matrix.toarray()
    source = RepresentationStore(world / "stores" / "gemma")
    paired = 0
    for number, (row, data, positions_P) in enumerate(zip(store, rows(), supervised(world), strict=True)):
        own, theirs = named(world, "pivot", data), named(world, "gemma", data)
        queried = stored(world, data)
        both = {own[name]: theirs[name] for name in own.keys() & theirs.keys()}
        assert len(row.paired) == len(positions_P)
        assert len(source[number]) == len(queried)
        found = {place for place, one in zip(positions_P, row.paired, strict=True) if one}
        assert set(both) <= found
        paired += len(found)
        for place, other in both.items():
            at = positions_P.index(place)
            theirs_row = queried.index(other)
            shares = np.exp(source[number].logprobs[theirs_row].astype(float))
            mapped = shares @ dense[source[number].ids[theirs_row]]
            best = -np.sort(-mapped)[: store.k]
            np.testing.assert_allclose(np.exp(row.logprobs[at].astype(float)), best, rtol=5e-3, atol=1e-6)
    assert paired > 0.3 * store.manifest["positions"]


def test_a_source_without_the_token_for_the_end_never_spells_it(world: Path, tmp_path: Path) -> None:
    """Reading the pivot's text it has to spell ``<|im_end|>``: no position of that is queried or paired."""
    store = aligned(world, "bare", tmp_path / "aligned")
    source, own = (RepresentationStore(world / "stores" / name) for name in ("bare", "pivot"))
    assert store.manifest["ends"] == sum(map(len, CHATS))
    assert store.manifest["ends_paired"] == 0
    for row, theirs, data, positions_P, original in zip(
        store, source, rows(), supervised(world), own, strict=True
    ):
        ends = {place for (_, byte), place in named(world, "pivot", data).items() if byte == -1}
        for at, place in enumerate(positions_P):
            if place in ends:
                assert row.ids[at].tolist() == original.ids[at].tolist()
        text, _ = text_of("pivot", data)
        tokenizer = AutoTokenizer.from_pretrained(world / "bare")
        spelled = len(tokenizer(text).input_ids)
        assert len(theirs) < spelled


def test_all_cross_entropies_are_over_the_same_bytes(world: Path, tmp_path: Path) -> None:
    """Answers and their ends; nothing of what the templates write around them."""
    store = aligned(world, "gemma", tmp_path / "aligned")
    stores = {name: RepresentationStore(world / "stores" / name) for name in ("pivot", "gemma")}
    for number, (row, data, positions_P) in enumerate(zip(store, rows(), supervised(world), strict=True)):
        size = sum(len(m["content"].encode()) + 1 for m in data["messages"] if m["role"] == "assistant")
        pivot, source = stores["pivot"][number], stores["gemma"][number]
        assert len(pivot) == len(positions_P)
        assert row.pivot_ce_per_byte == pytest.approx(-pivot.gold_logprob.astype(float).sum() / size, rel=1e-3)
        assert row.ce_per_byte == pytest.approx(-source.gold_logprob.astype(float).sum() / size, rel=1e-3)
        assert row.ce_per_token == pytest.approx(-source.gold_logprob.astype(float).mean(), rel=1e-3)


def test_a_store_says_where_each_answer_lies_and_in_which_template_it_was_queried(world: Path) -> None:
    import pyarrow as pa

    store = RepresentationStore(world / "stores" / "gemma")
    assert store.identity["jinja"] == GEMMA
    tokenizer = AutoTokenizer.from_pretrained(world / "gemma")
    assert store.identity["ends"] == [tokenizer.convert_tokens_to_ids(SOURCE_END), tokenizer.eos_token_id]
    bos = len(tokenizer.bos_token.encode())
    with pa.memory_map(str(store.folder / "shard-00000.arrow")) as file:
        column = pa.ipc.open_file(file).read_all().column("answers").to_pylist()
    for answers, data in zip(column, rows(), strict=True):
        text, spans = text_of("gemma", data)
        raw = text.encode()
        for (_, start, stop, end), (first, last) in zip(answers, spans, strict=True):
            shift = bos if raw[start:stop] != text[first:last].encode() else 0
            assert raw[start - shift : stop - shift] == text[first:last].encode()
            assert raw[stop - shift : end - shift] == SOURCE_END.encode()
    assert store.manifest["folded"] == sum(number % 2 for number in range(len(CHATS)))


def test_store_show_prints_what_a_source_reads_before_its_first_answer(world: Path) -> None:
    result = CliRunner().invoke(main, ["store", "show", str(world / "stores" / "gemma"), "--row", "1"])
    assert result.exit_code == 0, result.output
    assert "read before the first answer: " in result.output
    assert "<|turn>user\\nBe brief.\\n\\nSort it.<turn|>" in result.output


def test_a_source_without_a_template_is_refused_with_what_to_choose(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bare has no chat template.* --source-template: openchat, .*`pivot`"):
        extract_store(world, "bare", output=tmp_path / "store")
    assert len(extract_store(world, "bare", output=tmp_path / "store", source_template="zephyr"))


@pytest.mark.parametrize("name", ["gemma", "bare"])
def test_a_source_reads_the_pivots_text_with_its_own_end_of_turn(name: str, world: Path, tmp_path: Path) -> None:
    """As in FuseChat; what looks like a marker within an answer stays. Without a template, EOS ends an answer."""
    end = SOURCE_END if name == "gemma" else "</s>"
    store = extract_store(world, name, output=tmp_path / "store", source_template="pivot_own_end")
    tokenizer = AutoTokenizer.from_pretrained(world / name)
    model = AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32)
    for row, data in zip(store, rows(), strict=True):
        text, stops = "", []
        for message in data["messages"]:
            text += f"<|im_start|>{message['role']}\n"
            first = len(text)
            text += f"{message['content']}{end}"
            stops += [(first, len(text))] * (message["role"] == "assistant")
            text += "\n"
        read = tokenizer(text, return_offsets_mapping=True)
        offsets = read.pop("offset_mapping")
        with torch.no_grad():
            logprobs = model(torch.tensor([read.input_ids])).logits[0].double().log_softmax(-1)
        if name == "bare":
            continue  # its pieces cross the edges of answers
        gold = [
            float(logprobs[place - 1, read.input_ids[place]])
            for first, stop in stops
            for place, (start, end) in enumerate(offsets)
            if start < stop and end > first
        ]
        np.testing.assert_allclose(row.gold_logprob.astype(float), gold, atol=5e-3)  # float16
    assert store.manifest["identity"]["marker"] == [PIVOT_END, end]
    whole = aligned(world, name, tmp_path / "aligned", source_store=tmp_path / "store")
    assert whole.manifest["ends"] == whole.manifest["ends_paired"] == sum(map(len, CHATS))


def test_another_template_is_another_store(world: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)is a store with other settings.*reading"):
        extract_store(world, "gemma", source_template="pivot")


def test_a_store_of_a_source_is_not_taken_for_the_pivots(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a store of the pivot"):
        align(
            AlignConfig(
                source_store=world / "stores" / "bare",
                pivot_store=world / "stores" / "gemma",
                output=tmp_path / "aligned",
            )
        )


# Readings


def reader(
    template: str, special: Sequence[str] = ("<|turn>", SOURCE_END), kind: str = "byte_level_bpe"
) -> Reader:
    tokenizer = tiny_tokenizers.train(kind, special=special)
    tokenizer.chat_template = template
    return source_reader("own", TextTokenizer(tokenizer, "source"))


def block(answer: str, extra: dict[str, Any] | None = None) -> Block:
    text = f"<u>hi<a>{answer}<e>"
    start = len("<u>hi<a>")
    stop = start + len(answer.encode())
    own = Answer(1, start, ((start, stop, 0),), stop, stop + 3)
    messages = (Message("user", "hi"), Message("assistant", answer, extra=extra or {}))
    return Block("c", 0, "file, line 1", text, (own,), 9, messages=messages)


def read(one: Reader, what: Block) -> tuple[str, list[bytes], list[int], bool]:
    """The text, the compared pieces of the answer, where in it they begin, and whether its end is compared."""
    reading = one.read(what)
    raw = reading.text.encode()
    (answer,) = reading.answers
    pieces = [raw[start:stop] for start, stop, _ in answer.pieces]
    return reading.text, pieces, [at for *_, at in answer.pieces], answer.closed


def test_what_a_template_trims_is_no_difference() -> None:
    text, pieces, begins, closed = read(reader(GEMMA), block("  two spaces\n"))
    assert text.endswith("<|turn>model\ntwo spaces<turn|>\n")
    assert (pieces, begins, closed) == ([b"two spaces"], [2], True)


def test_after_what_a_template_leaves_out_nothing_is_compared() -> None:
    """It has read another answer than the pivot."""
    drops = GEMMA.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
    one = reader(drops)
    _, pieces, _, closed = read(one, block("<think>because</think>yes"))
    assert (pieces, closed) == ([], False)
    assert one.counts["left_out_parts of answers (reasoning)"] == len("<think>because</think>")


def test_reasoning_that_only_the_pivot_reads_is_not_read_over() -> None:
    asked = block("yes", {"reasoning_content": "because"})
    assert read(reader(GEMMA), asked)[1:] == ([], [], False)
    shows = GEMMA.replace("{{ m.content", "{{ m.reasoning_content or '' }}{{ m.content")
    assert read(reader(shows), asked)[1:] == ([b"yes"], [0], True)


def test_a_conversation_that_a_template_refuses_is_counted() -> None:
    one = reader("{{ raise_exception('never') }}")
    reading = one.read(block("yes"))
    assert (reading.text, reading.answers, reading.spans) == ("", (), ())
    assert one.counts["refused"] == 1


def test_an_end_that_the_source_spells_belongs_to_no_answer() -> None:
    """Also in its own template."""
    assert read(reader(GEMMA), block("yes"))[3]
    one = reader(GEMMA, special=())
    reading = one.read(block("yes"))
    assert not reading.answers[0].closed
    (span,) = reading.spans
    assert reading.text.encode()[slice(*span)] == b"yes"


def test_a_token_that_begins_before_the_answer_says_what_it_takes_along() -> None:
    """Mistral's template writes a space before an answer, which the first token has."""
    tokenizer = TextTokenizer(tiny_tokenizers.shared("sentencepiece_bpe"), "source")
    for head, lead in (("[/INST] ", b" "), ("[/INST]\n", b"")):
        text = f"{head}return"
        (tokens,) = tokenizer.encode([text])
        start = len(head)
        found = places(
            tokens, text.encode(), [Answer(0, start, ((start, len(text), 0),), len(text), len(text), False)]
        )
        first = int(np.flatnonzero(found.place == 0)[0])
        assert found.lead.get(first, b"") == lead
        assert not (found.place == END).any()


def test_the_dialogues_keep_the_turns_as_the_pivot_reads_them(world: Path) -> None:
    dialogues = Dialogues(next((world / "stores").glob("dialogues-*")))
    for number, row in enumerate(rows()):
        assert [(m.role, m.content) for m in dialogues[number].messages] == [
            (m["role"], m["content"]) for m in row["messages"]
        ]
    assert dialogues.ends == [AutoTokenizer.from_pretrained(world / "pivot").convert_tokens_to_ids(PIVOT_END)]


def test_a_generation_prompt_that_opens_the_reasoning_leaves_its_tag_out() -> None:
    """What the prompt already holds is not learnt; what the answer has to open is."""
    tokenizer = tiny_tokenizers.train("byte_level_bpe", special=["<|im_start|>", PIVOT_END])
    opens = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    )
    messages = [Message("user", "hi"), Message("assistant", "yes")]

    def learnt(jinja: str) -> bytes:
        rendered = Template("mine", jinja, tokenizer).render(messages)
        ((start, stop),) = rendered.spans
        return rendered.text.encode()[start:stop]

    assert learnt(opens) == b"<think>\n\n</think>\n\nyes<|im_end|>"
    prompted = opens.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    assert learnt(prompted) == b"yes<|im_end|>"


# Rot


def flipped(path: Path, at: float = 0.5) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """The stores and their dialogues, an aligned store and its map, to be damaged."""
    shutil.copytree(world / "stores", tmp_path / "stores")
    stores = {
        f"{name}_store": tmp_path / "stores" / folder for name, folder in (("source", "gemma"), ("pivot", "pivot"))
    }
    align(AlignConfig(**stores, output=tmp_path / "stores" / "aligned", workers=1, map="statistics"))
    return tmp_path / "stores"


@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("gemma/shard-00000.arrow", 0.4),
        ("pivot/shard-00000.arrow", 0.4),
        ("dialogues-*/blocks.arrow", 0.3),
        ("vocab-map-*.safetensors", 0.9),
        ("corpus-*.safetensors", 0.9),
    ],
)
def test_a_flipped_bit_is_noticed_when_it_is_first_read(what: str, at: float, copied: Path) -> None:
    """By what reads it, and by ``store verify``."""
    (path,) = copied.glob(what)
    flipped(path, at)
    stores = {"source_store": copied / "gemma", "pivot_store": copied / "pivot"}
    if path.name.startswith("corpus"):
        next(copied.glob("vocab-map-*")).unlink()  # made anew from the count
    with pytest.raises(UserError, match="damaged"):
        align(AlignConfig(**stores, output=copied / "again", workers=1, map="statistics"))
    store = "gemma" if what.startswith("gemma") else "pivot"
    result = CliRunner().invoke(main, ["store", "verify", str(copied / store)])
    assert result.exit_code == 1
    assert path.name in result.output or "blocks.arrow" in result.output


def test_a_damaged_shard_is_made_again(copied: Path, world: Path) -> None:
    before = (copied / "gemma" / "shard-00000.arrow").read_bytes()
    flipped(copied / "gemma" / "shard-00000.arrow")
    with pytest.raises(UserError, match="Remove what is damaged and run"):
        list(RepresentationStore(copied / "gemma"))
    (copied / "gemma" / "shard-00000.arrow").unlink()
    extract_store(world, "gemma", output=copied / "gemma", dialogues=next(copied.glob("dialogues-*")))
    assert (copied / "gemma" / "shard-00000.arrow").read_bytes() == before
    assert len(list(RepresentationStore(copied / "gemma"))) == len(CHATS)


# A killed extraction


def test_what_a_killed_extraction_has_done_of_a_shard_is_not_done_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept every few minutes: here after every batch."""
    monkeypatch.setattr(extraction, "SAVED_EVERY", -1.0)
    whole = extract_store(world, "gemma", output=tmp_path / "whole", batch_tokens=100)
    asked: list[int] = []
    plain = TopKModel.distributions

    def watched(self: TopKModel, ids_BL: Any, *others: Any) -> Any:
        asked.append(len(ids_BL))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return plain(self, ids_BL, *others)

    monkeypatch.setattr(TopKModel, "distributions", watched)
    with pytest.raises(KeyboardInterrupt):
        extract_store(world, "gemma", output=tmp_path / "store", batch_tokens=100)
    (partial,) = (tmp_path / "store").glob("*.partial")
    first = len(asked)
    extract_store(world, "gemma", output=tmp_path / "store", batch_tokens=100)
    assert not partial.exists()
    assert len(asked) - first < len(CHATS) - 1
    for name in ("shard-00000.arrow", "manifest.json"):
        assert (tmp_path / "store" / name).read_bytes() == (whole.folder / name).read_bytes()


# Ends of answers that real templates have


def learnt_by(jinja: str, special: Sequence[Any], messages: list[Message], **tokens: str) -> list[str]:
    tokenizer = tiny_tokenizers.train("byte_level_bpe")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    rendered = Template("mine", jinja, tokenizer).render(messages)
    reader = TextTokenizer(tokenizer, "mine")
    (read,) = reader.encode([rendered.text])
    ids = read.ids[supervised_positions(read, rendered.spans) + 1].tolist()
    spans = [rendered.text.encode()[slice(*span)].decode() for span in rendered.spans]
    assert tokenizer.decode(ids).replace(" ", "") == "".join(spans).replace(" ", "").replace("\n", "")
    return spans


TWO_TURNS = [Message("user", "hi"), Message("assistant", "yes"), Message("user", "hi"), Message("assistant", "no")]


def test_an_end_that_takes_the_line_break_after_it_is_learnt() -> None:
    """Phi-3's ``<|end|>``."""
    end = AddedToken("<|end|>", rstrip=True, special=True, normalized=False)
    jinja = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    assert learnt_by(jinja, [end], TWO_TURNS) == ["yes<|end|>\n", "no<|end|>\n"]


def test_an_end_of_two_tokens_is_learnt_whole() -> None:
    """Command-R7B's."""
    jinja = "{% for m in messages %}<|t|>{{ m.role }}<|/t|>{{ m.content }}"
    jinja += "{% if m.role == 'assistant' %}<|er|>{% endif %}<|et|>{% endfor %}"
    assert learnt_by(jinja, ["<|t|>", "<|/t|>", "<|er|>", "<|et|>"], TWO_TURNS) == [
        "yes<|er|><|et|>",
        "no<|er|><|et|>",
    ]


CALLS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>"
    "{% if loop.last %}<think></think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
    "{% else %}<|{{ m.role[0] }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


def test_no_output_of_a_tool_is_learnt_and_a_call_ends_where_the_turn_of_the_tool_begins() -> None:
    """GLM's way: no end of turn, and reasoning that goes once a turn follows."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages = [
        Message("user", "hi"),
        Message("assistant", "", extra={"tool_calls": [call]}),
        Message("tool", "look at OUTPUT"),
        Message("assistant", "done"),
        Message("user", "thanks"),
        Message("assistant", "bye"),
    ]
    special = ["<|a|>", "<|u|>", "<|t|>", "<call>", "</call>", "<think>", "</think>"]
    spans = learnt_by(CALLS, special, messages)
    assert spans[-2:] == ["done<|u|>", "<think></think>bye"]
    assert not any("OUTPUT" in span for span in spans)
    stays = CALLS.replace("{% if loop.last %}<think></think>{% endif %}", "<think></think>")
    assert learnt_by(stays, special, messages)[0] == "<think></think><call>look</call><|t|>"


def test_reasoning_whose_words_stand_elsewhere_is_not_taken_for_rendered() -> None:
    asked = block("2", {"reasoning_content": "hi"})
    assert read(reader(GEMMA), asked)[1:] == ([], [], False)
