"""The container files: they copy what exists, run as nobody, and fit the chart."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "containers"
IMAGES = ("router", "worker")
COPIED_FROM_CONTEXT = re.compile(r"^COPY (?!--from)(.+) \S+$", re.MULTILINE)

# Imports modules from a folder; prints what came from the project's other folders, and engine modules.
PROBE = """
import importlib, json, sys
root, folder, *modules = sys.argv[1:]
sys.path.insert(0, folder)
for name in modules:
    importlib.import_module(name)
files = {name: str(getattr(module, "__file__", None)) for name, module in list(sys.modules.items())}
foreign = [n for n, f in files.items() if f.startswith(root + "/") and "site-packages" not in f]
print(json.dumps(foreign + [n for n in files if n in ("torch", "vllm")]))
"""


def dockerfile(image: str) -> str:
    return (FOLDER / f"Dockerfile.{image}").read_text(encoding="utf-8")


def copied(image: str) -> list[str]:
    """Paths of the build context that an image copies."""
    return [path for paths in COPIED_FROM_CONTEXT.findall(dockerfile(image)) for path in paths.split()]


def values() -> dict[str, object]:
    loaded: dict[str, object] = yaml.safe_load((ROOT / "deploy/chart/braid/values.yaml").read_text())
    return loaded


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_exists_and_is_in_the_build_context(image: str) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in copied(image):
        assert (ROOT / path).exists(), path
        assert path in kept, path


@pytest.mark.parametrize("image", IMAGES)
def test_the_last_stage_runs_as_the_user_of_the_chart(image: str) -> None:
    last = dockerfile(image).rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.+)$", last, re.MULTILINE) == ["10001:10001"]
    helpers = (ROOT / "deploy/chart/braid/templates/_helpers.tpl").read_text()
    assert "runAsUser: 10001" in helpers


@pytest.mark.parametrize("image", IMAGES)
def test_the_entry_point_is_the_command_whose_arguments_the_chart_gives(image: str) -> None:
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", dockerfile(image), re.MULTILINE)
    assert json.loads(entry)[-1] == "braid"


def test_the_default_model_of_the_chart_is_in_the_worker_image() -> None:
    model = values()["model"]
    assert isinstance(model, dict)
    assert f"COPY demo/model {model['path']}" in dockerfile("worker")


def test_each_flavor_of_the_chart_has_a_stage() -> None:
    stages = re.findall(r"^FROM base AS base-(\w+)$", dockerfile("worker"), re.MULTILINE)
    schema = json.loads((ROOT / "deploy/chart/braid/values.schema.json").read_text())
    assert sorted(stages) == sorted(schema["properties"]["flavor"]["enum"])


@pytest.mark.parametrize(
    ("image", "modules"),
    [
        ("router", ["braid.cli", "braid.keys", "router.main"]),
        ("worker", ["braid.cli", "braid.keys", "prefill_server.main", "decode_server.main"]),
    ],
)
def test_an_image_has_what_its_processes_import(image: str, modules: list[str], tmp_path: Path) -> None:
    for path in copied(image):
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, tmp_path / path, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, str(ROOT), str(tmp_path), *modules],
        cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
