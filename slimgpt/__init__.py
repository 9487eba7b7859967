"""SlimGPT: structured pruning of LLaMA-family models, layer by layer, by Optimal Brain Surgeon (arXiv 2412.18110)."""

from .modeling import register as _register

__version__ = "0.1.0"

_register()
