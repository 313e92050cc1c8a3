"""What a source's token says of the later tokens of the pivot.

The map ``prefix`` sends a source token's probability to the first pivot token of its text. The pivot then has to
predict the rest of that text, at positions where the source has no boundary. There the pivot has read the text u
since the source's last boundary. The source's distribution at that boundary, restricted to tokens that begin with
u, says what follows u: the probability of such a token goes to the first pivot token of its text after u.

Tokens that are u itself say nothing of what follows, so their probability is tail. The source's own tail is
unknown; it keeps its share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.alignment.map_distributions import fill
from fusion_trainer.alignment.pairing import Read
from fusion_trainer.alignment.vocabulary import FirstTokens
from fusion_trainer.data.answers import Answer
from fusion_trainer.representations.store import Representation
from fusion_trainer.text.tokenizer import TextTokenizer

__all__ = ["Rest", "Spread", "conditional"]

MOST_BYTES = int(np.iinfo(np.uint16).max)


@dataclass(frozen=True)
class Rest:
    """What follows the bytes that were read: probabilities of the pivot's ids, and of everything else."""

    shares: Mapping[int, float]
    tail: float
    begins: float  # probability that the source gives to tokens that begin with these bytes


def conditional(
    tokens: Mapping[bytes, float], tail: float, read: bytes, first: Callable[[bytes], int | None]
) -> Rest | None:
    """The distribution after ``read``; None if no token continues it.

    Args:
        tokens: The source's probabilities by the tokens' texts.
        tail: Its probability of all other tokens.
        read: What was read since the source's last boundary.
        first: The pivot's first token of a text, if it has one.
    """
    begins = {text: p for text, p in tokens.items() if text.startswith(read) and p > 0}
    known = sum(begins.values())
    shares: dict[int, float] = {}
    for text, p in begins.items():
        if len(text) > len(read) and (image := first(text[len(read) :])) is not None:
            shares[image] = shares.get(image, 0.0) + p / known * (1 - tail)
    if not shares:
        return None
    return Rest(shares, max(0.0, 1.0 - sum(shares.values())), known / (1 - tail))


@dataclass
class Spread:
    """Gives positions without a partner what the source's last distribution says of them."""

    source: TextTokenizer
    first_tokens: FirstTokens

    def apply(
        self,
        row: Representation,
        gold_bytes: NDArray[np.uint16],
        where: NDArray[np.bool_],
        text: bytes,
        sides: tuple[Read, Read],
        other: Representation,
    ) -> NDArray[np.bool_]:
        """Change the aligned row and ``gold_bytes`` in place; bool [P], the positions that have changed.

        Args:
            row: The pivot's positions.
            gold_bytes: [P].
            where: bool [P], the positions without a partner.
            text: The block as the pivot reads it.
            sides: The block as pivot and source have read it.
            other: The source's row.
        """
        changed = np.zeros(len(row), bool)
        for at, source_row, read in _continued(where, text, sides, len(other)):
            ids = other.ids[source_row].astype(np.int64).tolist()
            shares = np.exp(other.logprobs[source_row].astype(np.float64)).tolist()
            tokens: dict[bytes, float] = {}
            for token, p in zip(ids, shares, strict=True):
                if token in self.first_tokens.source_text:
                    surface = self.source.surfaces[token]
                    tokens[surface] = tokens.get(surface, 0.0) + p
            gold = self.source.surfaces[int(sides[1].tokens.ids[sides[1].positions[source_row] + 1])]
            tail = min(float(other.tail[source_row]), 1 - 1e-6)
            rest = conditional(tokens, tail, read, self.first_tokens.token)
            if rest is None or not gold.startswith(read) or gold == read:
                continue
            _put(row, at, rest)
            log_gold = float(other.gold_logprob[source_row])
            row.gold_logprob[at] = min(0.0, log_gold - np.log(max(rest.begins, np.exp(log_gold), 1e-30)))
            gold_bytes[at] = min(len(gold) - len(read), MOST_BYTES)
            changed[at] = True
        return changed


def _put(row: Representation, at: int, rest: Rest) -> None:
    k = row.ids.shape[1]
    kept = sorted(rest.shares.items(), key=lambda item: (-item[1], item[0]))[:k]
    ids = np.full((1, k), -1, np.int64)
    ids[0, : len(kept)] = [token for token, _ in kept]
    fill(ids)
    row.ids[at] = ids[0]
    row.logprobs[at] = -np.inf
    row.logprobs[at, : len(kept)] = np.log([share for _, share in kept])
    row.tail[at] = min(1.0, max(0.0, 1.0 - sum(share for _, share in kept)))


def _continued(
    where: NDArray[np.bool_], text: bytes, sides: tuple[Read, Read], stored: int
) -> Iterator[tuple[int, int, bytes]]:
    """For positions inside a source's token: their row, the source's row before it, and the bytes read since."""
    pivot, source = sides
    rows = {position: row for row, position in enumerate(source.positions[:stored].tolist())}
    contents = {answer.turn: _content(answer, text) for answer in pivot.answers}
    boundaries = {answer.turn: source.places.content(answer.turn) for answer in source.answers}
    for at in np.flatnonzero(where).tolist():
        position = int(pivot.positions[at])
        turn, byte = int(pivot.places.turn[position]), int(pivot.places.place[position])
        positions: Sequence[int] | NDArray[np.intp] = boundaries.get(turn, [])
        if byte <= 0 or not len(positions) or position in pivot.places.lead:
            continue
        before = int(np.searchsorted(source.places.place[positions], byte)) - 1
        last = int(positions[before]) if before >= 0 else -1
        if last in rows and last not in source.places.lead:
            yield at, rows[last], contents[turn][int(source.places.place[last]) : byte]


def _content(answer: Answer, text: bytes) -> bytes:
    """The bytes of an answer's content, with zeros for what its pieces leave out."""
    content = b""
    for start, stop, offset in answer.pieces:
        content = content.ljust(offset, b"\0") + text[start:stop]
    return content
