"""Compares a vLLM server with the transformers engine: every supervised position, before rounding to float16.

\b
  vllm serve MODEL --dtype float32 --port 8901        in an environment of its own
  python benchmarks/engine.py MODEL --server-url http://localhost:8901 --rows 8 --save

Exit code 1 if a log-probability differs by more than 1e-4, or ids differ by more than the order of near-ties.
"""

import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
from measure import machine, publish, table

from fusion_trainer.alignment.pairing import read_blocks
from fusion_trainer.config import ExtractConfig
from fusion_trainer.data.prepare import prepare
from fusion_trainer.data.readers import DIALOGUES, Reader
from fusion_trainer.representations.engine import Distributions, Query
from fusion_trainer.representations.topk_model import TopKModel
from fusion_trainer.representations.vllm_engine import joined
from fusion_trainer.representations.vllm_server import VllmServer
from fusion_trainer.text.tokenizer import load_tokenizer
from varm_common.models import load_causal_lm

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from make_sharegpt import conversations, write_jsonl

TOLERANCE = 1e-4


def queries_of(config: ExtractConfig, work: Path) -> list[Query]:
    """The dialogues as the model reads them."""
    reader = Reader(load_tokenizer(Path(config.model), config.model), DIALOGUES)
    reads = enumerate(read_blocks(reader, prepare(config, work, quiet=True)))
    return [Query(read.tokens.ids, read.positions, f"row {row}") for row, read in reads if len(read.positions)]


def by_transformers(model: TopKModel, query: Query, k: int) -> Distributions:
    ids_L = torch.from_numpy(query.ids.astype(np.int64))
    positions_S = torch.from_numpy(query.positions.astype(np.int64))
    top = model.distributions(ids_L[None], None, positions_S, ids_L[positions_S + 1], k)
    columns = (top.ids_CK, top.logprobs_CK, top.tail_C, top.gold_logprob_C)
    return Distributions(*(column.numpy() for column in columns))


def differences(ours: Distributions, theirs: Distributions) -> dict[str, float]:
    """The greatest differences, and how the ids differ."""
    wrong_SK = ours.ids != theirs.ids
    ties = np.abs(ours.logprobs - theirs.logprobs)[wrong_SK]
    sets = (np.sort(ours.ids, 1) != np.sort(theirs.ids, 1)).any(1)
    return {
        "positions": len(ours.tail),
        "largest difference of a log-probability": float(np.abs(ours.logprobs - theirs.logprobs).max()),
        "of a gold log-probability": float(np.abs(ours.gold_logprob - theirs.gold_logprob).max()),
        "of a tail": float(np.abs(ours.tail - theirs.tail).max()),
        "positions with ids in another order": int(wrong_SK.any(1).sum()),
        "positions with other ids": int(sets.sum()),
        "largest difference where ids differ": float(ties.max()) if len(ties) else 0.0,
    }


@click.command(help=__doc__)
@click.argument("model")
@click.option("--server-url", required=True)
@click.option("--rows", default=8, show_default=True, help="Conversations of the data.")
@click.option("--max-length", default=512, show_default=True)
@click.option("--top-k", default=10, show_default=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/DATE-engine.md.")
def main(model: str, server_url: str, rows: int, max_length: int, top_k: int, save: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_jsonl(work / "chats.jsonl", islice(conversations(seed=3), rows))
        inputs = {"data": [str(work / "chats.jsonl")], "pivot": model, "model": model, "output": work / "store"}
        engine = {"engine": "vllm", "server_url": [server_url], "dtype": "float32"}
        config = ExtractConfig(**inputs, **engine, top_k=top_k, max_length=max_length)
        queries = queries_of(config, work)
    known = load_tokenizer(Path(model), model).vocabulary
    tokens = sum(len(query.ids) for query in queries)
    loaded = load_causal_lm(Path(model), model, dtype="float32", device=torch.device("cpu"))
    plain = TopKModel(loaded, known)
    start = time.perf_counter()
    ours = joined([by_transformers(plain, query, top_k) for query in queries])
    seconds = {"transformers": time.perf_counter() - start}
    server = VllmServer(config, known)
    try:
        start = time.perf_counter()
        theirs = joined([pending.result() for pending in [server.start([query], top_k) for query in queries]])
        seconds["vllm"] = time.perf_counter() - start
    finally:
        server.close()
    differing = differences(ours, theirs)
    values = [(name, f"{value:.3g}" if value % 1 else f"{value:,.0f}") for name, value in differing.items()]
    publish(
        "engine",
        "Engine comparison",
        f"    vllm serve {Path(model).name} --dtype float32\n    python benchmarks/engine.py {Path(model).name} "
        f"--server-url URL --rows {rows} --max-length {max_length} --top-k {top_k}",
        f"{machine()}; vLLM {server.made_with['vllm']}. {len(queries)} texts of {tokens:,} tokens, each text "
        "alone in transformers, all at once at the server; run it on an idle machine to compare speed.",
        table(("", "value"), values),
        table(("engine", "s", "tokens/s"), [(n, f"{s:.1f}", f"{tokens / s:.0f}") for n, s in seconds.items()]),
        save=save,
    )
    largest = max(value for name, value in differing.items() if name.startswith(("largest", "of a gold")))
    sys.exit(largest > TOLERANCE)


if __name__ == "__main__":
    main()
