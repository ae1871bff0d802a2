"""Who can run a call, and why not.

A backend is a module, or an object, with the functions of `lossops.reference`. ``auto`` takes the
first backend of ``BACKENDS`` without an objection; naming one that cannot run the call raises its
objection.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from lossops import switches

REBUILD = "in a clone of lossops, pip install --no-build-isolation --force-reinstall --no-deps ."
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One implementation of the primitives.

    Attributes:
        name: what users pass as ``backend=``.
        objection: why it cannot run on a device with a dtype, a sentence, or None.
        primitives: returns the module, or object, that has them; called only where there is no
            objection.
    """

    name: str
    objection: Callable[[torch.device, torch.dtype], str | None]
    primitives: Callable[[], Any]


def cpu_module_names() -> tuple[str, ...]:
    """Compiled modules this processor can run, best first; follows ATEN_CPU_CAPABILITY."""
    capability = torch.backends.cpu.get_cpu_capability()
    ladder = ("avx512", "avx2", "default")
    best = {"AVX512": 0, "AVX2": 1}.get(capability, 2)
    return tuple(f"lossops._cpu_{name}" for name in ladder[best:])


@functools.cache
def load_cpu_module() -> ModuleType | str:
    """The compiled module for this processor, or the sentence that says why there is none."""
    names = cpu_module_names()
    for name in names:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            return f"the compiled extension {name} does not load ({error}); rebuild it: {REBUILD}"
        if module.torch_version != torch.__version__.split("+")[0]:
            return (
                f"the compiled extension was built for torch {module.torch_version}, this is "
                f"{torch.__version__}; rebuild it: {REBUILD}"
            )
        return module
    return (
        f"no compiled extension ({names[0]}) is installed; build it with a C++ compiler: {REBUILD}"
    )


def _any_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype in DTYPES:
        return None
    return f"inputs must be {', '.join(str(d) for d in DTYPES)}, got {dtype}"


def _cpp_objection(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the C++ backend runs on CPU tensors, got {device.type}"
    return _any_dtype(device, dtype) or _cpu_module_objection()


def _cpu_module_objection() -> str | None:
    module = load_cpu_module()
    return module if isinstance(module, str) else None


def _cpu_multiplies_bfloat16() -> bool:
    module = load_cpu_module()
    return not isinstance(module, str) and module.half_products(2)


def rounds_products(backend: str, dtype: torch.dtype, width: int) -> bool:
    """Whether a backend rounds what it multiplies by x and w of (·, width) to bfloat16."""
    fits = backend == "cpp" and dtype == torch.bfloat16 and width % 2 == 0 and width > 0
    return fits and _cpu_multiplies_bfloat16()


# torch.compile cannot trace a search for modules. torch.compiler.assume_constant_result would set
# the same mark, but imports the compiler.
_cpu_module_objection._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cpu_multiplies_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cpp_primitives() -> ModuleType:
    module = load_cpu_module()
    assert not isinstance(module, str)
    return module


@functools.cache
def _triton_absence() -> str | None:
    """Why the Triton kernels cannot be used in this process, on any device."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if importlib.util.find_spec("lossops_triton") is None:
        return f"the package lossops_triton is not installed beside lossops; reinstall: {REBUILD}"
    return None


@functools.cache
def _is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


@functools.cache
def _capability_objection(device: torch.device) -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    found = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"the GPU kernels need compute capability 8.0 or newer, {device} has {found}"


def _triton_objection(device: torch.device, dtype: torch.dtype) -> str | None:
    if sentence := _any_dtype(device, dtype):
        return sentence
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, got torch.float64; use 'reference'"
    return _triton_device_objection(device)


def _triton_device_objection(device: torch.device) -> str | None:
    if sentence := _triton_absence():
        return sentence
    if device.type == "cpu" and _is_interpreted():
        return None
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA tensors, got {device.type}"
    return _capability_objection(device)


_triton_device_objection._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_primitives() -> Any:
    return importlib.import_module("lossops_triton").primitives


def _has_cuda_ops() -> bool:
    return hasattr(torch.ops.lossops_cuda, "logits_statistics")


@functools.cache
def load_cuda_library() -> str | None:
    """None once the CUDA kernels are torch ops, or the sentence that says why they are not."""
    if _has_cuda_ops():
        return None
    if torch.version.hip:
        return "the CUDA kernels are compiled for NVIDIA GPUs; use 'triton'"
    spec = importlib.util.find_spec("lossops._cuda")
    if spec is None or spec.origin is None:
        return f"no compiled CUDA kernels are installed; build them where nvcc is: {REBUILD}"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the compiled CUDA kernels do not load ({error}); rebuild them: {REBUILD}"
    return None


@functools.cache
def _kernels_objection(device: torch.device) -> str | None:
    """Why the compiled CUDA kernels, once loaded, cannot run on a device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch.ops.lossops_cuda.check_kernels(index)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(", ")[2]  # without the place in the source
        return f"the compiled CUDA kernels cannot run on {device} ({reason}); rebuild: {REBUILD}"
    return None


def _is_emulated() -> bool:
    """Whether the CUDA kernels are those of the tests' emulator, which run on CPU tensors."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return _has_cuda_ops() and has_kernel("lossops_cuda::logits_statistics", "CPU")


def _cuda_objection(device: torch.device, dtype: torch.dtype) -> str | None:
    if sentence := _any_dtype(device, dtype):
        return sentence
    if dtype == torch.float64:
        return "the CUDA kernels compute in float32, got torch.float64; use 'reference'"
    return _cuda_device_objection(device)


def _cuda_device_objection(device: torch.device) -> str | None:
    if device.type == "cpu" and _is_emulated():
        return None
    if device.type != "cuda":
        return f"the CUDA kernels run on CUDA tensors, got {device.type}"
    return load_cuda_library() or _capability_objection(device) or _kernels_objection(device)


_cuda_device_objection._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cuda_primitives() -> Any:
    return importlib.import_module("lossops.cuda").primitives


def _reference_primitives() -> ModuleType:
    from lossops import reference

    return reference


BACKENDS: dict[str, Backend] = {
    "cpp": Backend("cpp", _cpp_objection, _cpp_primitives),
    "triton": Backend("triton", _triton_objection, _triton_primitives),
    "cuda": Backend("cuda", _cuda_objection, _cuda_primitives),
    "reference": Backend("reference", _any_dtype, _reference_primitives),
}
# One sweep writes its logits to memory in any case; there the compiled kernels move the same bytes
# as Triton's and need no compiler when a loss is first called. Triton's alone can do without
# logits in memory, which the first of two sweeps is made of: csrc/README.md has the model.
ONE_SWEEP = ("cpp", "cuda", "triton", "reference")


def select(
    name: str, device: torch.device, dtype: torch.dtype, order: Iterable[str] = BACKENDS
) -> Backend:
    """The backend that runs this call.

    Args:
        name: ``"auto"`` or a key of ``BACKENDS``.
        device: device of the inputs.
        dtype: dtype of the inputs.
        order: in which ``"auto"`` asks them. Default: that of ``BACKENDS``.

    Raises:
        ValueError: unknown name, or the named backend's objection.
    """
    if name == "auto":
        name = switches.default_backend()
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(
                f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {name!r}"
            )
        if sentence := BACKENDS[name].objection(device, dtype):
            raise ValueError(f"backend {name!r} cannot run this call: {sentence}")
        return BACKENDS[name]
    for key in order:
        if BACKENDS[key].objection(device, dtype) is None:
            return BACKENDS[key]
    raise ValueError(f"no backend can run this call: {_any_dtype(device, dtype)}")
