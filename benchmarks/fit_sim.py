"""Measures a running server and fits the simulated engine's step times to it.

    python -m benchmarks.fit_sim http://127.0.0.1:8000

It wants a quiet server of one prefill and some decode workers with nothing else to do (`braid up`), which
places a group on one of them (`--spread pack`, the default). Prompts of several lengths, one token each, tell
what a prefill takes; groups of several widths, each sample as long as asked, what a decode step takes. Steps
can't be seen from outside: an observation is the time of all steps of a request together, and the fixed cost
of a request (HTTP, rendering, dispatch, transfer) is fitted beside them. The result is a file for
`--sim-model-file`. It takes at most `--limit-s` seconds and uses what it has by then.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import msgspec

from benchmarks.client import open_client
from benchmarks.machine import describe_machine
from braid.lines import lines
from braid.sim.model import TERMS, Observation, fit

RESULT = Path(__file__).parent / "results" / "sim-model.json"
LENGTHS = (64, 256, 512, 1024, 2048, 4096)
WIDTHS = (1, 2, 4, 8, 16, 32)
CONTEXTS = (128, 1024)
DECODE_TOKENS = 32
"""Tokens of each sample: its steps but the first are measured."""
_FIRST_ID, _IDS = 5, 64
"""Prompts use token ids that every vocabulary has."""


class Measurement(msgspec.Struct):
    """What one kind of request took, and its steps as they must have been."""

    kind: str
    prompt_tokens: int
    samples: int
    seconds: list[float]
    observation: Observation | None = None


class Server:
    """Asks one model of a server."""

    def __init__(self, client: httpx.Client, model: str, seed: int = 0) -> None:
        self._client = client
        self._model = model
        self._random = random.Random(seed)
        self.simulated = model.startswith("sim")

    def prefill(self, tokens: int) -> float:
        """Seconds until one token has come of a prompt that no cache holds."""
        begun = time.perf_counter()
        reply = self._client.post("/v1/completions", json=self._body(tokens, 1, 1))
        reply.raise_for_status()
        taken = time.perf_counter() - begun
        self._look(reply.json())
        return taken

    def decode(self, context: int, width: int) -> float:
        """Seconds from the token that completes every sample's first to the last one of all.

        Raises:
            ValueError: the stream was cut.
        """
        body = self._body(context, width, DECODE_TOKENS) | {"stream": True}
        begun: set[int] = set()
        started = ended = 0.0
        with self._client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            for line in lines(reply.iter_bytes()):
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                chunk = msgspec.json.decode(line[6:])
                for choice in chunk.get("choices") or ():
                    if len(begun) < width:
                        begun.add(choice["index"])
                        started = now
                    ended = now
        if len(begun) < width or ended <= started:
            raise ValueError(f"{len(begun)} of {width} samples came")
        return ended - started

    def _body(self, tokens: int, n: int, most: int) -> dict[str, Any]:
        prompt = [_FIRST_ID + self._random.randrange(_IDS) for _ in range(tokens)]
        return {
            "model": self._model,
            "prompt": prompt,
            "n": n,
            "max_tokens": most,
            "min_tokens": most,
            "ignore_eos": True,
            "temperature": 1.0,
            "seed": self._random.randrange(2**31),
        }

    def _look(self, reply: dict[str, Any]) -> None:
        self.simulated |= str(reply.get("system_fingerprint") or "").startswith("sim")


def prefill_steps(tokens: int, chunk: int, seconds: float) -> Observation:
    """The chunks of a prompt on the prefill worker, and the decode worker's step of its last token."""
    ends = [*range(chunk, tokens, chunk), tokens]
    attended = tokens * (tokens + 1) / 2 + tokens
    return Observation(len(ends) + 1, len(ends) + 1, attended, tokens + 1, seconds, 1.0)


def decode_steps(context: int, width: int, seconds: float) -> Observation:
    """All steps of a group but the one that gave the first tokens."""
    steps = DECODE_TOKENS - 1
    contexts = sum(context + 1 + i for i in range(steps))
    return Observation(steps, steps * width, contexts * width, 0, seconds)


