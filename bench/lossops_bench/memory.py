"""Peak extra memory of one call, measured in a process of its own.

Counted: the most memory the process held during the call, over what it held just before, less the
outputs it returned (loss and gradients that are no input's memory). Just before means: libraries
loaded and woken by a tiny problem, inputs in place, and freed pages given back to the system
(malloc_trim), so that the call cannot live on them unseen. Pages of library code that the call is
the first to touch do not count. What the allocator keeps and caches that a library fills during the
call do. A call that peaks before its outputs exist gets them as credit, down to zero.

On Linux the peak is the kernel's own (VmHWM, reset before the call), exact to the page. Elsewhere a
thread samples the resident size every millisecond and can miss a short peak. On a GPU it is
that of torch's allocator.
"""

import ctypes
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lossops_bench.case import Case, Problem, Rival, Tensors
from lossops_bench.inputs import tiny

__all__ = ["Prepared", "Reading", "RivalSetup", "best_meter", "peak_extra", "trim"]

Prepared = tuple[Callable[[], Tensors], Iterable[Tensor]]
"""The call to measure, and its inputs."""


@dataclass(frozen=True)
class Reading:
    """Peak extra bytes of a call, and how they were read."""

    extra_bytes: int
    method: str
    seconds: float


@dataclass(frozen=True)
class RivalSetup:
    """Prepares one call of a rival; travels to the fresh process by pickle."""

    case: Case
    rival: Rival
    problem: Problem

    def __call__(self) -> Prepared:
        torch.set_num_threads(self.problem.threads)
        self._call(self._inputs(tiny(self.problem)))
        inputs = self._inputs(self.problem)
        if self.rival.compiles:
            self._call(inputs)
        return partial(self._call, inputs), inputs.values()

    def _inputs(self, problem: Problem) -> Tensors:
        return self.case.with_gradients(problem, self.case.make_inputs(problem))

    def _call(self, inputs: Tensors) -> Tensors:
        return self.case.call(self.rival, self.problem.mode, inputs)


def peak_extra(setup: Callable[[], Prepared], timeout: float) -> Reading:
    """Measure in a fresh process.

    Args:
        setup: must be picklable, from modules that a fresh process can import.
        timeout: seconds for setting up and for the call.

    Raises:
        RuntimeError: the process failed, was killed, or took too long; says which.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "lossops_bench.memory"],
            input=pickle.dumps(setup),
            capture_output=True,
            env=environment,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {timeout:.0f} s in a fresh process") from None
    if child.returncode:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        why = last[0] if last else f"exit status {child.returncode}"
        if child.returncode == -9:
            why = "killed, most likely for want of memory"
        raise RuntimeError(why)
    reading: Reading = Reading(**json.loads(child.stdout.splitlines()[-1]))
    return reading


def measure(setup: Callable[[], Prepared]) -> Reading:
    """Measure in this process, which should be fresh."""
    call, inputs = setup()
    inputs = list(inputs)
    trim()
    meter: Meter = GpuMeter() if any(value.is_cuda for value in inputs) else best_meter()
    start = time.perf_counter()
    outputs = call()
    peak = meter.extra()
    seconds = time.perf_counter() - start
    return Reading(max(0, peak - new_bytes(outputs.values(), inputs)), meter.method, seconds)


def trim() -> None:
    """Gives freed pages back to the system, so that a call cannot live on them unseen."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def new_bytes(outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes of the outputs' storages, each once, without those of the inputs."""
    old = {value.untyped_storage().data_ptr() for value in inputs}
    storages = {s.data_ptr(): s.nbytes() for s in (value.untyped_storage() for value in outputs)}
    return sum(size for pointer, size in storages.items() if pointer not in old)


class Meter:
    """Starts when made; `extra` gives the peak since then over the start, in bytes."""

    method = ""

    def extra(self) -> int:
        raise NotImplementedError


class KernelMeter(Meter):
    """The kernel's peak of the resident size, reset at the start."""

    method = "VmHWM"

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self._status()

    def extra(self) -> int:
        end = self._status()
        code = end["RssFile"] - self.start["RssFile"]
        return end["VmHWM"] - self.start["VmRSS"] - code

    @staticmethod
    def _status() -> dict[str, int]:
        pairs = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {pair[0].rstrip(":"): int(pair[1]) * 1024 for pair in pairs if pair[-1:] == ["kB"]}


class SamplingMeter(Meter):
    """The largest resident size that a thread sees."""

    method = "sampled"

    def __init__(self, interval: float = 1e-3) -> None:
        self.process = psutil.Process()
        self.start = self.peak = int(self.process.memory_info().rss)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, args=(interval,), daemon=True)
        self.thread.start()

    def extra(self) -> int:
        self.done.set()
        self.thread.join()
        return max(self.peak, int(self.process.memory_info().rss)) - self.start

    def _watch(self, interval: float) -> None:
        while not self.done.wait(interval):
            self.peak = max(self.peak, self.process.memory_info().rss)


class GpuMeter(Meter):
    """The peak of torch's allocator."""

    method = "torch.cuda"

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()

    def extra(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.start


def best_meter() -> Meter:
    try:
        return KernelMeter()
    except (OSError, KeyError):
        return SamplingMeter()


if __name__ == "__main__":
    print(json.dumps(asdict(measure(pickle.load(sys.stdin.buffer)))))
