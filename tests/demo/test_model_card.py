"""The committed model files: complete, small, of the announced kind, with a working template."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cascade import PARAMETERS

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODEL, SMALL = DEMO / "model", DEMO / "small"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
MOST_BYTES = {MODEL: 16 * 2**20, SMALL: 3 * 2**20}


def _json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MODEL / name).read_text(encoding="utf-8"))
    return content


def _tensors(folder: Path = MODEL) -> dict[str, Any]:
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def _render(messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    jinja = pytest.importorskip("jinja2.sandbox")
    template = jinja.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        _json("tokenizer_config.json")["chat_template"]
    )
    return str(template.render(messages=messages, add_generation_prompt=add_generation_prompt))


@pytest.mark.parametrize("folder", [MODEL, SMALL], ids=lambda folder: folder.name)
def test_the_folder_holds_the_listed_files_within_the_size_bound(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES[folder]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_both_models_have_one_tokenizer_and_template(name: str) -> None:
    assert (SMALL / name).read_bytes() == (MODEL / name).read_bytes()


def test_the_small_model_has_less_than_a_quarter_of_the_parameters() -> None:
    ends = [max(t["data_offsets"][1] for t in _tensors(folder).values()) for folder in (SMALL, MODEL)]
    assert ends[0] // 2 == PARAMETERS["demo-small"]
    assert ends[1] // 2 == PARAMETERS["demo"]
    assert ends[0] * 4 < ends[1]
    assert {tensor["dtype"] for tensor in _tensors(SMALL).values()} == {"BF16"}


def test_the_configuration_is_qwen3_with_a_long_window() -> None:
    config = _json("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] == 8192
    assert config["bos_token_id"] is None


def test_weights_are_bf16_and_of_the_announced_size() -> None:
    tensors = _tensors()
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    end = max(tensor["data_offsets"][1] for tensor in tensors.values())
    assert 3_000_000 <= end // 2 <= 8_000_000


def test_special_tokens_agree_between_the_files() -> None:
    added = {token["content"]: token["id"] for token in _json("tokenizer.json")["added_tokens"]}
    settings, generation = _json("tokenizer_config.json"), _json("generation_config.json")
    assert added[settings["eos_token"]] == generation["eos_token_id"] == _json("config.json")["eos_token_id"]
    assert added[settings["pad_token"]] == generation["pad_token_id"]


def test_the_vocabulary_covers_every_byte_and_single_digits_only() -> None:
    vocabulary = _json("tokenizer.json")["model"]["vocab"]
    assert len(vocabulary) == _json("config.json")["vocab_size"]
    assert sum(len(token) == 1 for token in vocabulary) == 256
    assert not [t for t in vocabulary if len(t) > 1 and any(c.isascii() and c.isdigit() for c in t)]


def test_the_template_writes_each_turn_and_the_generation_prompt() -> None:
    text = _render([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_leaves_the_generation_prompt_out_when_asked() -> None:
    text = _render([{"role": "assistant", "content": "A"}], add_generation_prompt=False)
    assert text == "<|im_start|>assistant\nA<|im_end|>\n"


@pytest.mark.parametrize("content", ["ab", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]])
def test_the_template_takes_strings_and_text_parts(content: Any) -> None:
    assert _render([{"role": "user", "content": content}]).startswith("<|im_start|>user\nab<|im_end|>")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "7", "tool_call_id": "x"},
        {"role": "critic", "content": "7"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
    ],
)
def test_the_template_takes_other_roles_and_empty_content(message: dict[str, Any]) -> None:
    assert _render([message]).startswith(f"<|im_start|>{message['role']}\n")


def test_a_training_conversation_is_tokenized_as_the_template_renders_it() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = _render([{"role": "user", "content": "Ana has 12 pens.\nAnswer briefly."}])
    pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert pieces[-3:] == ["<|im_start|>", "assistant", "\n"]
