"""What moving KV blocks off and onto a GPU costs, against the copies that no way of doing it can beat.

    python -m benchmarks.kvtransfer_gpu

For one model's shape: gathering and scattering scattered blocks of all layers between the cache and a bounce
buffer, against one device-to-device copy of as many bytes (target: 0.7 of its speed); and staging, from the
cache to pinned host memory, against one pinned copy of as many bytes (target: 0.8). The four take turns; each
ratio is of the two times of one turn. Exits with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bench import positive, save
from benchmarks.machine import describe_machine, package_versions
from benchmarks.stats import summary

RESULT = Path("benchmarks/results/kvtransfer-gpu.json")
TARGETS = {"gather": 0.7, "scatter": 0.7, "staging": 0.8}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("layers", 32), ("heads", 8), ("blocks", 4096), ("count", 256), ("repeats", 30)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument(
        "--row-bytes", type=positive, default=8192, help="a head's keys and values of a block"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    try:
        import torch
    except ModuleNotFoundError:
        print("no engine is installed here: nothing to measure", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure", file=sys.stderr)
        return 2
    result = measure(args)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    result |= {
        "command": "python -m benchmarks.kvtransfer_gpu "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items()),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "versions": package_versions(sys.executable),
    }
    save(result, args.out)
    for name, target in TARGETS.items():
        ratio = result["ratios"][name]
        verdict = "met" if ratio["p50"] >= target else "missed"
        spread = f"p25 {ratio['p25']:.2f}, p75 {ratio['p75']:.2f}"
        print(f"{name:8} {ratio['p50']:.2f} ({spread}); {target} {verdict}")
    print(f"written to {args.out}")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every copy, bytes a copy moves, and the ratios of speed."""
    import torch

    from kvtransfer.cache import Group
    from kvtransfer.gpu import DeviceCache
    from kvtransfer.kernels import PagedRows, boxes

    shape = (args.blocks, args.heads, args.row_bytes)
    layers = [torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in range(args.layers)]
    group = Group(layers, args.heads)
    rows, cache = PagedRows(group), DeviceCache([group])
    nbytes = args.count * rows.shape.block_bytes
    block_ids = random.Random(1).sample(range(args.blocks), args.count)
    ids = torch.tensor(block_ids, device="cuda")
    (whole,) = boxes(args.layers, args.count, args.heads, args.layers * args.count * args.heads)
    bounce = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(bounce)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    staged = host.view(args.layers, args.count, args.heads, args.row_bytes)

    def stage() -> None:
        fence = cache.gather(0, block_ids, staged)
        assert fence is not None
        fence.wait()

    work: dict[str, Callable[[], object]] = {
        "gather": lambda: rows.gather(whole, ids, bounce),
        "device_copy": lambda: other.copy_(bounce),
        "scatter": lambda: rows.scatter(whole, ids, bounce),
        "staging": stage,
        "pinned_copy": lambda: host.copy_(bounce, non_blocking=True),
    }
    seconds = take_turns(work, args.repeats)
    base = {"gather": "device_copy", "scatter": "device_copy", "staging": "pinned_copy"}
    return {
        "bytes": nbytes,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": {
            name: summary([b / a for a, b in zip(seconds[name], seconds[against], strict=True)])
            for name, against in base.items()
        },
        "targets": TARGETS,
    }


def take_turns(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each piece of work on the host's clock, the device idle before and after; two warm-up turns.

    Launching is part of it, as it is of use.
    """
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(-2, repeats):
        for name, call in work.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
