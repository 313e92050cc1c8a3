"""Published representations → dialogues and stores, without a forward pass.

* Rows of the pivot become the pivot's store. The dialogues are made from them unless they exist.
* Rows of a source become the source's store, for ``align``. The source read the pivot's text with its own
  end-of-turn marker.
* Rows that a source was aligned to become both the pivot's store and the aligned store, for ``train``.

Shards are written as in an extraction, so an interrupted import resumes."""

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fusion_trainer.config import ImportConfig
from fusion_trainer.data.conversations import bad_rows_message, kinds_of_problems
from fusion_trainer.data.dialogues import VERSION, Dialogues, write_dialogues
from fusion_trainer.data.readers import DIALOGUES, Reader, end_ids, reader_with_own_end
from fusion_trainer.published.distributions import Codec, are_normalised
from fusion_trainer.published.matching import UNKNOWN, match, read_all
from fusion_trainer.published.report import import_report
from fusion_trainer.published.rows import Published, RowError, open_published, row_tokens
from fusion_trainer.published.texts import BlockMaker
from fusion_trainer.published.write_store import Aligned, Transcription
from fusion_trainer.representations.extract import shard_starts
from fusion_trainer.representations.store import ALIGNED, ALIGNED_VERSION, MANIFEST, RepresentationStore
from fusion_trainer.representations.store_writer import StoreWriter, demand_free
from fusion_trainer.text.tokenizer import TextTokenizer, load_tokenizer
from varm_common.console import is_quiet
from varm_common.errors import UserError, demand_same, listed
from varm_common.files import fingerprint, sha256_of
from varm_common.models import config_fingerprint, local_folder, weights_fingerprint

__all__ = ["import_rows"]

SAMPLE = 64
"""Rows that show which token ends an answer, and whether logits are log-probabilities."""


def import_rows(config: ImportConfig) -> tuple[RepresentationStore, str]:
    """Make the store that ``config`` describes; what is already there is kept.

    Returns:
        The store, and a report of what could not be carried over.

    Raises:
        UserError: The data cannot be read, rows cannot be used, or models, dialogues and data do not fit.
    """
    for folder in (config.output, *([config.pivot_store] if config.pivot_store else [])):
        demand_free(folder)
    published = open_published(config.data, config.data_name, config.data_split, config.aligned_source)
    return Importer(config, published).run()


