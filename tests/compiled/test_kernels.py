"""Every kernel as it is launched, compiled for every architecture, held to its budget.

A process of its own (`make test-compiled`): Triton either interprets or compiles. Budgets are what
`lossops-bench kernels --write` found; a kernel may get better than its own, not worse.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import product

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency")

import lossops_triton
from lossops_bench.kernels.devices import DEVICES
from lossops_bench.kernels.launches import Case, cases
from lossops_bench.kernels.report import (
    ARCHITECTURES,
    Compilers,
    Row,
    read_budgets,
    regressions,
)

CASES = cases()
BUDGETS = read_budgets()
# Of float32 factors as they are: the tensor cores of NVIDIA have no such product, and on sm_100
# three of TF32 take its place (`float32_precision`).
FLOAT32 = ("near products, dx", "near products, dw")


def _pairs() -> list:
    """All architectures; sm_89 has the code of sm_86, and in the fused kernel tiles of its own."""
    return [
        pytest.param(case, one, id=f"{case}-{one}", marks=pytest.mark.slow if slow else ())
        for case, one in product(CASES, DEVICES)
        for slow in [one not in ARCHITECTURES and not case.startswith("fused")]
    ]


@pytest.fixture(scope="module")
def compiling(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[Row]]]:
    """What this run asks for, under way in other processes, with a cache of its own."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    specs = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [(one["case"], one["architecture"]) for one in specs if "case" in one]
    with Compilers() as compilers:
        yield {pair: compilers.start(*pair) for pair in wanted}
        compilers.shutdown(cancel_futures=True)
    os.environ.pop("TRITON_CACHE_DIR")
    if before is not None:
        os.environ["TRITON_CACHE_DIR"] = before


@pytest.mark.parametrize(("case", "architecture"), _pairs())
def test_a_kernel_keeps_its_budget(
    compiling: dict[tuple[str, str], Future[Row]], case: str, architecture: str
):
    row = compiling[case, architecture].result()
    faults = [*_faults(CASES[case], row)]
    if architecture in ARCHITECTURES:
        faults += regressions(row, BUDGETS[case][architecture])
    assert not faults, f"{case} on {architecture}: {'; '.join(faults)}: {row.facts}"


def _faults(case: Case, row: Row) -> Iterator[str]:
    """What no budget may allow."""
    facts, device = row.facts, DEVICES[row.facts.architecture]
    nvidia = facts.architecture.startswith("sm_")
    if facts.spilled:
        yield f"{facts.spilled} bytes spilled"
    if facts.atomics:
        yield f"{facts.atomics} atomics: the order of a sum would not be fixed"
    if not facts.blocks or facts.shared > device.shared_of_block:
        yield f"{facts.shared} bytes of shared memory do not fit"
    if case.multiplies and not any(kind.startswith(device.matrix) for kind in facts.matrix):
        yield f"no {device.matrix} among {facts.matrix}"
    if case.streams and not facts.wide_loads:
        yield "no loads of 16 bytes"
    if nvidia and row.functions > 1.05 * _functions(case):
        yield f"{row.functions:.3f} MUFU a logit where {case.functions} are needed"
    if case.name in FLOAT32 and nvidia and facts.matrix and facts.architecture != "sm_100":
        yield f"products of float32 in TF32: {facts.matrix}"


def _functions(case: Case) -> float:
    """A thread has at least four logits of each row whose merge it takes part in."""
    return case.functions + case.merges / 4


def test_every_kernel_has_a_case():
    kernels = {
        name
        for module in pkgutil.iter_modules(lossops_triton.__path__)
        for name in vars(importlib.import_module(f"lossops_triton.{module.name}"))
        if name.endswith("_kernel")
    }
    assert kernels == {case.kernel for case in CASES.values()}


def test_there_is_a_budget_for_each_kernel_and_no_other():
    assert [*BUDGETS] == [*CASES]
    assert all([*found] == [*ARCHITECTURES] for found in BUDGETS.values())
