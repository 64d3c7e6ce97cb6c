"""The chart: what it renders is what our own command line takes, and it is safe by default."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from braid import __version__, cli
from braid.settings import DecodeSettings, PrefillSettings, ProcessSettings, RouterSettings, is_loopback

helm_python = pytest.importorskip("helm_python")

from deploy.chart.render import CHART, DEFAULT, DEFAULT_VALUES, default_manifest, render  # noqa: E402

COMPONENT = "app.kubernetes.io/component"
DOWNWARD = {"POD_NAME": "braid-prefill-6d5f-x2x9z", "POD_IP": "10.1.2.3"}

CUDA: Mapping[str, Any] = {
    "flavor": "cuda",
    "image": {"registry": "registry.example.com/team/", "pullSecrets": [{"name": "pull"}]},
    "keys": {"existingSecret": "my-keys"},
    "apiKeys": {"existingSecret": "clients"},
    "model": {
        "path": "/models/Qwen3 8B",
        "servedName": "qwen",
        "volume": {"persistentVolumeClaim": {"claimName": "models"}},
    },
    "engine": {"blockSize": 16, "tensorParallelSize": 2, "args": ["--max-model-len", "8192"]},
    "router": {"args": ["--spread=spread", "--no-verify-pairs"], "drainSeconds": 120},
    "prefill": {
        "stagingBytes": 68719476736,
        "engineArgs": ["--max-num-batched-tokens", "16384"],
    },
    "decode": {"args": ["--max-load-share=0.25"], "drainSeconds": 600},
}
ALSO: Mapping[str, Any] = {
    "keys": {"existingSecret": "my-keys"},
    "router": {"args": ["--model-order=demo-small,demo,other"]},
    "also": [
        {
            "name": "small",
            "model": {"path": "/opt/braid/demo/small", "servedName": "demo-small"},
            "decode": {"replicas": 3, "drainSeconds": 60},
        },
        {
            "name": "other",
            "model": {"path": "/models/other", "servedName": "other"},
            "engine": {"args": ["--max-model-len", "4096"]},
            "prefill": {"replicas": 1},
        },
    ],
}
SCALED: Mapping[str, Any] = {
    "minReplicas": 1,
    "enabled": True,
    "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization"}}}],
}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Values with the keys secret of the default, overlaid by `parts`."""
    values: dict[str, Any] = dict(DEFAULT_VALUES)
    for part in parts:
        values.update(part)
    return values


def documents(values: Mapping[str, Any] = DEFAULT_VALUES) -> list[dict[str, Any]]:
    """Every object of the rendered chart."""
    texts = [text for name, text in render(values).items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(kind: str, values: Mapping[str, Any] = DEFAULT_VALUES) -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d for d in documents(values) if d["kind"] == kind}


def templates(values: Mapping[str, Any] = DEFAULT_VALUES) -> dict[str, dict[str, Any]]:
    """Pod templates by component."""
    found = [workload["spec"]["template"] for workload in of_kind("Deployment", values).values()]
    return {template["metadata"]["labels"][COMPONENT]: template for template in found}


def pods(values: Mapping[str, Any] = DEFAULT_VALUES) -> dict[str, dict[str, Any]]:
    """Pod specs by component."""
    return {role: template["spec"] for role, template in templates(values).items()}


def argv(pod: Mapping[str, Any]) -> list[str]:
    """A container's arguments as the kubelet passes them: `$(NAME)` replaced by the container's variables."""
    (container,) = pod["containers"]
    fields = {e["name"]: DOWNWARD.get(e["name"], e.get("value")) for e in container.get("env", [])}
    return [re.sub(r"\$\((\w+)\)", lambda match: str(fields[match[1]]), arg) for arg in container["args"]]


def parsed(pod: Mapping[str, Any]) -> tuple[ProcessSettings, list[str]]:
    """Settings of a process and what goes on to vLLM, as `braid` reads the container's arguments."""
    command = cli.parse(argv(pod))
    assert command.settings is not None
    return command.settings, list(command.rest)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BRAID_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("values", [DEFAULT_VALUES, CUDA], ids=["default", "cuda"])
def test_the_command_line_takes_the_arguments_of_every_container(values: Mapping[str, Any]) -> None:
    found = pods(values)
    assert sorted(found) == ["decode", "prefill", "router"]
    for role, pod in found.items():
        settings, engine = parsed(pod)
        assert settings.host == "0.0.0.0"
        assert settings.keys_dir == Path("/etc/braid/keys")
        assert (role == "router") == (engine == [])


