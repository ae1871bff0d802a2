"""Rows of the report, the table of kernels/README.md, and the budgets of tests/compiled."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lossops_bench.kernels.devices import DEVICES
from lossops_bench.kernels.facts import Facts
from lossops_bench.kernels.launches import Case, cases, compiled, functions_a_logit

ARCHITECTURES = tuple(name for name in DEVICES if name != "sm_89")  # its code is that of sm_86
ROOT = Path(__file__).parents[3]
BUDGETS = ROOT / "tests" / "compiled" / "budgets.json"
README = ROOT / "kernels" / "README.md"
PROCESSES = 2


class Row(NamedTuple):
    """A case on an architecture; ``functions`` for each element of its main loop."""

    case: str
    facts: Facts
    functions: float


class Compilers(ProcessPoolExecutor):
    """Processes that compile cases, each with its own pretended device.

    Args:
        fresh: whether each case has a process of its own, as packages need that keep what they
            once found out about the device.
    """

    def __init__(self, fresh: bool = False) -> None:
        spawn = multiprocessing.get_context("spawn")
        super().__init__(PROCESSES, spawn, max_tasks_per_child=1 if fresh else None)

    def start(self, case: str, architecture: str) -> Future[Row]:
        """Compile a case by its name."""
        return self.submit(row, case, architecture)


def row(case: str, architecture: str) -> Row:
    """A case of the library or of its rivals, compiled in this process."""
    return row_of(_by_name(case), architecture)


def row_of(case: Case, architecture: str) -> Row:
    """Of any case."""
    launch, facts = compiled(case, architecture)
    return Row(case.name, facts, functions_a_logit(case, launch, facts))


def _by_name(name: str) -> Case:
    known = cases()
    if name not in known:
        from lossops_bench.kernels.rivals import rivals

        known = rivals()
    return known[name]


def rows_of(
    names: Iterable[str], architectures: Sequence[str], fresh: bool = False
) -> Iterator[Row]:
    """All cases on all architectures, in that order."""
    with Compilers(fresh) as compilers:
        pairs = [(name, one) for name in names for one in architectures]
        for future in [compilers.start(*pair) for pair in pairs]:
            yield future.result()


# What a later build may not have more of, and what it may not have less of.
MOST = ("spilled", "scalar_spills", "shared", "functions", "instructions")
LEAST = ("blocks", "wide_loads")
# The allocation of registers moves by a few instructions with every change of a kernel.
SLACK = {"instructions": 1.1, "scalar_spills": 1.5, "shared": 1.1, "functions": 1.01}


def budget_of(row: Row) -> dict[str, Any]:
    """What is kept of a row."""
    facts = asdict(row.facts)
    kept = {name: facts[name] for name in ("registers", *MOST, *LEAST, "matrix") if name in facts}
    return {**kept, "functions": round(row.functions, 3)}


def regressions(row: Row, budget: Mapping[str, Any]) -> list[str]:
    """In what a row is worse than its budget."""
    now = budget_of(row)
    worse = [
        f"{name} {now[name]} > {budget[name]}"
        for name in MOST
        if now[name] > budget[name] * SLACK.get(name, 1.0)
    ]
    worse += [f"{name} {now[name]} < {budget[name]}" for name in LEAST if now[name] < budget[name]]
    if now["matrix"].keys() != budget["matrix"].keys():
        worse.append(f"matrix {now['matrix']} instead of {budget['matrix']}")
    return worse


def read_budgets(path: Path = BUDGETS) -> dict[str, dict[str, dict[str, Any]]]:
    """By case and architecture."""
    return json.loads(path.read_text())


def write_budgets(rows: Iterable[Row], path: Path = BUDGETS) -> None:
    """Those of the rows, in the place of all others; a line for each."""
    by_case: dict[str, list[str]] = {}
    for one in rows:
        line = f'  "{one.facts.architecture}": {json.dumps(budget_of(one))}'
        by_case.setdefault(one.case, []).append(line)
    parts = [f'"{case}": {{\n' + ",\n".join(lines) + "\n}" for case, lines in by_case.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def table(rows: Iterable[Row]) -> str:
    """A Markdown table: a line for each case, a column for each architecture."""
    by_case: dict[str, list[Row]] = {}
    for one in rows:
        by_case.setdefault(one.case, []).append(one)
    architectures = list(
        dict.fromkeys(one.facts.architecture for found in by_case.values() for one in found)
    )
    head = ["kernel", "MUFU", "atomics", *architectures]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for case, found in by_case.items():
        cells = {one.facts.architecture: cell(one.facts) for one in found}
        functions = _range(round(one.functions, 2) for one in found)
        atomics = _range(one.facts.atomics for one in found)
        listed = [case, functions, atomics, *(cells.get(name, "") for name in architectures)]
        lines.append(f"| {' | '.join(listed)} |")
    return "\n".join(lines)


def cell(facts: Facts) -> str:
    """Registers, programs × warps, and what is spilled: 128, 2×8."""
    spilled = f", **{facts.spilled} B spilled**" if facts.spilled else ""
    if not facts.blocks:
        return f"{facts.registers}, **does not fit**{spilled}"
    return f"{facts.registers}, {facts.blocks}×{facts.warps} {facts.occupancy:.0%}{spilled}"


def _range(numbers: Iterable[float]) -> str:
    found = sorted(set(numbers))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def write_table(name: str, text: str, path: Path = README) -> None:
    """A table into a document, between its markers."""
    before = path.read_text()
    pattern = rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)"
    after, found = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", before, flags=re.DOTALL)
    if not found:
        raise ValueError(f"{path} must have the markers <!-- table:{name} --> and <!-- /table -->")
    path.write_text(after)
