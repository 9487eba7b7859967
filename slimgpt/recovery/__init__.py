"""Trains a pruned model again. Importing it asks for equal bits, as the engine does."""

from slimgpt.equal_bits import request_equal_bits

request_equal_bits()
