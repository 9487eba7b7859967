"""What is measured of a model."""

from dataclasses import dataclass
from typing import Any, Literal

from slimgpt.config.fields import BOS_WORDS, DTYPE_WORDS, check_limits, option


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    tasks: tuple[str, ...] = option(
        ("auto",),
        "lm-eval tasks: names, auto (the paper's seven where their data is available, else continuation), or none.",
    )
    limit: float = option(0, "Documents per task, the first ones; below 1 a share of them; 0 is all.", ge=0)
    num_fewshot: int = option(-1, "Examples before each document of the tasks; -1: each task's own number.", ge=-1)
    apply_chat_template: bool = option(
        False, "Put the tasks' prompts through the model's chat template, examples as turns; for instruct models."
    )
    batch_size: int = option(8, "Sequences that pass the model at once.", ge=1)
    perplexity: str = option(
        "auto",
        "Text for perplexity: wikitext2, wikitext2-validation (with -rows: joined by blank lines, as in papers), "
        "c4-validation, python, a .txt, .raw, .jsonl or .parquet file, auto, or none.",
    )
    seq_len: int = option(1024, "Tokens per perplexity block.", ge=2)
    max_blocks: int = option(12, "Perplexity blocks, the first ones; 0 is all.", ge=0)
    bos: Literal["auto", "none", "stream", "block"] = option(
        "auto", BOS_WORDS + " Tasks: before every prompt, unless none."
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "Dtype of the model. " + DTYPE_WORDS)

    def __post_init__(self) -> None:
        given: Any = self.tasks  # JSON and YAML bring lists, the command line "a,b"
        items = [given] if isinstance(given, str) else given
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"tasks is {given!r}; it must be a list of names")
        tasks = tuple(name.strip() for item in items for name in item.split(",") if name.strip())
        object.__setattr__(self, "tasks", () if tasks == ("none",) else tasks)
        check_limits(self)
        if self.limit >= 1 and self.limit != int(self.limit):
            raise ValueError(f"limit is {self.limit:g}; it must be a whole number of documents, or a share below 1")
        object.__setattr__(self, "limit", int(self.limit) if self.limit == int(self.limit) else self.limit)
        if not self.tasks and self.perplexity == "none":
            raise ValueError("tasks is empty and perplexity is 'none'; nothing would be measured, name at least one")
