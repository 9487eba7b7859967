"""The process that quantises: llm-compressor, on packages of its own. Started by ``quantizer.py``.

    python -m slimgpt.quantization.worker REQUEST.json

Its output has a line for each finished layer (``layer 3 of 30``); everything else goes to standard error.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from pydantic import PrivateAttr
from safetensors.torch import load_file

from slimgpt.checkpoints.loading import load_to_compute
from slimgpt.equal_bits import settle_vector_functions
from slimgpt.usage import peak_memory

OUTPUT_HEAD = "lm_head"
PRESETS = {"w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}  # compressed-tensors' names
RESULT = "result.json"
IDS = "ids_NT"


class WatchedGPTQ(GPTQModifier):
    """GPTQ that says which layer is done."""

    _done: int = PrivateAttr(default=0)

    def on_sequential_epoch_end(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """After each layer, and once after what follows the last one."""
        super().on_sequential_epoch_end(state, *args, **kwargs)
        self._done += 1
        if self._done <= (layers := state.model.config.num_hidden_layers):
            sys.stdout.write(f"layer {self._done} of {layers}\n")
            sys.stdout.flush()


def recipe(scheme: str, group: int) -> Any:
    """What llm-compressor does: weights rounded one after the other, the rest making up for it (GPTQ); fp8: rounded.

    With 4 bits a group also has a zero point, and its range is the one of the least error, each column weighed by the
    energy of its inputs: on SmolLM2 that saves more than half of what rounding costs (benchmarks/RESULTS.md).
    """
    ignored = [OUTPUT_HEAD]
    if scheme == "fp8":
        return QuantizationModifier(targets="Linear", scheme=PRESETS[scheme], ignore=ignored)
    if scheme == "w8a8":
        return WatchedGPTQ(targets="Linear", scheme=PRESETS[scheme], ignore=ignored)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=False,
        observer="imatrix_mse",
        observer_kwargs={"norm": 2.0, "strict": True},  # without that energy: an error, not all columns alike
        **strategy,
    )
    return WatchedGPTQ(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=ignored
    )


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Write the quantised model to ``request["out"]``. Returns its peak memory in bytes, and torch's version."""
    settle_vector_functions()
    model = load_to_compute(request["model"], getattr(torch, request["dtype"]))
    given: dict[str, Any] = {}
    if request["ids"]:
        ids_NT = load_file(request["ids"])[IDS]
        rows = {"input_ids": ids_NT.tolist(), "attention_mask": torch.ones_like(ids_NT).tolist()}
        given = {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": len(ids_NT),
            "max_seq_length": ids_NT.shape[1],
            "shuffle_calibration_samples": False,  # they were drawn in random order
            "pipeline": "sequential",  # a layer at a time, on what the layers before it give by then
        }
    oneshot(model=model, recipe=recipe(request["scheme"], request["group"]), **given)
    model.save_pretrained(request["out"], save_compressed=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"peak_memory_bytes": peak_memory(device), "torch": torch.__version__}


def _end_with_parent() -> None:
    """End when the process that started this one does: its end of the standard input closes."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Read the request, and leave the result beside the model."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads(Path(sys.argv[1]).read_text())
    result = quantize(request)
    (Path(request["out"]) / RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
