"""``slimgpt quantize``."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from flows.cli.finding import find
from flows.cli.flags import config_from, flags, given
from slimgpt.config import QuantizeConfig

_all: Any = Parameter(name="*")
QuantizeFlags = flags("QuantizeFlags", QuantizeConfig(), group="Quantisation")


def quantize(
    model: str,
    out: Path,
    *,
    revision: str = "",
    runs: str = "",
    dry_run: bool = False,
    options: Annotated[QuantizeFlags, _all] = QuantizeFlags(),
) -> None:
    """Write MODEL, dense or pruned, in fewer bits into the folder OUT, by llm-compressor, for vLLM and transformers.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        out: A new folder for the quantised model.
        revision: Commit or tag on the hub; empty for the newest.
        runs: Folder of the runs, whose registry holds MODEL; ./runs or SLIMGPT_RUNS by default.
        dry_run: Say what would happen, and what is missing, and stop.
    """
    config = config_from(QuantizeConfig(), given(options))
    from flows.cli.interrupts import listening

    with listening() as interrupts:
        from flows.cli import show
        from slimgpt.quantization.plan import plan
        from slimgpt.quantization.quantizer import quantize as run

        interrupts.unit, interrupts.kept = "layer", "nothing is kept: run the same command again to start anew"
        folder = find(model, revision, runs)
        planned = plan(folder, config, out)
        if dry_run:
            show.quantization_plan(planned)
            if planned.missing:
                raise ValueError("; ".join(planned.missing))
            return
        if planned.remark:
            show.line(f"{planned.format}: {planned.remark}")
        from tqdm import tqdm

        with tqdm(total=planned.layers, unit="layer", desc="quantize", file=sys.stderr) as bar:

            def on_layer(done: int, layers: int) -> None:
                bar.update(done - bar.n)
                interrupts.unit_done(done, layers)

            made = run(folder, out, config, tokens=planned.tokens, on_layer=on_layer if config.reads_text else None)
        step = made.lineage.steps[-1]
        show.line(step.summary)
        before, after = step.figures["bytes_before"] / 1e6, step.figures["bytes_after"] / 1e6
        show.line(f"weight files  {before:,.1f} MB -> {after:,.1f} MB")
        show.line(f"written to    {out}")
