"""The runner, the same for every case: who can run, how much memory, how right, how fast.

1. A rival with an objection, or that would not fit in memory, is skipped with the reason.
2. Each of the others runs once in a fresh process, which gives its peak extra memory and keeps a
   rival that dies or takes too long from taking the benchmark with it.
3. Its result is held against a float64 truth. Where the truth of all rows costs too much, the same
   inputs are cut to their first rows, and the report says so. A wrong result is not timed.
4. Those left take turns, round after round, with the unit of cost among them.
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
from lossops_bench.memory import RivalSetup, peak_extra
from lossops_bench.rivals import first_line
from lossops_bench.truth import errors, verdict

__all__ = ["TRUTH_FLOPS", "Settings", "run", "steps"]

TRUTH_FLOPS = 10**11
"""Float64 operations a truth may take: some seconds on two cores."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    repeats: int = 5
    """Rounds. A rival that would need more than `patience` for all of them gets fewer."""
    memory: bool = True
    """Measure peak memory, each rival in a fresh process."""
    patience: float = 300.0
    """Seconds that a rival may take in its fresh process, and again for its rounds."""


def steps(rivals: Sequence[Rival], settings: Settings) -> int:
    """How often `run` calls its `on_step` at most."""
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
        if self.settings.memory:
            self.measure_memory()
        if not self.running:
            return Report(self.case, self.problem, [*self.figures.values()], "", 0)
        inputs = self.case.make_inputs(self.problem)
        rows = self.truth_rows()
        self.examine(self.case.first_rows(inputs, rows))
        units, fastest = self.race(inputs)
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
