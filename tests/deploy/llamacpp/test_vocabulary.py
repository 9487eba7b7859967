"""Text becomes the same tokens in llama.cpp as in transformers."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from deploy.llamacpp.export import export, plan_export
from tests.tiny_models import write_dense

pytest.importorskip("llama_cpp_py_sync", reason="it has no wheel for this machine")
from tests.deploy.llamacpp.runtime import LlamaCpp

TEXTS = [
    "",
    "The assert statement's value is 12345.",
    "naïve café ☕ 漢字 — “quoted”",
    "def f(x):\n    return x  # two  spaces\n\n\n",
    "\t tabs\tand trailing  ",
    "<|user|>Hello<|end|> and more",
]
CORPUS = [Path(__file__).read_text()] * 3


def write_model(folder: Path, tokenizer: Tokenizer, vocab_size: int = 600, **kwargs) -> Path:
    """A tiny model with this tokenizer."""
    write_dense(folder, vocab_size=vocab_size)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)
    wrapped.save_pretrained(folder)
    return folder


def byte_level(cut: pre_tokenizers.PreTokenizer, **model) -> Tokenizer:
    """A byte-level BPE that cuts text so."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<|user|>", normalized=False)])
    return tokenizer


def sentence_piece(*, prefix: bool) -> Tokenizer:
    """As LLaMA 2 (a blank in front) and Gemma (none) have it: pieces with byte fallback."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    start = Tokenizer(models.BPE())
    front = [normalizers.Prepend("▁")] if prefix else []
    start.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    start.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    start.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(start.to_str())["model"]
    vocab = {word: i for i, word in enumerate([*words, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = start.normalizer
    fuse = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(fuse)
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.add_special_tokens([AddedToken("<|user|>", normalized=False), AddedToken("<|end|>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def assert_same_tokens(folder: Path, out: Path) -> LlamaCpp:
    """llama.cpp's tokens of every text are those of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runtime = LlamaCpp(export(plan_export(folder, "f16"), out))
    for text in TEXTS:
        assert runtime.tokens(text) == tokenizer(text)["input_ids"], text
    return runtime


@pytest.mark.parametrize("pattern", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"])
def test_byte_level(pattern, tmp_path):
    """GPT-2's way of cutting text, alone and after single digits; Qwen's; LLaMA 3's and Mistral's, with whole words."""
    regex = GGUF_PRE_TOKENIZER_SPLITS.get(pattern)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    cut = level
    if pattern == "smollm":
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    if regex:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), level])
    tokenizer = byte_level(cut, ignore_merges=pattern in ("llama-bpe", "tekken"))
    folder = write_model(tmp_path / "model", tokenizer, eos_token="<|end|>")
    runtime = assert_same_tokens(folder, tmp_path / "a.gguf")
    assert runtime.text("tokenizer.ggml.pre") == pattern
    runtime.close()


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces(prefix, tmp_path):
    """BOS in front, bytes for what has no piece, and a blank before the first word or none."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = write_model(tmp_path / "model", sentence_piece(prefix=prefix), vocab_size=620, **tokens)
    runtime = assert_same_tokens(folder, tmp_path / "a.gguf")
    assert runtime.tokens("a")[0] == 1
    runtime.close()


def test_bos_that_the_tokenizer_lost(tmp_path):
    """A LLaMA 3 whose tokenizer came from GGUF: BOS comes back, as in calibration and evaluation."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens(["<|begin_of_text|>"])
    folder = write_model(tmp_path / "model", tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end|>")
    runtime = LlamaCpp(export(plan_export(folder, "f16"), tmp_path / "a.gguf"))
    ids = AutoTokenizer.from_pretrained(folder)("A class")["input_ids"]
    assert runtime.tokens("A class") == [tokenizer.token_to_id("<|begin_of_text|>"), *ids]
    runtime.close()


def test_the_chat_template_goes_along(tmp_path):
    folder = write_dense(tmp_path / "model")
    runtime = LlamaCpp(export(plan_export(folder, "f16"), tmp_path / "a.gguf"))
    assert runtime.text("tokenizer.chat_template") == AutoTokenizer.from_pretrained(folder).chat_template
    runtime.close()


def test_patterns_without_a_name(tmp_path):
    """Another way to cut text is refused: tokens would differ in silence."""
    cut = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(use_regex=False)])
    folder = write_model(tmp_path / "model", byte_level(cut), eos_token="<|end|>")
    with pytest.raises(ValueError, match=r"cuts text in a way that has no name .*Whitespace"):
        plan_export(folder, "f16")


def test_another_kind_of_tokenizer(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    folder = write_model(tmp_path / "model", words, eos_token="<unk>")
    with pytest.raises(ValueError, match="tokenizer is a WordLevel; llama.cpp gets BPE from here"):
        plan_export(folder, "f16")
