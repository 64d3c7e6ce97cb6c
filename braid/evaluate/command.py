"""``braid eval``: accuracy of strategies against what they cost, on problems of a file or of the demo.

Prints a table; writes ``NAME.json`` (all figures), ``NAME.svg`` (a plot) and ``NAME.outcomes.jsonl`` (every
single outcome, from which the same command goes on where it was stopped). Exit codes: 0 every problem was
answered; 1 some failed, or the server refused; 2 wrong usage or input; 3 nobody listens at the address; 130
interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from braid import __version__, jsonl
from braid.client import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    CommandFailed,
    Retries,
    add_server_flags,
    get_json,
    open_client,
    positive,
    served_models,
)
from braid.errors import BadRequest
from braid.evaluate import figures, methods, plot, problems, report
from braid.evaluate.run import Plan, Run
from braid.evaluate.store import Store
from braid.meter import Meter
from router.extract import EXTRACTORS, search
from router.strategies.options import Options
from router.toolcalls import TOOL_PARTS

PACKAGES = ("httpx", "math-verify", "rich")
"""What asks and judges, beside Braid."""
_NOT_TOLD = ("--key", "--url", "--out")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="braid eval",
        description="Compare strategies on one set of problems, at a running server.",
        epilog="Example: braid eval problems.jsonl --strategy direct --strategy self_consistency:16 "
        '--strategy \'mine={"strategy": "adaptive_consistency", "n": 16, "tau": 0.95}\'',
    )
    result.add_argument(
        "file", nargs="?", type=Path, help="JSONL: prompt or messages, answer, and an id if wanted"
    )
    result.add_argument(
        "--demo", type=positive, metavar="N", help="N problems of the demo's test split instead"
    )
    result.add_argument("--limit", type=positive, metavar="N", help="only the first N problems")
    result.add_argument(
        "--strategy",
        action="append",
        metavar="SPEC",
        help="NAME, NAME:N, a JSON object with strategy and its options, or one of request fields with "
        "reasoning; with LABEL= before it to name it; `all` for each that the server has; may be repeated",
    )
    result.add_argument("--n", type=positive, help="samples of strategies that draw several and do not say")
    result.add_argument("--model", help="model (default: the first one served)")
    result.add_argument("--max-tokens", type=positive, help="of a sample (default: the server's)")
    result.add_argument(
        "--temperature", type=float, help="(default: the server's, 1 where samples must differ)"
    )
    result.add_argument("--seed", type=int, default=0, help="of the sampling; problem k adds k (%(default)s)")
    result.add_argument("--no-seed", action="store_true", help="sample without a seed")
    result.add_argument(
        "--extractor",
        default="auto",
        choices=(*EXTRACTORS, *TOOL_PARTS),
        metavar="NAME",
        help=f"how answers are found, here and in strategies: {', '.join(EXTRACTORS)}...",
    )
    result.add_argument("--pattern", help="regular expression of extractor regex")
    result.add_argument("--baseline", metavar="LABEL", help="compare with this one (default: the first)")
    result.add_argument(
        "--block",
        type=positive,
        metavar="N",
        help="problems a strategy's turn has (default: 4 times the concurrency)",
    )
    result.add_argument(
        "--shared-cache",
        action="store_true",
        help="let strategies find each other's prompts in the prefix caches",
    )
    result.add_argument("--out", type=Path, default=Path("eval"), metavar="DIR", help="folder (%(default)s)")
    result.add_argument("--name", help="of the files (default: the problems')")
    add_server_flags(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    console = Console(stderr=True, highlight=False)
    try:
        result = asyncio.run(evaluate(arguments, given, console))
    except CommandFailed as failure:
        console.print(Text(f"braid eval: {failure}", style="red"), soft_wrap=True)
        return failure.exit_code
    except KeyboardInterrupt:
        console.print("braid eval: interrupted; the same command goes on from here", markup=False)
        return EXIT_INTERRUPTED
    show(result, arguments)
    return 1 if not result["methods"] or any(one["failed"] for one in result["methods"].values()) else 0


async def evaluate(arguments: argparse.Namespace, given: Sequence[str], console: Console) -> dict[str, Any]:
    """Ask what is not answered yet, write all files, and return the result.

    Raises:
        CommandFailed: the input, the server or the files forbid it.
    """
    options = await _options(arguments)
    asked = _problems(arguments)
    texts = arguments.strategy or []
    if not texts:
        raise CommandFailed("name at least one strategy: --strategy cot, or --strategy all", EXIT_USAGE)
    for text in texts:
        _ = text == methods.ALL or methods.parse(text)  # a wrong one is refused before the server is asked
    client = open_client(arguments.url, arguments.key, arguments.concurrency, arguments.timeout)
    async with client:
        model = arguments.model or (await served_models(client))[0]
        known = methods.catalogue(await get_json(client, "/v1/strategies"))
        chosen = methods.choose(texts, known, arguments.n)
        requests = {
            one.name: methods.request(one, arguments.extractor, arguments.pattern, known) for one in chosen
        }
        _check_baseline(arguments.baseline, requests)
        config = _config(arguments, model, asked, requests)
        with Store(_file(arguments, ".outcomes.jsonl"), config) as store:
            store.begin_session(await _session(client, command(given, arguments.file)))
            plan = Plan(
                methods=requests,
                problems=asked,
                body=_body(arguments, model),
                options=options,
                concurrency=arguments.concurrency,
                block=arguments.block or 4 * arguments.concurrency,
                seed=None if arguments.no_seed else arguments.seed,
                salt="" if arguments.shared_cache else store.sessions[0]["salt"],
                skip_refused=methods.ALL in texts,
                retries=Retries(arguments.retries),
            )
            total = len(asked) * len(requests)
            done = sum(store.answered(name, p.id) for name in requests for p in asked)
            with Meter(console, "braid eval", total, done) as meter:
                run = Run(plan, client, store, meter)
                await run.run()
            result = _result(store, plan, config, run.skipped)
    jsonl.replace(_file(arguments, ".json"), [json.dumps(report.rounded(result), indent=1), "\n"])
    title = f"{_name(arguments)}: {len(asked)} problems, {model}"
    jsonl.replace(_file(arguments, ".svg"), [plot.svg(title, result["methods"])])
    return result


def show(result: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """The tables, on standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    title = f"{_name(arguments)}: {result['problems']['count']} problems, {result['model']}"
    console.print(report.table(title, result["methods"]))
    if len(result["methods"]) > 1:
        first = next(iter(result["methods"]))
        baseline = arguments.baseline if arguments.baseline in result["methods"] else first
        console.print(report.compared(baseline, result["comparisons"]))
    for name, reason in result["skipped"].items():
        console.print(Text(f"{name} was left out: {reason}"), soft_wrap=True)
    kept = ", ".join(str(_file(arguments, suffix)) for suffix in (".json", ".svg", ".outcomes.jsonl"))
    console.print(Text(f"Written to {kept}"), soft_wrap=True)


