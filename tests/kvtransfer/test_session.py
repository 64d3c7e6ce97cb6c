"""A producer and two consumers under any order of commands and lost connections."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvtransfer import wire
from tests.kvtransfer.ends import (
    BLOCK_BYTES,
    BLOCKS,
    DEADLINE_S,
    ConsumerEnd,
    ProducerEnd,
    contents,
    make_cache,
    make_key,
)
from tests.kvtransfer.proxy import Proxy

pytestmark = pytest.mark.slow

PROMPTS = 3
LONGEST = 3
"""Blocks of a prompt; prompt i lies in the producer's blocks from ``i * LONGEST``, and a consumer takes it
into its own from ``1 + i * LONGEST``."""
seldom = st.sampled_from([False, False, False, True])


@dataclass
class Slot:
    """One consumer's target blocks of one prompt, and what must hold of them."""

    starts: int = 0
    expected: torch.Tensor | None = None


class Watched(ConsumerEnd):
    """Checks, on its loop, every end of a load against the producer's bytes as it happens."""

    def __init__(self, source: ProducerEnd, transport: str, lanes: int) -> None:
        self.source = source
        self.slots = [Slot() for _ in range(PROMPTS)]
        self.wrong: list[str] = []
        super().__init__(transports=[transport], lanes=lanes)
        self.end._emit = self.ended

    def ended(self, event: wire.Event) -> None:
        assert isinstance(event, wire.Loaded | wire.Failed)
        prompt = event.key.id[-1]
        spans = self.specs.get(event.key, ())
        ours = [block for span in spans for block in span.block_ids]
        if isinstance(event, wire.Loaded) and ours:
            theirs = [block - 1 for block in ours]
            if not torch.equal(self.source.cache.take(theirs), self.cache.take(ours)):
                self.wrong.append(f"{event} with other bytes than the source's")
        if event.key not in self.end._loads:
            self.slots[prompt].expected = self.cache.take(range(*targets(prompt)))
        self.events.emit(event)

    specs: dict[wire.Key, tuple[wire.Span, ...]]


def targets(prompt: int) -> tuple[int, int]:
    return 1 + prompt * LONGEST, 1 + (prompt + 1) * LONGEST


