"""Which of a task's metrics is quoted: the one rule of reports, gates, model cards, sweeps and tables."""

from collections.abc import Mapping

# The first that a task has; lm-eval adds the name of a filter behind some ("exact_match_strict-match"). Of each of
# these higher is better, and its scale is the same in all tasks, which is not so for f1 and rouge.
_QUOTED = ("acc_norm", "acc", "exact_match", "em", "pass_1", "mcc", "bleu", "chrf")
_OUT_OF_100 = ("bleu", "chrf")  # the others are out of 1


def quoted_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Task -> the name of the metric that is quoted for it, such as ``piqa`` -> ``piqa/acc_norm``.

    A task that has none of the metrics above is not quoted: whether higher is better, and out of what, is not known.
    """
    kinds: dict[str, list[str]] = {}
    for name in metrics:
        task, _, kind = name.rpartition("/")
        if not kind.endswith("_stderr"):
            kinds.setdefault(task, []).append(kind)
    quoted = {task: _quoted(of_task) for task, of_task in kinds.items()}
    return {task: f"{task}/{kind}" for task, kind in quoted.items() if kind}


def _quoted(kinds: list[str]) -> str:
    for metric in _QUOTED:
        matches = [kind for kind in kinds if kind == metric or kind.startswith(f"{metric}_")]
        if matches:
            return metric if metric in matches else matches[0]
    return ""


def documents(limit: float) -> str:
    """Which documents of each task a limit stands for, in words; empty for all of them."""
    if not limit:
        return ""
    return f"the first {limit:.3g} of the documents" if limit < 1 else f"the first {limit} documents"


def percent(name: str, value: float) -> float:
    """A quoted metric's value in percent."""
    return value if name.rpartition("/")[2].startswith(_OUT_OF_100) else 100 * value
