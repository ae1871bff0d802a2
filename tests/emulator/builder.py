"""Compiles csrc/cuda for the emulator, with g++: a library of ops, and programs in two variants.

    variant     compiled with                           finds
    races       -fsanitize=thread, but with the calls   accesses that no barrier orders, reads of
                going to race_detector.cpp              shared memory that nobody wrote
    addresses   AddressSanitizer and                    accesses outside an allocation, undefined
                UndefinedBehaviorSanitizer              arithmetic

The library is of the variant ``races``, since a Python that was not started with it cannot load
AddressSanitizer. Either variant finds divergence and shuffles from lanes that are not there.

Objects are kept in build/emulator under the hash of all that goes into them, so that a second run
compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "emulator"
JOBS = 2

VARIANTS = ("races", "addresses")
PROGRAMS = sorted(path.stem for path in HERE.glob("programs/*.cpp"))

# Products and sums are fused only where the source says so. The last two warnings are false alarms
# of gcc 12 where it inlines what sanitizers need.
FLAGS = [
    *("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-DLOSSOPS_EMULATE", f"-I{CSRC}", f"-I{HERE}"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-Wno-maybe-uninitialized", "-Wno-array-bounds"),
]
# AddressSanitizer itself finds what the three others would.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow"]
# Compiling takes longer than running: no optimisation, and checks that are calls, halve it.
CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]
OF_VARIANT = {
    "races": ["-O1", "-fsanitize=thread"],
    "addresses": ["-O0", *SANITIZERS, "-fno-sanitize-recover=all", *CALLS],
}
TORCH = [
    *("-DTORCH_TARGET_VERSION=0x020d000000000000",),
    *(f"-isystem{path}" for path in include_paths()),
]


def compiler() -> list[str]:
    """The C++ compiler and what it is always told, as in setup.py."""
    return shlex.split(os.environ.get("CXX") or "c++")


@functools.cache
def cuda_headers() -> Path | None:
    """The toolkit's headers: those of CUDA_HOME, or of the nvcc on PATH, which may be a script."""
    home = os.environ.get("CUDA_HOME")
    if home is None and shutil.which("nvcc"):
        command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True).stderr
        binaries = re.search(r"_HERE_=(.+)", told)
        home = str(Path(binaries[1].strip()).parent) if binaries else None
    headers = Path(home or "/usr/local/cuda") / "include"
    return headers if (headers / "cuda_bf16.h").exists() else None


def objection() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not shutil.which(compiler()[0]):
        return f"the C++ compiler {compiler()[0]!r} is not on PATH"
    if cuda_headers() is None:
        return "no headers of CUDA: neither CUDA_HOME nor nvcc on PATH leads to cuda_bf16.h"
    return None


@functools.cache
def contents(source: Path) -> bytes:
    """The source and all headers of ours that it includes."""
    seen = [source]
    for path in seen:  # grows
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            found = (folder / name for folder in (path.parent, CSRC, HERE))
            header = next((h.resolve() for h in found if h.exists()), None)
            if header is not None and header not in seen:
                seen.append(header)
    return b"\0".join(path.read_bytes() for path in seen)


@functools.cache
def compiler_version() -> str:
    """What the compiler says it is; torch's version, since its headers are compiled too."""
    command = [*compiler(), "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return told + torch.__version__


class Step:
    """A command that makes one file of others; its name holds the hash of all that goes in."""

    def __init__(self, name: str, inputs: Iterable[Path], command: list[str], what: bytes) -> None:
        told = "\0".join([compiler_version(), *command]).encode()
        stem, suffix = name.rsplit(".", 1)
        self.stem = stem
        self.target = OUT / f"{stem}-{hashlib.sha256(told + what).hexdigest()[:16]}.{suffix}"
        self.command = [*compiler(), *command, *map(str, inputs), "-o"]

    def run(self) -> None:
        """Make the target, unless it is there; those of an earlier source go."""
        if self.target.exists():
            return
        OUT.mkdir(parents=True, exist_ok=True)
        for old in OUT.glob(f"{self.stem}-*{self.target.suffix}"):
            if re.fullmatch(r"[0-9a-f]{16}", old.stem[len(self.stem) + 1 :]):
                old.unlink(missing_ok=True)
        part = self.target.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run([*self.command, str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(self.command)}\n{done.stderr[-8000:]}")
        part.rename(self.target)  # at once, for another process may look


def compiled(source: Path, *flags: str, variant: str = "") -> Step:
    """The object of a source."""
    flags = (*FLAGS, f"-isystem{cuda_headers()}", *flags)
    command = [*flags, "-x", "c++", "-c"]
    name = "-".join(filter(None, (source.stem, variant))) + ".o"
    return Step(name, [source], command, contents(source))


def linked(name: str, objects: list[Step], *flags: str, libraries: Iterable[str] = ()) -> Step:
    """A program or library; its inputs are named by their hashes."""
    inputs = [step.target for step in objects]
    what = "\0".join([*map(str, inputs), *libraries]).encode()
    step = Step(name, inputs, list(flags), what)
    step.command[-1:-1] = libraries  # after what needs them
    return step


class Build:
    """All that the tests run: ``library``, and ``program(name, variant)``."""

    def __init__(self) -> None:
        kernels = [*sorted(CSRC.glob("cuda/*.cu")), HERE / "standin.cu"]
        ops = [*sorted(CSRC.glob("cuda/*_ops.cpp")), HERE / "standin_ops.cpp"]
        detector = compiled(HERE / "race_detector.cpp", "-O2")
        engine = HERE / "cuda_emulator.cpp"
        engines = {
            "races": compiled(engine, "-O2", variant="races"),
            "addresses": compiled(
                engine, "-O2", "-DLOSSOPS_ADDRESS_SANITIZER", variant="addresses"
            ),
        }
        self.steps: list[Step] = [detector, *engines.values()]
        self.links: dict[str, Step] = {}
        for variant in VARIANTS:
            flags = OF_VARIANT[variant]
            base = [detector, engines[variant]]
            base += [compiled(source, *flags, variant=variant) for source in kernels]
            self.steps += base[2:]
            link = SANITIZERS if variant == "addresses" else []
            sources = [HERE / "faults.cpp", *(HERE / "programs" / f"{p}.cpp" for p in PROGRAMS)]
            for source in sources:
                # A program may have the name of the kernels that it calls.
                program = compiled(source, *flags, variant=f"program-{variant}")
                self.steps.append(program)
                self.links[f"{source.stem}-{variant}"] = linked(
                    f"{source.stem}-{variant}.out", [program, *base], *link
                )
            if variant == "races":
                glue = [compiled(source, "-O1", *TORCH) for source in ops]
                self.steps += glue
                paths = library_paths()
                found = (*(f"-L{p}" for p in paths), *(f"-Wl,-rpath,{p}" for p in paths))
                self.links["library"] = linked(
                    "lossops_cuda_emulated.so", [*base, *glue], "-shared", "-Wl,--no-undefined",
                    libraries=(*found, "-ltorch_cpu", "-ltorch", "-lc10"),
                )  # fmt: skip
        # Those with sanitizers, which take longest, are last in the list and first in time.
        for steps in (self.steps[::-1], list(self.links.values())):
            with ThreadPoolExecutor(JOBS) as pool:
                list(pool.map(Step.run, steps))

    @property
    def library(self) -> Path:
        """Registers ``lossops_cuda`` for CPU tensors."""
        return self.links["library"].target

    def program(self, name: str, variant: str) -> Path:
        """Takes a seed, and for some the name of a check."""
        return self.links[f"{name}-{variant}"].target
