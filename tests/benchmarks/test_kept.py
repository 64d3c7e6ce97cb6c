"""Where a benchmark's result goes."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.kept import keep


def test_a_result_goes_to_the_file_that_was_named(tmp_path: Path) -> None:
    named = tmp_path / "new" / "a.json"
    assert keep({"x": 1}, "fairness", named) == named
    assert json.loads(named.read_text()) == {"x": 1}


def test_a_folder_gets_a_file_with_the_benchmarks_name(tmp_path: Path) -> None:
    kept = keep({"x": 1}, "fairness", tmp_path)
    assert kept.parent == tmp_path
    assert kept.name.startswith("fairness-")
    assert json.loads(kept.read_text()) == {"x": 1}
