"""Make a random-weight Qwen3 of about the demo model's shape, for machines that do not have the demo model.

Usage, in an environment that has transformers: `python -m benchmarks.tiny_model DIR`.
4 layers x 256, 4 heads, 2 KV heads of 64, so float32 KV takes 4 KiB a token; byte-level BPE tokenizer.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

POSITIONS = 8192
VOCABULARY = 439


def make_model(directory: Path, seed: int = 0) -> None:
    """Write config, weights and tokenizer to `directory`."""
    tokenizer = _tokenizer()
    transformers, torch = import_module("transformers"), import_module("torch")
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", model_max_length=POSITIONS
    )
    fast.save_pretrained(directory)


def _tokenizer() -> object:
    tokenizers = import_module("tokenizers")
    pre, decoders = import_module("tokenizers.pre_tokenizers"), import_module("tokenizers.decoders")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=pre.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([Path(import_module("argparse").__file__ or "").read_text()], trainer)
    return tokenizer


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
