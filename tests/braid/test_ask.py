from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import select
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from rich.console import Console

from braid.ask import Progress, main, printable, summary, table

VOTES = [
    {"answer": "4", "votes": 2, "weight": 2.0, "samples": [0, 2]},
    {"answer": "5", "votes": 1, "weight": 1.0, "samples": [1]},
]
SAMPLES = [
    {"index": i, "state": "finished", "answer": answer, "tokens": 9}
    for i, answer in enumerate(["4", "5", "4"])
]
REPORT = {
    "strategy": "self_consistency",
    "samples": SAMPLES,
    "votes": VOTES,
    "answer": "4",
    "confidence": 0.666667,
    "stopped_early": "decided",
    "samples_cancelled": 1,
}
PATH = {
    "path": "remote",
    "kv_bytes": 2048,
    "kv_transfers": 1,
    "prefill": "p0",
    "decode": {"d0": {"path": "remote"}},
}


def chunk(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"object": "chat.completion.chunk", "choices": choices, **fields}


def reply(question: str) -> list[Any]:
    """What the router streams, by question."""
    progress = [chunk({}, reasoning={"event": "sample", **one, "votes": VOTES}) for one in SAMPLES]
    decided = chunk({}, reasoning={"event": "decided", "answer": "4"})
    end = chunk({}, "stop", reasoning=REPORT, braid=PATH)
    usage = {"choices": [], "usage": {"completion_tokens": 27}}
    text = [chunk({"role": "assistant", "content": "The answer "}), chunk({"content": "is 4."})]
    streams: dict[str, list[Any]] = {
        "votes": [*progress, decided, *text, end, usage, "[DONE]"],
        "plain": [*text, chunk({}, "stop", braid=PATH), "[DONE]"],
        "escape": [chunk({"content": "\x1b[2Jx"}), chunk({}, "stop"), "[DONE]"],
        "error": [progress[0], {"error": {"message": "every sample failed"}}],
        "cut": [*text],
        "line break": [json.dumps(chunk({"content": "a\u2028b"}), ensure_ascii=False), text[1], "[DONE]"],
        "nonsense": ["{"],
    }
    return streams[question]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI()
    app.state.bodies = []

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "demo", "object": "model"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> StreamingResponse | JSONResponse:
        body = await request.json()
        app.state.bodies.append((dict(request.headers), body))
        question = body["messages"][0]["content"]
        if question.isdigit():
            error = {"message": "refused so", "type": "x", "param": None, "code": None}
            return JSONResponse({"error": error}, int(question), headers={"retry-after": "7"})

        async def events() -> AsyncIterator[str]:
            yield ": keep-alive\n\n"
            for item in reply(question):
                yield f"data: {item if isinstance(item, str) else json.dumps(item)}\n\n"
                await asyncio.sleep(0)

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def test_the_answer_goes_to_stdout_and_the_votes_to_stderr(url: str, capsys: Any) -> None:
    assert main(["votes", "--strategy", "self_consistency", "-n", "4", "--url", url]) == 0
    out, err = capsys.readouterr()
    assert out == "The answer is 4.\n"
    lines = err.splitlines()
    assert lines[:3] == [
        "sample 0 finished: 4 (9 tokens)  votes: 4 x2, 5 x1",
        "sample 1 finished: 5 (9 tokens)  votes: 4 x2, 5 x1",
        "sample 2 finished: 4 (9 tokens)  votes: 4 x2, 5 x1",
    ]
    told = " ".join(lines[3:])
    for part in (
        "answer 4 (67%)",
        "stopped early: decided, 1 samples",
        "27 tokens",
        "path remote, p0 -> d0, 2048 KV",
    ):
        assert part in told


