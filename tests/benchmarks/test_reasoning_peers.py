"""The comparison with other projects' strategies, over stand-ins for the stacks and for their packages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from benchmarks import reasoning_peers
from benchmarks.accuracy import problems
from benchmarks.reasoning_figures import figures
from benchmarks.reasoning_methods import Ask, Braid, Peer, PeerDriver, Reply
from benchmarks.reasoning_prompts import allowed, long_question
from benchmarks.reasoning_stacks import empty_prefix_cache, engine_tokens
from benchmarks.stack import Stack
from demo import tasks
from tests.benchmarks.fake_server import FakeServer, serve

STUBS = {
    "openai": "class OpenAI:\n    def __init__(self, **options): self.url = options['base_url']\n",
    "optillm/__init__": "",
    "optillm/bon": """
def best_of_n_sampling(system, query, client, model, n, request_config):
    raise RuntimeError('n is not\\nsupported')
""",
    "optillm/self_consistency": """
class AdvancedSelfConsistency:
    def __init__(self, client, model, n, request_config): self.n = n
    def evaluate(self, system, query):
        print('noise')
        return {'aggregated_result': {'clusters': [{'answer': f'{system}|{query}|{self.n}'}]}}
""",
    "optillm/plugins/__init__": "",
    "optillm/plugins/majority_voting_plugin": """
def run(system, query, client, model, config): return f"{client.url} {sorted(config.items())}", 5
""",
}
"""OptiLLM's names as the driver uses them. There is no stub of its_hub: it counts as not installed."""


