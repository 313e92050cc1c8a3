"""The two models of an alignment, opened in this process and in worker processes."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fusion_trainer.alignment.pair_counts import Corpus
from fusion_trainer.alignment.positions import CONTAINED
from fusion_trainer.alignment.spread import Spread
from fusion_trainer.alignment.vocabulary import Ends, FirstTokens, Vocabularies, VocabularyMap
from fusion_trainer.config import AlignConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.data.readers import DIALOGUES, Reader, reader_of_store
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.representations.store_tokenizer import tokenizer_of
from fusion_trainer.text.tokenizer import TextTokenizer
from varm_common.errors import UserError

__all__ = ["Sides", "in_processes", "open_sides"]


@dataclass
class Sides:
    """The two models: their stores, how they read, and the dialogues that they share.

    ``map`` and ``corpus`` are None until they are built; ``spread`` if it is off.
    """

    config: AlignConfig
    pivot_store: RepresentationStore
    source_store: RepresentationStore
    dialogues: Dialogues
    pivot_reader: Reader
    source_reader: Reader
    map: VocabularyMap | None = None
    spread: Spread | None = None
    corpus: Corpus | None = None

    @property
    def contained(self) -> int | None:
        """For ``dtw``, the cost of an edit if one token contains the other; None for ``boundary``."""
        return None if self.config.positions == "boundary" else CONTAINED[self.config.dtw_cost]

    @property
    def pivot(self) -> TextTokenizer:
        return self.pivot_reader.tokenizer

    @property
    def source(self) -> TextTokenizer:
        return self.source_reader.tokenizer

    @property
    def ends(self) -> Ends:
        """The ids that end a turn of either model."""
        pivot = [*self.dialogues.ends, self.pivot.tokenizer.eos_token_id]
        return Ends(tuple(self.source_store.identity["ends"]), pivot[0])

    @property
    def maps(self) -> Path:
        """The folder for files that several alignments share: maps, counts, probabilities by id."""
        return self.config.maps or self.config.output.parent


def open_sides(config: AlignConfig, checked: bool = False) -> Sides:
    """Open both stores, their dialogues and their tokenizers.

    ``checked``: another process has compared the stores with their hashes.

    Raises:
        UserError: The stores are of different dialogues, one is already aligned, or a tokenizer has changed.
    """
    folders = config.pivot_store, config.source_store
    pivot_store, source_store = (RepresentationStore(folder, checked) for folder in folders)
    data = pivot_store.identity["data"]
    source_store.demand(data=data)
    dialogues = Dialogues(config.dialogues) if config.dialogues else Dialogues.beside(pivot_store.folder, data)
    if dialogues is None:
        raise UserError(
            f"the dialogues of the store `{pivot_store.folder}` are not next to it; give their folder "
            "with --dialogues"
        )
    pivot_store.demand(data=dialogues.fingerprint)
    for store in (pivot_store, source_store):
        if store.aligned:
            raise UserError(f"the store `{store.folder}` is already aligned; give the source's own store")
    if pivot_store.identity["reading"] != DIALOGUES:
        raise UserError(
            f"`{pivot_store.folder}` is not a store of the pivot: its model was queried in its own chat template"
        )
    pivot = tokenizer_of(pivot_store, config.pivot_tokenizer, config.trust_remote_code)
    source = tokenizer_of(source_store, config.source_tokenizer, config.trust_remote_code)
    readers = Reader(pivot, DIALOGUES), reader_of_store(source_store.identity, source)
    sides = Sides(config, pivot_store, source_store, dialogues, *readers)
    if config.spread:
        sides.spread = Spread(source, FirstTokens(Vocabularies(source, pivot, sides.ends)))
    return sides


_sides: Sides | None = None
"""The models that this worker process has opened."""


def in_processes(sides: Sides, work: Callable[[Sides, int], Any], tasks: Sequence[int]) -> Iterator[Any]:
    """The results of ``work(sides, task)`` for every task, in order, from ``config.workers`` processes.

    Raises:
        UserError: A worker was killed.
    """
    number = min(sides.config.workers or os.cpu_count() or 1, len(tasks))
    if number <= 1:
        yield from (work(sides, task) for task in tasks)
        return
    arguments = sides.config, sides.map, sides.corpus, os.getpid()
    with ProcessPoolExecutor(number, get_context("spawn"), _begin_worker, arguments) as pool:
        try:
            following = iter(tasks)
            begun = deque(pool.submit(_work, work, task) for task in islice(following, number + 1))
            while begun:  # no more results wait to be taken than there are processes
                result = begun.popleft().result()
                begun.extend(pool.submit(_work, work, task) for task in islice(following, 1))
                yield result
                del result
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely because memory ran out. Run the same command again with "
                f"fewer --workers than {number}; it resumes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker(config: AlignConfig, made: VocabularyMap | None, corpus: Corpus | None, parent: int) -> None:
    global _sides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _sides = open_sides(config, checked=True)
    _sides.map, _sides.corpus = made, corpus


def _end_with(parent: int) -> None:
    """End this process when its parent is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(work: Callable[[Sides, int], Any], task: int) -> Any:
    assert _sides is not None
    return work(_sides, task)
