"""``varm-merge push``: the real program and the real client of the Hub, over HTTP, to a Hub on the loopback."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import huggingface_hub
import mergekit.merge
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hub_server import READ_TOKEN, TOKEN, Fault, Hub
from hypothesis import given
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from programs import BIN, forked, wait_for
from safetensors.torch import load_file, save_file
from tiny_models import Family, train_tokenizer

import varm_merge.merging.method  # noqa: F401  registers varm
from varm_merge.cli import main
from varm_merge.publishing import card as model_card
from varm_merge.publishing import folder as model_folder
from varm_merge.publishing.hub import redact

SIGNATURE = "5ec7e7"
ME = "user/fused"


@pytest.fixture(scope="session")
def merge(mistral: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge in shards; for reading only."""
    folder = tmp_path_factory.mktemp("merge")
    recipe = yaml.safe_dump(
        {
            "merge_method": "varm",
            "base_model": str(mistral.pivot),
            "models": [{"model": str(target)} for target in mistral.targets],
            "dtype": "float32",
        },
        sort_keys=False,
    )
    options = MergeOptions(quiet=True, copy_tokenizer=False, out_shard_size=8000)
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
    mergekit.merge.run_merge(config, str(folder / "fused"), options=options, config_source=recipe)
    train_tokenizer(folder / "fused", "the shares of the targets")
    return folder / "fused"


