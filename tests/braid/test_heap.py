"""What a serving process has made before is not collected again; what it has freed it does not keep."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
import time
from braid.heap import anonymous_bytes, keep_heap_trimmed
large, kept = [], []
for _ in range(2000):
    large.append(bytes(64 * 1024))
    kept.append(bytes(1024))
full = anonymous_bytes()
del large
freed = anonymous_bytes()
keep_heap_trimmed(0.05)
until = time.monotonic() + 30
while anonymous_bytes() > freed / 2 and time.monotonic() < until:
    time.sleep(0.05)
print(full, freed, anonymous_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators need no trim")
def test_what_was_freed_between_what_stays_goes_back_to_the_kernel() -> None:
    """Workers grew by tens of MiB an hour of memory that they had freed."""
    out = subprocess.run([sys.executable, "-c", FRAGMENT], check=True, capture_output=True, text=True).stdout
    full, freed, trimmed = map(int, out.split())
    assert freed > 0.9 * full, "glibc gives it back by itself: the trimmer has no purpose"
    assert trimmed < full / 2
