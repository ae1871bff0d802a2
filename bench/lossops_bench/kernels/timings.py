"""What `lossops-bench gpu-check` times: each GPU backend beside plain PyTorch, kernel by kernel.

    statistics    4 B a float32 logit read
    gradient      4 B read, and 4 B written in their place, or 2 B in bfloat16
    rows          what each needs of S rows of D float32 numbers; the whole table where it is dense
    draws         a call of a sampler, with its sort
    losses        linear_cross_entropy, a step and the loss alone

GB/s are of these bytes, the share that of the device's peak by its clock and bus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lossops
from lossops import cuda_rows, reference, reference_rows
from lossops.backends import BACKENDS
from lossops.gpu_layout import Logits, Spec
from lossops.statistics import STATISTICS, canonical, outputs
from lossops_bench.measure import seconds
from lossops_bench.rivals import first_line

BACKEND_NAMES = ("cuda", "triton")
SETS = {
    "lse": canonical(("lse",)),
    "lse, max": canonical(("lse", "max")),
    "everything": canonical((*STATISTICS, "lse@2", "lse<0.5")),
}
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Of what is timed.

    Attributes:
        logits: N, V.
        rows: S, D and V of a table.
        draws: S, V.
        heads: N, D, V of linear_cross_entropy.
        repeats: calls, of which the median counts.
    """

    logits: tuple[int, int] = (512, 131_072)
    rows: tuple[int, int, int] = (65_536, 512, 200_000)
    draws: tuple[int, int] = (100_000, 10_000_000)
    heads: Sequence[tuple[int, int, int]] = ((4096, 2048, 32_768), (4096, 4096, 131_072))
    repeats: int = 30


def timings(device: torch.device, sizes: Sizes = Sizes()) -> Iterator[str]:
    """All of them, line by line."""
    peak = peak_gigabytes(device)
    told = f"{peak:.0f} GB/s" if peak else "unknown"
    yield f"ms: median of {sizes.repeats} calls, the cache overwritten before each; peak {told}"
    for name in BACKEND_NAMES:
        if sentence := BACKENDS[name].objection(device, torch.float32):
            yield f"{name}: {sentence}"
    for part in (_statistics, _gradients, _rows, _draws, _losses):
        yield ""
        yield from part(device, sizes, peak)


def peak_gigabytes(device: torch.device) -> float:
    """Bandwidth of the device's memory by its clock and bus, 0 where they are not told."""
    if device.type != "cuda":
        return 0.0
    of = torch.cuda.get_device_properties(device)
    clock, bits = getattr(of, "memory_clock_rate", 0), getattr(of, "memory_bus_width", 0)
    return float(2 * clock * 1e3 * bits / 8 / 1e9)  # kHz, two transfers a cycle


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of some calls; on a GPU by events, with nothing of the inputs in its cache."""
    call()
    if device.type != "cuda":
        return 1e3 * median(seconds(call, device.type) for _ in range(repeats))
    cache = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    spans = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        begin.record()
        call()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize(device)
    return median(begin.elapsed_time(end) for begin, end in spans)


def _line(name: str, call: Callable[[], object], device: torch.device, sizes: Sizes, peak: float,
          moved: int) -> str:  # fmt: skip
    """A contender's time, and its bytes over it where they are known."""
    try:
        found = milliseconds(call, device, sizes.repeats)
    except (RuntimeError, ValueError) as error:  # memory among them
        return f"  {name:44} {first_line(error)}"
    rate = moved / found / 1e6
    share = f" = {rate / peak:4.0%}" if peak else ""
    return f"  {name:44} {found:9.3f} ms" + (f"  {rate:6.0f} GB/s{share}" if moved else "")


def _backends(device: torch.device) -> dict[str, Any]:
    """The modules of those that run here."""
    objections = {name: BACKENDS[name].objection(device, torch.float32) for name in BACKEND_NAMES}
    return {name: BACKENDS[name].primitives() for name, why in objections.items() if why is None}