class Server(FakeServer):
    """Braid and a plain server in one: answers, counts tokens, has engine metrics and a cache to empty."""

    emptied = 0
    samples: tuple[dict[str, Any], ...] = ()

    def app(self) -> Starlette:
        posts = {
            "/v1/chat/completions": self.on_chat,
            "/v1/completions": self.on_request,
            "/tokenize": self.on_tokenize,
            "/reset_prefix_cache": self.on_empty,
        }
        routes = [Route(path, to, methods=["POST"]) for path, to in posts.items()]
        return Starlette(routes=[*routes, Route("/ready", self.on_ready), Route("/metrics", self.on_metrics)])

    async def on_chat(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.refuse_after is not None and len(self.bodies) > self.refuse_after:
            return JSONResponse({}, status_code=429)
        self.served += 1
        report = {"samples": self.samples, "stopped_early": "decided"}
        message = {"role": "assistant", "content": self.answer}
        usage = {"prompt_tokens": 9, "completion_tokens": 4}
        return JSONResponse({"choices": [{"message": message}], "usage": usage, "reasoning": report})

    async def on_tokenize(self, request: Request) -> Response:
        messages = (await request.json())["messages"]
        return JSONResponse({"count": sum(1 + len(m["content"].split()) for m in messages)})

    async def on_empty(self, request: Request) -> Response:
        self.emptied += 1
        return PlainTextResponse("")

    async def on_metrics(self, request: Request) -> Response:
        return PlainTextResponse(f"vllm:prompt_tokens_total {100 * self.served}\n")


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(Server()) as fake:
        assert isinstance(fake, Server)
        yield fake


def stack(server: Server, name: str = "single") -> Stack:
    return Stack(name, server.url, "/ready", metrics={"decode": f"{server.url}/metrics"}, model="demo")


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The peers' environment: this one, with stubs of their packages."""
    for name, text in STUBS.items():
        path = tmp_path / "stubs" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stubs"))
    return tmp_path


def test_a_peer_is_called_as_a_library_and_its_error_is_its_result(peers: Path) -> None:
    driver = PeerDriver(sys.executable, peers / "peers.log")
    try:
        assert driver.methods == ["optillm.self_consistency", "optillm.majority_voting", "optillm.bon"]
        assert "its_hub" in driver.missing["its_hub"]
        at = Stack("plain", "http://h:1", "/health", model="m")
        ask = Ask("What?", 16, 99, 0.5)

        def reply(name: str) -> Reply:
            with httpx.Client() as client:
                return Peer(driver, name).answer(at, client, ask)

        assert reply("optillm.self_consistency").text.endswith(f"|What?{tasks.WORKED_SUFFIX}|16")
        voted = reply("optillm.majority_voting").text
        assert voted == "http://h:1/v1 [('k', 16), ('max_tokens', 99), ('temperature', 0.5)]"
        failed = reply("optillm.bon")
        assert (failed.text, failed.error) == ("", "RuntimeError: n is not")
    finally:
        driver.stop()
    assert (peers / "peers.log").read_text() == "noise\n"


def test_braid_is_asked_for_its_strategy_with_a_salt(server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        method = Braid("single", {"strategy": "genrm"})
        reply = method.answer(stack(server), client, Ask("What?", 16, 99, 0.5, k=3, salt="s"))
        server.refuse_after = 1
        refused = method.answer(stack(server), client, Ask("What?", 16, 99, 0.5))
    assert (reply.text, reply.tokens, reply.stopped_early) == (server.answer, 4, "decided")
    body = server.bodies[0]
    assert body["reasoning"] == {"strategy": "genrm", "n": 16, "k": 3}
    assert (body["cache_salt"], body["temperature"], body["max_tokens"]) == ("s", 0.5, 99)
    assert refused.error.startswith("HTTPStatusError")


def test_a_long_question_is_long_enough_and_of_its_own_key(server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        one, two = (long_question(client, "demo", "How many?", key, 500) for key in ("0:1", "0:2"))
    assert one.endswith("How many?")
    assert 500 <= len(one.split()) + 10 < 900
    assert one[:60] != two[:60]


def test_what_sharing_leaves_to_compute(server: Server) -> None:
    answers = [{"index": i, "text": "a b", "tokens": 2} for i in range(2)]
    chains = [{"index": 2 + i, "role": "verification", "of": i % 2, "tokens": 5} for i in range(4)]
    ask = Ask("q " * 10, 2, 9, 1.0)
    with httpx.Client(base_url=server.url) as client:
        prompt, most = allowed(client, "demo", ask, Reply(1.0, samples=[*answers, *chains]))
        assert allowed(client, "demo", ask, Reply(1.0)) == (prompt, None)
    new = len(tasks.VERIFY_REQUEST.split()) + 2  # both turns' headers, which the stand-in counts as one each
    assert most == prompt + 2 * 2 + 4 * (new + 2)


def test_tokens_of_all_engines_are_added_up() -> None:
    counted = {
        "prefill/vllm:prompt_tokens_total": 2000.0,
        "decode/vllm:prompt_tokens_total": 32000.0,
        "decode/vllm:prompt_tokens_cached_total": 31984.0,
        "decode/vllm:generation_tokens_total": 900.0,
        "decode/vllm:prompt_tokens_by_source_total": 32000.0,
    }
    found = engine_tokens(counted)
    assert (found["prompt_computed"], found["generated"], found["requests"]) == (2016.0, 900.0, 0.0)


def test_a_plain_server_forgets_its_prompts(server: Server) -> None:
    empty_prefix_cache(stack(server))
    assert server.emptied == 1


def run(
    server: Server, peers: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> tuple[int, dict[str, Any]]:
    def launchers(args: Any, run_dir: Path, wanted: set[str]) -> dict[str, Any]:
        return {name: lambda name=name: stack(server, name) for name in sorted(wanted)}

    monkeypatch.setattr(reasoning_peers, "launchers", launchers)
    monkeypatch.setattr(reasoning_peers, "SETTLE_S", 0.0)
    argv = ["--problems=2", "--block=1", "--rounds=1", "--prompt-tokens=60", "--patience-s=0", *flags]
    status = reasoning_peers.main([*argv, "--run-dir", str(peers / "run"), "--out", str(peers / "out")])
    (path,) = (peers / "out").glob("*.json")
    assert str(peers) not in path.read_text()
    return status, json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_asks_every_method_in_turn_and_saves_it(
    server: Server, peers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = f"The answer is {problems('test', 0, 1)[0].answer}."
    status, result = run(server, peers, monkeypatch)
    assert status == 1, "OptiLLM's best of n fails here"
    order = [(turn["round"], turn["method"]) for turn in result["turns"] if turn["part"] == "vote"]
    names = list(dict.fromkeys(name for _, name in order))
    assert order == [*((0, name) for name in names), *((1, name) for name in [*names[1:], names[0]])]
    rows = {row["method"]: row for part in result["figures"].values() for row in part}
    assert {row["questions"] for row in result["figures"]["vote"]} == {2}
    assert rows["braid, one engine"]["right"] == 1
    assert rows["braid, one engine"]["engines"]["prompt_computed"] == 100.0
    assert rows["optillm bon"]["errors"] == ["RuntimeError: n is not"]
    assert rows["braid genrm, one engine"]["prompt"] >= 60
    assert "its_hub" in result["versions"]["missing"]
    assert "its_hub SelfConsistency" not in rows
    assert "optillm self_consistency" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_measured_before_an_early_end_is_saved(
    server: Server, peers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reasoning_peers.Run, "_judge", fails)
    with pytest.raises(KeyboardInterrupt):
        run(server, peers, monkeypatch, "--methods", "braid, one engine")
    (path,) = (peers / "out").glob("*.json")
    result = json.loads(path.read_text())
    assert result["ended_by"].startswith("KeyboardInterrupt")
    assert len(result["records"]) == 2
    assert "--methods 'braid, one engine'" in result["command"]


def test_failed_questions_are_wrong_and_have_no_time() -> None:
    def record(reply: Reply, right: bool) -> reasoning_peers.Record:
        return reasoning_peers.Record("vote", "m", "plain", 0, "p", reply, None, right)

    rows = figures([record(Reply(2.0), True), record(Reply(9.0, error="x"), False)], [])["vote"]
    assert (rows[0]["seconds"]["p50"], rows[0]["accuracy"], rows[0]["errors"]) == (2.0, 0.5, ["x"])
