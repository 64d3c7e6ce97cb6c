"""What a serving process has made before is not collected again."""

from __future__ import annotations

import subprocess
import sys

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
