"""Every command that README and docs show is run, in their order, as a reader would: in one folder, in a shell.

The models the documents name are tiny ones of the same architectures, on a Hub of our own. What needs eight GPUs
or SLURM is put in other words, or named below with the test that runs it.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import hub_server
import judge_server
import published_rows
import pytest
import tiny_sources
import torch
import yaml
from safetensors.torch import load, load_file, save_file
from warm import Warm

import fusion_trainer.cli
import varm_merge.cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "README.md",
    *(f"docs/{name}.md" for name in ("fusing", "merging", "formats", "scaling", "differences")),
    *(f"docs/{name}.md" for name in ("results", "extending")),
]
JUDGE = "http://localhost:8000/v1"
PIVOT, SOLAR = "openchat/openchat_3.5", "NousResearch/Nous-Hermes-2-SOLAR-10.7B"
TARGETS = ("FuseAI/OpenChat-3.5-7B-Mixtral", "FuseAI/OpenChat-3.5-7B-Solar")
MIXTRAL = "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO"

ELSEWHERE = {
    "make demo": "examples/demo.py is test_small_world.py's; the pipeline it runs is test_pipeline_runs.py's",
    "make real": "it takes over an hour; test_real_fusion.py tests its data, its pipeline and its report",
    "make evidence": "it takes 90 minutes; test_evidence.py tests its pipelines and its report",
    "make test": "this is it",
    "fusion-trainer run examples/fusechat_7b/pipeline.yaml\n": "test_pipeline_runs.py runs all stages of others",
    "varm-merge compare varm.yaml ties.yaml --out report/": "test_compare_tasks.py's server",
    "vllm serve report/models/": "as above",
    "torchrun --nproc-per-node 8 -m fusion_trainer extract": "test_fusion_programs.py shares a model",
    "sbatch examples/slurm/run.sbatch": "test_pipeline_runs.py starts stage.sh on two machines",
    "vllm serve": "test_vllm_real.py starts a server",
    "ray start": "it needs two machines",
    "fusion-trainer extract --engine vllm": "test_vllm_server.py queries servers",
}
"""Commands that are run by another test."""
INSTEAD = {
    "examples/accelerate/fsdp_8gpu.yaml": "examples/accelerate/cpu.yaml",
    "examples/accelerate/ddp_8gpu.yaml": "examples/accelerate/cpu.yaml",
    "--models demo_out/sharegpt": "--models demo_out/sharegpt --conversations 60",
    "--methods varm:layer,ties,linear --held-out held_out.jsonl": "--methods linear",  # README's has held-out text
    "--methods varm:layer,sce,ties,linear": "--methods linear",
    "--methods varm,sce,ties,dare_linear": "--methods dare_linear",
    "--out tuned/": "--out tuned/ --evaluations 3",
    "--output model_answer/VaRM.jsonl": "--output model_answer/VaRM.jsonl --max-new-tokens 64",
    "--output model_answer/CLM.jsonl": "--output model_answer/CLM.jsonl --max-new-tokens 64",
    "--name VaRM": "--name VaRM --max-new-tokens 64",
    "--judge gpt": f"--judge-url {JUDGE} --judge gpt",
}
"""What stands in for what, where a machine like this has no such thing."""


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(document: str) -> Iterator[str]:
    """The commands of a document's shell blocks, without those that are run elsewhere."""
    for block in blocks(document, "sh"):
        for shown in re.findall(r"(?:[^\n\\]|\\\n)+", block):
            if not (shown.strip() + "\n").startswith(tuple(ELSEWHERE)):
                for words, run in INSTEAD.items():
                    shown = shown.replace(words, run)
                yield shown


def judged(body: dict[str, Any]) -> str | dict[str, float]:
    """What a judge says: a rating, or where it is asked for probabilities, which of two is better."""
    return {"M": 0.75, "m": 0.25} if body.get("logprobs") else "A fair answer. Rating: [[7]]"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Programs that start at once, and a Hub that has the models."""
    folder = tmp_path_factory.mktemp("hub")
    with hub_server.serving() as hub, judge_server.serving(judged) as judge:
        for name, model in models.items():
            files = {path.name: path.read_bytes() for path in model.iterdir()}
            if name == PIVOT:  # it is published as a pickle
                files["pytorch_model.bin"] = pickled(files.pop("model.safetensors"))
            hub.add(name, files)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.url,
            "JUDGE": judge.url,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        warm = Warm(folder / "warm", environment)
        yield {**environment, "PATH": f"{warm.bin}:{Path(sys.executable).parent}:/usr/bin:/bin"}
        warm.end()


@pytest.fixture(scope="module")
def readers(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], models: dict[str, Path]
) -> dict[str, "Reader"]:
    """By the folder that a document is read in: the README's, and that of all docs."""
    return {name: Reader(tmp_path_factory.mktemp(name), environment, models) for name in ("readme", "docs")}


