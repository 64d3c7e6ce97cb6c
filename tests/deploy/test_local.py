"""The life of a local cluster, with small processes in the place of router and engines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from deploy import guard
from deploy.local import (
    Cluster,
    ClusterError,
    Model,
    Plan,
    Role,
    UpSettings,
    demo_model,
    free_port,
    further,
)
from deploy.placement import Hardware
from deploy.progress import Progress, last_event
from deploy.up import StopFlag, Supervisor, banner, main

ROUTER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"workers": [{"worker": "decode-0"}]}).encode())
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# A worker that ignores SIGTERM and has a child of its own, as an engine that loads.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""
CLEAN = """
import signal, sys, time
def end(*_):
    print("clean", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(600)
"""
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
FAILING = "import sys; sys.exit('No module named \\'vllm\\'')"


class FakeCluster(Cluster):
    """A cluster whose processes run the given programs."""

    def __init__(
        self,
        run_dir: Path,
        programs: dict[str, str] | None = None,
        port: int = 0,
        nice: dict[str, int] | None = None,
    ) -> None:
        super().__init__(UpSettings(run_dir=run_dir, port=port), hardware=Hardware((0, 1)))
        self._programs = programs or {"router": ROUTER, "decode-0": SLEEPER}
        self._nice = nice or {}

    def plans(self, link: str) -> list[Plan]:
        found = []
        for name, program in self._programs.items():
            role: Role = "router" if name == "router" else "decode"
            found.append(
                Plan(name, role, (sys.executable, "-c", program, str(self.port)), {}, self._nice.get(name, 0))
            )
        return found


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")
    except FileNotFoundError:
        return True


def until(condition: Callable[[], object], timeout: float = 20) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_start_ready_stop(tmp_path: Path) -> None:
    with FakeCluster(tmp_path) as cluster:
        cluster.wait_ready(20)
        state = json.loads(cluster.state_file.read_text())
        pids = cluster.pids
        assert state["url"] == cluster.url
        assert {p["name"]: p["pid"] for p in state["processes"]} == pids
        assert all(os.getpgid(pid) == pid for pid in pids.values())
    assert all(gone(pid) for pid in pids.values())
    assert not cluster.state_file.exists()


def test_stop_may_be_repeated(tmp_path: Path) -> None:
    cluster = FakeCluster(tmp_path).start()
    cluster.stop(grace_s=0)
    cluster.stop()


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.local.WORKER_END_S", 0.5)
    cluster = FakeCluster(tmp_path, {"router": ROUTER, "decode-0": STUBBORN}).start()
    log = tmp_path / "decode-0.log"
    until(lambda: log.read_text().startswith("child "))
    child = int(log.read_text().split()[1])
    cluster.wait_ready(20)
    cluster.stop()
    until(lambda: gone(child))


def launched(
    run_dir: Path, programs: dict[str, str], grace_s: float = 60.0
) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A launcher of its own process, and its processes' ids."""
    program = f"""
from tests.deploy import test_local
from pathlib import Path
import deploy.local, time
deploy.local.WORKER_END_S = {grace_s}
cluster = test_local.FakeCluster(Path({str(run_dir)!r}), {programs!r})
cluster.settings = cluster.settings.model_copy(update={{"drain_s": 0.0}})
cluster.start()
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program])
    state = run_dir / "cluster.json"
    until(lambda: state.exists() and state.read_text().endswith("}\n"))
    pids = [p["pid"] for p in json.loads(state.read_text())["processes"]]
    # Tied to the launcher once exec has replaced deploy/child.py.
    until(lambda: all("child.py" not in Path(f"/proc/{pid}/cmdline").read_text() for pid in pids))
    return launcher, pids


def kill(launcher: subprocess.Popen[bytes]) -> None:
    launcher.kill()
    launcher.wait()


def test_a_killed_launcher_takes_its_processes_along(tmp_path: Path) -> None:
    launcher, pids = launched(tmp_path, {"router": ROUTER, "decode-0": SLEEPER})
    kill(launcher)
    until(lambda: all(gone(pid) for pid in pids))


def test_a_killed_launcher_leaves_no_stopped_process(tmp_path: Path) -> None:
    """It goes on, and ends as the launcher's death bids it."""
    log = tmp_path / "decode-0.log"
    launcher, [pid] = launched(tmp_path, {"decode-0": CLEAN})
    try:
        until(lambda: log.read_text() == "up\n")
        os.kill(pid, signal.SIGSTOP)
        kill(launcher)
        until(lambda: gone(pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert log.read_text() == "up\nclean\n"


def test_a_killed_launcher_leaves_no_process_that_ignores_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "decode-0.log"
    launcher, [pid] = launched(tmp_path, {"decode-0": STUBBORN}, grace_s=0.5)
    try:
        until(lambda: log.read_text().endswith("\n"))
        child = int(log.read_text().split()[1])
        kill(launcher)
        until(lambda: gone(pid) and gone(child))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def test_a_guard_kills_no_stranger() -> None:
    """A number may have gone to another process: the one that began later is left alone."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True) as stranger:
        try:
            begun = iter(["1 earlier"])
            with pytest.MonkeyPatch.context() as patch:
                real = guard._begun
                patch.setattr(guard, "_begun", lambda pid: next(begun, "") or real(pid))
                guard.main([str(stranger.pid)], 0.0)
            assert not gone(stranger.pid)
        finally:
            stranger.kill()


def test_a_process_that_ends_while_starting_is_explained(tmp_path: Path) -> None:
    programs = {"router": SLEEPER, "decode-0": FAILING}
    with (
        FakeCluster(tmp_path, programs) as cluster,
        pytest.raises(ClusterError, match=r"decode-0 ended with exit code 1(.|\n)*make install"),
    ):
        cluster.wait_ready(20)


def test_a_cluster_is_ready_when_the_router_knows_all_workers(tmp_path: Path) -> None:
    programs = {"router": ROUTER, "decode-0": SLEEPER, "decode-1": SLEEPER}
    with FakeCluster(tmp_path, programs) as cluster, pytest.raises(ClusterError, match="not ready"):
        cluster.wait_ready(2)


def test_a_router_that_wants_a_key_is_believed(tmp_path: Path) -> None:
    router = ROUTER.replace("send_response(200)", "send_response(200 if self.path == '/ready' else 401)")
    with FakeCluster(tmp_path, {"router": router, "decode-1": SLEEPER}) as cluster:
        cluster.wait_ready(20)


def test_a_start_that_takes_too_long_shows_the_logs(tmp_path: Path) -> None:
    programs = {"router": SLEEPER}
    with (
        FakeCluster(tmp_path, programs) as cluster,
        pytest.raises(ClusterError, match=r"not ready after 1 s"),
    ):
        cluster.wait_ready(1)


def test_a_busy_port_is_named_with_a_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port {port}.*--port"):
            FakeCluster(tmp_path, port=port).start()


def test_two_clusters_in_one_folder_are_refused(tmp_path: Path) -> None:
    with FakeCluster(tmp_path), pytest.raises(ClusterError, match="--run-dir"):
        FakeCluster(tmp_path).start()


def test_the_folder_is_free_again_after_a_failed_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ClusterError):
        FakeCluster(tmp_path, port=taken.getsockname()[1]).start()
    FakeCluster(tmp_path).start().stop(grace_s=0)


def test_a_worker_that_ends_is_started_again_with_backoff(tmp_path: Path) -> None:
    with FakeCluster(tmp_path) as cluster:
        supervisor = Supervisor(cluster)
        first = cluster.pids["decode-0"]
        now, delays = 0.0, []
        for _ in range(3):
            before = cluster.pids["decode-0"]
            os.kill(before, signal.SIGKILL)
            assert cluster.wait_end("decode-0") == -signal.SIGKILL
            supervisor.step(now)
            due = now
            while cluster.pids["decode-0"] == before:
                due += 0.5
                supervisor.step(due)
            delays.append(due - now)
            now = due
        assert delays == [1.0, 2.0, 4.0]
        assert cluster.pids["decode-0"] != first


def test_a_worker_that_lived_long_starts_again_at_once(tmp_path: Path) -> None:
    with FakeCluster(tmp_path) as cluster:
        supervisor = Supervisor(cluster)
        for now in (0.0, 100.0):
            pid = cluster.pids["decode-0"]
            os.kill(pid, signal.SIGKILL)
            cluster.wait_end("decode-0")
            supervisor.step(now)
            supervisor.step(now + 1)
            assert cluster.pids["decode-0"] != pid


def test_the_end_of_the_router_is_the_end(tmp_path: Path) -> None:
    with FakeCluster(tmp_path) as cluster:
        os.kill(cluster.pids["router"], signal.SIGKILL)
        cluster.wait_end("router")
        with pytest.raises(ClusterError, match="router was killed by SIGKILL"):
            Supervisor(cluster).step(0)


def test_waiting_for_a_process_that_runs_on_times_out(tmp_path: Path) -> None:
    with FakeCluster(tmp_path) as cluster, pytest.raises(TimeoutError):
        cluster.wait_end("decode-0", 0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_where_it_is_asked_for(number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    flag = StopFlag()
    flag.install()
    try:
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            flag.raise_if_set()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(number, previous)


@pytest.mark.slow
def test_ctrl_c_while_engines_load_ends_everything_with_0(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "braid", "up", "--run-dir", str(tmp_path), "--port", str(free_port())]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    state = tmp_path / "cluster.json"
    until(state.exists, 60)
    until(lambda: state.read_text().endswith("}\n"))
    pids = [p["pid"] for p in json.loads(state.read_text())["processes"]]
    launcher.send_signal(signal.SIGINT)
    output = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 0
    assert "Stopping" in output
    assert all(gone(pid) for pid in pids)


def test_a_cluster_that_can_not_start_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeCluster(tmp_path):
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        assert main(UpSettings(run_dir=tmp_path), []) == 1
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "braid up: another cluster runs" in capsys.readouterr().err


def plans(tmp_path: Path, hardware: Hardware, *engine_args: str, **fields: object) -> dict[str, Plan]:
    """What a cluster with these settings would start."""
    settings = UpSettings.model_validate({"run_dir": tmp_path, **fields})
    cluster = Cluster(settings, engine_args, hardware=hardware)
    return {plan.name: plan for plan in cluster.plans("tcp://127.0.0.1:9")}


def test_the_plan_on_cpus(tmp_path: Path) -> None:
    found = plans(tmp_path, Hardware((0, 1)), "--max-num-seqs", "8", decode=2)
    assert list(found) == ["router", "prefill-0", "decode-0", "decode-1"]
    engine = " ".join(found["decode-1"].argv)
    assert "--served-model-name demo" in engine
    assert "--dtype float32 --max-num-batched-tokens 512 --enforce-eager --max-num-seqs 8" in engine
    assert found["decode-1"].env["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert found["decode-1"].env["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("cores", "fields", "workers"),
    [
        (2, {}, 1),
        (3, {}, 2),
        (3, {"also": ["org/other"]}, 1),
        (5, {"also": ["org/other"], "also_prefill": True}, 2),
        (4, {"also": ["org/other"], "also_prefill": True}, 1),
        (2, {"engine": "sim"}, 2),
        (2, {"decode": 3}, 3),
    ],
)
def test_unasked_a_second_decode_worker_starts_where_it_shares_no_core(
    tmp_path: Path, cores: int, fields: dict[str, object], workers: int
) -> None:
    settings = UpSettings.model_validate({"run_dir": tmp_path, **fields})
    assert Cluster(settings, hardware=Hardware(tuple(range(cores)))).decode == workers


def test_the_plan_on_gpus(tmp_path: Path) -> None:
    found = plans(tmp_path, Hardware((0,), gpus=3), model="org/name", decode=1)
    assert "--dtype auto" in " ".join(found["decode-0"].argv)
    assert "--enforce-eager" not in found["decode-0"].argv
    assert "HF_HUB_OFFLINE" not in found["decode-0"].env
    assert "--served-model-name name" in " ".join(found["decode-0"].argv)


def test_every_planned_command_is_one_our_command_line_takes(tmp_path: Path) -> None:
    from braid import cli

    for plan in plans(tmp_path, Hardware((0, 1)), max_model_len=2048, also=ALSO).values():
        assert plan.argv[1:3] == ("-m", "braid")
        assert cli.parse(plan.argv[3:]).command == plan.role


ALSO = ["demo/small=little", "org/other"]


def test_each_further_model_has_a_decode_worker_and_computes_its_prompts(tmp_path: Path) -> None:
    found = plans(tmp_path, Hardware((0, 1)), also=ALSO, decode=2)
    assert list(found) == ["router", "prefill-0", "decode-0", "decode-1", "decode-2", "decode-3"]
    router = " ".join(found["router"].argv)
    assert "--model-order little,other,demo" in router
    assert "--local-models little,other" in router
    assert "--model demo/small --port 0 --served-model-name little" in " ".join(found["decode-2"].argv)
    assert "--served-model-name demo" in " ".join(found["decode-1"].argv)
    assert "HF_HUB_OFFLINE" not in found["decode-3"].env
    assert {plan.env.get("VLLM_CPU_OMP_THREADS_BIND") for plan in found.values()} == {None, "0", "1"}


def test_further_models_may_have_prefill_workers(tmp_path: Path) -> None:
    found = plans(
        tmp_path, Hardware(tuple(range(8))), also=ALSO[:1], also_prefill=True, model_order=["a", "b"]
    )
    assert list(found) == ["router", "prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
    assert "--local-models" not in found["router"].argv
    assert "--model-order a,b" in " ".join(found["router"].argv)
    assert "--served-model-name little" in " ".join(found["prefill-1"].argv)
    cores = [plan.env["VLLM_CPU_OMP_THREADS_BIND"] for name, plan in found.items() if name != "router"]
    assert len(set(cores)) == 5


def test_the_command_line_takes_further_models_once_or_several_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from braid import cli

    for argv in (["--also", "a=x,b=y"], ["--also", "a=x", "--also", "b=y"]):
        settings = cli.parse(["up", *argv]).settings
        assert isinstance(settings, UpSettings)
        assert settings.also == ("a=x", "b=y")
    monkeypatch.setenv("BRAID_CONFIG", str(tmp_path / "braid.toml"))
    (tmp_path / "braid.toml").write_text('[up]\nalso = ["a=x", "b=y"]\n')
    settings = cli.parse(["up"]).settings
    assert isinstance(settings, UpSettings)
    assert settings.also == ("a=x", "b=y")
    with pytest.raises(cli.UsageError, match="simulated"):
        cli.parse(["up", "--engine", "sim", "--also", "a"])


def test_the_small_demo_model_has_a_name_of_its_own() -> None:
    assert further("demo-small") == Model(str(demo_model("small")), "demo-small")
    assert further("demo-small=s").name == "s"


@pytest.mark.parametrize("also", [["x/demo"], ["a=s", "b=s"], ["=s"]])
def test_models_that_are_called_the_same_or_nothing_are_refused(tmp_path: Path, also: list[str]) -> None:
    with pytest.raises(ClusterError, match=r"--also PATH|takes PATH"):
        plans(tmp_path, Hardware((0, 1)), also=also)


def test_the_banner_shows_commands_for_this_cluster(tmp_path: Path) -> None:
    cluster = Cluster(UpSettings(run_dir=tmp_path), hardware=Hardware((0,)))
    cluster.port = 8123
    assert "curl http://127.0.0.1:8123/v1/chat/completions" in banner(cluster)
    assert "ask --url http://127.0.0.1:8123" in banner(cluster)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_who_is_up(tmp_path: Path, terminal: bool) -> None:
    with (tmp_path / "shown").open("w+") as shown, FakeCluster(tmp_path) as cluster:
        console = Console(file=shown, force_terminal=terminal, width=100)
        cluster.wait_ready(20)
        with Progress(cluster, console) as progress:
            progress.update()
        shown.seek(0)
        text = shown.read()
    assert "decode-0" in text
    assert "started in" in text


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"event": "engine_starting", "ts": 1}', "engine_starting"),
        ("(EngineCore pid=1) INFO [core.py:402] loading [1/2]", "loading (1/2]"),
        ("", ""),
    ],
)
def test_the_last_event_of_a_log(tmp_path: Path, line: str, shown: str) -> None:
    (tmp_path / "log").write_text(line + "\n")
    assert last_event(tmp_path / "log") == shown


def test_a_cache_is_of_whole_gibibytes() -> None:
    """vLLM reads an integer: half of one ended every engine at its start."""
    with pytest.raises(ValidationError, match="kv_cache_gib"):
        UpSettings(kv_cache_gib=0.5)  # type: ignore[arg-type]


def test_engines_on_the_routers_cores_give_way_to_it(tmp_path: Path) -> None:
    cluster = FakeCluster(tmp_path, nice={"decode-0": 3})
    with cluster:
        router, engine = cluster.pids["router"], cluster.pids["decode-0"]
        own = os.getpriority(os.PRIO_PROCESS, 0)
        until(lambda: os.getpriority(os.PRIO_PROCESS, engine) == own + 3)
        assert os.getpriority(os.PRIO_PROCESS, router) == own
        if Path("/proc/self/autogroup").exists():
            until(lambda: autogroup(engine).endswith("nice 3"))
            assert autogroup(router) != autogroup(engine)


def autogroup(pid: int) -> str:
    """The group that the kernel schedules a session as, and its niceness."""
    return Path(f"/proc/{pid}/autogroup").read_text().strip()


def test_engines_on_a_cpu_are_nice_and_those_on_a_gpu_are_not(tmp_path: Path) -> None:
    settings = UpSettings(run_dir=tmp_path, engine_nice=7)
    nices = {
        gpus: {
            plan.role: plan.nice for plan in Cluster(settings, hardware=Hardware((0, 1), gpus)).plans("link")
        }
        for gpus in (0, 2)
    }
    assert nices[0] == {"router": 0, "prefill": 7, "decode": 7}
    assert set(nices[2].values()) == {0}
