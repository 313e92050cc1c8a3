"""``varm-merge push``: a merged model to the Hub, looked at first, with a model card."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from varm_merge.commands.style import talks

if TYPE_CHECKING:
    from varm_merge.pushing import Plan

__all__ = ["push"]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repository")
@click.option("--public", is_flag=True, help="Create the repository for all to see; it is private otherwise.")
@click.option("--license", "license_id", help="Of the merge, where its parents' licences do not settle it.")
@click.option(
    "--comparison",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Markdown for the card, such as report.md of `varm-merge compare`.",
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Files to leave out; may be given several times.")
@click.option("--overwrite-card", is_flag=True, help="Write over a README.md that a person wrote or edited.")
@click.option("--allow-pickle", is_flag=True, help="Upload .bin and .pt files, too.")
@click.option("--revision", help="Branch to push to; it is created if there is none.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", default="Upload a merge by varm-merge", show_default=True, help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Show files and card, and send nothing; needs no token.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@talks
def push(folder: Path, repository: str, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Upload a merged model with a model card: recipe, parents, weights, how to make it again.

    REPOSITORY is user/name on the Hub; it is created, private, if it is not there. FOLDER is looked at first, and
    nothing is sent if something is wrong; it is not changed. The files arrive in one commit. If a push is cut off,
    the same command goes on; if nothing has changed, it does nothing.

    The token is that of `hf auth login` or HF_TOKEN. It is no option, because others on the machine can read
    command lines.

    \b
    Examples:
      varm-merge push out/ user/name --dry-run
      varm-merge push out/ user/name --license apache-2.0
      varm-merge push out/ user/name --public --comparison compared/report.md
      varm-merge push out/ user/name --revision layer-level --exclude '*.log' --message "Layer level"
    """
    from varm_merge import pushing

    wishes = pushing.Wishes(**options)
    plan = pushing.prepare(folder, repository, wishes, dry_run=dry_run, quiet=quiet)
    if not as_json:
        _show(plan, dry_run)
    commit = None if plan.problems or dry_run else pushing.send(plan, wishes)
    if as_json:
        click.echo(json.dumps(pushing.as_json(plan, commit), indent=1))
    elif not plan.problems:
        _verdict(plan, commit, dry_run)
    sys.exit(1 if plan.problems else 0)


def _show(plan: "Plan", dry_run: bool) -> None:
    """Files, card (of a dry run), remarks and problems."""
    from varm_merge.tables import show, size

    rows = [[one.path, size(one.size), one.state] for one in plan.changes]
    rows += [[path, "", f"left out: {why}"] for path, why in plan.left_out.items() if rows]
    show(f"{plan.repository}: files", ["file", "size", "on the Hub"], rows)
    if dry_run and plan.card:
        click.echo(f"\nREADME.md\n\n{plan.card}")
    for mark, colour, some in (("✗", "red", plan.problems), ("!", "yellow", plan.remarks)):
        for one in some:
            click.secho(f"{mark} {one}", fg=colour)


def _verdict(plan: "Plan", commit: Any, dry_run: bool) -> None:
    from varm_merge.tables import size

    sent = [one for one in plan.changes if one.state in ("new", "changed", "?")]
    amount = f"{len(sent)} {'file' if len(sent) == 1 else 'files'}, {size(sum(one.size for one in sent))}"
    if plan.remote is not None and not plan.has_work:
        click.secho(f"✓ nothing to do: {plan.repository} has all of it", fg="green")
    elif dry_run:
        click.secho(f"✓ would send {amount}", fg="green")
    else:
        click.secho(f"✓ sent {amount}: {commit.pr_url or commit.commit_url}", fg="green")