class AnyOrder(RuleBasedStateMachine):
    """Every load ends once; what is Loaded is right; what has ended is not written; nothing is left."""

    @initialize(transport=st.sampled_from([("shm", 1), ("zmq", 1), ("zmq", 2)]))
    def start(self, transport: tuple[str, int]) -> None:
        self.patches: list[mock._patch[object]] = [
            mock.patch("kvtransfer.loop.TICK_S", 0.02),
            mock.patch("kvtransfer.consumer.MAX_RETRIES", 2),
            mock.patch("kvtransfer.producer.WINDOW_BYTES", 2 * BLOCK_BYTES),
            mock.patch("kvtransfer.consumer.ACK_BYTES", 1),
        ]
        for patch in self.patches:
            patch.start()
        self.logs = Failures()
        logging.getLogger("braid.kvtransfer").addHandler(self.logs)
        self.p = ProducerEnd(
            transports=[transport[0]],
            piece_bytes=BLOCK_BYTES,
            cache=make_cache(fill=True, blocks=PROMPTS * LONGEST),
            capacity=2 * 4096,
        )
        self.consumers = [Watched(self.p, *transport) for _ in range(2)]
        for consumer in self.consumers:
            consumer.specs = {}
        self.proxies = [Proxy(self.p.end.endpoint) for _ in self.consumers]
        self.keys = [make_key(prompt) for prompt in range(PROMPTS)]
        self.attempts = 0
        self.opened: dict[wire.Key, int] = {}
        self.ends = [0, 0]

    @rule(prompt=st.integers(0, PROMPTS - 1), subscribers=st.integers(1, 2))
    def open(self, prompt: int, subscribers: int) -> None:
        self.p.open(self.keys[prompt], LONGEST, subscribers=subscribers, tokens=12)

    @rule(prompt=st.integers(0, PROMPTS - 1), count=st.integers(1, LONGEST))
    def stage(self, prompt: int, count: int) -> None:
        key = self.keys[prompt]

        def next_block() -> int | None:
            lease = self.p.end.table.held.get(key)
            return None if lease is None else lease.published(0)

        first = self.p.call(next_block)
        if first is not None:
            count = min(count, LONGEST - first)
            blocks = [prompt * LONGEST + first + n for n in range(count)]
            if blocks:
                self.p.publish(key, first, blocks)

    @rule(prompt=st.integers(0, PROMPTS - 1), really=seldom)
    def end_ticket(self, prompt: int, really: bool) -> None:
        if really:
            self.close(prompt)

    @rule(
        prompt=st.integers(0, PROMPTS - 1),
        have=st.integers(0, LONGEST),
        early=st.booleans(),
        cut=st.one_of(st.none(), st.integers(300, 3 * BLOCK_BYTES)),
    )
    def transfer(self, prompt: int, have: int, early: bool, cut: int | None) -> None:
        """A whole one to both consumers, with a new ticket; one's connection may break amid it."""
        self.close(prompt)
        self.proxies[1].reset()
        self.proxies[1].faults.cut_after = cut
        if early:
            self.load(prompt, 0, have)
        self.open(prompt, 2)
        self.stage(prompt, 1)
        self.load(prompt, 1, 0)
        self.stage(prompt, LONGEST)
        self.load(prompt, 0, have)
        self.wait(0.03)

    def close(self, prompt: int) -> None:
        """The ticket has ended; the next attempt has another key."""
        key = self.keys[prompt]
        self.p.call(lambda: self.p.end.end(key, "cancelled"))
        self.attempts += 1
        self.keys[prompt] = make_key(prompt, self.attempts + 1)

    @rule(prompt=st.integers(0, PROMPTS - 1), who=st.integers(0, 1), have=st.integers(0, LONGEST))
    def load(self, prompt: int, who: int, have: int) -> None:
        d, key, proxy = self.consumers[who], self.keys[prompt], self.proxies[who]
        first, last = targets(prompt)
        spans = (wire.Span(0, have, tuple(range(first + have, last))),)
        busy = d.call(lambda: any(k.id == key.id for k in d.end._loads))
        if busy:  # its blocks have an owner
            return
        self.unharmed(d, prompt)

        def begin() -> None:
            for layer in d.cache.tensors[0]:
                layer[first:last] = 0
            d.slots[prompt].expected = None
            d.specs[key] = spans

        d.call(begin)
        self.ends[who] += 1
        d.load(key, proxy.endpoint, (), tokens=12, spans=spans, deadline_s=20.0)

    @rule(prompt=st.integers(0, PROMPTS - 1), who=st.integers(0, 1), really=seldom)
    def unload(self, prompt: int, who: int, really: bool) -> None:
        if not really:
            return
        d, key = self.consumers[who], self.keys[prompt]

        def stop() -> int:
            known = key in d.end._loads
            d.end.unload(key, "cancelled")
            return 0 if known else 1

        self.ends[who] += d.call(stop)

    @rule(prompt=st.integers(0, PROMPTS - 1), who=st.integers(0, 1), on=st.booleans())
    def hold(self, prompt: int, who: int, on: bool) -> None:
        d, endpoints = self.consumers[who], (self.proxies[who].endpoint,) if on else ()
        d.call(lambda: d.end.hold(wire.Hold(self.keys[prompt], endpoints)))

    @rule(who=st.integers(0, 1))
    def reset(self, who: int) -> None:
        self.proxies[who].reset()

    @rule(who=st.integers(0, 1), nbytes=st.integers(300, 6 * BLOCK_BYTES))
    def cut(self, who: int, nbytes: int) -> None:
        self.proxies[who].faults.cut_after = nbytes

    @rule(seconds=st.sampled_from([0.01, 0.03, 0.1]))
    def wait(self, seconds: float) -> None:
        time.sleep(seconds)  # how far the network got is the point

    def unharmed(self, d: Watched, prompt: int) -> None:
        """Since its end nobody has written the blocks of a load."""
        expected = d.slots[prompt].expected
        now = d.call(lambda: d.cache.take(range(*targets(prompt))))
        assert expected is None or torch.equal(now, expected)

    def teardown(self) -> None:
        try:
            for prompt in range(PROMPTS):
                self.close(prompt)
            self.at_rest()
        finally:
            for consumer in self.consumers:
                consumer.close()
            self.p.close()
            for proxy in self.proxies:
                proxy.close()
            for patch in self.patches:
                patch.stop()
            logging.getLogger("braid.kvtransfer").removeHandler(self.logs)

    def at_rest(self) -> None:
        for who, d in enumerate(self.consumers):
            d.call(lambda d=d: [d.end.unload(key, "over") for key in list(d.end._loads)])  # type: ignore[misc]
            d.call(lambda d=d: [d.end.hold(wire.Hold(key, ())) for key in list(d.end._holds)])  # type: ignore[misc]
            d.settle()
            d.call(d.end.check_integrity)
            assert not d.wrong
            assert len(d.events.seen) == self.ends[who], d.events.seen
            for prompt in range(PROMPTS):
                self.unharmed(d, prompt)
            rest = [0, *range(1 + PROMPTS * LONGEST, BLOCKS)]
            assert not contents(d.cache)[:, rest].any()
        give_up = time.monotonic() + DEADLINE_S
        while self.p.stats != wire.Stats() or self.p.call(lambda: self.p.arena.used):
            assert time.monotonic() < give_up, self.p.call(lambda: vars(self.p.end.table))
            time.sleep(0.005)  # the Drops are on their way
        self.p.check()
        assert not self.logs.found


class Failures(logging.Handler):
    """Collects callbacks that raised."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "kv_loop_callback_failed":
            self.found.append(str(record.exc_info))


AnyOrder.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = AnyOrder.TestCase
