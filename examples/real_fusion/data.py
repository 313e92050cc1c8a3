"""The data of the real fusion: chats whose answers can be checked, and real prose that comes with every Python.

\b
  python examples/real_fusion/data.py DIR --seed 0

writes to DIR

  chats.jsonl      to fuse on: questions of the small world with right answers, and "Explain the … statement" with
                   the text of that topic, in parts
  documents.jsonl  to fuse on: further parts of the same topics as plain text, FuseLLM's way
  held_out.jsonl   to score on: other topics, other questions; a third part for choosing, two for reporting

The prose is that of `pydoc_data.topics`, which `help("with")` shows (PSF licence). The questions are made here, by
`examples/small_world/world.py` (Apache-2.0, like all of this project). Topics are divided into training, choosing
and held-out by the seed, so that no topic is in two of them. A conversation's id begins with its group:
`prose/with-0`, `add/7`, `document/with`, and `choosing-prose/…` for what is only chosen by.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "small_world"))
import world

PART = 400
"""Characters in a part of a topic, at most, unless a single paragraph is longer."""
SHARES = {"training": 0.6, "choosing": 0.15, "held_out": 0.25}
"""Shares of the topics."""
TRAINING_PARTS, HELD_OUT_PARTS = 1, 1
"""Parts of a topic that become chats."""
DOCUMENT_PARTS = 1
"""Further parts of a topic that become a plain document."""
CHATS, QUESTIONS = 32, 6
"""Conversations of two questions to fuse on; held-out questions of each skill, a third of them to choose by."""

Row = dict[str, Any]


@cache
def passages() -> dict[str, tuple[str, list[str]]]:
    """The title of every topic, and its paragraphs joined into parts.

    Some topics repeat others whole. A paragraph counts for the shortest topic that has it, and only there, so that
    no text is in two topics. Paragraphs that are longer than a part are left out.
    """
    found, seen = {}, set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        title, _, body = topics[name].strip().partition("\n")
        texts: list[str] = []
        for paragraph in body.strip("*=-~\n ").split("\n\n"):
            words = " ".join(paragraph.split())
            if not words or words in seen:
                continue
            seen.add(words)
            joined = f"{texts[-1]}\n\n{paragraph}" if texts else paragraph
            if texts and len(joined) <= PART:
                texts[-1] = joined
            elif len(paragraph) <= PART:
                texts.append(paragraph)
        found[name] = (title.strip('"').strip(), [text.strip("\n") for text in texts])
    return found


def prose(name: str, limit: int, group: str = "prose") -> Iterator[Row]:
    """The chats about a topic: one for each of its first parts."""
    title, texts = passages()[name]
    for number, text in enumerate(texts[:limit]):
        question = f"Explain this topic of the Python language: {title}."
        if number:
            question += f" You have ended with: {texts[number - 1].splitlines()[-1].strip()}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        yield {"id": f"{group}/{name}-{number}", "messages": turns}


def document(name: str, first: int, number: int) -> Iterator[Row]:
    """Further parts of a topic as one plain text, if there are any."""
    _, texts = passages()[name]
    if text := "\n\n".join(texts[first : first + number]):
        yield {"id": f"document/{name}", "text": text}


def split(seed: int) -> dict[str, list[str]]:
    """The names of the topics to train on, to choose by, and to report."""
    names = sorted(topics)
    random.Random(f"topics {seed}").shuffle(names)
    first, second = (round(len(names) * share) for share in (SHARES["training"], 1 - SHARES["held_out"]))
    return {"training": names[:first], "choosing": names[first:second], "held_out": names[second:]}


def as_messages(chat: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for pair in chat
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def make_data(folder: Path, seed: int) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = split(seed)
    asked = world.chats(dict.fromkeys(world.SKILLS, 1.0), CHATS, random.Random(f"chats {seed}"))
    chats = [{"id": f"{skill}/{n}", "messages": as_messages(chat)} for n, (skill, chat) in enumerate(asked)]
    chats += [row for name in names["training"] for row in prose(name, TRAINING_PARTS)]
    random.Random(f"order {seed}").shuffle(chats)
    write_rows(folder / "chats.jsonl", chats)
    further = (row for name in names["training"] for row in document(name, TRAINING_PARTS, DOCUMENT_PARTS))
    write_rows(folder / "documents.jsonl", further)
    held_out: list[Row] = []
    for number, (skill, chat) in enumerate(world.held_out(QUESTIONS, random.Random(f"held out {seed}"))):
        group = f"choosing-{skill}" if number % 3 == 0 else skill
        held_out.append({"id": f"{group}/{number}", "messages": as_messages(chat)})
    held_out += [row for name in names["choosing"] for row in prose(name, 1, "choosing-prose")]
    for name in names["held_out"]:
        held_out += prose(name, HELD_OUT_PARTS)
    write_rows(folder / "held_out.jsonl", held_out)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, seed: int) -> None:
    make_data(folder, seed)


if __name__ == "__main__":
    main()
