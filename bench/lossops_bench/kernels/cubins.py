"""What nvcc made of csrc/cuda: every kernel of ``lossops._cuda`` on every architecture in it.

Nothing is compiled here: the binaries are taken out of the library and disassembled.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lossops.cuda import FOUR_LOG_SUMS, KINDS, ONE_LOG_SUM
from lossops.gpu_layout import BITS
from lossops_bench.kernels import report
from lossops_bench.kernels.facts import NVIDIA, Facts, of_listing, stack_bytes
from lossops_bench.kernels.listing import NVIDIA_TOOLS, Listing, of_sass, tool
from lossops_bench.kernels.report import ROOT, Row

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # as in setup.py
THREADS = 2  # that disassemble
BUDGETS = ROOT / "tests" / "compiled" / "cuda_budgets.json"
README = ROOT / "csrc" / "README.md"


def library() -> Path | None:
    """The compiled CUDA kernels, where they were built."""
    spec = importlib.util.find_spec("lossops._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def binaries(path: Path) -> list[Facts]:
    """Of all kernels in a library, by name and architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [NVIDIA_TOOLS / "cuobjdump", "-xelf", "all", path.resolve()]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        cubins = sorted(Path(folder).glob("*.cubin"))
        with ThreadPoolExecutor(THREADS) as pool:
            found = [one for some in pool.map(_binaries_of, cubins) for one in some]
    names = _demangled([one.kernel for one in found])
    named = [replace(one, kernel=name) for one, name in zip(found, names, strict=True)]
    return sorted(named, key=lambda one: (one.kernel, ARCHITECTURES.index(one.architecture)))


def _binaries_of(cubin: Path) -> list[Facts]:
    architecture = re.search(r"sm_\d+", cubin.name)[0]
    usage = dict(
        re.findall(r"Function (\w+):\n *(.*)", tool("cuobjdump", "-res-usage", str(cubin)))
    )
    threads = _threads(tool("cuobjdump", "-elf", str(cubin)))
    listed = []
    for part in re.split(r"(?m)^\.text\.(?=\w+:)", tool("nvdisasm", "-c", str(cubin)))[1:]:
        name = part.partition(":")[0]
        listing = of_sass(part)
        resources = dict(re.findall(r"(\w+):(\d+)", usage[name]))
        listed.append(
            of_listing(
                name,
                architecture,
                listing,
                NVIDIA,
                -(-threads[name] // 32),
                int(resources["REG"]),
                _stack(listing, resources),
                int(resources["SHARED"]),
            )  # fmt: skip
        )
    return listed


def _stack(listing: Listing, resources: dict[str, str]) -> int:
    """Bytes of spills, or of arrays that did not fit registers."""
    return max(stack_bytes(listing), int(resources["STACK"]))


def _threads(elf: str) -> dict[str, int]:
    """Threads of a block by kernel, from its launch bounds."""
    found: dict[str, int] = {}
    name = attribute = ""
    for line in elf.splitlines():
        if match := re.match(r"\.nv\.info\.(\w+)$", line):
            name = match[1]
        elif match := re.search(r"Value:\s+(0x\w+) (0x\w+) (0x\w+)", line):
            if "MAX_THREADS" in attribute:
                found[name] = int(match[1], 16) * int(match[2], 16) * int(match[3], 16)
        if "Attribute:" in line:
            attribute = line
    return found


def _demangled(names: list[str]) -> list[str]:
    """Names as in the source: without arguments and namespaces, sets and kinds spelled out."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [_readable(name) for name in text.splitlines()]


def _readable(name: str) -> str:
    name = re.sub(r"lossops::|\(anonymous namespace\)::|^void ", "", name)
    name = re.sub(r"\([^()]*\)$", "", name)
    name = name.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
    name = re.sub(r"\(Binary\)(\d)", lambda m: KINDS[int(m[1])], name)
    name = re.sub(r"<(.*, )?(\d+)u>", lambda m: f"<{m[1] or ''}{_set(int(m[2]))}>", name)
    return name.replace(" >", ">")


def _set(bits: int) -> str:
    """Names of statistics; those with all of them are not listed."""
    names = [name for name, bit in BITS.items() if bits & bit]
    if len(names) == len(BITS):
        return "everything"
    sums = " 4 log-sums" if bits & FOUR_LOG_SUMS else " log-sum" if bits & ONE_LOG_SUM else ""
    return " ".join(names) + sums


def rows(path: Path) -> list[Row]:
    """As the report takes them; ``functions`` of a thread and step of the main loop."""
    return [Row(one.kernel, one, one.functions) for one in binaries(path)]


def table(found: list[Row]) -> str:
    """Without the float16 twins of bfloat16, and the merges of smaller states."""
    shown = [
        row for row in found
        if "float16" not in row.case.replace("bfloat16", "")
        and not (row.case.startswith("merge") and "everything" not in row.case)
    ]  # fmt: skip
    return report.table(shown)