def test_a_plain_question_needs_no_strategy(url: str, app: FastAPI, capsys: Any) -> None:
    assert main(["plain", "--url", url, "--temperature", "0.5", "--max-tokens", "9", "--key", "k"]) == 0
    headers, body = app.state.bodies[-1]
    assert headers["authorization"] == "Bearer k"
    assert body == {
        "messages": [{"role": "user", "content": "plain"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "max_tokens": 9,
        "model": "demo",
    }
    assert capsys.readouterr().out == "The answer is 4.\n"


def test_options_reach_the_strategy(url: str, app: FastAPI) -> None:
    options = ["-n", "3", "-o", "weight=mean_logprob", "-o", "budget_tokens=50", "-o", "early_stop=false"]
    assert main(["votes", "--strategy", "self_consistency", "--model", "m", "--url", url, *options]) == 0
    body = app.state.bodies[-1][1]
    assert body["model"] == "m"
    assert body["reasoning"] == {
        "strategy": "self_consistency",
        "n": 3,
        "weight": "mean_logprob",
        "budget_tokens": 50,
        "early_stop": False,
    }


def test_a_token_that_unicode_calls_a_line_break_is_printed(url: str, capsys: Any) -> None:
    assert main(["line break", "--url", url]) == 0
    assert capsys.readouterr().out == "a\u2028bis 4.\n"


def test_a_question_from_standard_input(url: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("plain"))
    assert main(["-", "--url", url]) == 0
    assert capsys.readouterr().out == "The answer is 4.\n"


@pytest.mark.parametrize(
    ("question", "code", "says"),
    [
        ("400", 1, "400: refused so"),
        ("401", 1, "--key"),
        ("429", 1, "try again in 7 s"),
        ("503", 1, "braid doctor"),
        ("error", 1, "every sample failed"),
        ("cut", 1, "broke off"),
        ("nonsense", 1, "no JSON"),
        (" ", 2, "empty"),
    ],
)
def test_a_failure_says_what_to_do(url: str, capsys: Any, question: str, code: int, says: str) -> None:
    assert main([question, "--url", url]) == code
    assert says in " ".join(capsys.readouterr().err.split())


def test_direct_makes_one_answer(capsys: Any) -> None:
    assert main(["x", "--strategy", "direct", "-n", "2"]) == 2
    assert "self_consistency" in capsys.readouterr().err


def test_nobody_there_says_how_to_start(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert main(["x", "--url", f"http://127.0.0.1:{port}"]) == 3
    assert "`make up`" in capsys.readouterr().err


def test_silence_is_reported(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert main(["x", "--url", url, "--timeout", "0.05"]) == 1
    assert "silence for 0.05 s" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1", ""])
def test_a_wrong_url_is_a_usage_error(url: str, capsys: Any) -> None:
    assert main(["x", "--url", url]) == 2
    assert "--url" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["-n", "4"], ["-o", "early_stop=false"]])
def test_samples_need_a_strategy(arguments: list[str], capsys: Any) -> None:
    assert main(["x", *arguments]) == 2
    assert "--strategy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["x", "-n", "0"], ["x", "-o", "weight"], ["x", "--max-tokens", "y"]]
)
def test_wrong_arguments_are_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_table_shows_samples_and_tally() -> None:
    progress = Progress(n=4)
    for event in reply("votes")[:2]:
        progress.take(event)
    console = Console(file=io.StringIO(), width=80)
    console.print(table(progress))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "2 of 4 ended" in shown
    assert "votes: 4 x2, 5 x1" in shown


def test_an_answer_cannot_carry_markup_or_escapes() -> None:
    progress = Progress()
    answer = "[red]\x1b[2J\u202e4"
    progress.take(chunk({}, reasoning={"event": "sample", "index": 0, "state": "finished", "answer": answer}))
    console = Console(file=io.StringIO(), width=80)
    console.print(table(progress))
    assert isinstance(console.file, io.StringIO)
    assert "[red][2J4" in console.file.getvalue()
    assert printable("a\x07\n\tb") == "a\n\tb"


def test_a_summary_names_the_group() -> None:
    progress = Progress(path={"path": "remote", "group": "exam-7"})
    assert summary(progress).endswith("| group exam-7")


def test_a_summary_of_nothing_is_empty() -> None:
    assert summary(Progress()) == ""


@pytest.mark.parametrize(("question", "shows"), [("votes", "4 x2, 5 x1"), ("escape", "[2Jx")])
def test_a_terminal_gets_a_live_table_and_no_escapes_of_the_model(
    url: str, question: str, shows: str
) -> None:
    leader, follower = pty.openpty()
    command = f"import sys; from braid.ask import main; sys.exit(main([{question!r}, '--url', {url!r}]))"
    terminal = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(
        [sys.executable, "-c", command], stdin=follower, stdout=follower, stderr=follower, env=terminal
    )
    os.close(follower)
    shown = b""
    with open(leader, "rb", buffering=0) as screen:
        while select.select([screen], [], [], 30)[0]:
            try:
                part = screen.read(4096)
            except OSError:  # how Linux tells that the other end is closed
                break
            shown += part
    assert child.wait() == 0
    assert shows in shown.decode()
    assert b"\x1b[2Jx" not in shown
