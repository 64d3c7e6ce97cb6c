from __future__ import annotations

import logging
from pathlib import Path

import pytest

from braid.errors import BadRequest
from router import strategies
from tests.router.strategies.packages import installed

GOOD = """
from router.strategies import StrategySpec
from router.strategies.direct import DirectOptions, run

class Late(DirectOptions):
    must: int

def plain(sampler, body, options, progress): ...

GOOD = StrategySpec("echo", DirectOptions, run, "As direct.")
AGAIN = StrategySpec("echo", DirectOptions, run)
SHADOW = StrategySpec("cot", DirectOptions, run)
BAD_NAME = StrategySpec("Not A Name", DirectOptions, run)
NO_MODEL = StrategySpec("no_model", dict, run)
NOT_ASYNC = StrategySpec("not_async", DirectOptions, plain)
NO_DEFAULT = StrategySpec("no_default", Late, run)
NO_SPEC = run
"""
POINTS = {
    "a": "offered:GOOD",
    "b": "offered:AGAIN",
    "c": "offered:SHADOW",
    "d": "offered:BAD_NAME",
    "e": "offered:NO_MODEL",
    "f": "offered:NOT_ASYNC",
    "g": "offered:NO_DEFAULT",
    "h": "offered:NO_SPEC",
    "i": "offered:ABSENT",
    "j": "raises:ANY",
    "k": "no_such_module:ANY",
}


def test_what_works_is_added_and_what_is_broken_is_logged_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = strategies.names()
    modules = {"offered": GOOD, "raises": "raise RuntimeError('on import')"}
    with caplog.at_level(logging.INFO), installed(tmp_path, monkeypatch, modules, POINTS):
        strategies.load_plugins()
        assert strategies.names() == (*before, "echo")
        assert strategies.get("echo").summary == "As direct."
        assert strategies.get("cot").options.__name__ == "CotOptions", "a built-in is not shadowed"
        assert strategies.describe()[-1]["id"] == "echo"
        strategies.load_plugins()
        assert strategies.names() == (*before, "echo"), "loading again changes nothing"
    skipped = [r.__dict__["entry_point"] for r in caplog.records if r.message == "strategy skipped"]
    assert skipped[: len(POINTS) - 1] == sorted(set(POINTS.values()) - {"offered:GOOD"}, key=_by_point)
    assert strategies.names() == before
    with pytest.raises(BadRequest):
        strategies.get("echo")


def _by_point(value: str) -> str:
    return next(name for name, point in POINTS.items() if point == value)
