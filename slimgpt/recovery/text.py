"""What a model is trained on, and what is held out: sequences of plain text, or instructions with answers."""

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from slimgpt.checkpoints.origins import read_config
from slimgpt.config import RecoverConfig
from slimgpt.data.bos import resolve_bos
from slimgpt.data.calibration import calibrate, encoded, load_tokenizer, together
from slimgpt.data.instructions import Instructions, read_instructions
from slimgpt.data.mixture import parts_of
from slimgpt.recovery.rows import Row, TokenFile

BATCH = 64  # prompts that are tokenised at once: a tokenizer holds a hundred times what comes out of it
PASSES = 1000  # over the same text at most: who asks for more meant another number


@dataclass(frozen=True)
class RecoveryText:
    """Sequences as Trainer takes them: ``input_ids``, and of instructions ``labels``.

    Attributes:
        train: in the order in which they are read, over and over until the steps are done.
        held_out: decide which state is kept.
        steps: of the optimizer.
        facts: what the lineage says of the text.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    steps: int
    facts: dict[str, Any]


def draw(model: Path, config: RecoverConfig) -> RecoveryText:
    """Draw what the model in folder ``model`` is trained on: as much as is needed, or as the text has.

    Args:
        model: a folder with a tokenizer.
        config: filled.

    Raises:
        ValueError, FileNotFoundError: as ``calibrate`` and ``read_instructions`` raise; where the text is too short for
            one step, or would be read more than PASSES times.
    """
    return _instructions(model, config) if config.method == "lora" else _plain(model, config)


def _plain(model: Path, config: RecoverConfig) -> RecoveryText:
    """Blocks of text. Of each text the last ones drawn are held out; the others come in random order."""
    assert config.token_count is not None, "the config has seen to it"
    steps = -(-config.token_count // (config.batch_size * config.seq_len))
    wanted = steps * config.batch_size
    train, held_out, parts, different = [], [], [], 0
    named = parts_of(config.text, wanted)
    for name, count in named:
        kept = max(1, round(config.held_out * count / wanted))
        part = calibrate(
            model,
            name,
            num_samples=count + kept,
            seq_len=config.seq_len,
            seed=config.seed,
            bos=config.bos,
            fewer=True,
        )
        own = [{"input_ids": ids_T} for ids_T in part.ids_NT[:-kept]]
        if not own:
            raise ValueError(
                f"{part.facts['name']} has {len(part.ids_NT)} sequences of {config.seq_len} tokens, and {kept} are to "
                "be held out; name a larger text, or lower seq_len or held_out"
            )
        _check_passes(count / len(own), len(own) * config.seq_len, part.facts["name"], config)
        different += len(own)
        train += list(islice(cycle(own), count)) if len(named) > 1 else own  # each text keeps its share
        held_out += [{"input_ids": ids_T} for ids_T in part.ids_NT[-kept:]]
        parts.append(part)
    facts = together(parts).facts
    if len(named) > 1:
        facts["name"] = ", ".join(
            f"{part.facts['name']}:{count / wanted:.3g}" for part, (_, count) in zip(parts, named, strict=True)
        )
    random.Random(config.seed).shuffle(train)
    train = train[: _in_whole_steps(len(train), config, facts["name"], len(held_out))]
    facts |= {
        "use": "training",
        "num_samples": len(train),
        "tokens": wanted * config.seq_len,
        "different_tokens": min(different, len(train)) * config.seq_len,
    }
    return RecoveryText(train, held_out, steps, facts)


def _instructions(model: Path, config: RecoverConfig) -> RecoveryText:
    """Prompts with answers, of which the answers are scored; one that the length cuts off altogether is left out."""
    source = read_instructions("alpaca" if config.text == "auto" else config.text)
    made, bos = _tokenised(source, model, config)
    order = array("Q", range(len(made)))
    random.Random(config.seed).shuffle(order)
    kept, order = order[: config.held_out], order[config.held_out :]
    tokens = sum(made.lengths[i] for i in order)
    steps = len(order) // config.batch_size
    if config.token_count is not None and tokens:
        _check_passes(config.token_count / tokens, tokens, source.name, config)
        steps = -(-config.token_count * len(order) // (tokens * config.batch_size))
    order = order[: steps * config.batch_size]
    order = order[: _in_whole_steps(len(order), config, source.name, len(kept))]
    different = sum(made.lengths[i] for i in order)
    held_out, rows = made.rows(kept), made.rows(order)
    digest = hashlib.sha256()
    for part in (held_out, rows):
        for row in part:
            digest.update(row["input_ids"].numpy().tobytes())
    return RecoveryText(
        rows,
        held_out,
        steps,
        {
            "name": source.name,
            "origin": source.origin,
            "sha256": source.sha256,
            "use": "training",
            "num_samples": len(rows),
            "seq_len": config.seq_len,
            "tokens": round(different * steps * config.batch_size / len(rows)),
            "different_tokens": different,
            "seed": config.seed,
            "bos": bos,
            "ids_sha256": digest.hexdigest(),
        },
    )


def _tokenised(source: Instructions, model: Path, config: RecoverConfig) -> tuple[TokenFile, str]:
    tokenizer = load_tokenizer(model)
    bos = resolve_bos(config.bos, tokenizer, read_config(model).model_type)
    start = [] if bos == "none" else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made, pairs = TokenFile(), source.pairs()
    while batch := list(islice(pairs, BATCH)):
        prompts, answers = (encoded(tokenizer, list(texts)) for texts in zip(*batch, strict=True))
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = (start + prompt + answer + end)[: config.seq_len]
            unscored = len(start) + len(prompt)
            if len(ids) > unscored:
                made.add(ids, unscored)
    return made, bos


def _check_passes(passes: float, tokens: int, name: str, config: RecoverConfig) -> None:
    if passes > PASSES:
        raise ValueError(
            f"tokens is {config.tokens}, which reads the {tokens:,} tokens of {name} {passes:,.0f} times; the limit is "
            f"{PASSES:,}: ask for fewer tokens, or name a larger text"
        )


def _in_whole_steps(sequences: int, config: RecoverConfig, name: str, held_out: int) -> int:
    """How many of the sequences are used, so that each step has all of its own."""
    count = sequences // config.batch_size * config.batch_size
    if not count:
        raise ValueError(
            f"{name} gives {sequences + held_out} sequences of {config.seq_len} tokens, of which {held_out} are held "
            f"out; a step takes {config.batch_size}: name a larger text, or lower seq_len, batch_size or held_out"
        )
    return count
