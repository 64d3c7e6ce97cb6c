"""The arena against a plain list of what is handed out."""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.arena import ALIGN, Arena, open_arena

PAGES = 12


class AnyOrder(RuleBasedStateMachine):
    """Regions never overlap, go to the lowest place that fits, keep what was written, and all come back."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(PAGES * ALIGN)
        self.out: list[tuple[int, int]] = []
        self.written: dict[int, bytes] = {}

    def lowest(self, pages: int) -> int | None:
        """First page at which so many are free, by looking at every page."""
        taken = {page for at, n in self.out for page in range(at, at + n)}
        fits = (at for at in range(1, PAGES + 2 - pages) if not taken & set(range(at, at + pages)))
        return next(fits, None)

    @rule(pages=st.integers(1, PAGES + 1), less=st.integers(0, ALIGN - 1))
    def allocate(self, pages: int, less: int) -> None:
        at = self.arena.allocate(pages * ALIGN - less)
        expected = self.lowest(pages)
        assert at == (expected * ALIGN if expected is not None else None)
        if at is not None:
            self.out.append((at // ALIGN, pages))
            self.written[at] = bytes([len(self.out)]) * (pages * ALIGN - less)
            self.arena.memory[at : at + pages * ALIGN - less] = self.written[at]

    @precondition(lambda self: self.out)
    @rule(data=st.data(), less=st.integers(0, ALIGN - 1))
    def free(self, data: st.DataObject, less: int) -> None:
        at, pages = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.arena.free(at * ALIGN, pages * ALIGN - less)
        del self.written[at * ALIGN]

    @rule(pages=st.integers(0, PAGES))
    def give_back(self, pages: int) -> None:
        self.arena.give_back(pages * ALIGN)

    @rule()
    def age(self) -> None:
        self.arena.age()

    @invariant()
    def adds_up(self) -> None:
        self.arena.check_integrity()
        for at, data in self.written.items():
            assert self.arena.memory[at : at + len(data)] == data
        assert self.arena.used == sum(pages for _, pages in self.out) * ALIGN

    def teardown(self) -> None:
        for at, pages in self.out:
            self.arena.free(at * ALIGN, pages * ALIGN)
        self.arena.check_integrity()
        assert self.arena.used == 0
        assert self.arena.allocate(PAGES * ALIGN) == ALIGN, "all of it, in one piece"
        self.arena.close()


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def pages(arena: Arena) -> int:
    """Bytes of an arena that the kernel has made pages for."""
    return os.fstat(arena.ref.fd).st_blocks * 512


def filled(arena: Arena, nbytes: int) -> int:
    at = arena.allocate(nbytes)
    assert at is not None
    arena.memory[at : at + nbytes] = b"x" * nbytes
    return at


LARGE = 64 * mmap.PAGESIZE


def aged(arena: Arena) -> int:
    """Bytes given back at once after another while."""
    arena.age()
    return arena.give_back(4 * LARGE)


def test_what_a_burst_touched_is_given_back_once_it_is_past() -> None:
    """Staging kept the most it ever held, on both sides of a transfer through shared memory."""
    arena = Arena(4 * LARGE)
    view = open_arena(arena.ref)
    small, large = filled(arena, mmap.PAGESIZE), filled(arena, LARGE)
    assert arena.give_back(4 * LARGE) == 0, "nothing has aged"
    assert aged(arena) == 0, "it is handed out"
    arena.free(large, LARGE)
    assert aged(arena) == 0, "it was handed out since the last call: the next prompt may be as long"
    before = pages(arena)
    assert aged(arena) >= LARGE - mmap.PAGESIZE
    assert pages(arena) <= before - LARGE + mmap.PAGESIZE
    assert aged(arena) == 0
    assert bytes(view[small : small + 4]) == b"xxxx"
    assert filled(arena, LARGE) == large
    assert view[large : large + LARGE] == b"x" * LARGE, "a peer sees what was written after it"
    arena.close()


def test_it_is_given_back_a_part_at_a_time_and_what_is_handed_out_meanwhile_stays() -> None:
    arena = Arena(4 * LARGE)
    arena.free(filled(arena, LARGE), LARGE)
    for _ in range(2):
        arena.age()
    assert arena.give_back(mmap.PAGESIZE) == mmap.PAGESIZE
    half = filled(arena, LARGE // 2)
    while arena.give_back(mmap.PAGESIZE):
        assert bytes(arena.memory[half : half + LARGE // 2]) == b"x" * (LARGE // 2)
    assert LARGE // 2 <= pages(arena) <= LARGE // 2 + 2 * mmap.PAGESIZE
    arena.close()


def test_pages_that_a_device_has_stay() -> None:
    arena = Arena(LARGE)
    arena.hold_pages()
    arena.free(filled(arena, LARGE), LARGE)
    assert [aged(arena) for _ in range(3)] == [0, 0, 0]
    assert pages(arena) >= LARGE
    arena.close()


def test_another_process_sees_what_is_written_and_can_not_write() -> None:
    arena = Arena(ALIGN)
    at = arena.allocate(5)
    assert at is not None
    view = open_arena(arena.ref)
    arena.memory[at : at + 5] = b"hello"
    assert bytes(view[at : at + 5]) == b"hello"
    with pytest.raises(TypeError):
        view[at] = 0
    arena.close()


def test_only_the_arena_that_was_announced_is_opened() -> None:
    first, second = Arena(ALIGN), Arena(ALIGN)
    forged = type(first.ref)(os.getpid(), second.ref.fd, first.ref.nbytes, first.ref.nonce)
    with pytest.raises(OSError, match="another arena"):
        open_arena(forged)
    with pytest.raises(OSError, match="another file"):
        open_arena(type(first.ref)(os.getpid(), first.ref.fd, 2 * mmap.PAGESIZE + 1, first.ref.nonce))
    with pytest.raises(OSError, match="No such file"):
        open_arena(type(first.ref)(2**22, 3, first.ref.nbytes, first.ref.nonce))
    first.close()
    second.close()
