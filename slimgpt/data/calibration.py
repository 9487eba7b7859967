"""Text to token blocks ``[N, T]``: deterministic, fingerprinted, without padding (which would enter the statistics)."""

import hashlib
import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimgpt.checkpoints.families import positions
from slimgpt.checkpoints.headers import read_json
from slimgpt.checkpoints.origins import read_config
from slimgpt.config import BosPolicy
from slimgpt.data.bos import Bos, blocks_of, resolve_bos, text_tokens
from slimgpt.data.chats import Chat
from slimgpt.data.documents import Documents
from slimgpt.data.mixture import parts_of
from slimgpt.data.text import TextSource, calibration_text
from slimgpt.files import digest_of

PASSAGE_BLOCKS = 64  # characters of a passage, per token of a block: about 16 blocks
PART_BITS = 32
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Calibration:
    """What is looked at.

    Attributes:
        ids_NT: token ids ``[num_samples, seq_len]``.
        facts: name and sha256 of the text, counts, seed, and the sha256 of the ids.
    """

    ids_NT: Tensor
    facts: dict[str, Any]


def token_blocks(
    tokenizer: Any,
    text: TextSource,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: Bos = "none",
    fewer: bool = False,
) -> Calibration:
    """Draw ``num_samples`` blocks of ``seq_len`` tokens: documents in random order, each closed by EOS, no overlap.

    Documents much longer than a block are drawn in passages, so that the seed picks what is seen of a long text file,
    too. Text is text: ``<|endoftext|>``, ``<s>`` or ``<filename>`` in a document are read as the characters they are,
    never as the tokenizer's special tokens. Only EOS is added, where the tokenizer has one, and BOS where ``bos`` says
    so. Conversations are written by its chat template, special tokens and end included.

    Args:
        tokenizer: of transformers.
        text: documents.
        num_samples: blocks wanted.
        seq_len: tokens in a block.
        seed: of the order.
        bos: where BOS stands; it counts among the ``seq_len`` tokens.
        fewer: whether a text that is too short gives as many blocks as it has.

    Raises:
        ValueError: when the text has fewer tokens than requested (with ``fewer``: than one block), or a conversation
            does not fit the chat template.
    """
    documents, length = text.documents, PASSAGE_BLOCKS * seq_len
    passages = _passages(documents, length)
    random.Random(seed).shuffle(passages)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    wanted = text_tokens(bos, num_samples, seq_len)
    ids: list[int] = []
    for start in range(0, len(passages), 64):  # in batches: tokenizers run them in parallel
        batch = [_passage(documents, *divmod(code, 1 << PART_BITS), length) for code in passages[start : start + 64]]
        plain = [passage for passage, _ in batch if not isinstance(passage, Chat)]
        plain_ids = iter(encoded(tokenizer, plain, split_special_tokens=True))
        for passage, last in batch:
            if isinstance(passage, Chat):
                ids += encoded(tokenizer, [passage.render(tokenizer)], split_special_tokens=False)[0]
            else:
                ids += next(plain_ids) + (end if last else [])
        if len(ids) >= wanted:
            break
    blocks = blocks_of(ids[:wanted], bos, tokenizer.bos_token_id, seq_len)
    if not blocks:
        raise ValueError(
            f"{text.name} has {len(ids)} tokens, fewer than one sequence of {seq_len}; lower seq_len, or name a larger "
            "text"
        )
    if len(blocks) < num_samples and not fewer:
        raise ValueError(
            f"{text.name} has {len(ids)} tokens; {num_samples} samples of {seq_len} need {wanted}: "
            f"ask for at most {len(blocks)} samples, or name a larger text"
        )
    ids_NT, num_samples = torch.tensor(blocks, dtype=torch.long), len(blocks)
    facts = {
        "name": text.name,
        "origin": text.origin,
        "sha256": text.sha256,
        "num_samples": num_samples,
        "seq_len": seq_len,
        "tokens": num_samples * seq_len,
        "seed": seed,
        "bos": bos,
        "ids_sha256": hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest(),
    }
    return Calibration(ids_NT, facts)


