"""Both ends of a transfer in one process, torn down with nothing left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.kvtransfer.ends import Pair

PURE = ("control", "loop", "plan", "lease", "lease_order", "wire", "arena")
"""Tests that need no torch."""

collect_ignore: list[str] = []
if find_spec("torch") is None:  # a core installation has no engine
    here = Path(__file__).parent
    tests = [*here.glob("test_*.py"), *(path.parent for path in here.glob("*/__init__.py"))]
    collect_ignore += [path.name for path in tests if path.stem.removeprefix("test_") not in PURE]


def pytest_configure(config: pytest.Config) -> None:
    # A received frame is read-only memory and is only ever read from; pytest resets the module's filter.
    config.addinivalue_line("filterwarnings", "ignore:The given buffer is not writable:UserWarning")
    config.addinivalue_line("markers", "stretched: pieces are as large as the transport likes them")
    config.addinivalue_line("markers", "callbacks_may_fail: a callback that raises on a loop is meant")


@pytest.fixture(autouse=True)
def pieces_as_told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parcels are as small over shared memory as elsewhere, so that a test can tell them apart."""
    if find_spec("torch") is not None and request.node.get_closest_marker("stretched") is None:
        monkeypatch.setattr("kvtransfer.transport.shm.ShmSender.stretch", 1)


@pytest.fixture(autouse=True)
def no_callback_fails(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A loop survives a callback that raises, but no message of a peer may make one raise."""
    yield
    if request.node.get_closest_marker("callbacks_may_fail") is None:
        failed = [r for r in caplog.get_records("call") if r.msg == "kv_loop_callback_failed"]
        assert not failed, [str(r.exc_info) for r in failed]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[logging.LogRecord]]:
    """The records of an event so far."""
    caplog.set_level(logging.INFO, logger="braid.kvtransfer")
    return lambda event: [r for r in caplog.records if r.msg == event]


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    """Pairs of ends; each is checked and closed at the end of the test."""
    from tests.kvtransfer.ends import Pair

    pairs: list[Pair] = []

    def make(**options: object) -> Pair:
        pairs.append(Pair(**options))  # type: ignore[arg-type]
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()