def _statistics(device: torch.device, sizes: Sizes, peak: float) -> Iterator[str]:
    n, v = sizes.logits
    z, y = torch.randn(n, v, device=device), torch.randint(v, (n, 1), device=device)
    vector = torch.randn(v, device=device)
    yield f"statistics of float32 logits, N {n}, V {v}"
    plain = {"lse": lambda: z.logsumexp(1), "lse, max": lambda: (z.logsumexp(1), z.max(1))}
    for which, names in SETS.items():
        teacher = torch.full_like(z, 1 / v) if "teacher" in names else None
        moved = (4 if teacher is None else 8) * n * v
        inputs = (z, y, vector, teacher, names)
        calls = {
            name: partial(module.logits_statistics, *inputs)
            for name, module in _backends(device).items()
        }
        calls["plain"] = plain.get(which, partial(reference.logits_statistics, *inputs))
        for name, call in calls.items():
            yield _line(f"{which}: {name}", call, device, sizes, peak, moved)


def _gradients(device: torch.device, sizes: Sizes, peak: float) -> Iterator[str]:
    n, v = sizes.logits
    y, vector = torch.randint(v, (n, 1), device=device), torch.randn(v, device=device)
    yield f"gradient in the place of float32 products, N {n}, V {v}"
    for which, names in SETS.items():
        # Time and again of its own result, of which only the size matters.
        r = torch.randn(n, v, device=device)
        teacher = torch.full_like(r, 1 / v) if "teacher" in names else None
        found = reference.logits_statistics(r, y, vector, teacher, names)
        spec = Spec(y, vector, teacher, names, found, _ones(names, found))
        for dtype in (torch.float32, torch.bfloat16):
            out = r if dtype == torch.float32 else r.view(dtype)[:, :v]
            moved = (4 + dtype.itemsize + (0 if teacher is None else 4)) * n * v
            for name, module in _backends(device).items():
                call = partial(module.kernels.gradient, Logits(r), spec, out)
                label = f"{which} into {dtype}: {name}".replace("torch.", "")
                yield _line(label, call, device, sizes, peak, moved)
    r = torch.randn(n, v, device=device)
    yield _line("softmax: plain", lambda: r.softmax(1), device, sizes, peak, 8 * n * v)


def _ones(names: Sequence[str], found: Sequence[Tensor]) -> list[Tensor | None]:
    """A coefficient for each output that has one."""
    return [
        None if out in ("shift", "argmax") or out.endswith("_index") else torch.ones_like(t)
        for out, t in zip(outputs(names), found, strict=True)
    ]


def _rows(device: torch.device, sizes: Sizes, peak: float) -> Iterator[str]:
    s, d, v = sizes.rows
    yield f"rows of float32, S {s}, D {d}, V {v}"
    table, first, second = (torch.rand(v, d, device=device) for _ in range(3))
    count = torch.zeros(v, dtype=torch.int32, device=device)
    ids = torch.randperm(v)[:s].sort().values.to(device)
    often = (torch.rand(s, dtype=torch.float64) ** 4 * v).long().to(device)  # some thousand times
    given = torch.randn(s, d, device=device)
    units, norms = reference_rows.normalized_rows(table, ids, 1e-12)
    one = 4 * s * d
    runs = {"plain": reference_rows}
    if cuda_rows.runs_on(device):
        runs = {"cuda": cuda_rows, **runs}
    calls: dict[str, tuple[int, Callable[[Any], object]]] = {
        "normalised": (2 * one, lambda m: m.normalized_rows(table, ids, 1e-12)),
        "their gradient": (3 * one, lambda m: m.normalized_rows_gradient(units, norms, given)),
        "SGD": (3 * one, lambda m: m.sgd_rows(table, None, ids, given, 0.1, 0.0, 0.0)),
        "SGD, momentum": (5 * one, lambda m: m.sgd_rows(table, first, ids, given, 0.1, 0.9, 0.0)),
        "AdamW": (
            7 * one,
            lambda m: m.adamw_rows(
                table, first, second, count, ids, given, 0.1, 0.9, 0.99, 1e-8, 0.0
            ),
        ),
        "sums, distinct ids": (one + 4 * v * d, lambda m: _scattered(m, ids, given, table, True)),
        "sums, ids that repeat": (
            one + 4 * v * d,
            lambda m: _scattered(m, often, given, table, False),
        ),
    }
    for what, (moved, call) in calls.items():
        for name, module in runs.items():
            yield _line(f"{what}: {name}", partial(call, module), device, sizes, peak, moved)


