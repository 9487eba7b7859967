"""Weights in blocks that share a scale: which kind of block each matrix gets, and the numbers in it.

The gguf package quantises what it can; blocks of the K kinds are ggml's own work (llama.cpp's library, in xllamacpp).
"""

import ctypes
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal, get_args

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

Type = Literal["f16", "q8_0", "q4_k_m"]
TYPES: tuple[Type, ...] = get_args(Type)
FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
# Blocks of 256 weights, and what a matrix gets whose rows do not divide into them: blocks of 32.
_SMALLER = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}


def check_type(kind: str) -> None:
    """Refuse a type that cannot be made here.

    Raises:
        ValueError: naming the types, or the package that is needed.
    """
    if kind not in TYPES:
        raise ValueError(f"type is {kind!r}; it must be one of {', '.join(TYPES)}")
    if kind == "q4_k_m" and importlib.util.find_spec("xllamacpp") is None:
        raise ValueError("q4_k_m needs xllamacpp, which holds llama.cpp: pip install 'slimgpt[gguf]', or use q8_0")


def kind_of(kind: Type, name: str, shape: tuple[int, ...], *, layers: int) -> GGMLQuantizationType:
    """How one tensor's numbers are kept, as llama.cpp's own program chooses.

    Args:
        kind: the type of the file.
        name: of the tensor in it.
        shape: of the tensor; vectors stay in 32 bits.
        layers: of the model.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == "f16":
        return GGMLQuantizationType.F16
    chosen = GGMLQuantizationType.Q8_0 if kind == "q8_0" else _k_kind(name, layers)
    for candidate in (chosen, _SMALLER.get(chosen, chosen)):
        if shape[-1] % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return GGMLQuantizationType.F16


def _k_kind(name: str, layers: int) -> GGMLQuantizationType:
    """Six bits where errors cost most: in the vocabulary, and in values and ``down_proj`` of some layers."""
    if not name.startswith("blk."):
        return GGMLQuantizationType.Q6_K
    _, index, part, _ = name.split(".")
    layer, eighth = int(index), layers // 8
    dear = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return GGMLQuantizationType.Q6_K if part in ("attn_v", "ffn_down") and dear else GGMLQuantizationType.Q4_K


def bytes_shape(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[int, ...]:
    """The shape of a tensor's bytes in the file."""
    return quant_shape_to_byte_shape(shape, kind)


def in_blocks(weight_MN: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a tensor.

    Args:
        weight_MN: [rows, columns] or [length], float32.
        kind: how its numbers are kept.
    """
    if kind in _SMALLER:
        return _by_ggml(weight_MN, kind)
    return quantize(weight_MN, kind).view(np.uint8)


def _by_ggml(weight_MN: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    weight_MN = np.ascontiguousarray(weight_MN, dtype=np.float32)
    rows, columns = weight_MN.shape
    blocks = np.empty(bytes_shape((rows, columns), kind), dtype=np.uint8)
    source = weight_MN.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    workers = os.cpu_count() or 1
    step = -(-rows // workers)

    def part(first: int) -> None:  # ctypes lets other threads run meanwhile
        _ggml()(kind, source, blocks.ctypes.data, first * columns, min(step, rows - first), columns, None)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(part, range(0, rows, step)))
    return blocks


@cache
def _ggml() -> "ctypes._NamedFuncPointer":
    """ggml_quantize_chunk(kind, weights, bytes, first weight, rows, columns, importance): bytes written."""
    from xllamacpp import xllamacpp

    function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        *(ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    return function
