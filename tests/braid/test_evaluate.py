"""`braid eval` against a real HTTP server on loopback, and against the real router."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from braid import cli, meter
from braid.client import CommandFailed, Reply
from braid.evaluate import command, figures, methods, plot, report
from braid.evaluate.outcome import Outcome, judge
from braid.evaluate.problems import Problem, from_file, gold, of_demo
from braid.evaluate.run import Plan, turns
from demo import tasks
from router import strategies
from router.equivalence import canonical
from router.strategies.options import Options
from tests.braid.stub_server import BRAID_AT_A_TERMINAL, Answer, StubServer, closed_port, completion, serve
from tests.router.conftest import MakeStand, make_stand, no_helper_is_left  # noqa: F401

pytestmark = pytest.mark.slow

KNOWN = methods.catalogue({"data": strategies.describe()})


@pytest.fixture
def server() -> Iterator[StubServer]:
    with serve() as stub:
        stub.answer = adds
        yield stub


def adds(body: dict[str, Any]) -> Answer:
    """`cot` and votes know 1+k; a plain request says 0, and `universal_consistency` says nothing."""
    reasoning = body.get("reasoning")
    right = 1 + int(body["messages"][-1]["content"].split("+")[1])
    if reasoning is None:
        return 200, {}, completion("It is 0.", tokens=4)
    if reasoning["strategy"] == "universal_consistency":
        return 200, {}, completion("I do not know.", {"samples": [], "stopped_early": None})
    samples = [{"index": i} for i in range(reasoning.get("n", 1))]
    told = {"samples": samples, "stopped_early": "decided" if len(samples) > 1 else None}
    return 200, {}, completion(f"So.\n\nThe answer is {right}.", told, tokens=20 * len(samples))


class Bench:
    """A folder with problems, and how to run the command there."""

    def __init__(self, folder: Path, server: StubServer) -> None:
        self.folder = folder
        self.server = server
        self.file = folder / "sums.jsonl"

    def sums(self, count: int) -> None:
        rows = [{"id": f"s{k}", "prompt": f"What is 1+{k}", "answer": k + 1} for k in range(count)]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def flags(self, *flags: str) -> list[str]:
        return [str(self.file), f"--url={self.server.url}", f"--out={self.folder}", *flags]

    def run(self, *flags: str) -> int:
        return command.main(self.flags(*flags))

    def result(self, name: str = "sums") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return found


@pytest.fixture
def bench(tmp_path: Path, server: StubServer) -> Bench:
    found = Bench(tmp_path, server)
    found.sums(6)
    return found


COT = "--strategy=cot"
PLAIN = "--strategy=direct"
VOTE = "--strategy=self_consistency:4"


def test_the_figures_are_those_of_the_replies(bench: Bench) -> None:
    assert bench.run(PLAIN, COT, VOTE, "--strategy=universal_consistency") == 0
    result = bench.result()["methods"]
    assert {name: entry["accuracy"] for name, entry in result.items()} == {
        "direct": 0.0,
        "cot": 1.0,
        "self_consistency:4": 1.0,
        "universal_consistency": 0.0,
    }
    vote = result["self_consistency:4"]
    assert vote["completion_tokens"] == {"total": 480, "per_problem": 80.0}
    assert vote["prompt_tokens"]["total"] == 42
    assert vote["cached_tokens"]["total"] == 12
    assert vote["samples"]["per_problem"] == 4
    assert vote["kv_bytes"] == {"total": 6000, "per_problem": 1000.0}
    assert vote["kv_transfers"]["total"] == 6
    assert vote["stopped_early"] == {"decided": 6}
    assert vote["paths"] == {"remote": 6}
    assert 0 < vote["latency_s"]["p50"] <= vote["latency_s"]["p95"]
    assert vote["problems_per_s"] > 0
    assert (result["direct"]["no_answer"], result["universal_consistency"]["no_answer"]) == (0, 6)
    assert vote["accuracy_ci95"] == [pytest.approx(bound, abs=1e-6) for bound in figures.wilson(6, 6)]


def test_the_result_tells_where_it_is_from(bench: Bench) -> None:
    assert bench.run(COT, "--max-tokens=9", "--key", "secret") == 0
    result = bench.result()
    assert result["settings"]["request"] == {"model": "demo", "max_tokens": 9}
    session = result["sessions"][0]
    assert session["cluster"]["workers"] == [{"worker": "d0"}]
    assert {"braid", "python", "httpx", "math-verify"} <= session["versions"].keys()
    assert session["command"] == "braid eval sums.jsonl --strategy=cot --max-tokens=9"
    for private in ("secret", str(bench.folder), bench.server.url):
        assert private not in json.dumps(result)
    assert set(result["formulas"]) == {"accuracy_ci95", "difference_ci95", "mcnemar_p"}


def test_methods_are_compared_on_the_same_problems(bench: Bench, capsys: Any) -> None:
    assert bench.run(PLAIN, COT) == 0
    (pair,) = bench.result()["comparisons"]
    assert (pair["first"], pair["second"], pair["difference"]) == ("cot", "direct", 1.0)
    assert (pair["only_first_right"], pair["only_second_right"]) == (6, 0)
    assert pair["mcnemar_p"] == pytest.approx(2 / 2**6)
    assert pair["tokens_ratio"] == pytest.approx(5)
    told = capsys.readouterr().out
    assert "+100.0" in told
    assert "minus direct, paired" in told


def test_a_request_is_what_was_asked_for(bench: Bench) -> None:
    greedy = '{"temperature": 0, "reasoning": {"strategy": "cot"}}'
    assert bench.run(f"--strategy=greedy={greedy}", VOTE, "--temperature=0.7", "--seed=100") == 0
    sent = {body["reasoning"]["strategy"]: body for body in bench.server.bodies if body["seed"] == 103}
    assert (sent["cot"]["temperature"], sent["self_consistency"]["temperature"]) == (0, 0.7)
    assert sent["self_consistency"]["reasoning"] == {"strategy": "self_consistency", "n": 4}
    assert sent["cot"]["messages"] == [{"role": "user", "content": "What is 1+3"}]
    assert sent["cot"]["cache_salt"] != sent["self_consistency"]["cache_salt"]


def test_seed_and_salt_can_be_left_out(bench: Bench) -> None:
    assert bench.run(COT, "--no-seed", "--shared-cache") == 0
    assert not any({"seed", "cache_salt"} & body.keys() for body in bench.server.bodies)


def test_strategies_find_answers_as_they_are_judged(bench: Bench) -> None:
    flags = ("--extractor=regex", "--pattern=is ([0-9]+)")
    assert bench.run(COT, PLAIN, '--strategy={"strategy": "mbr", "extractor": "boxed"}', *flags) == 0
    sent: dict[Any, Any] = {
        (body.get("reasoning") or {}).get("strategy"): body.get("reasoning") for body in bench.server.bodies
    }
    assert sent["cot"] == {"strategy": "cot", "extractor": "regex", "pattern": "is ([0-9]+)"}
    assert sent["mbr"]["extractor"] == "boxed"
    assert sent[None] is None


def test_all_is_every_strategy_of_the_server(bench: Bench) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        if (body.get("reasoning") or {}).get("strategy") == "car":
            return 400, {}, {"error": {"message": "car is not calibrated"}}
        return adds(body)

    bench.server.answer = answer
    assert bench.run("--strategy=all", "--n=3") == 0
    result = bench.result()
    told = {re.split(r"[:(]", name)[0] for name in (*result["methods"], *result["skipped"])}
    assert told == set(strategies.names())
    assert result["skipped"] == {"car": "HTTP 400: car is not calibrated"}
    assert result["methods"]["self_consistency:3"]["samples"]["per_problem"] == 3


def test_a_refused_strategy_ends_the_run_at_once(bench: Bench, capsys: Any) -> None:
    bench.sums(100)
    bench.server.answer = lambda body: (400, {}, {"error": {"message": "temperature 0 is refused"}})
    assert bench.run(VOTE, "--concurrency=1") == 1
    assert "refuses self_consistency:4: HTTP 400: temperature 0 is refused" in capsys.readouterr().err
    assert len(bench.server.bodies) == 4


def test_one_problem_that_is_refused_does_not_end_it(bench: Bench) -> None:
    bench.server.answer = lambda body: (
        (400, {}, {"error": {"message": "too long"}}) if body["seed"] == 2 else adds(body)
    )
    assert bench.run(COT) == 1
    entry = bench.result()["methods"]["cot"]
    assert (entry["failed"], entry["errors"]) == (1, {"HTTP 400: too long": 1})
    assert entry["accuracy"] == pytest.approx(5 / 6)


def test_failed_problems_are_asked_again_by_the_same_command(bench: Bench) -> None:
    bench.server.answer = lambda body: (500, {}, {}) if body["seed"] == 2 else adds(body)
    assert bench.run(COT) == 1
    bench.server.answer = adds
    assert bench.run(COT) == 0
    assert len(bench.server.bodies) == 7
    assert bench.result()["methods"]["cot"]["accuracy"] == 1
    assert len(bench.result()["sessions"]) == 2


def test_a_killed_run_goes_on_where_it_was(bench: Bench) -> None:
    bench.server.holds_after = 7
    child = subprocess.Popen(
        [sys.executable, "-m", "braid", "eval", *bench.flags(COT, PLAIN, "--concurrency=1")]
    )
    bench.server.wait_until_held(1)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    path = bench.folder / "sums.outcomes.jsonl"
    assert sum("method" in json.loads(line) for line in path.read_text().splitlines()) == 7
    path.write_bytes(path.read_bytes()[:-9])  # as a machine that lost power would leave it
    bench.server.release()
    assert bench.run(COT, PLAIN, "--concurrency=1") == 0
    result = bench.result()
    assert [entry["problems"] for entry in result["methods"].values()] == [6, 6]
    assert len(bench.server.bodies) == 12 + 2  # the one that hung and the one whose line was torn
    salts = {body["cache_salt"] for body in bench.server.bodies}
    assert len(salts) == 2


def test_ctrl_c_says_that_it_can_go_on(bench: Bench) -> None:
    bench.server.holds_after = 2
    child = subprocess.Popen(
        [*BRAID_AT_A_TERMINAL, "eval", *bench.flags(COT, "--concurrency=1")],
        stderr=subprocess.PIPE,
        text=True,
    )
    bench.server.wait_until_held(1)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate()
    assert child.returncode == 130
    assert "goes on from here" in told


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((COT, "--max-tokens=5"), "request was"),
        ((VOTE,), "methods was"),
        ((COT, "--seed=7"), "seed was 0, now 7"),
        ((COT, "--limit=3"), "problems was"),
    ],
)
def test_a_run_with_other_settings_is_refused(bench: Bench, capsys: Any, flags: Any, says: str) -> None:
    assert bench.run(COT) == 0
    assert bench.run(*flags) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert says in told
    assert "--name" in told
    assert bench.run(*flags, "--name=other") == 0


def test_a_file_that_is_no_evaluation_is_refused(bench: Bench, capsys: Any) -> None:
    path = bench.folder / "sums.outcomes.jsonl"
    path.write_text('{"custom_id": 1}\n')
    assert bench.run(COT) == 2
    assert "line 1: not a file of `braid eval`" in capsys.readouterr().err
    path.unlink()
    bench.run(COT)
    with path.open("a") as file:
        file.write('{"method": "cot", "oops": 1}\n')
    assert bench.run(COT) == 2
    assert "not an outcome" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((200, {}, b"<html>"), "the reply is no chat completion"),
        ((200, {}, {"choices": []}), "the reply is no chat completion"),
        ((504, {}, {"error": {"message": "too\x1b[2J late"}}), "HTTP 504: too[2J late"),
        (None, "connection"),
    ],
)
def test_what_is_no_answer_is_counted_by_its_reason(bench: Bench, answer: Answer, error: str) -> None:
    bench.server.answer = lambda body: answer
    assert bench.run(COT, "--retries=0") == 1
    entry = bench.result()["methods"]["cot"]
    assert (entry["failed"], entry["errors"], entry["accuracy"]) == (6, {error: 6}, 0)


def test_silence_is_counted_too(bench: Bench) -> None:
    bench.server.holds_after = 0
    assert bench.run(COT, "--timeout=0.2") == 1
    assert bench.result()["methods"]["cot"]["errors"] == {"timeout": 6}


def test_a_refused_key_ends_the_run(bench: Bench, capsys: Any) -> None:
    bench.server.answer = lambda body: (401, {}, {"error": {"message": "who are you"}})
    assert bench.run(COT, "--concurrency=1") == 1
    assert "--key" in capsys.readouterr().err
    assert len(bench.server.bodies) == 1


def test_a_connection_that_breaks_is_tried_again(bench: Bench) -> None:
    broken = [None, None]
    bench.server.answer = lambda body: broken.pop() if broken else adds(body)
    assert bench.run(COT) == 0
    assert bench.result()["methods"]["cot"]["retried"] == 2


def test_nobody_there_is_said(bench: Bench, capsys: Any) -> None:
    assert bench.run(COT, f"--url={closed_port()}") == 3
    assert "no server answers" in capsys.readouterr().err
    assert not list(bench.folder.glob("*.outcomes.jsonl"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: no JSON"),
        ('{"answer": 1}', "line 2: give either prompt"),
        ('{"prompt": "x", "messages": [], "answer": 1}', "give either prompt"),
        ('{"prompt": " ", "answer": 1}', "prompt must be a text"),
        ('{"messages": [{"content": "x"}], "answer": 1}', "objects with a role"),
        ('{"prompt": "x"}', "answer is missing"),
        ('{"prompt": "x", "answer": true}', "answer is missing"),
        ('{"prompt": "x", "answer": 1, "id": []}', "id must be"),
        ('{"prompt": "x", "answer": 1, "id": "line-1"}', "its id is that of line 1"),
    ],
)
def test_a_bad_problem_is_refused_with_its_line(bench: Bench, capsys: Any, line: str, says: str) -> None:
    bench.file.write_text('{"prompt": "x", "answer": "1"}\n' + line)
    assert bench.run(COT) == 2
    assert says in capsys.readouterr().err
    assert not bench.server.bodies


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "name at least one strategy"),
        (("--strategy=self_consistnecy",), "did you mean self_consistency?"),
        (("--strategy=[1]",), "can't be read"),
        (('--strategy={"n": 4}',), "can't set n"),
        (('--strategy={"reasoning": {"n": 4}}',), "needs a strategy"),
        (('--strategy={"strategy": "cot", "tau": 1}',), "'tau' was unexpected"),
        (('--strategy={"strategy": "adaptive_consistency", "tau": 2}',), "tau: 2 is greater"),
        (("--strategy=cot:4",), "n: 4 is greater than the maximum of 1"),
        ((COT, COT), "two strategies are called cot"),
        ((COT, "--baseline=x"), "--baseline must be one of cot"),
        ((COT, "--demo=3"), "give a file of problems, or --demo"),
        ((COT, "--extractor=regex"), "go together"),
        ((COT, "--extractor=regex", "--pattern=("), "not a regular expression"),
    ],
)
def test_wrong_arguments_say_what_to_do(bench: Bench, capsys: Any, flags: Any, says: str) -> None:
    assert bench.run(*flags) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not bench.server.bodies


def test_a_missing_file_is_said(bench: Bench, capsys: Any) -> None:
    bench.file.unlink()
    assert bench.run(COT) == 2
    assert "can't read" in capsys.readouterr().err


def test_another_openai_server_can_be_measured_plainly(bench: Bench) -> None:
    for path in ("/ready", "/v1/strategies", "/cluster"):
        del bench.server.gets[path]
    assert bench.run(PLAIN) == 0
    assert bench.run(COT, "--name=other") == 2


def test_the_command_line_knows_it(bench: Bench) -> None:
    assert cli.main(["eval", *bench.flags(PLAIN)]) == 0


async def test_the_router_takes_every_strategy_that_needs_nothing(
    make_stand: MakeStand,  # noqa: F811
    tmp_path: Path,
) -> None:
    stand = await make_stand()
    await stand.workers()
    names = ("direct", "cot", "self_consistency", "adaptive_consistency", "best_of_n", "mbr", "rollouts")
    flags = [f"--strategy={name}" for name in names]
    flags += ['--strategy={"strategy": "rejection_sampling", "beta": 1.0}', "--n=3"]
    given = [f"--url={stand.url}", f"--out={tmp_path}", "--demo=3", *flags]
    found = await command.evaluate(command.parser().parse_args(given), given, Console(quiet=True))
    assert len(found["methods"]) == len(names) + 1
    assert all(entry["failed"] == 0 for entry in found["methods"].values())
    assert found["methods"]["self_consistency:3"]["samples"]["per_problem"] == 3
    assert found["methods"]["cot"]["kv_bytes"]["per_problem"] == 1000
    assert found["sessions"][0]["cluster"]["models"] == ["demo"]


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "EVERY_S", 0.0)
    console = Console(file=io.StringIO(), width=200)
    with meter.Meter(console, "braid eval", 10, 4) as progress:
        progress.advance(20, failed=False)
        progress.advance(0, failed=True)
    assert isinstance(console.file, io.StringIO)
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("braid eval: 5 of 10, ")
    assert second.endswith("left, 1 failed")
    assert [meter.span(s) for s in (5, 600, 7300)] == ["5 s", "10 min", "2 h 2 min"]


def test_it_needs_no_engine() -> None:
    program = "import sys, braid.evaluate.command, braid.batch.command; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "transformers", "numpy"} & set(done.stdout.split())


# --- problems and answers ---------------------------------------------------------------------------------


def test_the_demos_problems_are_those_the_generator_prints(capsys: Any, tmp_path: Path) -> None:
    tasks.main(["--split", "test", "--count", "3"])
    file = tmp_path / "demo.jsonl"
    file.write_text(capsys.readouterr().out)
    assert of_demo(3) == from_file(file)
    assert len(from_file(file, limit=2)) == 2


@pytest.mark.parametrize(
    ("field", "answer"),
    [("18", "18"), ("9*2=18.\n#### 18", "18"), (r"so $\boxed{\frac12}$", r"\frac12"), (" B ", "B")],
)
def test_a_gold_field_may_be_a_worked_solution(field: str, answer: str) -> None:
    assert gold(field) == answer


def reply(text: str, finish: str = "stop", **message: Any) -> Reply:
    body = completion(text)
    body["choices"][0]["finish_reason"] = finish
    body["choices"][0]["message"] |= message
    return Reply(httpx.Response(200, json=body), 0.5, 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The answer is 0.5", True),
        ("1+1=2, so 50%", True),
        (r"\boxed{\frac{1}{2}}", True),
        ("It is 2", False),
        ("<think>1/2</think>3", False),
        ("none", False),
    ],
)
async def test_answers_are_equal_by_value(text: str, right: bool) -> None:
    one = await judge("m", "p", await canonical("1/2"), "1/2", Options(), reply(text))
    assert one.right == right


async def test_a_cut_text_has_only_a_stated_answer() -> None:
    one = await judge("m", "p", "=12", "12", Options(), reply("3*4=12", finish="length"))
    assert (one.answer, one.right) == (None, False)


async def test_a_tool_call_is_an_answer() -> None:
    calls = [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]
    one = await judge(
        "m", "p", "'weather'", "weather", Options(extractor="tool_name"), reply("", tool_calls=calls)
    )
    assert one.right


# --- figures ----------------------------------------------------------------------------------------------


def test_wilson_interval_of_a_known_case() -> None:
    low, high = figures.wilson(81, 263)  # Newcombe 1998, Stat. Med. 17:857, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert figures.wilson(0, 0) == [0.0, 1.0]
    assert figures.wilson(0, 10)[0] == 0
    assert figures.wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("cells", "interval"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),  # Newcombe 1998, Stat. Med. 17:2635, table III, method 10
        ((14, 5, 0, 22), (0.0115, 0.2265)),  # Altman 2000, table 6.2
        ((1, 1, 7, 12), (-0.5069, -0.0256)),  # Fagerland 2014, after Bentur 2009
    ],
)
def test_paired_difference_of_known_cases(cells: Any, interval: Any) -> None:
    assert [round(bound, 4) for bound in figures.difference(*cells)] == list(interval)


def test_paired_difference_turns_round() -> None:
    low, high = figures.difference(36, 12, 2, 0)
    assert figures.difference(36, 2, 12, 0) == [pytest.approx(-high), pytest.approx(-low)]
    assert figures.difference(0, 0, 0, 0) == [-1.0, 1.0]
    assert figures.difference(5, 0, 0, 0)[0] < 0 < figures.difference(5, 0, 0, 0)[1]


def test_mcnemars_exact_p() -> None:
    assert figures.mcnemar(1, 7) == figures.mcnemar(7, 1) == pytest.approx(18 / 256)
    assert figures.mcnemar(0, 0) == figures.mcnemar(3, 3) == 1


def test_a_comparison_the_other_way_round() -> None:
    one = [Outcome("a", str(k), right=k < 7, completion_tokens=10, latency_s=1.0) for k in range(10)]
    other = [Outcome("b", str(k), right=k > 7, completion_tokens=20, latency_s=0.5) for k in range(10)]
    forth, back = figures.compare(one, other), figures.compare(other, one)
    turned = report.turned({**back, "first": "b", "second": "a"})
    assert turned == {**{k: pytest.approx(v) for k, v in forth.items()}, "first": "a", "second": "b"}


def test_a_failed_request_is_wrong_and_costs_nothing() -> None:
    outcomes = [Outcome("a", "1", right=True, completion_tokens=10), Outcome("a", "2", error="timeout")]
    entry = figures.summarise(outcomes, [])
    assert (entry["accuracy"], entry["failed"], entry["completion_tokens"]["per_problem"]) == (0.5, 1, 10.0)
    assert figures.summarise(outcomes[1:], [])["latency_s"]["p50"] is None


def test_each_method_is_first_equally_often() -> None:
    problems = [Problem(str(k), [], "1") for k in range(9)]
    plan = Plan({name: {} for name in "abc"}, problems, {}, Options(), 1, 3, 0, "", False)
    order = [(name, len(block)) for name, block in turns(plan)]
    assert "".join(name for name, _ in order) == "abcbcacab"
    assert Counter(name for name, _ in order) == {"a": 3, "b": 3, "c": 3}
    asked = [(name, problem.id) for name, block in turns(plan) for _, problem in block]
    assert len(asked) == len(set(asked)) == 27


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cot", "cot"),
        ("self_consistency:16", "self_consistency:16"),
        ('{"strategy": "self_consistency", "n": 16}', "self_consistency:16"),
        ('{"strategy": "adaptive_consistency", "n": 16, "tau": 0.9}', "adaptive_consistency(n=16, tau=0.9)"),
        ('{"temperature": 0}', "direct(temperature=0)"),
        ("mine=cot", "mine"),
        ('ac={"strategy": "adaptive_consistency"}', "ac"),
    ],
)
def test_a_method_has_a_name(text: str, name: str) -> None:
    assert methods.parse(text).name == name


def test_a_wrong_spec_is_refused() -> None:
    with pytest.raises(CommandFailed, match="JSON object"):
        methods.parse("Self Consistency")


def test_n_goes_to_those_that_draw_several() -> None:
    chosen = methods.choose(["cot", "mbr", "best_of_n:2", "x=mbr"], KNOWN, 5)
    assert [(one.name, one.reasoning.get("n")) for one in chosen] == [
        ("cot", None),
        ("mbr:5", 5),
        ("best_of_n:2", 2),
        ("x", 5),
    ]


def test_n_goes_to_retrieval_where_what_follows_takes_it() -> None:
    known = {"retrieval": strategies.get("retrieval").describe()["schema"]}
    texts = ["retrieval", 'vote={"strategy": "retrieval", "then": "self_consistency"}']
    assert [one.reasoning.get("n") for one in methods.choose(texts, known, 5)] == [None, 5]


# --- plot -------------------------------------------------------------------------------------------------


def entry(accuracy: float, tokens: float, kv: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "accuracy_ci95": [max(0, accuracy - 0.05), min(1, accuracy + 0.05)],
        "completion_tokens": {"per_problem": tokens},
        "latency_s": {"p50": tokens / 100},
        "kv_bytes": {"per_problem": kv},
    }


def test_the_plot_has_every_method_in_every_panel() -> None:
    names = {f"m{k} <&>": entry(k / 20, 10.0 * (k + 1), 1000.0 * k) for k in range(20)}
    text = plot.svg("a <b>", names)
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert len(list(root.iter(f"{space}circle"))) == 3 * 20
    assert all(0 <= float(dot.attrib["cx"]) <= plot.PANEL_W for dot in root.iter(f"{space}circle"))
    assert all(0 <= float(dot.attrib["cy"]) <= plot.PANEL_H for dot in root.iter(f"{space}circle"))
    assert "prefers-color-scheme: dark" in text


def test_what_costs_nothing_has_a_place() -> None:
    root = ElementTree.fromstring(plot.svg("x", {"a": entry(0.5, 10, 0), "b": entry(0.5, 10, 0)}))
    assert root is not None
    assert "0" in [element.text for element in root.iter() if element.tag.endswith("text")]
    assert plot.svg("x", {"failed": {**entry(0, 1, 1), "latency_s": {"p50": None}}})


@pytest.mark.parametrize(("low", "high"), [(9.0, 30.0), (0.02, 50.0), (1e2, 1e9), (3.0, 3.3)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    axis = plot.Axis(low, high, 300, False)
    assert len(axis.ticks()) <= 12
    assert all(low <= value <= high and 0 <= axis.at(value) <= 300 for value in axis.ticks())


def test_the_front_is_what_nothing_beats() -> None:
    shares = [(10, 0.5), (20, 0.4), (30, 0.9), (30, 0.8), (5, 0.1)]
    points = [plot.Point(k, "", cost, share, 0, 1) for k, (cost, share) in enumerate(shares)]
    assert [point.number for point in plot.front(points)] == [4, 0, 2]
