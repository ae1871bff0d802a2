"""This machine: what it is, which versions run on it, and how much memory is free."""

import platform
import sys
from pathlib import Path

import psutil
import torch

__all__ = ["KEPT_FREE", "describe_machine", "free_bytes", "versions"]

KEPT_FREE = 2 * 10**9
"""Bytes that no run may take: the rest of the machine needs some."""

_CPUINFO = Path("/proc/cpuinfo")
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
_TOLD_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "sve")


def free_bytes(device: str) -> int:
    """Bytes a run may still take on the device; containers' limits count."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] - KEPT_FREE
    free = int(psutil.virtual_memory().available)
    for limit, used in _LIMITS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such controller, or its limit is "max"
            continue
    return free - KEPT_FREE


def describe_machine(device: str, threads: int) -> dict[str, object]:
    """Processor, its capabilities and what of it is used, for the machine-readable rows."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    machine: dict[str, object] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": [flag for flag in _TOLD_FLAGS if flag in flags],
        "cores": psutil.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def versions() -> dict[str, str]:
    """Of everything a figure may depend on."""
    try:
        import lossops

        ours = lossops.__version__
    except ImportError:
        ours = "cannot be imported"
    return {
        "lossops": ours,
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
    }


def _cpuinfo() -> dict[str, str]:
    try:
        lines = _CPUINFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
