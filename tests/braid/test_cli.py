"""The command line: what it accepts, and what it says when it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from braid import __version__, cli
from braid.settings import DecodeSettings, PrefillSettings, RouterSettings
from deploy.local import UpSettings


def test_router_flags_become_settings() -> None:
    parsed = cli.parse(["router", "--port", "8123", "--queue-limit=7", "--no-verify-pairs"])
    assert isinstance(parsed.settings, RouterSettings)
    assert (parsed.settings.port, parsed.settings.queue_limit, parsed.settings.verify_pairs) == (
        8123,
        7,
        False,
    )


@pytest.mark.parametrize(("command", "kind"), [("prefill", PrefillSettings), ("decode", DecodeSettings)])
def test_engine_flags_after_the_dashes_are_passed_on(command: str, kind: type) -> None:
    parsed = cli.parse([command, "--model", "m", "--", "--dtype", "float32", "--", "--x"])
    assert isinstance(parsed.settings, kind)
    assert parsed.rest == ("--dtype", "float32", "--", "--x")


def test_up_has_a_default_for_everything() -> None:
    parsed = cli.parse(["up"])
    assert isinstance(parsed.settings, UpSettings)
    assert (parsed.settings.prefill, parsed.settings.decode, parsed.settings.port) == (1, None, 8000)


@pytest.mark.parametrize("command", ["ask", "batch", "bench", "eval", "keys"])
def test_other_commands_keep_their_own_arguments(command: str) -> None:
    assert cli.parse([command, "a", "--b", "c"]) == cli.Invocation(command, rest=("a", "--b", "c"))


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        (["rooter"], "did you mean router?"),
        (["router", "--prot", "1"], "did you mean --port?"),
        (["router", "--queue"], "see `braid router --help`"),
        (["router", "--port", "70000"], "--port, BRAID_PORT or `port` in the file"),
        (["router", "--port", "x"], "valid integer"),
        (["router", "--spread", "x"], "'pack', 'spread' or 'auto'"),
        (["router", "--", "--dtype", "x"], "takes nothing after --"),
        (["router", "--link", "tcp://0.0.0.0:1"], "make keys with `braid keys DIR`"),
        (["decode"], "model is required"),
        (["decode", "--dtype", "float32", "--model", "m"], "flags of vLLM go after --"),
        (["decode", "--model"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(argv: list[str], advice: str) -> None:
    with pytest.raises(cli.UsageError) as error:
        cli.parse(argv)
    assert advice in str(error.value)


def test_abbreviated_flags_are_refused() -> None:
    with pytest.raises(cli.UsageError, match="--queue-lim"):
        cli.parse(["router", "--queue-lim", "3"])


@pytest.mark.parametrize("command", ["up", "router", "prefill", "decode", "doctor"])
def test_help_shows_every_flag_in_groups(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--log-level" in shown
    assert "What every process has:" in shown


def test_every_settings_field_has_a_flag() -> None:
    parser = cli.settings_parser("decode", DecodeSettings)
    assert set(DecodeSettings.model_fields) < {action.dest for action in parser._actions}


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {command}" in shown for command in cli.COMMANDS)


def test_a_usage_error_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["router", "--nope"]) == 2
    assert capsys.readouterr().err.startswith("braid: unknown argument --nope")


def test_keys_are_written_and_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", str(tmp_path / "keys")]) == 0
    assert any((tmp_path / "keys").iterdir())
    assert "--keys-dir" in capsys.readouterr().out


def test_keys_without_a_folder_is_a_usage_error() -> None:
    assert cli.main(["keys"]) == 2


def test_a_missing_engine_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_an_engine.py").write_text("raise ModuleNotFoundError('no vllm', name='vllm')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(cli.UsageError, match=r"vllm is not installed.*scripts/install\.py"):
        cli._import("needs_an_engine")


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "braid", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"braid {__version__}\n"


@pytest.mark.parametrize("argv", [["router"], ["version"], ["--help"], ["up", "--help"]])
def test_the_command_line_imports_no_engine(argv: list[str]) -> None:
    program = f"""
import sys
from braid import cli
try:
    cli.parse({argv!r})
except SystemExit:
    pass
assert not {{"torch", "vllm", "transformers", "zmq"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
