"""``braid ask``: one question to a running router, with the votes of its samples as they come.

The answer goes to standard output, everything about how it came about to standard error: a live table on
a terminal, plain lines elsewhere. Exit codes: 0 answered; 1 the router refused or the answer broke off;
2 wrong usage; 3 nobody listens at the address; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from braid.lines import lines

URL = "http://127.0.0.1:8000"
EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130


class AskFailed(Exception):
    """The question was not answered; ``exit_code`` says how."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(slots=True)
class Progress:
    """What the stream has told so far.

    Attributes:
        n: samples asked for, None if the strategy's default.
        samples: the last event of each sample, by its index.
        votes: the current tally, the winner first.
        report: field ``reasoning`` of the last chunk.
        path: field ``braid`` of the last chunk.
        usage: OpenAI's token counts.
        text: the answer's text.
    """

    n: int | None = None
    samples: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    votes: list[Mapping[str, Any]] = field(default_factory=list)
    report: Mapping[str, Any] = field(default_factory=dict)
    path: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    def take(self, chunk: Mapping[str, Any]) -> str:
        """Take one chunk in; returns the answer's text in it."""
        reasoning = chunk.get("reasoning") or {}
        event = reasoning.get("event")
        if event == "sample":
            self.samples[reasoning["index"]] = reasoning
            self.votes = reasoning.get("votes") or self.votes
        elif event is None and reasoning:
            self.report = reasoning
            self.votes = reasoning.get("votes") or self.votes
            self.samples = {sample["index"]: sample for sample in reasoning.get("samples", [])}
        self.path = chunk.get("braid") or self.path
        self.usage = chunk.get("usage") or self.usage
        choices = chunk.get("choices") or [{}]
        text = (choices[0].get("delta") or {}).get("content") or ""
        self.text += text
        return text


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(prog="braid ask", description="Ask a running router one question.")
    result.add_argument("question", help="the question; - reads it from standard input")
    result.add_argument("--strategy", default=None, help="reasoning strategy (default: a plain request)")
    result.add_argument("-n", type=_positive, default=None, help="samples of the question")
    result.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="further option of the strategy, such as weight=mean_logprob; may be repeated",
    )
    result.add_argument("--model", default=None, help="model (default: the first one served)")
    result.add_argument("--url", default=os.environ.get("BRAID_URL", URL), help="the router (%(default)s)")
    result.add_argument("--key", default=os.environ.get("BRAID_API_KEY"), help="API key (BRAID_API_KEY)")
    result.add_argument("--temperature", type=float, default=None)
    result.add_argument("--max-tokens", type=_positive, default=None)
    result.add_argument("--timeout", type=float, default=600.0, help="longest silence in s (%(default)s)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with parsed arguments; returns its exit code."""
    console = Console(stderr=True, highlight=False)
    try:
        body = request_body(arguments)
        headers = {"authorization": f"Bearer {arguments.key}"} if arguments.key else {}
        timeout = httpx.Timeout(arguments.timeout, connect=5.0)
        with httpx.Client(base_url=arguments.url, headers=headers, timeout=timeout) as client:
            body["model"] = arguments.model or first_model(client)
            _show(chunks(client, body), Progress(n=arguments.n), console)
    except AskFailed as failure:
        console.print(Text(f"braid ask: {printable(str(failure))}", style="red"), soft_wrap=True)
        return failure.exit_code
    except (httpx.ConnectError, httpx.ConnectTimeout):
        hint = "start it with `make up`, or name another address with --url"
        console.print(
            Text(f"braid ask: nothing answers at {arguments.url}: {hint}", style="red"), soft_wrap=True
        )
        return EXIT_UNREACHABLE
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        console.print(
            Text("braid ask: --url must look like http://127.0.0.1:8000", style="red"), soft_wrap=True
        )
        return EXIT_USAGE
    except httpx.TimeoutException:
        hint = "see /cluster and the logs of `braid up`, or raise --timeout"
        console.print(
            Text(f"braid ask: silence for {arguments.timeout:g} s: {hint}", style="red"), soft_wrap=True
        )
        return EXIT_FAILED
    except httpx.HTTPError as error:
        hint = "the router may have stopped; try `braid doctor`"
        console.print(
            Text(f"braid ask: the connection broke ({type(error).__name__}): {hint}", style="red"),
            soft_wrap=True,
        )
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def request_body(arguments: argparse.Namespace) -> dict[str, Any]:
    """The request, without its model.

    Raises:
        AskFailed: the arguments don't go together.
    """
    question = sys.stdin.read() if arguments.question == "-" else arguments.question
    if not question.strip():
        raise AskFailed("the question is empty", EXIT_USAGE)
    options: dict[str, Any] = dict(arguments.option)
    if arguments.n is not None:
        options["n"] = arguments.n
    if options and arguments.strategy is None:
        raise AskFailed("-n and -o need a strategy: add --strategy self_consistency", EXIT_USAGE)
    if arguments.strategy == "direct" and options.get("n", 1) != 1:
        raise AskFailed("direct samples don't make one answer: use self_consistency or best_of_n", EXIT_USAGE)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": arguments.temperature,
        "max_tokens": arguments.max_tokens,
    }
    if arguments.strategy is not None:
        body["reasoning"] = {"strategy": arguments.strategy, **options}
    return {name: value for name, value in body.items() if value is not None}