def test_further_models_have_pools_of_their_own() -> None:
    found = pods(ALSO)
    assert sorted(found) == ["decode", "decode-other", "decode-small", "prefill", "prefill-other", "router"]
    router, _ = parsed(found["router"])
    assert isinstance(router, RouterSettings)
    assert (router.model_order, router.local_models) == (("demo-small", "demo", "other"), ("demo-small",))
    models = {}
    for component, pod in found.items():
        settings, engine = parsed(pod)
        if isinstance(settings, PrefillSettings | DecodeSettings):
            assert argv(pod)[0] == component.partition("-")[0] == pod["containers"][0]["name"]
            models[component] = (settings.model, settings.served_model_name)
            assert ("4096" in engine) == component.endswith("-other")
    assert models["decode"] == ("/opt/braid/demo/model", "demo")
    assert models["decode-small"] == ("/opt/braid/demo/small", "demo-small")
    assert models["prefill-other"] == ("/models/other", "other")
    replicas = {name: w["spec"].get("replicas") for name, w in of_kind("Deployment", ALSO).items()}
    assert (replicas["braid-decode"], replicas["braid-decode-small"], replicas["braid-decode-other"]) == (
        2,
        3,
        1,
    )
    assert pods(ALSO)["decode-small"]["terminationGracePeriodSeconds"] == 80


def test_further_pools_have_selectors_and_network_rules_of_their_own() -> None:
    labels = {role: t["metadata"]["labels"] for role, t in templates(ALSO).items()}
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"):
        for name, found in of_kind(kind, ALSO).items():
            spec = found["spec"]
            selector = spec.get("selector") or spec["podSelector"]
            selector = selector.get("matchLabels", selector)
            picked = {f"braid-{role}" for role, own in labels.items() if selector.items() <= own.items()}
            assert picked == ({"braid-router"} if name in ("braid", "braid-link") else {name})
    policies = of_kind("NetworkPolicy", ALSO)
    (link,) = [r for r in policies["braid-router"]["spec"]["ingress"] if r["ports"][0]["port"] == "link"]
    peers = {peer["podSelector"]["matchLabels"][COMPONENT] for peer in link["from"]}
    assert peers == set(labels) - {"router"}


def test_a_flag_that_the_command_line_does_not_know_is_refused() -> None:
    values = merged({"router": {"args": ["--no-such-flag"]}})
    with pytest.raises(cli.UsageError, match="--no-such-flag"):
        cli.parse(argv(pods(values)["router"]))


def test_values_reach_the_settings() -> None:
    found = pods(CUDA)
    router, _ = parsed(found["router"])
    prefill, prefill_engine = parsed(found["prefill"])
    decode, decode_engine = parsed(found["decode"])
    assert isinstance(router, RouterSettings)
    assert isinstance(prefill, PrefillSettings)
    assert isinstance(decode, DecodeSettings)
    assert (router.spread, router.verify_pairs, router.drain_s) == ("spread", False, 120)
    assert router.api_keys_file == Path("/etc/braid/api-keys/api-keys")
    assert (prefill.model, prefill.block_size, prefill.staging_bytes) == ("/models/Qwen3 8B", 16, 64 * 2**30)
    assert decode.max_load_share == 0.25
    assert prefill_engine == [
        "--tensor-parallel-size=2", "--max-model-len", "8192", "--max-num-batched-tokens", "16384"
    ]  # fmt: skip
    assert decode_engine == ["--tensor-parallel-size=2", "--max-model-len", "8192"]


def test_only_the_cpu_image_runs_eager() -> None:
    assert "--enforce-eager" in parsed(pods()["decode"])[1]
    assert "--enforce-eager" not in parsed(pods(CUDA)["decode"])[1]


def test_a_prefill_worker_binds_everywhere_and_advertises_its_pod() -> None:
    settings, _ = parsed(pods()["prefill"])
    assert isinstance(settings, PrefillSettings)
    assert (settings.kv_bind, settings.kv_advertise) == ("tcp://0.0.0.0:9200", "10.1.2.3")
    assert not is_loopback(settings.kv_bind)


def test_ranks_of_a_prefill_worker_bind_ports_of_their_own() -> None:
    settings, _ = parsed(pods(CUDA)["prefill"])
    assert isinstance(settings, PrefillSettings)
    assert settings.kv_bind == "tcp://0.0.0.0:*"


def test_workers_name_themselves_after_their_pod_and_link_to_the_router() -> None:
    services = of_kind("Service")
    for role in ("prefill", "decode"):
        settings, _ = parsed(pods()[role])
        assert isinstance(settings, PrefillSettings | DecodeSettings)
        assert settings.worker == DOWNWARD["POD_NAME"]
        host, port = settings.router.removeprefix("tcp://").split(":")
        assert services[host]["spec"]["ports"] == [{"name": "link", "port": int(port), "targetPort": "link"}]


