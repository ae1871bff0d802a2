"""The host side of the Triton kernels on tensors without values: nothing on the path waits for one.

Meta tensors take the branches of a GPU; whoever asks one for a value raises. Launches are recorded
and not run.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from lossops import schedules
from lossops.schedules import CPU_CHUNK, GPU_CHUNK, MIB, Head, Needs, chunk_size, one_sweep_rows
from lossops.statistics import STATISTICS, canonical, outputs

triton = pytest.importorskip("triton", reason="Triton is an optional dependency")

N, D, V = 300, 64, 1000
META = torch.device("meta")
ALL = Needs(dx=True, dw=True, db=True, dscale=True)
EVERYTHING = canonical((*STATISTICS, "lse@2", "lse<0.3"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would have been launched on an H100."""
    from lossops_triton import configurations, fused, launch, pairs, statistics, targets

    names: list[str] = []

    def record(kernel, *arguments, grid, **options):
        assert all(isinstance(size, int) and size > 0 for size in grid)
        names.append(kernel.fn.__name__)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    monkeypatch.setattr(configurations, "architecture", lambda: "sm_90")
    for module in (launch, fused, pairs, statistics, targets):
        if hasattr(module, "multiprocessors"):
            monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(module, "on", lambda device: nullcontext(), raising=False)
    return names


def head(dtype: torch.dtype, names: list[str]) -> Head:
    """A head with all there is."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    teacher = empty(N, V) if "teacher" in names else None
    target = empty(N, 2, dtype=torch.int64)
    return Head(
        empty(N, D), empty(V, D), empty(V), empty(()), 3.0, target, empty(V), teacher, names
    )


def ones(found: list[Tensor], names: list[str]) -> list[Tensor | None]:
    """A coefficient for every output that can have one."""
    return [
        None if out in ("shift", "argmax") or out.endswith("_index") else torch.ones_like(t)
        for out, t in zip(outputs(names), found, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [canonical(("target", "lse")), EVERYTHING], ids=["lse", "all"])
def test_one_sweep_waits_for_nothing(dtype, names, launched):
    import lossops_triton

    def row_function(found, rows):
        return found[0], ones(found, names)

    wanted = [out for out in outputs(names) if out != "shift"]
    losses, gradients = schedules.one_sweep(
        head(dtype, names), wanted, row_function, ALL, lossops_triton, 128
    )
    assert losses.shape == (N,)
    assert [g.shape for g in gradients if g is not None] == [(N, D), (V, D), (V,), ()]
    chunks = [name for name in launched if name == "chunk_gradient_kernel"]
    assert len(chunks) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_sweeps_wait_for_nothing(dtype, launched):
    import lossops_triton

    names = canonical(n for n in EVERYTHING if n != "below_target")
    found = lossops_triton.linear_statistics(*head(dtype, names))
    assert ("fused_statistics_kernel" in launched) == (dtype != torch.float32)
    gradients = schedules.two_sweeps_gradient(
        head(dtype, names), found, ones(found, names), ALL, lossops_triton
    )
    assert all(g is not None for g in gradients)


def test_a_binary_sweep_waits_for_nothing(launched):
    import lossops_triton

    x, w, b, scale, _, target, weight, *_ = head(torch.bfloat16, [])
    dx, dw, db = (torch.empty(s, device=META) for s in ((N, D), (V, D), (V,)))
    value = torch.empty(N, 2, device=META)
    sums = lossops_triton.linear_binary(
        x, w, b, scale, target, weight, "sigmoid", [], None, value, dx, dw, db
    )
    assert sums.shape == (N,)
    assert "binary_kernel" in launched


def test_chunks_come_from_the_stated_budget_alone():
    assert (chunk_size(torch.device("cpu")), chunk_size(META)) == (CPU_CHUNK, GPU_CHUNK)
    x = torch.empty(8192, 1024, device=META)
    rows = one_sweep_rows(x, 131_072, True, 512 * MIB)
    assert rows == 911  # 9 chunks of at most 1023 rows
    assert one_sweep_rows(x, 131_072, True, 256 * MIB) is None  # 511 rows: two sweeps are cheaper
