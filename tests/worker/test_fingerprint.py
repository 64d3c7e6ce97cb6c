"""Fingerprints are equal only where KV blocks may be exchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from braid.worker import fingerprint as module
from braid.worker.fingerprint import fingerprint, model_digest

PARTS: dict[str, Any] = {
    "model": "m",
    "vllm_version": "0.32.0",
    "dtype": "float32",
    "kv_dtype": "auto",
    "quantization": "None",
    "block_size": 32,
    "layouts": ["cpu/AVX2/4x8192"],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
    (folder / "model.safetensors").write_bytes(bytes(100))
    return folder


def test_copies_of_a_model_have_one_digest(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert model_digest(str(model), None) == model_digest(str(copy), "main")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_another_config_or_weight_changes_the_digest(model: Path, file: str) -> None:
    before = model_digest(str(model), None)
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert model_digest(str(model), None) != before


def test_another_weight_file_changes_the_digest(model: Path) -> None:
    before = model_digest(str(model), None)
    (model / "more.safetensors").write_bytes(b"")
    assert model_digest(str(model), None) != before


@pytest.mark.parametrize("at", [0, -1])
def test_both_ends_of_a_large_weight_file_count(
    model: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(module, "_EDGE", 10)
    before = model_digest(str(model), None)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[at] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert model_digest(str(model), None) != before


def test_a_hub_name_counts_with_its_revision() -> None:
    assert model_digest("org/model", "a") != model_digest("org/model", "b")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_changes_the_fingerprint(part: str) -> None:
    other = {"block_size": 16, "layouts": ["cpu/AVX512/4x8192"]}.get(part, "other")
    assert fingerprint(**PARTS) == fingerprint(**PARTS)
    assert fingerprint(**{**PARTS, part: other}) != fingerprint(**PARTS)


def test_the_number_of_ranks_changes_the_fingerprint() -> None:
    assert fingerprint(**{**PARTS, "layouts": PARTS["layouts"] * 2}) != fingerprint(**PARTS)
