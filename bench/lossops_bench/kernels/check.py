"""`lossops-bench gpu-check`: everything that needs a GPU, once, into a file that can be sent."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import lossops
from lossops_bench.machine import versions

ROOT = Path(__file__).resolve().parents[3]
SHAPES = [(4096, 2048, 32768), (4096, 4096, 131072)]  # tokens, features, classes
SANITIZED = "test_primitives and 531 or test_statistics_straight and 64"


def gpu_check_command(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("gpu-check.txt"),
) -> None:
    """Run the GPU tests, the memory checker and the timings on this GPU."""
    if not torch.cuda.is_available():
        typer.echo(
            "lossops-bench gpu-check runs the kernels on a GPU, and torch finds none here.",
            err=True,
        )
        raise typer.Exit(1)
    passed = True
    with out.open("w") as file:

        def say(line: str) -> None:
            typer.echo(line)
            file.write(line + "\n")
            file.flush()

        for line in heading():
            say(line)
        for command in commands():
            say(f"\n$ {' '.join(command)}")
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            for line in (found.stdout + found.stderr).splitlines()[-40:]:
                say(line)
            passed &= found.returncode == 0
        say("")
        for line in timings():
            say(line)
        say(f"\n{'passed' if passed else 'FAILED'}")
    typer.echo(f"written to {out}")
    raise typer.Exit(not passed)


def heading() -> Iterator[str]:
    """The machine and the versions."""
    import triton

    yield f"lossops gpu-check, {datetime.datetime.now().isoformat(timespec='minutes')}"
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}: {of.name}, compute capability {of.major}.{of.minor}, "
            f"{of.multi_processor_count} multiprocessors, {of.total_memory / 2**30:.0f} GiB"
        )
    known = {**versions(), "triton": triton.__version__, "CUDA": str(torch.version.cuda)}
    yield f"{platform.platform()}; " + ", ".join(f"{k} {v}" for k, v in known.items())


def commands() -> Iterator[list[str]]:
    """The tests; some of them again under compute-sanitizer, where it is installed."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    yield [*tests, "tests"]
    if checker := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            yield [
                checker, "--tool", tool, "--error-exitcode", "1", *tests, "tests/test_gpu.py",
                "-k", SANITIZED,
            ]  # fmt: skip


def timings() -> Iterator[str]:
    """Milliseconds and extra memory of a step and of the loss alone, beside plain PyTorch."""
    from triton.testing import do_bench

    yield "linear_cross_entropy, bfloat16; ms by do_bench (median), extra MiB at the peak"
    for n, d, v in SHAPES:
        x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / d**0.5
        y = torch.randint(v, (n,), device="cuda")
        floor = do_bench(partial(torch.matmul, x, w.T), quantiles=[0.5])
        yield f"N {n}, D {d}, V {v}: one product {floor:.2f} ms"
        for name, loss in contenders().items():
            for mode, run in (("step", _step), ("loss", _loss)):
                yield f"  {name:24} {mode}  {_measured(partial(run, loss, x, w, y), floor)}"


def contenders() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What is timed."""

    def ours(schedule: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options = lossops.LinearLossOptions(schedule=schedule)
        return lambda x, w, y: lossops.linear_cross_entropy(
            x, w, y, backend="triton", options=options
        )

    return {
        "lossops, one sweep": ours("one_sweep"),
        "lossops, two sweeps": ours("two_sweeps"),
        "linear + cross_entropy": lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y),
    }


def _step(loss: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor) -> None:
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    torch.autograd.grad(loss(*leaves, y), leaves)


@torch.no_grad()
def _loss(loss: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor) -> None:
    loss(x, w, y)


def _measured(run: Callable[[], None], floor: float) -> str:
    from triton.testing import do_bench

    try:
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        found = do_bench(run, quantiles=[0.5])
    except torch.cuda.OutOfMemoryError:
        return "does not fit"
    return f"{found:8.2f} ms = {found / floor:5.2f} products  {extra:8.0f} MiB"
