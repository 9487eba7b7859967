"""Instructions with answers: rows with ``instruction``, ``input`` (may be empty) and ``output``, in Alpaca's words."""

from typing import Any

INSTRUCTION_FIELDS = ("instruction", "output")  # that a row must have
# The prompts of Alpaca, with which LLM-Pruner and SlimGPT recover.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def prompt_and_answer(row: dict[str, Any], place: str) -> tuple[str, str]:
    """A row's prompt in Alpaca's words, and its answer, which may be blank.

    Raises:
        ValueError: when a field is missing or no text; ``place`` says where.
    """
    for name in INSTRUCTION_FIELDS:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{place} has no field {name!r} that is a text (it has: {', '.join(row)}); mend it")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise ValueError(f"{place} has a field 'input' that is a {type(extra).__name__}; it must be a text: mend it")
    prompt = (_WITH_INPUT if extra.strip() else _WITHOUT_INPUT).format(instruction=row["instruction"], input=extra)
    return prompt, row["output"]
