"""``varm-merge evaluate judge`` and ``results``, against a real HTTP server that fails as such servers do."""

import json
import math
import os
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import judge_server
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from judge_server import Fault, serving
from programs import BIN

from varm_common.errors import UserError
from varm_merge.cli import main
from varm_merge.evaluation import alpaca_eval, mt_bench, results
from varm_merge.evaluation.endpoint import Endpoint
from varm_merge.evaluation.questions import read_questions

KEY = "sk-very-secret-0123456789"
WITH_KEY = ("--judge-key-env", "JUDGE_KEY")
CATEGORIES = ("writing", "math", "stem", "coding")
QUESTIONS = [
    {"question_id": 101 + number, "category": category, "turns": [f"first of {category}?", "and {then}?"]}
    for number, category in enumerate(CATEGORIES)
]
PROMPTS = [
    {
        "name": name,
        "type": "single",
        "system_prompt": f"You are the judge of {name}.",
        "prompt_template": template,
        "output_format": "[[rating]]",
    }
    for name, template in {
        "single-v1": "asked {question} said {answer} {{rate}}",
        "single-math-v1": "asked {question} right {ref_answer_1} said {answer}",
        "single-v1-multi-turn": "asked {question_1} said {answer_1} asked {question_2} said {answer_2}",
        "single-math-v1-multi-turn": "asked {question_1} right {ref_answer_1} asked {question_2} "
        "right {ref_answer_2} said {answer_1} said {answer_2}",
    }.items()
]
MODELS = ("CLM", "VaRM")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(name: str) -> list[dict[str, Any]]:
    return [
        {
            "question_id": q["question_id"],
            "choices": [{"index": 0, "turns": [f"{name} {i} to {q['category']}" for i in (1, 2)]}],
        }
        for q in QUESTIONS
    ]


