"""vLLM: whether it runs here, the plugin and its model classes, tensor parallelism."""
