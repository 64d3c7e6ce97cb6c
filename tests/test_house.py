"""House rules that hold for every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from braid import doctor
from scripts import install

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("braid", "router", "prefill_server", "decode_server", "kvtransfer", "deploy")
GENERATED = {".git", ".venv", "build", "dist", "run", "__pycache__", ".hypothesis", ".coverage"}
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj"}


def sources(*folders: str) -> list[Path]:
    """Python files of these top-level folders."""
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


@cache
def files() -> tuple[tuple[str, str], ...]:
    """Path and text of every file that is not generated."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(p in GENERATED or p.endswith(("_cache", ".egg-info")) for p in parts)
        if hidden or not path.is_file() or path.suffix in {".safetensors", ".png", ".pyc"}:
            continue
        found.append((str(path.relative_to(ROOT)), path.read_text(errors="replace")))
    return tuple(found)


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def roots(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that run code out of data."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in UNSAFE_CALLS or name.split(".")[-1] in UNSAFE_CALLS - {"eval", "exec"}:
            yield name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        for flag in ("allow_pickle", "shell", "trust_remote_code"):
            if keywords.get(flag) == "True":
                yield f"{name}({flag}=True)"


@pytest.mark.parametrize("path", sources(*PRODUCT), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_is_run_out_of_data(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not roots(tree) & UNSAFE_MODULES
    assert not list(unsafe_calls(tree))


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)",
        "socket.recv_pyobj()",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_rule_finds_it(code: str) -> None:
    assert list(unsafe_calls(ast.parse(code)))


def test_a_models_eval_mode_and_safe_loading_are_allowed() -> None:
    assert not list(unsafe_calls(ast.parse("model.eval(); torch.load(f, weights_only=True); re.compile(x)")))


def beside_no_engine() -> list[Path]:
    """Files that run without an engine: `braid/worker` runs in the engine's process."""
    return [p for p in sources("router", "braid") if not p.is_relative_to(ROOT / "braid" / "worker")]


@pytest.mark.parametrize("path", beside_no_engine(), ids=lambda p: str(p.relative_to(ROOT)))
def test_router_and_vocabulary_import_no_engine(path: Path) -> None:
    assert not roots(ast.parse(path.read_text())) & {"torch", "vllm", "transformers"}


def test_kvtransfer_knows_vllm_in_its_adapter_only() -> None:
    known = {p for p in sources("kvtransfer") if "vllm" in roots(ast.parse(p.read_text()))}
    assert all(p.is_relative_to(ROOT / "kvtransfer" / "adapter") for p in known)


def test_the_product_imports_no_benchmark_and_no_test() -> None:
    for path in sources(*PRODUCT):
        if path != ROOT / "braid" / "cli.py":  # `braid bench` imports its module when it is run
            assert not roots(ast.parse(path.read_text())) & {"benchmarks", "tests"}, path


def test_no_file_names_a_package_index() -> None:
    index = re.compile(r"https?://[^\s\"'<>)]*(?:/simple\b|/whl/|pypi\.org/)[^\s\"'<>)]*")
    found = {(name, url) for name, text in files() for url in index.findall(text)}
    assert {url for _, url in found} <= {install.TORCH_CPU_INDEX}


def test_no_file_names_a_place_of_this_machine() -> None:
    places = {str(ROOT), sys.prefix, *(path for path in pip_places() if len(path) > 4)}
    named = [name for name, text in files() if any(place in text for place in places)]
    assert not named, "these files name a path or address that only this machine has"


def pip_places() -> list[str]:
    """Addresses and folders that this machine's pip is set up with."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"(?:index-url|find-links)='([^']*)'", listed)
    public = "https://pypi.org"
    return [p for value in found for p in re.split(r"\\n|\s+", value) if p and not p.startswith(public)]


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    declared = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert set(re.findall(r"make ([\w-]+)", shown)) >= set(declared)


def project() -> dict[str, list[str]]:
    """Requirements of the core (key empty) and of each extra."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": table["dependencies"], **table["optional-dependencies"]}


def test_every_dependency_says_what_it_is_for() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for requirement in (r for group in project().values() for r in group):
        at = next(i for i, line in enumerate(lines) if line.strip().startswith(f'"{requirement}"'))
        assert "#" in lines[at] or lines[at - 1].strip().startswith("#"), requirement


def test_every_dependency_is_locked() -> None:
    locked = set(re.findall(r"^([a-z0-9-]+)==", install.LOCK.read_text(), re.MULTILINE))
    for requirement in (r for group in project().values() for r in group):
        name = re.split(r"[<>=;\[ ]", requirement)[0].lower()
        assert name in locked, f"{name}: run `make lock`"


def test_every_package_is_installed() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    included = {name.rstrip("*") for name in table["packages"]["find"]["include"]}
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages - {"scripts", "tests"} == included


def test_one_version_of_the_engine_is_meant_everywhere() -> None:
    pinned = [r for group in ("cpu", "cuda") for r in project()[group] if r.startswith("vllm")]
    assert {r.split("==")[1] for r in pinned} == {install.VLLM} == set(doctor.TESTED_VLLM)
    assert f"torch=={doctor.TESTED_TORCH}+cpu" == install.TORCH
    assert f"\ntorch=={doctor.TESTED_TORCH} " in install.LOCK.read_text()
