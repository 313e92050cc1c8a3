"""``varm-merge push``: check a merged model and publish it on the Hub, with a model card."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from varm_common.console import talks
from varm_common.tables import show, size
from varm_merge.commands.flags import FOLDER, READ, flag, option, with_json

if TYPE_CHECKING:
    from varm_merge.publishing.publish import Plan

__all__ = ["push"]


@click.command()
@click.argument("folder", type=FOLDER)
@click.argument("repository")
@flag("--public", help="If the repository does not exist, create it as public. Default: private.")
@option("--license", "license_id", help="Licence of the merge, if its parents have different ones.")
@option(
    "--comparison", type=READ, help="Markdown to include in the card, such as report.md of `varm-merge compare`."
)
@option("--exclude", multiple=True, metavar="GLOB", help="Files to leave out; may be repeated.")
@flag("--overwrite-card", help="Replace a README.md that a person wrote or edited.")
@flag("--allow-pickle", help="Upload .bin and .pt files, too.")
@option("--revision", help="Branch to push to; it is created if it does not exist.")
@flag("--create-pr", help="Open a pull request instead.")
@option("--message", default="Upload a merge by varm-merge", help="Commit message.")
@flag("--dry-run", help="Show the files and the card, and send nothing. Needs no token.")
@with_json
@talks(libraries=False)
def push(folder: Path, repository: str, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish a merged model with a model card: recipe, parents, merge weights, commands to reproduce it.

    REPOSITORY is user/name on the Hub; if it does not exist, it is created as private. FOLDER is checked before
    anything is uploaded, and does not change. All files are uploaded in one commit. If a push is interrupted, run
    the same command again. If nothing has changed, nothing is sent.

    The token comes from `hf auth login` or HF_TOKEN. There is no option for it, because other users of the machine
    can read command lines.

    \b
    Examples:
      varm-merge push out/ user/name --dry-run
      varm-merge push out/ user/name --license apache-2.0
      varm-merge push out/ user/name --public --comparison compared/report.md
      varm-merge push out/ user/name --revision layer-level --exclude '*.log' --message "Layer level"
    """
    from varm_merge.publishing import publish

    settings = publish.Options(**options)
    plan = publish.prepare(folder, repository, settings, dry_run=dry_run, quiet=quiet)
    if not as_json:
        _show(plan, dry_run)
    commit = None if plan.problems or dry_run else publish.send(plan, settings)
    if as_json:
        click.echo(json.dumps(publish.as_json(plan, commit), indent=1))
    elif not plan.problems:
        _show_outcome(plan, commit)
    sys.exit(1 if plan.problems else 0)


def _show(plan: "Plan", dry_run: bool) -> None:
    """Print files, problems and remarks, and the card of a dry run."""
    rows = [[change.path, size(change.size), change.state] for change in plan.changes]
    rows += [[path, "", f"left out: {why}"] for path, why in plan.left_out.items() if rows]
    show(f"{plan.repository}: files", ["file", "size", "on the Hub"], rows)
    if dry_run and plan.card:
        click.echo(f"\nREADME.md\n\n{plan.card}")
    for problem in plan.problems:
        click.secho(f"✗ {problem}", fg="red")
    for remark in plan.remarks:
        click.secho(f"! {remark}", fg="yellow")


def _show_outcome(plan: "Plan", commit: Any) -> None:
    sent = [change for change in plan.changes if change.state in ("new", "changed", "?")]
    amount = f"{len(sent)} {'file' if len(sent) == 1 else 'files'}, {size(sum(change.size for change in sent))}"
    if plan.remote is not None and not plan.to_send:
        text = f"nothing to do: {plan.repository} is up to date"
    else:
        text = f"sent {amount}: {commit.pr_url or commit.commit_url}" if commit else f"would send {amount}"
    click.secho(f"✓ {text}", fg="green")
