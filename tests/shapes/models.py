"""Tiny models with random weights, one for each kind of KV cache, made with the demo model's tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 512
WINDOW = 96
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # With these two, each next token is another and depends on all that the model sees.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def full() -> Any:
    """Every layer attends to everything: one KV cache group."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, num_hidden_layers=2))


def one_head() -> Any:
    """One KV head: tensor-parallel ranks hold copies of it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{**_SIZES, "num_key_value_heads": 1}, num_hidden_layers=2))


def windows_and_full() -> Any:
    """Two layers that see everything and four that see a window: three KV cache groups."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **_SIZES, num_hidden_layers=6, layer_types=kinds, sliding_window=WINDOW, query_pre_attn_scalar=32
    )
    return Gemma3ForCausalLM(config)


def windows_only() -> Any:
    """Every layer sees a window."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_SIZES, num_hidden_layers=2, sliding_window=WINDOW))


def state_space() -> Any:
    """A state-space layer beside one of attention."""
    from transformers import JambaConfig, JambaForCausalLM

    sizes = {name: value for name, value in _SIZES.items() if name != "head_dim"}
    config = JambaConfig(
        **sizes,
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=16,
        use_mamba_kernels=False,
    )
    return JambaForCausalLM(config)


def latent() -> Any:
    """Multi-head latent attention (MLA)."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes = {name: value for name, value in _SIZES.items() if name != "head_dim"}
    config = DeepseekV2Config(
        **{**sizes, "num_key_value_heads": 4},
        num_hidden_layers=2,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=2,
    )
    return DeepseekV2ForCausalLM(config)


def make(kind: Callable[[], Any], folder: Path) -> Path:
    """Write a model and the tokenizer to ``folder``, which is new; the same weights every time."""
    import torch

    from deploy.local import demo_model

    torch.manual_seed(0)
    kind().to(torch.float32).save_pretrained(folder)
    for name in _TOKENIZER:
        if (demo_model() / name).is_file():
            shutil.copy(demo_model() / name, folder / name)
    return folder
