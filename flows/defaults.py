"""What ``compress`` does when nothing is said: sized for two CPU cores and a quarter of an hour."""

from deploy.benchmark import BenchConfig
from slimgpt.config import EvalConfig, PruneConfig

PRUNE = PruneConfig(num_samples=32, seq_len=1024)
EVALUATION = EvalConfig(limit=20)  # seven tasks in about two minutes a model
BENCH = BenchConfig()