@pytest.fixture
def out(merge: Path, tmp_path: Path, mistral: Family) -> Path:
    """A copy whose recipe names models of the Hub."""
    folder = shutil.copytree(merge, tmp_path / "out")
    for name in ("mergekit_config.yml", "varm_weights.json", "README.md"):
        text = (folder / name).read_text()
        for path, hub_id in zip(
            (mistral.pivot, *mistral.targets), ("org/pivot", "org/one", "org/two"), strict=True
        ):
            text = text.replace(f"* {path}", f"* [{hub_id}](https://huggingface.co/{hub_id})")
            text = text.replace(str(path), hub_id)
        (folder / name).write_text(text)
    (folder / "weights.png").write_bytes(b"drawn before, which spares the time")
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.serving() as serving:
        for name in ("pivot", "one", "two"):
            serving.add(f"org/{name}", {"README.md": b"---\nlicense: apache-2.0\n---\n# A parent\n"})
        yield serving


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The client of this process asks ``hub``, by plain LFS, and waits for nobody."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def push(folder: Path, *options: str, repository: str = ME) -> Result:
    done = CliRunner().invoke(main, ["push", str(folder), repository, "-q", *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    for secret in (TOKEN, READ_TOKEN, SIGNATURE):
        assert secret not in done.output
    return done


def pushed(folder: Path, *options: str) -> dict[str, Any]:
    done = push(folder, "--json", *options)
    return dict(json.loads(done.stdout))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrived(hub: Hub, folder: Path, branch: str = "main") -> None:
    """The repository has the folder's files byte for byte, beside the card and the picture."""
    files = hub.repositories[ME].files(branch)
    generated = {".gitattributes", "README.md", "weights.png"}
    assert {name: data for name, data in files.items() if name not in generated} == {
        name: data for name, data in contents(folder).items() if name not in generated
    }
    assert generated <= set(files)


def commits(hub: Hub) -> int:
    """Without the one that the Hub makes when a repository is created."""
    return len(hub.repositories[ME].branches["main"]) - 1


def metadata(hub: Hub) -> dict[str, Any]:
    text = hub.repositories[ME].files()["README.md"].decode()
    return dict(yaml.safe_load(text.split("---\n")[1]))


# The program


@pytest.mark.slow
def test_the_program_publishes_a_whole_private_merge_and_a_second_push_does_nothing(
    here: Hub, out: Path, tmp_path: Path
) -> None:
    hub, before = here, contents(out)
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    needed = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [str(BIN / "varm-merge"), "push", str(out), ME, "-v"]
    environment = {**own, **needed, "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert f"{hub.url}/{ME}/commit/" in first.stdout
    arrived(hub, out)
    assert hub.repositories[ME].private
    assert (commits(hub), contents(out)) == (1, before)
    sent = hub.count("PUT", "/large/")
    second = push(out)
    assert second.exit_code == 0, second.output
    assert f"✓ nothing to do: {ME} is up to date\n" in second.output
    assert (commits(hub), hub.count("PUT", "/large/"), hub.count("POST", "/commit/")) == (1, sent, 1)
    printed = first.stdout + first.stderr
    assert "Send: curl" in printed  # the client logs every request
    assert TOKEN not in printed
    assert SIGNATURE not in printed


def test_a_killed_push_resumes(here: Hub, out: Path) -> None:
    hub = here
    last = hashlib.sha256((out / "model-00003-of-00003.safetensors").read_bytes()).hexdigest()
    free = threading.Event()
    hub.faults = [Fault("PUT", last, after=100, hold=free)]
    process = forked(lambda: push(out))
    wait_for(lambda: len(hub.objects) == 3, process)  # the picture and the other two
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    free.set()
    assert commits(hub) == 0
    had = set(hub.objects)
    assert last not in had
    assert push(out).exit_code == 0
    arrived(hub, out)
    assert [hub.count("PUT", name) for name in had] == [1] * len(had)
    assert commits(hub) == 1


# Failures in the middle


MANY = 99


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/large/"),
        Fault("PUT", "/large/", status=None, after=1000),
        Fault("POST", "/objects/batch", status=503),
        Fault("POST", "/preupload/", status=429, headers={"Retry-After": "1"}),
    ],
    ids=lambda fault: f"{fault.path}-{fault.status}",
)
def test_transient_failures_are_retried(fault: Fault, here: Hub, out: Path) -> None:
    here.faults = [fault]
    assert push(out).exit_code == 0
    arrived(here, out)
    assert commits(here) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST", "/repos/create"), "the Hub failed with status 500"),
        (Fault("POST", "/preupload/", MANY, 503), "the Hub failed with status 503"),
        (Fault("PUT", "/large/", MANY), "the Hub failed with status 500"),
        (Fault("PUT", "/large/", MANY, None, after=1000), "the connection to http"),
        (Fault("PUT", "/large/", MANY, 413), "the Hub does not take files this large"),
        (Fault("POST", "/objects/batch", MANY, 402, "storage limit"), "has no storage left"),
        (Fault("POST", "/commit/"), "the Hub failed with status 500"),
        (Fault("POST", "/commit/", status=None), "the connection to http"),
        (Fault("POST", "/commit/", status=None, late=True), "the connection to http"),
        (Fault("POST", "/commit/", status=504, late=True), "the Hub failed with status 504"),
    ],
    ids=lambda one: f"{one.path}-{one.status}-{one.late}" if isinstance(one, Fault) else None,
)
def test_permanent_failures_are_reported_and_the_next_push_sends_the_rest(
    fault: Fault, message: str, here: Hub, out: Path
) -> None:
    here.faults = [fault]
    failed = push(out)
    assert failed.exit_code == 1
    assert failed.output.splitlines()[-1].startswith("Error: ")
    assert message in failed.output
    fault.times = 0
    had = set(here.objects)
    again = push(out)
    assert again.exit_code == 0, again.output
    arrived(here, out)
    assert commits(here) == 1  # also where the answer to the first was lost
    assert [here.count("PUT", name) for name in had] == [1] * len(had)


def test_one_shard_that_fails_does_not_send_the_others_twice(here: Hub, out: Path) -> None:
    last = hashlib.sha256((out / "model-00003-of-00003.safetensors").read_bytes()).hexdigest()
    here.faults = [Fault("PUT", last, MANY)]
    assert push(out).exit_code == 1
    had = set(here.objects)
    assert had
    here.faults = []
    assert push(out).exit_code == 0
    assert {name: here.count("PUT", name) for name in had} == dict.fromkeys(had, 1)
    arrived(here, out)


