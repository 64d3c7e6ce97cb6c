"""A client of `/v1/completions` that times what a user would see."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import msgspec

from braid.lines import lines

TIMEOUT_S = 120.0


class Choice(msgspec.Struct):
    """One sample's part of a chunk."""

    text: str = ""


class Chunk(msgspec.Struct):
    """The part of one streamed completion chunk that is timed; a chunk of usage alone has no choices."""

    choices: list[Choice] = []


class Measurement(msgspec.Struct):
    """One request as its client saw it; times are seconds from before the request was written.

    `first_text_s` is the time to first token. A reply without any text counts its first chunk.
    """

    first_chunk_s: float
    first_text_s: float
    total_s: float
    text: str
    chunks: int
    headers: dict[str, str]


def open_client(base_url: str) -> httpx.Client:
    """A client without proxies or compression, so that chunks arrive as they were sent."""
    return httpx.Client(
        base_url=base_url, timeout=TIMEOUT_S, trust_env=False, headers={"accept-encoding": "identity"}
    )


def stream_completion(client: httpx.Client, body: dict[str, Any]) -> Measurement:
    """Send one streaming completion and time its chunks.

    Raises httpx.HTTPStatusError for an error status and ValueError for a stream without choices.
    """
    start = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.is_error:
            response.read()
            response.raise_for_status()
        stamped = [(time.perf_counter() - start, chunk) for chunk in _chunks(lines(response.iter_bytes()))]
        end = time.perf_counter() - start
        headers = proof_headers(response.headers)
    with_choice = [(at, chunk.choices[0]) for at, chunk in stamped if chunk.choices]
    if not with_choice:
        raise ValueError("the stream ended without a choice")
    first_chunk = with_choice[0][0]
    first_text = next((at for at, choice in with_choice if choice.text), first_chunk)
    text = "".join(choice.text for _, choice in with_choice)
    return Measurement(first_chunk, first_text, end, text, len(with_choice), headers)


def whole_completion(
    client: httpx.Client, body: dict[str, Any]
) -> tuple[float, dict[str, Any], dict[str, str]]:
    """Seconds to the complete reply of one plain completion, its JSON body, and its proof headers."""
    start = time.perf_counter()
    response = client.post("/v1/completions", json=body)
    wall = time.perf_counter() - start
    response.raise_for_status()
    return wall, msgspec.json.decode(response.content, type=dict[str, Any]), proof_headers(response.headers)


def proof_headers(headers: httpx.Headers) -> dict[str, str]:
    """The `x-braid-*` headers of a reply; other stacks have none."""
    return {name: value for name, value in headers.items() if name.startswith("x-braid-")}


def _chunks(lines: Iterable[str]) -> Iterator[Chunk]:
    for line in lines:
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield msgspec.json.decode(data, type=Chunk)
