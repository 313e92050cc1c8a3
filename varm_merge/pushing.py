"""A push from the first look to the commit: what would be sent, all that is against it, and the sending."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from varm_merge import hub, model_card, model_folder
from varm_merge.errors import VarmError
from varm_merge.model_card import PICTURE, README

__all__ = ["Plan", "Wishes", "as_json", "prepare", "send"]


@dataclass(frozen=True)
class Wishes:
    """What the user said beside folder and repository; the options of ``varm-merge push``."""

    public: bool = False
    license_id: str | None = None
    comparison: Path | None = None
    exclude: Sequence[str] = ()
    overwrite_card: bool = False
    allow_pickle: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = "Upload a merge by varm-merge"


@dataclass
class Plan:
    """What a push would do.

    Attributes:
        repository: user/name.
        changes: Each file, and what becomes of it.
        left_out: Files of the folder that are not uploaded, and why.
        card: Text of the model card.
        problems: While there are any, nothing is sent.
        remarks: What one should know.
        remote: The repository as it is; None if the Hub did not answer.
    """

    repository: str
    changes: list[hub.Change] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    card: str = ""
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    remote: hub.Remote | None = None

    @property
    def has_work(self) -> bool:
        """Whether anything is not on the Hub as it is here."""
        return any(change.state not in ("same", "kept") for change in self.changes)


def prepare(folder: Path, repository: str, wishes: Wishes, *, dry_run: bool = False, quiet: bool = True) -> Plan:
    """Look at folder, parents and repository, and make the card. Nothing is sent and the folder is not changed.

    Raises:
        VarmError: ``repository`` is no name of one, or the Hub does not answer (which a dry run only remarks).
    """
    _well_named(repository)
    hub.guard_logs()
    plan = Plan(repository)
    if not dry_run and not huggingface_hub.get_token():
        plan.problems.append("no token: run `hf auth login`, or set HF_TOKEN to a token that may write")
    contents = model_folder.look(folder, wishes.exclude, wishes.allow_pickle)
    plan.left_out = contents.left_out
    plan.problems += contents.problems
    plan.remarks += contents.remarks
    card = _card(folder, wishes, plan)
    plan.remote = _remote(wishes, plan, dry_run)
    files: dict[str, hub.Content] = {**contents.files, README: card.text.encode()}
    if card.picture:
        files[PICTURE] = card.picture
    if plan.problems:
        files = {}
    if plan.remote is None:
        plan.changes = [replace(one, state="?") for one in hub.compare(files, hub.Remote(), quiet)]
        return plan
    plan.changes = hub.compare(files, plan.remote, quiet) if files else []
    if files and not wishes.overwrite_card and hub.card_is_edited(repository, plan.remote, card):
        plan.changes = [replace(one, state="kept") if one.path == README else one for one in plan.changes]
        way = (
            "--overwrite-card writes over it"
            if card.generated
            else "copy it here, or --overwrite-card makes a new one"
        )
        plan.remarks.append(f"{README} was edited on the Hub and is kept; {way}")
    return plan


def send(plan: Plan, wishes: Wishes) -> Any:
    """Upload what is new or changed; None if nothing is.

    Returns:
        huggingface_hub's ``CommitInfo``.

    Raises:
        VarmError: Something failed on the way.
    """
    assert plan.remote is not None
    assert not plan.problems
    if not plan.has_work:
        return None
    return hub.upload(
        plan.repository,
        plan.changes,
        plan.remote,
        public=wishes.public,
        revision=wishes.revision,
        create_pr=wishes.create_pr,
        message=wishes.message,
    )


def as_json(plan: Plan, commit: Any) -> dict[str, Any]:
    """Everything, for a program."""
    return {
        "repository": plan.repository,
        "url": f"{huggingface_hub.constants.ENDPOINT}/{plan.repository}",
        "files": [{key: asdict(one)[key] for key in ("path", "size", "state")} for one in plan.changes],
        "left_out": plan.left_out,
        "problems": plan.problems,
        "remarks": plan.remarks,
        "card": plan.card,
        "commit": commit and {"id": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url},
    }


def _well_named(repository: str) -> None:
    try:
        huggingface_hub.utils.validate_repo_id(repository)  # type: ignore[attr-defined]
        if "/" not in repository:
            raise HFValidationError("the part before the slash is missing")
    except HFValidationError as error:
        raise VarmError(f"`{repository}` is no repository of the Hub, write user/name: {error}") from error


def _card(folder: Path, wishes: Wishes, plan: Plan) -> model_card.Card:
    """The card; what is wrong with it is told in the plan."""
    card = model_card.Card()
    try:
        comparison = model_card.comparison_of(wishes.comparison) if wishes.comparison else None
        models = model_card.parents_of(model_card.recipe_of(folder)[1])
        parents = [hub.parent_at(*model, plan.remarks) for model in models]
        card = model_card.make(
            folder,
            plan.repository.partition("/")[2],
            parents,
            license_id=wishes.license_id,
            comparison=comparison,
            overwrite=wishes.overwrite_card,
        )
    except VarmError as error:
        plan.problems.append(str(error))
        return card
    plan.card = card.text
    plan.problems += card.problems
    plan.remarks += card.remarks
    here = [parent.name for parent in parents if parent.hub_id is None]
    if here:
        named = ", ".join(f"`{name}`" for name in here)
        plan.remarks.append(
            f"the recipe names folders, which others can read of and not load: {named}; "
            "push those first, and merge by their names on the Hub"
        )
    for line, kind in model_folder.secrets_in(card.text.encode()):
        plan.problems.append(f"the card, line {line}, has what looks like {kind}: take it out of recipe or report")
    return card


def _remote(wishes: Wishes, plan: Plan, dry_run: bool) -> hub.Remote | None:
    try:
        remote = hub.look_at(plan.repository, wishes.revision)
    except VarmError as error:
        if not dry_run:
            raise
        plan.remarks.append(f"what the Hub has is not known: {error}")
        return None
    if remote.exists and remote.private and wishes.public:
        plan.remarks.append(f"`{plan.repository}` is private and stays so: its settings on the Hub make it public")
    if remote.exists and not remote.private and not wishes.public:
        plan.remarks.append(f"`{plan.repository}` is public: all can read what is pushed")
    return remote
