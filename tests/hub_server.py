"""A Hub on the loopback: the endpoints that the real ``huggingface_hub`` client uses, over real HTTP.

It holds repositories as commits of files, and large files by their SHA-256. It counts requests and bytes, and
fails where a test wants it to.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "Q7" * 17
"""May read and write."""
READ_TOKEN = "hf_" + "R8" * 17
"""May read."""
LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".png")

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Repository:
    """Its branches, each a list of (message, files). The files of a gated one need ``TOKEN``."""

    private: bool = False
    gated: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=lambda: {"main": []})

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commits = self.branches[revision]
        return commits[-1][1] if commits else {}

    def sha(self, revision: str = "main") -> str:
        text = json.dumps([revision, len(self.branches[revision])])
        return hashlib.sha1(text.encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """A request, and how many bytes of its body were read."""

    method: str
    path: str
    received: int
    authorization: str


@dataclass
class Fault:
    """Fails the requests that fit, ``times`` times.

    ``status`` is the reply; None cuts the connection, after ``after`` bytes of the body. ``late``: the request is
    carried out first, and its reply is lost. ``hold``: there is no reply until it is set. ``meanwhile`` is called
    before the request is carried out as usual.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = 500
    message: str = "injected"
    after: int = 0
    late: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None
    meanwhile: Callable[[], object] | None = None

    def fits(self, method: str, path: str) -> bool:
        if self.times > 0 and method == self.method and re.search(self.path, path):
            self.times -= 1
            return True
        return False


