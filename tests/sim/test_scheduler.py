"""Continuous batching over blocks: nothing leaks, nothing starves, equal prompts share."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from braid.sim.blocks import BlockPool
from braid.sim.draws import Draw
from braid.sim.scheduler import Scheduler, Sequence
from braid.sim.tokens import Prompt

BLOCK = 4


def make(blocks: int = 64, slots: int = 8, budget: int = 16) -> Scheduler:
    return Scheduler(BlockPool(blocks + 1), block_size=BLOCK, slots=slots, budget=budget)


def sequence(prompt: int = 10, tokens: int = 5, first: int = 0, ready: int = 0) -> Sequence:
    """A prompt of ids from ``first`` on."""
    said = Draw("abcd" * tokens, tokens, "stop", None, 1, -0.1)
    return Sequence(Prompt(range(first, first + prompt)), said, lambda _: None, ready=ready)


def run(scheduler: Scheduler, limit: int = 10_000) -> int:
    """Step until nothing is left; returns the steps."""
    for steps in range(limit):
        step = scheduler.begin()
        if not step.work:
            assert not scheduler.waiting
            return steps
        scheduler.finish(step)
        scheduler.check_integrity()
    raise AssertionError("it never ended")


def test_a_prompt_is_computed_in_chunks_and_decoded_token_by_token() -> None:
    scheduler = make()
    scheduler.add(sequence(prompt=40, tokens=5))
    assert run(scheduler) == 3 + 4  # chunks of 16, 16 and 8; the last gives the first token


def test_running_sequences_come_before_a_prompt() -> None:
    scheduler = make(budget=4)
    scheduler.add(sequence(prompt=3, tokens=50))
    scheduler.finish(scheduler.begin())
    scheduler.add(sequence(prompt=40, tokens=1, first=100))
    counts = [count for _, count in scheduler.begin().work]
    assert counts == [1, 3]


def test_siblings_share_the_full_blocks_of_their_prompt() -> None:
    scheduler = make(budget=64)
    first, second = sequence(prompt=21), sequence(prompt=21)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.begin()
    assert first.blocks[:5] == second.blocks[:5]
    assert first.blocks[5] != second.blocks[5]
    assert (first.cached, second.cached) == (0, 20)


def test_what_an_import_holds_is_not_computed() -> None:
    scheduler = make(budget=64)
    scheduler.add(sequence(prompt=21, ready=20))
    assert [count for _, count in scheduler.begin().work] == [1]


def test_an_abort_frees_blocks_in_the_same_step() -> None:
    scheduler = make()
    one = sequence(prompt=30)
    scheduler.add(one)
    step = scheduler.begin()
    assert scheduler.pool.free_blocks < scheduler.pool.blocks
    scheduler.abort(one)
    assert scheduler.pool.free_blocks == scheduler.pool.blocks
    scheduler.finish(step)
    assert one.generated == 0
    scheduler.abort(one)
    scheduler.check_integrity()


def test_the_last_one_let_in_is_preempted_and_computes_again() -> None:
    scheduler = make(blocks=8, budget=64)
    first, second = sequence(prompt=12, tokens=17), sequence(prompt=12, tokens=17, first=100)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler)
    assert first.preemptions == 0
    assert second.preemptions >= 1
    assert (first.generated, second.generated) == (17, 17)
    assert scheduler.pool.free_blocks == scheduler.pool.blocks


def test_what_was_used_longest_ago_is_evicted_first() -> None:
    scheduler = make(blocks=6, budget=64)
    for first in (0, 100, 200):  # each leaves two full blocks behind; the third needs room
        scheduler.add(sequence(prompt=9, tokens=1, first=first))
        run(scheduler)
    again = sequence(prompt=9, tokens=1, first=200)
    evicted = sequence(prompt=9, tokens=1, first=0)
    scheduler.add(again)
    run(scheduler)
    scheduler.add(evicted)
    run(scheduler)
    assert again.cached == 8
    assert evicted.cached < 8


def test_generated_blocks_are_found_by_what_goes_on_from_them() -> None:
    scheduler = make(budget=64)
    one = sequence(prompt=6, tokens=10)
    scheduler.add(one)
    run(scheduler)
    followed = Sequence(Prompt([*one.prompt.tokens, *one.draw.ids(10)]), one.draw, lambda _: None)
    scheduler.add(followed)
    scheduler.begin()
    assert followed.cached == 12  # of 16 known tokens the last is not in the cache


class Machine(RuleBasedStateMachine):
    """Sequences come, end, are aborted and preempted; others hold blocks too."""

    sequences = Bundle("sequences")
    others = Bundle("others")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(blocks=24, slots=4, budget=8)
        self.held: list[list[int]] = []
        self.added: list[Sequence] = []
        self.aborted: set[int] = set()
        self.step = self.scheduler.begin()

    @rule(
        target=sequences,
        prompt=st.integers(1, 40),
        tokens=st.integers(1, 24),
        first=st.sampled_from([0, 0, 100]),
    )
    def add(self, prompt: int, tokens: int, first: int) -> Sequence:
        one = sequence(prompt, tokens, first)
        self.scheduler.add(one)
        self.added.append(one)
        return one

    @rule(one=sequences)
    def abort(self, one: Sequence) -> None:
        if not one.ended:
            self.aborted.add(id(one))
        self.scheduler.abort(one)
        assert not one.blocks

    @rule()
    def pass_time(self) -> None:
        self.scheduler.finish(self.step)
        self.step = self.scheduler.begin()

    @rule(target=others, count=st.integers(1, 4))
    def take(self, count: int) -> list[int]:
        free = min(self.scheduler.pool.free_blocks, 8 - sum(map(len, self.held)))
        blocks = self.scheduler.pool.allocate(max(0, min(count, free)))
        self.held.append(blocks)
        return blocks

    @rule(blocks=consumes(others))
    def give(self, blocks: list[int]) -> None:
        self.held = [held for held in self.held if held is not blocks]
        self.scheduler.pool.free(blocks)

    @invariant()
    def every_block_has_an_owner(self) -> None:
        self.scheduler.check_integrity(self.held)

    def teardown(self) -> None:
        self.scheduler.finish(self.step)
        for _ in range(20_000):
            step = self.scheduler.begin()
            if not step.work:
                break
            self.scheduler.finish(step)
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        for one in self.added:
            assert one.ended
            assert id(one) in self.aborted or one.generated == one.draw.tokens
        assert self.scheduler.pool.free_blocks == self.scheduler.pool.blocks - sum(map(len, self.held))


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestMachine = pytest.mark.timeout(60)(Machine.TestCase)
