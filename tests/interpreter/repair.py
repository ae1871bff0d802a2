"""Triton's interpreter, repaired: what it gets wrong without a word is right here, or an error.

Importing this module repairs the interpreter of the process. In Triton 3.7 it

    bfloat16        computes on the bits as integers        casts and products are right, rounded to
                                                            nearest even; arithmetic is refused
    tl.dot          takes float32 as it is for TF32         factors are rounded to 10 bits
                    has no least size                       that of NVIDIA's tensor cores
    NaN             passes through tl.maximum, tl.minimum   is dropped, as on a GPU
    float argument  stays a Python number, without ``to``   is a float32 scalar
    integers        wrap                                    overflow raises; device_assert is on
    errors          arrive as text within text              arrive as they were raised
    launches        copy the storage of every argument,     leave CPU tensors where they are, patch
                    patch the language for every call       the language once

No kernel here uses libdevice, autotuning, locks or 8-bit floats; of these nothing is repaired.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

if not triton.__version__.startswith("3.7."):
    raise ImportError(
        f"the interpreter is repaired by the private names of Triton 3.7, this is "
        f"{triton.__version__}: compare tests/interpreter/repair.py with its interpreter first"
    )
if not triton.knobs.runtime.interpret:
    raise ImportError(
        "this process compiles kernels and cannot interpret them: set TRITON_INTERPRET=1 before it "
        "starts, or run `make test-interpreter`"
    )


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 values of the bits of bfloat16."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the 10 bits of TF32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isfinite(values), ((bits + 0x1000) & 0xFFFFE000).view(np.float32), values)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar.is_bf16()


def _refuses_bfloat16(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The operation of a builder; its last argument is what NumPy does, and where() only moves."""

    @functools.wraps(operation)
    def refusing(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        *handles, numpy_operation = arguments
        if numpy_operation is not np.where and any(map(_is_bfloat16, handles)):
            raise TypeError(f"{numpy_operation.__name__} of bfloat16: convert to float32 first")
        return operation(self, *arguments)

    return refusing


_stock_cast = InterpreterBuilder.cast_impl


def _cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
    if source.dtype.scalar == to.scalar:
        return source
    if _is_bfloat16(source):
        source = TensorHandle(widened(source.data), tl.float32)
    if to.scalar.is_bf16():
        return TensorHandle(narrowed(source.data.astype(np.float32)), tl.bfloat16)
    return _stock_cast(self, source, to)


def _dot(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    accumulator: TensorHandle,
    precision: ir.INPUT_PRECISION,
    _imprecise: int,
) -> TensorHandle:
    """A product of tensor cores: exact terms, float32 sums."""
    if not accumulator.dtype.scalar.is_fp32():
        raise TypeError(f"tl.dot must accumulate in float32, got {accumulator.dtype}")
    x, y = (
        widened(t.data) if _is_bfloat16(t) else t.data.astype(np.float32, copy=False)
        for t in (a, b)
    )
    if a.dtype.scalar.is_fp32() and precision != ir.INPUT_PRECISION.IEEE:
        near_x, near_y = tf32(x), tf32(y)
        product = near_x @ near_y
        if precision == ir.INPUT_PRECISION.TF32x3:
            product += near_x @ tf32(y - near_y) + tf32(x - near_x) @ near_y
    else:
        product = x @ y
    return TensorHandle(product + accumulator.data, tl.float32)


_of_scalar = functools.cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    """Looked up, not built anew with a table of all types: a tenth of all time."""
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _of_scalar(dtype.scalar)


_stock_check = interpreter.ReduceScanOpInterface.check_tensor
_stock_reduce = interpreter.ReduceOps.apply_impl
_EXTREMES = {
    tl.standard._elementwise_max: np.fmax.reduce,
    tl.standard._elementwise_min: np.fmin.reduce,
}


def _check_tensor(self: interpreter.ReduceScanOpInterface, tensors: tuple[tl.tensor, ...]) -> None:
    _stock_check(self, tensors)
    if any(t.dtype.is_bf16() for t in tensors):
        raise TypeError("a reduction of bfloat16: convert to float32 first")


def _reduce(self: interpreter.ReduceOps, tensors: tuple[tl.tensor, ...]) -> Any:
    if extreme := _EXTREMES.get(self.combine_fn):
        return self.min_max(tensors[0], extreme)
    return _stock_reduce(self, tensors)


_stock_argument = interpreter._implicit_cvt


def _argument(value: Any) -> Any:
    if isinstance(value, float):
        return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return _stock_argument(value)


_stock_patch = interpreter._patch_lang


@functools.cache
def _patch_once() -> None:
    _stock_patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


def _patch(_function: Callable[..., Any]) -> interpreter._LangPatchScope:
    """The language stays patched: a process interprets or compiles."""
    _patch_once()
    return interpreter._LangPatchScope()


def _device_function(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


def _repair() -> None:
    builder = InterpreterBuilder
    builder.binary_op = _refuses_bfloat16(builder.binary_op)
    builder.unary_op = _refuses_bfloat16(builder.unary_op)
    builder.ternary_op = _refuses_bfloat16(builder.ternary_op)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.cast_impl = _cast
    builder.create_dot = _dot
    shared = interpreter.interpreter_builder
    shared.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))
    shared.options = dataclasses.replace(shared.options, debug=True)
    interpreter._get_np_dtype = _numpy_dtype
    interpreter.ReduceScanOpInterface.check_tensor = _check_tensor
    interpreter.ReduceOps.apply_impl = _reduce
    interpreter._implicit_cvt = _argument
    interpreter._patch_lang = _patch
    interpreter.InterpretedFunction.__call__ = _device_function
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *copies: None
    triton.knobs.compilation.front_end_debugging = True


_repair()