class Hub:
    """The state of the server, for tests to read and set. The repository of a data set is ``datasets/<id>``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.sent_bytes = 0
        self.faults: list[Fault] = []
        self.part_bytes: int | None = None
        self.pull_requests: list[tuple[str, dict[str, bytes]]] = []
        self.url = ""
        self.lock = threading.RLock()

    def count(self, method: str, path: str) -> int:
        """The number of requests by a method, to paths that match."""
        return sum(seen.method == method and re.search(path, seen.path) is not None for seen in self.requests)

    def add(self, repo: str, files: Mapping[str, bytes], *, revision: str = "main", **how: Any) -> Repository:
        """A repository with one commit, on the branch ``revision``."""
        repository = self.repositories[repo] = Repository(**how)
        repository.branches.setdefault(revision, []).append(("initial commit", dict(files)))
        return repository


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers at ``hub.url``."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Refused(Exception):  # noqa: N818  an answer, no error of the server
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer: Answer = (status, headers, json.dumps({"error": message}).encode())


def _json(content: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each reply, sent as head and body, waits 40 ms
    hub: Hub

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        path = self.path
        fault = next((fault for fault in self.hub.faults if fault.fits(self.command, path)), None)
        if fault is not None and fault.meanwhile is not None:
            fault.meanwhile()
            fault = None
        if fault is not None and not fault.late:
            return self._fail(fault)
        body = self._body()
        self._note(len(body))
        try:
            answer = self._answer(urlsplit(path).path, parse_qs(urlsplit(path).query), body)
        except _Refused as refused:
            answer = refused.answer
        if fault is not None:
            return self._fail(fault)
        return self._reply(*answer)

    def _note(self, received: int) -> None:
        with self.hub.lock:
            authorization = self.headers.get("Authorization", "")
            self.hub.requests.append(Request(self.command, self.path, received, authorization))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _fail(self, fault: Fault) -> None:
        after = min(fault.after, int(self.headers.get("Content-Length") or 0))
        if fault.hold is not None:
            self.rfile.read(after)
            fault.hold.wait()
            self.close_connection = True
            return
        if fault.status is None:
            self._note(len(self.rfile.read(after)) if after else 0)
            self.close_connection = True
            self.connection.close()
            return
        if not fault.late:
            self._note(len(self._body()))
        headers = {"X-Error-Message": fault.message, "Content-Type": "text/plain", **fault.headers}
        self._reply(fault.status, headers, fault.message.encode())

    def _reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if self.command == "HEAD":
            body = b""
        with self.hub.lock:
            self.hub.sent_bytes += len(body)
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # Replies

    def _answer(self, path: str, query: Mapping[str, list[str]], body: bytes) -> Answer:
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                found = {name: unquote(text) for name, text in match.groupdict("").items()}
                with self.hub.lock:
                    return answer(self, query=query, body=body, **found)
        raise _Refused(404, "no such page")

    def _repository(self, repo: str, write: bool = False, revision: str | None = None) -> Repository:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (TOKEN, READ_TOKEN):
            raise _Refused(401, "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not token):
            raise _Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        if write and token != TOKEN:
            raise _Refused(403 if token else 401, "you may not write here")
        if revision is not None and revision not in repository.branches and revision not in self._shas(repository):
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository

    def _shas(self, repository: Repository) -> dict[str, str]:
        return {repository.sha(branch): branch for branch in repository.branches}

    def create(self, body: bytes, **_: Any) -> Answer:
        wanted = json.loads(body)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != TOKEN:
            raise _Refused(403 if token == READ_TOKEN else 401, "you may not create a repository here")
        repo = f"{wanted['organization']}/{wanted['name']}"
        reply = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": "1"}
        if repo in self.hub.repositories:
            return _json({"error": "You already created this model repo", **reply}, 409)
        self.hub.add(
            repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=wanted["visibility"] == "private"
        )
        return _json(reply)

    def info(self, repo: str, rev: str = "main", **_: Any) -> Answer:
        repository = self._repository(repo, revision=rev)
        branch = self._shas(repository).get(rev, rev)
        files = repository.files(branch)
        card = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), re.DOTALL)
        import yaml

        siblings = [{"rfilename": path, "size": len(data), **_hashes(path, data)} for path, data in files.items()]
        return _json(
            {
                "id": repo,
                "sha": repository.sha(branch),
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "siblings": siblings,
                "cardData": yaml.safe_load(card[1]) if card else None,
            }
        )

    def tree(self, repo: str, rev: str, query: Mapping[str, list[str]], path: str = "", **_: Any) -> Answer:
        repository = self._repository(repo, revision=rev)
        below = {
            name: data
            for name, data in repository.files(self._shas(repository).get(rev, rev)).items()
            if name.startswith(f"{path}/" if path else "")
        }
        if path and not below:
            raise _Refused(404, f"{path} does not exist", "EntryNotFound")
        reply = {}
        for name, data in below.items():
            inner = name[len(path) + 1 if path else 0 :]
            if "/" in inner and query.get("recursive", ["true"])[0].lower() == "false":
                folder = name[: len(name) - len(inner) + inner.index("/")]
                reply[folder] = {"type": "directory", "path": folder, "size": 0, "oid": _git(folder.encode())}
            else:
                reply[name] = _entry(name, data)
        return _json(list(reply.values()))

    def access(self, repo: str, **_: Any) -> Answer:
        self._read(self._repository(repo))
        return _json({})

    def _read(self, repository: Repository) -> None:
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(403, "Access to this model is restricted", "GatedRepo")

    def validate(self, body: bytes, **_: Any) -> Answer:
        content = json.loads(body)["content"]
        if "license: nonsense" in content:
            return _json(
                {"errors": [{"message": '"license" must be one of [apache-2.0, …]'}], "warnings": []}, 400
            )
        return _json({"errors": [], "warnings": []})

    def branch(self, repo: str, name: str, **_: Any) -> Answer:
        repository = self._repository(repo, write=True)
        if name in repository.branches:
            return _json({"error": "Reference already exists"}, 409)
        repository.branches[name] = list(repository.branches["main"])
        return _json({})

    def preupload(self, repo: str, rev: str, body: bytes, **_: Any) -> Answer:
        files = self._repository(repo, write=True, revision=rev).files(rev)
        reply = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 5_000_000
            mode = "lfs" if large else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if (data := files.get(file["path"])) is not None:
                entry["oid"] = hashlib.sha256(data).hexdigest() if large else _git(data)
            reply.append(entry)
        return _json({"files": reply})

    def batch(self, repo: str, body: bytes, **_: Any) -> Answer:
        self._repository(repo, write=True)
        objects = [self._object(wanted) for wanted in json.loads(body)["objects"]]
        return _json({"transfer": "basic", "objects": objects})

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        signed = "X-Amz-Signature=5ec7e7"
        upload: dict[str, Any] = {"href": f"{self.hub.url}/large/{oid}?{signed}"}
        if self.hub.part_bytes:
            parts = range(-(-size // self.hub.part_bytes))
            urls = {str(n + 1): f"{self.hub.url}/large/{oid}/part/{n}?{signed}" for n in parts}
            upload = {"href": f"{self.hub.url}/large/{oid}/complete", "header": urls}
            upload["header"]["chunk_size"] = str(self.hub.part_bytes)
        return {"oid": oid, "size": size, "actions": {"upload": upload}}

    def put(self, oid: str, body: bytes, **_: Any) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content is not what was announced")
        self.hub.objects[oid] = body
        return 200, {}, b""

    def put_part(self, oid: str, number: str, body: bytes, **_: Any) -> Answer:
        self.hub.objects[f"{oid}/{number}"] = body
        return 200, {"ETag": f'"{number}"'}, b""

    def complete(self, oid: str, body: bytes, **_: Any) -> Answer:
        numbers = [int(part["etag"].strip('"')) for part in json.loads(body)["parts"]]
        return self.put(oid, b"".join(self.hub.objects.pop(f"{oid}/{number}") for number in numbers))

    def commit(self, repo: str, rev: str, query: Mapping[str, list[str]], body: bytes) -> Answer:
        repository = self._repository(repo, write=True, revision=rev)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent not in (None, repository.sha(rev)):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.files(rev))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        message = header["value"]["summary"]
        reply: dict[str, Any] = {"commitOid": repository.sha(rev)}
        if "create_pr" in query:
            self.hub.pull_requests.append((message, files))
            reply["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{len(self.hub.pull_requests)}"
        else:
            repository.branches[rev].append((message, files))
            reply["commitOid"] = repository.sha(rev)
        return _json({**reply, "commitUrl": f"{self.hub.url}/{repo}/commit/{reply['commitOid']}"})

    def resolve(self, repo: str, rev: str, path: str, **_: Any) -> Answer:
        repository = self._repository(repo, revision=rev)
        self._read(repository)
        branch = self._shas(repository).get(rev, rev)
        data = repository.files(branch).get(path)
        if data is None:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        etag = _hashes(path, data).get("lfs", {}).get("sha256", _git(data))
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.sha(branch), "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return 200, {**headers, "Content-Length": str(len(data))}, b""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]
        return 200, headers, data


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _hashes(path: str, data: bytes) -> dict[str, Any]:
    if not path.endswith(LARGE):
        return {"blobId": _git(data)}
    sha = hashlib.sha256(data).hexdigest()
    return {"blobId": _git(sha.encode()), "lfs": {"sha256": sha, "size": len(data), "pointerSize": 130}}


def _entry(path: str, data: bytes) -> dict[str, Any]:
    hashes = _hashes(path, data)
    large = {"lfs": {**hashes["lfs"], "oid": hashes["lfs"]["sha256"]}} if "lfs" in hashes else {}
    return {"type": "file", "path": path, "size": len(data), "oid": hashes["blobId"], **large}


_REPO = r"(?P<repo>(?:datasets/)?[\w.-]+/[\w.-]+)"
_API = rf"/api/(?:models/)?{_REPO}"
_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", rf"{_API}", _Handler.info),
    ("GET", rf"{_API}/revision/(?P<rev>.+)", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("GET", rf"{_API}/auth-check", _Handler.access),
    ("POST", rf"{_API}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", rf"{_API}/preupload/(?P<rev>.+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<rev>.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(?P<oid>\w+)", _Handler.put),
    ("PUT", r"/large/(?P<oid>\w+)/part/(?P<number>\d+)", _Handler.put_part),
    ("POST", r"/large/(?P<oid>\w+)/complete", _Handler.complete),
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
