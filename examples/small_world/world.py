"""A small world: chats whose answers can be checked, and models of four architectures, each good at some of them.

\b
  python examples/small_world/world.py DIR            a minute and a half on two cores
  python examples/small_world/world.py DIR --seed 2

writes `chats.jsonl` (to fuse on), `corrected.jsonl` (the same without its wrong answers), `held_out.jsonl` (to
score on), and four models. Each is trained from nothing on
conversations of its own; no two share architecture, size or tokenizer:

  pivot     Llama, BPE                  saying things twice, and a little of everything
  letters   GPT-NeoX, byte-level BPE    sorting and reversing letters
  numbers   Mistral, unigram            sums and units
  almanac   Mixtral, another BPE        dates, and who has what in a land that does not exist

The chats are like collected ones: of all skills, two answers each, and one answer in four is wrong. The sources
have seen none of them, and right answers only. What is held out is asked nowhere else: no model and no chat has
that very question.
"""

import json
import math
import os
import random
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

Question = tuple[str, str]
"""What is asked, and the answer."""

TEMPLATE = Path(__file__).with_name("chat.jinja")

# Skills

LETTERS = "abcdefgh"
MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
MONTHS += ["August", "September", "October", "November", "December"]
UNITS = {("m", "cm"): 100, ("km", "m"): 1000, ("kg", "g"): 1000, ("cm", "mm"): 10}
UNITS |= {("decades", "years"): 10, ("centuries", "years"): 100}
PEOPLE = ["Bolo", "Mira", "Tandu", "Keli", "Ossa", "Rufa", "Ilko", "Zena", "Parli", "Dovo", "Nimi", "Garu"]
PEOPLE += ["Wenda", "Sorel", "Tavi", "Ulmo", "Brona", "Fesk", "Hilda", "Jarro", "Lumi", "Oskar", "Pella", "Rondo"]
PEOPLE += ["Quill", "Yarra", "Vosk", "Edda", "Amos", "Cilka"]
PLACES = ["Taran", "Velm", "Osk", "Lindu", "Harn", "Moray", "Quell", "Sibb"]
TRADES = ["baker", "smith", "miller", "sailor", "tailor", "weaver", "potter", "cooper"]
PETS = ["goat", "crow", "hare", "toad", "mole", "lynx", "swan", "newt"]
ABOUT = {"home": PLACES, "trade": TRADES, "pet": PETS}


def letters(verb: str, answer: Callable[[list[str]], Iterable[str]], rng: random.Random) -> Question:
    word = rng.choices(LETTERS, k=rng.randint(3, 5))
    return f"{verb} {' '.join(word)}", " ".join(answer(word))


def add(rng: random.Random) -> Question:
    """Without a carry."""
    pairs = [(digit, rng.randint(0, 9 - digit)) for digit in (rng.randint(1, 8), rng.randint(0, 9))]
    first, second = (int("".join(map(str, digits))) for digits in zip(*pairs, strict=True))
    return f"add {first} and {second}", str(first + second)


def units(rng: random.Random) -> Question:
    (unit, other), number = rng.choice(list(UNITS)), rng.randint(2, 99)
    return f"{number} {unit} in {other}", f"{number * UNITS[unit, other]} {other}"


def dates(rng: random.Random) -> Question:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2029)
    return f"{day} {MONTHS[month]} {year} as ISO", f"{year}-{1 + month:02}-{day:02}"


def facts(rng: random.Random) -> Question:
    """Of a land that does not exist."""
    person, what = rng.choice(PEOPLE), rng.choice(list(ABOUT))
    wordings = ["the {what} of {person}", "{person} has which {what}", "tell me {person} 's {what}"]
    wording = rng.choice([*wordings, "{what} ? {person}"])
    return wording.format(what=what, person=person), random.Random(f"{person} {what}").choice(ABOUT[what])


SKILLS: dict[str, Callable[[random.Random], Question]] = {
    "twice": partial(letters, "twice", lambda word: [*word, *word]),
    "sort": partial(letters, "sort", sorted),
    "reverse": partial(letters, "reverse", reversed),
    "add": add,
    "units": units,
    "dates": dates,
    "facts": facts,
}


def questions(skill: str, rng: random.Random, held_out: bool) -> Iterator[Question]:
    """Without end; which questions are held out, one in eight, is told by their checksum.

    Settings were chosen with other eighths held out, of seed 0; what the demo tells is of the sixth.
    """
    while True:
        question, answer = SKILLS[skill](rng)
        if held_out == (zlib.crc32(question.encode()) % 8 == 5):
            yield question, answer