def _scattered(module: Any, ids: Tensor, rows: Tensor, table: Tensor, distinct: bool) -> Tensor:
    if module is cuda_rows:
        return cuda_rows.scattered(ids, rows, table, distinct)
    return torch.zeros_like(table).index_add_(0, ids, rows)


def _draws(device: torch.device, sizes: Sizes, peak: float) -> Iterator[str]:
    s, v = sizes.draws
    yield f"draws, S {s} of V {v}; on the CPU without targets"
    target = torch.randint(v, (1024,), device=device)
    drawing = {
        "uniform": lossops.samplers.Uniform(v, s),
        "log-uniform": lossops.samplers.LogUniform(v, s, unique=False),
        "log-uniform, distinct": lossops.samplers.LogUniform(v, s),
        "by frequency": lossops.samplers.Frequency(torch.rand(v) + 0.1, s),
    }
    for what, sampler in drawing.items():
        for name, own in (("where the targets are", target), ("on the CPU", None)):
            yield _line(f"{what}: {name}", partial(sampler, own), device, sizes, peak, 0)
    permuted = partial(torch.randperm, v, device=device)
    yield _line("torch.randperm(V): plain", permuted, device, sizes, peak, 0)


def _losses(device: torch.device, sizes: Sizes, peak: float) -> Iterator[str]:
    yield "linear_cross_entropy, bfloat16; products of x and w, extra MiB at the peak"
    for n, d, v in sizes.heads:
        x = torch.randn(n, d, device=device, dtype=torch.bfloat16)
        w = torch.randn(v, d, device=device, dtype=torch.bfloat16) / d**0.5
        y = torch.randint(v, (n,), device=device)
        product = milliseconds(partial(torch.matmul, x, w.T), device, sizes.repeats)
        yield f"N {n}, D {d}, V {v}: one product {product:.2f} ms"
        for name, loss in contenders(device).items():
            for mode, run in (("step", _step), ("loss", _loss)):
                call = partial(run, loss, x, w, y)
                yield f"  {name:24} {mode}  {_measured(call, device, sizes, product)}"


def contenders(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Losses of x, w and y."""

    def ours(backend: str, schedule: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options = lossops.LinearLossOptions(schedule=schedule)
        return lambda x, w, y: lossops.linear_cross_entropy(
            x, w, y, backend=backend, options=options
        )

    listed = {
        f"{backend}, {schedule.replace('_', ' ')}": ours(backend, schedule)
        for backend in _backends(device)
        for schedule in ("one_sweep", "two_sweeps")
    }
    plain = lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y)  # noqa: E731
    return {**listed, "linear + cross_entropy": plain}


def _step(loss: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor) -> None:
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    torch.autograd.grad(loss(*leaves, y), leaves)


@torch.no_grad()
def _loss(loss: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor) -> None:
    loss(x, w, y)


def _measured(run: Callable[[], None], device: torch.device, sizes: Sizes, product: float) -> str:
    try:
        run()
        extra = ""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run()
            torch.cuda.synchronize(device)
            extra = f"  {(torch.cuda.max_memory_allocated(device) - before) / MIB:8.0f} MiB"
        found = milliseconds(run, device, sizes.repeats)
    except torch.OutOfMemoryError:
        return "does not fit"
    return f"{found:8.2f} ms = {found / product:5.2f} products{extra}"
