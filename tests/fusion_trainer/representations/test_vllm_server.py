"""``fusion-trainer extract --engine vllm --server-url``: the store of transformers, whatever the servers do."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sources
import vllm_protocol
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_trainer.cli import main
from fusion_trainer.representations import model_servers
from fusion_trainer.representations.engine import Query
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.representations.vllm_engine import TooFewError, reduced

CHATS = tiny_sources.made_up_chats(8, words=10)
pytestmark = pytest.mark.slow
FAULTS = [429, "reset", 503, "cut", "html", 500, "short", "no gold", 502, "sleep"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_sources.write_sharegpt(folder / "chats.jsonl", CHATS)
    tiny_sources.save_source(folder / "mistral", "mistral", "sentencepiece_bpe")
    tiny_sources.save_source(folder / "llama", "llama", "unigram", padded=40)
    return folder


def extract(world: Path, output: Path, **own: Any) -> Result:
    given = {
        "data": world / "chats.jsonl",
        "pivot": world / "mistral",
        "template": "openchat",
        "source_template": "pivot",
        "model": world / "mistral",
        "output": output,
        "shard_tokens": 300,
        "dialogues": world / "dialogues",
        **own,
    }
    flags = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]
    result = CliRunner().invoke(main, ["extract", *flags])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def at(*servers: vllm_protocol.Served, **own: Any) -> dict[str, Any]:
    return {"engine": "vllm", "server_url": ",".join(one.url for one in servers), "server_timeout": 30, **own}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.arrow")}


@pytest.fixture(scope="module")
def healthy(world: Path) -> Path:
    """The store from a server that never fails."""
    with vllm_protocol.serving(world / "mistral") as server:
        result = extract(world, world / "healthy", **at(server))
    assert result.exit_code == 0, result.output
    assert sorted(server.answered) == sorted({*server.answered})
    return world / "healthy"


@pytest.mark.parametrize("source", ["mistral", "llama"])
def test_the_store_is_that_of_transformers(source: str, world: Path, tmp_path: Path) -> None:
    """llama's rows that stand for no token are among the likeliest: then more are asked for."""
    model = world / source
    assert extract(world, tmp_path / "plain", model=model).exit_code == 0
    with vllm_protocol.serving(model, max_logprobs=400) as server:
        result = extract(world, tmp_path / "store", model=model, **at(server))
    assert result.exit_code == 0, result.output
    ours, theirs = RepresentationStore(tmp_path / "store"), RepresentationStore(tmp_path / "plain")
    assert not list(ours.problems())
    assert (ours.identity["engine"], ours.identity["dtype"]) == ("vllm", theirs.identity["dtype"])
    assert ours.manifest["made_with"][0]["vllm"] == "0.0.test"
    for one, other in zip(ours, theirs, strict=True):
        for name in ("logprobs", "gold_logprob", "tail"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=2**-10, atol=1e-4)
        differ = one.ids != other.ids  # near-ties: as likely as the other, to the last place
        np.testing.assert_allclose(one.logprobs[differ], other.logprobs[differ], rtol=2**-10, atol=1e-4)
        assert differ.mean() < 0.01


def test_faults_lose_nothing_and_store_nothing_twice(world: Path, healthy: Path, tmp_path: Path) -> None:
    with vllm_protocol.serving(world / "mistral", FAULTS) as one, vllm_protocol.serving(world / "mistral") as two:
        result = extract(world, tmp_path / "store", **at(one, two, server_timeout=2))
    assert result.exit_code == 0, result.output
    assert len(one.faults) < len(FAULTS)
    assert one.answered
    assert two.answered
    assert shards(tmp_path / "store") == shards(healthy)


def test_a_server_that_only_fails_does_not_end_what_another_can_do(
    world: Path, healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_servers, "LONGEST_WAIT_S", 0.5)
    broken, well = (vllm_protocol.serving(world / "mistral", faults) for faults in ([500] * 10_000, []))
    with broken as one, well as two:
        result = extract(world, tmp_path / "store", **at(one, two, server_concurrency=2))
    assert result.exit_code == 0, result.output
    assert len(one.faults) < 10_000
    assert shards(tmp_path / "store") == shards(healthy)