async def _options(arguments: argparse.Namespace) -> Options:
    """How answers are found; a pattern is tried out."""
    try:
        options = Options(extractor=arguments.extractor, pattern=arguments.pattern)
        if options.pattern is not None:
            await search(options.pattern, "", "--pattern")
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise CommandFailed(f"--extractor and --pattern: {message}", EXIT_USAGE) from None
    except BadRequest as error:
        raise CommandFailed(f"--pattern: {error}", EXIT_USAGE) from None
    return options


def _problems(arguments: argparse.Namespace) -> list[problems.Problem]:
    if (arguments.file is None) == (arguments.demo is None):
        raise CommandFailed("give a file of problems, or --demo N for the demo's", EXIT_USAGE)
    if arguments.demo is not None:
        return problems.of_demo(arguments.demo)[: arguments.limit]
    return problems.from_file(arguments.file, arguments.limit)


def _check_baseline(baseline: str | None, requests: Mapping[str, Any]) -> None:
    if baseline is not None and baseline not in requests:
        raise CommandFailed(f"--baseline must be one of {', '.join(requests)}", EXIT_USAGE)


def _name(arguments: argparse.Namespace) -> str:
    if arguments.name:
        return str(arguments.name)
    return f"demo-{arguments.demo}" if arguments.file is None else str(arguments.file.stem)


def _file(arguments: argparse.Namespace, suffix: str) -> Path:
    folder: Path = arguments.out
    return folder / f"{_name(arguments)}{suffix}"


def _body(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """Fields of every request."""
    fields = {"model": model, "max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    return {key: value for key, value in fields.items() if value is not None}


def _config(
    arguments: argparse.Namespace, model: str, asked: Sequence[problems.Problem], requests: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes two runs the same evaluation."""
    return {
        "problems": {"count": len(asked), "digest": problems.digest(asked)},
        "methods": dict(requests),
        "request": _body(arguments, model),
        "seed": None if arguments.no_seed else arguments.seed,
        "extractor": arguments.extractor,
        "pattern": arguments.pattern,
        "concurrency": arguments.concurrency,
        "block": arguments.block or 4 * arguments.concurrency,
        "shared_cache": arguments.shared_cache,
    }


async def _session(client: httpx.AsyncClient, told: str) -> dict[str, Any]:
    """What this run says of itself and of the server."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "salt": secrets.token_hex(8),
        "command": told,
        "versions": versions(),
        "cluster": await get_json(client, "/cluster"),
    }


def command(given: Sequence[str], file: Path | None) -> str:
    """The command line that makes the same evaluation: without a key, an address and folders."""
    told, skip = ["braid", "eval"], False
    for argument in given:
        flag, equals, _ = argument.partition("=")
        if not skip and flag not in _NOT_TOLD:
            told.append(file.name if file is not None and argument == str(file) else argument)
        skip = flag in _NOT_TOLD and not equals
    return shlex.join(told)


def versions() -> dict[str, str]:
    """Of Braid, Python and what asks and judges."""
    found = {"braid": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _result(
    store: Store, plan: Plan, config: Mapping[str, Any], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """As it is kept."""
    names = [name for name in plan.methods if name not in skipped]
    of = {
        name: [store.outcomes[name, p.id] for p in plan.problems if (name, p.id) in store.outcomes]
        for name in names
    }
    return {
        "format": 1,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": plan.body["model"],
        "problems": config["problems"],
        "settings": {key: value for key, value in config.items() if key not in ("methods", "problems")},
        "methods": {
            name: {
                "request": dict(plan.methods[name]),
                **figures.summarise(of[name], [turn for turn in store.turns if turn["method"] == name]),
            }
            for name in names
        },
        "comparisons": figures.comparisons(of),
        "formulas": figures.SOURCES,
        "skipped": dict(skipped),
        "sessions": store.sessions,
    }
