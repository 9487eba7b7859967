"""Tiny random LLaMA checkpoints with a real tokenizer, for tests: real shapes, real files, milliseconds to run."""

import pydoc_data.topics
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 512


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:40], trainer)
    return tokenizer.to_str()


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE of VOCAB_SIZE tokens, trained on Python's own documentation, with a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)


def write_dense(
    folder: Path,
    *,
    num_hidden_layers: int = 3,
    hidden_size: int = 64,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 4,
    head_dim: int = 16,
    intermediate_size: int = 128,
    vocab_size: int = VOCAB_SIZE,
    tie_word_embeddings: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "50GB",
    **config: object,
) -> Path:
    """Write a random dense LLaMA checkpoint with tokenizer to ``folder`` and return the folder.

    The weights are larger than transformers' default initialisation, so that layers matter and greedy tokens differ.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            tie_word_embeddings=tie_word_embeddings,
            initializer_range=0.1,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            **config,
        )
    )
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder
