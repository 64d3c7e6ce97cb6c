"""How fast do blocks get from one paged cache into another on the same host?

    python -m benchmarks.kvtransfer --peer-python PEER_VENV/bin/python

`kvtransfer` over ZMQ and over shared memory, in two processes as in two engines, against the ceiling of each
(a bare ZMQ stream, a memory copy) and against NIXL over UCX with TCP and with shared memory. All are warm,
take turns in every repeat and touch memory that is in nobody's cache; see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import awake
from benchmarks.handover import interpreter, progress
from benchmarks.kept import RESULTS, folder
from benchmarks.kv_contenders import NAMES, UCX_ENV, Contender, Site, contenders
from benchmarks.kv_layout import Layout
from benchmarks.kv_link import ROOT
from benchmarks.kv_report import TransferRecord, best_modes, figures, quiet, transfer_table
from benchmarks.machine import LoadMeter, describe_machine, package_versions
from benchmarks.measure import describe
from benchmarks.process import GuardedProcess, Launch, replace_all
from braid.settings import PrefillSettings

CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
"""What TCP connections of this machine are paced by, loopback's too."""
SLACK = 1.5
"""Blocks of a pool for every block that the largest transfer moves."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    what.add_argument("--sizes", nargs="+", type=size, default=[2 << 20, 32 << 20, 512 << 20], help="as 2M")
    what.add_argument("--layers", type=int, default=32)
    what.add_argument("--heads", type=int, default=8, help="KV heads")
    what.add_argument(
        "--row-bytes", type=int, default=8192, help="one head of a block: 16 tokens x K and V x 128 x bf16"
    )
    what.add_argument(
        "--piece-bytes",
        type=size,
        default=PrefillSettings.model_fields["kv_piece_bytes"].default,
        help="kv_piece_bytes of the producer, and a frame of the bare stream (default: the setting's)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=int, default=11, help="turns of every contender")
    how.add_argument("--transfers", type=int, default=15, help="of each size in a turn, at most")
    how.add_argument("--turn-bytes", type=size, default=1 << 30, help="of each size in a turn, at most")
    how.add_argument("--peer-python", default=sys.executable, help="interpreter with nixl")
    how.add_argument("--nixl-threads", type=int, default=0, help="UCX worker threads of a NIXL agent")
    how.add_argument("--quiet-cores", type=float, default=0.25, help="a turn waits until others use no more")
    how.add_argument("--patience-s", type=float, default=300.0, help="such waiting in the whole run, at most")
    how.add_argument("--awake", action="store_true", help="no core halts meanwhile (benchmarks/awake.py)")
    how.add_argument("--seed", type=int, default=0, help="of the block ids")
    how.add_argument("--out", type=folder, default=RESULTS, help="folder of the result")
    given = list(sys.argv[1:] if argv is None else argv)
    return parser.parse_args(given, argparse.Namespace(command=given))


def size(text: str) -> int:
    """Bytes from a number with an optional K or M (binary)."""
    found = re.fullmatch(r"(\d+)([KM]?)", text)
    if found is None or int(found[1]) < 1:
        raise argparse.ArgumentTypeError("a size is a number, or one with K or M")
    return int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]]


def layout_for(args: argparse.Namespace) -> Layout:
    """A pool in which the largest transfer is a random choice.

    Raises:
        ValueError: a size is no whole number of blocks.
    """
    layout = Layout(args.layers, args.heads, args.row_bytes, 1, args.piece_bytes)
    if uneven := [nbytes for nbytes in args.sizes if nbytes % layout.block_bytes]:
        raise ValueError(f"{uneven} bytes are no whole number of blocks of {layout.block_bytes}")
    blocks = 1 + int(SLACK * max(args.sizes) / layout.block_bytes) + 1
    return replace(layout, blocks=blocks)


class Run:
    """One run of the benchmark: collects records, and can always say what it has so far."""

    def __init__(self, args: argparse.Namespace, run_dir: Path) -> None:
        self.args = args
        self.layout = layout_for(args)
        self.site = Site(
            self.layout,
            run_dir,
            python=sys.executable,
            peer_python=interpreter(args.peer_python),
            staging_bytes=max(args.sizes) + (1 << 20),
            nixl_threads=args.nixl_threads,
            seed=args.seed,
        )
        self.contenders = contenders([name for name in NAMES if name in args.contenders], self.site)
        self.started = datetime.now(UTC)
        self.machine = describe_machine() | {"congestion_control": CONGESTION_CONTROL.read_text().strip()}
        self.records: list[TransferRecord] = []
        self.patience_s: float = args.patience_s
        self.keepers: list[GuardedProcess] = []
        self.ended_by = ""

    def measure(self) -> None:
        """Start, warm and verify everybody, then the repeats. What ends them early is kept and raised."""
        try:
            if self.args.awake:
                launch = Launch("awake", [sys.executable, "-S", awake.__file__])
                self.keepers.append(GuardedProcess(launch, self.site.run_dir))
            for contender in self.contenders:
                contender.start()
                with contender.turn():
                    for nbytes in self.args.sizes:
                        contender.verify(nbytes // self.layout.block_bytes)
                progress(f"{contender.name} is ready and moves what it should")
            for repeat in range(self.args.repeats):
                for position, contender in enumerate(self._order(repeat)):
                    self.records += self._turn(contender, repeat, position)
                progress(f"repeat {repeat + 1} of {self.args.repeats}")
        except BaseException as error:
            self.ended_by = describe(error)
            raise

    def stop(self) -> None:
        for contender in self.contenders:
            contender.stop()
        for keeper in self.keepers:
            keeper.stop()

    def _order(self, repeat: int) -> list[Contender]:
        """Each contender is first as often as any other."""
        first = repeat % len(self.contenders)
        return self.contenders[first:] + self.contenders[:first]

    def _turn(self, contender: Contender, repeat: int, position: int) -> list[TransferRecord]:
        """Every size in every mode, after one uncounted transfer of each."""
        self._wait_for_quiet()
        records = []
        with contender.turn():
            meter = LoadMeter(self._cpu_seconds)
            for nbytes in self.args.sizes:
                count = nbytes // self.layout.block_bytes
                for mode in contender.modes:
                    contender.transfer(count, mode)
                    for _ in range(max(1, min(self.args.transfers, self.args.turn_bytes // nbytes))):
                        detail = contender.transfer(count, mode)
                        seconds = detail.pop("seconds")
                        records.append(
                            TransferRecord(contender.name, mode, nbytes, repeat, position, seconds, detail)
                        )
            load = meter.read()
        for record in records:
            record.turn = load
        return records

    def _cpu_seconds(self) -> float:
        workers = {id(worker): worker for contender in self.contenders for worker in contender.workers}
        processes = (*(worker.process for worker in workers.values()), *self.keepers)
        return sum(process.cpu_seconds() for process in processes)

    def _wait_for_quiet(self) -> None:
        while self.patience_s > 0:
            meter = LoadMeter(self._cpu_seconds)
            time.sleep(0.3)
            load = meter.read()
            if load.others <= self.args.quiet_cores:
                return
            self.patience_s -= load.wall_s

    def result(self) -> dict[str, Any]:
        """Everything the JSON file holds: how it was measured, the figures, every single transfer."""
        calm = quiet(self.records, self.args.quiet_cores)
        workers = {w.launch.name: w.launch for c in self.contenders for w in c.workers}
        names = self._names()
        return {
            "benchmark": "kvtransfer",
            "started": self.started.isoformat(timespec="seconds"),
            "ended_by": self.ended_by,
            "command": ["python", "-m", "benchmarks.kvtransfer", *self.args.command],
            "arguments": {
                key: str(value) for key, value in vars(self.args).items() if key not in ("out", "command")
            },
            "layout": self.layout.public() | {"block_bytes": self.layout.block_bytes},
            "machine": self.machine,
            "versions": self._versions(),
            "launches": [launch.public(names) for launch in workers.values()],
            "nixl_waits": [[*key, mode] for key, mode in best_modes(self.records).items()],
            "figures": figures(self.records),
            "quiet_repeats": sorted({record.repeat for record in calm}),
            "figures_quiet_repeats": figures(calm),
            "records": self.records,
        }

    def _versions(self) -> dict[str, dict[str, str]]:
        found = {"braid": package_versions(self.site.python)}
        if any(contender.name in UCX_ENV for contender in self.contenders):
            found["nixl"] = package_versions(self.site.peer_python)
        return found

    def _names(self) -> dict[str, str]:
        """What stands in the result for this machine's paths."""
        folders = {f"{Path(p).parent}/": "" for p in (self.site.python, self.site.peer_python)}
        out = {str(self.args.out): "OUT"} if self.args.out.is_absolute() else {}
        return {
            **folders,
            **out,
            str(Path(self.args.peer_python).parent): "PEER",
            str(self.site.run_dir): "RUN_DIR",
            str(ROOT): "BRAID",
        }

    def save(self) -> Path:
        """Write the result with every path of this machine replaced."""
        text = msgspec.json.encode(self.result()).decode()
        text = msgspec.json.format(replace_all(text, self._names()), indent=1)
        path: Path = self.args.out / f"kvtransfer-{self.started:%Y%m%d-%H%M%S}.json"
        path.write_text(text + "\n")
        return path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save, show; SIGTERM and Ctrl-C save and show what there is. Nothing outlives it."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with ExitStack() as stack:
        run_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True))
        run = Run(args, Path(run_dir))
        stack.callback(run.stop)
        try:
            run.measure()
        finally:
            if run.records:
                result = run.result()
                print(f"result: {run.save()}; {os.cpu_count()} cores")
                print(transfer_table(result["figures"]))
                print(f"\nquiet repeats: {result['quiet_repeats']}")
                print(transfer_table(result["figures_quiet_repeats"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
