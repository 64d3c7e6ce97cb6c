"""docs/operations.md names what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from braid.settings import DecodeSettings, PrefillSettings, RouterSettings
from decode_server.metrics import show_seats
from deploy.local import UpSettings
from prefill_server.metrics import EARLY, SENT
from router.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def exported() -> set[str]:
    """Names of every metric of a router and of both kinds of workers, as a scraper sees them."""
    assert {SENT, EARLY, show_seats}  # registered by their import
    lines = (Metrics().render() + generate_latest()).decode().splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE ")}


def test_every_metric_that_is_named_is_exported() -> None:
    named = set(re.findall(r"\bbraid_[a-z_]+\b", TEXT))
    assert len(named) >= 12
    assert named <= exported()


def test_every_header_that_is_named_is_sent() -> None:
    source = "".join((ROOT / "router" / name).read_text(encoding="utf-8") for name in ("proof.py", "http.py"))
    for header in set(re.findall(r"x-(?:braid|request)-[a-z-]+", TEXT)):
        assert f'"{header}"' in source, header


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`--([a-z-]+)`", TEXT))))
def test_every_flag_that_is_named_exists(flag: str) -> None:
    processes = (RouterSettings, PrefillSettings, DecodeSettings, UpSettings)
    fields = {name for process in processes for name in process.model_fields}
    assert flag.replace("-", "_") in fields


def test_every_path_that_is_named_exists() -> None:
    for path in set(re.findall(r"\bdeploy/[\w./-]+", TEXT)):
        assert (ROOT / path).exists(), path


def test_the_ports_are_those_of_the_manifest() -> None:
    manifest = (ROOT / "deploy/chart/rendered/default.yaml").read_text(encoding="utf-8")
    documents = [d for d in yaml.safe_load_all(manifest) if d and d["kind"] == "Deployment"]
    containers = [c for d in documents for c in d["spec"]["template"]["spec"]["containers"]]
    ports = {str(port["containerPort"]) for container in containers for port in container["ports"]}
    assert set(re.findall(r"^\| (\d{4}) \|", TEXT, re.MULTILINE)) == ports
