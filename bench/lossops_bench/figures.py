"""What a run measured, and its machine-readable rows."""

import datetime
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

from lossops_bench.case import Case, Problem
from lossops_bench.machine import describe_machine, versions

__all__ = ["Figures", "Report", "Row", "append_rows", "rows"]

Row = dict[str, Any]
Status = Literal["ok", "wrong", "skipped", "absent", "unit"]
"""Skipped: too much for this machine. Absent: cannot run such a problem here at any size."""


@dataclass
class Figures:
    """What was measured of one rival, or of one way to do the unit of cost."""

    name: str
    status: Status = "ok"
    reason: str = ""
    """Why it is not "ok"."""
    seconds: list[float] = field(default_factory=list)
    units: float | None = None
    """The median over the rounds of its time by the unit's in the same round."""
    extra_bytes: int | None = None
    memory_method: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def reject(self, status: Status, reason: str) -> None:
        self.status, self.reason = status, reason

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Half the distance between the quartiles of the rounds, relative to their median."""
        if len(self.seconds) < 2:
            return 0.0 if self.seconds else None
        first, middle, third = quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2 / middle


@dataclass
class Report:
    """All figures of one problem."""

    case: Case
    problem: Problem
    figures: list[Figures]
    unit: str
    """The fastest way to do the unit: costs are counted in it."""
    truth_rows: int
    """Rows on which the results were held against the truth."""

    @property
    def least_units(self) -> float:
        """What the model of bytes and FLOPs allows: 3 GEMMs for a linear head in training."""
        case, unit = self.case.cost(self.problem), self.case.unit.cost(self.problem)
        return case.flops / unit.flops if unit.flops else case.bytes / unit.bytes


def rows(report: Report) -> list[Row]:
    """One flat dictionary per rival, each complete in itself."""
    problem, shape = report.problem, report.problem.shape
    setting: Row = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "case": report.case.name,
        "mode": problem.mode,
        "shape_name": shape.name,
        "shape": [shape.rows, shape.features, shape.classes],
        "dtype": problem.dtype_name,
        "device": problem.device,
        "seed": problem.seed,
        "unit": f"{report.case.unit.name}: {report.unit}",
        "least_units": report.least_units,
        "truth_rows": report.truth_rows,
    }
    about = {"versions": versions(), "machine": describe_machine(problem.device, problem.threads)}
    return [setting | _measured(figures, report) | about for figures in report.figures]


def _measured(figures: Figures, report: Report) -> Row:
    seconds = figures.median
    of = report.case.unit.cost if figures.status == "unit" else report.case.cost
    cost = of(report.problem)
    per_second = 1 / seconds if seconds else None
    return {
        "rival": figures.name,
        "status": figures.status,
        "reason": figures.reason,
        "seconds": seconds,
        "spread": figures.spread,
        "rounds": figures.seconds,
        "rows_per_second": per_second and report.problem.shape.rows * per_second,
        "gigabytes_per_second": per_second and cost.bytes * per_second / 1e9,
        "teraflops": per_second and cost.flops * per_second / 1e12,
        "units": figures.units,
        "extra_bytes": figures.extra_bytes,
        "memory_method": figures.memory_method,
        "errors": figures.errors,
        "note": figures.note,
    }


def append_rows(rows: Iterable[Row], path: Path) -> None:
    """Append to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
