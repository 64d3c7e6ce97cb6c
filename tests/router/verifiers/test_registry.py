"""Verifiers and retrievers by name, from the operator's settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from braid import cli
from braid.errors import BadRequest
from braid.settings import RouterSettings
from router.metrics import Metrics
from router.retrievers import Retrievers
from router.verifiers import GenerativeVerifier, Verifiers

pytestmark = pytest.mark.slow


def settings(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> RouterSettings:
    path = folder / "braid.toml"
    path.write_text(text)
    monkeypatch.setenv("BRAID_CONFIG", str(path))
    parsed = cli.parse(["router"]).settings
    assert isinstance(parsed, RouterSettings)
    return parsed


def test_some_need_no_configuration() -> None:
    verifiers = Verifiers({}, Metrics())
    assert verifiers.names == ("self", "arithmetic", "logprob")
    assert [verifiers.get(name).name for name in verifiers.names] == list(verifiers.names)


def test_an_unknown_one_is_refused_with_the_list() -> None:
    with pytest.raises(BadRequest, match="self, arithmetic, logprob"):
        Verifiers({}, Metrics()).get("http://evil")


async def test_tables_of_the_file_are_verifiers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = """
        [router.verifiers.judge]
        kind = "generative"
        model = "big"
        k = 8
        yes = ["correct"]
        no = ["incorrect"]
        [router.verifiers.self]
        kind = "generative"
        max_tokens = 64
        [router.verifiers.tests]
        kind = "http"
        url = "https://checks.internal:8443/v1/check?x=1"
        [router.verifiers.rm]
        kind = "score"
        url = "http://10.0.0.7:8000/pooling"
        api = "pooling"
        activation = "sigmoid"
        [router.verifiers.sums]
        kind = "check"
        [router.retrievers.wiki]
        url = "http://search.internal/find"
    """
    parsed = settings(monkeypatch, tmp_path, text)
    verifiers = Verifiers(parsed.verifiers, Metrics())
    retrievers = Retrievers(parsed.retrievers, Metrics())
    assert verifiers.names == ("self", "arithmetic", "logprob", "judge", "tests", "rm", "sums")
    judge, own = verifiers.get("judge"), verifiers.get("self")
    assert isinstance(judge, GenerativeVerifier)
    assert isinstance(own, GenerativeVerifier)
    assert (judge.settings.model, judge.settings.k, own.settings.max_tokens) == ("big", 8, 64)
    assert retrievers.get(None).name == "wiki"
    told = json.dumps([verifiers.describe(), retrievers.describe()])
    assert "internal" not in told
    assert "10.0" not in told
    await verifiers.aclose()
    await retrievers.aclose()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('kind = "magic"', "verifiers.judge"),
        ('url = "http://x/"', "verifiers.judge"),
        ('kind = "http"', "url"),
        ('kind = "http"\nurl = "ftp://x/"', "http or https"),
        ('kind = "http"\nurl = "http://"', "http or https"),
        ('kind = "http"\nurl = "http://x:port/"', "url|ort"),
        ('kind = "http"\nurl = "http://me:secret@x/"', "bearer_env"),
        ('kind = "http"\nurl = "http://x/"\nurll = 1', "verifiers.judge.http.urll"),
        ('kind = "http"\nurl = "http://x/"\ntimeout_s = 0', "timeout_s"),
        ('kind = "http"\nurl = "http://x/"\nbearer_env = "not a name"', "bearer_env"),
        ('kind = "generative"\nk = 0', "k"),
        ('kind = "generative"\nk = 4\ntemperature = 0', "all the same"),
        ('kind = "generative"\nyes = ["Yes"]\nno = ["yes"]', "both"),
        ('kind = "generative"\nyes = []', "yes"),
    ],
)
def test_a_wrong_table_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: str, said: str
) -> None:
    with pytest.raises(cli.UsageError, match=said):
        settings(monkeypatch, tmp_path, f"[router.verifiers.judge]\n{table}\n")


@pytest.mark.parametrize("name", ["Judge", "1st", "a b", "x" * 65])
def test_a_wrong_name_is_refused_at_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    with pytest.raises(cli.UsageError, match="verifiers"):
        settings(monkeypatch, tmp_path, f'[router.verifiers."{name}"]\nkind = "check"\n')


def test_a_variable_or_flag_gives_them_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, Any] = {"sums": {"kind": "check"}}
    parsed = cli.parse(["router", "--verifiers", json.dumps(table)]).settings
    assert isinstance(parsed, RouterSettings)
    assert set(parsed.verifiers) == {"sums"}
    monkeypatch.setenv("BRAID_VERIFIERS", json.dumps(table))
    parsed = cli.parse(["router"]).settings
    assert isinstance(parsed, RouterSettings)
    assert set(parsed.verifiers) == {"sums"}
    with pytest.raises(cli.UsageError, match="verifiers"):
        cli.parse(["router", "--verifiers", "{"])


def test_a_router_without_services_does_not_load_an_http_client() -> None:
    check = "import sys, router.app; from braid.settings import RouterSettings as S; router.app.App(S()); "
    check += "sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("module", ["router.verifiers", "router.verifiers.generative", "router.retrievers"])
def test_each_part_can_be_imported_first(module: str) -> None:
    check = f"import {module}, router.strategies"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