def _passages(documents: Documents, length: int) -> "array[int]":
    """Where the passages of all documents begin: the document's number, and in the low bits the part of it."""
    passages = array("Q")
    for i, characters in enumerate(documents.lengths):
        parts = 1 if documents.is_chat(i) else -(-characters // length)
        passages.extend(range(i << PART_BITS, (i << PART_BITS) + parts))
    return passages


def _passage(documents: Documents, i: int, part: int, length: int) -> tuple[str, bool]:
    """A part of a document, and whether it is the last one; a conversation stays as it is."""
    document = documents[i]
    if isinstance(document, Chat):
        return document, True
    end = (part + 1) * length
    return document[part * length : end], end >= len(document)


def encoded(tokenizer: Any, texts: list[str], *, split_special_tokens: bool = True) -> list[list[int]]:
    """The tokens of each text; with ``split_special_tokens`` text is text, whatever it spells."""
    if not texts:
        return []
    made = tokenizer(texts, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False)
    return made["input_ids"]  # type: ignore[no-any-return]


def together(parts: list[Calibration]) -> Calibration:
    """The sequences of several texts, one text after the other; of one text, that one."""
    if len(parts) == 1:
        return parts[0]
    ids_NT, facts = torch.cat([part.ids_NT for part in parts]), [part.facts for part in parts]
    samples = len(ids_NT)
    return Calibration(
        ids_NT,
        {
            **facts[0],
            "name": ", ".join(f"{part['name']}:{part['num_samples'] / samples:.3g}" for part in facts),
            "origin": ", ".join(dict.fromkeys(part["origin"] for part in facts)),
            "sha256": digest_of({f"{i} {part['name']}": part["sha256"] for i, part in enumerate(facts)}),
            "num_samples": samples,
            "tokens": ids_NT.numel(),
            "ids_sha256": hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest(),
        },
    )


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer in folder ``model``.

    Raises:
        ValueError: when there is none that loads without code of its own; a damaged file of it is named.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # tokenizers' and transformers' errors share no class
        for name in _TOKENIZER_FILES:
            if (model / name).is_file():
                read_json(model / name)
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{model} has no tokenizer that loads without its own code ({reason}); "
            "copy tokenizer.json or tokenizer.model, and tokenizer_config.json, from the original model"
        ) from None


def calibrate(
    model: Path,
    source: str,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: BosPolicy = "auto",
    fewer: bool = False,
) -> Calibration:
    """The token blocks of ``source`` for the model in folder ``model``; several texts as in ``parts_of``.

    With ``fewer``, a text that is too short gives as many blocks as it has.

    Raises:
        ValueError: when the source is empty or too short, the sequences are longer than the model reads, or its
            tokenizer is missing, damaged, another model's, or without the BOS that ``bos`` requests.
        FileNotFoundError: when the source does not exist.
    """
    config = read_config(model)
    if seq_len > (limit := positions(config)):
        raise ValueError(f"seq_len is {seq_len}; {model} reads at most {limit} tokens at once: lower seq_len")
    tokenizer = load_tokenizer(model)
    resolved = resolve_bos(bos, tokenizer, config.model_type)
    texts = [(calibration_text(name), count) for name, count in parts_of(source, num_samples)]
    drawn = [
        token_blocks(tokenizer, text, num_samples=count, seq_len=seq_len, seed=seed, bos=resolved, fewer=fewer)
        for text, count in texts
    ]
    blocks = together(drawn)
    largest = int(blocks.ids_NT.max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"{model}: its tokenizer gives the token {largest}, its embeddings end at {config.vocab_size - 1}; "
            "the tokenizer belongs to another model, copy the right one"
        )
    return blocks
