"""What placement by cost knows of models and decode workers, learned from what they report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from braid import wire
from router import cost
from router.placement import Placed, by_load
from router.prefixes import Prefixes
from router.registry import Worker
from router.validate import prompt_chars

STEP_BASE_S, STEP_SEQ_S = 5e-3, 5e-5
"""A decode step while no worker has measured any."""
SHARE_S = 1e-3
"""What a further share costs besides its bytes: messages, and rendering the prompt once more."""
PREFILL_CHAR_S = 2.5e-5
"""Seconds that a decode worker computes for a character of a prompt which it is not sent."""
NEW = 0.2
"""Weight of the newest report in what is learned."""


@dataclass(slots=True)
class Learned:
    """Averages of one model. ``tokens``: generated a sample; ``char_bytes``: KV bytes of a character of a
    prompt; ``char_tokens``: tokens of one."""

    tokens: float = 64.0
    char_bytes: float = 1024.0
    char_tokens: float = 0.25


class Estimates:
    """Divides a prompt's samples by cost (:func:`router.cost.divide`)."""

    def __init__(self, bandwidth: float = 1e9) -> None:
        """``bandwidth``: bytes a second that a prefill worker sends KV at."""
        self._bandwidth = bandwidth
        self._models: dict[str, Learned] = {}
        self.prefixes = Prefixes()

    def learn(self, model: str, body: Mapping[str, Any], samples: int, done: wire.GroupDone) -> None:
        """A share of ``samples`` samples of ``body``'s prompt has ended."""
        learned = self._models.setdefault(model, Learned())
        if done.status != 200 or not samples:
            return
        learned.tokens += NEW * (done.choice_tokens / samples - learned.tokens)
        chars = prompt_chars(body)
        if not chars or not done.prompt_tokens:
            return
        learned.char_tokens += NEW * (done.prompt_tokens / chars - learned.char_tokens)
        if done.kv is not None and done.kv.blocks and done.kv.nbytes:
            whole = done.kv.nbytes * (1 + done.kv.blocks_cached / done.kv.blocks)
            learned.char_bytes += NEW * (whole / chars - learned.char_bytes)

    def divide(
        self,
        model: str,
        body: Mapping[str, Any],
        workers: Sequence[Worker],
        n: int,
        local: bool,
        single: bool = False,
    ) -> tuple[Placed, ...]:
        """Consecutive shares of ``n`` samples of ``body`` over ``workers`` (at least one). ``local``: each
        computes the prompt itself. ``single``: it is no group's, so samples that wait are not before it."""
        workers = by_load(workers, single)
        learned = self._models.get(model, Learned())
        known, chars = self.prefixes.known(body), prompt_chars(body)
        whole_s = chars * (PREFILL_CHAR_S if local else learned.char_bytes / self._bandwidth)
        tokens = min(learned.tokens, _most(body))
        steps = _steps(workers)
        stations = [
            _station(
                worker,
                worker.crowd if single else worker.inflight,
                steps,
                whole_s * (1 - known.get(worker.hello.epoch, 0.0)),
                learned,
                chars,
                tokens,
            )
            for worker in workers
        ]
        shares, first = [], 0
        for worker, count in zip(workers, cost.divide(stations, n, tokens), strict=True):
            if count:
                shares.append(Placed(worker, first, count))
                first += count
        return tuple(shares)


Steps = tuple[float, float, float]
"""Seconds of a decode step: base, for each sequence, for each token attended to."""


def _measured(beat: wire.Beat) -> Steps | None:
    if beat.step_base_s is None or beat.step_seq_s is None:
        return None
    return beat.step_base_s, beat.step_seq_s, beat.step_token_s or 0.0


def _steps(workers: Sequence[Worker]) -> Steps:
    """What a worker is taken for that has not measured any steps: the mean of those that have, so that it is
    neither avoided nor sought."""
    known = [steps for worker in workers if (steps := _measured(worker.beat)) is not None]
    if not known:
        return STEP_BASE_S, STEP_SEQ_S, 0.0
    base, seq, token = (sum(values) / len(known) for values in zip(*known, strict=True))
    return base, seq, token


def _station(
    worker: Worker,
    width: int,
    steps: Steps,
    missing_s: float,
    learned: Learned,
    chars: int,
    tokens: float,
) -> cost.Station:
    hello, beat = worker.hello, worker.beat
    room = hello.slots - width
    if beat.free_blocks is not None:
        left = beat.free_blocks - math.ceil(chars * learned.char_tokens / hello.block_size)
        room = min(room, int(left // math.ceil(1 + tokens / hello.block_size)))
    base, seq, token = _measured(beat) or steps
    seq += token * (chars * learned.char_tokens + tokens / 2)
    return cost.Station(room, width, base, seq, missing_s + SHARE_S if missing_s > 0 else 0.0)


def _most(body: Mapping[str, Any]) -> float:
    """Tokens that a sample may have by the client's own bound."""
    bounds = [body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return float(min((bound for bound in bounds if isinstance(bound, int)), default=math.inf))
