"""Make a random-weight Qwen3 of about the demo model's shape, for machines that do not have the demo model.

Usage, in an environment that has transformers: `python -m benchmarks.tiny_model DIR [--layers 8]`.
Layers x 256, 4 heads, 2 KV heads of 64, so float32 KV takes 1 KiB a token and layer; byte-level BPE.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

POSITIONS = 32768
VOCABULARY = 439
END = "<|end|>"


def make_model(directory: Path, layers: int = 4, seed: int = 0) -> None:
    """Write config, weights and tokenizer to `directory`."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
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
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), eos_token=END, pad_token=END, model_max_length=POSITIONS
    )
    tokenizer.save_pretrained(directory)


def _tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer trained on a module of the standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([Path(argparse.__file__).read_text()], trainer)
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    make_model(arguments.directory, arguments.layers)
