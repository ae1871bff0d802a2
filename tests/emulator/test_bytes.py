"""The bytes that the files of csrc/cuda say their kernels move, counted access by access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures import Bytes, built, loaded, traffic
from torch import Tensor

from lossops import cuda, cuda_rows
from lossops.gpu_layout import Logits, Spec
from lossops.statistics import canonical, outputs

DTYPES = (torch.float32, torch.bfloat16)
N, V = 5, 1102  # a block a row, rows at several places in 16 bytes
Traffic = Callable[..., list[Bytes]]


def once(t: Tensor) -> Bytes:
    """Every element is read by one thread."""
    return Bytes(t.nbytes, 0)


def each_row(t: Tensor) -> Bytes:
    """A vector of classes is read once for every row, from cache."""
    return Bytes(N * t.nbytes, 0)


def spec_of(names: tuple[str, ...], target: Tensor | None, teacher: Tensor | None) -> Spec:
    """Any statistics and coefficients."""
    values = [torch.zeros(N).long() if "index" in o or o == "argmax" else torch.randn(N)
              for o in outputs(names)]  # fmt: skip
    coefficients = [None if v.dtype == torch.int64 else v for v in values]
    coefficients[outputs(names).index("shift")] = None
    return Spec(target, None, teacher, names, values, coefficients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(traffic: Traffic, dtype: torch.dtype) -> None:
    z, a, teacher = torch.randn(N, V).to(dtype), torch.randn(V), torch.rand(N, V).half()
    sets = (("lse",), ("lse", "lse@2"), ("lse", "max", "runner_up"))
    for names in sets if dtype == torch.float32 else sets[:1]:  # half precision has fewer sets
        (of_z,) = traffic(lambda n=names: cuda.chunk_statistics(Logits(z), None, None, None, n), z)
        assert of_z == once(z)
    names = ("weighted_sum", "teacher")
    moved = traffic(
        lambda: cuda.chunk_statistics(Logits(z), None, a, teacher, names), z, a, teacher
    )
    # Sums over all classes are relative to one of 32 logits, which every warp reads.
    assert 0 < moved[0].read - z.nbytes <= 256 * N * z.element_size()
    assert moved[1:] == [each_row(a), once(teacher)]


def test_statistics_in_parts(traffic: Traffic) -> None:
    z = torch.randn(2, 2 * cuda.PART)
    (of_z,) = traffic(lambda: cuda.chunk_statistics(Logits(z), None, None, None, ("lse",)), z)
    assert of_z == once(z)


@pytest.mark.parametrize("names", [("lse",), ("lse", "entropy", "max", "sum", "lse@2")], ids=str)
def test_gradients(traffic: Traffic, names: tuple[str, ...]) -> None:
    target = torch.randint(V, (N, 1))
    spec = spec_of(canonical(names), target, None)
    for dtype in DTYPES:
        z = torch.randn(N, V).to(dtype)
        (of_z,) = traffic(lambda z=z: cuda.chunk_gradient(Logits(z), spec, z), z)
        assert of_z == Bytes(z.nbytes, z.nbytes)
    r, apart = torch.randn(N, V), torch.empty(N, V)
    moved = traffic(lambda: cuda.chunk_gradient(Logits(r), spec, apart), r, apart)
    assert moved == [once(r), Bytes(0, apart.nbytes)]
    db = torch.zeros(V)
    moved = traffic(lambda: cuda.column_sums(Logits(r), spec, db, False), r, db)
    assert moved == [once(r), Bytes(0, db.nbytes)]
    packed = r.view(torch.bfloat16)[:, :V]
    (of_r,) = traffic(lambda: cuda.chunk_gradient(Logits(r), spec, packed), r)
    assert of_r == Bytes(r.nbytes, r.nbytes // 2)


def test_the_gradient_of_a_teacher(traffic: Traffic) -> None:
    r, teacher = torch.randn(N, V), torch.rand(N, V).half()
    spec = spec_of(canonical(("lse", "teacher")), None, teacher)
    moved = traffic(lambda: cuda.chunk_gradient(Logits(r), spec, r), r, teacher)
    assert moved == [Bytes(r.nbytes, r.nbytes), once(teacher)]


def test_pairs(traffic: Traffic) -> None:
    r, sums, weight = torch.randn(N, V), torch.empty(N), torch.randn(V)
    factor, ids = torch.randn(N), torch.full((N, 1), -1)
    for out in (None, r, r.view(torch.bfloat16)[:, :V]):
        moved = traffic(
            lambda out=out: cuda.binary(
                Logits(r), ids, weight, "hinge", [0.3], factor, sums, out
            ), r, weight, sums,
        )  # fmt: skip
        written = 0 if out is None else N * V * out.element_size()
        assert moved == [Bytes(r.nbytes, written), each_row(weight), Bytes(0, sums.nbytes)]
    r, shift, lse = torch.randn(N, V), torch.empty(V), torch.empty(V)
    moved = traffic(lambda: cuda.pair_columns(Logits(r), ids, shift, lse), r, shift, lse)
    assert moved == [once(r), Bytes(0, shift.nbytes), Bytes(0, lse.nbytes)]
    row, column = (factor, factor, factor), (shift, lse, weight)
    for out in (r, r.view(torch.bfloat16)[:, :V]):
        moved = traffic(
            lambda out=out: cuda.pair_gradient(Logits(r), ids, row, column, out), r, *column
        )
        written = N * V * out.element_size()
        assert moved == [Bytes(r.nbytes, written), *map(each_row, column)]


@pytest.mark.parametrize("width", [37, 264])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(traffic: Traffic, dtype: torch.dtype, width: int) -> None:
    table, ids = torch.randn(N, width).to(dtype), torch.randperm(N)
    unit, norms = torch.empty_like(table), torch.empty(N)
    ops: Any = torch.ops.lossops_cuda
    moved = traffic(lambda: ops.normalized_rows(table, ids, 1e-12, unit, norms), table, unit, norms)
    assert moved == [once(table), Bytes(0, unit.nbytes), Bytes(0, norms.nbytes)]
    gradient, found = torch.randn(N, width).to(dtype), torch.empty_like(table)
    moved = traffic(
        lambda: ops.normalized_rows_gradient(unit, norms, gradient, found), unit, gradient, found
    )
    assert moved == [once(unit), once(gradient), Bytes(0, found.nbytes)]


@pytest.mark.parametrize("width", [37, 264])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_by_class(traffic: Traffic, dtype: torch.dtype, width: int) -> None:
    """Pairs of two classes, one of which a block shares, and a table of three."""
    ids = torch.cat([torch.zeros(90), torch.ones(7)]).long()
    given, table = torch.randn(97, width).to(dtype), torch.randn(3, width).to(dtype)
    touched = 2 * width * table.element_size()
    found = torch.empty_like(table)
    ops: Any = torch.ops.lossops_cuda
    moved = traffic(lambda: ops.scatter_rows(given, ids, None, found), given, found)
    assert moved == [once(given), Bytes(0, touched)]
    v = torch.zeros_like(table)
    moved = traffic(
        lambda: cuda_rows.sgd_rows(table, v, ids, given, 0.1, 0.9, 0.0), given, table, v
    )
    assert moved == [once(given), Bytes(touched, touched), Bytes(touched, touched)]
    mean, square, count = v.clone(), v.clone(), torch.zeros(3, dtype=torch.int32)
    moved = traffic(
        lambda: cuda_rows.adamw_rows(
            table, mean, square, count, ids, given, 0.1, 0.9, 0.99, 1e-8, 0.0
        ), given, table, mean, square,
    )  # fmt: skip
    assert moved == [once(given), *3 * [Bytes(touched, touched)]]


def test_targets(traffic: Traffic) -> None:
    x, w = torch.randn(97, 37).bfloat16(), torch.randn(3, 37).bfloat16()
    dx, dw, target = torch.zeros(97, 37), torch.zeros(3, 37), torch.zeros(97, 1).long()
    value = torch.randn(97, 1)
    moved = traffic(
        lambda: cuda_rows.add_targets(dx, dw, None, x, None, w, target, value), x, dx, dw
    )
    one = 4 * 37
    assert moved == [once(x), Bytes(dx.nbytes, dx.nbytes), Bytes(one, one)]
