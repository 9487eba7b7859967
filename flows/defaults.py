"""What ``compress`` does by default: sized for two CPU cores and a quarter of an hour."""

from deploy.bench.config import BenchConfig
from slimgpt.config import EvalConfig, PruneConfig
from tasks.registry.config import RegistryConfig
from tasks.sweep.config import SweepConfig

PRUNE = PruneConfig(num_samples=32, seq_len=1024)
EVALUATION = EvalConfig(limit=20)  # seven tasks in about two minutes a model
BENCH = BenchConfig(load_shares=(), offline=False)  # `slimgpt bench` also measures other loads, and offline
REGISTRY = RegistryConfig()
SWEEP = SweepConfig()
