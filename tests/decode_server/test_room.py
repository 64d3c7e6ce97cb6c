"""Shares of a decode worker's cache: somebody can always go on."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from decode_server.room import Room, divide, longest_sequence
from kvtransfer.plan import Blocking


@dataclass
class Cache:
    """Who holds blocks of a pool, and the engine's queue in which nobody overtakes.

    Every import has a sample behind it that needs one block more; the import's blocks are free when that has
    ended. What is in ``queue`` is blocks that a sequence needs, and of which import it is (-1: of none).
    """

    free: int
    imports: dict[int, int] = field(default_factory=dict)
    queue: list[tuple[int, int]] = field(default_factory=list)

    def run(self) -> int:
        """Let in and end sequences, one after another; returns how many stand still."""
        while self.queue and self.queue[0][0] <= self.free:
            _, of = self.queue.pop(0)
            self.free += self.imports.pop(of, 0)
        return len(self.queue)


def crowded(blocks: int, longest: int, room: Room) -> Cache:
    """Imports and kept samples hold all that they may, and the longest sequence is before their samples."""
    cache = Cache(blocks - 1 - room.imports - room.kept)
    cache.queue.append((longest, -1))
    for name in range(room.imports):
        cache.imports[name] = 1
        cache.queue.append((1, name))
    return cache


def test_without_room_for_the_longest_sequence_nobody_goes_on() -> None:
    assert crowded(100, 40, Room(50, 25)).run() == 51


def test_the_longest_sequence_fits_beside_all_that_is_held() -> None:
    assert crowded(100, 40, divide(100, 40, 0.5, 0.25)).run() == 0


def test_a_large_pool_gives_the_shares_asked_for() -> None:
    assert divide(1000, 40, 0.5, 0.25) == (500, 250)


@given(st.integers(2, 5000), st.integers(1, 5000), st.floats(0.01, 1), st.floats(0, 1))
def test_any_pool_that_holds_the_longest_sequence_goes_on(
    blocks: int, longest: int, load: float, kept: float
) -> None:
    room = divide(blocks, longest, load, kept)
    assert room.imports >= 0
    assert room.kept >= 0
    if longest < blocks:
        assert crowded(blocks, longest, room).run() == 0


def test_a_windowed_group_holds_its_window_and_a_chunk() -> None:
    groups = (Blocking(4), Blocking(4, 8))
    assert longest_sequence(groups, 400, 16) == 101 + 7
    assert longest_sequence(groups, 8, 16) == 3 + 3
