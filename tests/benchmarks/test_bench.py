"""`braid bench` against a real HTTP server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, load, vllm_load
from tests.benchmarks.fake_server import KV_BYTES, FakeServer, serve

GROUPS = ("n=4", "self_consistency:4")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serve(FakeServer()) as fake:
        yield fake


@pytest.fixture(autouse=True)
def no_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(server: FakeServer, out: Path, *flags: str) -> int:
    small = ("--requests=6", "--concurrency=3", "--n=4", "--prompt-tokens=100", "--max-tokens=3")
    return bench.main([f"--url={server.url}", f"--out={out}", *small, *flags])


def bench_json(server: FakeServer, tmp_path: Path, *flags: str) -> dict[str, Any]:
    out = tmp_path / "results" / "bench.json"
    run(server, out, "--skip-plain", *flags)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_it_measures_both_group_loads(server: FakeServer, tmp_path: Path) -> None:
    loads = bench_json(server, tmp_path)["loads"]
    assert list(loads) == list(GROUPS)
    for name in GROUPS:
        summary = loads[name]["summary"]
        assert (summary["requests"], summary["failed"]) == (6, {})
        assert summary["kv_bytes"] == summary["counters"]["braid_kv_bytes_total"] == 6 * KV_BYTES
        assert summary["kv_transfers"] == summary["counters"]["braid_kv_transfers_total"] == 6
        assert summary["paths"] == {"remote": 6}
        assert summary["tokens_per_s"] > 0


def test_it_keeps_every_measurement(server: FakeServer, tmp_path: Path) -> None:
    requests = bench_json(server, tmp_path)["loads"]["n=4"]["requests"]
    assert len(requests) == 6
    for request in requests:
        assert 0 < request["first_event_s"] <= request["first_text_s"] <= request["total_s"]
        assert len(request["gaps_s"]) == 4 * 2
        assert request["completion_tokens"] == 12
        assert request["headers"]["x-braid-decode"] == "d0"


def test_it_asks_for_groups_as_a_client_does(server: FakeServer, tmp_path: Path) -> None:
    bench_json(server, tmp_path)
    groups = [body for body in server.bodies if body["max_tokens"] == 3]
    assert [body["n"] for body in groups[:6]] == [4] * 6
    assert all(body["reasoning"] == {"strategy": "self_consistency", "n": 4} for body in groups[6:])
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in groups)


def test_it_keeps_to_its_concurrency(server: FakeServer, tmp_path: Path) -> None:
    bench_json(server, tmp_path, "--requests=20")
    assert 1 <= server.most_running <= 3


def test_prompts_have_the_asked_length_and_differ(server: FakeServer, tmp_path: Path) -> None:
    loads = bench_json(server, tmp_path)["loads"]
    assert all(abs(request["prompt_tokens"] - 100) <= 1 for request in loads["n=4"]["requests"])
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert len(set(prompts)) == len(prompts)


def test_a_seed_draws_the_same_prompts(server: FakeServer, tmp_path: Path) -> None:
    def prompts(seed: int) -> list[str]:
        server.bodies.clear()
        bench_json(server, tmp_path, f"--seed={seed}")
        return sorted(body["messages"][0]["content"] for body in server.bodies[2:])

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_the_result_says_how_to_repeat_it_and_nothing_of_the_machine(
    server: FakeServer, tmp_path: Path
) -> None:
    result = bench_json(server, tmp_path, "--seed=5")
    lengths = "--prompt-tokens 100 --max-tokens 3"
    assert result["command"] == (
        f"braid bench --requests 6 --concurrency 3 --n 4 {lengths} --seed 5 --skip-plain"
    )
    assert vars(bench.parse(result["command"].split()[2:]))["seed"] == 5
    assert result["versions"]["braid"]
    assert result["skipped"] == {"plain": "--skip-plain"}
    text = json.dumps(result)
    for secret in (str(tmp_path), server.url, socket.gethostname(), str(Path.home())):
        assert secret not in text


def test_it_prints_a_table(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, tmp_path / "bench.json", "--skip-plain") == 0
    printed = capsys.readouterr().out
    assert "TTFT" in printed
    assert "n=4" in printed


def test_refused_requests_are_counted_and_end_in_status_1(server: FakeServer, tmp_path: Path) -> None:
    server.refuse_after = 2 + 4
    out = tmp_path / "bench.json"
    assert run(server, out, "--skip-plain") == 1
    loads = json.loads(out.read_text())["loads"]
    assert loads["n=4"]["summary"]["failed"] == {"HTTP 429": 2}
    assert loads["self_consistency:4"]["summary"]["ttft_ms"]["p50"] is None


async def test_a_cut_stream_is_a_failure(server: FakeServer) -> None:
    server.cut = True
    async with load.open_client(server.url, 1) as client:
        reply = await load.stream(client, bench.CHAT, {"messages": [{"content": "a"}]})
    assert reply.error == "the stream was cut"
    assert reply.first_text_s is not None


async def test_the_api_key_is_sent(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k1")
    async with load.open_client(server.url, 1) as client:
        await load.stream(client, bench.CHAT, {"messages": [{"content": "a"}]})
    assert server.keys == ["Bearer k1"]


def test_without_a_server_it_says_make_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert bench.main(["--url", url, "--out", str(tmp_path / "x.json")]) == 1
    assert "make up" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_server_that_is_not_ready_is_not_measured(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.ready = False
    assert run(server, tmp_path / "x.json") == 1
    assert "not ready" in capsys.readouterr().err


def test_the_end_of_a_stream_is_believed_over_its_headers() -> None:
    headers = {"x-braid-kv-bytes": "10", "x-braid-kv-transfers": "1", "x-braid-path": "remote"}
    proof = {"path": "recomputed", "kv_bytes": 0, "kv_transfers": 0}
    first, last, none = load.Stream(headers=headers), load.Stream(headers=headers, proof=proof), load.Stream()
    assert [(r.path, r.kv("bytes"), r.kv("transfers")) for r in (first, last, none)] == [
        ("remote", 10, 1),
        ("recomputed", 0, 0),
        ("unknown", 0, 0),
    ]


def test_counted_paths_are_added_over_reasons() -> None:
    counted = {
        'braid_path_total{path="local",reason="short"}': 2.0,
        'braid_path_total{path="local",reason="cached"}': 1.0,
        "braid_kv_bytes_total": 9.0,
    }
    assert load.counted_paths(counted) == {"local": 3}


# --- plain load: the tool is stood in for by a program that writes what `vllm bench serve` writes -----------

FIGURES = {
    "model_id": "demo", "tokenizer_id": "/secret/path", "date": "now", "completed": 6, "duration": 2.0,
    "total_output_tokens": 18, "output_throughput": 9.0, "request_throughput": 3.0,
    "p50_ttft_ms": 10.0, "p95_ttft_ms": 20.0, "p99_ttft_ms": 30.0, "p50_itl_ms": 1.0, "p95_itl_ms": 2.0,
    "p99_itl_ms": 3.0, "p50_e2el_ms": 1.0, "p95_e2el_ms": 2.0, "p99_e2el_ms": 3.0,
    "ttfts": [0.01], "errors": [""], "generated_texts": ["x"],
}  # fmt: skip
WRITES_FIGURES = f"""
import json, sys
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if "=" in a)
json.dump({FIGURES!r}, open(flags["result-dir"] + "/" + flags["result-filename"], "w"))
"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_plain_load_is_the_tools_figures_under_our_names(
    server: FakeServer, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_load, "available", lambda: True)
    monkeypatch.setattr(vllm_load, "PROGRAM", WRITES_FIGURES)
    out = tmp_path / "bench.json"
    assert run(server, out, f"--tokenizer={tokenizer}") == 0
    loads = json.loads(out.read_text())["loads"]
    assert list(loads) == ["plain", *GROUPS]
    assert loads["plain"]["summary"]["ttft_ms"] == {"p50": 10.0, "p95": 20.0, "p99": 30.0}
    assert loads["plain"]["figures"]["ttfts"] == [0.01]
    assert "--random-input-len=100" in loads["plain"]["arguments"]
    assert "/secret/path" not in out.read_text()


