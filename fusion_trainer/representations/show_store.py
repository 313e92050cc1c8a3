"""Prints a store: its manifest, and a row as a table of tokens."""

from pathlib import Path

import numpy as np

from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import DIALOGUES, Reader, reader_of_store
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.representations.store_tokenizer import tokenizer_of
from fusion_trainer.text.tokenizer import TextTokenizer, supervised_positions

__all__ = ["show_manifest", "show_row"]


def show_manifest(store: RepresentationStore) -> str:
    """The store's inputs and its size, one line each."""
    facts = {name: value for name, value in store.identity.items() if name not in ("jinja", "jinja_with_tools")}
    facts |= {name: value for name, value in store.manifest.items() if isinstance(value, int)}
    facts |= {"shards": len(store.manifest["shards"]), "bytes": store.bytes}
    facts["made with"] = " and then ".join(map(str, store.manifest["made_with"]))
    width = max(map(len, facts))
    return "\n".join(f"{key:{width}}  {value}" for key, value in facts.items())


def show_row(
    store: RepresentationStore, row: int, positions: int, dialogues: Path | None, tokenizer: str | None, code: bool
) -> str:
    """A row's top k, a line per position: the token that follows, its log-probability, and the k best tokens.

    ``dialogues`` is the folder the store was made from, by default the one beside the store; without it the tokens
    that follow are not known. ``tokenizer`` is where the model's tokenizer is, if it has moved.

    Raises:
        UserError: The tokenizer or the dialogues are not those the store was made with.
    """
    reader = tokenizer_of(store, tokenizer, code)
    stored = store[row]
    golds = ["?"] * len(stored)
    place = f"conversation {stored.conversation!r}, block {stored.block}"
    head = f"\nrow {row}: {place}, {len(stored)} supervised tokens"
    if (prepared := _dialogues(store, dialogues)) is not None:
        how = Reader(reader, DIALOGUES) if store.aligned else reader_of_store(store.identity, reader)
        reading = how.read(prepared[row])
        tokens = reader.encode([reading.text])[0]
        golds = [_shown(reader, int(tokens.ids[p + 1])) for p in supervised_positions(tokens, reading.spans)]
        first = reading.spans[0][0] if reading.spans else 0
        before = reading.text.encode()[:first].decode(errors="replace")
        bos = "".join(reader.tokenizer.convert_ids_to_tokens(reader.prefix))
        head += f"\nread before the first answer: {bos + before.removeprefix(bos)!r}\n{reading.text}\n"
    lines = [head, f"{'next token':16} {'log p':>7}  {'tail':>6}  top {store.k}"]
    for number in range(min(positions, len(stored))):
        shares = np.exp(stored.logprobs[number].astype(np.float32))
        entries = zip(stored.ids[number], shares, strict=True)
        best = "  ".join(f"{_shown(reader, int(token))} {share:.3f}" for token, share in entries)
        gold, tail = float(stored.gold_logprob[number]), float(stored.tail[number])
        lines.append(f"{golds[number]:16} {gold:7.3f}  {tail:6.4f}  {best}")
    if len(stored) > positions:
        lines.append(f"… {len(stored) - positions} more; --positions shows them")
    return "\n".join(lines)


def _shown(reader: TextTokenizer, token: int) -> str:
    return repr(reader.tokenizer.decode([token])) if token in reader.vocabulary else f"<{token}>"


def _dialogues(store: RepresentationStore, folder: Path | None) -> Dialogues | None:
    if folder is None:
        return Dialogues.beside(store.folder, store.identity["data"])
    prepared = Dialogues(folder)
    store.demand(data=prepared.fingerprint)
    return prepared
