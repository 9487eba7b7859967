"""From a pruned checkpoint to a served, measured model: the vLLM plugin, the bundle, the server, the benchmark."""