def test_a_tool_that_fails_is_shown_and_ends_in_status_1(
    server: FakeServer,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vllm_load, "available", lambda: True)
    monkeypatch.setattr(vllm_load, "PROGRAM", "import sys; sys.exit('no such dataset')")
    out = tmp_path / "bench.json"
    assert run(server, out, f"--tokenizer={tokenizer}") == 1
    assert "no such dataset" in capsys.readouterr().err
    assert json.loads(out.read_text())["skipped"] == {"plain": bench.PLAIN_FAILED}


def test_plain_load_without_vllm_is_left_out_and_said(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_load, "available", lambda: False)
    out = tmp_path / "bench.json"
    assert run(server, out) == 0
    assert "vLLM is not installed" in json.loads(out.read_text())["skipped"]["plain"]


@pytest.mark.engine
def test_vllms_own_client_measures_a_server(server: FakeServer) -> None:
    if not (vllm_load.available() and (bench.DEMO_TOKENIZER / "tokenizer.json").is_file()):
        pytest.skip("vLLM or the demo model is not installed")
    wanted = vllm_load.PlainLoad(requests=4, concurrency=2, prompt_tokens=32, max_tokens=3, seed=0)
    figures = vllm_load.run_plain(wanted, server.url, "demo", bench.DEMO_TOKENIZER)
    summary = vllm_load.summarise(figures, 4, {})
    assert (figures["completed"], summary["failed"], summary["completion_tokens"]) == (
        4,
        {},
        figures["total_output_tokens"],
    )
    assert all(summary[name]["p99"] >= 0 for name in ("ttft_ms", "itl_ms", "total_ms"))
    assert not set(figures) & set(vllm_load.LEFT_OUT)
