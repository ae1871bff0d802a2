"""Triton's interpreter, made to compute what a GPU does; import it before any kernel.

Of Triton 3.7 as it comes, silently: products of bfloat16 multiply the bits as integers, float32 is
cut off on its way to bfloat16, TF32 is not rounded, a maximum keeps NaN, the smallest operands of
``tl.dot`` and overflow of int32 are not looked at. Here they are as on a GPU. Arithmetic in
bfloat16 itself is refused: kernels compute in float32.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import triton

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("TRITON_INTERPRET=1 must be set before Triton is imported; see the Makefile")
if not triton.__version__.startswith("3.7."):
    raise RuntimeError(
        f"the repairs are of Triton 3.7, this is {triton.__version__}: go through them"
    )

import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TARGET = GPUTarget("cuda", 90, 32)


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, np.uint16(0x7FC0), nearest)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with the ten bits of mantissa that tensor cores keep."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    kept = ((bits + 0x1000) & 0xFFFFE000).view(np.float32)
    return np.where(np.isfinite(values), kept, values)


def is_bfloat16(handle: TensorHandle) -> bool:
    dtype = handle.dtype
    return not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16


def dot(self: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> TensorHandle:
    """Half precision as it is, into float32; float32 as the precision says."""

    def factor(handle: TensorHandle) -> np.ndarray:
        if is_bfloat16(handle):
            return widened(handle.data)
        if handle.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            return to_tf32(handle.data)
        return handle.data.astype(np.float32)

    if total.dtype.scalar != tl.float32:
        raise TypeError(f"sums of products must be float32, got {total.dtype.scalar}")
    with np.errstate(all="ignore"):
        return TensorHandle(np.matmul(factor(a), factor(b)) + total.data, tl.float32)


_cast = InterpreterBuilder.cast_impl


def cast(self: Any, source: TensorHandle, to: Any) -> TensorHandle:
    """bfloat16 to and from other types, rounded."""
    before, after = source.dtype.scalar, to.scalar
    with np.errstate(all="ignore"):
        if before == after:
            return source
        if before == tl.bfloat16:
            return cast(self, TensorHandle(widened(source.data), tl.float32), to)
        if after == tl.bfloat16:
            return TensorHandle(rounded(source.data.astype(np.float32)), tl.bfloat16)
        return _cast(self, source, to)


def cast_float(self: Any, source: TensorHandle, to: Any, mode: Any) -> TensorHandle:
    if mode == ir.ROUNDING_MODE.RTZ:
        raise NotImplementedError("rounding to zero is not repaired")
    return cast(self, source, to)


def refusing_bfloat16(operation: Any) -> Any:
    """The same operation without warnings, not for bfloat16."""

    def run(self: Any, *arguments: Any) -> TensorHandle:
        *handles, op = arguments
        if any(is_bfloat16(h) for h in handles) and op is not np.where:
            raise TypeError(f"{op.__name__} in bfloat16: convert to float32 first")
        with np.errstate(all="ignore"):
            return operation(self, *arguments)

    return run


_convert = interpreter._implicit_cvt


def argument(value: Any) -> Any:
    """A float argument is a float32 scalar in a compiled kernel."""
    if isinstance(value, float):
        return tl.core.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return _convert(value)


def _repair() -> None:
    builder = InterpreterBuilder
    builder.create_dot = dot
    builder.cast_impl = cast
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast)
    builder.create_fp_to_fp = cast_float
    builder.get_bf16 = lambda self, value: TensorHandle(
        rounded(np.array([value], np.float32)), tl.bfloat16
    )
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, refusing_bfloat16(getattr(builder, name)))
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter._implicit_cvt = argument
    shared = interpreter.interpreter_builder
    shared.codegen_fns["min_dot_size"] = min_dot_size(TARGET)
    shared.options = dataclasses.replace(shared.options, debug=True)  # int32 overflow is an error


_repair()
