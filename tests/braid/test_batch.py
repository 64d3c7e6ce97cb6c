"""`braid batch` against a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from braid import cli, jsonl
from braid.batch import command, results, training
from braid.batch.requests import Input, Request
from braid.client import CommandFailed, Retries, retry_after_s
from router.strategies.rejection_sampling import RejectionSamplingOptions
from tests.braid.stub_server import (
    BRAID_AT_A_TERMINAL,
    Answer,
    StubServer,
    closed_port,
    completion,
    echo,
    serve,
)
from tests.router.conftest import MakeStand, make_stand, no_helper_is_left  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[StubServer]:
    with serve() as stub:
        yield stub


class Files:
    """The files of one batch."""

    def __init__(self, folder: Path, server: StubServer) -> None:
        self.folder = folder
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.server = server

    def write(self, *bodies: dict[str, Any]) -> None:
        rows = [
            {"custom_id": f"q{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            for i, body in enumerate(bodies)
        ]
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ask(self, count: int) -> None:
        self.write(*(question(f"say {i}") for i in range(count)))

    def run(self, *flags: str) -> int:
        return command.main([str(self.input), str(self.output), f"--url={self.server.url}", *flags])

    def answers(self) -> dict[str, dict[str, Any]]:
        """By custom_id; every line is JSON, and none comes twice."""
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        found = {line["custom_id"]: line for line in lines}
        assert len(found) == len(lines)
        return found


def question(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture
def files(tmp_path: Path, server: StubServer) -> Files:
    return Files(tmp_path, server)


def test_every_request_has_its_answer_in_openais_format(files: Files) -> None:
    files.ask(5)
    assert files.run("--key=k") == 0
    answers = files.answers()
    assert sorted(answers) == ["q0", "q1", "q2", "q3", "q4"]
    line = answers["q3"]
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert line["error"] is None
    assert (line["response"]["status_code"], line["response"]["request_id"]) == (200, "r1")
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "The answer is 3."
    assert files.server.headers[0]["authorization"] == "Bearer k"
    assert question("say 3") in files.server.bodies


def test_what_is_answered_is_not_asked_again(files: Files) -> None:
    files.ask(3)
    assert files.run() == 0
    before = files.output.read_bytes()
    files.server.gets.clear()  # a finished batch needs no server
    assert files.run() == 0
    assert (len(files.server.bodies), files.output.read_bytes()) == (3, before)


@pytest.mark.parametrize("tail", [1, 30, 200])
def test_a_torn_last_line_is_answered_again(files: Files, tail: int) -> None:
    files.ask(4)
    files.run("--concurrency=1")
    whole = files.output.read_bytes()
    files.output.write_bytes(whole[:-tail])
    assert files.run() == 0
    assert len(files.answers()) == 4
    assert len(files.server.bodies) == 4 + (tail > 1)  # only the line's end was missing: it is whole


def test_a_killed_run_goes_on_where_it_was(files: Files) -> None:
    files.ask(12)
    files.server.holds_after = 5
    arguments = [str(files.input), str(files.output), f"--url={files.server.url}", "--concurrency=2"]
    child = subprocess.Popen([sys.executable, "-m", "braid", "batch", *arguments])
    files.server.wait_until_held(2)  # both clients wait: what they got before is written
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert len(files.answers()) == 5
    files.server.release()
    assert files.run() == 0
    assert len(files.answers()) == 12
    asked = Counter(body["messages"][0]["content"] for body in files.server.bodies)
    assert sorted(asked.values()) == [1] * 10 + [2] * 2


def test_ctrl_c_leaves_a_valid_file_and_says_so(files: Files) -> None:
    files.ask(6)
    files.server.holds_after = 3
    arguments = [str(files.input), str(files.output), f"--url={files.server.url}", "--concurrency=1"]
    child = subprocess.Popen([*BRAID_AT_A_TERMINAL, "batch", *arguments], stderr=subprocess.PIPE, text=True)
    files.server.wait_until_held(1)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate()
    assert child.returncode == 130
    assert "3 of 6 answered; the same command goes on from here" in told
    assert len(files.answers()) == 3


def test_a_second_run_on_the_same_output_is_refused(files: Files, capsys: Any) -> None:
    files.ask(1)
    with jsonl.Appender(files.output, results.BEGIN):
        assert files.run() == 1
    assert "another process writes" in capsys.readouterr().err


def failing(first: Answer, times: int) -> Any:
    """Answers so the first ``times`` times, then as :func:`echo`."""
    left = [first] * times

    def answer(body: dict[str, Any]) -> Answer:
        return left.pop() if left else echo(body)

    return answer


def test_retry_after_is_waited_for(files: Files) -> None:
    files.ask(1)
    files.server.answer = failing((429, {"retry-after": "1"}, {"error": {"message": "full"}}), 1)
    start = time.monotonic()
    assert files.run() == 0
    assert time.monotonic() - start >= 1
    assert len(files.server.bodies) == 2


@pytest.mark.parametrize(
    "first", [None, (503, {"retry-after": "0"}, {}), (429, {"retry-after": "0"}, b"busy")]
)
def test_what_may_pass_is_tried_again(files: Files, first: Answer) -> None:
    files.ask(3)
    files.server.answer = failing(first, 2)
    assert files.run() == 0
    assert len(files.server.bodies) == 5
    assert all(results.succeeded(line) for line in files.answers().values())


def test_retries_end(files: Files) -> None:
    files.ask(1)
    files.server.answer = lambda body: (429, {"retry-after": "0"}, {"error": {"message": "full"}})
    assert files.run("--retries=2") == 1
    assert len(files.server.bodies) == 3
    line = files.answers()["q0"]
    assert (line["response"]["status_code"], line["error"]) == (429, None)


def test_a_connection_that_always_breaks_is_an_error_of_its_request(files: Files) -> None:
    files.write(question("say 1"), question("crash"))
    files.server.answer = lambda body: None if body["messages"][0]["content"] == "crash" else echo(body)
    assert files.run("--retries=1") == 1
    line = files.answers()["q1"]
    assert (line["response"], line["error"]["code"]) == (None, "connection")


def test_silence_is_an_error_and_not_asked_again(files: Files) -> None:
    files.ask(1)
    files.server.holds_after = 0
    assert files.run("--timeout=0.2") == 1
    assert files.answers()["q0"]["error"]["code"] == "timeout"
    assert len(files.server.bodies) == 1


def test_a_reply_that_is_no_json_is_an_error(files: Files) -> None:
    files.ask(1)
    files.server.answer = lambda body: (200, {}, b"<html>")
    assert files.run() == 1
    assert files.answers()["q0"]["error"]["code"] == "no_json"


def refuses_q1(body: dict[str, Any]) -> Answer:
    if body["messages"][0]["content"] == "say 1":
        return 400, {}, {"error": {"message": "too long"}}
    return echo(body)


def test_failed_requests_stay_failed_until_they_are_asked_again(files: Files, capsys: Any) -> None:
    files.ask(3)
    files.server.answer = refuses_q1
    assert files.run() == 1
    assert "2 of 3 answered; 1 failed" in capsys.readouterr().err
    assert files.run() == 1  # known, not asked
    assert len(files.server.bodies) == 3
    files.server.answer = echo
    assert files.run("--retry-failed") == 0
    assert len(files.server.bodies) == 4
    assert all(results.succeeded(line) for line in files.answers().values())


def test_a_file_of_errors_keeps_them_out_of_the_output(files: Files) -> None:
    files.ask(3)
    files.server.answer = refuses_q1
    errors = files.folder / "errors.jsonl"
    assert files.run(f"--errors={errors}") == 1
    assert sorted(files.answers()) == ["q0", "q2"]
    line = json.loads(errors.read_text())
    assert (line["custom_id"], line["response"]["body"]["error"]["message"]) == ("q1", "too long")
    files.server.answer = echo
    assert files.run(f"--errors={errors}") == 0
    assert (len(files.answers()), errors.read_text()) == (3, "")


def test_a_server_that_goes_away_ends_the_run_and_not_its_requests(files: Files, tmp_path: Path) -> None:
    files.ask(2)
    assert command.main([str(files.input), str(files.output), f"--url={closed_port()}"]) == 3
    assert files.answers() == {}
    assert files.run() == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"custom_id": "b", "method": "POST", "url": "/v1/x", "body": {"a": NaN}}', "NaN is not JSON"),
        ('{"method": "POST", "url": "/v1/x", "body": {}}', "custom_id is missing"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {}}', "that of line 1"),
        ('{"custom_id": "b", "method": "GET", "url": "/v1/x", "body": {}}', 'method must be "POST"'),
        ('{"custom_id": "b", "method": "POST", "url": "http://x/v1/x", "body": {}}', "url must be a path"),
        ('{"custom_id": "b", "method": "POST", "url": "/v1/x", "body": []}', "body must be an object"),
        (
            '{"custom_id": "b", "method": "POST", "url": "/v1/x", "body": {"stream": true}}',
            "stream must be off",
        ),
        (
            '{"custom_id": "b", "method": "POST", "url": "/v1/x", "body": {}, "bdy": {}}',
            "unknown field 'bdy'",
        ),
    ],
)
def test_a_bad_line_is_refused_before_anything_is_asked(
    files: Files, capsys: Any, line: str, says: str
) -> None:
    good = '{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {}}'
    files.input.write_text(f"{good}\n{line}\n")
    assert files.run() == 2
    assert says in capsys.readouterr().err
    assert not files.server.bodies


def test_files_that_can_not_be_used_are_refused(files: Files, capsys: Any) -> None:
    assert files.run() == 2
    assert "can't read" in capsys.readouterr().err
    files.input.write_text("\n")
    assert files.run() == 2
    assert "no request in it" in capsys.readouterr().err
    files.ask(1)
    assert command.main([str(files.input), str(files.input)]) == 2
    assert "must be different files" in capsys.readouterr().err
    assert command.main([str(files.input), str(files.folder / "x"), "--url=nonsense"]) == 2
    assert "--url must look like" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"id": 1}\n'])
def test_a_file_of_somebody_else_is_not_touched(files: Files, content: str) -> None:
    files.ask(1)
    foreign = '{"id": "x", "custom_id": "other", "response": null, "error": null}\n'
    files.output.write_text(foreign + content)
    assert files.run() == 2
    assert files.output.read_text() == foreign + content


def test_a_request_that_changed_since_it_was_answered_is_refused(files: Files, capsys: Any) -> None:
    files.ask(2)
    files.run()
    files.write(question("say 0"), question("something else"))
    assert files.run() == 2
    assert "has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "status", "code", "says"),
    [
        ("/ready", 503, 3, "not ready"),
        ("/v1/models", 401, 1, "--key"),
        ("/v1/models", 404, 1, "is --url a Braid router?"),
    ],
)
def test_a_server_that_can_not_serve_is_said(
    files: Files, capsys: Any, path: str, status: int, code: int, says: str
) -> None:
    files.ask(1)
    files.server.gets[path] = (status, {}, {})
    assert files.run() == code
    assert says in capsys.readouterr().err


def test_a_refused_key_ends_the_run(files: Files, capsys: Any) -> None:
    files.ask(50)
    files.server.answer = lambda body: (401, {}, {"error": {"message": "no"}})
    assert files.run("--concurrency=1") == 1
    assert "--key" in capsys.readouterr().err
    assert (len(files.server.bodies), files.answers()) == (1, {})


def test_the_command_line_knows_it(files: Files) -> None:
    files.ask(1)
    assert cli.main(["batch", str(files.input), str(files.output), "--url", files.server.url]) == 0


# --- training data ----------------------------------------------------------------------------------------


def sample(index: int, text: str | None, **fields: Any) -> dict[str, Any]:
    shown = {} if text is None else {"text": text}
    return {"index": index, "state": "finished", "answer": "4", "tokens": 3, **shown, **fields}


def accepted(indices: list[int], *texts: str | None) -> dict[str, Any]:
    samples = [sample(i, text) for i, text in enumerate(texts)]
    return {"strategy": "rejection_sampling", "samples": samples, "accepted": indices, "chosen": 0}


def test_accepted_completions_become_pairs(files: Files) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        assert body["reasoning"]["return_samples"] is True
        return 200, {}, completion("2+2=4", accepted([0, 2, 3], "2+2=4", "wrong", "so 4", "so 4"))

    rejection = {"strategy": "rejection_sampling", "expected": "4", "wanted": 3}
    files.write(question("2+2?", reasoning=rejection), question("3+1?", reasoning=rejection))
    files.server.answer = answer
    pairs = files.folder / "pairs.jsonl"
    assert files.run(f"--pairs={pairs}") == 0
    found = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert [(one["custom_id"], one["index"]) for one in found] == [("q0", 0), ("q0", 2), ("q1", 0), ("q1", 2)]
    assert found[1]["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert found[1]["completion"] == [{"role": "assistant", "content": "so 4"}]


def test_pairs_of_a_batch_that_is_done_need_no_server(files: Files) -> None:
    files.server.answer = lambda body: (200, {}, completion("so 4", accepted([0], None, None)))
    files.write(question("2+2?", reasoning={"strategy": "rejection_sampling", "expected": "4"}))
    files.run()
    files.server.gets.clear()
    pairs = files.folder / "pairs.jsonl"
    assert files.run(f"--pairs={pairs}") == 0
    assert json.loads(pairs.read_text())["completion"][0]["content"] == "so 4"


def test_nothing_that_was_not_accepted_becomes_a_pair(files: Files) -> None:
    files.write(question("1"), question("2", reasoning={"strategy": "rejection_sampling", "expected": "4"}))
    files.server.answer = lambda body: (
        200,
        {},
        completion("so 5", accepted([], "so 5") if "reasoning" in body else None),
    )
    pairs = files.folder / "pairs.jsonl"
    assert files.run(f"--pairs={pairs}") == 0
    assert pairs.read_text() == ""


def test_rollouts_become_groups(files: Files) -> None:
    told = {"token_ids": [5, 6], "logprobs": [-0.1, -0.2], "reward": -0.15, "advantage": 1.0}
    samples = [sample(0, "a", **told, prompt_token_ids=[1, 2]), sample(1, None, state="failed")]
    files.server.answer = lambda body: (
        200,
        {},
        completion("a", {"strategy": "rollouts", "samples": samples, "chosen": 0}),
    )
    files.write(question("x", reasoning={"strategy": "rollouts", "n": 2}))
    groups = files.folder / "groups.jsonl"
    assert files.run(f"--rollouts={groups}") == 0
    found = json.loads(groups.read_text())
    assert (found["prompt"], found["prompt_token_ids"]) == ([{"role": "user", "content": "x"}], [1, 2])
    assert found["samples"] == [{"index": 0, **told, "text": "a"}]


async def test_the_real_router_makes_pairs_and_groups(make_stand: MakeStand, tmp_path: Path) -> None:  # noqa: F811
    stand = await make_stand()
    await stand.workers()
    bodies = (
        question("a", reasoning={"strategy": "rejection_sampling", "expected": "1", "wanted": 2}),
        question("b", model="demo+rollouts:2"),
    )
    files = Files(tmp_path, StubServer())
    files.write(*bodies)
    made = {name: tmp_path / f"{name}.jsonl" for name in ("pairs", "rollouts")}
    flags = [f"--url={stand.url}", *(f"--{name}={path}" for name, path in made.items())]
    assert await asyncio.to_thread(command.main, [str(files.input), str(files.output), *flags]) == 0
    pairs = [json.loads(line) for line in made["pairs"].read_text().splitlines()]
    told = [(one["index"], one["completion"][0]["content"], one["answer"]) for one in pairs]
    assert told == [(1, "The answer is 1.", "1")]  # also sample 3's, once
    group = json.loads(made["rollouts"].read_text())
    assert (group["custom_id"], len(group["samples"])) == ("q1", 2)
    assert [one["text"] for one in group["samples"]] == ["The answer is 0.", "The answer is 1."]


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"reasoning": {"strategy": "rollouts"}}, True),
        ({"model": "demo+rejection_sampling:4"}, True),
        ({"reasoning": {"strategy": "rollouts", "return_samples": False}}, False),
        ({"reasoning": {"strategy": "cot"}}, False),
        ({}, False),
    ],
)
def test_samples_are_asked_for_where_they_make_data(fields: dict[str, Any], asked: bool) -> None:
    sent = training.with_samples(question("x", **fields))
    assert bool((sent.get("reasoning") or {}).get("return_samples")) == asked


def test_a_completion_makes_a_pair_of_texts() -> None:
    request = Request("a", "/v1/completions", {"prompt": "2+2="})
    reply = {"choices": [{"text": "4"}], "reasoning": accepted([0], None)}
    assert [(one["prompt"], one["completion"]) for one in training.pairs(request, reply)] == [("2+2=", "4")]


def test_the_report_is_read_as_the_strategy_writes_it() -> None:
    assert {"expected", "wanted", "return_samples"} <= RejectionSamplingOptions.model_fields.keys()


# --- parts ------------------------------------------------------------------------------------------------


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s("7") == 7
    soon = retry_after_s(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True))
    assert soon is not None
    assert 25 < soon <= 30
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (retry_after_s("soon"), retry_after_s(None)) == (None, None)


def test_waits_grow_and_are_bounded() -> None:
    retries = Retries(longest_s=4.0)
    assert all(0 <= retries.wait_s(k, None) <= min(4.0, 0.5 * 2**k) for k in range(40))
    assert (retries.wait_s(0, 3.0), retries.wait_s(0, 3600.0)) == (3.0, 4.0)


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    write = os.write
    with jsonl.Appender(path, b"{") as file:
        file.append({"a": 1})
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        with pytest.raises(CommandFailed, match="no room left"):
            file.append({"b": 2})
    assert path.read_text() == '{"a": 1}\n'


def test_a_request_is_read_from_the_file_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n\n'
    )
    requests = Input(path)
    assert len(requests) == 1
    assert [request.body for request in requests] == [{"prompt": "x"}]
    assert requests.id_of("a") == next(iter(requests)).id
    assert requests.id_of("b") is None
