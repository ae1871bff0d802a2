"""The host side of the GPU kernels on tensors without values: nothing on the path waits for one.

Meta tensors take the branches of a GPU; whoever asks one for a value raises. Launches are recorded
and not run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lossops.cuda
from lossops import backends, cuda_rows, gpu_layout, optim, rows, samplers, schedules
from lossops.sampled import IndexedProducts
from lossops.schedules import CPU_CHUNK, GPU_CHUNK, MIB, Head, Needs, chunk_size, one_sweep_rows
from lossops.statistics import STATISTICS, canonical, outputs

N, D, V = 300, 64, 1000
META = torch.device("meta")
ALL = Needs(dx=True, dw=True, db=True, dscale=True)
EVERYTHING = canonical((*STATISTICS, "lse@2", "lse<0.3"))


class Host(NamedTuple):
    """A backend whose kernels are only noted down.

    Attributes:
        primitives: those of the backend.
        launched: the names of the kernels, or ops, that would have run on an H100.
        gradient: the one that makes dr.
        straight: the one that makes statistics straight from x and w, if any.
        binary: the one of a sum over single logits.
    """

    primitives: Any
    launched: list[str]
    gradient: str
    straight: str | None
    binary: str


class Ops:
    """In the place of ``torch.ops.lossops_cuda``."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def record(*arguments: Any) -> None:
            given = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
            assert all(t.device == META for t in given)
            self.launched.append(name)

        return record


def of_triton(monkeypatch: pytest.MonkeyPatch) -> Host:
    triton = pytest.importorskip("triton", reason="Triton is an optional dependency")
    import lossops_triton
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
    return Host(
        lossops_triton.primitives,
        names,
        "chunk_gradient_kernel",
        "fused_statistics_kernel",
        "binary_kernel",
    )


def of_cuda(monkeypatch: pytest.MonkeyPatch) -> Host:
    ops = Ops()
    monkeypatch.setattr(torch.ops, "lossops_cuda", ops, raising=False)
    monkeypatch.setattr(gpu_layout, "multiprocessors", lambda device: 132)
    anywhere = replace(backends.BACKENDS["cuda"], objection=lambda device, dtype: None)
    monkeypatch.setitem(backends.BACKENDS, "cuda", anywhere)
    return Host(lossops.cuda.primitives, ops.launched, "logits_gradient", None, "binary")


@pytest.fixture(params=[of_triton, of_cuda], ids=["triton", "cuda"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Each backend."""
    return request.param(monkeypatch)


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
def test_one_sweep_waits_for_nothing(dtype, names, host):
    def row_function(found, rows):
        return found[0], ones(found, names)

    wanted = [out for out in outputs(names) if out != "shift"]
    losses, gradients = schedules.one_sweep(
        head(dtype, names), wanted, row_function, ALL, host.primitives, 128
    )
    assert losses.shape == (N,)
    assert [g.shape for g in gradients if g is not None] == [(N, D), (V, D), (V,), ()]
    assert host.launched.count(host.gradient) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_sweeps_wait_for_nothing(dtype, host):
    names = canonical(n for n in EVERYTHING if n != "below_target")
    found = host.primitives.linear_statistics(*head(dtype, names))
    if host.straight:
        assert (host.straight in host.launched) == (dtype != torch.float32)
    gradients = schedules.two_sweeps_gradient(
        head(dtype, names), found, ones(found, names), ALL, host.primitives
    )
    assert all(g is not None for g in gradients)


def test_a_binary_sweep_waits_for_nothing(host):
    x, w, b, scale, _, target, weight, *_ = head(torch.bfloat16, [])
    dx, dw, db = (torch.empty(s, device=META) for s in ((N, D), (V, D), (V,)))
    value = torch.empty(N, 2, device=META)
    sums = host.primitives.linear_binary(
        x, w, b, scale, target, weight, "sigmoid", [], None, value, dx, dw, db
    )
    assert sums.shape == (N,)
    assert host.binary in host.launched


def test_pairs_wait_for_nothing(host):
    x, w, _, scale, _, target, *_ = head(torch.bfloat16, [])
    found = host.primitives.linear_pair_statistics(x, w, scale, target)
    dx, dw = (torch.empty(t.shape, device=META) for t in (x, w))
    given = [torch.empty(shape, device=META) for shape in ((N,), (V,), target.shape)]
    host.primitives.linear_pair_gradient(x, w, scale, target, found, given, dx, dw)
    assert [t.shape for t in found[:4]] == [(N,), (N,), (V,), (V,)]


def test_logits_are_split_into_parts_by_their_sizes(monkeypatch):
    host = of_cuda(monkeypatch)
    parts: list[int] = []
    monkeypatch.setattr(
        torch.ops.lossops_cuda, "logits_statistics", lambda *given: parts.append(given[10])
    )
    for n, v in ((2, 131_072), (100, 131_072), (528, 131_072), (3, 4096)):
        z = torch.empty(n, v, device=META)
        found = host.primitives.logits_statistics(z, None, None, None, canonical(("lse",)))
        assert all(t.shape == (n,) for t in found)
    assert parts == [32, 5, 1, 1]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the CUDA ops that would have run."""
    return of_cuda(monkeypatch).launched


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=META)


@pytest.mark.parametrize("shape", [(N,), (N, 3)])
def test_samplers(launched, shape):
    target = ids(*shape)
    for sampler, draw in (
        (samplers.Uniform(V, 50), "draw_permuted"),
        (samplers.LogUniform(V, 50), "draw_log_uniform"),
        (samplers.LogUniform(V, 50, unique=False), "draw_log_uniform"),
        (samplers.Frequency(torch.rand(V) + 0.1, 50), "draw_alias"),
        (samplers.Frequency(torch.rand(V) + 0.1, 50, unique=True), "draw_alias"),
    ):
        launched.clear()
        drawn = sampler(target)
        assert all(t.device == META for t in drawn)
        assert drawn.ids.shape == (50,)
        assert drawn.target_position.shape == shape
        distinct = getattr(sampler, "unique", False)
        assert launched == [draw, *(["mark_first", "take_first"] if distinct else []),
                            "find_positions"]  # fmt: skip
        assert sampler.per_row(target).ids.shape == (N, 50)
    kept = samplers.sample_keeping(ids(N), V, 60, 3)
    assert kept.shape == (60,)
    assert launched[-1] == "draw_permuted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [
    lambda p: optim.RowSGD(p, 0.1, 0.9), lambda p: optim.RowAdamW(p),
], ids=["sgd", "adamw"])  # fmt: skip
@pytest.mark.parametrize("sparse", [True, False])
def test_rows_and_their_updates(launched, make, dtype, sparse):
    w = torch.nn.Parameter(torch.empty(V, D, dtype=dtype, device=META))
    optimizer = make([w])
    for select in (
        lambda: rows.select_rows(w, ids(N), sparse=sparse),
        lambda: rows.select_normalized_rows(w, ids(N), sparse=sparse),
    ):
        optimizer.zero_grad()
        select().sum().backward()
        assert w.grad.is_sparse == sparse
        optimizer.step()
    assert ("scatter_rows" in launched) == (not sparse)
    assert {"normalized_rows", "normalized_rows_gradient"} < set(launched)
    assert launched[-1] in ("sgd_rows", "adamw_rows")