class Reader:
    """Someone with the repository and chat data."""

    def __init__(self, folder: Path, environment: dict[str, str], models: Mapping[str, Path]) -> None:
        self.folder, self.environment = folder, environment
        for name in ("examples", "yaml_recipes", "benchmarks", "fusion_trainer"):
            (folder / name).symlink_to(ROOT / name)
        chats = tiny_sources.made_up_chats(150, seed=3, words=8, turns=1)
        tiny_sources.write_sharegpt(folder / "chats.jsonl", chats)
        tiny_sources.write_sharegpt(folder / "held_out.jsonl", tiny_sources.made_up_chats(6, seed=4))
        self.has_the_benchmarks()
        self.has_run_the_demo(models)
        self.has_published_representations(models)

    def has_the_benchmarks(self) -> None:
        """Questions and prompts in the formats of FastChat and alpaca_eval."""
        question = {"question_id": 81, "category": "writing", "turns": ["sort 3 1 2", "and now the words"]}
        (self.folder / "question.jsonl").write_text(json.dumps(question) + "\n")
        fields = {
            "v1": ("question", "answer"),
            "v1-multi-turn": ("question_1", "answer_1", "question_2", "answer_2"),
        }
        reference = {"v1": ("ref_answer_1",), "v1-multi-turn": ("ref_answer_1", "ref_answer_2")}
        prompts = [
            {
                "name": f"single-{kind}{turns}",
                "type": "single",
                "system_prompt": "You judge.",
                "prompt_template": "\n".join(
                    f"{{{one}}}" for one in (*fields[turns], *(reference[turns] if kind else ()))
                ),
                "description": "",
                "category": "general",
                "output_format": "[[rating]]",
            }
            for kind in ("", "math-")
            for turns in fields
        ]
        (self.folder / "judge_prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
        choices = [{"index": 0, "turns": ["1 2 3", "hello please"]}]
        right = {"question_id": 81, "answer_id": "a", "model_id": "gpt-4", "choices": choices, "tstamp": 0.0}
        (self.folder / "reference_answer").mkdir()
        (self.folder / "reference_answer" / "gpt-4.jsonl").write_text(json.dumps(right) + "\n")
        asked = {"instruction": "add 1 2", "dataset": "made up", "generator": "gpt-4", "output": "3"}
        for name in ("alpaca_eval.json", "alpaca_eval_gpt4_baseline.json"):
            (self.folder / name).write_text(json.dumps([asked]))
        clf = "<|im_start|>user\n{instruction}\nm: {output_1}\nM: {output_2}\n<|im_end|>"
        (self.folder / "alpaca_eval_clf.txt").write_text(clf)

    def has_published_representations(self, models: Mapping[str, Path]) -> None:
        """Of the pivot, a source of another vocabulary, and one that was aligned."""
        chats = tiny_sources.made_up_chats(12, seed=6, words=8, turns=1)
        rows = {}
        for name, model, end in (
            ("openchat", PIVOT, "</s>"),
            ("solar", SOLAR, "<|im_end|>"),
            ("other", TARGETS[0], "</s>"),
        ):
            texts = [published_rows.chat_text(chat, end) for chat in chats]
            rows[name] = published_rows.represented(models[model], texts, end, 96)
        rows["mixtral-aligned"] = published_rows.with_source(rows["openchat"], rows.pop("other"), unaligned=(20,))
        for name, of_model in rows.items():
            published_rows.save(self.folder / "published" / name, of_model)

    def has_run_the_demo(self, models: Mapping[str, Path]) -> None:
        """What ``make demo`` leaves behind, as far as the tour uses it."""
        made = self.folder / "demo_out" / "fusion"
        shutil.copytree(models[PIVOT], self.folder / "demo_out" / "world" / "pivot")
        shutil.copy(self.folder / "held_out.jsonl", self.folder / "demo_out" / "world")
        recipe = {"merge_method": "varm", "base_model": "./demo_out/world/pivot", "dtype": "float32", "models": []}
        for seed, name in enumerate(("letters", "numbers", "almanac")):
            save_target(models[PIVOT], made / "targets" / name, seed)
            recipe["models"].append({"model": f"./demo_out/fusion/targets/{name}"})
        (made / "recipes").mkdir()
        (made / "recipes" / "varm.yaml").write_text(yaml.safe_dump(recipe))

    def write_files(self, document: str) -> None:
        """The YAML blocks of a document whose first line names their file."""
        for block in blocks(document, "yaml"):
            if named := re.match(r"# .*?([\w./-]+\.yaml)", block):
                (self.folder / named[1]).write_text(block)

    def does(self, script: str) -> str:
        environment = dict(self.environment)
        script = script.replace(JUDGE, environment["JUDGE"])
        if script == "varm-merge doctor":  # looks at what stands on PATH
            environment["PATH"] = environment["PATH"].partition(":")[2]
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout


def pickled(weights: bytes) -> bytes:
    """Safetensors as a ``.bin`` file."""
    file = io.BytesIO()
    torch.save(load(weights), file)
    return file.getvalue()


def save_models(folder: Path) -> dict[str, Path]:
    """By their names: the pivot, a source, and the two published targets."""
    template = (ROOT / "fusion_trainer" / "data" / "templates" / "openchat.jinja").read_text()
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
    models = {name: folder / str(number) for number, name in enumerate((PIVOT, SOLAR, *TARGETS))}
    tiny_sources.save_source(
        models[PIVOT], "mistral", "sentencepiece_bpe", template=template, num_key_value_heads=1, **small
    )
    chatml = (ROOT / "fusion_trainer" / "data" / "templates" / "chatml.jinja").read_text()  # Solar's own
    special = ("<|im_start|>", "<|im_end|>")
    tiny_sources.save_source(models[SOLAR], "llama", "byte_level_bpe", seed=1, template=chatml, special=special)
    for seed, target in enumerate(TARGETS):
        save_target(models[PIVOT], models[target], seed)
    models[MIXTRAL] = Path(shutil.copytree(models[SOLAR], folder / "mixtral"))
    return models


def save_target(pivot: Path, folder: Path, seed: int) -> None:
    """A copy of the pivot whose weights have moved."""
    shutil.copytree(pivot, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: weight + (seed + 1) * 1e-2 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(pivot / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_runs(readers: dict[str, Reader], document: str) -> None:
    reader = readers["readme" if document == "README.md" else "docs"]
    reader.write_files(document)
    for command in commands(document):
        reader.does(command)
    for program in blocks(document, "python"):
        subprocess.run([sys.executable, "-c", program], cwd=reader.folder, env=reader.environment, check=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_yaml_of_a_document_can_be_read(document: str) -> None:
    for block in blocks(document, "yaml"):
        assert isinstance(yaml.safe_load(block), dict), block


def test_what_is_run_elsewhere_still_stands_in_a_document() -> None:
    shown = "".join(block for document in DOCUMENTS for block in blocks(document, "sh"))
    for words in (*ELSEWHERE, *INSTEAD):
        assert words in re.sub(r" +# .*", "", shown), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_within_a_sentence_exist(document: str) -> None:
    programs = {"varm-merge": varm_merge.cli.main, "fusion-trainer": fusion_trainer.cli.main}
    text = re.sub(
        r"^```.*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for shown in re.findall(r"`((?:varm-merge|fusion-trainer) [^`]+)`", text):
        program, *words = shown.split()
        command: click.Command = programs[program]
        while words and isinstance(command, click.Group) and not words[0].startswith("-"):
            assert words[0] in command.commands, shown
            command = command.commands[words.pop(0)]
        known = {
            flag
            for option in command.get_params(click.Context(command))
            for flag in (*option.opts, *option.secondary_opts)
        }
        assert {word for word in words if word.startswith("--")} <= known | {"--help", "--version"}, shown


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if target.startswith("https://"):
            continue
        found = (ROOT / document).parent / path if path else ROOT / document
        assert found.exists(), f"{document}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, f"{document}: {target}"
