"""Named sets of tasks: the benchmarks of a published evaluation, as tasks of lm-evaluation-harness.

A published number is reproduced only approximately. The harness has its own prompts and reads answers in its own
way; `Benchmark.note` says where that matters. Numbers of one comparison can be compared with each other.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from varm_common.errors import UserError

__all__ = ["SHOTS", "SUITES", "Benchmark", "Suite", "Task", "missing", "read", "rows"]

SHOTS = re.compile(r"(?P<name>.+):(?P<shots>\d+)")
"""A task with a number of examples."""


@dataclass(frozen=True)
class Task:
    """A task of the harness, or a group or tag of tasks, and how it is run.

    Attributes:
        name: Its name in the harness, or its file.
        shots: Few-shot examples per question; None for the task's own number.
        chat: Whether the models' chat templates are used.
        max_tokens: The longest answer; None for the task's own limit.
        metric: The metric that is shown first.
    """

    name: str
    shots: int | None = None
    chat: bool = False
    max_tokens: int | None = None
    metric: str | None = None

    @property
    def label(self) -> str:
        """Its name in a report: ``mmlu:5``."""
        return self.name if self.shots is None else f"{self.name}:{self.shots}"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of a suite.

    Attributes:
        title: Its name in the publication.
        task: The task of the harness; None if the harness has none.
        note: How the task differs from the published evaluation; without a task, the program that has it.
    """

    title: str
    task: Task | None
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """The benchmarks of a publication, and the document that names their settings."""

    name: str
    source: str
    benchmarks: tuple[Benchmark, ...]

    @property
    def tasks(self) -> list[Task]:
        return [benchmark.task for benchmark in self.benchmarks if benchmark.task]


def _zero_shot(name: str, metric: str) -> Task:
    return Task(name, 0, metric=metric)


def _chat(name: str, metric: str, max_tokens: int, shots: int = 0) -> Task:
    return Task(name, shots, chat=True, max_tokens=max_tokens, metric=metric)


FILTERS = ("get-answer", "flexible-extract", "strict_match", "custom-extract", "default")
COT, FLEXIBLE, STRICT, EXTRACTED, DEFAULT = (f"exact_match ({name})" for name in FILTERS)
OWN_PROMPT = "the paper's prompt is OpenCompass's"
SAMPLED = "published: the mean of 32 sampled answers; here: one greedy answer"

