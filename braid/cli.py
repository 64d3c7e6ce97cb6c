"""The ``braid`` command: one parser for every process, so that what a chart passes can be checked here.

:func:`parse` turns arguments into an :class:`Invocation` and starts nothing; :func:`main` runs it. The
modules of a subcommand are imported only when it is run.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin

from braid import __version__

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

    from braid.settings import ProcessSettings

COMMANDS = {
    "up": "run a whole cluster on this machine",
    "router": "run the router: the OpenAI HTTP API",
    "prefill": "run a prefill worker (vLLM flags after --)",
    "decode": "run a decode worker (vLLM flags after --)",
    "sim": "run simulated workers: made-up answers in modelled time",
    "ask": "ask a question and watch the samples come in",
    "eval": "compare strategies on a file of problems: accuracy and cost",
    "calibrate": "make the table of strategy auto from an evaluation",
    "batch": "answer a file of requests (OpenAI's batch format)",
    "bench": "benchmark a running server",
    "doctor": "explain what is wrong with an installation",
    "keys": "make the keys that encrypt traffic between machines",
    "version": "print the version",
}

# Where the commands are that parse their own arguments.
_OWN_ARGUMENTS = {
    "ask": "braid.ask",
    "batch": "braid.batch.command",
    "calibrate": "braid.evaluate.calibrate",
    "bench": "benchmarks.bench",
    "eval": "braid.evaluate.command",
}

# Where a process's settings are, and whether engine flags may follow after `--`.
_SETTINGS = {
    "up": ("deploy.local", "UpSettings", True),
    "router": ("braid.settings", "RouterSettings", False),
    "prefill": ("braid.settings", "PrefillSettings", True),
    "decode": ("braid.settings", "DecodeSettings", True),
    "doctor": ("braid.doctor", "DoctorSettings", False),
    "sim": ("braid.sim.settings", "SimSettings", False),
}


class UsageError(Exception):
    """The command line, environment or settings file can't be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """What a command line asks for.

    Attributes:
        command: one of :data:`COMMANDS`.
        settings: the validated settings, of a command that has a settings class.
        rest: engine flags after ``--``; for the other commands, their own arguments.
    """

    command: str
    settings: ProcessSettings | None = None
    rest: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        print(f"braid: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(argv: Sequence[str]) -> Invocation:
    """Parse and validate without starting anything.

    Raises:
        UsageError: unknown command, flag or key, or a value that is not allowed.
        SystemExit: after printing the asked-for ``--help``.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        raise SystemExit(0 if argv else 2)
    command, *arguments = argv
    if command == "--version":
        command = "version"
    if command not in COMMANDS:
        raise UsageError(f"no command {command!r}{_did_you_mean(command, COMMANDS)}; see `braid --help`")
    if command not in _SETTINGS:
        return Invocation(command, rest=tuple(arguments))
    module, name, takes_engine_flags = _SETTINGS[command]
    own, rest = _split(arguments)
    if rest and not takes_engine_flags:
        raise UsageError(f"`braid {command}` takes nothing after --, but got {' '.join(rest)}")
    settings_cls: type[ProcessSettings] = getattr(importlib.import_module(module), name)
    settings = build_settings(command, settings_cls, own)
    if rest and getattr(settings, "engine", "") == "sim":
        raise UsageError(f"the simulated engine takes nothing after --, but got {' '.join(rest)}")
    return Invocation(command, settings, tuple(rest))


def run(invocation: Invocation) -> int:
    """Run a parsed command line; returns the exit code."""
    match invocation.command:
        case "version":
            print(f"braid {__version__}")
            return 0
        case "keys":
            return _keys(invocation.rest)
        case "ask" | "batch" | "bench" | "calibrate" | "eval":
            return int(_import(_OWN_ARGUMENTS[invocation.command]).main(list(invocation.rest)) or 0)
        case "prefill" | "decode":
            process = _import(f"{invocation.command}_server.main")
            return int(process.main(invocation.settings, list(invocation.rest)) or 0)
        case "up":
            return int(_import("deploy.up").main(invocation.settings, list(invocation.rest)))
        case "sim":
            return int(_import("braid.sim.serve").main(invocation.settings))
        case "doctor":
            return int(_import("braid.doctor").main(invocation.settings))
        case _:
            return int(_import("router.main").main(invocation.settings) or 0)


def build_settings(
    command: str, settings_cls: type[ProcessSettings], arguments: Sequence[str]
) -> ProcessSettings:
    """Settings from flags, then the environment, then the file (:mod:`braid.settings`)."""
    from pydantic import ValidationError

    given = vars(settings_parser(command, settings_cls).parse_args(list(arguments)))
    try:
        return settings_cls(**given)
    except ValidationError as error:
        raise UsageError(_explain(command, settings_cls, error)) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"settings file: {error}") from None