def test_a_silent_hub_ends_the_push(here: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varm_merge.publishing.publish.STALLED_SECONDS", 0.5)
    free = threading.Event()
    here.faults = [Fault("POST", "/commit/", hold=free)]
    done = push(out)
    free.set()
    assert "Error: the connection to http" in done.output
    assert push(out).exit_code == 0
    arrived(here, out)


def test_files_in_parts_arrive_whole(here: Hub, out: Path) -> None:
    here.part_bytes = 3000
    here.faults = [Fault("PUT", "/part/1", status=None, after=500)]
    assert push(out).exit_code == 0
    arrived(here, out)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "run `hf auth login`, or set HF_TOKEN"),
        (403, "your token may not write to `user/fused`"),
        (404, "is not on the Hub, or you have no access"),
        (409, "somebody else is changing `user/fused`"),
        (412, "somebody committed to `user/fused`"),
        (418, "the Hub replied with status 418"),
        (429, "the Hub received too many requests: wait some minutes"),
    ],
)
def test_each_refusal_is_explained_with_the_next_step(status: int, message: str, here: Hub, out: Path) -> None:
    """The server's message is printed, without the tokens in it."""
    reply = f"Authorization: Bearer {TOKEN} of https://me:{READ_TOKEN}@host/?X-Amz-Signature={SIGNATURE}&a=b"
    here.faults = [Fault("POST", "/commit/", MANY, status, reply)]
    done = push(out)
    assert (done.exit_code, done.output.count("Error: ")) == (1, 1)
    assert message in done.output.splitlines()[-1]
    assert "(the Hub says: Authorization: <token> of https://<token>host/?<token>" in done.output


