"""The commands that inspect and check files: ``store`` and ``vocab-map``."""

from pathlib import Path

import click

from varm_common.errors import UserError, demand_same, listed

__all__ = ["store", "vocab_map"]

PATH = click.Path(path_type=Path)


@click.group("vocab-map")
def vocab_map() -> None:
    """Inspect vocabulary maps."""


@vocab_map.command("show")
@click.argument("file", type=PATH)
@click.option("--source", help="Folder or Hub id of the source's tokenizer, if the source has moved.")
@click.option("--source-revision", help="Branch, tag or commit of --source.")
@click.option("--pivot", help="Folder or Hub id of the pivot's tokenizer, if the pivot has moved.")
@click.option("--pivot-revision", help="Branch, tag or commit of --pivot.")
@click.option(
    "--store", "store_folder", type=PATH, help="The source's store: weight ids by their probability in it."
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model repositories.")
def show_map(file: Path, store_folder: Path | None, trust_remote_code: bool, **moved_to: str | None) -> None:
    """Print how much of the source's vocabulary the map FILE covers, and which ids it does not map.

    \b
    Example:
      fusion-trainer vocab-map show aligned/vocab-map-….safetensors --store stores/solar
    """
    from fusion_trainer.alignment.coverage import coverage, mass_by_id
    from fusion_trainer.alignment.saved_map import load_map
    from fusion_trainer.representations.store import RepresentationStore
    from fusion_trainer.representations.store_tokenizer import tokenizer_at

    saved = load_map(file)
    readers = {}
    for side, (name, revision) in saved.places.items():
        other = moved_to[f"{side}_revision"] or (None if moved_to[side] else revision)
        readers[side] = tokenizer_at(moved_to[side] or name, other, trust_remote_code)
    wanted = {side: reader.sha256 for side, reader in readers.items()}
    in_map = {side: saved.identity[side] for side in wanted}
    demand_same(f"`{file}` was made for other tokenizers:", wanted, in_map)
    mass = None
    if store_folder:
        mass = mass_by_id(RepresentationStore(store_folder).demand(tokenizer=in_map["source"]))
    click.echo(coverage(saved.map, readers["source"], readers["pivot"], mass))


@click.group()
def store() -> None:
    """Inspect and check stores."""


@store.command()
@click.argument("folder", type=PATH)
def verify(folder: Path) -> None:
    """Check the store in FOLDER, and the dialogues, token files and maps next to it.

    Checksums, NaN and value ranges are checked. Exit code 1 if there is a problem.

    \b
    Example:
      fusion-trainer store verify stores/solar
    """
    from fusion_trainer.representations.store import RepresentationStore
    from fusion_trainer.representations.verify import all_problems

    opened = RepresentationStore(folder)
    problems = list(all_problems(opened))
    if problems:
        raise UserError(f"the store `{folder}` has {len(problems)} problems:{listed(problems)}")
    click.echo(f"{folder}: {len(opened.manifest['shards'])} shards, {len(opened):,} rows, no problems")


@store.command()
@click.argument("folder", type=PATH)
@click.option("--row", default=0, show_default=True, help="Number of the row to print.")
@click.option(
    "--positions", type=click.IntRange(min=1), default=20, show_default=True, help="Positions to print at most."
)
@click.option("--dialogues", type=PATH, help="Folder of the store's dialogues, to print the text.")
@click.option("--tokenizer", help="Folder or Hub id of the tokenizer, if the model has moved.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model repository.")
def show(
    folder: Path, row: int, positions: int, dialogues: Path | None, tokenizer: str | None, trust_remote_code: bool
) -> None:
    """Print the manifest of the store in FOLDER, and one row with its tokens as text.

    \b
    Example:
      fusion-trainer store show stores/solar --row 17
    """
    from fusion_trainer.representations.show_store import show_manifest, show_row
    from fusion_trainer.representations.store import RepresentationStore

    opened = RepresentationStore(folder)
    if not 0 <= row < len(opened):
        raise UserError(f"there is no row {row}; the store has the rows 0 to {len(opened) - 1}")
    click.echo(show_manifest(opened))
    click.echo(show_row(opened, row, positions, dialogues, tokenizer, trust_remote_code))
