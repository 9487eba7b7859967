"""One file for llama.cpp and Ollama: ``export`` writes a checkpoint as GGUF, per-layer widths included."""
