"""The runner, the same for every case: who can run, how much memory, how right, how fast.

1. A rival with an objection, or that would not fit in memory, is skipped with the reason.
2. Each of the others runs once in a fresh process, which gives its peak extra memory and keeps a
   rival that dies or takes too long from taking the benchmark with it.
3. Its result is held against a float64 truth. Where the truth of all rows costs too much, the same
   inputs are cut to their first rows, and the report says so. A wrong result is not timed.
4. Those left take turns, round after round, with the unit of cost among them.

A problem of more than 10¹³ operations whose loss is a mean over rows takes minutes to hours. It
runs once, in parts of its rows that are reported as they are done: time and memory in one.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch

from lossops_bench.case import Case, Problem, Rival, Tensors
from lossops_bench.figures import Figures, Report
from lossops_bench.machine import free_bytes
from lossops_bench.measure import seconds
from lossops_bench.memory import RivalSetup, best_meter, peak_extra, trim
from lossops_bench.rivals import first_line
from lossops_bench.truth import errors, verdict

__all__ = ["TRUTH_FLOPS", "Settings", "run", "steps"]

TRUTH_FLOPS = 10**11
"""Float64 operations a truth may take: some seconds on two cores."""
LONG_FLOPS = 10**13
"""Operations of a problem that runs once, in parts."""
PARTS, PART_ROWS = 64, 16384
"""Parts of a long problem: at most so many, of no fewer rows. Every part writes all of dw."""
UNIT_ROWS = 8192
"""Rows on which the unit of a long problem is timed."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    repeats: int = 5
    """Rounds. A rival that would need more than `patience` for all of them gets fewer."""
    memory: bool = True
    """Measure peak memory, each rival in a fresh process."""
    patience: float = 300.0
    """Seconds that a rival may take in its fresh process, and again for its rounds."""


def is_long(case: Case, problem: Problem) -> bool:
    """Whether a problem runs once, in parts."""
    return case.in_parts and case.cost(problem).flops > LONG_FLOPS


def steps(case: Case, problem: Problem, rivals: Sequence[Rival], settings: Settings) -> int:
    """How often `run` calls its `on_step` at most."""
    if is_long(case, problem):
        return len(rivals) * (2 + PARTS) + 1
    return len(rivals) * (3 + settings.memory + settings.repeats) + settings.repeats


def run(
    case: Case,
    problem: Problem,
    rivals: Sequence[Rival],
    settings: Settings,
    on_step: Callable[[str], None] = lambda doing: None,
) -> Report:
    """Measure the rivals on one problem; `on_step` hears what begins."""
    return _Run(case, problem, rivals, settings, on_step).report()


