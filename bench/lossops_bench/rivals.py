"""Rivals that many cases share, and why a rival cannot run: a sentence, or None."""

import shutil
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lossops_bench.case import Problem, Rival, Tensors

__all__ = ["GPU_BACKENDS", "first_line", "logits_bytes", "torch_rivals", "trial"]

GPU_BACKENDS = {"cuda": "lossops, CUDA kernels", "triton": "lossops, Triton kernels"}
"""Backends of lossops that only a machine with a GPU lists, and what to call them."""
if not torch.cuda.is_available():
    GPU_BACKENDS.clear()


def torch_rivals(plain: Callable[..., Tensor], plain_half: Callable[..., Tensor]) -> list[Rival]:
    """Plain PyTorch with half-precision logits upcast before the loss, without, and compiled.

    The first is the one whose errors are the budget of all others.
    """
    three, two = partial(logits_bytes, 3), partial(logits_bytes, 2)
    return [
        Rival("plain", "PyTorch; half-precision logits upcast to float32", plain, three),
        Rival("plain-half", "PyTorch, not upcast", plain_half, two, objection=_against_half),
        Rival(
            "compile",
            "torch.compile of plain",
            partial(_compiled, plain),
            three,
            objection=_against_compile,
            compiles=True,
        ),
    ]


def logits_bytes(copies: int, problem: Problem) -> int:
    """So many float32 copies of the (N, V) logits."""
    return copies * 4 * problem.shape.rows * problem.shape.classes


def first_line(error: Exception) -> str:
    """An exception as one line."""
    text = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {text[0]}"


def trial(
    loss: Callable[..., Tensor], make_inputs: Callable[[Problem], Tensors], problem: Problem
) -> str | None:
    """What the loss itself says when it is called, on a problem that should be tiny."""
    try:
        loss(**make_inputs(problem))
    except Exception as error:
        return first_line(error)
    return None


@cache
def _compile(loss: Callable[..., Tensor]) -> Any:
    return torch.compile(loss, dynamic=False)


def _compiled(loss: Callable[..., Tensor], **inputs: Tensor) -> Tensor:
    value: Tensor = _compile(loss)(**inputs)
    return value


def _against_half(problem: Problem) -> str | None:
    if problem.itemsize < 4:
        return None
    return f"in {problem.dtype_name} it is the same as plain"


def _against_compile(problem: Problem) -> str | None:
    if problem.device != "cpu" or shutil.which("g++") or shutil.which("clang++"):
        return None
    return "torch.compile needs a C++ compiler (g++ or clang++) on a CPU; install one"
