"""Perplexity: exp of the mean negative log-likelihood over text read as one stream.

The stream is cut into consecutive blocks of ``seq_len`` tokens that do not overlap; the first token of a block is not
scored, and what is left over at the end is dropped. BOS stands before the stream or before every block (and is then the
token that is not scored) where the policy says so, for dense and pruned models alike; no other special token is added.
"""

# Shapes: B = blocks in a batch, T = seq_len, D = hidden size, V = vocabulary.

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from slimgpt.checkpoints.families import positions
from slimgpt.checkpoints.output_head import OutputHead
from slimgpt.data.bos import Bos, blocks_of, text_tokens
from slimgpt.data.text import TextSource

_CHARS_PER_TOKEN = 8  # of English about 4
_UNSURE = 256  # tokens before a cut in the text that are not used


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Args:
        perplexity: exp of the mean negative log-likelihood in nats; infinite where that overflows.
        tokens: scored tokens, blocks * (seq_len - 1).
        blocks: blocks of ``seq_len`` tokens.
        seq_len: tokens in a block.
        text: the text's name; ``origin`` and ``sha256`` as in TextSource.
        origin: where the text was from.
        sha256: of the entire text, the part that ``blocks`` leaves out included.
        block_nats: each block's mean negative log-likelihood per token.
        bos: where BOS stood.
    """

    perplexity: float
    tokens: int
    blocks: int
    seq_len: int
    text: str
    origin: str
    sha256: str
    block_nats: list[float]
    bos: Bos = "none"  # as before there was a policy

    @property
    def stderr(self) -> float | None:
        """Standard error of the perplexity over the blocks (delta method); None of one block."""
        if self.blocks < 2:
            return None
        return self.perplexity * statistics.stdev(self.block_nats) / math.sqrt(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)


def check_length(seq_len: int, config: PretrainedConfig) -> None:
    """Refuse blocks that are longer than the model reads.

    Raises:
        ValueError: with both lengths and the remedy.
    """
    if getattr(config, "max_position_embeddings", None) and seq_len > (longest := positions(config)):
        raise ValueError(f"seq_len is {seq_len}, but the model has {longest} positions; lower seq_len to {longest}")


def text_blocks(
    text: TextSource, tokenizer: Any, vocab_size: int, *, seq_len: int, max_blocks: int | None, bos: Bos = "none"
) -> list[list[int]]:
    """Cut a text into the blocks that perplexity is measured on; no model is needed.

    Args:
        text: as of ``perplexity``.
        tokenizer: as of ``perplexity``.
        vocab_size: of the model.
        seq_len: as of ``perplexity``.
        max_blocks: as of ``perplexity``.
        bos: as of ``perplexity``.

    Raises:
        ValueError: a text of less than one block, or tokens that the model does not have.
    """
    needed = text_tokens(bos, max_blocks, seq_len) if max_blocks else None
    ids = first_tokens(tokenizer, "\n\n".join(text.documents), needed)
    blocks = blocks_of(ids, bos, tokenizer.bos_token_id, seq_len)[:max_blocks]
    if not blocks:
        raise ValueError(f"{text.name} has {len(ids)} tokens, fewer than seq_len {seq_len}; lower seq_len")
    if (largest := max(map(max, blocks))) >= vocab_size:
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer gives the token {largest} for {text.name}, its embeddings end at "
            f"{vocab_size - 1}; the tokenizer belongs to another model, copy the right one"
        )
    return blocks


def first_tokens(tokenizer: Any, text: str, count: int | None) -> list[int]:
    """The first ``count`` tokens of a text (None: all), or fewer where it has no more.

    They are those of the entire text, though only a part of it is tokenised: tokenizers take minutes and tens of GB for
    a large file. A token depends on the characters around it, not on those far behind; the last tokens of the part,
    which the cut may have changed, are not used.
    """
    chars = len(text) if count is None else _CHARS_PER_TOKEN * (count + _UNSURE)
    while True:
        part = text[:chars]
        ids = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if count is None or chars >= len(text):
            return list(ids[:count])
        if len(ids) >= count + _UNSURE:
            return list(ids[:count])
        chars *= 2


def ratio_interval(dense: PerplexityResult, pruned: PerplexityResult) -> tuple[float, float] | None:
    """95 % confidence interval of pruned over dense perplexity, from the differences of the same blocks.

    None where there is one block, or the two were not measured on the same blocks (two tokenizers).
    """
    measured = [(result.sha256, result.blocks, result.seq_len, result.bos) for result in (dense, pruned)]
    if dense.blocks < 2 or measured[0] != measured[1]:
        return None
    differences = [p - d for d, p in zip(dense.block_nats, pruned.block_nats, strict=True)]
    mean, half = statistics.mean(differences), 1.96 * statistics.stdev(differences) / math.sqrt(dense.blocks)
    return math.exp(mean - half), math.exp(mean + half)


def perplexity(
    model: Any,
    tokenizer: Any,
    text: TextSource,
    *,
    seq_len: int = 1024,
    max_blocks: int | None = 12,
    batch_size: int = 1,
    bos: Bos = "none",
    blocks: list[list[int]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Measure a causal language model's perplexity on a text, on the model's own device and in its own dtype.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        text: the text; several documents are joined by blank lines.
        seq_len: tokens per block, at least 2 and at most what the model has positions for.
        max_blocks: use the first so many blocks; None uses all.
        batch_size: blocks that pass the model at once. Logits are made of a part of a block at a time.
        bos: where BOS stands; it counts among the ``seq_len`` tokens.
        blocks: what ``text_blocks`` made of the text; None: made now.
        on_progress: called with (blocks done, blocks in all).

    Raises:
        ValueError: a limit above is broken, the text is shorter than one block or has tokens that the model lacks, or
            the model returns NaN.
    """
    if seq_len < 2 or batch_size < 1 or (max_blocks is not None and max_blocks < 1):
        raise ValueError(
            f"seq_len is {seq_len}, batch_size {batch_size}, max_blocks {max_blocks}; "
            "they must be at least 2, 1 and 1 (None for all blocks)"
        )
    check_length(seq_len, model.config)
    if blocks is None:
        blocks = text_blocks(text, tokenizer, model.config.vocab_size, seq_len=seq_len, max_blocks=max_blocks, bos=bos)
    count, ids_BT = len(blocks), torch.tensor(blocks)

    decoder, head = model.get_decoder(), OutputHead(model.config, model.get_output_embeddings().weight)
    was_training = model.training
    model.eval()
    block_nats: list[float] = []  # Python floats: the sum over millions of tokens keeps double precision
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            batch_BT = ids_BT[start : start + batch_size].to(model.device)
            x_BTD = decoder(input_ids=batch_BT, use_cache=False).last_hidden_state
            for x_TD, ids_T in zip(x_BTD, batch_BT, strict=True):
                block_nats.append(_nats(head, x_TD, ids_T) / (seq_len - 1))
            if on_progress:
                on_progress(min(start + batch_size, count), count)
    model.train(was_training)

    mean = statistics.fmean(block_nats)  # all blocks have the same number of tokens
    if math.isnan(mean):
        raise ValueError(f"the model's logits on {text.name} hold NaN; its weights are broken or its dtype overflows")
    return PerplexityResult(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        tokens=count * (seq_len - 1),
        blocks=count,
        seq_len=seq_len,
        text=text.name,
        origin=text.origin,
        sha256=text.sha256,
        block_nats=block_nats,
        bos=bos,
    )


def _nats(head: OutputHead, x_TD: Tensor, ids_T: Tensor) -> float:
    """Negative log-likelihood of a block's tokens after the first; a part of its logits at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
    part = head.tokens_at_once(x_TD.device)
    for some_TD, next_T in zip(x_TD[:-1].split(part), ids_T[1:].split(part), strict=True):
        total += functional.cross_entropy(head.logits(some_TD), next_T, reduction="sum")
    return total.item()