@pytest.mark.parametrize("values", [DEFAULT_VALUES, CUDA], ids=["default", "cuda"])
def test_the_ports_of_containers_are_those_of_their_arguments(values: Mapping[str, Any]) -> None:
    for role, pod in pods(values).items():
        (container,) = pod["containers"]
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        settings, _ = parsed(pod)
        assert isinstance(settings, RouterSettings | PrefillSettings | DecodeSettings)
        assert ports["http"] == settings.port
        if isinstance(settings, RouterSettings):
            assert settings.link.endswith(f":{ports['link']}")
        assert ports.get("kv") == (9200 if role == "prefill" and values is DEFAULT_VALUES else None)


def test_rendering_without_keys_fails_and_says_what_to_do() -> None:
    with pytest.raises(helm_python.HelmError, match=r"braid keys DIR.*keys.existingSecret=braid-keys"):
        render({})


def test_rendering_with_two_sources_of_keys_fails() -> None:
    with pytest.raises(helm_python.HelmError, match="both set"):
        render({"keys": {"existingSecret": "a", "files": {"public.key": "x", "secret.key": "y"}}})


def test_provided_keys_become_a_secret_whose_change_restarts_every_pod() -> None:
    def annotations(secret: str) -> set[str]:
        values = {"keys": {"files": {"public.key": "p", "secret.key": secret}}}
        (made,) = of_kind("Secret", values).values()
        assert made["stringData"] == {"public.key": "p", "secret.key": secret}
        volumes = [volume for pod in pods(values).values() for volume in pod["volumes"]]
        mounted = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
        assert mounted == {made["metadata"]["name"]}
        return {t["metadata"]["annotations"]["checksum/keys"] for t in templates(values).values()}

    assert len(annotations("a")) == 1
    assert annotations("a") != annotations("b")


@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"flavor": "rocm"},
        {"decode": {"replicas": 0}},
        {"prefill": {"replicas": 0}},
        {"engine": {"tensorParallelSize": 0}},
        {"prefill": {"engineArgs": ["--"]}},
        {"keys": {"files": {"other": "x"}}},
        {"also": [{"name": "small", "model": {"path": "/m"}}]},
        {"also": [{"name": "Small", "model": {"path": "/m", "servedName": "s"}}]},
    ],
    ids=str,
)
def test_the_schema_refuses_wrong_values(values: Mapping[str, Any]) -> None:
    with pytest.raises(helm_python.HelmError):
        render(merged(values))


@pytest.mark.parametrize("values", [DEFAULT_VALUES, CUDA], ids=["default", "cuda"])
def test_every_container_is_unprivileged_with_a_read_only_root(values: Mapping[str, Any]) -> None:
    for pod in pods(values).values():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_service_variables_cannot_become_settings() -> None:
    assert all(pod["enableServiceLinks"] is False for pod in pods().values())


def test_every_mount_has_its_volume_and_every_volume_is_mounted() -> None:
    for pod in pods(CUDA).values():
        (container,) = pod["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_what_a_worker_writes_is_on_a_writable_volume() -> None:
    writable = ("/tmp", "/run/braid", "/cache", "/dev/shm")
    for role in ("prefill", "decode"):
        pod = pods()[role]
        (container,) = pod["containers"]
        mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
        assert all(path in mounts and not mounts[path].get("readOnly") for path in writable)
        shm = next(v for v in pod["volumes"] if v["name"] == mounts["/dev/shm"]["name"])
        assert shm["emptyDir"]["medium"] == "Memory"
        folders = [e["value"] for e in container["env"] if str(e.get("value", "")).startswith("/")]
        assert folders
        assert all(folder.startswith("/cache") for folder in folders)
        settings, _ = parsed(pod)
        assert isinstance(settings, PrefillSettings | DecodeSettings)
        assert settings.run_dir == Path("/run/braid")


@pytest.mark.parametrize("values", [DEFAULT_VALUES, CUDA], ids=["default", "cuda"])
def test_pods_are_given_more_time_to_end_than_they_drain(values: Mapping[str, Any]) -> None:
    for pod in pods(values).values():
        settings, _ = parsed(pod)
        assert isinstance(settings, RouterSettings | PrefillSettings | DecodeSettings)
        assert pod["terminationGracePeriodSeconds"] >= settings.drain_s + 15


def test_probes_ask_health_for_life_and_ready_for_traffic() -> None:
    for pod in pods().values():
        (container,) = pod["containers"]
        paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
        assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}


