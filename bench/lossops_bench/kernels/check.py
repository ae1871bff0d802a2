"""`lossops-bench gpu-check`: everything that needs a GPU, once, into a file that can be sent."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from lossops_bench.kernels.timings import timings
from lossops_bench.machine import versions

ROOT = Path(__file__).resolve().parents[3]
# Of each kernel a launch or two, since compute-sanitizer takes a hundred times as long.
SANITIZED = (
    "cuda and (test_everything_at_once and ragged or test_rows_of_a_buffer or test_parts or "
    "test_binary_sums or test_log_sums or test_targets_by_segments) or "
    "test_normalized_rows or test_scattered or test_targets or test_an_update or "
    "test_distinct_ids or test_positions or test_hits"
)
SANITIZED_FILES = ("tests/test_gpu_kernels.py", "tests/test_gpu_rows.py")
# Each tensor its own allocation, so that whoever leaves it is seen.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


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
        for command, environment in commands():
            say(f"\n$ {' '.join(command)}")
            found = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
            )
            for line in (found.stdout + found.stderr).splitlines()[-40:]:
                say(line)
            passed &= found.returncode == 0
        say("")
        for line in timings(torch.device("cuda")):
            say(line)
        say(f"\n{'passed' if passed else 'FAILED'}")
    typer.echo(f"written to {out}")
    raise typer.Exit(not passed)


def heading() -> Iterator[str]:
    """The machine and the versions."""
    yield f"lossops gpu-check, {datetime.datetime.now().isoformat(timespec='minutes')}"
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}: {of.name}, compute capability {of.major}.{of.minor}, "
            f"{of.multi_processor_count} multiprocessors, {of.total_memory / 2**30:.0f} GiB"
        )
    triton = version("triton") if importlib.util.find_spec("triton") else "not installed"
    known = {**versions(), "triton": triton, "CUDA": str(torch.version.cuda)}
    told = ", ".join(f"{name} {found}" for name, found in known.items())
    yield f"{platform.node()}; {platform.platform()}; {told}"


def commands() -> Iterator[tuple[list[str], dict[str, str]]]:
    """The tests; some of the CUDA kernels' under compute-sanitizer, where it is installed.

    Each with what it needs in its environment.
    """
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    yield [*tests, "tests"], {}
    if checker := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            # Who reads what nobody wrote is only known where all writes are watched, those of
            # torch's kernels too, and where the tests do not fill new memory themselves.
            every = tool == "initcheck"
            yield [
                checker, "--tool", tool, "--error-exitcode", "1",
                *([] if every else ["--kernel-name", "kns=lossops"]),
                *tests, *SANITIZED_FILES, "-k", SANITIZED,
            ], {**NO_CACHE, **({"LOSSOPS_TEST_POISON": "0"} if every else {})}  # fmt: skip
