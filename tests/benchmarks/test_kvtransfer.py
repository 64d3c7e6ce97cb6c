"""The transfer benchmark: real workers with small blocks, and figures from known times."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import kvtransfer
from benchmarks.kv_contenders import Contender, Ours, Site, contenders
from benchmarks.kv_layout import Layout
from benchmarks.kv_link import Worker, WorkerError
from benchmarks.kv_report import TransferRecord, figures, quiet, size_name, transfer_table
from benchmarks.machine import Load

pytestmark = pytest.mark.slow

SMALL = ["--layers", "3", "--heads", "2", "--row-bytes", "512", "--piece-bytes", "6K"]
LAYOUT = Layout(layers=3, heads=2, row_bytes=512, blocks=20, piece_bytes=6 << 10)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(LAYOUT, tmp_path, sys.executable, sys.executable, staging_bytes=1 << 20)


@pytest.fixture
def started(site: Site) -> Iterator[list[Contender]]:
    found = contenders(["zmq", "zmq-2-lanes", "shm", "shm-sampled"], site)
    yield found
    for contender in found:
        contender.stop()


def test_a_run_measures_everybody_in_turn_and_saves_every_time(tmp_path: Path) -> None:
    ours, sizes = ["zmq", "shm"], ["3K", "24K"]
    arguments = ["--contenders", "memcpy", "stream", *ours, "--sizes", *sizes, *SMALL]
    assert (
        kvtransfer.main(
            [*arguments, "--repeats", "2", "--transfers", "2", "--patience-s", "0", "--out", str(tmp_path)]
        )
        == 0
    )
    (path,) = tmp_path.glob("kvtransfer-*.json")
    result = json.loads(path.read_text())
    assert result["ended_by"] == ""
    assert len(result["records"]) == 2 * 2 * len(sizes) * (2 + 2 * len(ours))
    assert all(record["seconds"] > 0 and record["turn"]["wall_s"] > 0 for record in result["records"])
    first = [record["contender"] for record in result["records"] if record["position"] == 0]
    assert set(first) == {"memcpy", "stream"}  # the turns go round
    assert result["machine"]["cores"] >= 1
    assert "pyzmq" in result["versions"]["braid"]
    assert "--out" in result["command"]
    for folder in (Path(sys.executable).parent, tmp_path):
        assert str(folder) not in path.read_text()


def test_contenders_move_the_blocks_they_are_told(started: list[Contender]) -> None:
    for contender in started:
        contender.start()
        for count in (1, 5, 19):
            contender.verify(count)


def test_a_block_that_was_not_moved_is_noticed(started: list[Contender]) -> None:
    contender = started[0]
    contender.start()
    assert isinstance(contender, Ours)
    contender._move = lambda source, target, mode: {"seconds": 1.0}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="not those that were sent"):
        contender.verify(3)


def test_a_workers_error_is_the_callers(site: Site) -> None:
    worker = Worker(
        "copier", "copier", {"layout": LAYOUT.public()}, python=sys.executable, run_dir=site.run_dir
    )
    try:
        with pytest.raises(WorkerError, match="TypeError"):
            worker.ask("copy", nonsense=1)
        assert worker.ask("copy", source=0, target=1, count=3)["seconds"] > 0
    finally:
        worker.stop()


def test_a_worker_that_cannot_start_says_why(site: Site) -> None:
    with pytest.raises(WorkerError, match="unexpected keyword"):
        site.start("copier", "copier", {"nonsense": 1})


def record(contender: str, mode: str, repeat: int, ms: float, others: float = 0.0) -> TransferRecord:
    load = Load(1.0, 1.0, others, 0.0)
    return TransferRecord(contender, mode, 1_000_000, repeat, 0, ms / 1e3, turn=load)


def test_ratios_pair_contenders_within_a_repeat() -> None:
    records = [
        *(record("memcpy", "wire", repeat, ms) for repeat, ms in enumerate((1.0, 2.0, 4.0))),
        *(record("shm", "wire", repeat, ms) for repeat, ms in enumerate((2.0, 4.0, 8.0))),
        *(record("nixl-tcp", "polled", repeat, 40.0) for repeat in range(3)),
        *(record("nixl-tcp", "paused", repeat, 12.0) for repeat in range(3)),
    ]
    rows = {(row["contender"], row["mode"]): row for row in figures(records)}
    assert set(rows) == {("memcpy", "wire"), ("shm", "wire"), ("nixl-tcp", "paused")}
    shm = rows["shm", "wire"]
    assert (shm["ratio"]["ceiling"]["min"], shm["ratio"]["ceiling"]["max"]) == (0.5, 0.5)
    assert shm["ratio"]["nixl_tcp"]["p50"] == pytest.approx(3.0)
    assert shm["gb_per_s"] == pytest.approx(0.25)
    assert "0.50" in transfer_table(list(rows.values()))


def test_a_repeat_with_a_loud_turn_is_not_quiet() -> None:
    records = [
        record("memcpy", "wire", 0, 1.0),
        record("shm", "wire", 0, 1.0, others=0.9),
        record("memcpy", "wire", 1, 1.0),
        record("shm", "wire", 1, 1.0, others=0.1),
    ]
    assert {r.repeat for r in quiet(records, 0.25)} == {1}


@pytest.mark.parametrize(("text", "nbytes"), [("2M", 2 << 20), ("64K", 64 << 10), ("1000", 1000)])
def test_sizes_are_read_as_they_are_shown(text: str, nbytes: int) -> None:
    assert kvtransfer.size(text) == nbytes
    assert size_name(nbytes) == text


@pytest.mark.parametrize("text", ["", "M", "0", "2G", "-1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        kvtransfer.size(text)


def test_a_size_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="whole number of blocks"):
        kvtransfer.layout_for(kvtransfer.parse([*SMALL, "--sizes", "4K"]))