def test_an_engine_has_half_an_hour_to_load() -> None:
    for role in ("prefill", "decode"):
        probe = pods()[role]["containers"][0]["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


def test_workers_find_a_router_that_is_not_ready() -> None:
    link = of_kind("Service")["braid-link"]["spec"]
    assert (link["clusterIP"], link["publishNotReadyAddresses"]) == ("None", True)
    assert of_kind("Service")["braid"]["spec"].get("publishNotReadyAddresses") is None


def test_selectors_pick_their_own_component_only() -> None:
    labels = {role: template["metadata"]["labels"] for role, template in templates().items()}

    def picked(selector: Mapping[str, str]) -> set[str]:
        return {role for role, found in labels.items() if selector.items() <= found.items()}

    services = {name: picked(s["spec"]["selector"]) for name, s in of_kind("Service").items()}
    assert services == {
        "braid": {"router"},
        "braid-link": {"router"},
        "braid-prefill": {"prefill"},
        "braid-decode": {"decode"},
    }
    budgets = of_kind("PodDisruptionBudget")
    assert {n: picked(b["spec"]["selector"]["matchLabels"]) for n, b in budgets.items()} == {
        "braid-prefill": {"prefill"},
        "braid-decode": {"decode"},
    }


@pytest.mark.parametrize(("values", "last"), [(DEFAULT_VALUES, None), (CUDA, 65535)], ids=["default", "cuda"])
def test_the_link_and_kv_ports_are_open_to_the_release_only(
    values: Mapping[str, Any], last: int | None
) -> None:
    policies = of_kind("NetworkPolicy", values)

    def sources(policy: str, port: str | int) -> list[str]:
        rules = [r for r in policies[policy]["spec"]["ingress"] if r["ports"][0]["port"] == port]
        assert len(rules) == 1
        return [
            peer["podSelector"]["matchLabels"][COMPONENT]
            for peer in rules[0]["from"]
            if peer["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "braid"
        ]

    assert sources("braid-router", "link") == ["prefill", "decode"]
    assert sources("braid-prefill", 9200) == ["decode"]
    kv = next(r for r in policies["braid-prefill"]["spec"]["ingress"] if r["ports"][0]["port"] == 9200)
    assert kv["ports"][0].get("endPort") == last
    assert len(policies["braid-decode"]["spec"]["ingress"]) == 1


def test_a_gpu_worker_asks_for_one_gpu_a_rank() -> None:
    found = {role: pod["containers"][0]["resources"]["limits"] for role, pod in pods(CUDA).items()}
    assert found["prefill"]["nvidia.com/gpu"] == 2
    assert found["decode"]["nvidia.com/gpu"] == 2
    assert "nvidia.com/gpu" not in found["router"]
    assert all("nvidia.com/gpu" not in p["containers"][0]["resources"]["limits"] for p in pods().values())


def test_images_follow_the_version_and_the_flavor() -> None:
    def images(values: Mapping[str, Any]) -> dict[str, str]:
        return {role: pod["containers"][0]["image"] for role, pod in pods(values).items()}

    assert images(DEFAULT_VALUES)["decode"] == f"braid-worker:{__version__}-cpu"
    assert images(CUDA)["decode"] == f"registry.example.com/team/braid-worker:{__version__}-cuda"
    assert images(CUDA)["router"] == f"registry.example.com/team/braid-router:{__version__}"


def test_autoscaling_is_off_and_leaves_replicas_to_the_autoscaler_when_on() -> None:
    assert of_kind("HorizontalPodAutoscaler") == {}
    values = merged({"decode": {"autoscaling": SCALED}})
    assert list(of_kind("HorizontalPodAutoscaler", values)) == ["braid-decode"]
    assert "replicas" not in of_kind("Deployment", values)["braid-decode"]["spec"]


def test_autoscaling_without_a_metric_is_refused() -> None:
    with pytest.raises(helm_python.HelmError, match=r"decode\.autoscaling\.metrics is required"):
        render(merged({"decode": {"autoscaling": {"enabled": True}}}))


def test_optional_parts_can_be_left_out() -> None:
    off = {"podDisruptionBudget": {"enabled": False}}
    values = merged({"networkPolicy": {"enabled": False}, "prefill": off, "decode": off})
    assert {d["kind"] for d in documents(values)} == {"Deployment", "Service"}


def test_the_notes_say_how_to_ask_and_warn_of_an_open_service() -> None:
    notes = render(DEFAULT_VALUES)["NOTES.txt"]
    assert "port-forward service/braid 8000:80" in notes
    assert "No API keys are asked for" in notes
    assert "No API keys are asked for" not in render(CUDA)["NOTES.txt"]


def test_long_release_names_stay_within_kubernetes_limits() -> None:
    for name, text in render(DEFAULT_VALUES, release="r" * 53).items():
        if name.endswith(".yaml"):
            assert all(len(d["metadata"]["name"]) <= 63 for d in yaml.safe_load_all(text) if d)


def test_the_chart_lints_and_carries_the_version_of_the_package() -> None:
    report = helm_python.lint(CHART, dict(DEFAULT_VALUES), strict=True)
    assert report["errors"] == []
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def test_the_committed_manifest_is_current() -> None:
    hint = "run `python -m deploy.chart.render` and review the difference"
    assert default_manifest() == DEFAULT.read_text(encoding="utf-8"), hint
