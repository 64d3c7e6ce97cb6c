"""Both ends of a transfer in one process, torn down with nothing left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.kvtransfer.ends import Pair

collect_ignore: list[str] = []
if find_spec("torch") is None:  # a core installation has no engine
    collect_ignore += ["test_paged.py", "test_transfer.py", "test_refusals.py", "test_hostile.py", "adapter"]


def pytest_configure(config: pytest.Config) -> None:
    # A received frame is read-only memory and is only ever read from; pytest resets the module's filter.
    config.addinivalue_line("filterwarnings", "ignore:The given buffer is not writable:UserWarning")


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
