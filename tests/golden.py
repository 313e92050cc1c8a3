"""Whether two commits give the same results, byte for byte: run before and after a rebuild.

    python tests/golden.py 250a244              that commit against this tree
    python tests/golden.py 250a244 --keep DIR   and keep both sides' files in DIR

Both sides get the same tiny models and chats and run the same public commands in one environment: a pipeline of
three sources (ten steps of training), alignment by every map and both pairings, a merge at every granularity. All
files that they write are compared, but for versions, times and file sizes in JSON, the cache of hashes (sums.json)
and model cards, in which mergekit lists the models in a random order.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
MAPS = ("exact", "min_edit_distance", "statistics", "statistics_published", "prefix")
GRANULARITIES = ("model", "layer", "module", "matrix", "parameter")
VOLATILE = re.compile(
    r"version|_s$|seconds|time|date|elapsed|per_second|memory|rss|host|pid|machine|created|duration|wall|size$|bytes_on"
)


def commands(folder: Path) -> Iterator[list[str]]:
    """What is run in ``folder``, after its inputs are there."""
    import yaml

    yield ["fusion-trainer", "run", "pipeline.yaml", "-q"]
    stores = folder / "work"
    bytes_store, pivot_store = (
        next(stores.glob(f"**/{name}/manifest.json")).parent for name in ("bytes", "pivot")
    )
    for name in MAPS:
        for positions in ("boundary", "dtw"):
            where = [
                "--source-store",
                str(bytes_store.relative_to(folder)),
                "--output",
                f"aligned/{name}-{positions}",
            ]
            where += ["--pivot-store", str(pivot_store.relative_to(folder)), "--maps", "maps", "--workers", "1"]
            yield ["fusion-trainer", "align", *where, "--map", name, "--positions", positions, "-q"]
    targets = sorted(path.parent for path in stores.glob("targets/*/model.safetensors"))
    models = [{"model": str(path.relative_to(folder))} for path in targets]
    recipes = {f"varm-{name}": {"granularity": name} for name in GRANULARITIES}
    recipes |= {
        "varm-select": {"select_topk": 0.5, "erase_minority": True},
        "varm-softmax": {"normalization": "softmax"},
    }
    for name, parameters in recipes.items():
        recipe = {"merge_method": "varm", "base_model": "./pivot", "models": models, "parameters": parameters}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "dtype": "float32"}))
        yield ["mergekit-yaml", f"{name}.yaml", f"merged/{name}", "--quiet"]


def run(code: Path, folder: Path) -> None:
    """Run the commands with the packages of ``code``."""
    startup = next(code.glob("varm_merge/*/_varm_merge_autoload.py")).parent
    environment = {**os.environ, "PYTHONPATH": f"{code}{os.pathsep}{startup}", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
    for command in commands(folder):
        program = [sys.executable, str(PROGRAMS / command[0]), *command[1:]]
        done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{code}: {' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def steady(value: Any) -> Any:
    """A JSON value without what differs between two runs of one commit."""
    if isinstance(value, dict):
        kept = {
            key: part for key, part in value.items() if not VOLATILE.search(key.lower()) and key != "README.md"
        }
        return {key: steady(part) for key, part in kept.items()}
    return [steady(part) for part in value] if isinstance(value, list) else value


def results(folder: Path) -> dict[str, str]:
    """A hash of every file that the commands have written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (
            not path.is_file()
            or path.is_symlink()
            or path.suffix in (".log", ".lock", ".bin", ".pt", ".pth", ".md")
            or path.name == "sums.json"
        ):
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(steady(json.loads(content)), sort_keys=True).encode()
        elif path.suffix == ".jsonl":
            content = json.dumps([steady(json.loads(line)) for line in content.splitlines() if line]).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def make(folder: Path) -> None:
    """Models, chats and the pipeline's file."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_pipeline

    tiny_pipeline.make(folder)
    tiny_pipeline.write(folder, train__training__max_steps=10, train__training__save_steps=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    work = arguments.keep or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    make(work / "before")
    shutil.copytree(work / "before", work / "after")
    code = work / "code"
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", code, arguments.commit], cwd=ROOT, check=True)
    try:
        run(code, work / "before")
        run(ROOT, work / "after")
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", code], cwd=ROOT, check=True)
    before, after = results(work / "before"), results(work / "after")
    other = {name for name in before | after if before.get(name) != after.get(name)}
    for name in sorted(other):
        print("only before:" if name not in after else "only after:" if name not in before else "differs:", name)
    print(f"{len(before)} files before, {len(after)} after, {len(other)} differ")
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