# Conversations

Chat = list[Question]


def chats(mixture: dict[str, float], number: int, rng: random.Random) -> list[tuple[str, Chat]]:
    """So many conversations of two questions of one skill, which is drawn as often as ``mixture`` says."""
    asked = {skill: questions(skill, rng, held_out=False) for skill in mixture}
    drawn = rng.choices(list(mixture), list(mixture.values()), k=number)
    return [(skill, [next(asked[skill]), next(asked[skill])]) for skill in drawn]


def spoiled(rows: Sequence[tuple[str, Chat]], share: float, rng: random.Random) -> list[tuple[str, Chat]]:
    """The same, a share of the answers replaced by those to other questions of the skill."""
    answers: dict[str, list[str]] = {}
    for skill, chat in rows:
        answers.setdefault(skill, []).extend(answer for _, answer in chat)
    return [
        (skill, [(asked, rng.choice(answers[skill]) if rng.random() < share else right) for asked, right in chat])
        for skill, chat in rows
    ]


def held_out(number: int, rng: random.Random) -> list[tuple[str, Chat]]:
    """So many different questions of each skill, or all there are."""
    rows = []
    for skill in SKILLS:
        unlike = dict(islice(questions(skill, rng, held_out=True), 20 * number))
        rows += [(skill, [question]) for question in islice(unlike.items(), number)]
    return rows


def write_chats(path: Path, rows: Sequence[tuple[str, Chat]]) -> None:
    """As ShareGPT, with ids like ``sort/17``."""
    with path.open("w", encoding="utf-8") as file:
        for number, (skill, chat) in enumerate(rows):
            turns = [turn for asked, answer in chat for turn in (("human", asked), ("gpt", answer))]
            conversation = [{"from": who, "value": text} for who, text in turns]
            file.write(json.dumps({"id": f"{skill}/{number}", "conversations": conversation}) + "\n")


# Tokenizers: three kinds, each as models have it


def byte_level(texts: list[str], size: int) -> Tokenizer:
    """As GPT-NeoX's; letters and digits meet in one piece where the texts make that worth it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train_bpe(tokenizer, texts, vocab_size=size, initial_alphabet=alphabet, special_tokens=["</s>"])
    return tokenizer


def pieces(texts: list[str], size: int) -> Tokenizer:
    """As Llama's."""
    tokenizer = as_pieces(Tokenizer(models.BPE(unk_token="<unk>")))
    train_bpe(tokenizer, texts, vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"])
    return tokenizer


def train_bpe(tokenizer: Tokenizer, texts: list[str], **settings: Any) -> None:
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **settings))


def halves(texts: list[str], size: int) -> Tokenizer:
    """Unigram, as T5's; its pieces are the first four characters of a word, and the rest of it."""
    words = re.findall(r"[ \n]?[^ \n\d]*", "".join(texts).replace("</s>", ""))
    counts = Counter(half for word in words for half in (word[:4], word[4:]) if half)
    single = "".join(texts)
    kept = {**dict.fromkeys(single, 1), **dict(counts.most_common(size))}
    scores = {piece.replace(" ", "▁"): math.log(count / counts.total()) for piece, count in kept.items()}
    special = [(piece, 0.0) for piece in ("<unk>", "<s>", "</s>")]
    return as_pieces(Tokenizer(models.Unigram([*special, *scores.items()], unk_id=0)))


def as_pieces(tokenizer: Tokenizer) -> Tokenizer:
    """`▁` for a space, digits one by one, `<s>` before every text."""
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    split = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.Split("▁", "merged_with_next")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


# Models


@dataclass(frozen=True)
class Model:
    """One of the four: architecture, tokenizer, and what it learns from."""

    config: Callable[..., Any]
    size: dict[str, int]
    tokenizer: Callable[[list[str], int], Tokenizer]
    pieces: int
    best: Sequence[str]
    others: float  # how often another skill is drawn, where one of the best is drawn once
    steps: float = 1.0  # of what the sources take


