"""Does the precision of the statistics, or of the forward pass, change what is pruned?

    python benchmarks/precision.py                                  # SmolLM2, 32 x 1024 tokens, about 10 minutes

First, H summed in float32 against H summed in float64, over the same activations: at every choice of the run, both are
asked, the float32 one is followed, and units that differ are counted. Second, a bfloat16 forward pass with float32
statistics against a float32 one: units and perplexity. (Not called statistics.py: that would hide Python's own.)
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimgpt.modeling  # noqa: F401  (registers the pruned forms)
from slimgpt.checkpoints.source import resolve_model
from slimgpt.config import PruneConfig
from slimgpt.data.text import perplexity_text
from slimgpt.engine import decisions, pruner
from slimgpt.engine.job import Job
from slimgpt.evaluation.perplexity import perplexity
from slimgpt.method import obs
from slimgpt.method.selection import ChannelPath
from slimgpt.report import PruneReport


class Both(obs.Gram):
    """H in float32 and, beside it, in float64; what the latter says is kept for ``Compared``."""

    latest: torch.Tensor

    def __init__(self, dim: int, device: torch.device | str, name: str = "H"):
        super().__init__(dim, device, name)
        self.exact_DD = torch.zeros(dim, dim, device=device, dtype=torch.float64)

    def add(self, x_TD: torch.Tensor) -> None:
        """Add tokens to both."""
        super().add(x_TD)
        x_TD = x_TD.reshape(-1, x_TD.shape[-1]).double()
        self.exact_DD.addmm_(x_TD.T, x_TD)

    def finish(self) -> torch.Tensor:
        """The float32 one."""
        H_DD, Both.latest = super().finish(), self.exact_DD
        self.gap = float((H_DD - self.exact_DD).norm() / self.exact_DD.norm())
        return H_DD


class Compared:
    """Makes each choice twice, from the given P and from that of ``Both.latest``, and answers the first."""

    def __init__(self, remove: Callable[..., Any], percdamp: float):
        self.remove, self.percdamp = remove, percdamp
        self.differences: list[dict[str, Any]] = []

    def __call__(self, W_OD: torch.Tensor, P_DD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As ``remove_heads`` and ``remove_channels``."""
        given = self.remove(W_OD, P_DD, *args, **kwargs)
        exact = self.remove(W_OD, obs.invert(Both.latest, self.percdamp).P_DD, *args, **kwargs)
        gone, gone_exactly = self._units(given), self._units(exact)
        errors = [self._error(x) for x in (given, exact)]
        self.differences.append(
            {
                "units": len(gone_exactly),
                "differ": len(gone_exactly - gone),
                "error": abs(errors[0] / errors[1] - 1) if errors[1] else 0.0,
            }
        )
        return given

    def _units(self, path: Any) -> set[int]:
        return set(path.order.tolist()) if isinstance(path, ChannelPath) else {h for step in path for h in step.heads}

    def _error(self, path: Any) -> float:
        return sum(path.step_errors) if isinstance(path, ChannelPath) else sum(step.error for step in path)


def main() -> None:
    """Print one JSON line per question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=12, help="of 1024 tokens of WikiText-2 for perplexity")
    asked = parser.parse_args()
    folder = resolve_model(asked.model)

    def config(dtype: str) -> PruneConfig:
        return PruneConfig(
            ratio=asked.ratio, num_samples=asked.num_samples, seq_len=asked.seq_len, device="cpu", dtype=dtype
        )

    calibration, text = Job(folder, config("float32")).calibration(), perplexity_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def pruned(dtype: str) -> tuple[PruneReport, float]:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            report = pruner.prune(folder, out, config(dtype), calibration=calibration)
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            return report, perplexity(model, tokenizer, text, max_blocks=asked.blocks).perplexity

    heads, channels = (
        Compared(f, config("float32").percdamp) for f in (decisions.remove_heads, decisions.remove_channels)
    )
    plain = obs.Gram, decisions.remove_heads, decisions.remove_channels
    obs.Gram, decisions.remove_heads, decisions.remove_channels = Both, heads, channels  # type: ignore[misc, assignment]
    report, after = pruned("float32")
    obs.Gram, decisions.remove_heads, decisions.remove_channels = plain  # type: ignore[misc]
    for name, compared in (("heads", heads), ("channels", channels)):
        seen = compared.differences
        summary = {
            "choices": len(seen),
            "units gone": sum(x["units"] for x in seen),
            "differ": sum(x["differ"] for x in seen),
            "choices that differ": [(i, x["differ"], x["units"]) for i, x in enumerate(seen) if x["differ"]],
            "largest relative difference of the error": max((x["error"] for x in seen), default=0.0),
        }
        print(json.dumps({f"float32 against float64 statistics, {name}": summary}), flush=True)
    half, after_half = pruned("bfloat16")
    layers = list(zip(report.layers, half.layers, strict=True))
    print(
        json.dumps(
            {
                "forward in bfloat16 against float32": {
                    "text": f"{text.name} ({text.origin})",
                    "perplexity, float32": round(after, 3),
                    "perplexity, bfloat16": round(after_half, 3),
                    "layers whose heads differ": sum(a.kept_heads != b.kept_heads for a, b in layers),
                    "channels that differ": sum(len(set(a.kept_channels) - set(b.kept_channels)) for a, b in layers),
                    "channels kept": sum(len(a.kept_channels) for a, _ in layers),
                    "seconds, float32 (with float64 beside)": round(report.seconds, 1),
                    "seconds, bfloat16": round(half.seconds, 1),
                    "phases, bfloat16": {k: round(v, 1) for k, v in half.seconds_by_phase.items()},
                }
            }
        )
    )


if __name__ == "__main__":
    main()
