"""The accuracy benchmark against a real HTTP server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy
from demo import tasks
from tests.benchmarks.fake_server import FakeServer, serve


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serve(FakeServer()) as fake:
        yield fake


def run(server: FakeServer, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "accuracy.json"
    status = accuracy.main([f"--url={server.url}", f"--out={out}", "--count=4", "--n=5", *flags])
    return status, json.loads(out.read_text())


def test_every_method_is_asked_for_as_a_client_does(server: FakeServer, tmp_path: Path) -> None:
    run(server, tmp_path, "--concurrency=1")
    asked = [
        (
            body["messages"][0]["content"].endswith(tasks.BRIEF_SUFFIX),
            body["temperature"],
            body.get("reasoning"),
        )
        for body in server.bodies[::4]
    ]
    assert asked == [
        (True, 0.0, None),
        (False, 0.0, None),
        (False, 0.0, {"strategy": "cot"}),
        (False, 1.0, {"strategy": "cot"}),
        (False, 1.0, {"strategy": "self_consistency", "n": 5}),
        (False, 1.0, {"strategy": "best_of_n", "n": 5}),
    ]


def test_problems_are_those_the_generator_prints(capsys: pytest.CaptureFixture[str]) -> None:
    tasks.main(["--split", "test", "--count", "3"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = accuracy.problems("test", 0, 3)
    assert [(p.id, p.prompt, str(p.answer)) for p in found] == [
        (row["id"], row["prompt"], row["answer"]) for row in printed
    ]


def test_right_answers_are_counted(server: FakeServer, tmp_path: Path) -> None:
    gold = accuracy.problems("test", 0, 4)[0].answer
    server.answer = f"First, 1+1=2.\n\nThe answer is {gold}."
    status, result = run(server, tmp_path, "--methods", "plain")
    plain = result["methods"]["plain"]
    assert status == 0
    assert plain["outcomes"][0]["right"]
    assert plain["accuracy"] == sum(o["right"] for o in plain["outcomes"]) / 4
    assert plain["completion_tokens"] == 4 * 3
    assert sum(band["problems"] for band in plain["bands"].values()) == 4


def test_failed_requests_count_as_wrong_and_end_in_status_1(server: FakeServer, tmp_path: Path) -> None:
    server.refuse_after = 0
    status, result = run(server, tmp_path, "--methods", "plain")
    assert status == 1
    assert (result["methods"]["plain"]["failed"], result["methods"]["plain"]["accuracy"]) == (4, 0)
    assert result["methods"]["plain"]["outcomes"][0]["error"] == "HTTP 429"


def test_sampling_is_seeded_only_when_asked(server: FakeServer, tmp_path: Path) -> None:
    run(server, tmp_path, "--methods", "cot")
    assert all("seed" not in body for body in server.bodies)
    server.bodies.clear()
    run(server, tmp_path, "--methods", "cot", "--sampling-seed=100", "--concurrency=1")
    assert [body["seed"] for body in server.bodies] == [100, 101, 102, 103]


def test_the_result_says_nothing_of_the_machine(server: FakeServer, tmp_path: Path) -> None:
    text = json.dumps(run(server, tmp_path, "--methods", "plain")[1])
    for secret in (str(tmp_path), server.url, socket.gethostname(), str(Path.home())):
        assert secret not in text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("3*4=12.\n\nThe answer is 1,234", 1234),
        ("The answer is -7", -7),
        ("12", 12),
        ("I do not know", None),
        ("", None),
    ],
)
async def test_the_final_number(text: str, number: int | None) -> None:
    assert await accuracy.final_number(text, truncated=False) == number


async def test_a_cut_text_has_only_a_stated_answer() -> None:
    assert await accuracy.final_number("3*4=12", truncated=True) is None
