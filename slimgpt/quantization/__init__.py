"""Store a model's weights in fewer bits: plan it, and have llm-compressor do it."""