def test_tokens_that_may_not_write_are_reported(here: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "your token may not write to" in push(out).output
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Z9" * 17)
    assert "run `hf auth login`" in push(out).output
    monkeypatch.delenv("HF_TOKEN")
    assert "✗ no token: run `hf auth login`" in push(out).output
    assert here.repositories.keys() == {"org/pivot", "org/one", "org/two"}


def test_another_persons_commit_is_not_overwritten(here: Hub, out: Path) -> None:
    push(out)
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    seen = here.repositories[ME]

    def commit() -> None:
        seen.branches["main"].append(("theirs", {**seen.files(), "theirs.txt": b"1"}))

    here.faults = [Fault("POST", "/preupload/", meanwhile=commit)]
    done = push(out)
    assert "somebody committed to `user/fused` in the meantime" in done.output
    assert "theirs.txt" in seen.files()


@pytest.mark.parametrize("when", ["/repos/create", "/preupload/"])
@pytest.mark.parametrize("options", [(), ("--revision", "layer-level")])
def test_two_first_pushes_do_not_mix(when: str, options: tuple[str, ...], here: Hub, out: Path) -> None:
    """The other push creates the repository after this one has looked, or fills it after this one created it."""
    theirs = {"model-00001-of-00002.safetensors": b"1", "README.md": OWN.encode()}
    branch = options[1] if options else "main"

    def fill() -> None:
        repository = here.repositories.get(ME) or here.add(ME, {}, private=True)
        repository.branches[branch] = [*repository.branches["main"], ("theirs", theirs)]

    here.faults = [Fault("POST", when, meanwhile=fill)]
    done = push(out, *options)
    assert done.exit_code == 1
    assert "somebody committed to `user/fused` in the meantime: check that commit" in done.output
    assert here.repositories[ME].files(branch) == theirs
    again = push(out, *options)
    assert "! README.md was edited on the Hub and is kept" in again.output
    assert set(here.repositories[ME].files(branch)) == set(contents(out))


def test_a_missing_connection_is_reported(here: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    done = push(out, "--license", "mit")
    assert done.exit_code == 1
    assert "Error: the connection to http://127.0.0.1:9 failed" in done.output
    dry = push(out, "--license", "mit", "--dry-run")
    assert dry.exit_code == 0
    assert "! the state of the repository is unknown: the connection to" in dry.output
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in push(out, "--license", "mit").output


# What is sent


def test_only_changed_files_are_sent(here: Hub, out: Path) -> None:
    push(out)
    large = here.count("PUT", "/large/")
    report = out.parent / "report.md"
    report.write_text(
        "# Comparison\n\n## Skills\n\n```sh\n# a comment\n```\n\n| | letters |\n|---|---|\n| fused | 45.8 |\n"
    )
    plan = pushed(out, "--comparison", str(report))
    assert [file["path"] for file in plan["files"] if file["state"] != "same"] == ["README.md"]
    assert here.count("PUT", "/large/") == large
    card = here.repositories[ME].files()["README.md"].decode()
    assert "\n## Comparison\n\n### Skills\n\n```sh\n# a comment\n```\n\n| | letters |" in card
    assert commits(here) == 2


def test_a_change_of_the_same_size_is_sent(here: Hub, out: Path) -> None:
    add("notes.txt", "one")(out)
    push(out)
    assert here.repositories[ME].private
    shard = out / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    add("notes.txt", "two")(out)
    changed = [file["path"] for file in pushed(out)["files"] if file["state"] == "changed"]
    assert changed == [shard.name, "notes.txt"]
    arrived(here, out)
    here.requests.clear()
    push(out)
    assert {request.method for request in here.requests} == {"GET"}


def test_old_weights_do_not_stay_beside_the_new(here: Hub, out: Path, merge: Path) -> None:
    """transformers would load a model.safetensors of old, and no shard of the new model."""
    push(out)
    shards = [path for path in out.iterdir() if "safetensors" in path.name]
    tensors = {n: t for path in shards if path.suffix != ".json" for n, t in load_file(path).items()}
    for path in shards:
        path.unlink()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    plan = pushed(out)
    removed = {file["path"] for file in plan["files"] if file["state"] == "removed"}
    assert removed == {path.name for path in shards}
    arrived(here, out)
    assert commits(here) == 2


def test_no_file_of_the_users_is_taken_for_old_weights(here: Hub, out: Path) -> None:
    """And each kind of those goes, that transformers could load instead of the new."""
    push(out)
    repository = here.repositories[ME]
    own = [
        "model-lora/adapter_model.safetensors",
        "model_ema.safetensors",
        "models/v1/model.safetensors",
        "pytorch_model_old/x.bin",
    ]
    old = [
        "model-00001-of-00009.safetensors",
        "model.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    files = {**repository.files(), **dict.fromkeys([*own, *old], b"x")}
    repository.branches["main"].append(("theirs", files))
    assert [file["path"] for file in pushed(out)["files"] if file["state"] == "removed"] == old
    assert {name for name in files if name not in repository.files()} == set(old)


def test_a_branch_is_made_and_a_pull_request_leaves_main_alone(here: Hub, out: Path) -> None:
    assert push(out, "--revision", "layer-level", "--message", "Layer level").exit_code == 0
    assert commits(here) == 0
    arrived(here, out, "layer-level")
    assert here.repositories[ME].branches["layer-level"][-1][0] == "Layer level"
    assert "nothing to do" in push(out, "--revision", "layer-level").output
    done = push(out, "--create-pr")
    assert f"{here.url}/{ME}/discussions/1" in done.output
    assert commits(here) == 0
    assert here.pull_requests[0][1]["config.json"] == (out / "config.json").read_bytes()


def test_a_new_repository_is_public_on_request_and_an_old_one_does_not_change(here: Hub, out: Path) -> None:
    assert push(out, "--public").exit_code == 0
    assert not here.repositories[ME].private
    assert "! `user/fused` is public: everybody can read what is pushed" in push(out).output
    here.repositories[ME].private = True
    assert "stays private" in push(out, "--public").output
    assert here.repositories[ME].private


def test_a_dry_run_needs_no_token_and_sends_nothing(here: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = push(out, "--dry-run")
    assert done.exit_code == 0, done.output
    assert re.search(r"^config\.json +\d+ B +new$", done.output, re.MULTILINE)
    assert "\n# fused\n" in done.output
    assert {request.method for request in here.requests} == {"GET"}
    plan = pushed(out, "--dry-run")
    assert (plan["commit"], plan["problems"]) == (None, [])
    assert {file["state"] for file in plan["files"]} == {"new"}


@pytest.mark.parametrize("name", ["fused", "user/fused/x", "user/fu sed", "../up"])
def test_an_invalid_repository_name_is_reported(name: str, here: Hub, out: Path) -> None:
    done = push(out, repository=name)
    assert done.exit_code == 1
    assert f"Error: `{name}` is not a repository name; write user/name" in done.output
    assert not here.requests


# The card


@pytest.mark.slow
def test_the_card_shows_where_the_model_comes_from(here: Hub, out: Path) -> None:
    (out / "weights.png").unlink()
    push(out)
    assert metadata(here) == {
        "base_model": ["org/pivot", "org/one", "org/two"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "merge_method": "varm",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "varm"],
    }
    card = here.repositories[ME].files()["README.md"].decode()
    assert "- pivot: [org/pivot](https://huggingface.co/org/pivot), apache-2.0\n" in card
    assert (out / "mergekit_config.yml").read_text().strip() in card
    assert "'mergekit==0.1.5'" in card
    assert "arXiv:2402.16107" in card
    assert here.repositories[ME].files()["weights.png"].startswith(b"\x89PNG")
    weights = json.loads((out / "varm_weights.json").read_text())
    alone = [unit["targets"]["org/one"]["weight"] for unit in weights["units"]]
    assert f"| `org/one` | {min(alone):.3f} |" in card


def test_local_parents_are_in_the_text_and_not_in_the_metadata(here: Hub, merge: Path, mistral: Family) -> None:
    done = push(merge, "--license", "mit")
    assert "base_model" not in metadata(here)
    card = here.repositories[ME].files()["README.md"].decode()
    assert f"- pivot: `{mistral.pivot}`\n- target: `{mistral.targets[0]}`\n" in card
    assert "! the recipe names local folders that other people cannot load" in done.output


def test_a_relative_folder_that_is_gone_is_not_taken_for_a_model_of_the_hub(here: Hub, out: Path) -> None:
    path = out / "mergekit_config.yml"
    path.write_text(path.read_text().replace("org/two", "targets/two"))
    done = push(out, "--license", "mit")
    assert "! `targets/two` is neither a folder here nor a model on the Hub" in done.output
    assert metadata(here)["base_model"] == ["org/pivot", "org/one"]


def test_a_licence_may_be_a_list_in_the_card_of_a_parent(here: Hub, out: Path) -> None:
    here.add("org/one", {"README.md": b"---\nlicense:\n- apache-2.0\n---\n"})
    assert push(out).exit_code == 0
    assert metadata(here)["license"] == "apache-2.0"
    here.add("org/one", {"README.md": b"---\nlicense: [apache-2.0, mit]\n---\n"})
    assert "org/one: unknown; org/two: apache-2.0): choose one" in push(out).output


def test_different_or_unknown_licences_need_a_choice(here: Hub, out: Path) -> None:
    here.add("org/one", {"README.md": b"---\nlicense: other\nlicense_name: mine\n---\n"})
    here.add("org/two", {"config.json": b"{}"})
    done = push(out)
    assert done.exit_code == 1
    message = "✗ the licence is not clear (org/pivot: apache-2.0; org/one: mine; org/two: unknown): choose one"
    assert message in done.output
    here.add("org/two", {"README.md": b"---\nlicense: mit\n---\n"})
    assert "✗ the licence is not clear (org/pivot: apache-2.0; org/one: mine; org/two: mit)" in push(out).output
    assert ME not in here.repositories
    for name in ("pivot", "one", "two"):
        here.add(f"org/{name}", {"README.md": b"---\nlicense: other\nlicense_name: mine\nlicense_link: x\n---\n"})
    assert push(out).exit_code == 0
    assert {key: value for key, value in metadata(here).items() if "license" in key} == {
        "license": "other",
        "license_name": "mine",
        "license_link": "x",
    }
    assert push(out, "--license", "mit").exit_code == 0
    assert metadata(here)["license"] == "mit"


def test_an_invalid_card_is_reported_before_anything_is_sent(here: Hub, out: Path) -> None:
    done = push(out, "--license", "nonsense")
    assert done.exit_code == 1
    assert '"license" must be one of' in done.output
    assert ME not in here.repositories
    assert here.count("PUT", "/large/") == 0


OWN = "---\nlicense: mit\ntags:\n- mine\n---\n# My own words\n\nEvery *one* of them.\n"


def test_a_persons_card_keeps_its_text_and_gets_metadata(here: Hub, out: Path) -> None:
    (out / "README.md").write_text(OWN)
    done = push(out)
    assert "! README.md is your own: only its metadata changes" in done.output
    text = here.repositories[ME].files()["README.md"].decode()
    assert text.endswith("---\n# My own words\n\nEvery *one* of them.\n")
    assert metadata(here)["license"] == "mit"
    assert metadata(here)["tags"] == ["mine", "mergekit", "merge", "varm"]
    assert metadata(here)["base_model"] == ["org/pivot", "org/one", "org/two"]
    assert "nothing to do" in push(out).output
    push(out, "--license", "apache-2.0")
    assert metadata(here)["license"] == "apache-2.0"
    assert push(out, "--overwrite-card").exit_code == 0
    assert here.repositories[ME].files()["README.md"].startswith(b"---\nbase_model:")
    assert b"own words" not in here.repositories[ME].files()["README.md"]


def test_mergekits_card_with_an_added_sentence_is_kept(here: Hub, out: Path) -> None:
    text = (out / "README.md").read_text()
    assert model_card.is_generated(text)
    (out / "README.md").write_text(text.replace("### Models", "It is good at sums.\n\n### Models"))
    push(out)
    assert b"It is good at sums." in here.repositories[ME].files()["README.md"]


def test_a_card_that_was_edited_on_the_hub_is_kept(here: Hub, out: Path) -> None:
    push(out)
    repository = here.repositories[ME]
    edited = repository.files()["README.md"].replace(b"# fused", b"# The fused one")
    repository.branches["main"].append(("edit", {**repository.files(), "README.md": edited}))
    done = push(out)
    assert "! README.md was edited on the Hub and is kept" in done.output
    assert "nothing to do" in done.output
    (out / "generation_config.json").write_text("{}")
    assert push(out).exit_code == 0
    assert repository.files()["README.md"] == edited
    assert push(out, "--overwrite-card").exit_code == 0
    assert b"# The fused one" not in repository.files()["README.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "edited",
    [
        OWN.replace("words", "other words").encode(),
        OWN.replace("- mine", "- mine\n- theirs").encode(),
        OWN.replace("tags", "language: de\ntags").encode(),
        OWN.replace("words", "größer").encode("latin-1"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_persons_card_on_the_hub_is_kept_even_if_the_folder_has_one(
    own: bool, edited: bytes, here: Hub, out: Path
) -> None:
    if own:
        (out / "README.md").write_text(OWN)
    here.add(ME, {})
    push(out)
    repository = here.repositories[ME]
    repository.branches["main"].append(("edit", {**repository.files(), "README.md": edited}))
    done = push(out)
    assert "! README.md was edited on the Hub and is kept" in done.output
    assert "nothing to do" in done.output
    assert repository.files()["README.md"] == edited
    assert push(out, "--overwrite-card").exit_code == 0
    assert repository.files()["README.md"].startswith(b"---\nbase_model:")


def test_unreadable_metadata_are_reported(here: Hub, out: Path) -> None:
    (out / "README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    assert "✗ the metadata of README.md cannot be read" in push(out).output
    assert ME not in here.repositories


# Looked at first


def damage_shard(out: Path) -> None:
    path = out / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def move_tensor(out: Path) -> None:
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(name for name, shard in index["weight_map"].items() if "00001" in shard)
    index["weight_map"][name] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(index))


def link_out(out: Path) -> None:
    (out / "notes.txt").symlink_to("/etc/hostname")


def add_shard(out: Path) -> None:
    save_file({"a": torch.ones(1)}, out / "model-00009-of-00009.safetensors")


def edit_config(out: Path, **entries: object) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **entries}))


def add(name: str, content: str = "x") -> Callable[[Path], object]:
    def adding(out: Path) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(content)

    return adding


SECRET = "sk-proj-" + "aB3" * 12
TOO_FEW_LAYERS = "`config.json` does not fit the weight files: the config has fewer layers than the files"
WRONG: list[tuple[Callable[[Path], object], str]] = [
    (damage_shard, "`model-00002-of-00003.safetensors` is cut off or damaged"),
    (
        lambda out: (out / "model-00001-of-00003.safetensors").unlink(),
        "`model.safetensors.index.json` names `model-00001-of-00003.safetensors`, and that file is not there",
    ),
    (move_tensor, "`model-00002-of-00003.safetensors` lacks `"),
    (move_tensor, "`model-00001-of-00003.safetensors` has `"),
    (add_shard, "`model-00009-of-00009.safetensors` is not named in"),
    (link_out, "`notes.txt` links to a file outside the folder"),
    (lambda out: (out / "gone").symlink_to("nowhere"), "`gone` is a broken link"),
    (lambda out: os.mkfifo(out / "pipe"), "`pipe` is not a regular file"),
    (add("config.json", '{"model_type": "nonsense"}'), "`config.json` does not load: "),
    (
        lambda out: edit_config(out, num_hidden_layers=1),
        TOO_FEW_LAYERS,
    ),
    (lambda out: edit_config(out, vocab_size=99), ", not [99, "),
    (add("config.json", "{"), "`config.json` is not a model's config: "),
    (lambda out: (out / "config.json").unlink(), "has no config.json: it is not a model"),
    (add("tokenizer.json", "{}"), "the tokenizer does not load: "),
    (add("optimizer.pt"), "`optimizer.pt` is training state, not part of the model"),
    (add("rng_state_0.pth"), "`rng_state_0.pth` is training state, not part of the model"),
    (add("training_args.bin"), "`training_args.bin` is training state, not part of the model"),
    (add("checkpoint-20/model.safetensors"), "`checkpoint-20/model.safetensors` is a training checkpoint"),
    (add("adapter.bin"), "`adapter.bin` is a pickle, which can run code when loaded"),
    (add("id_rsa"), "`id_rsa` has the name of a key file"),
    (add("server.pem"), "`server.pem` has the name of a key file"),
    (add("notes.md", f"one\ntwo {TOKEN}\n"), "`notes.md`, line 2, seems to contain a Hugging Face token"),
    (add("notes.md", f"key: {SECRET}"), "`notes.md`, line 1, seems to contain an API key"),
    (add("notes.md", "AKIA" + "Q2W3" * 4), "`notes.md`, line 1, seems to contain an AWS key"),
    (add("notes.md", "-----BEGIN RSA PRIVATE KEY-----"), "`notes.md`, line 1, seems to contain a private key"),
    (add("varm_weights.json", "[]"), "`varm_weights.json` does not hold the merge weights of a merge"),
    (add("mergekit_config.yml", "a: ["), "mergekit_config.yml` is not a merge recipe"),
    (
        lambda out: [(out / n).unlink() for n in ("mergekit_config.yml", "varm_weights.json")],
        "not merged by mergekit",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "message"), WRONG, ids=[message for _, message in WRONG])
def test_unsuitable_files_are_reported_and_nothing_is_sent(
    damage: Callable[[Path], object], message: str, here: Hub, out: Path
) -> None:
    damage(out)
    done = push(out)
    assert done.exit_code == 1
    assert message in done.output
    assert SECRET not in done.output
    assert {request.method for request in here.requests} <= {"GET"}


HEX = "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (TOKEN, "a Hugging Face token"),
        (SECRET, "an API key"),
        ("sk-" + HEX * 2, "an API key"),
        ("sk-or-v1-" + HEX * 4, "an API key"),
        ("AKIA" + "Q2W3" * 4, "an AWS key"),
        ("aws_secret_access_key = " + "aB3/" * 10, "an AWS secret"),
        ("ghp_" + "aB3" * 12, "a GitHub token"),
        ("github_pat_" + "aB3" * 20, "a GitHub token"),
        ("AIza" + "aB3d5" * 7, "a Google key"),
        ("xoxb" + "-123456789012-abcdefABCDEF", "a Slack token"),
        ("git clone https://user:" + "pass-w0rd@host/x.git", "a password in an address"),
        ("postgres://user:" + "pass@10.0.0.1:5432/x", "a password in an address"),
        ("export WANDB_API_KEY=" + HEX * 2 + "01234567", "an assigned key"),
        ("CLIENT_SECRET = '" + "aB3" * 8 + "'", "an assigned key"),
        ("-----BEGIN PRIVATE " + "KEY-----", "a private key"),
    ],
)
def test_each_kind_of_secret_is_recognised(text: str, kind: str) -> None:
    assert list(model_folder.secrets_in(f"one\n{text}\n".encode())) == [(2, kind)]
    in_json = json.dumps({"text": text}).encode()
    assert bool(list(model_folder.secrets_in(in_json, is_json=True))) == (kind != "an assigned key")


@pytest.mark.parametrize(
    "text",
    [
        "sk-" + "learn-" * 8,
        "https://<user>:<password>@host, https://$USER:$PASS@host, https://host:8080/a@b, git@host:x/y.git",
        "WANDB_API_KEY=$WANDB_API_KEY TOKEN=none API_KEY = os.environ['API_KEY']",
        "EOS_TOKEN = '<|end_of_text|>'; MASK_TOKEN=averylongnamewithoutanydigit",
    ],
)
def test_harmless_texts_are_not_taken_for_secrets(text: str) -> None:
    assert not list(model_folder.secrets_in(text.encode()))


def test_a_harmless_tokenizer_config_is_pushed(here: Hub, out: Path) -> None:
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    config["chat_template"] = "{% set TOKEN='abcdefghij0123456789' %}{{ 'https://host/a:b@c xoxb- sk-' }}"
    config["added"] = {str(n): f"<|reserved_special_token_{n}|>" for n in range(300)}
    path.write_text(json.dumps(config))
    assert push(out).exit_code == 0
    arrived(here, out)


def test_all_problems_are_reported_at_once(here: Hub, out: Path) -> None:
    together = [case for case in WRONG if "config" not in case[1] and "not [99, " not in case[1]]
    distinct = {message: damage for damage, message in reversed(together) if "notes.md" not in message}
    distinct.pop("`model-00002-of-00003.safetensors` lacks `")
    distinct.pop("not merged by mergekit")
    for damage in {damage: None for damage in distinct.values() if damage not in (damage_shard, move_tensor)}:
        damage(out)
    damage_shard(out)
    plan = pushed(out)
    for message in distinct:
        if "00001" not in message:
            assert any(message in problem for problem in plan["problems"]), message


def test_hidden_and_excluded_files_are_not_sent(here: Hub, out: Path) -> None:
    for name in (
        ".env",
        ".git/config",
        ".cache/huggingface/x",
        "a.tmp",
        "logs/run.log",
        "optimizer.pt",
        "stage.json",
    ):
        add(name)(out) if name.count("/") < 2 else None
    (out / ".cache" / "huggingface").mkdir(parents=True)
    add(".cache/huggingface/x")(out)
    plan = pushed(out, "--exclude", "*.log", "--exclude", "optimizer.pt")
    assert plan["left_out"] == {
        ".cache/": "hidden",
        ".env": "hidden",
        ".git/": "hidden",
        "a.tmp": "temporary",
        "logs/run.log": "excluded",
        "optimizer.pt": "excluded",
        "stage.json": "temporary",
    }
    assert not {"optimizer.pt", ".env", "logs/run.log", "a.tmp"} & set(here.repositories[ME].files())
    assert not [path for path in out.rglob("*") if path.name == "trees"]


def test_pickles_are_sent_on_request(here: Hub, out: Path) -> None:
    add("more.bin")(out)
    assert push(out, "--allow-pickle").exit_code == 0
    assert here.repositories[ME].files()["more.bin"] == b"x"


def test_names_with_spaces_and_of_other_alphabets_arrive(here: Hub, out: Path) -> None:
    add("ein Maß/größe 1.txt", "ä")(out)
    assert push(out).exit_code == 0
    arrived(here, out)
    assert "nothing to do" in push(out).output


def test_a_token_of_another_form_is_not_printed_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "eyJh.of-a-job.c2ln")
    assert redact("sent eyJh.of-a-job.c2ln to host") == "sent <token> to host"


@given(st.text(), st.text(), st.sampled_from(["", "Bearer ", "https://user:", "?token="]))
def test_a_token_is_in_no_text(before: str, after: str, lead: str) -> None:
    assert TOKEN not in redact(f"{before}{lead}{TOKEN}{after}")
