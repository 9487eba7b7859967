"""llama.cpp, run through its C interface: what it makes of a text, and of tokens."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp.xllamacpp
from llama_cpp_py_sync._cffi_bindings import get_ffi

_ffi = get_ffi()
_lib = _ffi.dlopen(xllamacpp.xllamacpp.__file__)


@_ffi.callback("void(enum ggml_log_level, const char *, void *)")
def _silent(_level: Any, _text: Any, _data: Any) -> None:
    """It says what it does, at length."""


class LlamaCpp:
    """A GGUF file, loaded; keys and values in 32 bits, so that differences are those of the weights."""

    def __init__(self, file: Path, context: int = 256):
        _lib.llama_log_set(_silent, _ffi.NULL)
        _lib.llama_backend_init()
        params = _lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = _lib.llama_model_load_from_file(str(file).encode(), params)
        assert self._model != _ffi.NULL, f"llama.cpp does not load {file}"
        self._vocab = _lib.llama_model_get_vocab(self._model)
        settings = _lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.type_k = settings.type_v = settings.flash_attn_type = 0
        settings.n_threads = settings.n_threads_batch = 1
        self._context = _lib.llama_init_from_model(self._model, settings)
        assert self._context != _ffi.NULL, f"llama.cpp makes no context of {file}"

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, special tokens read as such."""
        data = text.encode()
        ids = _ffi.new("llama_token[]", len(data) + 8)
        count = _lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), True, True)
        assert count >= 0, "more tokens than bytes"
        return list(ids[0:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits after every token, [tokens, vocabulary]."""
        _lib.llama_memory_clear(_lib.llama_get_memory(self._context), True)
        batch = _lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        code = _lib.llama_decode(self._context, batch)
        _lib.llama_batch_free(batch)
        assert code == 0, f"llama_decode: {code}"
        size = _lib.llama_vocab_n_tokens(self._vocab)
        there = ctypes.cast(
            int(_ffi.cast("intptr_t", _lib.llama_get_logits(self._context))), ctypes.POINTER(ctypes.c_float)
        )
        return np.ctypeslib.as_array(there, (len(ids), size)).copy()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The next ``count`` tokens, each the most likely."""
        made = list(ids)
        for _ in range(count):
            made.append(int(self.logits(made)[-1].argmax()))
        return made[len(ids) :]

    def chosen(self, ids: list[int]) -> list[int]:
        """The most likely token after each of these."""
        return [int(i) for i in self.logits(ids).argmax(axis=1)]

    def text(self, key: str) -> str:
        """What the file says under ``key``."""
        buffer = _ffi.new("char[]", 4096)
        assert _lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer)) >= 0, key
        return _ffi.string(buffer).decode()

    def close(self) -> None:
        """Free its memory."""
        _lib.llama_free(self._context)
        _lib.llama_model_free(self._model)
