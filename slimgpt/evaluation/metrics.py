"""Which of a task's metrics is quoted: the one rule of reports, gates, model cards, sweeps and tables."""

from collections.abc import Mapping

# The first that a task has; lm-eval adds the name of a filter behind some ("exact_match_strict-match").
_PREFERRED = ("acc_norm", "acc", "exact_match", "em", "pass_1", "mcc", "f1", "bleu", "rouge1", "chrf")
_OUT_OF_100 = ("bleu", "rouge", "chrf")  # the others are out of 1
_NOT_A_SCORE = ("perplexity", "byte", "bits")


def quoted_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Task -> the name of the metric that is quoted for it, such as ``piqa`` -> ``piqa/acc_norm``.

    Higher is better for all of them. A task with none of the known metrics is quoted by its first score; perplexities
    and standard errors are not scores.
    """
    kinds: dict[str, list[str]] = {}
    for name in metrics:
        task, _, kind = name.rpartition("/")
        if task and not kind.endswith("_stderr") and not any(part in kind for part in _NOT_A_SCORE):
            kinds.setdefault(task, []).append(kind)
    return {task: f"{task}/{_quoted(of_task)}" for task, of_task in kinds.items()}


def _quoted(kinds: list[str]) -> str:
    for preferred in _PREFERRED:
        if preferred in kinds:
            return preferred
        filtered = [kind for kind in kinds if kind.startswith(f"{preferred}_")]
        if filtered:
            return filtered[0]
    return kinds[0]


def percent(name: str, value: float) -> float:
    """A quoted metric's value in percent."""
    return value if name.rpartition("/")[2].startswith(_OUT_OF_100) else 100 * value