FUSELLM = Suite(
    "fusellm",
    "FuseLLM (ICLR 2024, arXiv 2401.10491); github.com/fanqiwan/FuseAI, FuseLLM/README.md, Evaluation",
    (
        Benchmark("BBH", Task("bbh_cot_fewshot", 3, metric=COT), "the published program is open-instruct's"),
        Benchmark("ARC-easy", _zero_shot("arc_easy", "acc_norm")),
        Benchmark("ARC-challenge", _zero_shot("arc_challenge", "acc_norm")),
        Benchmark("BoolQ", _zero_shot("boolq", "acc")),
        Benchmark("HellaSwag", _zero_shot("hellaswag", "acc_norm")),
        Benchmark("OpenBookQA", _zero_shot("openbookqa", "acc_norm")),
        Benchmark("TriviaQA", _zero_shot("triviaqa", "exact_match (remove_whitespace)"), OWN_PROMPT),
        Benchmark("DROP", Task("drop", 2, metric="em"), f"{OWN_PROMPT}, with two worked examples"),
        Benchmark("LAMBADA", _zero_shot("lambada_openai", "acc"), f"{OWN_PROMPT}, and the word is generated"),
        Benchmark("MultiPL-E", None, "bigcode-evaluation-harness (multiple-*)"),
        Benchmark("IWSLT2017", None, "OpenCompass (the harness has only Arabic)"),
        Benchmark("SciBench", None, "OpenCompass"),
        Benchmark("Vicuna Bench", None, "FastChat's llm_judge"),
    ),
)
FUSECHAT = Suite(
    "fusechat",
    "FuseChat-3.0 (arXiv 2503.04222); github.com/fanqiwan/FuseAI, FuseChat-3.0/FuseEval",
    (
        Benchmark("MMLU", _chat("mmlu_cot_llama", STRICT, 2048), "not in the paper's list"),
        Benchmark("MMLU-Pro", _chat("mmlu_pro_llama", STRICT, 2048)),
        Benchmark("MMLU-redux", _chat("mmlu_redux_generative", DEFAULT, 2048), "here without reasoning"),
        Benchmark("GPQA-Diamond", _chat("gpqa_diamond_cot_zeroshot", FLEXIBLE, 2048)),
        Benchmark("GSM8K", _chat("gsm8k_cot_zeroshot", FLEXIBLE, 2048)),
        Benchmark("MATH", _chat("minerva_math", "math_verify", 2048)),
        Benchmark("HumanEval", _chat("humaneval_instruct", "pass@1 (create_test)", 1024), "published: EvalPlus"),
        Benchmark("MBPP", _chat("mbpp_instruct", "pass_at_1 (extract_code)", 1024), "published: EvalPlus"),
        Benchmark("AMC 23", None, "Qwen2.5-Math's evaluation"),
        Benchmark("LiveBench 0831", None, "LiveBench"),
        Benchmark("LiveCodeBench 2408-2411", None, "LiveCodeBench"),
        Benchmark("MT-Bench", None, "varm-merge evaluate"),
        Benchmark("AlpacaEval-2", None, "varm-merge evaluate"),
        Benchmark("Arena-Hard", None, "arena-hard-auto"),
        Benchmark("AlignBench v1.1", None, "AlignBench"),
    ),
)
FUSEO1 = Suite(
    "fuseo1",
    "FuseO1-Preview; github.com/fanqiwan/FuseAI, FuseO1-Preview/README.md",
    (
        Benchmark("AIME24", _chat("aime24", "exact_match", 32768), SAMPLED),
        Benchmark("MATH500", _chat("minerva_math500", "math_verify", 32768), "published: sampled"),
        Benchmark("GPQA-Diamond", _chat("gpqa_diamond_cot_zeroshot", FLEXIBLE, 32768), "published: sampled"),
        Benchmark("MMLU-Pro", _chat("mmlu_pro", EXTRACTED, 32768), "published: sampled"),
        Benchmark("MMLU", _chat("mmlu_cot_llama", STRICT, 32768), "published: sampled"),
        Benchmark("OlympiadBench", None, "Qwen2.5-Math's evaluation"),
        Benchmark("LiveCodeBench 2408-2502", None, "LiveCodeBench"),
    ),
)
SUITES = {suite.name: suite for suite in (FUSELLM, FUSECHAT, FUSEO1)}


def read(names: Sequence[str], shots: int | None = None, chat: bool = False) -> tuple[Task, ...]:
    """The tasks that names stand for: suites, ``task:5`` for a task with five examples, or plain tasks.

    Args:
        names: What the user wrote.
        shots: Few-shot examples for tasks that are named without a number. Suites have their own numbers.
        chat: Whether tasks outside of suites use the chat template.

    Raises:
        UserError: A suite is given a number of examples, or a task is named twice with different settings.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _named(name, shots, chat):
            if tasks.setdefault(task.label, task) != task:
                raise UserError(
                    f"--tasks: `{task.label}` is named twice, with and without chat template or length"
                )
    return tuple(tasks.values())


def _named(name: str, shots: int | None, chat: bool) -> list[Task]:
    if name in SUITES:
        return SUITES[name].tasks
    if match := SHOTS.fullmatch(name):
        if (task := match["name"]) in SUITES:
            raise UserError(f"--tasks: `{task}` is a suite and has its own numbers of examples, so no `{name}`")
        return [Task(task, int(match["shots"]), chat)]
    return [Task(name, shots, chat)]


def missing(names: Sequence[str]) -> Iterator[str]:
    """For each suite among the names a sentence on the benchmarks that the harness does not have."""
    for suite in (SUITES[name] for name in dict.fromkeys(names) if name in SUITES):
        others = [f"{item.title} ({item.note})" for item in suite.benchmarks if item.task is None]
        if others:
            yield f"{suite.name}: lm-evaluation-harness does not have {', '.join(others)}"


def rows(suite: Suite) -> Iterator[tuple[str, ...]]:
    """A suite as lines of a table: benchmark, task, examples, metric, note."""
    for benchmark in suite.benchmarks:
        task = benchmark.task or replace(Task("–"), metric="–")
        shots = "–" if task.shots is None else str(task.shots)
        yield (benchmark.title, task.name, shots, task.metric or "", benchmark.note)
