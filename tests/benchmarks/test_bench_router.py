"""`braid bench` and the accuracy benchmark against the real router, with workers that have no engine."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchmarks import accuracy, bench
from tests.router.conftest import MakeStand, make_stand  # noqa: F401
from tests.router.fake_worker import REMOTE


async def test_the_bench_reads_what_the_router_tells(make_stand: MakeStand) -> None:  # noqa: F811
    stand = await make_stand()
    await stand.workers()
    flags = ["--requests=4", "--concurrency=2", "--n=3", "--prompt-tokens=10", "--skip-plain"]
    result = await bench.measure(bench.parse([f"--url={stand.url}", *flags]), Console(quiet=True))
    assert result["model"] == "demo"
    for load in result["loads"].values():
        summary = load["summary"]
        assert summary["failed"] == {}
        assert summary["paths"] == {"remote": 4}
        assert summary["kv_bytes"] == summary["counters"]["braid_kv_bytes_total"] == 4 * REMOTE.nbytes
        assert summary["kv_transfers"] == summary["counters"]["braid_kv_transfers_total"] == 4
        assert summary["completion_tokens"] > 0
        assert summary["ttft_ms"]["count"] == 4


async def test_the_router_takes_every_method_of_the_accuracy_benchmark(
    make_stand: MakeStand,  # noqa: F811
    tmp_path: Path,
) -> None:
    stand = await make_stand()
    await stand.workers()
    args = accuracy.parse([f"--url={stand.url}", "--count=2", "--n=3", f"--out={tmp_path / 'a.json'}"])
    methods = (await accuracy.measure(args))["methods"]
    assert list(methods) == list(accuracy.METHODS)
    assert all(entry["failed"] == 0 for entry in methods.values())
    assert all(entry["completion_tokens"] > 0 for entry in methods.values())
