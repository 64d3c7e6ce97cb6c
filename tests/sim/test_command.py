"""`--engine sim` on the command line, and what a simulated worker may not be taken for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from braid import cli
from braid.settings import DecodeSettings, PrefillSettings
from braid.sim.settings import SimSettings
from deploy.local import Cluster, UpSettings
from deploy.placement import Hardware

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_a_simulated_worker_needs_no_model() -> None:
    parsed = cli.parse(["decode", "--engine", "sim", "--sim-workers", "64", "--sim-time-scale", "0.5"])
    assert isinstance(parsed.settings, DecodeSettings)
    assert (parsed.settings.sim_workers, parsed.settings.sim_time_scale) == (64, 0.5)
    assert isinstance(cli.parse(["prefill", "--engine=sim"]).settings, PrefillSettings)


def test_workers_of_both_roles_in_one_process() -> None:
    settings = cli.parse(["sim", "--prefill", "8", "--decode", "64", "--lease-s", "5"]).settings
    assert isinstance(settings, SimSettings)
    assert (settings.engine, settings.prefill, settings.decode, settings.lease_s) == ("sim", 8, 64, 5.0)


def test_help_of_sim_shows_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["sim", "--help"])
    assert "--sim-accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        (["decode", "--engine", "sim", "--served-model-name", "llama"], "must begin with `sim`"),
        (["decode", "--engine", "sim", "--", "--dtype", "float32"], "takes nothing after --"),
        (["decode", "--engine", "sim", "--sim-blocks", "4"], "do not hold one sequence"),
        (["decode"], "model is required"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(argv: list[str], advice: str) -> None:
    with pytest.raises(cli.UsageError, match=advice):
        cli.parse(argv)


def test_simulated_workers_start_without_an_engine() -> None:
    program = """
import sys
import braid.sim.serve, prefill_server.main, decode_server.main
loaded = {"torch", "vllm", "transformers", "numpy"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_up_runs_all_simulated_workers_in_one_process(tmp_path: Path) -> None:
    settings = UpSettings(engine="sim", prefill=4, decode=64, run_dir=tmp_path, max_model_len=4096)
    cluster = Cluster(settings, hardware=Hardware((0, 1)))
    router, workers = cluster.plans("tcp://127.0.0.1:9")
    assert (router.name, workers.name, cluster.model) == ("router", "sim", "sim")
    parsed = cli.parse(workers.argv[3:]).settings
    assert isinstance(parsed, SimSettings)
    assert (parsed.prefill, parsed.decode, parsed.sim_max_model_len) == (4, 64, 4096)
    assert (parsed.router, parsed.served_model_name) == ("tcp://127.0.0.1:9", "sim")


@pytest.mark.parametrize(("there", "complete"), [(2, True), (1, False)])
def test_up_waits_for_every_simulated_worker(tmp_path: Path, there: int, complete: bool) -> None:
    cluster = Cluster(UpSettings(engine="sim", prefill=1, decode=2, run_dir=tmp_path))
    names = ["sim-prefill-0", *(f"sim-decode-{i}" for i in range(there))]
    state = {"workers": [{"worker": name} for name in names]}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=state))
    with httpx.Client(transport=transport) as client:
        assert cluster._complete(client) is complete
