"""Settings: flags win over variables, variables over the file; what is unknown is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from braid import cli
from braid.settings import DecodeSettings, ProcessSettings, RouterSettings, is_loopback


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file that `BRAID_CONFIG` names."""
    path = tmp_path / "braid.toml"
    path.write_text("[router]\nqueue_limit = 1\nmax_n = 11\n[decode]\nmodel = 'm'\n")
    monkeypatch.setenv("BRAID_CONFIG", str(path))
    return path


def parse(*argv: str) -> ProcessSettings:
    settings = cli.parse(argv).settings
    assert settings is not None
    return settings


@pytest.mark.usefixtures("config")
def test_the_file_gives_defaults() -> None:
    settings = parse("router")
    assert isinstance(settings, RouterSettings)
    assert (settings.queue_limit, settings.max_n) == (1, 11)


@pytest.mark.usefixtures("config")
def test_a_variable_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_QUEUE_LIMIT", "2")
    assert vars(parse("router"))["queue_limit"] == 2


@pytest.mark.usefixtures("config")
def test_a_flag_wins_over_variable_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_QUEUE_LIMIT", "2")
    assert vars(parse("router", "--queue-limit", "3"))["queue_limit"] == 3


@pytest.mark.usefixtures("config")
def test_each_process_reads_its_own_table() -> None:
    assert vars(parse("decode"))["model"] == "m"


def test_an_unknown_key_of_the_file_is_refused(config: Path) -> None:
    config.write_text("[router]\nqueue_limt = 1\n")
    with pytest.raises(cli.UsageError, match=r"unknown key 'queue_limt'.*did you mean queue_limit\?"):
        parse("router")


def test_a_wrong_value_in_the_file_is_named(config: Path) -> None:
    config.write_text("[router]\nport = 'web'\n")
    with pytest.raises(cli.UsageError, match="port is 'web'"):
        parse("router")


@pytest.mark.parametrize("text", ["router = 3\n", "[router\n", "[ruter]\n"])
def test_a_broken_file_is_said(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(cli.UsageError, match="settings file"):
        parse("router")


def test_a_missing_file_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BRAID_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(cli.UsageError, match="not a file"):
        parse("router")


def test_every_number_of_seconds_has_a_bound() -> None:
    for name in ("queue_timeout_s", "request_timeout_s", "prefill_timeout_s"):
        with pytest.raises(cli.UsageError, match=name):
            parse("router", f"--{name.replace('_', '-')}", "0")


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:1", "tcp://localhost:1", "ipc:///x", "127.0.0.1", "::1"]
)
def test_loopback_needs_no_keys(endpoint: str) -> None:
    assert is_loopback(endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:1", "tcp://*:1", "tcp://10.0.0.1:1", "example.org"])
def test_other_addresses_do(endpoint: str) -> None:
    assert not is_loopback(endpoint)


def test_an_open_endpoint_is_allowed_with_keys(tmp_path: Path) -> None:
    settings = parse("prefill", "--model", "m", "--kv-bind", "tcp://0.0.0.0:*", "--keys-dir", str(tmp_path))
    assert settings.keys_dir == tmp_path


def test_a_transport_without_encryption_is_refused_beside_keys_unless_wanted(tmp_path: Path) -> None:
    flags = ["--model", "m", "--keys-dir", str(tmp_path), "--kv-transports", "nixl,zmq"]
    with pytest.raises(cli.UsageError, match="kv_plaintext"):
        parse("decode", *flags)
    settings = parse("decode", *flags, "--kv-plaintext")
    assert isinstance(settings, DecodeSettings)
    assert settings.kv_transports == ("nixl", "zmq")
