"""Asking what a batch has no answers to yet."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator

import httpx
from rich.console import Console

from braid import jsonl
from braid.batch import results, training
from braid.batch.requests import Input, Request
from braid.client import CommandFailed, Retries, closed_loop, open_client, post, refusal, served_models
from braid.meter import Meter, span


class Batch:
    """One run over the requests that have no answer in OUT.

    Attributes:
        answered: requests with the reply they asked for, of this run and of earlier ones.
        failed: requests without it: in OUT, and in the file of errors of this run.
    """

    def __init__(
        self, arguments: argparse.Namespace, requests: Input, output: jsonl.Appender, console: Console
    ) -> None:
        self._arguments = arguments
        self._requests = requests
        self._output = output
        self._errors = output
        self._console = console
        self._before = results.answered(arguments.output, requests)
        self._samples = arguments.pairs is not None or arguments.rollouts is not None
        self._retries = Retries(arguments.retries)
        self._asked = self._tokens = 0
        self._seconds = 0.0
        self.answered = sum(self._before.values())
        self.failed = len(self._before) - self.answered

    async def run(self) -> None:
        """Ask what is left. Where nothing is, nothing is asked of the server.

        Raises:
            CommandFailed: the server is not there, has gone, or refuses the key.
        """
        if len(self._before) == len(self._requests):
            return
        arguments, start = self._arguments, time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            client = open_client(arguments.url, arguments.key, arguments.concurrency, arguments.timeout)
            await stack.enter_async_context(client)
            await served_models(client)
            if arguments.errors is not None:
                jsonl.replace(arguments.errors, ())
                self._errors = stack.enter_context(jsonl.Appender(arguments.errors, results.BEGIN))
            meter = Meter(self._console, "braid batch", len(self._requests), len(self._before))
            stack.enter_context(meter)
            await closed_loop(
                self._left(), arguments.concurrency, lambda request: self._ask(client, request, meter)
            )
        self._seconds = time.monotonic() - start

    def summary(self) -> str:
        """One line on all of it."""
        parts = [f"{self.answered} of {len(self._requests)} answered"]
        if self.failed:
            where = self._arguments.errors or self._arguments.output
            parts.append(f"{self.failed} failed (see {where})")
        if self._asked:
            rate = self._asked / max(self._seconds, 1e-9)
            parts.append(
                f"this run: {self._asked} in {span(self._seconds)}, {rate:.2g}/s, {self._tokens} tokens"
            )
        return "; ".join(parts)

    def _left(self) -> Iterator[Request]:
        return (request for request in self._requests if request.custom_id not in self._before)

    async def _ask(self, client: httpx.AsyncClient, request: Request, meter: Meter) -> None:
        body = training.with_samples(request.body) if self._samples else request.body
        reply = await post(client, request.url, body, self._retries)
        if reply.response is not None and reply.response.status_code == 401:
            raise CommandFailed(
                f"the server refuses the key ({refusal(reply.response)}): give one with --key"
            )
        answer = results.line(request, reply)
        good = results.succeeded(answer)
        (self._output if good else self._errors).append(answer)
        self._asked += 1
        self._tokens += results.tokens(answer)
        self.answered += good
        self.failed += not good
        meter.advance(results.tokens(answer), not good)
