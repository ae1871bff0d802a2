"""Builds the compiled modules of lossops; everything else about the package is in pyproject.toml.

One source, ``csrc/cpu``, is compiled once for each CPU capability of torch's own dispatcher
into a module of its own, ``lossops._cpu_<capability>``; ``lossops.backends`` chooses among them at
run time, so a wheel built on one machine runs on another. ``LOSSOPS_BUILD`` says what is wanted.
"""

import copy
import importlib.util
import os
import platform
import shlex
import shutil
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
# The last three are false alarms of gcc 12 in its own AVX-512 headers and in at::vec.
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-array-bounds", "-Wno-psabi"]
CAPABILITIES = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    CAPABILITIES = {"default": []}


def why_pure_python() -> str | None:
    """Why the compiled modules cannot be built here, or None when they can."""
    if sys.platform == "win32":
        return "they are written for gcc and clang"
    if importlib.util.find_spec("torch") is None:
        return "torch is not in the build environment; install it and use --no-build-isolation"
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"the C++ compiler {compiler!r} is not on PATH; install one or set CXX"
    return None


def wants_modules(build: str) -> bool:
    """Whether to build the compiled modules under ``LOSSOPS_BUILD=build``; says so when not.

    A compiler that is there but fails is always an error, never a reason for pure Python.
    """
    if build == "none":
        print("lossops: pure Python, as LOSSOPS_BUILD=none asks", file=sys.stderr)
        return False
    reason = why_pure_python()
    if reason is None:
        return True
    if build == "cpu":
        raise SystemExit(f"lossops: LOSSOPS_BUILD=cpu, but the modules cannot be built: {reason}")
    print(f"lossops: pure Python, without the compiled modules: {reason}", file=sys.stderr)
    return False


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


def build_modules_command() -> type[build_ext]:
    """torch's build_ext with a build directory for each module, and the modules side by side."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildModules(BuildExtension):
        def build_extensions(self) -> None:
            self.parallel = self.parallel or len(self.extensions)
            # Every module runs a ninja of its own: together they fill the cores, not flood them.
            jobs = -(-(os.cpu_count() or 1) // self.parallel)
            os.environ.setdefault("MAX_JOBS", str(jobs))
            super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            # An object is named after its source, and the modules share their sources.
            command = copy.copy(self)
            command.build_temp = str(Path(self.build_temp) / ext.name)
            super(BuildModules, command).build_extension(ext)

    return BuildModules


def requested_build() -> str:
    """``LOSSOPS_BUILD``, parsed by lossops.switches, which is loaded here without the package."""
    spec = importlib.util.spec_from_file_location("switches", ROOT / "lossops" / "switches.py")
    switches = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(switches)
    return switches.build()


def main() -> None:
    if not wants_modules(requested_build()):
        setup()
        return
    setup(
        ext_modules=[cpu_module(name, flags) for name, flags in CAPABILITIES.items()],
        cmdclass={"build_ext": build_modules_command()},
    )


if __name__ == "__main__":
    main()