def test_products_of_rows(launched):
    x = torch.empty(N, D, device=META, requires_grad=True)
    w = torch.empty(V, D, device=META, requires_grad=True)
    IndexedProducts.apply(x, w, ids(N, 2)).sum().backward()
    assert launched == ["add_to_rows", "add_to_classes"]
    launched.clear()
    dx, dw, db = (torch.empty(s, device=META) for s in ((N, D), (V, D), V))
    scale = torch.empty((), dtype=torch.bfloat16, device=META)
    cuda_rows.add_targets(dx, dw, db, x, scale, w, ids(N, 2), torch.empty(N, 2, device=META))
    assert launched == ["add_to_rows", "add_to_classes"]


def test_a_sample_for_partial_fc(launched):
    head = lossops.PartialFC(D, V, sample_rate=0.4, device=META)
    sample = head._sampled(ids(N, 1), 0)
    assert sample.shape == (400,)
    assert samplers.positions(sample, ids(N, 1)).shape == (N, 1)
    assert launched == ["draw_permuted", "find_positions"]


@pytest.mark.parametrize("optimizer", [optim.RowSGD, optim.RowAdamW])
def test_training_on_samples_waits_for_nothing(optimizer, monkeypatch):
    host = of_cuda(monkeypatch)
    x, y = torch.empty(N, D, device=META), torch.empty(N, dtype=torch.int64, device=META)
    table = torch.empty(V, D, device=META, requires_grad=True)
    head = lossops.PartialFC(D, V, sample_rate=0.4, device=META)
    parameters = optimizer([*head.parameters(), table], 0.1)
    for sampler in (
        samplers.Uniform(V, 50), samplers.LogUniform(V, 50),
        samplers.Frequency(torch.rand(V) + 0.1, 50, unique=True),
    ):  # fmt: skip
        parameters.zero_grad()
        head(x, y).backward()
        lossops.sampled_softmax_loss(x, table, y, sampler).backward()
        lossops.nce_loss(x, table, y, sampler).backward()
        sampler.per_row(y)
        parameters.step()
    assert {
        "draw_permuted",
        "draw_log_uniform",
        "draw_alias",
        "mark_first",
        "take_first",
        "find_positions",
        "normalized_rows",
        "normalized_rows_gradient",
    } <= set(host.launched)
    assert {"sgd_rows", "adamw_rows"} & set(host.launched)


def test_chunks_come_from_the_stated_budget_alone():
    assert (chunk_size(torch.device("cpu")), chunk_size(META)) == (CPU_CHUNK, GPU_CHUNK)
    x = torch.empty(8192, 1024, device=META)
    rows = one_sweep_rows(x, 131_072, True, 512 * MIB)
    assert rows == 911  # 9 chunks of at most 1023 rows
    assert one_sweep_rows(x, 131_072, True, 256 * MIB) is None  # 511 rows: two sweeps are cheaper