def first_model(client: httpx.Client) -> str:
    """The id of the first model served."""
    response = client.get("/v1/models")
    if response.status_code != 200:
        raise AskFailed(refusal(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise AskFailed(
            "no model is served yet: wait until /ready answers 200, or name one with --model"
        ) from None


def chunks(client: httpx.Client, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The chunks of a streamed chat completion.

    Raises:
        AskFailed: the router refuses, reports an error, or the stream ends without ``[DONE]``.
    """
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise AskFailed(refusal(response))
        for line in lines(response.iter_bytes()):
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            try:
                chunk = json.loads(data)
            except ValueError:
                raise AskFailed(
                    "the router sent something that is no JSON: is --url a Braid router?"
                ) from None
            if "error" in chunk:
                raise AskFailed(str((chunk["error"] or {}).get("message")))
            yield chunk
    raise AskFailed("the answer broke off before its end: ask again, or look into the router's log")


def refusal(response: httpx.Response) -> str:
    """What an error response says, and what to do about it."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = "no OpenAI-shaped error in the reply: is --url a Braid router?"
    hints = {
        401: " (give a key with --key or BRAID_API_KEY)",
        429: f" (try again in {response.headers.get('retry-after', 'a few')} s)",
        503: " (workers may still be starting: `braid doctor` and /cluster tell)",
    }
    return f"{response.status_code}: {message}{hints.get(response.status_code, '')}"


def _show(stream: Iterator[Mapping[str, Any]], progress: Progress, console: Console) -> None:
    """Drain the stream: progress and summary to ``console``, the answer to standard output."""
    write = sys.stdout.write
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8) as live:
            _drain(stream, progress, write, lambda: live.update(table(progress)), live.stop)
    else:
        told: set[int] = set()
        _drain(stream, progress, write, lambda: _tell(progress, told, console), lambda: None)
    write("\n")
    sys.stdout.flush()
    console.print(Text(summary(progress), style="dim" if console.is_terminal else ""), soft_wrap=True)


def _drain(
    stream: Iterator[Mapping[str, Any]],
    progress: Progress,
    write: Callable[[str], Any],
    refresh: Callable[[], None],
    settle: Callable[[], None],
) -> None:
    # A model's text reaches the user's terminal: it must not carry escape sequences there.
    safe = printable if sys.stdout.isatty() else str
    for chunk in stream:
        text = progress.take(chunk)
        if progress.samples and not progress.text:
            refresh()
        if text:
            settle()
            write(safe(text))
            sys.stdout.flush()


def _tell(progress: Progress, told: set[int], console: Console) -> None:
    for index in [index for index in progress.samples if index not in told]:
        told.add(index)
        sample = progress.samples[index]
        answer = _answer(sample)
        line = f"sample {index} {sample['state']}: {answer} ({sample.get('tokens', 0)} tokens)"
        console.print(Text(f"{line}  {votes_line(progress.votes)}".rstrip()), soft_wrap=True)


def table(progress: Progress) -> RenderableType:
    """Samples and tally so far."""
    samples = Table("sample", "answer", "tokens", "state", title=None, box=None, header_style="bold")
    for index in sorted(progress.samples):
        sample = progress.samples[index]
        style = "" if sample["state"] == "finished" else "dim"
        cells = (str(index), _answer(sample), str(sample.get("tokens", 0)), str(sample["state"]))
        samples.add_row(*(Text(cell, style=style) for cell in cells))
    of = f" of {progress.n}" if progress.n else ""
    standing = f"{len(progress.samples)}{of} ended  {votes_line(progress.votes)}"
    return Group(samples, Text(standing, style="bold"))


def votes_line(votes: Sequence[Mapping[str, Any]]) -> str:
    """``votes: 42 x5, 40 x1``, the winner first; of many, the first eight."""
    if not votes:
        return ""
    shown = ", ".join(f"{printable(str(vote['answer']))} x{vote['votes']}" for vote in votes[:8])
    return f"votes: {shown}" + (", ..." if len(votes) > 8 else "")


def summary(progress: Progress) -> str:
    """One line on the winner, the cost and the path."""
    report, path = progress.report, progress.path
    parts = []
    if report.get("answer") is not None:
        share = report.get("confidence")
        parts.append(f"answer {printable(str(report['answer']))}" + (f" ({share:.0%})" if share else ""))
    if report.get("stopped_early"):
        cancelled = report.get("samples_cancelled", 0)
        parts.append(f"stopped early: {report['stopped_early']}, {cancelled} samples cancelled")
    if report.get("note"):
        parts.append(printable(str(report["note"])))
    tokens = progress.usage.get("completion_tokens", report.get("tokens"))
    if tokens is not None:
        parts.append(f"{tokens} tokens generated")
    if path:
        workers = f"{path.get('prefill') or '-'} -> {', '.join(path.get('decode') or '-')}"
        moved = f"{path.get('kv_bytes', 0)} KV bytes in {path.get('kv_transfers', 0)} transfers"
        parts.append(f"path {path.get('path')}, {workers}, {moved}")
    if group := path.get("group") or report.get("group"):
        parts.append(f"group {printable(str(group))}")
    return " | ".join(parts)


def printable(text: str) -> str:
    """``text`` without control characters other than newline and tab."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))


def _answer(sample: Mapping[str, Any]) -> str:
    answer = sample.get("answer")
    return "-" if answer is None else " ".join(printable(str(answer)).split())[:60]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