class Importer:
    """The opened inputs of an import."""

    def __init__(self, config: ImportConfig, published: Published) -> None:
        self.config, self.published = config, published
        code = config.trust_remote_code
        self.folder, self.commit = local_folder(config.pivot, config.pivot_revision, code=code)
        self.pivot = load_tokenizer(self.folder, config.pivot, code)
        source = self.folder, self.commit
        if config.model:
            source = local_folder(config.model, config.revision, weights=False, code=code)
        self.source_folder, self.source_commit = source
        self.source = load_tokenizer(self.source_folder, config.model or config.pivot, code)
        if published.aligned and self.source.sha256 == self.pivot.sha256:
            click.echo(
                f"note: {config.model} has the pivot's tokenizer. --model names the source that was aligned, not "
                "a target: the token that ends its answers is taken from it",
                err=True,
            )
        self.of_pivot = self.source_folder.resolve() == self.folder.resolve()
        if published.aligned and (self.of_pivot or config.pivot_store is None):
            missing = "--pivot-store for the pivot's store" if config.pivot_store is None else "--model"
            raise UserError(f"the data is aligned to the pivot: give {missing} too")
        self.skip = config.bad_rows == "skip"
        self.problems: list[tuple[str, str]] = []
        self._row_of: NDArray[np.int64] | None = None
        self.dialogues = self._dialogues()

    def run(self) -> tuple[RepresentationStore, str]:
        reader, folder = Reader(self.pivot, DIALOGUES), self.config.pivot_store
        if not self.published.aligned:
            store = self._own_store(reader if self.of_pivot else self._source_reader(), self.config.output)
        else:
            assert folder is not None
            there = (folder / MANIFEST).is_file()
            own = RepresentationStore(folder) if there else self._own_store(reader, folder)
            own.demand(data=self.dialogues.fingerprint, tokenizer=self.pivot.sha256, top_k=self.published.k)
            store = self._aligned_store(reader, own)
        return store, import_report(store, self.dialogues, len(self.published), self.problems)

    # The dialogues

    def _dialogues(self) -> Dialogues:
        request = {
            "published": self.published.fingerprint,
            "tokenizer": self.pivot.sha256,
            "template": None,
            "bad_rows": self.config.bad_rows,
            "version": VERSION,
        }
        path = self.config.dialogues or self.config.output.parent / f"dialogues-{fingerprint(request)[:12]}"
        if path.exists():
            dialogues = Dialogues(path)
            theirs = dialogues.manifest["request"].get("tokenizer")
            title = f"the dialogues in `{path}` were made with the tokenizer of another pivot:"
            demand_same(title, {"tokenizer": self.pivot.sha256}, {"tokenizer": theirs})
            return dialogues
        if not self.of_pivot and not self.published.aligned:
            raise UserError(
                "the dialogues are not there; import the pivot's representations of the same data first, and give "
                "their dialogues with --dialogues"
            )
        maker, published = BlockMaker(self.pivot), self.published
        rows = tqdm(published.tokens(), total=len(published), unit="row", desc="dialogues", disable=is_quiet())

        def blocks() -> Any:
            yield from maker.blocks(published, rows)
            self._refuse(maker.problems)
            if 2 * maker.report.kept <= maker.report.conversations:
                raise UserError(
                    f"only {maker.report.kept} of {maker.report.conversations} rows can be read with the "
                    f"tokenizer of {self.config.pivot}:{listed(kinds_of_problems(maker.problems))}"
                )
            maker.report.dropped["not a usable row"] += len(maker.problems)

        write_dialogues(path, blocks(), maker, request)
        return Dialogues(path)

    def _refuse(self, problems: Sequence[tuple[str, str]]) -> None:
        if problems and not self.skip:
            raise UserError(bad_rows_message(problems))
        self.problems += problems

    # How the source read them

    def _source_reader(self) -> Reader:
        """A source read the pivot's text with the token of its own that ends an answer."""
        return reader_with_own_end(self.source, self._source_end(), self.pivot, self.dialogues.ends)

    def _source_end(self) -> int | None:
        """The token that ends most answers of the source's rows; its EOS if the rows are the pivot's."""
        if self.published.aligned:
            eos: int | None = self.source.tokenizer.eos_token_id
            return eos
        ends: Counter[int] = Counter()
        for _, tokens in islice(self.published.tokens(), SAMPLE):
            if not isinstance(tokens, RowError):
                last = tokens.learnt & ~np.append(tokens.learnt[1:], False)
                ends.update(token for token in tokens.ids[last].tolist() if token in self.source.special)
        return ends.most_common(1)[0][0] if ends else None

    # The stores

    def _matches(self, reader: Reader) -> NDArray[np.int64]:
        """The row of each block; the pivot's and the aligned store of one import share them."""
        if self._row_of is not None:
            return self._row_of
        dialogues, total = self.dialogues, len(self.dialogues)
        blocks = tqdm(read_all(dialogues, reader), total=total, unit="block", desc="match", disable=is_quiet())
        row_of, unmatched = match(dialogues, reader, self.published.tokens(), blocks)
        problems = [(self.published.where(row), problem) for row, problem in unmatched]
        if dialogues.manifest["request"].get("published") != self.published.fingerprint:
            self._refuse(problems)  # otherwise they have been reported: they made no block
        if 2 * (matched := int((row_of != UNKNOWN).sum())) <= total:
            raise UserError(
                f"only {matched} of the {total} blocks in `{dialogues.folder}` have a row in the data:"
                f"{listed(kinds_of_problems(problems))}"
            )
        self._row_of = row_of
        return row_of

    def _codec(self, tokenizer: TextTokenizer, aligned: bool) -> Codec:
        logits = []
        for table in self.published.table(range(min(SAMPLE, len(self.published)))):
            try:
                tokens = row_tokens(*table)
                values = self.published.values(table, tokens, aligned=aligned)
            except RowError:
                continue
            largest, _ = values.at(np.flatnonzero(tokens.learnt[1:]), self.published.k)
            logits.append(largest[np.isfinite(largest).sum(1) > 1])
        return Codec(self.published.k, tokenizer.vocabulary, bool(logits) and are_normalised(logits))

    def _own_store(self, reader: Reader, output: Path) -> RepresentationStore:
        config, tokenizer = self.config, reader.tokenizer
        of_pivot = reader.way == DIALOGUES
        codec = self._codec(tokenizer, aligned=False)
        folder = self.folder if of_pivot else self.source_folder
        identity = {
            "model": config.pivot if of_pivot else config.model,
            "revision": self.commit if of_pivot else self.source_commit,
            "weights": weights_fingerprint(folder, config.pivot) if of_pivot else None,
            "config": config_fingerprint(folder, config.trust_remote_code) if of_pivot else None,
            "tokenizer": tokenizer.sha256,
            "template": self.dialogues.manifest["request"].get("template"),
            "data": self.dialogues.fingerprint,
            **reader.identity,
            "ends": end_ids(reader, folder),
            **self._about(codec),
        }
        if reader.marker:
            end = tokenizer.tokenizer.convert_tokens_to_ids(reader.marker[1])
            identity["ends"] = [end, *(token for token in identity["ends"] if token != end)]
        return self._write(output, identity, reader, codec)

    def _about(self, codec: Codec) -> dict[str, Any]:
        return {
            "top_k": codec.k,
            "vocabulary": codec.size,
            "dtype": "published",
            "attention": None,
            "load_in": None,
            "shard_tokens": self.config.shard_tokens,
            "published": self.published.fingerprint,
            "log_probabilities": codec.normalised,
            "unknown": ["gold_logprob", *([] if codec.normalised else ["tail"])],
        }

    def _aligned_store(self, reader: Reader, own: RepresentationStore) -> RepresentationStore:
        config, codec = self.config, self._codec(self.pivot, aligned=True)
        source_reader = self._source_reader()
        marker = source_reader.marker
        about = self._about(codec)
        about["unknown"] = sorted({*about["unknown"], *own.identity.get("unknown", [])})
        identity = {
            "kind": ALIGNED,
            "version": ALIGNED_VERSION,
            "model": config.model,
            "pivot": config.pivot,
            "pivot_revision": self.commit,
            "pivot_store": sha256_of(own.folder / MANIFEST),
            "source_store": None,
            **{name: own.identity[name] for name in ("tokenizer", "template", "data")},
            "positions": "published",
            "unpaired": config.unpaired,
            "reading": source_reader.identity["reading"],
            "map": "published",
            "columns": self.published.aligned[0] if self.published.aligned else None,
            **about,
        }
        end = self.pivot.tokenizer.get_vocab().get(marker[1]) if marker else None
        aligned = Aligned(own, source_reader, end, config.unpaired)
        return self._write(config.output, identity, reader, codec, aligned)

    def _write(
        self, output: Path, identity: dict[str, Any], reader: Reader, codec: Codec, aligned: Aligned | None = None
    ) -> RepresentationStore:
        versions = {package: version(package) for package in ("datasets", "tokenizers", "varm-merge")}
        starts = shard_starts(self.dialogues.lengths, self.config.shard_tokens)
        writer = StoreWriter(output, identity, starts, versions)
        writer.begin()
        if not writer.finished:
            try:
                row_of = self._matches(reader)
                work = Transcription(self.published, row_of, self.dialogues, reader, codec, self.skip, aligned)
                work.write(writer)
            except BaseException:
                writer.abandon()
                raise
            self.problems += work.problems
        return RepresentationStore(output)
