"""``slimgpt export``."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from flows.cli.finding import find
from slimgpt.quantities import in_millions


def export(
    model: str,
    out: Path,
    *,
    kind: Annotated[Literal["f16", "q8_0", "q4_k_m"], Parameter(name="--type")] = "f16",
    name: str = "",
    revision: str = "",
    runs: str = "",
    dry_run: bool = False,
) -> None:
    """Write MODEL as one GGUF file OUT for llama.cpp and Ollama, with a Modelfile beside it.

    Layers that differ in width are written for LLaMA, Mistral and Qwen2; other families are refused.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        out: A new file that ends in .gguf; an older GGUF file is replaced.
        kind: f16: 16 bits for a weight; q8_0: 8.5; q4_k_m: about 5, by llama.cpp's own code.
        name: What the file says the model is called; by default as MODEL is.
        revision: Commit or tag on the hub; empty for the newest.
        runs: Folder of the runs, whose registry holds MODEL; ./runs or SLIMGPT_RUNS by default.
        dry_run: Say what the file would be, and how large, and write nothing.
    """
    from deploy.llamacpp.blocks import check_type
    from deploy.llamacpp.export import check_name, check_target, plan_export
    from deploy.llamacpp.export import export as write
    from flows.cli import show

    check_type(kind)
    check_name(out)
    plan = plan_export(find(model, revision, runs), kind)
    check_target(plan, out)
    show.line(
        f"{out}: architecture {plan.architecture.label}, {len(plan.tensors)} tensors, {in_millions(plan.bytes)} MB "
        f"and the vocabulary; {plan.memory_bytes / 1e6:,.0f} MB of memory, about {plan.seconds:,.0f} s on 2 CPU cores"
    )
    if dry_run:
        return
    write(plan, out, name=name or Path(model).name)
    show.line(f"written to {out}; llama-cli -m {out}, or ollama create NAME -f {out.with_suffix('.Modelfile')}")
