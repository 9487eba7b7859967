"""The tokenizer as llama.cpp keeps it: words, their kinds, merges, the pattern that cuts text, special tokens."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from slimgpt.data.bos import adds_bos, lost_bos
from slimgpt.data.calibration import load_tokenizer

# How text is cut before merging: llama.cpp's name for each pattern, and whether it takes whole words past the merges.
_PATTERNS = {
    GGUF_PRE_TOKENIZER_SPLITS[name]: (name, whole)
    for name, whole in (("llama-bpe", True), ("qwen2", False), ("tekken", True))
}

logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of guesses, in whose place the habits below come


def write_vocabulary(writer: GGUFWriter, model: Path, *, vocab_size: int, model_type: str) -> None:
    """Add the tokenizer in folder ``model``, and its chat template.

    Args:
        writer: of the file.
        model: a checkpoint's folder.
        vocab_size: rows of its embedding; those beyond the tokenizer's words become padding.
        model_type: of its config, which tells whether BOS was lost on the way (``slimgpt.data.bos``).

    Raises:
        ValueError: as ``read_tokenizer``.
    """
    tokenizer, spec, pattern = read_tokenizer(model)
    pieces = spec["model"]["byte_fallback"]  # as SentencePiece has it: the order of the words is that of the merges
    special = SpecialVocab(model, load_merges=not pieces, n_vocab=vocab_size)
    words, kinds = _words(spec, vocab_size)
    if pieces:
        kinds_of = zip(words, kinds, strict=True)
        words = [word.replace("▁", " ") if kind == TokenType.USER_DEFINED else word for word, kind in kinds_of]
        writer.add_token_scores([-float(i) for i in range(len(words))])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    ends = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    special.add_special_token = {"bos": adds_bos(tokenizer) or bool(lost_bos(tokenizer, model_type)), "eos": ends}
    special.add_to_gguf(writer, quiet=True)


def read_tokenizer(model: Path) -> tuple[Any, dict[str, Any], str]:
    """The tokenizer in folder ``model``, what tokenizer.json says of it, and llama.cpp's name for how it cuts text.

    Raises:
        ValueError: where there is none, or llama.cpp has no such tokenizer, or none whose name is known here.
    """
    tokenizer = load_tokenizer(model)
    if not tokenizer.is_fast:
        raise ValueError(f"{model} has no fast tokenizer (tokenizer.json); save one with AutoTokenizer first")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise ValueError(f"{model}'s tokenizer is a {spec['model']['type']}; llama.cpp gets BPE from here")
    return tokenizer, spec, "default" if spec["model"]["byte_fallback"] else _pattern(spec, model)


def _words(spec: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Every word in the order of its id, and its kind."""
    words = {i: word for word, i in spec["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, TokenType.NORMAL)
    if spec["model"]["byte_fallback"]:
        kinds |= {i: TokenType.BYTE for i, word in words.items() if re.fullmatch("<0x[0-9A-F]{2}>", word)}
    for token in spec["added_tokens"]:
        words[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if (unknown := spec["model"]["vocab"].get(spec["model"]["unk_token"])) is not None:
        kinds[unknown] = TokenType.UNKNOWN
    padded = [words.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return padded, [kinds.get(i, TokenType.UNUSED) for i in range(vocab_size)]


def _pattern(spec: dict[str, Any], model: Path) -> str:
    """llama.cpp's name of the pattern by which a byte-level tokenizer cuts text."""
    cut = spec["pre_tokenizer"] or {}
    parts = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    match parts:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]:
            return "smollm"
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}, {"type": "ByteLevel"}]:
            name, whole = _PATTERNS.get(regex, ("", False))
            if name and whole == spec["model"]["ignore_merges"]:
                return name
    raise ValueError(
        f"{model}'s tokenizer cuts text in a way that has no name in llama.cpp, or none known here: "
        f"{json.dumps(cut)[:300]}"
    )