class Bench:
    """The files of an MT-Bench, and the command that has its answers judged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.questions = write_lines(folder / "question.jsonl", QUESTIONS)
        self.prompts = write_lines(folder / "judge_prompts.jsonl", PROMPTS)
        self.references = write_lines(folder / "reference_answer" / "gpt-4.jsonl", answers_of("right"))
        self.answers = [
            write_lines(folder / "model_answer" / f"{name}.jsonl", answers_of(name)) for name in MODELS
        ]
        self.output = folder / "model_judgment" / "judge_single.jsonl"

    def arguments(self, url: str, *more: object) -> list[str]:
        files = ["--questions", self.questions, "--prompts", self.prompts, "--references", self.references]
        to = ["--judge", "the-judge", "--judge-url", url, "--output", self.output]
        begin = ["evaluate", "judge", "mt-bench", *self.answers]
        return [str(argument) for argument in (*begin, *files, *to, *more)]

    def judged(self, url: str, *more: object, key: str = KEY, **own: Any) -> Result:
        arguments = self.arguments(url, "--quiet", *more, *(() if own else ("--yes",)))
        return CliRunner().invoke(main, arguments, env={"OPENAI_API_KEY": key, "JUDGE_KEY": key}, **own)

    def scores(self) -> dict[tuple[str, int, int], float]:
        return {(row["model"], row["question_id"], row["turn"]): row["score"] for row in lines(self.output)}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def rated(body: dict[str, Any]) -> str:
    """A rating from 1 to 9 that the prompt decides."""
    return f"Good [1], but not the best. Rating: [[{1 + sum(body['messages'][-1]['content'].encode()) % 9}]]"


# MT-Bench


def test_each_turn_is_judged_with_the_prompt_of_its_category(bench: Bench) -> None:
    with serving(rated, key=KEY) as server:
        done = bench.judged(server.url, *WITH_KEY)
    assert done.exit_code == 0, done.output
    rows = lines(bench.output)
    assert len(rows) == len(MODELS) * len(QUESTIONS) * 2
    for row in rows:
        assert list(row) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    prompts = {(row["model"], row["question_id"], row["turn"]): (row["judge"], row["user_prompt"]) for row in rows}
    assert prompts["VaRM", 101, 1] == (
        ["the-judge", "single-v1"],
        "asked first of writing? said VaRM 1 to writing {rate}",
    )
    assert prompts["CLM", 103, 2] == (
        ["the-judge", "single-v1-multi-turn"],
        "asked first of stem? said CLM 1 to stem asked and {then}? said CLM 2 to stem",
    )
    assert prompts["VaRM", 102, 1] == (
        ["the-judge", "single-math-v1"],
        "asked first of math? right right 1 to math said VaRM 1 to math",
    )
    assert prompts["CLM", 104, 2] == (
        ["the-judge", "single-math-v1-multi-turn"],
        "asked first of coding? right right 1 to coding asked and {then}? right right 2 to coding "
        "said CLM 1 to coding said CLM 2 to coding",
    )
    bodies = {body["messages"][1]["content"]: body for body in server.requests}
    for row in rows:
        body = bodies[row["user_prompt"]]
        assert row["judgment"] == rated(body)
        assert row["score"] == int(rated(body).split("[[")[1][0])
        system = {"role": "system", "content": f"You are the judge of {row['judge'][1]}."}
        assert body["messages"] == [system, {"role": "user", "content": row["user_prompt"]}]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("the-judge", 0, 2048)


@pytest.mark.parametrize(
    ("judgment", "expected"),
    [
        ("Rating: [[7]]", 7),
        ("[[8.5]] though [[3]]", 8.5),
        ("see [1]. Rating: [[10]]", 10),
        ("Rating: [6]", 6),
        ("[[7.0]]", 7),
        ("Rating: 7", -1),
        ("[[seven]]", -1),
        ("[[11]]", 11),
        ("[[0]]", 0),
        ("[[-3]]", -1),
        ("", -1),
        ("[[7/10]] or [[ 7 ]]", -1),
    ],
)
def test_ratings_are_read_as_fastchat_reads_them(judgment: str, expected: float) -> None:
    assert mt_bench.rating(judgment) == expected


def test_texts_of_any_characters_are_judged(bench: Bench) -> None:
    """Line separators, and half of a character that a server has cut."""
    odd = "a\u2028b\x85c \ud83d 日本 [[5]]"
    write_lines(bench.questions, [{**QUESTIONS[0], "turns": ["Grüße\u2028?", "🙂"]}])
    with serving(lambda body: odd) as server:
        assert bench.judged(server.url).exit_code == 0
        assert bench.judged(server.url).exit_code == 0
        assert len(server.requests) == 4
    assert {row["judgment"] for row in lines(bench.output)} == {odd}
    assert set(bench.scores().values()) == {5}
    bench.output.read_bytes().decode("ascii")


def test_models_of_one_name_are_refused(bench: Bench) -> None:
    twin = write_lines(bench.folder / "again" / "VaRM.jsonl", answers_of("VaRM"))
    bench.answers.append(twin)
    done = bench.judged("http://127.0.0.1:1/v1")
    assert done.exit_code == 1
    assert "several files of answers are called VaRM" in done.output


def test_a_judgment_without_rating_is_kept_as_minus_one_and_counted(bench: Bench) -> None:
    def sometimes(body: dict[str, Any]) -> str:
        return "I would rather not say." if "math" in body["messages"][-1]["content"] else "[[4]]"

    with serving(sometimes) as server:
        done, again = bench.judged(server.url), bench.judged(server.url)
    assert (done.exit_code, again.exit_code) == (0, 0)
    assert "! judgments without a rating, which do not count in averages: 4" in done.output
    assert "! judgments without a rating, which do not count in averages: 4" in again.output
    assert [score for score in bench.scores().values() if score == -1] == [-1] * 4
    shown = CliRunner().invoke(main, ["evaluate", "results", str(bench.output)])
    assert "! VaRM: 2 of 8 judgments are unrated and do not count" in shown.output
    assert shown.output.splitlines()[-3].split() == ["Average", "4.00", "4.00"]


def test_only_missing_judgments_are_requested(bench: Bench) -> None:
    with serving(rated) as server:
        assert bench.judged(server.url).exit_code == 0
        whole = bench.scores()
        kept = bench.output.read_bytes().splitlines(keepends=True)
        bench.output.write_bytes(b"".join(kept[:5]) + kept[5][:30])
        server.requests.clear()
        done = bench.judged(server.url)
        assert done.exit_code == 0, done.output
        assert len(server.requests) == 11
        assert bench.scores() == whole
        bench.output.write_bytes(bench.output.read_bytes()[:-1])  # a last line without an end is whole
        again = bench.judged(server.url)
        assert again.exit_code == 0
        assert bench.scores() == whole
        assert "0 requests to the-judge" in again.output
        assert len(server.requests) == 11
        write_lines(bench.answers[1], answers_of("other"))
        before = bench.output.read_bytes()
        other = bench.judged(server.url)
        assert other.exit_code == 1
        assert "has judgments of other answers, or with other prompts: 8 of `VaRM`" in other.output
        assert bench.output.read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", b'{"a": 1}\nmy notes', b"\xff\xfe", b'"text"', b"5", b""])
def test_a_file_of_the_user_is_not_changed(content: bytes, bench: Bench) -> None:
    bench.output.parent.mkdir()
    bench.output.write_bytes(content)
    with serving(lambda body: None, [Fault(400)] * 99) as server:
        done = bench.judged(server.url)
        assert done.exit_code == 1
        assert "Traceback" not in done.output
        assert not content or f"`{bench.output}`" in done.output.replace("Error: ", "")
        assert bool(server.requests) == (not content)
    assert bench.output.read_bytes() == content
    if content:
        with pytest.raises(UserError, match=re.escape(str(bench.output))):
            mt_bench.judgments([], "judge", bench.output).__enter__()
        assert bench.output.read_bytes() == content


def test_gaps_in_the_files_are_reported_before_any_request(bench: Bench) -> None:
    with serving(rated) as server:
        for change, message in (
            (lambda: write_lines(bench.answers[0], answers_of("CLM")[1:]), "no answer to question 101"),
            (
                lambda: write_lines(bench.answers[0], [{"question_id": 101, "choices": []}]),
                "line 1: choices: ",
            ),
            (lambda: write_lines(bench.references, answers_of("right")[2:]), "no answer to question 102"),
            (lambda: write_lines(bench.prompts, PROMPTS[1:]), "no prompt `single-v1`; there are `single-math-v1`"),
            (
                lambda: write_lines(bench.prompts, [{**PROMPTS[0], "prompt_template": "{quest}"}, *PROMPTS[1:]]),
                "the prompt `single-v1` has a placeholder that nothing fills: 'quest'",
            ),
        ):
            bench.__init__(bench.folder)  # type: ignore[misc]
            change()
            done = bench.judged(server.url)
            assert done.exit_code == 1
            assert message in done.output, done.output
        bench.__init__(bench.folder)  # type: ignore[misc]
        arguments = bench.arguments(server.url, "--yes")
        del arguments[arguments.index("--references") : arguments.index("--references") + 2]
        done = CliRunner().invoke(main, arguments)
        assert "2 questions of math, reasoning or coding need reference answers" in done.output
        assert server.requests == []
    assert not bench.output.exists()


# What an endpoint does


@pytest.mark.slow
def test_transient_failures_are_retried(bench: Bench) -> None:
    tricks = [Fault(trick=trick) for trick in ("sleep", "reset", "cut", "short", "no choices", "no text", "html")]
    statuses = [Fault(status) for status in (408, 409, 429, 500, 502, 503)]
    with serving(rated, [*tricks, *statuses], key=KEY) as server:
        done = bench.judged(server.url, "--timeout", 0.7, "--concurrency", 8, *WITH_KEY)
        assert done.exit_code == 0, done.output
        assert len(server.requests) == 16 + len(tricks) + len(statuses)
        assert server.most_at_once <= 8
    assert len(bench.scores()) == 16
    assert -1 not in bench.scores().values()


def test_an_error_with_status_200_is_reported(bench: Bench) -> None:
    with serving(rated, [Fault(trick="error")]) as server:
        done = bench.judged(server.url, "--max-retries", 0, "--concurrency", 1)
    assert "✗ CLM, question 101, turn 1: the replies have no text: not now" in done.output


def test_a_model_that_wants_the_newer_limit_is_given_it(bench: Bench) -> None:
    with serving(rated, newer=True) as server:
        done = bench.judged(server.url, "--concurrency", 4)
        assert done.exit_code == 0, done.output
        accepted = [body for body in server.requests if "max_tokens" not in body]
        assert [body["max_completion_tokens"] for body in accepted] == [2048] * 16
        assert len(server.requests) <= 16 + 4
    assert len(bench.scores()) == 16


def test_a_failed_request_is_reported_and_only_it_is_repeated_by_the_next_run(bench: Bench) -> None:
    def never_math(body: dict[str, Any]) -> str | None:
        if "said VaRM 1 to math" in body["messages"][-1]["content"]:
            raise ConnectionError  # the server hangs up
        return rated(body)

    with serving(never_math) as server:
        done = bench.judged(server.url, "--max-retries", 1)
    assert done.exit_code == 1
    assert len(bench.scores()) == 14
    assert "✗ VaRM, question 102, turn 1: Connection error." in done.output
    assert "✗ 2 are missing; run the same command again to request only these" in done.output
    with serving(rated) as server:
        assert bench.judged(server.url).exit_code == 0
        assert len(server.requests) == 2
    assert len(bench.scores()) == 16


@pytest.mark.parametrize("fault", [Fault(401), Fault(403), Fault(404)])
def test_an_endpoint_that_takes_no_request_ends_the_run(fault: Fault, bench: Bench) -> None:
    with serving(rated, [fault] * 99) as server:
        done = bench.judged(server.url, "--concurrency", 2)
        assert done.exit_code == 1
        assert f"Error: {server.url} accepts no request for `the-judge`: {fault.status} not now" in done.output
        time.sleep(0.1)
        assert len(server.requests) <= 4
    spent = Fault(429, body={"error": {"message": "no money", "code": "insufficient_quota"}})
    with serving(rated, [spent] * 99) as server:
        assert "accepts no request for `the-judge`: 429 no money" in bench.judged(server.url).output


def test_an_unreachable_server_is_reported(bench: Bench) -> None:
    with serving(rated) as server:
        pass
    done = bench.judged(server.url, "--max-retries", 0)
    assert done.exit_code == 1
    assert "Connection error." in done.output
    assert "✗ and 6 more" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("written", ["seconds", "date"])
def test_all_requests_wait_as_long_as_retry_after_says(written: str, bench: Bench) -> None:
    """The server asks for patience: nobody asks it in that time."""
    until = math.ceil(time.time()) + 1
    header = "1" if written == "seconds" else formatdate(until, usegmt=True)

    def slow_at_first(body: dict[str, Any]) -> str:
        time.sleep(0.5 if len(server.requests) <= 4 else 0)  # the others are answered when the patience has begun
        return rated(body)

    with serving(slow_at_first, [Fault(429, headers={"Retry-After": header})]) as server:
        began = time.time() - time.monotonic()
        assert bench.judged(server.url, "--concurrency", 4).exit_code == 0
        fifth = sorted(server.times)[4]
        assert fifth - server.times[0] >= 1 if written == "seconds" else fifth + began >= until
    with serving(rated, [Fault(429, headers={"Retry-After": "9999"})] * 2) as server:
        bench.output.unlink()
        done = bench.judged(server.url, "--concurrency", 1)
        assert "question 101, turn 1: 429 not now" in done.output
        assert len(bench.scores()) == 14


@pytest.mark.parametrize("limit", ["--requests-per-minute", "--tokens-per-minute"])
def test_rate_limits_hold_for_any_concurrency_and_for_retries(limit: str, bench: Bench) -> None:
    games = mt_bench.games(read_questions(bench.questions), bench.answers, bench.prompts, bench.references)
    fewest = min(sum(len(m["content"]) // 4 for m in game.messages) + 2048 for game in games)
    rate = 2400 if limit == "--requests-per-minute" else 2400 * fewest
    with serving(rated, [Fault(500)] * 4) as server:
        began = time.monotonic()
        assert bench.judged(server.url, limit, rate, "--concurrency", 16).exit_code == 0
        assert len(server.times) == 20
        arrived = [moment - began for moment in sorted(server.times)]
    assert all(moment >= number * 0.025 for number, moment in enumerate(arrived)), arrived


def test_the_rate_limit_counts_the_tokens_of_prompts() -> None:
    with serving(rated) as server:
        endpoint = Endpoint(server.url, "judge", tokens_per_minute=200_000)
        for _ in range(2):
            endpoint.ask([{"role": "user", "content": "word" * 1000}], 1)
    assert server.times[1] - server.times[0] > 0.25  # 1000 tokens and one are 0.3 s


@pytest.mark.slow
def test_the_key_is_in_no_output(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the server repeats it."""
    with serving(rated, key="another") as server:
        done = subprocess.run(
            [BIN / "varm-merge", *bench.arguments(server.url, "--yes", "--verbose", "--judge-key-env", "MY_KEY")],
            env={**os.environ, "MY_KEY": KEY, "OPENAI_API_KEY": "not this"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "Incorrect API key provided: Bearer [key]" in done.stderr
    with serving(rated, [Fault(400, body={"error": {"message": "x" * 190 + KEY}})], key=KEY) as server:
        with_failure = bench.judged(server.url, "--concurrency", 1, *WITH_KEY)
        assert f"✗ CLM, question 101, turn 1: 400 {'x' * 190}[key]" in with_failure.output
    written = "".join(path.read_text() for path in bench.folder.rglob("*") if path.is_file())
    for text in (done.stdout, done.stderr, with_failure.output, written, caplog.text):
        assert KEY[:6] not in text
        assert "not this" not in text


def test_a_key_in_the_url_and_a_missing_key_are_refused_before_any_request(bench: Bench) -> None:
    for url in ("http://me:secret@127.0.0.1/v1", "http://127.0.0.1/v1?key=secret"):
        done = bench.judged(url)
        assert done.exit_code == 1
        assert "the endpoint's URL contains a key" in done.output
    assert "must begin with http:// or https://" in bench.judged("127.0.0.1:8000/v1").output
    done = bench.judged("https://api.openai.com/v1", key="")
    assert "https://api.openai.com/v1 needs a key: set the environment variable OPENAI_API_KEY" in done.output
    done = bench.judged("http://127.0.0.1:1/v1", "--judge-key-env", "NO_SUCH_KEY")
    assert "needs a key: set the environment variable NO_SUCH_KEY" in done.output


def test_openais_key_is_sent_to_openai_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(rated, key=KEY) as server:
        done = bench.judged(server.url)
        assert done.exit_code == 1
        assert "No key was sent: OPENAI_API_KEY is only used for api.openai.com." in done.output
        assert "with --judge-key-env, or with --key-env for answers" in done.output
        assert server.keys == {"Bearer none"}
        wrong = CliRunner().invoke(main, bench.arguments(server.url, "--yes", *WITH_KEY), env={"JUDGE_KEY": "k"})
        assert "401" in wrong.output
        assert "No key was sent" not in wrong.output
    for url in (
        "https://api.openai.com.example.org/v1",
        "https://example.org/api.openai.com/v1",
        "http://api.openai.com/v1",
    ):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        endpoint = Endpoint(url, "judge")
        assert endpoint._client.api_key == "none"
    for url in ("https://api.openai.com/v1", "https://API.openai.com/v1/"):
        endpoint = Endpoint(url, "judge")
        assert endpoint._client.api_key == KEY


# What it costs


def test_costs_are_shown_before_and_counted_after(bench: Bench) -> None:
    prices = ("--price-in", 30, "--price-out", 60)
    with serving(rated) as server:
        dry = bench.judged(server.url, *prices, "--dry-run", "--json")
        assert dry.exit_code == 0
        estimate = json.loads(dry.stdout)
        assert estimate["estimate"]["requests"] == 16
        assert estimate["estimate"]["completion_tokens"] == 16 * 2048
        assert "at most $1.9" in dry.stderr
        declined = bench.judged(server.url, *prices, input="n\n")
        assert declined.exit_code == 1
        assert server.requests == []
        assert not bench.output.exists()
        done = bench.judged(server.url, *prices, "--json", input="y\n")
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        words = sum(len(message["content"].split()) for body in server.requests for message in body["messages"])
    assert result["used"] == {"requests": 16, "prompt_tokens": words, "completion_tokens": 80, "uncounted": 0}
    assert result["price"] == pytest.approx((words * 30 + 80 * 60) / 1e6)
    texts = [body["messages"] for body in server.requests]
    size = sum(len(message["content"].encode()) for messages in texts for message in messages)
    assert estimate["estimate"]["prompt_tokens"] == pytest.approx(size / 4, abs=16 * 2 * 4)
    assert (result["asked"], result["there"], result["failed"]) == (16, 0, {})


def test_replies_without_usage_are_counted_as_such(bench: Bench) -> None:
    with serving(rated, usage=False) as server:
        done = bench.judged(server.url)
    assert "! the endpoint did not count the tokens of 16 replies" in done.output


# AlpacaEval


def outputs(generator: str, rows: int = 12) -> list[dict[str, str]]:
    same = {4: "the same"}
    return [
        {
            "instruction": f"do {n} {{output_2}}",
            "output": same.get(n, f"{generator} {n}"),
            "generator": generator,
            "dataset": "koala",
        }
        for n in range(rows)
    ]


PROMPT = """<|im_start|>system
Choose.
<|im_end|>
<|im_start|>user
{instruction}
m: {output_1}
M: {output_2}
{
    "answer": "m or M"
}
<|im_end|>
"""


def prefers_ours(body: dict[str, Any]) -> dict[str, float]:
    """Ours by a probability that the instruction decides, whichever comes first."""
    text = body["messages"][-1]["content"]
    number = int(text.split()[1])
    ours = "m" if "m: ours" in text else "M"
    theirs = "mM".replace(ours, "")
    share = 0.05 + 0.07 * number
    return {"The": math.log(0.5), ours: math.log(0.4 * share), theirs: math.log(0.4 * (1 - share))}


class Alpaca:
    """The files of an AlpacaEval, and the command that has its outputs compared."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = folder / "outputs.json", folder / "reference.json"
        self.prompt, self.output = folder / "prompt.txt", folder / "annotations.json"
        self.ours.write_text(json.dumps(outputs("ours")[::-1]))
        self.theirs.write_text(json.dumps(outputs("theirs")))
        self.prompt.write_text(PROMPT)

    def judged(self, url: str, *more: object) -> Result:
        files = [self.ours, "--reference-outputs", self.theirs, "--prompt", self.prompt, "--output", self.output]
        to = ["--judge", "the-judge", "--judge-url", url, "--yes", "--quiet"]
        return CliRunner().invoke(
            main, [str(one) for one in ("evaluate", "judge", "alpaca-eval", *files, *to, *more)]
        )


@pytest.fixture
def alpaca(tmp_path: Path) -> Alpaca:
    return Alpaca(tmp_path)


def test_preferences_are_the_probability_of_the_model_whichever_comes_first(alpaca: Alpaca) -> None:
    with serving(prefers_ours) as server:
        done = alpaca.judged(server.url)
    assert done.exit_code == 0, done.output
    rows = json.loads(alpaca.output.read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in outputs("theirs")]
    assert [row["preference"] for row in rows] == pytest.approx(
        [1.5 if n == 4 else 1.05 + 0.07 * n for n in range(12)], abs=1e-12
    )
    for row in rows:
        assert (row["generator_1"], row["generator_2"], row["annotator"]) == ("theirs", "ours", "the-judge")
        assert (row["output_1"][:4], row["dataset"]) in (("thei", "koala"), ("the ", "koala"))
    assert len(server.requests) == 11  # two outputs that are the same are not compared
    firsts = 0
    for body in server.requests:
        text = body["messages"][-1]["content"]
        instruction = text.splitlines()[0]
        assert instruction.endswith("{output_2}")  # what users write is no place of the prompt
        # alpaca_eval's draw, by its published rule
        ours_first = random.Random(f"is_switched_outputs{instruction}0").choices([False, True], k=1)[0]
        assert ("m: ours" in text) == ours_first
        firsts += ours_first
        assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 5)
    assert 0 < firsts < 11


@given(st.lists(st.one_of(st.none(), st.floats(1, 2), st.just(1.5)), min_size=1, max_size=30))
def test_win_rates_are_means_of_preferences(preferences: list[float | None]) -> None:
    numbers = results.win_rate([{"preference": one, "output_2": "abc"} for one in preferences])
    known = [one for one in preferences if one is not None]
    assert numbers["n_total"] == len(known)
    assert numbers["n_unrated"] == len(preferences) - len(known)
    assert numbers["n_wins"] + numbers["n_wins_base"] + numbers["n_draws"] == len(known)
    assert (numbers["win_rate"] is None) == (not known)
    if known:
        assert numbers["win_rate"] == pytest.approx(100 * (statistics.fmean(known) - 1), abs=1e-9)
    if len(known) > 1:
        deviation = math.sqrt(sum((one - statistics.fmean(known)) ** 2 for one in known) / (len(known) - 1))
        assert numbers["standard_error"] == pytest.approx(100 * deviation / math.sqrt(len(known)), abs=1e-6)


def test_zero_is_a_draw_as_in_alpaca_evals_own_files() -> None:
    numbers = results.win_rate([{"preference": one, "output_2": "abc"} for one in (1, 2, 0)])
    assert numbers["win_rate"] == pytest.approx(50)
    assert numbers["standard_error"] == pytest.approx(28.8675, abs=1e-4)
    assert (numbers["n_wins"], numbers["n_wins_base"], numbers["n_draws"]) == (1, 1, 1)


def test_missing_preferences_are_unrated_and_invalid_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    command = ["evaluate", "results", str(path), "--json"]

    def shown(*preferences: object) -> Result:
        row = {"generator_1": "theirs", "generator_2": "ours", "annotator": "judge", "output_2": "abc"}
        path.write_text(json.dumps([{**row, "preference": one} for one in preferences]))
        return CliRunner().invoke(main, command)

    some, none = shown(2, math.nan, None), shown(math.nan)
    assert (some.exit_code, none.exit_code) == (0, 0), some.output
    assert "NaN" not in some.stdout + none.stdout
    numbers = json.loads(some.stdout)["models"]["ours"]
    assert (numbers["win_rate"], numbers["n_total"], numbers["n_unrated"]) == (100, 1, 2)
    assert json.loads(none.stdout)["models"]["ours"]["win_rate"] is None
    for wrong in (0.5, 2.01, -1, 3, math.inf, 10**400, "1", True, [1]):
        done = shown(1, wrong)
        assert done.exit_code == 1
        assert f"Error: `{path}` cannot be used:" in done.output
        assert "row 2: preference: Value error, it must be from 1 to 2, 0 (a draw), or null" in done.output


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        ({"m": math.nan, "M": -0.1}, None),
        ({"m": -math.inf, "M": -math.inf}, None),
        ({"m": -0.1, "M": -800.0}, 1.0),
        ({"m": -800.0, "M": -0.1}, 2.0),
        ({"m": -3.0}, 1.0),
        ({"M": -3.0}, 2.0),
        ({"m": -3000.0, "M": -3000.0}, 1.5),
        ({" m": -0.1, "model": -2.0}, None),
        ({}, None),
    ],
)
def test_a_preference_is_one_names_share_of_both_probabilities(
    logprobs: dict[str, float], expected: float | None
) -> None:
    choice = judge_server.completion({"messages": [], "model": ""}, logprobs)["choices"][0]
    assert alpaca_eval.preference(choice) == (None if expected is None else pytest.approx(expected))
    assert alpaca_eval.preference({"logprobs": None}) is None


def test_annotations_resume_and_missing_preferences_are_counted(alpaca: Alpaca) -> None:
    with serving(prefers_ours, [Fault(400)] * 3) as server:
        done = alpaca.judged(server.url)
        assert done.exit_code == 1
        assert "✗ 3 are missing" in done.output
        assert not alpaca.output.exists()
        server.requests.clear()
        dry = alpaca.judged(server.url, "--dry-run")
        assert "3 requests to the-judge" in dry.output
        assert "8 judgments exist" in dry.output
        other = alpaca.judged(server.url, "--seed", 1)
        assert other.exit_code == 1
        assert re.search("seed +1 +0", other.output)
        assert alpaca.judged(server.url).exit_code == 0
        assert len(server.requests) == 3
        assert "0 requests to the-judge" in alpaca.judged(server.url).output
        assert len(server.requests) == 3
    alpaca.output.unlink()
    with serving(lambda body: "m") as server:  # an endpoint without log-probabilities
        done = alpaca.judged(server.url)
        assert "! judgments without a rating, which do not count in averages: 11" in done.output


def test_files_that_do_not_fit_together_are_reported(alpaca: Alpaca) -> None:
    url = "http://127.0.0.1:1/v1"
    alpaca.ours.write_text(json.dumps(outputs("ours")[2:]))
    assert f"no output for row 1 of `{alpaca.theirs}`: 'do 0 {{output_2}}'" in alpaca.judged(url).output
    alpaca.ours.write_text(json.dumps([*outputs("ours"), *outputs("others")]))
    assert "has outputs of several generators: others, ours" in alpaca.judged(url).output
    alpaca.ours.write_text(json.dumps([{"instruction": "a", "output": None}]))
    assert "row 1: output: Input should be a valid string" in alpaca.judged(url).output
    alpaca.ours.write_text(json.dumps(outputs("ours")))
    alpaca.prompt.write_text("{instruction} {output_1} {output_1}")
    output = alpaca.judged(url).output
    assert "`{output_1}` occurs 2 times, not once" in output
    assert "`{output_2}` occurs 0 times, not once" in output
    assert "no message between <|im_start|> and <|im_end|>" in output


# Tables


def judgments(scores: dict[str, Callable[[int, int], float]]) -> list[dict[str, Any]]:
    return [
        {
            "question_id": q["question_id"],
            "model": model,
            "judge": ["j", "p"],
            "score": score(number, turn),
            "turn": turn,
        }
        for model, score in scores.items()
        for number, q in enumerate(QUESTIONS)
        for turn in (1, 2)
    ]


def test_results_have_the_papers_form(bench: Bench) -> None:
    rows = judgments({"CLM": lambda n, t: 4 + n, "VaRM": lambda n, t: 5 + n * t / 2})
    path = write_lines(bench.folder / "judged.jsonl", rows)
    command = ["evaluate", "results", str(path), "--questions", str(bench.questions), "--baseline", "CLM"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    _, title, header, *table = shown.output.splitlines()
    assert title == "MT-Bench, judged by j, with the improvement over CLM"
    assert header.split() == ["CLM", "VaRM"]
    assert [line.split() for line in table] == [
        ["Writing", "4.00", "5.00", "+25.00%"],
        ["Math", "5.00", "5.75", "+15.00%"],
        ["Coding", "7.00", "7.25", "+3.57%"],
        ["STEM", "6.00", "6.50", "+8.33%"],
        ["1st", "turn", "5.50", "5.75", "+4.55%"],
        ["2nd", "turn", "5.50", "6.50", "+18.18%"],
        ["Average", "5.50", "6.12", "+11.36%"],
    ]
    numbers = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert numbers["models"]["VaRM"]["scores"]["average"] == pytest.approx(6.125)
    assert numbers["models"]["VaRM"]["improvement"]["writing"] == pytest.approx(25)


def test_unfair_comparisons_are_reported(bench: Bench) -> None:
    rows = judgments({"CLM": lambda n, t: 4, "VaRM": lambda n, t: 5})
    path = write_lines(bench.folder / "judged.jsonl", rows[:-3])
    shown = CliRunner().invoke(main, ["evaluate", "results", str(path)])
    assert (
        "the comparison is not fair, because the models have different numbers of judgments: CLM 8, VaRM 5"
        in shown.output
    )
    for more, message in (
        (["--baseline", "CML"], "no model `CML` was judged; there are `CLM`, `VaRM`"),
        (["--questions", str(write_lines(bench.folder / "q.jsonl", QUESTIONS[1:]))], "has no question 101"),
    ):
        done = CliRunner().invoke(main, ["evaluate", "results", str(path), *more])
        assert done.exit_code == 1
        assert message in done.output
    write_lines(path, [*rows, {**rows[0], "judge": ["another", "p"]}])
    assert "from several judges: another, j" in CliRunner().invoke(main, ["evaluate", "results", str(path)]).output
    write_lines(path, [{**rows[0], "score": math.nan}])
    assert "line 1: score: " in CliRunner().invoke(main, ["evaluate", "results", str(path)]).output
    write_lines(path, [{"score": 3}])
    assert "line 1: model: Field required" in CliRunner().invoke(main, ["evaluate", "results", str(path)]).output


def test_ratings_outside_the_scale_count_and_are_reported(bench: Bench) -> None:
    path = write_lines(bench.folder / "judged.jsonl", judgments({"CLM": lambda n, t: 12 if n else 0}))
    shown = CliRunner().invoke(main, ["evaluate", "results", str(path)])
    assert shown.output.splitlines()[-2].split() == ["Average", "9.00"]
    assert "! CLM: 8 ratings are not from 1 to 10; they count, as with FastChat" in shown.output


def test_win_rates_of_several_models_are_side_by_side(alpaca: Alpaca) -> None:
    with serving(prefers_ours) as server:
        assert alpaca.judged(server.url).exit_code == 0
    better = alpaca.output.with_name("better.json")
    rows = json.loads(alpaca.output.read_text())
    better.write_text(json.dumps([{**row, "generator_2": "better", "preference": 2} for row in rows]))
    shown = CliRunner().invoke(main, ["evaluate", "results", str(alpaca.output), str(better)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines()[1] == "AlpacaEval 2, against theirs, judged by the-judge"
    ours, best = (line.split() for line in shown.output.splitlines()[-2:])
    shares = [50 if n == 4 else 5 + 7 * n for n in range(12)]
    assert ours[:6] == [
        "ours",
        f"{statistics.fmean(shares):.2f}",
        f"{statistics.stdev(shares) / math.sqrt(12):.2f}",
        *("5", "6", "1"),
    ]
    assert best[:6] == ["better", "100.00", "0.00", "12", "0", "0"]
    both = CliRunner().invoke(main, ["evaluate", "results", str(better), str(better)])
    assert both.output == "Error: two files have annotations of `better`\n"
    better.write_text(json.dumps([{**row, "generator_2": "better", "annotator": "another"} for row in rows[1:]]))
    unlike = CliRunner().invoke(main, ["evaluate", "results", str(alpaca.output), str(better)])
    assert "different judges: ours the-judge, better another" in unlike.output
    assert "different numbers of pairs: ours 12, better 11" in unlike.output
