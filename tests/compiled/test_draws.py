"""Draws of class ids as nvcc compiles them: for the bits of a CPU nothing may be fused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="its package has the disassembler")

from lossops_bench.kernels.listing import of_sass, sass

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_120"])
def test_no_product_is_fused_with_a_sum(architecture: str, tmp_path: Path) -> None:
    cubin = tmp_path / "draws.cubin"
    command = ["nvcc", "-O3", "-std=c++20", f"-I{CSRC}", f"-arch={architecture}", "-cubin"]
    subprocess.run([*command, CSRC / "cuda" / "draws.cu", "-o", cubin], check=True)
    listing = of_sass(sass(cubin.read_bytes())[0])
    assert listing.count("DMUL") >= 12  # ten of 2^x alone
    assert listing.count("DADD") >= 10
    assert listing.opcodes("DFMA") == []
    assert listing.opcodes("ATOM|RED") == []
