"""Prompts and what each model said to them, as the last step that asked them has them."""

from slimgpt.checkpoints.lineage import Lineage


def answers_of(lineage: Lineage) -> list[dict[str, str]]:
    """One dict per prompt: ``prompt``, and by the model's name what it said; none where no step asked."""
    return next((step.answers for step in reversed(lineage.steps) if step.answers), [])


def answers_markdown(lineage: Lineage, level: str = "##") -> list[str]:
    """The lines of a section; none where no step asked."""
    lines: list[str] = []
    for answers in answers_of(lineage):
        said = {name: text for name, text in answers.items() if name != "prompt"}
        lines += ["```text", answers["prompt"], "```", ""]
        lines += [f"- {name}: `{' '.join(text.replace('`', chr(39)).split())}`" for name, text in said.items()]
        lines.append("")
    return [f"{level} Answers", "", *lines] if lines else []