class _Closing(BaseHTTPRequestHandler):
    """A server that takes its time and closes the connection after each reply."""

    requests = 0

    def do_POST(self) -> None:
        type(self).requests += 1
        time.sleep(0.5)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_that_closes_its_connections_has_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_servers, "CONNECT_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Closing) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers = model_servers.ModelServers([f"http://127.0.0.1:{server.server_port}"], "", 30, 1)
        replies = [servers.request("/x", {}, "a request", lambda reply: reply) for _ in range(3)]
        servers.close()
        server.shutdown()
    assert replies == [[], [], []]
    assert _Closing.requests == 3


def test_a_server_that_dies_and_comes_back(world: Path, healthy: Path, tmp_path: Path) -> None:
    with vllm_protocol.serving(world / "mistral", [None, None, *["reset"] * 20]) as first:
        threading.Timer(0.5, first.faults.clear).start()
        result = extract(world, tmp_path / "store", **at(first, server_timeout=20, server_concurrency=2))
    assert result.exit_code == 0, result.output
    assert shards(tmp_path / "store") == shards(healthy)


def test_what_a_dead_server_has_answered_is_kept(world: Path, healthy: Path, tmp_path: Path) -> None:
    with vllm_protocol.serving(world / "mistral", [None, None, None, *[503] * 10_000]) as server:
        result = extract(world, tmp_path / "store", **at(server, server_concurrency=1, server_timeout=3))
    assert result.exit_code == 1
    for part in (server.url, "no server has answered for 3 s", "conversation 'chat-", "run the same command"):
        assert part in result.output, result.output
    with vllm_protocol.serving(world / "mistral") as again:
        result = extract(world, tmp_path / "store", **at(again))
    assert result.exit_code == 0, result.output
    assert not {*server.answered} & {*again.answered} - {again.answered[0]}
    assert shards(tmp_path / "store") == shards(healthy)


REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("too few", {"max_logprobs": 5}, {}, "--max-logprobs 10"),
    ("another model", {"name": "other/model"}, {}, "--server-model"),
    ("a key", {"key": "secret"}, {}, "--server-key-env"),
    ("a setting", {}, {"attention": "sdpa"}, "`attention`: no effect"),
    ("no url", {}, {"server_url": "localhost:8000"}, "must begin with http"),
    ("out of reach", {}, {"server_url": "http://127.0.0.1:9"}, "127.0.0.1:9/v1/models: no connection ("),
    (
        "poison",
        {"faults": ["short"] * 500},
        {"server_concurrency": 1},
        "no usable reply to 5 requests for conversation",
    ),
]


@pytest.mark.parametrize(
    ("own", "given", "message"), [case[1:] for case in REFUSALS], ids=[c[0] for c in REFUSALS]
)
def test_what_cannot_work_is_said(
    own: dict[str, Any], given: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    with vllm_protocol.serving(world / "mistral", **own) as server:
        result = extract(world, tmp_path / "store", **at(server) | given)
    assert result.exit_code == 1
    assert message in result.output
    assert "secret" not in result.output
    assert "Traceback" not in result.output


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_entries_become_the_k_likeliest_known_ids(data: Any) -> None:
    k = data.draw(st.integers(1, 4))
    weights = np.array(data.draw(st.lists(st.integers(1, 99), min_size=8, max_size=8, unique=True)), float)
    logprobs = np.log(weights / weights.sum())
    known = frozenset(data.draw(st.sets(st.integers(0, 7), min_size=k + 1)))
    gold = data.draw(st.sampled_from(sorted(known)))
    asked = data.draw(st.integers(k, 8))
    entry = {int(one): float(logprobs[one]) for one in [*np.argsort(-logprobs)[:asked], gold]}
    query = Query(np.array([0, gold], np.int32), np.array([0], np.int32), "a text")
    expected = [int(one) for one in np.argsort(-logprobs) if one in known][:k]
    likeliest = [int(one) for one in np.argsort(-logprobs)[:asked]]
    if len(known & {*likeliest}) < k:
        with pytest.raises(TooFewError):
            reduced(query, [entry], k, asked, known)
        return
    found = reduced(query, [entry], k, asked, known)
    assert found.ids[0].tolist() == expected
    np.testing.assert_allclose(found.tail[0], 1 - np.exp(logprobs[expected]).sum(), atol=1e-6)
    np.testing.assert_allclose(found.gold_logprob[0], logprobs[gold], rtol=1e-6)
