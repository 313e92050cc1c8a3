"""Plans a push and carries it out: check folder, parents and repository, then upload in one commit.

huggingface_hub does the transfer. Large files are uploaded first and become visible with the commit at the end, so
readers see the old model or the new one. The Hub recognises files that an interrupted push has uploaded by their
hash.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi

from varm_common.errors import UserError
from varm_merge.publishing import card as model_card
from varm_merge.publishing import folder as model_folder
from varm_merge.publishing import hub
from varm_merge.publishing.card import PICTURE, README, Card, Findings, Options

__all__ = ["Options", "Plan", "as_json", "prepare", "send"]


STALLED_SECONDS = 300
"""Seconds without any traffic after which an upload counts as interrupted."""
GITATTRIBUTES = ".gitattributes"
"""The Hub puts this file into every new repository."""


@dataclass
class Plan(Findings):
    """The plan of a push. If it has problems, nothing is sent.

    ``left_out`` says why files of the folder are not uploaded. ``remote`` is None if the Hub did not answer.
    """

    repository: str = ""
    changes: list[hub.Change] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    card: str = ""
    remote: hub.Remote | None = None

    @property
    def to_send(self) -> list[hub.Change]:
        """The changes that the commit contains."""
        return [change for change in self.changes if change.state not in ("same", "kept")]


def prepare(folder: Path, repository: str, options: Options, *, dry_run: bool, quiet: bool) -> Plan:
    """Check folder, parents and repository, and write the card. Nothing is sent; the folder does not change.

    Raises:
        UserError: ``repository`` is not a valid name, or the Hub does not answer (a dry run only remarks this).
    """
    hub.check_name(repository)
    hub.guard_logs()
    plan = Plan(repository=repository)
    if not dry_run and not huggingface_hub.get_token():
        plan.problems.append("no token: run `hf auth login`, or set HF_TOKEN to a token that may write")
    here, plan.left_out = model_folder.look(folder, plan, options.exclude, options.allow_pickle)
    card = _card(folder, options, plan)
    plan.card = card.text
    files: dict[str, Path | bytes] = {**here, README: card.text.encode()}
    if card.picture:
        files[PICTURE] = card.picture
    plan.remote = _remote(options, plan, dry_run)
    if plan.problems:
        return plan
    plan.changes = hub.compare(files, plan.remote or hub.Remote(), quiet)
    if plan.remote is None:
        plan.changes = [replace(change, state="?") for change in plan.changes]
    elif not options.overwrite_card and hub.edited(repository, plan.remote, card):
        plan.changes = [replace(file, state="kept") if file.path == README else file for file in plan.changes]
        way = "" if card.generated else "copy it here, or "
        plan.remarks.append(f"{README} was edited on the Hub and is kept; {way}--overwrite-card replaces it")
    return plan


def send(plan: Plan, options: Options) -> Any:
    """Create repository and branch if needed, and commit the changes.

    Returns:
        huggingface_hub's ``CommitInfo``, or None if there is nothing to do.

    Raises:
        UserError: The upload failed. The repository is unchanged, and the same call resumes.
    """
    assert plan.remote is not None
    assert not plan.problems
    if not plan.to_send:
        return None
    api, name, remote = HfApi(), plan.repository, plan.remote
    with hub.explained(name):
        huggingface_hub.get_session().timeout = STALLED_SECONDS
        if any(change.path == README for change in plan.to_send):
            huggingface_hub.ModelCard(plan.card).validate()
        if not remote.exists:
            api.create_repo(name, private=not options.public, exist_ok=True)
        if remote.commit is None:
            if options.revision and options.revision != "main":
                api.create_branch(name, branch=options.revision, exist_ok=True)
            remote = _just_created(plan, options)
        operations = [change.operation for change in plan.to_send]
        where: dict[str, Any] = {"revision": options.revision, "create_pr": options.create_pr}
        where |= {"parent_commit": None if options.create_pr else remote.commit}
        return api.create_commit(name, operations, commit_message=options.message, **where)


def _just_created(plan: Plan, options: Options) -> hub.Remote:
    """Look again after creating a repository or branch: another push may have created and filled it first."""
    assert plan.remote is not None
    created = hub.look(plan.repository, options.revision)
    if {**created.files, GITATTRIBUTES: None} != {**plan.remote.files, GITATTRIBUTES: None}:
        raise UserError(hub.ADVICE[412].format(plan.repository))
    return created


def as_json(plan: Plan, commit: Any) -> dict[str, Any]:
    """The plan and its commit as JSON."""
    return {
        "repository": plan.repository,
        "url": f"{huggingface_hub.constants.ENDPOINT}/{plan.repository}",
        "files": [{key: getattr(file, key) for key in ("path", "size", "state")} for file in plan.changes],
        **{key: getattr(plan, key) for key in ("left_out", "problems", "remarks", "card")},
        "commit": commit and {"id": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url},
    }


def _card(folder: Path, options: Options, plan: Plan) -> Card:
    """Write the card; its problems go into the plan."""
    try:
        parents = [hub.parent_at(name, role, plan) for name, role in model_card.parents_of(folder)]
        card = model_card.make(folder, plan.repository, parents, plan, options)
    except UserError as error:
        plan.problems.append(str(error))
        return Card()
    if folders := [f"`{parent.name}`" for parent in parents if parent.hub_id is None]:
        advice = "push those first, and merge by their names on the Hub"
        names = ", ".join(folders)
        plan.remarks.append(f"the recipe names local folders that other people cannot load: {names}; {advice}")
    for line, kind in model_folder.secrets_in(card.text.encode()):
        plan.problems.append(f"the card, line {line}, seems to contain {kind}: remove it from recipe or report")
    return card


def _remote(options: Options, plan: Plan, dry_run: bool) -> hub.Remote | None:
    try:
        remote = hub.look(plan.repository, options.revision)
    except UserError as error:
        if not dry_run:
            raise
        plan.remarks.append(f"the state of the repository is unknown: {error}")
        return None
    if remote.exists and remote.private and options.public:
        plan.remarks.append(f"`{plan.repository}` stays private; change that in its settings on the Hub")
    if remote.exists and not remote.private and not options.public:
        plan.remarks.append(f"`{plan.repository}` is public: everybody can read what is pushed")
    return remote
