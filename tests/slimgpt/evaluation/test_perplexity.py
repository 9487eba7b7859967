"""Perplexity against its definition, implemented again with loops."""

import copy
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slimgpt.checkpoints import output_head
from slimgpt.data.documents import Documents
from slimgpt.data.text import TextSource, perplexity_text
from slimgpt.evaluation.perplexity import first_tokens, perplexity
from tests.tiny_models import VOCAB_SIZE, write_dense


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    folder = write_dense(tmp_path_factory.mktemp("dense"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def text(*documents: str) -> TextSource:
    return TextSource(name="a.txt", documents=Documents(documents), origin="file")


def by_definition(model, tokenizer, stream: str, seq_len: int, blocks: int) -> float:
    ids = tokenizer(stream)["input_ids"]
    losses = []
    for block in range(blocks):
        chunk = ids[block * seq_len : (block + 1) * seq_len]
        with torch.no_grad():
            logits = model(torch.tensor([chunk])).logits[0].double()
        for position in range(1, seq_len):
            losses.append(-logits[position - 1].log_softmax(-1)[chunk[position]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("part", [1, 10, 64])
def test_perplexity_matches_its_definition_for_any_batch_and_any_part_of_the_logits(
    tiny, batch_size: int, part: int, monkeypatch
) -> None:
    monkeypatch.setitem(output_head.LOGIT_BYTES, "cpu", 4 * VOCAB_SIZE * part)
    stream = perplexity_text("python").documents[0][:20_000]
    result = perplexity(*tiny, text(stream), seq_len=64, max_blocks=5, batch_size=batch_size)
    assert result.perplexity == pytest.approx(by_definition(*tiny, stream, 64, 5), rel=1e-5)
    assert (result.blocks, result.tokens) == (5, 5 * 63)


def without_words(model, trainer) -> PreTrainedTokenizerFast:
    """A tokenizer like LLaMA's, which does not cut the text into words first: a token may span them."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    sentences = perplexity_text("python").documents[0][:60_000].split("\n")
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["words", "bpe", "unigram"])
@pytest.mark.parametrize("count", [1, 200, 3000])
def test_the_first_tokens_are_those_of_the_entire_text(tiny, kind: str, count: int) -> None:
    special = {"special_tokens": ["<unk>"], "show_progress": False}
    tokenizer = {
        "words": lambda: tiny[1],
        "bpe": lambda: without_words(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=600, **special)),
        "unigram": lambda: without_words(
            models.Unigram(), trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **special)
        ),
    }[kind]()
    stream = perplexity_text("python").documents[0][:100_000]
    assert first_tokens(tokenizer, stream, count) == tokenizer(stream, add_special_tokens=False)["input_ids"][:count]


def test_of_a_large_text_only_the_part_that_is_used_is_tokenised(tiny) -> None:
    lengths = []

    def tokenizer(part: str, **settings):
        lengths.append(len(part))
        return tiny[1](part, **settings)

    stream = "All work and no play makes Jack a dull boy. " * 200_000
    assert len(first_tokens(tokenizer, stream, 128)) == 128
    assert max(lengths) < 10_000
    spaces = " " * 1_000_000 + "text"  # many characters a token: the part grows until there are enough
    assert first_tokens(tokenizer, spaces, 2000) == tiny[1](spaces)["input_ids"][:2000]


def test_documents_are_concatenated(tiny) -> None:
    apart = perplexity(*tiny, text("One document.", "Another one."), seq_len=4, max_blocks=None)
    together = perplexity(*tiny, text("One document.\n\nAnother one."), seq_len=4, max_blocks=None)
    assert apart.perplexity == together.perplexity
    assert apart.blocks == together.blocks >= 2


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary_size(tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_dense(tmp_path))
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, tiny[1], text("The same for every token. " * 50), seq_len=16)
    assert result.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-5)


def test_without_a_limit_all_complete_blocks_are_used(tiny) -> None:
    stream = "word " * 100
    tokens = len(tiny[1](stream)["input_ids"])
    result = perplexity(*tiny, text(stream), seq_len=32, max_blocks=None)
    assert result.blocks == tokens // 32
    assert tokens % 32


def test_progress_ends_at_the_number_of_blocks(tiny) -> None:
    seen: list[tuple[int, ...]] = []
    perplexity(
        *tiny, text("word " * 100), seq_len=16, max_blocks=5, batch_size=2, on_progress=lambda *n: seen.append(n)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_training_model_is_measured_in_evaluation_mode_and_left_as_it_was(tiny) -> None:
    model, tokenizer = tiny
    model.train()
    perplexity(model, tokenizer, text("word " * 100), seq_len=16)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 1}, "at least 2"),
        ({"max_blocks": 0}, "max_blocks 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seq_len": 513}, "the model has 512 positions; lower seq_len"),
        ({"seq_len": 500}, "fewer than seq_len 500; lower seq_len"),
    ],
)
def test_bad_input_is_refused(tiny, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(*tiny, text("short"), **({"seq_len": 2} | arguments))


def test_a_token_without_an_embedding_is_refused(tiny) -> None:
    """Tokens that were added to a tokenizer, and not to the model."""
    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=r"its tokenizer gives the token 512 for a.txt, its embeddings end at 511"):
        perplexity(model, tokenizer, text("the zebra went " * 100), seq_len=16)


def test_weights_with_nan_raise_an_error(tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_dense(tmp_path))
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        perplexity(model, tiny[1], text("word " * 100), seq_len=16)
