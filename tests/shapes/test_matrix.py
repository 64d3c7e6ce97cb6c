"""Shapes of the KV cache and of the two engines: what is served gives the plain engine's tokens."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.shapes import models
from tests.shapes.cluster import MAX_TOKENS, Shape, ShapeCluster, idle, plain_answers, workers

pytestmark = [pytest.mark.shapes, pytest.mark.timeout(600)]

TIE = 1e-5
"""Top-2 log-probability gap under which a first divergence is tolerated."""
FP8 = ("--kv-cache-dtype", "fp8")
NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'
SHAPES = {
    "windows and full attention": Shape(models.windows_and_full),
    "windows only": Shape(models.windows_only),
    "prefill on 1 rank, decode on 2": Shape(models.full, decode_ranks=2),
    "prefill on 2 ranks, decode on 1": Shape(models.full, prefill_ranks=2),
    "2 ranks each": Shape(models.windows_and_full, prefill_ranks=2, decode_ranks=2),
    "copies of a head on 2 decode ranks": Shape(models.one_head, decode_ranks=2),
    "fp8": Shape(models.full, FP8, FP8, plain={"kv_cache_dtype": "fp8"}),
    "blocks of 32 into blocks of 64": Shape(models.full, decode=("--block-size", "64")),
    "blocks of 64 into blocks of 32 on 2 ranks": Shape(models.full, ("--block-size", "64"), decode_ranks=2),
    "ngram speculation on decode": Shape(models.windows_and_full, decode=("--speculative-config", NGRAM)),
}
LENGTHS = (1, 20, 33, 64, 90, 97, 128, 150, 300, 420)
"""Prompts shorter and longer than the window, than a block and than a chunk, and whole blocks."""


LONG = (700, 800, 900)
"""Prompts whose transfers are cut short."""


def prompts() -> list[list[int]]:
    """One of each length, and two that go on where the last one ends: a longer and a shorter piece."""
    rng = random.Random(1)
    found = [[rng.randrange(5, 400) for _ in range(length)] for length in LENGTHS]
    return [*found, *([*found[-1], *(rng.randrange(5, 400) for _ in range(n))] for n in (100, 7))]


def long_prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 400) for _ in range(length)] for length in LONG]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models already made, by the name of what makes them."""
    return {}


@pytest.fixture
def model(shape: Shape, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if lacks := shape.lacks():
        pytest.skip(lacks)
    name = shape.model.__name__
    if name not in folders:
        folders[name] = models.make(shape.model, tmp_path_factory.mktemp("models") / name)
    return folders[name]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_is_served_with_the_plain_engines_tokens(
    shape: Shape, model: Path, tmp_path: Path, record_property: Any
) -> None:
    asked, last = prompts(), long_prompts(3)
    settings = {"block_size": 32, "max_model_len": 1024, **shape.plain}
    reference = plain_answers(model, settings, asked + last, tmp_path)
    assert len({str(answer["tokens"]) for answer in reference}) == len(reference), (
        "answers tell prompts apart"
    )
    with (
        ShapeCluster(shape, model, tmp_path / "run") as cluster,
        httpx.Client(base_url=cluster.url, timeout=60, trust_env=False) as client,
    ):
        cluster.wait_ready()
        ties = sum(answered(client, p, plain) for p, plain in zip(asked, reference, strict=False))
        prefixes_are_cached(client, asked[-1])
        settle(client)
        for after_s in (0.01, 0.05, 0.1, 0.2):
            cancelled(client, long_prompts(int(after_s * 1000)), after_s)
        settle(client)
        ties += sum(prefill_lost(cluster, client, last, reference[len(asked) :]))
        settle(client)
    record_property("divergences_at_ties", ties)


def answered(client: httpx.Client, prompt: list[int], plain: Any) -> int:
    """Ask for four samples of a prompt; returns how many diverge from the plain engine at a tie."""
    reply = ask(client, prompt, 4)
    assert reply.headers["x-braid-path"] == "remote"
    assert reply.headers["x-braid-kv-transfers"] == "1"
    assert int(reply.headers["x-braid-kv-bytes"]) > 0
    choices = [choice["token_ids"] for choice in reply.json()["choices"]]
    assert len(choices) == 4
    return sum(diverges(tokens, plain) for tokens in choices)


def prefixes_are_cached(client: httpx.Client, prompt: list[int]) -> None:
    """Asked again, a prompt moves fewer blocks than one of its length that is new; both ends had hits."""
    again = ask(client, prompt, 1)
    assert again.headers["x-braid-path"] == "remote"
    assert moved(again) < moved(ask(client, prompt[::-1], 1))
    assert all(hits(client, worker["http"]) > 0 for worker in workers(client).values())


def cancelled(client: httpx.Client, asked: list[list[int]], after_s: float) -> None:
    """Ask and hang up after a while."""

    def hang_up(prompt: list[int]) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            client.post("/v1/completions", json=body_of(prompt, 2), timeout=after_s)

    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(hang_up, asked))


def prefill_lost(
    cluster: ShapeCluster, client: httpx.Client, asked: list[list[int]], reference: list[Any]
) -> list[bool]:
    """The only prefill worker is killed under requests: they get the same tokens."""
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = [pool.submit(ask, client, prompt, 1) for prompt in asked]
        until_busy(client)
        os.killpg(cluster.pids["prefill-0"], signal.SIGKILL)
        texts = [reply.result().json()["choices"][0]["token_ids"] for reply in replies]
    return [diverges(tokens, plain) for tokens, plain in zip(texts, reference, strict=True)]


def until_busy(client: httpx.Client) -> None:
    """Wait until a worker holds something."""
    until = time.monotonic() + 10
    while idle(client) and time.monotonic() < until:
        time.sleep(0.005)


def ask(client: httpx.Client, prompt: list[int], n: int) -> httpx.Response:
    """Samples of the likeliest tokens; vLLM takes no temperature of 0 with several."""
    reply = client.post("/v1/completions", json=body_of(prompt, n))
    assert reply.status_code == 200, reply.text
    return reply


def body_of(prompt: list[int], n: int) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "n": n, "top_k": 1, "max_tokens": MAX_TOKENS}
    return {**body, "ignore_eos": True, "return_token_ids": True}


def moved(reply: httpx.Response) -> int:
    return int(reply.headers["x-braid-kv-bytes"])


def hits(client: httpx.Client, http: str) -> float:
    """Tokens that a worker's prefix cache gave."""
    lines = client.get(http + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


def diverges(tokens: list[int], plain: Any) -> bool:
    if tokens == plain["tokens"]:
        return False
    pairs = zip(tokens, plain["tokens"], strict=True)
    first = next(i for i, (a, b) in enumerate(pairs) if a != b)
    assert plain["gaps"][first] < TIE, f"token {first} of {tokens} is not that of {plain['tokens']}"
    return True


def settle(client: httpx.Client) -> None:
    """Nothing is left: no request, import, lease or block."""
    until = time.monotonic() + 30
    while not idle(client):
        assert time.monotonic() < until, "something is still held"
        time.sleep(0.1)