def width(hidden: int, layers: int, heads: int) -> dict[str, int]:
    widths = {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    return {**widths, "num_hidden_layers": layers, "num_attention_heads": heads}


SPARSE = {**width(80, 3, 4), "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "pivot": Model(transformers.LlamaConfig, width(96, 3, 4), pieces, 320, ["twice"], 0.5, 0.8),
    "letters": Model(transformers.GPTNeoXConfig, width(128, 3, 4), byte_level, 400, ["sort", "reverse"], 0.05),
    "numbers": Model(transformers.MistralConfig, width(112, 3, 4), halves, 300, ["add", "units"], 0.05),
    "almanac": Model(transformers.MixtralConfig, SPARSE, pieces, 400, ["dates", "facts"], 0.05),
}
BATCH = 64
LEARNING_RATE = 3e-3


def rendered(chat: Chat) -> list[tuple[str, bool]]:
    """A conversation as the template writes it, in pieces: text, and whether it is the assistant's.

    No tokenizer here makes one token of what a space or a line's end divides.
    """
    return [
        part
        for question, answer in chat
        for part in ((f"Q: {question}\nA:", False), (f" {answer}</s>", True), ("\n", False))
    ]


def make_model(name: str, folder: Path, steps: int, seed: int) -> str:
    """Train one of the models and save it; a line that says how it went."""
    torch.set_num_threads(1)
    chosen, rng = MODELS[name], random.Random(f"{name} {seed}")
    mixture = {skill: 1.0 if skill in chosen.best else chosen.others for skill in SKILLS}
    number = max(1, round(steps * chosen.steps))
    learned = [chat for _, chat in chats(mixture, number * BATCH, rng)]
    everything = dict.fromkeys(SKILLS, 1.0)
    seen = ["".join(text for text, _ in rendered(chat)) for _, chat in chats(everything, 2000, rng)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chosen.tokenizer(seen, chosen.pieces),
        eos_token="</s>",
        pad_token="</s>",
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
        **({} if chosen.tokenizer is byte_level else {"bos_token": "<s>", "unk_token": "<unk>"}),
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    heads = {} if chosen.config is transformers.GPTNeoXConfig else {"num_key_value_heads": 2}
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "tie_word_embeddings": False}
    config = chosen.config(**chosen.size, **heads, **shape, **ids)
    model = transformers.AutoModelForCausalLM.from_config(config)
    loss = train(model, tokenizer, learned)
    model.save_pretrained(folder)
    parameters = f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} pieces"
    return f"{name:8} {type(model).__name__}, {parameters}: {number} steps, loss {loss:.3f}"


def train(model: Any, tokenizer: Any, learned: Sequence[Chat]) -> float:
    """Train in place to give the answers; the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    steps = len(learned) // BATCH
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 20 + 1, steps)
    rows, losses = encoded(tokenizer, learned), []
    for start in range(0, steps * BATCH, BATCH):
        ids_BL, labels_BL = (
            pad_sequence([torch.tensor(row) for row in column], batch_first=True, padding_value=filler)
            for column, filler in zip(zip(*rows[start : start + BATCH], strict=True), (0, -100), strict=True)
        )
        loss = model(input_ids=ids_BL, labels=labels_BL).loss  # padding at the end: nothing before it sees it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def encoded(tokenizer: Any, learned: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
    """Ids, and the labels: those of the answers."""
    parts = [rendered(chat) for chat in learned]
    ids = iter(tokenizer([text for row in parts for text, _ in row], add_special_tokens=False)["input_ids"])
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = []
    for row in parts:
        tokens, labels = [*bos], [-100] * len(bos)
        for _, is_answer in row:
            tokens += (own := next(ids))
            labels += own if is_answer else [-100] * len(own)
        rows.append((tokens, labels))
    return rows


def end_with_parent() -> None:
    """So that nothing goes on when this program is killed."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=int, default=300, show_default=True, help="Of a source's training.")
@click.option("--conversations", type=int, default=800, show_default=True, help="In chats.jsonl.")
@click.option("--wrong", type=float, default=0.25, show_default=True, help="Share of wrong answers there.")
@click.option("--scored", type=int, default=100, show_default=True, help="Questions of each skill held out.")
def main(folder: Path, seed: int, steps: int, conversations: int, wrong: float, scored: int) -> None:
    """The whole world; the models two at a time, in processes of one thread each."""
    folder.mkdir(parents=True, exist_ok=True)
    right = chats(dict.fromkeys(SKILLS, 1.0), conversations, random.Random(f"chats {seed}"))
    write_chats(folder / "corrected.jsonl", right)
    write_chats(folder / "chats.jsonl", spoiled(right, wrong, random.Random(f"wrong {seed}")))
    write_chats(folder / "held_out.jsonl", held_out(scored, random.Random("held out")))
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=end_with_parent) as pool:
        waiting = [pool.submit(make_model, name, folder / name, steps, seed) for name in reversed(MODELS)]
        for model in waiting:
            click.echo(model.result())


if __name__ == "__main__":
    main()