def measure(server: Server, chunk: int, repeats: int, until: float, longest: int) -> list[Measurement]:
    """Rounds over all kinds of request, until there are ``repeats`` of each or the time is over."""
    kinds: list[tuple[Measurement, Callable[[], float]]] = []
    for length in (n for n in LENGTHS if n < longest):
        kinds.append((Measurement("prefill", length, 1, []), lambda n=length: server.prefill(n)))  # type: ignore[misc]
    for context in (c for c in CONTEXTS if c + DECODE_TOKENS < longest):
        for width in WIDTHS:
            found = Measurement("decode", context, width, [])
            kinds.append((found, lambda c=context, w=width: server.decode(c, w)))  # type: ignore[misc]
    for turn in range(repeats + 1):
        for found, ask in kinds:
            if time.monotonic() > until:
                return _with_steps([kind for kind, _ in kinds], chunk)
            _try(found, ask, counted=turn > 0)
    return _with_steps([kind for kind, _ in kinds], chunk)


def _try(found: Measurement, ask: Callable[[], float], counted: bool) -> None:
    """One request; the first of each kind is not counted, and one that fails only costs its time."""
    try:
        seconds = ask()
    except (httpx.HTTPError, ValueError) as error:
        print(f"{found.kind} of {found.prompt_tokens} x {found.samples}: {error}", file=sys.stderr)
        return
    if counted:
        found.seconds.append(seconds)


def _with_steps(kinds: Sequence[Measurement], chunk: int) -> list[Measurement]:
    for kind in kinds:
        if not kind.seconds:
            continue
        typical = median(kind.seconds)
        kind.observation = (
            prefill_steps(kind.prompt_tokens, chunk, typical)
            if kind.kind == "prefill"
            else decode_steps(kind.prompt_tokens, kind.samples, typical)
        )
    return [kind for kind in kinds if kind.observation is not None]


def report(measured: Sequence[Measurement], model: str, simulated: bool, chunk: int) -> dict[str, Any]:
    """The fit and everything it rests on; raises ValueError without measurements."""
    observations = [kind.observation for kind in measured if kind.observation is not None]
    source = f"{'a simulated engine: ' if simulated else ''}{model}, chunks of {chunk} tokens"
    found = fit(observations, source)
    shares = [r / o.seconds for r, o in zip(found.residuals, observations, strict=True)]
    return {
        "benchmark": "fit_sim",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "simulated": simulated,
        "machine": describe_machine(),
        "terms": list(TERMS),
        "model": msgspec.to_builtins(found.model),
        "request_s": found.request_s,
        "rmse_s": found.rmse,
        "r2": found.r2,
        "worst_relative_residual": max(map(abs, shares)),
        "relative_residuals": [round(share, 4) for share in shares],
        "measurements": msgspec.to_builtins(list(measured)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_sim", description=__doc__.splitlines()[0])
    parser.add_argument("url", help="base URL of the server")
    parser.add_argument("--chunk", type=int, default=512, help="its --max-num-batched-tokens (default 512)")
    parser.add_argument("--repeats", type=int, default=5, help="requests of each kind (default 5)")
    parser.add_argument("--limit-s", type=float, default=120.0, help="longest time in all (default 120)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    parser.add_argument("--api-key", default="", help="key of the server")
    options = parser.parse_args(argv)
    until = time.monotonic() + options.limit_s * 0.9  # a request that has begun may take its time
    with open_client(options.url) as client:
        client.timeout = httpx.Timeout(max(1.0, options.limit_s / 8))
        if options.api_key:
            client.headers["authorization"] = f"Bearer {options.api_key}"
        model, longest = _model(client)
        server = Server(client, model)
        measured = measure(server, options.chunk, options.repeats, until, longest)
    try:
        result = report(measured, model, server.simulated, options.chunk)
    except ValueError as error:
        print(f"nothing could be fitted: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(_table(result))
    print(f"written to {options.out}")
    return 0


def _model(client: httpx.Client) -> tuple[str, int]:
    """The server's first model, and the longest sequence that each of its workers takes."""
    model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    state = client.get("/cluster").raise_for_status().json()
    return model, min(w["max_model_len"] for w in state["workers"] if model in w["models"])


def _table(result: dict[str, Any]) -> str:
    rows = [
        f"{name:<14} {value * 1e6:12.3f} us" for name, value in result["model"].items() if name != "source"
    ]
    rows.append(f"{'request':<14} {result['request_s'] * 1e6:12.3f} us")
    rows.append(f"r2 {result['r2']:.4f}, worst residual {result['worst_relative_residual']:.1%}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
