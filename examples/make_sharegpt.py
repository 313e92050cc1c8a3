"""Write a multi-turn ShareGPT file of made-up conversations, and four small models to ask about them.

\b
  python examples/make_sharegpt.py                            2,000 conversations, demo_out/sharegpt/chats.jsonl
  python examples/make_sharegpt.py --models demo_out/sharegpt      and four models; it prints how to go on
  python examples/make_sharegpt.py --conversations 50 --out few.jsonl

All text is made by code from a seed: arithmetic, lists, dates and units, Python, the facts and the history of an
invented world, plans and tables, writing systems. Answers have from one word to several thousand characters, a
third of the conversations a system turn, and a few end with a question that nobody answered.

The models differ as real ones do: the pivot has Mistral's layout, a SentencePiece-like tokenizer with byte
fallback and OpenChat's template; `source` has Qwen2's layout, byte-level BPE, more rows than tokens and ChatML;
`unigram` Llama's layout, a Unigram tokenizer and Vicuna's template; `small` GPT-NeoX's layout, a small vocabulary
and OpenChat's template, as the pivot. All tokenizers are trained on the file. Nothing is downloaded.
"""

import calendar
import json
import random
from collections.abc import Callable, Iterable, Iterator
from datetime import date, timedelta
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("pivot", "source", "unigram", "small")
CHATS = Path("demo_out", "sharegpt", "chats.jsonl")
TEMPLATES = ROOT / "fusion_trainer" / "data" / "templates"

Exchange = tuple[str, str]
"""What the user says, and the answer."""


# Styles: each an endless line of exchanges, which may remember what was said before


def arithmetic(rng: random.Random) -> Iterator[Exchange]:
    while True:
        a, tens, ones, c = rng.randint(100, 989), 10 * rng.randint(1, 9), rng.randint(1, 9), rng.randint(2, 9)
        b = tens + ones
        asks = ("What is {}?", "Please work out {}, step by step.", "{} = ?", "How much is {}? Show me.")
        ask = rng.choice(asks)
        product = f"- {a} × {tens} = {a * tens:,}\n- {a} × {ones} = {a * ones:,}\n- together {a * b:,}"
        total = a * b * c + a
        exchanges = [
            (ask.format(f"{a} × {b}"), f"I split {b} into {tens} and {ones}.\n\n{product}\n\n**{a * b:,}**"),
            (ask.format(f"{a} + {b}"), f"{a + b}"),
            (ask.format(f"{a} − {b}"), f"{a} − {tens} = {a - tens}, and {ones} less is **{a - b}**."),
            (ask.format(f"{a} ÷ {c}"), f"{c} × {a // c} = {a // c * c}, so {a // c}, remainder {a % c}."),
            (
                f"I bought {c} boxes of {b} tiles at {a} cents a tile and paid {a} cents to park. The total?",
                f"1. Tiles: {c} × {b} = {c * b}.\n2. Price: {c * b} × {a} = {a * b * c:,} cents.\n"
                f"3. With parking: {a * b * c:,} + {a} = {total:,} cents.\n\nThat is {total / 100:,.2f}.",
            ),
        ]
        yield rng.choice(exchanges)


def lists(rng: random.Random) -> Iterator[Exchange]:
    while True:
        numbers = rng.sample(range(1, 500), rng.randint(4, 30))
        names = [name(rng) for _ in range(rng.randint(3, 12))]
        listed = ", ".join(map(str, numbers))
        exchanges = [
            (f"Sort these numbers: {listed}", ", ".join(map(str, sorted(numbers)))),
            (f"Reverse the order of {listed}.", ", ".join(map(str, reversed(numbers)))),
            (f"The largest of {listed}?", f"{max(numbers)}"),
            (f"Sort by the alphabet: {', '.join(names)}", "\n".join(f"- {item}" for item in sorted(names))),
            (
                f"Which of these are even, and what is their sum? {listed}",
                f"Even are {[n for n in numbers if n % 2 == 0]}; sum {sum(n for n in numbers if n % 2 == 0)}.",
            ),
            (f"Write “{names[0]}” backwards.", names[0][::-1]),
        ]
        yield rng.choice(exchanges)


