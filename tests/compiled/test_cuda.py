"""What nvcc made of csrc/cuda, for every architecture, held to its budget.

Budgets are what `lossops-bench kernels --cuda --write` found in the library that setup.py built; a
kernel may get better than its own, not worse.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="Triton brings the disassembler")

from lossops_bench.kernels import cubins
from lossops_bench.kernels.report import ROOT, Row, read_budgets, regressions

BUDGETS = read_budgets(cubins.BUDGETS)
# What streams its operands, 16 bytes at a time.
STREAMS = (
    "binary",
    "classes",
    "gradient",
    "normalized_rows",
    "pair_gradient",
    "rows",
    "statistics",
)


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Row]:
    """By kernel and architecture."""
    library = cubins.library()
    if library is None:
        pytest.skip("the CUDA kernels are not built here: no nvcc, or LOSSOPS_BUILD asked for less")
    return {(row.case, row.facts.architecture): row for row in cubins.rows(library)}


@pytest.mark.parametrize("architecture", cubins.ARCHITECTURES)
@pytest.mark.parametrize("kernel", BUDGETS)
def test_a_kernel_keeps_its_budget(
    found: dict[tuple[str, str], Row], kernel: str, architecture: str
) -> None:
    row = found[kernel, architecture]
    assert not row.facts.spilled, "spills"
    assert not row.facts.atomics, "atomics: the order of a sum would not be fixed"
    if re.match(f"({STREAMS})_", kernel):
        assert row.facts.wide_loads, "no loads of 16 bytes"
    if re.match(r"(binary|gradient|pair_gradient)_", kernel):
        assert row.facts.wide_stores, "dr is stored element by element"
    assert regressions(row, BUDGETS[kernel][architecture]) == []


def test_there_is_a_budget_for_each_kernel_and_no_other(
    found: dict[tuple[str, str], Row],
) -> None:
    assert {kernel for kernel, _ in found} == BUDGETS.keys()
    assert len(found) == len(BUDGETS) * len(cubins.ARCHITECTURES)


def test_every_kernel_of_the_sources_is_in_the_library() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("csrc/cuda/*.cu*"))
    written = set(
        re.findall(r"__global__ void (?:__launch_bounds__\([^;{]*?\)\s+)?(\w+_kernel)\(", sources)
    )
    assert {name.partition("<")[0] for name in BUDGETS} == written


def test_draws_are_not_contracted(found: dict[tuple[str, str], Row]) -> None:
    """A product and a sum of doubles in one instruction would draw other ids than a CPU."""
    draws = [row for (kernel, _), row in found.items() if kernel.startswith("draw_")]
    assert draws
    assert all(row.facts.fused_doubles == 0 for row in draws)
