"""Walks a model layer by layer: plan, prune, resume.

Importing this package asks for equal bits: before torch multiplies its first matrices, if it is imported early enough.
"""

from slimgpt.equal_bits import request_equal_bits

request_equal_bits()
