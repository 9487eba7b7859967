"""Whether BOS stands before text: one policy for calibration, perplexity and lm-eval's tasks.

Some families read text badly without it: Gemma's perplexity on one text is 16.8 without and 10.6 with it. Others were
never trained with one, and nothing changes for them.
"""

from typing import Any, Literal

from slimgpt.config import BosPolicy

Bos = Literal["none", "stream", "block"]
# A tokenizer made from a GGUF file, or saved again by another version, can lose the flag that adds BOS. Trained with it
# were these, by model type and BOS token: of the type llama are many models that have a BOS and never saw it in front.
_TRAINED_WITH_BOS = (("gemma", ""), ("llama", "<|begin_of_text|>"), ("mistral", "<s>"))


def resolve_bos(policy: BosPolicy, tokenizer: Any, model_type: str) -> Bos:
    """What ``policy`` means for a model: auto is its tokenizer's own habit, or its family's.

    Args:
        policy: none; stream: once, before the first token; block: before every block; auto.
        tokenizer: of transformers.
        model_type: of the model's config, pruned or not.

    Raises:
        ValueError: when BOS is requested of a tokenizer that has none.
    """
    if policy == "auto":
        return "block" if adds_bos(tokenizer) or _family_needs_it(tokenizer, model_type) else "none"
    if policy != "none" and tokenizer.bos_token_id is None:
        raise ValueError(f"bos is {policy!r}, but the model's tokenizer has no BOS token; use none or auto")
    return policy


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def lost_bos(tokenizer: Any, model_type: str) -> str:
    """The BOS token that prompts for this model have to begin with, since its tokenizer lost the habit; else empty."""
    needs = _family_needs_it(tokenizer, model_type) and not adds_bos(tokenizer)
    return str(tokenizer.bos_token) if needs else ""


def _family_needs_it(tokenizer: Any, model_type: str) -> bool:
    token = tokenizer.bos_token
    return token is not None and any(family in model_type and bos in ("", token) for family, bos in _TRAINED_WITH_BOS)


def text_tokens(bos: Bos, blocks: int, seq_len: int) -> int:
    """How many tokens of text ``blocks`` blocks of ``seq_len`` tokens take, BOS being among the latter."""
    return blocks * seq_len - {"none": 0, "stream": 1, "block": blocks}[bos]


def blocks_of(ids: list[int], bos: Bos, bos_token_id: int, seq_len: int) -> list[list[int]]:
    """Cut text into full blocks of ``seq_len`` tokens with BOS where the policy has it; the rest is dropped."""
    start = [] if bos == "none" else [bos_token_id]
    front, stream = (start, ids) if bos == "block" else ([], start + ids)
    step = seq_len - len(front)
    return [front + stream[at : at + step] for at in range(0, len(stream) - step + 1, step)]
