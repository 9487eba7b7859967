"""The prompts of a benchmark: vLLM's random ones, ShareGPT's, or a file of the user's; what of them vLLM is told."""

import json
from pathlib import Path

from deploy.bench.config import BenchConfig
from slimgpt.files import exists

SHAREGPT_PROMPT, SHAREGPT_TOTAL = 1024, 2048  # tokens of the longest prompt, and with its answer, that vLLM takes of it
_SHAREGPT_SHORTEST = 4  # tokens


def check_dataset(model: Path, config: BenchConfig, longest: int) -> None:
    """Refuse a file that vLLM's command would fail on, and prompts that the model cannot read.

    Args:
        model: whose tokenizer counts them.
        config: names the file.
        longest: the most tokens that the model reads; 0 where that is unknown.

    Raises:
        ValueError, FileNotFoundError: one line with the remedy.
    """
    if config.dataset_name == "random":
        return
    path = Path(config.dataset_path)
    if not exists(path) or not path.is_file():
        raise FileNotFoundError(f"dataset_path {config.dataset_path!r} does not exist; name a file that does")
    if config.dataset_name == "sharegpt":
        _check_conversations(model, path, min(SHAREGPT_PROMPT, SHAREGPT_TOTAL - config.output_len))
        tokens = SHAREGPT_PROMPT
    else:
        tokens = longest_prompt(model, path)
    if longest and tokens + config.output_len > longest:
        raise ValueError(
            f"prompts of {path.name} have up to {tokens} tokens, with output_len {config.output_len} more than the "
            f"{longest} that {model} allows: lower output_len, or take shorter prompts"
        )


def longest_prompt(model: Path, path: Path) -> int:
    """Tokens of the longest prompt in a file with a JSON object per line, whose field ``prompt`` is a string."""
    from slimgpt.data.calibration import load_tokenizer  # with torch, which takes seconds

    tokenizer = load_tokenizer(model)
    longest, words = 0, False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error}); it holds an object per line") from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError(f"{path} line {number} has no field 'prompt' that is a string")
            if not (tokens := len(tokenizer(row["prompt"])["input_ids"])):
                raise ValueError(f"{path} line {number} holds an empty prompt, which vLLM refuses; remove the line")
            longest, words = max(longest, tokens), words or not _is_number(row["prompt"])
    if not longest:
        raise ValueError(f"{path} holds no prompt")
    if not words:
        raise ValueError(f"the prompts of {path} are all numbers, which vLLM takes for no text; add one with words")
    return longest


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_conversations(model: Path, path: Path, longest: int) -> None:
    """Check that ``path`` is a file as ShareGPT's: a list of objects with a list ``conversations``.

    vLLM ends with an error at the first entry of another form, and where it may take no prompt at all.
    """
    from slimgpt.data.calibration import load_tokenizer  # with torch, which takes seconds

    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); ShareGPT's file is one list of conversations") from None
    prompts = []
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        talk = row.get("conversations", []) if isinstance(row, dict) else None
        if not isinstance(talk, list):
            raise ValueError(f"{path} entry {number} is not an object with a list 'conversations'; remove it")
        if len(talk) < 2:
            continue
        if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in talk[:2]):
            raise ValueError(
                f"{path} entry {number} has a turn without a text 'value'; ShareGPT's turns have from and value"
            )
        prompts.append(talk[0]["value"])
    if not prompts:
        raise ValueError(f"{path} holds no conversations of two turns; name a file as ShareGPT's")
    tokenizer = load_tokenizer(model)
    if not any(_SHAREGPT_SHORTEST <= len(tokenizer(prompt)["input_ids"]) <= longest for prompt in prompts):
        raise ValueError(f"{path} has no first turn of {_SHAREGPT_SHORTEST} to {longest} tokens; vLLM takes no others")


def serve_arguments(config: BenchConfig) -> list[str]:
    """What ``vllm bench serve`` is told of the prompts, and how long the answers are."""
    name = ["--dataset-name", config.dataset_name]
    if config.dataset_name == "random":
        lengths = ["--random-input-len", str(config.input_len), "--random-output-len", str(config.output_len)]
        return [*name, "--random-range-ratio", "0", *lengths]
    name += ["--dataset-path", str(Path(config.dataset_path).absolute())]
    if config.dataset_name == "sharegpt":
        return [*name, "--sharegpt-output-len", str(config.output_len)]
    return [*name, "--custom-output-len", str(config.output_len), "--skip-chat-template"]
