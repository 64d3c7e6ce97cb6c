"""What a serving process has made before is not collected again; what it has freed it does not keep."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from braid.heap import allocated

CODE = """
import gc
from braid.heap import freeze_heap
kept = [[] for _ in range(100_000)]
before = len(gc.get_objects())
freeze_heap()
print(before, len(gc.get_objects()))
"""


def test_a_collection_looks_at_new_objects_only() -> None:
    out = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    before, after = map(int, out.split())
    assert before > 100_000
    assert after < 1000


FRAGMENT = """
import logging
import time
from braid.heap import anonymous_bytes, keep_heap_trimmed
records = []
heap = logging.getLogger("braid.heap")
heap.setLevel("INFO")
heap.addFilter(records.append)
large, kept = [], []
for _ in range(2000):
    large.append(bytes(64 * 1024))
    kept.append(bytes(1024))
full = anonymous_bytes()
del large
freed = anonymous_bytes()
keep_heap_trimmed(0.05)
until = time.monotonic() + 30
while len(records) < 2 and time.monotonic() < until:
    time.sleep(0.05)
print(full, freed, anonymous_bytes())
print(records[1].getMessage(), records[1].trimmed_mib, records[1].anonymous_mib)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators need no trim")
def test_what_was_freed_between_what_stays_goes_back_to_the_kernel() -> None:
    """Workers grew by tens of MiB an hour of memory that they had freed."""
    out = subprocess.run([sys.executable, "-c", FRAGMENT], check=True, capture_output=True, text=True).stdout
    sizes, told = out.splitlines()
    full, freed, trimmed = map(int, sizes.split())
    assert freed > 0.9 * full, "glibc gives it back by itself: the trimmer has no purpose"
    assert trimmed < full / 2
    event, given_back, kept = told.split()
    assert event == "heap"
    assert float(given_back) * 2**20 == pytest.approx(freed - trimmed, rel=0.2)
    assert float(kept) * 2**20 == pytest.approx(trimmed, rel=0.2)


IN_USE = """
from braid.heap import allocated
def told():
    found = allocated()
    return found.in_use, found.free
print(*told())
large, kept = [], []
for _ in range(1000):
    large.append(bytes(64 * 1024))
    kept.append(bytes(1024))
mapped = bytes(64 * 1024 * 1024)
print(*told())
del large, mapped
print(*told())
"""


@pytest.mark.skipif(allocated() is None, reason="the C library does not tell")
def test_what_is_in_use_is_told_apart_from_holes() -> None:
    out = subprocess.run([sys.executable, "-c", IN_USE], check=True, capture_output=True, text=True).stdout
    (before, _), (full, _), (after, holes) = (map(int, line.split()) for line in out.splitlines())
    taken = 1000 * 64 * 1024
    assert full - before == pytest.approx(taken + 64 * 2**20, rel=0.05)
    assert full - after == pytest.approx(taken + 64 * 2**20, rel=0.05)
    assert holes == pytest.approx(taken, rel=0.1)