def settings_parser(command: str, settings_cls: type[ProcessSettings]) -> argparse.ArgumentParser:
    """A parser with one flag a field, grouped by the class that declares it.

    Values stay as they were typed: the settings class is what validates them, whichever way they came.
    """
    parser = _Parser(
        prog=f"braid {command}",
        description=_sentence(COMMANDS[command]),
        epilog="Each flag can also be given as a variable (--queue-limit: BRAID_QUEUE_LIMIT) or as a key of "
        f"the table [{command}] in the TOML file that BRAID_CONFIG names. Flags win, then variables.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for title, fields in _groups(settings_cls):
        group = parser.add_argument_group(title)
        for name, info in fields:
            group.add_argument(_flag(name), dest=name, **_argument(info))
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what to do instead of printing a usage text, and lets the caller decide about the exit."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            hint = _did_you_mean(flag, self._option_string_actions)
            engine = (
                "; flags of vLLM go after --" if self.prog.split()[-1] in ("prefill", "decode", "up") else ""
            )
            self.error(f"unknown argument {flag}{hint}{engine}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _groups(settings_cls: type[ProcessSettings]) -> Iterator[tuple[str, list[tuple[str, FieldInfo]]]]:
    """Fields with a title for each class, the most specific first."""
    from braid.settings import ProcessSettings

    for owner in settings_cls.__mro__:
        if issubclass(owner, ProcessSettings):
            names = [name for name in owner.__annotations__ if name in owner.model_fields]
            title = (owner.__doc__ or owner.__name__).strip().splitlines()[0].split(". ")[0].rstrip(".:")
            yield title, [(name, settings_cls.model_fields[name]) for name in names]


def _argument(info: FieldInfo) -> dict[str, Any]:
    """Keyword arguments of ``add_argument`` for one field."""
    # argparse reads % as the start of a placeholder.
    text = (info.description or "").replace("%", "%%")
    if not info.is_required() and info.default not in (None, "", ()):
        text = f"{text} (default: {str(info.default).replace('%', '%%')})".strip()
    elif info.is_required():
        text += " (required)"
    if info.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if get_origin(info.annotation) is tuple:
        return {"action": "append", "help": text, "metavar": "NAME,..."}
    choices = [a for a in _plain_types(info.annotation) if get_origin(a) is Literal]
    metavar = "|".join(map(str, get_args(choices[0]))) if choices else _metavar(info.annotation)
    return {"help": text, "metavar": metavar}


def _plain_types(annotation: Any) -> list[Any]:
    """The members of an optional type, without None."""
    if get_origin(annotation) in (Union, UnionType):
        return [a for a in get_args(annotation) if a is not NoneType]
    return [annotation]


def _metavar(annotation: Any) -> str:
    name = getattr(_plain_types(annotation)[0], "__name__", "VALUE")
    return {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}.get(name, "VALUE")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments before and after the first ``--``."""
    own = list(arguments)
    if "--" not in own:
        return own, []
    at = own.index("--")
    return own[:at], own[at + 1 :]


def _explain(command: str, settings_cls: type[ProcessSettings], error: ValidationError) -> str:
    """A line for each thing that is wrong, naming the flag, the variable and the key."""
    lines = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        if any(isinstance(key, str) for key in item["loc"][1:]):  # inside a table of the file
            place = ".".join(map(str, item["loc"]))
            lines.append(f"{place}: {item['msg']} (in [{command}] of the file, or BRAID_{name.upper()})")
        elif item["type"] == "extra_forbidden":
            hint = _did_you_mean(name, settings_cls.model_fields)
            lines.append(f"unknown key {name!r} in [{command}] of {os.environ.get('BRAID_CONFIG')}{hint}")
        elif not name:
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            what = "is required" if item["type"] == "missing" else f"is {item['input']!r}: {item['msg']}"
            lines.append(f"{name} {what} ({_flag(name)}, BRAID_{name.upper()} or `{name}` in the file)")
    return "\n  ".join([f"`braid {command}` can't start:", *lines])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: braid COMMAND [flags]", "", *lines, "", "`braid COMMAND --help` lists its flags."]
    )


def _keys(arguments: Sequence[str]) -> int:
    from pathlib import Path

    parser = _Parser(prog="braid keys", description=_sentence(COMMANDS["keys"]))
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write the key pair")
    folder: Path = parser.parse_args(list(arguments)).folder
    try:
        _import("braid.keys").make_keys(folder)
    except OSError as error:
        raise UsageError(f"can't write keys: {error}") from None
    print(f"Keys are in {folder}. Give each process the folder with --keys-dir, and nobody else.")
    return 0


def _import(name: str) -> Any:
    """Import a command's module; an engine that isn't installed is said in words."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("vllm", "torch"):
            raise
        raise UsageError(
            f"{error.name} is not installed, and this command runs the engine: "
            "install it with `BRAID_FLAVOR=cpu python3 scripts/install.py` (or cuda), or see `braid doctor`"
        ) from None
