"""Fingerprints are equal only where KV blocks may be exchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from braid.worker import fingerprint as module
from braid.worker.fingerprint import config_digest, fingerprint, group_trait, model_digest

TRAITS = (("model", "m"), ("dtype", "float32"), ("block size", "32"))


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


def test_a_tensor_amid_a_large_weight_file_counts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fine-tune may leave both ends as they were."""
    monkeypatch.setattr(module, "_EDGE", 10)
    monkeypatch.setattr(module, "_STRIP", 2)
    weights = bytearray(10_000)
    (model / "model.safetensors").write_bytes(weights)
    before = model_digest(str(model), None)
    weights[5000:5200] = b"x" * 200
    (model / "model.safetensors").write_bytes(weights)
    assert model_digest(str(model), None) != before


def test_every_tensor_of_a_safetensors_file_counts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(module, "_EDGE", 10)
    monkeypatch.setattr(module, "_STRIP", 2)
    tensors = {f"layer{i}": torch.zeros(n) for i, n in enumerate((3, 40_000, 7, 40_000, 1, 40_000))}
    digests = set()
    for changed in [None, *tensors]:
        some = {name: t + 1 if name == changed else t for name, t in tensors.items()}
        save_file(some, model / "model.safetensors")
        digests.add(model_digest(str(model), None))
    assert len(digests) == 1 + len(tensors)


def test_a_configuration_that_flags_change_counts_and_its_place_does_not() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(rope_theta=10000.0, name_or_path="/a")
    assert config_digest(config) == config_digest(LlamaConfig(rope_theta=10000.0, name_or_path="/b"))
    assert config_digest(config) != config_digest(LlamaConfig(rope_theta=500.0, name_or_path="/a"))


def test_a_hub_name_counts_with_its_revision() -> None:
    assert model_digest("org/model", "a") != model_digest("org/model", "b")


@pytest.mark.parametrize("i", range(len(TRAITS)))
def test_every_trait_changes_the_fingerprint(i: int) -> None:
    other = (*TRAITS[:i], (TRAITS[i][0], "other"), *TRAITS[i + 1 :])
    assert fingerprint(TRAITS) == fingerprint(TRAITS)
    assert fingerprint(other) != fingerprint(TRAITS)


def test_a_groups_trait_does_not_depend_on_its_block_size() -> None:
    layers = ("a", "b")
    small = group_trait("FullAttentionSpec", 0, layers, 32 * 256, 32)
    assert small == group_trait("FullAttentionSpec", 0, layers, 64 * 256, 64)
    assert "256 bytes" in small


@pytest.mark.parametrize(
    ("kind", "window", "layers", "row_bytes"),
    [
        ("other", 8, ("a",), 64),
        ("kind", 9, ("a",), 64),
        ("kind", 8, ("b",), 64),
        ("kind", 8, ("a", "a"), 64),
        ("kind", 8, ("a",), 65),
    ],
)
def test_a_groups_trait_tells_kinds_windows_layers_and_bytes_apart(
    kind: str, window: int, layers: tuple[str, ...], row_bytes: int
) -> None:
    assert group_trait(kind, window, layers, row_bytes, 4) != group_trait("kind", 8, ("a",), 64, 4)
