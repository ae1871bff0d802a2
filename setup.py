"""Builds the compiled modules of lossops; everything else about the package is in pyproject.toml.

One source, ``csrc/cpu``, is compiled once for each CPU capability of torch's own dispatcher
into a module of its own, ``lossops._cpu_<capability>``; ``lossops.backends`` chooses among them at
run time, so a wheel built on one machine runs on another. Where nvcc is found, ``csrc/cuda``
becomes ``lossops._cuda``, a library of torch ops against the stable ABI of libtorch: one binary
serves CPU and CUDA builds of torch. ``LOSSOPS_BUILD`` says what is wanted.
"""

import copy
import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# lse needs inf and NaN, so never -ffast-math. Without errno and the status flags of floating point,
# which nothing here reads, gcc vectorises square roots and selects. A product and a sum are fused
# only where the source says fma: draws of class ids have the same bits on every device.
FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]
# The last five are false alarms of gcc 12 in its own AVX-512 headers and in at::vec.
WARNINGS = [
    *("-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-array-bounds"),
    *("-Wno-stringop-overflow", "-Wno-restrict", "-Wno-psabi"),
]
CAPABILITIES = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    CAPABILITIES = {"default": []}

# Where TORCH_CUDA_ARCH_LIST names no others; of the last that nvcc knows its PTX too.
ARCHITECTURES = ("8.0", "8.6", "9.0", "10.0", "12.0")
# Divisions of floats are within 2 ulp, without a branch; nothing else is relaxed. Square roots,
# doubles and infinities are as IEEE has them.
NVCC_FLAGS = ["-std=c++20", "-O3", "-prec-div=false", "-Xcompiler=-fvisibility=hidden"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020d000000000000"  # torch 2.13


def why_no_cpu_modules() -> str | None:
    """Why the CPU modules cannot be built here, or None when they can."""
    if sys.platform == "win32":
        return "they are written for gcc and clang"
    if importlib.util.find_spec("torch") is None:
        return "torch is not in the build environment; install it and use --no-build-isolation"
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"the C++ compiler {compiler!r} is not on PATH; install one or set CXX"
    return None


def why_no_cuda_kernels() -> str | None:
    """Why the CUDA kernels cannot be built here, or None when they can."""
    if cuda_home() is None:
        return "nvcc is not on PATH; install the CUDA toolkit or set CUDA_HOME"
    return None


@functools.cache
def cuda_home() -> str | None:
    """The toolkit's folder: ``CUDA_HOME``, or as nvcc tells, which may be a script elsewhere."""
    if os.environ.get("CUDA_HOME") or not shutil.which("nvcc"):
        return os.environ.get("CUDA_HOME") or None
    command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r"_HERE_=(.+)", told)
    return str(Path(found[1].strip()).parent) if found else None


def architectures() -> str:
    """Those that nvcc has code for, as TORCH_CUDA_ARCH_LIST: before 12.8 it has none for the last.

    All where it does not say, so that compiling shows why.
    """
    command = [str(Path(cuda_home() or "") / "bin" / "nvcc"), "--list-gpu-code"]
    codes = subprocess.run(command, capture_output=True, text=True).stdout.split()
    known = [one for one in ARCHITECTURES if f"sm_{one.replace('.', '')}" in codes]
    return ";".join(known or ARCHITECTURES) + "+PTX"


def wanted_parts(build: str) -> list[str]:
    """What to build under ``LOSSOPS_BUILD=build``, ``cpu`` and ``cuda``; says so when not all.

    A compiler that is there but fails is always an error, never a reason for less.
    """
    if build == "none":
        print("lossops: pure Python, as LOSSOPS_BUILD=none asks", file=sys.stderr)
        return []
    asked = {"auto": ["cpu", "cuda"], "cpu": ["cpu"], "cuda": ["cpu", "cuda"]}[build]
    parts: list[str] = []
    for part in asked:
        reason = {"cpu": why_no_cpu_modules, "cuda": why_no_cuda_kernels}[part]()
        if reason is not None and build != "auto":
            raise SystemExit(f"lossops: LOSSOPS_BUILD={build}, but no {part} part: {reason}")
        if reason is not None:
            print(f"lossops: without the compiled {part} part: {reason}", file=sys.stderr)
            break  # what needs no compiler for the CPU needs none for a GPU
        parts.append(part)
    return parts


