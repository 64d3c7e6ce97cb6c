"""The hand-over benchmark, end to end over small stand-ins for the stacks."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from benchmarks import braid_stack, handover, measure, peers, plain
from benchmarks.client import open_client, stream_completion, whole_completion
from benchmarks.measure import FanoutRecord, Pace, SideBySide
from benchmarks.process import GuardedProcess, Launch, LaunchError, free_ports
from benchmarks.prompts import Prompts
from benchmarks.stack import EngineSettings, Stack

FAKE = Path(__file__).with_name("fake_stack.py")


def launch_fake(name: str, run_dir: Path) -> Stack:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    process = GuardedProcess(Launch(name, [sys.executable, str(FAKE), str(port)]), run_dir)
    return plain.ready_or_stopped(Stack(name, url, "/ready", [process], {"router": f"{url}/metrics"}))


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = launch_fake("plain", tmp_path)
    yield stack
    stack.stop()


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    content = {"added_tokens": [], "model": {"vocab": {"a": 0, "b": 1}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_stream_is_timed_to_its_first_text(stack: Stack) -> None:
    with open_client(stack.base_url) as client:
        seen = stream_completion(client, {"prompt": [1, 2, 3]})
        assert (seen.text, seen.chunks, seen.headers["x-braid-path"]) == ("ab", 2, "remote")
        assert seen.first_text_s == seen.first_chunk_s <= seen.total_s
        late = stream_completion(client, {"prompt": [1, 2]})
        assert late.text == "b"
        assert late.first_chunk_s < late.first_text_s


def test_an_error_is_raised_not_timed(stack: Stack) -> None:
    with open_client(stack.base_url) as client:
        with pytest.raises(httpx.HTTPStatusError):
            stream_completion(client, {"prompt": [1]})
        with pytest.raises(httpx.HTTPStatusError):
            whole_completion(client, {"prompt": [1]})


def test_a_thawed_stack_answers_and_counts_on(stack: Stack) -> None:
    with open_client(stack.base_url) as client:
        stream_completion(client, {"prompt": [1, 2, 3]})
    stack.freeze()
    stack.thaw()
    stack.wait_ready(20)
    assert stack.settled_counters(quiet_s=0.01) == {"router/braid_kv_transfers_total": 1.0}


def test_a_stack_that_ends_early_is_reported_with_its_log(tmp_path: Path) -> None:
    launch = Launch("broken", [sys.executable, "-c", "raise SystemExit('no model')"])
    stack = Stack("broken", "http://127.0.0.1:9", "/ready", [GuardedProcess(launch, tmp_path)])
    with pytest.raises(LaunchError, match="no model"):
        plain.ready_or_stopped(stack)


def test_every_stack_is_first_and_follows_every_other_equally_often(model: Path) -> None:
    launchers: dict[str, Any] = dict.fromkeys("abc")
    bench = SideBySide(launchers, Prompts(model, 0), Pace())
    orders = [bench.order(number) for number in range(6)]
    assert sorted(orders) == sorted(map(list, permutations("abc")))
    within = Counter(pair for order in orders for pair in pairwise(order))
    assert set(within.values()) == {2}
    assert len(within) == 6


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["freeze", "run", "restart"])
def test_a_run_measures_saves_and_shows(
    idle: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("plain", "peer", "braid"):
        monkeypatch.setattr(handover, f"launch_{name}", fake_launcher("nixl" if name == "peer" else name))
    out = tmp_path / "out"
    argv = ["--model", str(model), "--out", str(out), "--run-dir", str(tmp_path / "run"), "--idle", idle]
    argv += ["--patience-s", "0", "--requests", "1", "--lengths", "5", "1"]
    argv += ["--fanout-rounds", "1", "--samples", "4"]
    assert handover.main(argv) == 0
    (path,) = out.glob("handover-*.json")
    result = json.loads(path.read_text())
    assert [len(result["records"][part]) for part in ("handover", "fanout")] == [6, 3]
    assert {row["errors"] for row in result["handover"] if row["prompt_tokens"] == 5} == {0}
    assert {row["errors"] for row in result["handover"] if row["prompt_tokens"] == 1} == {1}
    assert {record["error"].split(":")[0] for record in result["records"]["handover"]} == {
        "",
        "HTTPStatusError",
    }
    assert str(tmp_path) not in path.read_text()
    assert (tmp_path / "run/nixl.log").is_file()
    assert "hand-over p50 ms" in capsys.readouterr().out


def fake_launcher(name: str) -> Any:
    def launch(settings: EngineSettings, python: str, run_dir: Path, *rest: Any) -> Stack:
        return launch_fake(name, run_dir)

    return launch


@pytest.mark.parametrize("ending", ["LaunchError: gone", "SystemExit: ended by SIGTERM"])
def test_what_was_measured_before_an_early_end_is_saved(
    ending: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "launch_plain", fake_launcher("plain"))

    def fails(*args: Any) -> Iterator[Any]:
        if ending.startswith("SystemExit"):
            signal.raise_signal(signal.SIGTERM)
        raise LaunchError("gone")
        yield

    monkeypatch.setattr(handover, "measure_fanout", fails)
    out = tmp_path / "out"
    argv = [
        "--model",
        str(model),
        "--stacks",
        "plain",
        "--out",
        str(out),
        "--requests",
        "1",
        "--lengths",
        "5",
    ]
    with pytest.raises((LaunchError, SystemExit)):
        handover.main([*argv, "--patience-s", "0"])
    (path,) = out.glob("*.json")
    result = json.loads(path.read_text())
    assert result["ended_by"] == ending
    assert len(result["records"]["handover"]) == 1


def test_engines_of_all_stacks_get_the_same_settings() -> None:
    settings = EngineSettings(Path("/m"))
    shared = settings.argv()
    assert plain.api_server("python", settings, 1)[-len(shared) :] == shared
    engine = peers._engine("prefill", "kv_producer", settings, "python", 1, 2, core=0)
    assert list(engine.argv)[-len(shared) - 2 : -2] == shared
    assert engine.env["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert braid_stack.braid_env(settings)["BRAID_BLOCK_SIZE"] == str(settings.block_size)


def test_the_command_for_braid_is_one_it_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from braid.cli import parse

    seen: list[Launch] = []
    monkeypatch.setattr(braid_stack, "GuardedProcess", lambda launch, run_dir: seen.append(launch))
    monkeypatch.setattr(braid_stack, "ready_or_stopped", lambda stack: stack)
    monkeypatch.setattr(braid_stack, "pages", lambda url: {})
    braid_stack.launch_braid(EngineSettings(tmp_path), "python", tmp_path)
    assert parse(seen[0].argv[3:]).command == "up"


def test_a_stack_that_stalls_when_asked_for_its_counters_costs_its_record_not_the_run() -> None:
    def stalls() -> dict[str, float]:
        raise httpx.ReadTimeout("timed out")

    stack: Any = SimpleNamespace(settled_counters=stalls)
    record = measure._fan_out(FanoutRecord("nixl", 0, 0, 4, 1000), stack, httpx.Client(), {})
    assert record.error == "ReadTimeout: timed out"
