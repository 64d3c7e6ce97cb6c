"""``braid batch IN OUT``: answer a file of requests; stop and go on at any time.

``IN`` and ``OUT`` have OpenAI's batch format. What ``OUT`` holds already is not asked again, so the same
command goes on after Ctrl-C, a crash of either side, or a full disk. Exit codes: 0 every request has its
reply; 1 some failed; 2 wrong usage or input; 3 nobody listens at the address; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from braid import jsonl
from braid.batch import results, training
from braid.batch.requests import Input
from braid.batch.run import Batch
from braid.client import EXIT_INTERRUPTED, EXIT_USAGE, CommandFailed, add_server_flags


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="braid batch", description="Answer a file of requests in OpenAI's batch format."
    )
    result.add_argument("input", type=Path, metavar="IN", help="JSONL of custom_id, method, url and body")
    result.add_argument("output", type=Path, metavar="OUT", help="JSONL of id, custom_id, response and error")
    result.add_argument(
        "--errors",
        type=Path,
        metavar="FILE",
        help="put failed requests there instead of OUT; the next run asks them again",
    )
    result.add_argument(
        "--retry-failed", action="store_true", help="ask the requests that failed in OUT again"
    )
    result.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="write prompt and accepted completions of rejection_sampling there, for training",
    )
    result.add_argument(
        "--rollouts",
        type=Path,
        metavar="FILE",
        help="write prompt and samples (token_ids, logprobs, reward, text) of rollouts there",
    )
    add_server_flags(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parser().parse_args(argv)
    console = Console(stderr=True, highlight=False)
    try:
        return _run(arguments, console)
    except CommandFailed as failure:
        console.print(Text(f"braid batch: {failure}", style="red"), soft_wrap=True)
        return failure.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(arguments: argparse.Namespace, console: Console) -> int:
    """Answer what is left, then derive; raises :class:`CommandFailed`."""
    _check_files(arguments)
    requests = Input(arguments.input)
    with jsonl.Appender(arguments.output, results.BEGIN):
        results.answered(arguments.output, requests)  # refuses a file that is not ours before it is changed
    if arguments.retry_failed:
        results.drop_failed(arguments.output)
    with jsonl.Appender(arguments.output, results.BEGIN) as output:
        batch = Batch(arguments, requests, output, console)
        try:
            asyncio.run(batch.run())
        except (CommandFailed, KeyboardInterrupt):
            told = f"{batch.answered} of {len(requests)} answered; the same command goes on from here"
            console.print(told, markup=False)
            raise
        finally:
            _derive(arguments, requests, console)
    console.print(Text(batch.summary()), soft_wrap=True)
    return 1 if batch.failed else 0


def _check_files(arguments: argparse.Namespace) -> None:
    named = (arguments.input, arguments.output, arguments.errors, arguments.pairs, arguments.rollouts)
    given = [path.resolve() for path in named if path is not None]
    if len(set(given)) < len(given):
        raise CommandFailed("IN, OUT and the other files must be different files", EXIT_USAGE)


def _derive(arguments: argparse.Namespace, requests: Input, console: Console) -> None:
    """The training data of all answers there are."""
    for path, make, what in (
        (arguments.pairs, training.pairs, "pairs"),
        (arguments.rollouts, training.rollouts, "groups of rollouts"),
    ):
        if path is not None:
            count = training.write(path, make, requests, arguments.output)
            console.print(Text(f"{what}: {count} in {path}"), soft_wrap=True)
