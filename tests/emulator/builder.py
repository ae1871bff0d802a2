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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
# Compiling takes longer than running: little optimisation, and checks that are calls, halve it.
CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]
OF_VARIANT = {
    "races": ["-O1", "-fsanitize=thread"],
    "addresses": ["-Og", *SANITIZERS, "-fno-sanitize-recover=all", *CALLS],
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


@dataclass(frozen=True)
class Step:
    """A command that makes one file of others; its name holds the hash of all that goes in."""

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path | Step, ...]
    libraries: tuple[str, ...] = ()

    @functools.cached_property
    def target(self) -> Path:
        """Where the file is, or will be."""
        told = "\0".join([compiler_version(), *self.command, *self.libraries])
        what = hashlib.sha256(told.encode())
        for each in self.inputs:
            what.update(str(each.target).encode() if isinstance(each, Step) else contents(each))
        stem, suffix = self.name.rsplit(".", 1)
        return OUT / f"{stem}-{what.hexdigest()[:16]}.{suffix}"

    def run(self) -> None:
        """Make the target, unless it is there; those of an earlier source go."""
        if self.target.exists():
            return
        OUT.mkdir(parents=True, exist_ok=True)
        stem = self.name.rsplit(".", 1)[0]
        for old in OUT.glob(f"{stem}-{16 * '[0-9a-f]'}{self.target.suffix}"):
            old.unlink(missing_ok=True)
        part = self.target.with_suffix(f".{os.getpid()}.part")
        files = [str(each.target if isinstance(each, Step) else each) for each in self.inputs]
        command = [*compiler(), *self.command, *files, *self.libraries, "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-8000:]}")
        part.rename(self.target)  # at once, for another process may look


def compiled(source: Path, *flags: str, variant: str = "") -> Step:
    """The object of a source."""
    name = "-".join(filter(None, (source.stem, variant))) + ".o"
    command = (*FLAGS, f"-isystem{cuda_headers()}", *flags, "-x", "c++", "-c")
    return Step(name, command, (source,))


def kernels(variant: str) -> list[Step]:
    """The objects of csrc/cuda, and the emulator, which is not what the sanitizers look at."""
    sources = [*sorted(CSRC.glob("cuda/*.cu")), HERE / "standin.cu"]
    told = ["-DLOSSOPS_ADDRESS_SANITIZER"] if variant == "addresses" else []
    return [
        *(compiled(source, *OF_VARIANT[variant], variant=variant) for source in sources),
        compiled(HERE / "cuda_emulator.cpp", "-O2", *told, variant=variant),
        compiled(HERE / "race_detector.cpp", "-O2"),
    ]


def program(name: str, variant: str) -> Step:
    """The program of programs/<name>.cpp, which takes a seed; faults also takes a check's name."""
    source = HERE / "faults.cpp" if name == "faults" else HERE / "programs" / f"{name}.cpp"
    # It may have the name of the kernels that it calls.
    own = compiled(source, *OF_VARIANT[variant], variant=f"program-{variant}")
    link = tuple(SANITIZERS) if variant == "addresses" else ()
    return Step(f"{name}-{variant}.out", link, (own, *kernels(variant)))


def library() -> Step:
    """What registers the ops of ``lossops_cuda`` for CPU tensors."""
    sources = [*sorted(CSRC.glob("cuda/*_ops.cpp")), HERE / "standin_ops.cpp"]
    glue = (compiled(source, "-O0", *TORCH) for source in sources)
    paths = library_paths()
    found = (*(f"-L{path}" for path in paths), *(f"-Wl,-rpath,{path}" for path in paths))
    return Step(
        "lossops_cuda_emulated.so",
        ("-shared", "-Wl,--no-undefined"),
        (*kernels("races"), *glue),
        (*found, "-ltorch_cpu", "-ltorch", "-lc10"),
    )


def make(steps: list[Step]) -> None:
    """Run the steps, after those that they need."""
    needed = dict.fromkeys(each for step in steps for each in step.inputs if isinstance(each, Step))
    # What takes longest first.
    objects = sorted(needed, key=lambda step: SANITIZERS[0] not in step.command)
    for together in (objects, steps):
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(Step.run, together))
