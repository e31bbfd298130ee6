"""Triton's interpreter for the kernels on a CPU: import this before anything imports Triton.

Four faults of the interpreter of Triton 3.6 are mended here, all outside our kernels: it turns
one-element arrays to int, which numpy 2.4 refuses; it multiplies the bit patterns of bfloat16
operands instead of their values; it cuts numbers off to bfloat16 where a GPU rounds them; and its
maximum of a number and NaN is NaN, where a GPU's is the number unless the kernel asks for NaN.
"""

import os
from functools import partialmethod

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _mend_index() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _widen(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


def _mend_dot() -> None:
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        return dot(self, _widen(a), _widen(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _mend_rounding() -> None:
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
        found = np.where(np.isnan(src.data), 0x7FC0, nearest).astype(np.uint16)
        return interpreter.TensorHandle(found, tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def _mend_maximum() -> None:
    builder = interpreter.InterpreterBuilder
    builder.create_maxnumf = partialmethod(builder.binary_op, op=np.fmax)
    builder.create_minnumf = partialmethod(builder.binary_op, op=np.fmin)


_mend_index()
_mend_dot()
_mend_rounding()
_mend_maximum()
