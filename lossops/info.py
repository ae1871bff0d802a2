"""What lossops can do on this machine: ``python -m lossops.info``.

Versions, the processor, the compiled modules and the torch each was built for, the devices, and for
every backend whether it can run or why not.
"""

import importlib
import importlib.metadata
import importlib.util
import platform

import torch

from lossops import backends, switches

MODULES = ("lossops._cpu_default", "lossops._cpu_avx2", "lossops._cpu_avx512")
# What decides the speed of a CPU backend, on x86-64 and on Arm.
FEATURES = ("avx", "amx", "fma", "f16c", "asimd", "bf16", "i8mm", "neon", "sve", "sme")


def report() -> str:
    """The report that ``python -m lossops.info`` prints.

    Returns:
        Lines of text, each section indented under its title.

    Example:
        >>> from lossops import info
        >>> print(info.report().splitlines()[0])
        versions
    """
    sections = {
        "versions": _versions(),
        "processor": _processor(),
        "compiled modules": {name: _module(name) for name in MODULES}
        | {"lossops._cuda": _cuda_library()},
        "devices": _devices(),
        "switches": {name: _switch(name) for name in switches.CHOICES},
    }
    for device in _devices():
        sections[f"backends on {device}"] = _backends(torch.device(device))
    return "\n".join(_section(title, lines) for title, lines in sections.items())


def _section(title: str, lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines.items())])


def _versions() -> dict[str, str]:
    names = ("lossops", "torch", "triton")
    return {"python": platform.python_version()} | {name: _installed(name) for name in names}


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> dict[str, str]:
    found = torch.cpu.get_capabilities()
    features = sorted(name for name in found if name.startswith(FEATURES) and found[name] is True)
    return {
        "platform": platform.platform(),
        "model": str(found.get("cpu_name") or platform.processor() or platform.machine()),
        "features": ", ".join(features) or "none that count",
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def _module(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not built"
    # Loading a module that the processor cannot run ends the process with an illegal instruction.
    if name not in backends.cpu_module_names():
        return "built; needs more than this processor, or ATEN_CPU_CAPABILITY, allows"
    try:
        return f"built for torch {importlib.import_module(name).torch_version}"
    except ImportError as error:
        return f"does not load: {error}"


def _cuda_library() -> str:
    if importlib.util.find_spec("lossops._cuda") is None:
        return "not built: there was no nvcc, or LOSSOPS_BUILD asked for less"
    sentence = backends.load_cuda_library()
    return "built for the stable ABI of torch 2.13 and newer" if sentence is None else sentence


def _devices() -> dict[str, str]:
    devices = {"cpu": "always there"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return devices


def _switch(name: str) -> str:
    try:
        return switches.chosen(name)
    except ValueError as error:
        return str(error)


def _backends(device: torch.device) -> dict[str, str]:
    table = {}
    for name, backend in backends.BACKENDS.items():
        objections = dict.fromkeys(backend.objection(device, dtype) for dtype in backends.DTYPES)
        table[name] = "; ".join(f"no: {why}" if why else "can run" for why in objections)
    return table


if __name__ == "__main__":
    print(report())
