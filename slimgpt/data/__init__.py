"""Texts and token blocks: for calibration and for perplexity."""
