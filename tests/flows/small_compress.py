"""Parameters of the flow compress for a tiny random model, which take seconds."""

from pathlib import Path
from typing import Any

from deploy.bench.config import BenchConfig
from slimgpt.config import EvalConfig, PruneConfig
from tasks.registry.config import RegistryConfig
from tests.tiny_models import write_dense

LAYERS = 3


def small_parameters(place: Path) -> dict[str, Any]:
    """Of all stages; the model and the runs are in ``place``."""
    # head_dim 32 is the smallest that vLLM's CPU kernels take
    dense = write_dense(
        place / "tiny",
        num_hidden_layers=LAYERS,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
    )
    return {
        "model": str(dense),
        "runs": str(place / "runs"),
        "registry": RegistryConfig(machine_seconds=0.2),
        "prune": PruneConfig(num_samples=4, seq_len=64, calibration="python", ffn_multiple=16),
        "evaluation": EvalConfig(tasks=("continuation",), limit=4, perplexity="python", seq_len=64, max_blocks=2),
        "bench": BenchConfig(
            num_prompts=4,
            input_len=16,
            output_len=32,
            pairs=1,
            load_shares=(),
            offline=False,
            num_warmups=1,
            enforce_eager=True,
            show_drift=False,
            kvcache_gib=1,
            dtype="float32",
        ),
    }