class _Run:
    """The state of one run: the figures so far."""

    def __init__(
        self,
        case: Case,
        problem: Problem,
        rivals: Sequence[Rival],
        settings: Settings,
        on_step: Callable[[str], None],
    ) -> None:
        self.case, self.problem, self.rivals = case, problem, rivals
        self.settings, self.on_step = settings, on_step
        self.figures = {rival.name: Figures(rival.name) for rival in rivals}

    @property
    def running(self) -> list[Rival]:
        return [rival for rival in self.rivals if self.figures[rival.name].status == "ok"]

    def report(self) -> Report:
        torch.set_num_threads(self.problem.threads)
        self.ask()
        long = is_long(self.case, self.problem)
        if self.settings.memory and not long:
            self.measure_memory()
        if not self.running:
            return Report(self.case, self.problem, [*self.figures.values()], "", 0)
        inputs = self.case.make_inputs(self.problem)
        rows = self.truth_rows()
        self.examine(self.case.first_rows(inputs, rows))
        units, fastest = self.one_pass(inputs) if long else self.race(inputs)
        figures = [*units, *self.figures.values()]
        return Report(self.case, self.problem, figures, fastest, rows)

    def ask(self) -> None:
        """Skip the rivals that cannot run."""
        for rival in self.rivals:
            self.on_step(f"{rival.name}: can it run?")
            if reason := rival.objection(self.problem):
                self.figures[rival.name].reject("absent", reason)
            elif reason := self.too_big(rival, self.problem):
                self.figures[rival.name].reject("skipped", reason)

    def too_big(self, rival: Rival, problem: Problem) -> str | None:
        """A sentence if a rival's own estimate exceeds the free memory."""
        need = self.case.resident_bytes(problem) + rival.workspace(problem)
        free = free_bytes(problem.device)
        if need <= free:
            return None
        return f"it needs about {need / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB are free"

    def measure_memory(self) -> None:
        for rival in self.running:
            self.on_step(f"{rival.name}: memory")
            mine = self.figures[rival.name]
            setup = RivalSetup(self.case, rival, self.problem)
            try:
                reading = peak_extra(setup, self.settings.patience)
            except RuntimeError as error:
                mine.reject("skipped", str(error))
            else:
                mine.extra_bytes, mine.memory_method = reading.extra_bytes, reading.method

    def truth_rows(self) -> int:
        """All rows, or as many as have an affordable truth, down to a power of two."""
        n = self.problem.shape.rows
        affordable = TRUTH_FLOPS * n // self.case.truth_flops(self.problem.shape)
        return n if n <= affordable else 1 << max(0, affordable.bit_length() - 1)

    def examine(self, inputs: Tensors) -> None:
        """Note every rival's errors, and reject the wrong ones."""
        case, rows = self.case, len(inputs[self.case.per_row[0]])
        inputs = case.with_gradients(self.problem, inputs)
        truth = case.truth(self.problem, inputs)

        def errors_of(rival: Rival) -> dict[str, float]:
            return errors(case.prepare(rival, self.problem.mode, inputs)(), truth)

        baseline = case.rival(case.baseline)
        cut = replace(self.problem, shape=replace(self.problem.shape, rows=rows))
        budget = {} if self.too_big(baseline, cut) else errors_of(baseline)
        for rival in self.running:
            self.on_step(f"{rival.name}: errors")
            mine = self.figures[rival.name]
            try:
                mine.errors = budget if rival is baseline else errors_of(rival)
            except Exception as error:  # whatever a rival raises is a reason, not our end
                mine.reject("skipped", first_line(error))
            else:
                if reason := verdict(mine.errors, budget, self.problem.dtype):
                    mine.reject("wrong", reason)

    def one_pass(self, inputs: Tensors) -> tuple[list[Figures], str]:
        """Time and memory of each rival from one run in parts; the unit from some of the rows."""
        case, problem, n = self.case, self.problem, self.problem.shape.rows
        some = case.with_gradients(problem, case.first_rows(inputs, UNIT_ROWS))
        self.on_step(f"{case.unit.name} on {min(n, UNIT_ROWS)} rows")
        times = {}
        for way, prepare in case.unit.ways(problem, some).items():
            calls = [seconds(prepare(), problem.device) for _ in range(3)]
            times[way] = median(calls) * max(1.0, n / UNIT_ROWS)
        fastest = min(times, key=lambda way: times[way])
        units = [Figures(f"{case.unit.name}: {w}", "unit", seconds=[t]) for w, t in times.items()]
        for rival in self.running:
            spent, _ = self.in_parts(rival, inputs)
            self.figures[rival.name].seconds = [spent]
        for figures in (*units, *(self.figures[r.name] for r in self.running)):
            figures.units = figures.seconds[0] / times[fastest]
        return units, fastest

    def in_parts(self, rival: Rival, inputs: Tensors) -> tuple[float, Tensors]:
        """Seconds and outputs of one run of a rival; notes its peak extra memory."""
        case, problem, n = self.case, self.problem, self.problem.shape.rows
        own = case.with_gradients(problem, inputs)
        training = problem.mode == "training"
        sums = {"loss": torch.zeros((), device=problem.device)} | {
            gradient: torch.zeros(own[name].shape, dtype=torch.float32, device=problem.device)
            for name, gradient in case.differentiable.items()
            if training and name not in case.per_row
        }
        rows: dict[str, torch.Tensor] = {
            gradient: torch.empty_like(own[name])
            for name, gradient in case.differentiable.items()
            if training and name in case.per_row
        }
        for output in (*sums.values(), *rows.values()):
            output.zero_()  # touched, so that it is no part of the peak
        trim()
        meter, spent, size = best_meter(), 0.0, max(PART_ROWS, -(-n // PARTS))
        for first in range(0, n, size):
            part = case.rows(own, first, min(n, first + size))
            share = len(part[case.per_row[0]]) / n
            found: Tensors = {}

            def call(part: Tensors = part, found: Tensors = found) -> None:
                found.update(case.call(rival, problem.mode, part))

            spent += seconds(call, problem.device)
            for name, gradient in found.items():
                if name in sums:
                    sums[name].add_(gradient, alpha=share)
                elif name in rows:
                    rows[name][first : first + size] = gradient * share
            self.on_step(f"{rival.name}: {min(n, first + size):,} of {n:,} rows")
        mine = self.figures[rival.name]
        mine.extra_bytes = max(0, meter.extra())
        mine.memory_method, mine.note = f"{meter.method}, in this process", f"{-(-n // size)} parts"
        return spent, sums | rows

    def race(self, inputs: Tensors) -> tuple[list[Figures], str]:
        """Time the rivals and the unit in turns; returns the unit's figures and its fastest way."""
        case, problem, repeats = self.case, self.problem, self.settings.repeats
        inputs = case.with_gradients(problem, inputs)
        ways = case.unit.ways(problem, inputs)
        units = {way: Figures(f"{case.unit.name}: {way}", "unit") for way in ways}
        own = {r.name: partial(case.prepare, r, problem.mode, inputs) for r in self.running}
        rounds = {}
        for rival in self.running:
            self.on_step(f"{rival.name}: warming up")
            if rival.compiles:
                own[rival.name]()()
            warm = seconds(own[rival.name](), problem.device)
            rounds[rival.name] = max(1, min(repeats, int(self.settings.patience / warm)))
            self.figures[rival.name].note = rival.note(problem, inputs)
        gc.collect()
        for index in range(repeats):
            self.on_step(f"round {index + 1} of {repeats}: {case.unit.name}")
            for way, prepare in ways.items():
                units[way].seconds.append(seconds(prepare(), problem.device))
            for name, prepare in own.items():
                self.on_step(f"round {index + 1} of {repeats}: {name}")
                if index < rounds[name]:
                    self.figures[name].seconds.append(seconds(prepare(), problem.device))
        fastest = min(ways, key=lambda way: median(units[way].seconds))
        for mine in [*units.values(), *(self.figures[name] for name in own)]:
            mine.units = ratio(mine.seconds, units[fastest].seconds)
        return list(units.values()), fastest


def ratio(times: Sequence[float], units: Sequence[float]) -> float:
    """The median over the rounds of a time by the unit's in the same round."""
    return median(own / unit for own, unit in zip(times, units, strict=False))
