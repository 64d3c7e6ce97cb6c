"""What can't be served is refused with the reason, where the operator looks for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local import ClusterError
from tests.shapes import models
from tests.shapes.cluster import Shape, ShapeCluster, workers

pytestmark = [pytest.mark.shapes, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(models.state_space, "one state a sequence"), (models.latent, "no prefix caching for MLA")],
    ids=["state space", "MLA"],
)
def test_a_model_whose_prompts_cannot_be_shared_is_refused_at_start(
    kind: Any, reason: str, tmp_path: Path
) -> None:
    model = models.make(kind, tmp_path / "model")
    with ShapeCluster(Shape(kind), model, tmp_path / "run") as cluster:
        with pytest.raises(ClusterError, match=reason):
            cluster.wait_ready()
        for name in ("prefill-0", "decode-0"):
            assert cluster.wait_end(name, 120) == 1
            assert reason in cluster.log(name)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (
            Shape(models.windows_and_full, decode=("--block-size", "64")),
            "block size: 32, 32, 32 on prefill, 64, 64, 64 on decode",
        ),
        (Shape(models.full, prefill=("--kv-cache-dtype", "fp8")), "KV dtype: fp8 on prefill, auto on decode"),
        (Shape(models.one_head, prefill_ranks=2), "hold copies of 1 KV heads"),
    ],
    ids=["block sizes with windows", "fp8 on one side", "copies that nobody would read"],
)
def test_workers_that_do_not_fit_are_not_paired_and_decode_computes_prompts_itself(
    shape: Shape, reason: str, tmp_path: Path
) -> None:
    if lacks := shape.lacks():
        pytest.skip(lacks)
    model = models.make(shape.model, tmp_path / "model")
    with (
        ShapeCluster(shape, model, tmp_path / "run") as cluster,
        httpx.Client(base_url=cluster.url, timeout=60, trust_env=False) as client,
    ):
        while len(joined(client)) < 2:
            cluster.check_alive()
            time.sleep(0.2)
        (pair,) = client.get("/cluster").json()["pairs"]
        assert not pair["verified"]
        assert reason in pair["error"]
        assert client.get("/ready").status_code == 503
        body = {"model": "tiny", "prompt": list(range(5, 105)), "max_tokens": 2, "temperature": 0}
        reply = client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-braid-path"] == "local"


def joined(client: httpx.Client) -> dict[str, Any]:
    """The router's workers; none while it is not up."""
    try:
        return workers(client)
    except httpx.TransportError:
        return {}