def dates_and_units(rng: random.Random) -> Iterator[Exchange]:
    while True:
        day = date(1990, 1, 1) + timedelta(rng.randrange(20000))
        later = day + timedelta(rng.randint(2, 900))
        size, minutes = rng.randint(2, 950), rng.randint(70, 6000)
        weekday = calendar.day_name[day.weekday()]
        exchanges = [
            (f"What day of the week was {day}?", weekday),
            (
                f"How many days are there from {day:%d %B %Y} to {later:%d %B %Y}?",
                f"{(later - day).days} days. The first is a {weekday}, the last a {later:%A}.",
            ),
            (f"{size} km in miles, please", f"{size} km × 0.6214 = about {size * 0.6214:.1f} miles."),
            (f"Convert {size} °F to Celsius.", f"({size} − 32) × 5/9 = {(size - 32) * 5 / 9:.1f} °C"),
            (f"{minutes} minutes?", f"{minutes // 60} h {minutes % 60} min"),
            (f"Is {day.year} a leap year?", "Yes." if calendar.isleap(day.year) else "No."),
        ]
        yield rng.choice(exchanges)


def python_code(rng: random.Random) -> Iterator[Exchange]:
    tasks: tuple[tuple[str, str, Callable[[list[int], int], object]], ...] = (
        ("adds up {} times every number", "sum({} * v for v in values)", lambda values, n: n * sum(values)),
        (
            "keeps what is above {}",
            "[v for v in values if v > {}]",
            lambda values, n: [v for v in values if v > n],
        ),
        ("gives the remainders by {}", "[v % {} for v in values]", lambda values, n: [v % n for v in values]),
    )
    while True:
        (what, body, run), n = rng.choice(tasks), rng.randint(2, 40)
        function = f"{name(rng).lower()}_{rng.choice(('of', 'from', 'by'))}_{rng.choice('abcxyz')}"
        values = [rng.randint(1, 90) for _ in range(rng.randint(3, 8))]
        result = run(values, n)
        code = f"def {function}(values: list[int]):\n    return {body.format(n)}\n"
        yield (
            f"Write a Python function `{function}` that {what.format(n)}.",
            f"```python\n{code}```\n\nFor `{values}` it returns `{result}`.",
        )
        yield (
            "And a test for it?",
            f"```python\ndef test_{function}():\n    assert {function}({values}) == {result}\n\n\n"
            f"def test_{function}_of_nothing():\n    assert not {function}([])\n```",
        )
        loop = f"result = {function}({values})\nfor _ in range({n % 5 + 1}):\n\tprint(result)"
        yield f"What does this print?\n\n```\n{code}\n\n{loop}\n```", "\n".join([str(result)] * (n % 5 + 1))
        yield "Thanks!", "You're welcome."


def world(rng: random.Random) -> Iterator[Exchange]:
    """Facts that the user states first and asks for later."""
    while True:
        town, river, ruler, good = (name(rng) for _ in range(4))
        founded, people = rng.randint(200, 1900), rng.randint(900, 90000)
        yield (
            f"In this world the town of {town} lies on the river {river}. It was founded in {founded}, {people:,} "
            f"people live there, {ruler} rules it, and it sells {good.lower()}. Remember that.",
            f"I will. {town}, on the {river}: founded {founded}, {people:,} people, ruled by {ruler}.",
        )
        questions = [
            (f"Which river is {town} on?", river),
            (f"Who rules {town}?", ruler),
            (f"How old is {town} in the year 2000?", f"2000 − {founded} = {2000 - founded} years."),
            ("What would a merchant say about it?", paragraph(rng, rng.randint(2, 6))),
            (f"Describe {town} as JSON.", json.dumps({"town": town, "river": river, "people": people}, indent=2)),
        ]
        yield from rng.sample(questions, rng.randint(2, len(questions)))


def history(rng: random.Random) -> Iterator[Exchange]:
    """Very long answers: chronicles of several thousand characters."""
    while True:
        town = name(rng)
        years = sorted(rng.sample(range(300, 1900), rng.randint(4, 24)))
        chapters = [f"## {year}\n\n{paragraph(rng, rng.randint(3, 9))}" for year in years]
        yield f"Tell me the whole history of {town}, in chapters.", "\n\n".join([f"# {town}", *chapters])
        yield "Shorter, in one sentence.", sentence(rng)
        yield "And in one word?", rng.choice(("Patience.", "Salt.", "Rivers.", "Trade."))


