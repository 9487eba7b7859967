"""How good a model is: perplexity and lm-eval's tasks."""
