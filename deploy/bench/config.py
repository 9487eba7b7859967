"""What load a benchmark puts on both models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimgpt.checkpoints.headers import raw_config
from slimgpt.config import check_limits, option

# What a table of milliseconds depends on; other fields are of servers, or of how often is measured.
MEASURED = ("num_prompts", "input_len", "output_len", "latency_iterations", "dtype", "enforce_eager", "kvcache_gib")
LATENCY_VOCABULARY = 10_000  # vllm bench latency draws token ids below this, whatever the model


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What both models are measured under. The defaults take more than half an hour on two CPU cores.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    num_prompts: int = option(32, "Requests per run.", ge=1)
    dataset_name: Literal["random", "sharegpt", "custom"] = option(
        "random",
        "Prompts: random tokens; sharegpt: the first turns of a file as ShareGPT's; custom: the field prompt of a "
        ".jsonl file. Offline runs take random ones.",
    )
    dataset_path: str = option("", "The file of sharegpt or custom.")
    input_len: int = option(128, "Prompt tokens per request; of random prompts.", ge=1)
    output_len: int = option(64, "Answer tokens per request, exactly.", ge=2)
    pairs: int = option(3, "Dense-pruned pairs; ratios are their median, low and high.", ge=1)
    restart: bool = option(
        True,
        "Start both servers anew for each pair: a server keeps for its life a speed that can be off that of its next "
        "start; compress leaves it out by default.",
    )
    load_shares: tuple[float, ...] = option(
        (0.25, 0.5, 0.75),
        "Additional load levels, as fractions of the dense model's full-load request rate (Poisson arrivals); empty: "
        "none.",
    )
    request_rates: tuple[float, ...] = option((), "Further loads: Poisson arrivals, requests per second.")
    offline: bool = option(
        True,
        "Also vllm bench throughput and latency, which start an engine for each run; compress leaves them out by "
        "default.",
    )
    latency_iterations: int = option(
        5, "Requests of each offline latency run, one at a time; batches of all requests under slimgpt latency.", ge=1
    )
    max_concurrency: int = option(0, "Requests under way at most; 0: no limit.", ge=0)
    num_warmups: int = option(16, "Requests, sent at once before each run, that are not counted.", ge=1)
    seed: int = option(0, "Prompts of the first pair; each further pair adds 1.", ge=0)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("bfloat16", "Dtype of both servers.")
    enforce_eager: bool = option(False, "Skip torch.compile: the servers start faster and generate more slowly.")
    kvcache_gib: int = option(2, "On CPU: memory for each server's KV cache, GiB.", ge=1)
    trust_remote_code: bool = option(False, "Run the code in the checkpoints: needed only without the slimgpt plugin.")
    show_drift: bool = option(True, "Measure dense once more at the end.")
    start_timeout_s: float = option(900.0, "Longest wait for a server to answer, seconds.", gt=0)
    run_timeout_s: float = option(1800.0, "Longest run, seconds.", gt=0)

    def __post_init__(self) -> None:
        check_limits(self)
        if (self.dataset_name == "random") != (not self.dataset_path):
            need = "must name its file" if self.dataset_path == "" else "must be empty, or dataset_name another one"
            raise ValueError(
                f"dataset_name is {self.dataset_name!r} and dataset_path {self.dataset_path!r}: the latter {need}"
            )
        if self.dataset_name == "custom" and not self.dataset_path.endswith(".jsonl"):
            raise ValueError(
                f"dataset_path is {self.dataset_path!r}; vLLM takes custom prompts from a .jsonl file alone"
            )
        for name, unit in (
            ("load_shares", "a share, such as 0.5"),
            ("request_rates", "requests per second, such as 2"),
        ):
            values: Any = tuple(getattr(self, name))  # JSON and YAML bring lists
            if not all(isinstance(value, int | float) and value > 0 for value in values):
                raise ValueError(f"{name} is {list(values)}; each must be above 0: {unit}")
            object.__setattr__(self, name, values)

    @property
    def max_model_len(self) -> int:
        """Room for twice a request: retokenised prompts can come out a little longer than requested."""
        return 2 * (self.input_len + self.output_len)


def longest_of(model: Path) -> int:
    """The most tokens that ``model`` reads, 0 where its config does not say."""
    return int(raw_config(model).get("max_position_embeddings", 0))


def check_model(model: Path, config: BenchConfig) -> None:
    """Raise ValueError where ``model`` cannot take the requests."""
    longest, tokens = longest_of(model), config.input_len + config.output_len
    if longest and tokens > longest:
        raise ValueError(
            f"input_len {config.input_len} + output_len {config.output_len} = {tokens} tokens; {model} allows "
            f"{longest}: lower one of them"
        )
    if config.offline:
        check_vocabulary(model, "set offline to false (--no-offline)")


def check_vocabulary(model: Path, remedy: str) -> None:
    """Raise ValueError where ``vllm bench latency`` takes tokens that ``model`` does not have."""
    vocabulary = raw_config(model).get("vocab_size", LATENCY_VOCABULARY)
    if vocabulary < LATENCY_VOCABULARY:
        raise ValueError(
            f"{model} has a vocabulary of {vocabulary:,}; vllm bench latency takes its prompts from the first "
            f"{LATENCY_VOCABULARY:,} tokens: {remedy}"
        )
