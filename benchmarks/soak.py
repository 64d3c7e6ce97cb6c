"""Random groups, aborts, pauses and kills on a real cluster: does anything leak, hang or answer wrongly?

    python -m benchmarks.soak --minutes 60

Greedy prompts whose answers are known from a calm phase are asked all the time, half of them so that no
cache has anything of them; an answer that is not the known one, or not a prefix of it where the stream was
cut, is a wrong token. Other clients ask for groups and leave when they like. Workers are killed or stopped
in turn and come back; in the last `--calm-minutes` none is, so that the memory of each process can be
followed. These begin with a rush of large groups: buffers and kernels that an engine makes for its largest
step stay, and without it some are made an hour later, when chance first brings such a step. At the end
nothing may be held.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.guard import descendants
from benchmarks.kept import RESULTS, folder, keep, show
from benchmarks.machine import describe_machine, package_versions
from braid.lines import alines
from deploy.local import Cluster, UpSettings

REFERENCES = 40
LENGTHS = (8, 40, 400, 1500, 3000)
TOKENS = 32
SAMPLE_S = 5.0
WINDOW_S = 60.0
"""Heaps are trimmed six times in this time (`braid/heap.py`)."""
RUSH_S = 240.0
RUSH_CLIENTS = 12
WARM_S = 900.0
"""What an engine on CPUs takes to have met most sizes of steps."""
LEAST_S = 300.0
PAUSE_S = 5.0
BACK_S = 240.0
REST_S = 60.0
PATIENCE = (0.01, 0.1, 0.5, 60.0)
HELD = ("running", "waiting", "requests", "imports", "jobs", "dispatches", "loads", "staging_bytes", "leases")


class Rss(msgspec.Struct):
    """Resident memory of one process of a worker: the least of the WINDOW_S that end `at` seconds into
    the run, which leaves out what a step takes for a moment and holes in its heap between two trims.

    Attributes:
        mib: all of it; the kernel takes pages of files back and reads them again when it likes.
        own: without those, so anonymous and shared memory.
    """

    at: float
    worker: str
    pid: int
    name: str
    mib: float
    own: float


class Heap(msgspec.Struct):
    """What a process said of its heap after it gave back what was free (`braid/heap.py`), in MiB.

    Attributes:
        at: seconds into the run.
        process: `decode-0` is the worker's server, `decode-0/worker` the process of vLLM that computes.
        anonymous: resident memory that is neither of files nor shared.
        in_use: what its allocator has handed out; None if its C library doesn't tell.
    """

    at: float
    process: str
    anonymous: float
    in_use: float | None


class Soak:
    """One run against a started cluster."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.rng = random.Random(seed)
        self.client = httpx.AsyncClient(base_url=cluster.url, timeout=120, trust_env=False)
        self.outcomes: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.wrong: list[dict[str, str]] = []
        self.rss: list[Rss] = []
        self.known: list[tuple[dict[str, Any], str]] = []
        self.started = time.monotonic()
        self.started_at = time.time()
        self.last_fault = 0.0
        self.calm = asyncio.Event()
        self.calm.set()

    async def learn(self) -> None:
        """Ask every reference prompt while nothing disturbs."""
        for _ in range(REFERENCES):
            prompt = [self.rng.randrange(5, 400) for _ in range(self.rng.choice(LENGTHS))]
            body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
            body |= {"ignore_eos": True, "stream": True}
            text, done = await self.stream(body)
            if not done:
                raise RuntimeError("a reference prompt was not answered in the calm phase")
            self.known.append((body, text))

    async def stream(self, body: dict[str, Any]) -> tuple[str, bool]:
        """The streamed text of the first sample, and whether it was complete."""
        text, done = "", False
        async with self.client.stream("POST", "/v1/completions", json=body) as reply:
            self.paths[reply.headers.get("x-braid-path", f"status {reply.status_code}")] += 1
            self.paths["with KV moved"] += int(reply.headers.get("x-braid-kv-bytes", 0)) > 0
            async for line in alines(reply.aiter_bytes()):
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: {"):
                    choices = msgspec.json.decode(line[6:]).get("choices", [])
                    text += "".join(c["text"] for c in choices if c["index"] == 0)
        return text, done

    async def ask_known(self) -> None:
        body, expected = self.rng.choice(self.known)
        if self.rng.random() < 0.5:  # its KV is in no cache: it is computed and moved again
            body = body | {"cache_salt": f"{self.rng.random()}"}
        text, done = await self.stream(body)
        right = text == expected if done else expected.startswith(text)
        self.outcomes["complete" if done else "cut" if text else "refused"] += 1
        if not right:
            self.wrong.append({"expected": expected, "got": text})

    async def ask_group(
        self,
        widths: Sequence[int] = (1, 4, 16),
        patience: Sequence[float] = PATIENCE,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        """A group whose client may leave at any moment."""
        n = self.rng.choice(widths)
        prompt = [self.rng.randrange(5, 400) for _ in range(self.rng.choice(lengths))]
        body = {
            "model": "demo",
            "prompt": prompt,
            "n": n,
            "temperature": 1.0,
            "max_tokens": 64,
            "stream": True,
        }
        request = asyncio.create_task(self.stream(body))
        ended, _ = await asyncio.wait([request], timeout=self.rng.choice(patience))
        if not ended:
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            self.outcomes["left"] += 1
        else:
            self.outcomes["group complete" if request.result()[1] else "group cut"] += 1

    async def ask(self, until: float) -> None:
        """One client; away during the rush, as samples of groups take few seats beside single requests."""
        while time.monotonic() < until:
            await self.calm.wait()
            await self.tried(self.rng.choice([self.ask_known, self.ask_group]))
            await asyncio.sleep(self.rng.random() * 0.3)

    async def rush(self, begin: float) -> None:
        """Clients who ask for large groups and stay, once no more faults come, half for the longest."""
        await asyncio.sleep(begin - time.monotonic())
        self.calm.clear()

        async def ask(lengths: Sequence[int]) -> None:
            while time.monotonic() < begin + RUSH_S:
                await self.tried(lambda: self.ask_group((16, 64), PATIENCE[-1:], lengths))

        await asyncio.gather(*(ask(LENGTHS if i % 2 else LENGTHS[-1:]) for i in range(RUSH_CLIENTS)))
        self.calm.set()

    async def tried(self, act: Callable[[], Awaitable[None]]) -> None:
        """Ask; what HTTP did not bring is counted."""
        try:
            await act()
        except httpx.HTTPError as error:
            self.outcomes[type(error).__name__] += 1

    async def disturb(self, until: float, every_s: float) -> None:
        workers = [name for name in self.cluster.pids if name != "router"]
        while time.monotonic() + every_s < until:
            await asyncio.sleep(every_s)
            name = self.rng.choice(workers)
            self.last_fault = time.monotonic() - self.started
            if self.rng.random() < 0.3:
                self.faults[f"stopped {name}"] += 1
                os.killpg(self.cluster.pids[name], signal.SIGSTOP)
                await asyncio.sleep(PAUSE_S)
                os.killpg(self.cluster.pids[name], signal.SIGCONT)
            else:
                self.faults[f"killed {name}"] += 1
                await self.restart(name)
            self.last_fault = time.monotonic() - self.started

    async def restart(self, name: str) -> None:
        """Kill a worker and start it again; returns when the router has it back."""

        async def gone() -> bool:
            return name not in await self.ready()

        async def back() -> bool:
            return name in await self.ready()

        os.killpg(self.cluster.pids[name], signal.SIGKILL)
        while name not in self.cluster.ended():
            await asyncio.sleep(0.1)
        await self.until(gone, BACK_S)  # the router may not have seen it yet
        self.cluster.respawn(name)
        await self.until(back, BACK_S)

    async def ready(self) -> set[str]:
        """Names of the workers that the router would use."""
        try:
            state = (await self.client.get("/cluster")).json()
        except httpx.HTTPError:
            return set()
        return {w["worker"] for w in state["workers"] if w["state"] == "ready"}

    async def watch(self, until: float) -> None:
        """Follow the memory of every process."""
        while time.monotonic() < until:
            least: dict[tuple[str, int, str], tuple[float, float]] = {}
            window = time.monotonic() + WINDOW_S
            while time.monotonic() < window:
                await asyncio.sleep(SAMPLE_S)
                for worker, root in dict(self.cluster.pids).items():
                    for pid in family(root):
                        if found := memory(pid):
                            name, mib, own = found
                            before = least.get((worker, pid, name), (mib, own))
                            least[worker, pid, name] = (min(before[0], mib), min(before[1], own))
            at = time.monotonic() - self.started
            self.rss += [Rss(round(at, 1), w, pid, name, *both) for (w, pid, name), both in least.items()]
            progress(
                f"{at / 60:.1f} min: {dict(self.outcomes)}, wrong {len(self.wrong)}, {dict(self.faults)}"
            )

    async def held(self) -> dict[str, dict[str, int]]:
        """What every worker still holds."""
        found: dict[str, dict[str, int]] = {}
        for worker in (await self.client.get("/cluster")).json()["workers"]:
            stats = (await self.client.get(worker["http"] + "/stats")).json()
            held = {key: stats[key] for key in HELD if stats.get(key)}
            if stats["free"] != stats["blocks"] - 1:
                held["blocks"] = stats["blocks"] - 1 - stats["free"]
            if held:
                found[worker["worker"]] = held
        return found

    async def until(self, holds: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while not await holds():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.2)
        return True

    async def run(self, minutes: float, calm_minutes: float, clients: int, every_s: float) -> dict[str, Any]:
        await self.learn()
        end = time.monotonic() + minutes * 60
        calm = end - calm_minutes * 60
        await asyncio.gather(
            *(self.ask(end) for _ in range(clients)),
            self.disturb(calm, every_s),
            self.rush(calm),
            self.watch(end),
        )

        async def nothing_held() -> bool:
            return not await self.held()

        await self.until(nothing_held, REST_S)
        heaps = self.heaps()
        return {
            "outcomes": dict(self.outcomes),
            "paths": dict(self.paths),
            "faults": dict(self.faults),
            "wrong": self.wrong,
            "held_at_the_end": await self.held(),
            "last_fault_s": round(self.last_fault, 1),
            "rss_slopes": slopes(self.rss, self.last_fault),
            "heap_slopes": heap_slopes(heaps, self.last_fault),
            "rss": self.rss,
            "heaps": heaps,
        }

    def heaps(self) -> list[Heap]:
        """What every process logged of its heap."""
        found = []
        for worker in self.cluster.pids:
            for line in (self.cluster.run_dir / f"{worker}.log").read_bytes().splitlines():
                if b'"event": "heap"' in line:
                    told = msgspec.json.decode(line)
                    at = round(told["ts"] - self.started_at, 1)
                    found.append(Heap(at, told["process"], told["anonymous_mib"], told.get("in_use_mib")))
        return found


def slopes(samples: Sequence[Rss], since: float) -> list[dict[str, Any]]:
    """MiB an hour of each process that lived at least LEAST_S after its first WARM_S and those after `since`,
    by least squares."""
    lives: dict[tuple[str, str, int], list[Rss]] = defaultdict(list)
    for sample in samples:
        lives[sample.worker, sample.name, sample.pid].append(sample)
    found = []
    for (worker, name, _), life in sorted(lives.items()):
        warm = [s for s in life if s.at >= max(life[0].at, since) + WARM_S]
        if len(warm) > 3 and warm[-1].at - warm[0].at >= LEAST_S:
            at = [s.at / 3600 for s in warm]
            found.append(
                {
                    "worker": worker,
                    "process": name,
                    "minutes": round((warm[-1].at - warm[0].at) / 60, 1),
                    "mib": round(statistics.mean(s.mib for s in warm), 1),
                    **_trend("mib", at, [s.mib for s in warm]),
                    **_trend("own", at, [s.own for s in warm]),
                    "highest_at_minute": round(max(warm, key=lambda s: s.mib).at / 60, 1),
                }
            )
    return found


def heap_slopes(heaps: Sequence[Heap], since: float) -> list[dict[str, Any]]:
    """As :func:`slopes`, of what processes said of their heaps."""
    begun = since + WARM_S
    lives: dict[str, list[Heap]] = defaultdict(list)
    for heap in heaps:
        if heap.at >= begun:
            lives[heap.process].append(heap)
    found = []
    for process, life in sorted(lives.items()):
        if len(life) > 3 and life[-1].at - life[0].at >= LEAST_S:
            row: dict[str, Any] = {"process": process, "minutes": round((life[-1].at - life[0].at) / 60, 1)}
            for key in ("anonymous", "in_use"):
                points = [(h.at / 3600, v) for h in life if (v := getattr(h, key)) is not None]
                if len(points) > 3:
                    at, values = zip(*points, strict=True)
                    row |= _trend(key, at, values)
            found.append(row)
    return found


def _trend(key: str, at: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """How something changes; ``at`` in hours."""
    slope = statistics.linear_regression(at, values).slope
    return {f"{key}_quarters": _quarters(values), f"{key}_an_hour": round(slope, 1)}


def _quarters(values: Sequence[float]) -> list[float]:
    """Means of four parts of equal length."""
    ends = [len(values) * part // 4 for part in range(5)]
    return [round(statistics.mean(values[a:b]), 1) for a, b in pairwise(ends)]


def family(root: int) -> list[int]:
    """A process and all below it."""
    return [root, *descendants(root)]


def memory(pid: int) -> tuple[str, float, float] | None:
    """Name, resident memory and that without files of one process in MiB; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    told = dict(line.split(":", 1) for line in lines)
    if "VmRSS" not in told:
        return None
    total, files = (int(told[key].split()[0]) for key in ("VmRSS", "RssFile"))
    return told["Name"].strip(), round(total / 1024, 2), round((total - files) / 1024, 2)


def progress(line: str) -> None:
    """Say on stderr how far it is."""
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, save, show; exit status 1 for a wrong token or an orphan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--calm-minutes", type=float, default=20.0, help="part of them without faults, at the end"
    )
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--fault-every-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=folder, default=RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    begun = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as run_dir:
        settings = UpSettings(prefill=1, decode=2, port=0, run_dir=Path(run_dir), start_timeout_s=600)
        with Cluster(settings, []) as cluster:
            soak = Soak(cluster.wait_ready(), args.seed)
            found = asyncio.run(soak.run(args.minutes, args.calm_minutes, args.clients, args.fault_every_s))
    result = {
        "benchmark": "soak",
        "started": begun.isoformat(timespec="seconds"),
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "machine": describe_machine(),
        "versions": package_versions(sys.executable),
        **found,
    }
    print(f"result: {keep(result, 'soak', args.out / f'soak-{begun:%Y%m%d-%H%M%S}.json')}")
    show(found, {"rss", "heaps"})
    return 1 if found["wrong"] or found["held_at_the_end"] else 0


if __name__ == "__main__":
    sys.exit(main())