def plans(rng: random.Random) -> Iterator[Exchange]:
    things = ("rope", "two maps", "dry socks", "a lamp", "tea", "flour", "a kettle", "string", "soap", "chalk")
    while True:
        town, days = name(rng), rng.randint(2, 9)
        packed = rng.sample(things, rng.randint(3, 8))
        rows = [f"| {day} | {name(rng)} | {rng.randint(5, 40)} km |" for day in range(1, days + 1)]
        table = "\n".join(["| day | stop | distance |", "|---|---|---|", *rows])
        arrival = f"On day {days} you reach *{town}*."
        yield f"Plan a walk of {days} days to {town}, as a table.", f"{table}\n\n{arrival}"
        yield "What should I pack?", "\n".join(f"{n}. **{thing}**" for n, thing in enumerate(packed, 1))
        reply = rng.choice(("Yes.", "No.", f"Yes: {sentence(rng)}", "Not in summer."))
        yield f"Is {packed[0]} really needed?", reply


def scripts(rng: random.Random) -> Iterator[Exchange]:
    words = {
        "water": ("水", "agua", "νερό", "вода"),
        "mountain": ("山", "montaña", "βουνό", "гора"),
        "moon": ("月", "luna", "φεγγάρι", "луна"),
        "book": ("书", "libro", "βιβλίο", "книга"),
        "bread": ("パン", "pan", "ψωμί", "хлеб"),
    }
    faces = ["🙂", "🚀", "🌙", "📚", "🍞", "🏔️", "🌊", "👩\u200d🔬", "🎲", "👍🏽", "🇯🇵"]
    while True:
        word, (cjk, spanish, greek, russian) = rng.choice(list(words.items()))
        row = "".join(rng.choices(faces, k=rng.randint(2, 12)))
        exchanges = [
            (f"“{word}” in other languages?", f"{cjk} · {spanish} · {greek} · {russian}"),
            (f"用一句话写写{cjk}。", f"{cjk}很安静，我们在{cjk}旁边坐了{rng.randint(2, 30)}分钟。"),
            (f"Copy this: {row}", row),
            (f"{cjk}はどこですか。", f"{cjk}はあそこにあります。{rng.randint(2, 90)}歩です。"),
            (f"Naïve café, or naive cafe? I mean “{word}”.", "Both are fine — cafés keep the accent. 🙂"),
        ]
        yield rng.choice(exchanges)


STYLES = (arithmetic, lists, dates_and_units, python_code, world, history, plans, scripts)
SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a patient teacher; show your work.",
    "You live in the invented world that the user describes, and know nothing else.",
    "Today is {}. Be exact about numbers, and say so when you cannot know something.",
)


def name(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))).capitalize()


SYLLABLES = [first + rest for first in "bdfgklmnprstvz" for rest in ("a", "e", "i", "o", "u", "an", "el")]


def sentence(rng: random.Random) -> str:
    pick = rng.choice
    who = pick(("The guild of weavers", "An old ferryman", name(rng), f"{name(rng)} the younger", "The council"))
    verb = pick(("sold", "remembered", "measured", "burned", "rebuilt", "lost", "praised", "divided", "hid"))
    what = pick(("the northern bridge", "seven mills", "every ledger", "the harbour", f"the tower of {name(rng)}"))
    when = pick(
        ("before the snow", "in spring", "at night", "against all advice", f"for {rng.randint(2, 99)} years")
    )
    end = pick(("", f", and {name(rng)} paid for it", "; nobody wrote down why", f", as in {name(rng)} before"))
    return f"{who} {verb} {what} {when}{end}."


def paragraph(rng: random.Random, sentences: int) -> str:
    return " ".join(sentence(rng) for _ in range(sentences))


# Conversations


def conversation(number: int, seed: int) -> dict[str, Any]:
    """One row: of one style, or of two in turn, 1 to 12 exchanges."""
    rng = random.Random(f"{seed}/{number}")
    styles = [style(rng) for style in rng.sample(STYLES, rng.choice((1, 1, 1, 2)))]
    exchanges = [next(style) for style in islice(cycle(styles), rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 8, 12)))]
    turns = [turn for asked, answer in exchanges for turn in (("human", asked), ("gpt", answer))]
    if rng.random() < 1 / 3:
        today = date(2020, 1, 1) + timedelta(rng.randrange(3000))
        turns.insert(0, ("system", rng.choice(SYSTEM).format(today)))
    if rng.random() < 0.02:
        turns.append(("human", "One more thing: are you still there?"))
    return {"id": f"made-{number:06}", "conversations": [{"from": who, "value": text} for who, text in turns]}