def cpu_module(capability: str, flags: list[str]) -> Extension:
    """The extension ``lossops._cpu_<capability>``."""
    import torch
    from torch.utils.cpp_extension import CppExtension, include_paths

    # primitives.cpp includes the others. In one unit with these gcc 12 vectorises the draws from an
    # alias table or not, as its inlining falls out: a factor of three.
    sources = ["csrc/cpu/module.cpp", "csrc/cpu/primitives.cpp", "csrc/cpu/sampling.cpp"]
    # at::parallel_for is a header: without OpenMP in the including file it runs on one thread.
    # Apple's clang has none.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return CppExtension(
        f"lossops._cpu_{capability}",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")],
        define_macros=[
            ("CPU_CAPABILITY", capability.upper()),
            (f"CPU_CAPABILITY_{capability.upper()}", None),
            # The CPU and CUDA builds of one version, "2.13.0+cpu" and so on, fit each other.
            ("LOSSOPS_TORCH_VERSION", f'"{torch.__version__.split("+")[0]}"'),
        ],
        # As system headers torch's own give no warnings, which leaves ours to be seen.
        extra_compile_args=[
            *FLAGS,
            *flags,
            *openmp,
            *WARNINGS,
            *(f"-isystem{path}" for path in include_paths()),
        ],
        extra_link_args=openmp,
    )


def cuda_library() -> Extension:
    """The extension ``lossops._cuda``, which is no Python module: torch loads it."""
    from torch.utils import cpp_extension

    # A CPU torch says None, a CUDA torch the folder above nvcc, which may be a script.
    cpp_extension.CUDA_HOME = cuda_home()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
    system = cpp_extension.include_paths()
    library = cpp_extension.CUDAExtension(
        "lossops._cuda",
        sorted(
            str(p.relative_to(ROOT))
            for p in (*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp"))
        ),
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")],
        py_limited_api=True,
        extra_compile_args={
            "cxx": [*FLAGS, *WARNINGS, STABLE_ABI, *(f"-isystem{p}" for p in system)],
            "nvcc": [*NVCC_FLAGS, STABLE_ABI],
        },
    )
    # The runtime is linked in, and nothing of torch's CUDA libraries: a CPU torch has none.
    absent = ("c10_cuda", "torch_cuda", "cudart")
    library.libraries = [name for name in library.libraries if name not in absent]
    library.libraries += ["cudart_static", "rt", "dl", "pthread"]
    return library


def remove_objects_older_than_headers(folder: Path) -> None:
    """Only a CUDA build of torch tells ninja which headers a ``.cu`` includes."""
    newest = max(path.stat().st_mtime for path in ROOT.glob("csrc/**/*.h"))
    for path in folder.rglob("*.o"):
        if path.stat().st_mtime < newest:
            path.unlink()


def build_modules_command() -> type[build_ext]:
    """torch's build_ext with a build directory for each module, and the modules side by side."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildModules(BuildExtension):
        def build_extensions(self) -> None:
            wanted, jobs = self.extensions, os.environ.get("MAX_JOBS")
            libraries = [ext for ext in wanted if ext.name == "lossops._cuda"]
            for some in ([ext for ext in wanted if ext not in libraries], libraries):
                if some:
                    self.extensions, self.parallel = some, len(some)
                    # Each runs a ninja of its own: together they fill the cores, not flood them.
                    own = -(-(os.cpu_count() or 1) // self.parallel)
                    os.environ["MAX_JOBS"] = jobs or str(own)
                    super().build_extensions()
            self.extensions = wanted

        def build_extension(self, ext: Extension) -> None:
            # An object is named after its source, and the modules share their sources.
            command = copy.copy(self)
            command.build_temp = str(Path(self.build_temp) / ext.name)
            if ext.name == "lossops._cuda":
                remove_objects_older_than_headers(Path(command.build_temp))
            super(BuildModules, command).build_extension(ext)

    return BuildModules


def requested_build() -> str:
    """``LOSSOPS_BUILD``, parsed by lossops.switches, which is loaded here without the package."""
    spec = importlib.util.spec_from_file_location("switches", ROOT / "lossops" / "switches.py")
    switches = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(switches)
    return switches.build()


def main() -> None:
    parts = wanted_parts(requested_build())
    if not parts:
        setup()
        return
    modules = [cpu_module(name, flags) for name, flags in CAPABILITIES.items()]
    if "cuda" in parts:
        modules.append(cuda_library())
    setup(ext_modules=modules, cmdclass={"build_ext": build_modules_command()})


if __name__ == "__main__":
    main()