def conversations(seed: int) -> Iterator[dict[str, Any]]:
    """Without end; the n-th is the same however many are taken."""
    return (conversation(number, seed) for number in count())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def texts(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    return (turn["value"] for row in rows for turn in row["conversations"])


# Models


def byte_level_bpe(lines: Iterable[str], size: int) -> Any:
    """A tokenizer as Qwen2's: byte-level BPE, a token for each digit, no BOS, ChatML's marks and template."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(lines, size, show_progress=False)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text("utf-8")
    return tokenizer


def sentencepiece_bpe(lines: Iterable[str], size: int) -> Any:
    """A tokenizer as Mistral's: BPE with ▁ for spaces, bytes for rare characters, BOS, OpenChat's mark."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True, prepend_scheme="never")  # merges within words
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=size, special_tokens=special, limit_alphabet=160, show_progress=False)
    tokenizer.train_from_iterator((line.replace("\n", " ") for line in lines), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are text; the trainer takes them for special tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = None
    return with_bos(tokenizer, "openchat", extra_special_tokens=["<|end_of_turn|>"])


def unigram(lines: Iterable[str], size: int) -> Any:
    """A tokenizer of the Unigram kind, with byte fallback, BOS and Vicuna's template."""
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers
    from tokenizers.models import Unigram
    from tokenizers.trainers import UnigramTrainer

    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    limits = {"vocab_size": size - 256, "special_tokens": special, "unk_token": "<unk>"}
    trainer = UnigramTrainer(**limits, show_progress=False)
    tokenizer.train_from_iterator((line.replace("\n", " ") for line in lines), trainer)
    state = json.loads(tokenizer.to_str())
    pieces = state["model"]["vocab"]
    pieces[3:3] = [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return with_bos(tokenizer, "vicuna")


def with_bos(tokenizer: Any, template: str, **more: Any) -> Any:
    """The tokenizer for transformers: decodes ▁ and bytes, and puts ``<s>`` before every text."""
    from tokenizers import decoders, processors
    from transformers import PreTrainedTokenizerFast

    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **more)
    fast.chat_template = (TEMPLATES / f"{template}.jinja").read_text("utf-8")
    return fast


def write_models(folder: Path, lines: list[str], seed: int) -> None:
    """Folders named as ``MODELS``: untrained models of some 1.5 million parameters, with tokenizers."""
    import torch
    import transformers

    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 8192}
    shape |= {"hidden_size": 128, "intermediate_size": 384}
    grouped = {**shape, "num_key_value_heads": 2}
    wider = {**grouped, "hidden_size": 160, "intermediate_size": 448, "tie_word_embeddings": True}
    for model, tokenizer, layout, size in (
        ("pivot", sentencepiece_bpe(lines, 4000), "Mistral", grouped),
        ("source", byte_level_bpe(lines, 6000), "Qwen2", wider),
        ("unigram", unigram(lines, 3000), "Llama", grouped),
        ("small", sentencepiece_bpe(lines, 1500), "GPTNeoX", shape),
    ):
        rows = len(tokenizer)
        if layout == "Qwen2":  # as its 152,064 rows for 151,646 tokens
            rows = -(-rows // 128) * 128 + 128
        config = getattr(transformers, f"{layout}Config")(vocab_size=rows, **size)
        getattr(transformers, f"{layout}ForCausalLM")(config).save_pretrained(folder / model)
        tokenizer.save_pretrained(folder / model)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=CHATS, show_default=True)
@click.option("--conversations", "number", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--models", type=click.Path(path_type=Path), help="Write four models into this folder.")
def main(out: Path, number: int, seed: int, models: Path | None) -> None:
    rows = list(islice(conversations(seed), number))
    write_jsonl(out, rows)
    click.echo(f"{out}: {number:,} conversations, {out.stat().st_size:,} bytes")
    if models is None:
        return
    write_models(models, list(texts(rows)), seed)
    for model in MODELS:
        click.echo(
            f"\nfusion-trainer extract --data {out} --pivot {models / 'pivot'} \\\n"
            f"  --model {models / model} --output {models / 'stores' / model}"
        )


if __name__ == "__main__":
    main()
