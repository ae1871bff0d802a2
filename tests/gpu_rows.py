"""Rows of a table by id, sums by class, row updates in CUDA, against float64.

The emulator and a GPU share these tests. A suite imports all of this and has the fixtures
``cuda_rows``, that module for tensors on the CPU, ``shuffle``, which takes a seed for another order
of blocks and threads, and ``device``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lossops
from lossops import optim, reference_rows, rows

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# One element; a part of a vector; odd rows; whole vectors; more than a part of a warp; more than a
# warp keeps in registers; more than a block does, also at odd places.
WIDTHS = (1, 5, 37, 64, 264, 2100, 9000)


def made(rows: int, width: int, dtype: torch.dtype, layout: str = "dense") -> Tensor:
    """Numbers, in rows that begin at odd places or lie far apart."""
    if layout == "dense":
        return torch.randn(rows, width).to(dtype)
    if layout == "odd":
        return torch.randn(rows * width + 1).to(dtype)[1:].view(rows, width)
    return torch.randn(rows, width + 24).to(dtype)[:, 8 : 8 + width]  # "apart"


def assert_close(
    found: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    roundings: float = 2,
    scale: Tensor | None = None,
) -> None:
    """Within some roundings of the numbers, or of the largest that was added up."""
    eps = torch.finfo(dtype).eps
    largest = float((exact if scale is None else scale).abs().max()) if exact.numel() else 1.0
    torch.testing.assert_close(
        found.double(), exact, rtol=roundings * eps, atol=roundings * eps * largest / 2
    )


@pytest.mark.parametrize("layout", ["dense", "odd", "apart"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized_rows(cuda_rows, shuffle, dtype, layout):
    shuffle(1)
    for width in WIDTHS:
        w = made(23, width, DTYPES[dtype], layout)
        w[3] = 0
        ids = torch.tensor([0, 3, 7, 22, 22, 5, 1, 9, 10])[: 9 if width < 1000 else 3]
        unit, norms = cuda_rows.normalized_rows(w, ids, 1e-12)
        exact, lengths = reference_rows.normalized_rows(w.double(), ids, 1e-12)
        assert_close(unit, exact, w.dtype, 1)
        assert_close(norms, lengths, torch.float32, 4)
        g = made(len(ids), width, w.dtype, layout)
        found = cuda_rows.normalized_rows_gradient(unit, norms, g)
        dw = reference_rows.normalized_rows_gradient(unit.double(), norms.double(), g.double())
        kept = ids != 3  # the row of zeros has no direction
        scale = (g / norms.unsqueeze(1).to(g.dtype))[kept]
        assert_close(found[kept], dw[kept], w.dtype, 2, scale)


def test_rows_that_are_not_there(cuda_rows):
    w = torch.randn(4, 6)
    unit, norms = cuda_rows.normalized_rows(w, torch.tensor([-1, 2, 4]), 1e-12)
    assert bool(unit[[0, 2]].isnan().all() & norms[[0, 2]].isnan().all())
    assert bool(unit[1].isfinite().all())
    w[2, 3] = torch.nan
    unit, norms = cuda_rows.normalized_rows(w, torch.tensor([2]), 1e-12)
    assert bool(unit.isnan().all() & norms.isnan().all())
    before = w.clone()
    cuda_rows.sgd_rows(w, None, torch.tensor([-1, 4, 2**40]), torch.ones(3, 6), 0.1, 0.0, 0.0)
    torch.testing.assert_close(w, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("width", [0, 3])
def test_nothing(cuda_rows, width):
    w, none = torch.randn(4, width), torch.zeros(0, dtype=torch.int64)
    unit, norms = cuda_rows.normalized_rows(w, none, 1e-12)
    assert unit.shape == (0, width)
    assert norms.shape == (0,)
    assert cuda_rows.normalized_rows_gradient(unit, norms, unit).shape == (0, width)
    cuda_rows.sgd_rows(w, None, none, w[:0], 0.1, 0.0, 0.0)
    assert not cuda_rows.scattered(none, w[:0], w, False).any()
    if width == 0:
        cuda_rows.sgd_rows(w, None, torch.tensor([1, 1]), w[:2], 0.1, 0.0, 0.0)
        assert cuda_rows.normalized_rows(w, torch.tensor([1]), 1e-12)[1].item() == pytest.approx(
            1e-12
        )


def ids_of_runs() -> Tensor:
    """Classes of one pair, of several, of blocks, of many; in no order."""
    lengths = {0: 1, 1: 3, 2: 1, 3: 70, 4: 8, 5: 33, 6: 2, 7: 300, 9: 64, 10: 1, 11: 5}
    ids = torch.cat([torch.full((n,), i) for i, n in lengths.items()])
    return ids[torch.randperm(len(ids))]


@pytest.mark.parametrize("layout", ["dense", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered(cuda_rows, shuffle, dtype, layout):
    for seed, width in enumerate((1, 37, 136, 520)):
        shuffle(seed)
        ids = ids_of_runs()
        given = made(len(ids), width, DTYPES[dtype], layout)
        table = torch.empty(12, width, dtype=given.dtype)
        found = cuda_rows.scattered(ids, given, table, False)
        exact = torch.zeros(12, width, dtype=torch.float64).index_add_(0, ids, given.double())
        assert_close(found, exact, given.dtype, 1 if dtype != "f32" else 8)
        shuffle(seed + 10)
        assert torch.equal(cuda_rows.scattered(ids, given, table, False), found)
        some = torch.tensor([1, 4, 5])
        found = cuda_rows.scattered(some, given[:3], table, True)
        assert torch.equal(found[some], given[:3])
        assert not found[[0, 2, 3]].any()


def test_a_vector_and_a_tensor_of_rows(cuda_rows):
    ids = torch.tensor([3, 0, 3])
    bias = cuda_rows.scattered(ids, torch.tensor([1.0, 2.0, 4.0]), torch.empty(5), False)
    assert bias.tolist() == [2, 0, 0, 5, 0]
    cube = cuda_rows.scattered(ids, torch.ones(3, 2, 2), torch.empty(5, 2, 2), False)
    assert cube.sum(dim=(1, 2)).tolist() == [4, 0, 0, 8, 0]


@pytest.mark.parametrize("layout", ["dense", "odd", "apart"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_targets(cuda_rows, shuffle, dtype, layout, k):
    n, v = (
        {1: 200, 3: 20, 40: 5}[k],
        11,
    )  # a class that a block shares, several a row, more than a warp
    for width in (5, 136):
        x, w = made(n, width, DTYPES[dtype], layout), made(v, width, DTYPES[dtype], layout)
        target = torch.randint(-1, v + 1, (n, k))
        target[: n // 2] = 4
        target[3, 0] = -100
        value, scale = torch.randn(n, k), torch.tensor(1.7)
        dx, dw, db = torch.randn(n, width), made(v, width, torch.float32, layout), torch.randn(v)
        exact = [t.double() for t in (dx, dw, db)]
        known = (target >= 0) & (target < v)
        for column in range(k):
            rows_, ids = known[:, column], target[known[:, column], column]
            g = value[rows_, column].double().unsqueeze(1)
            exact[0][rows_] += g * w[ids].double()
            exact[1].index_add_(0, ids, g * x[rows_].double() * float(scale))
            exact[2].index_add_(0, ids, g.squeeze(1))
        found = [t.clone() for t in (dx, dw, db)]
        shuffle(k)
        cuda_rows.add_targets(*found, x, scale, w, target, value)
        for f, e in zip(found, exact, strict=True):
            assert_close(f, e, torch.float32, 16)
        # Each alone gives the same bits, in another order of blocks and threads.
        shuffle(k + 1)
        for i in range(3):
            alone = [None, None, None]
            alone[i] = (dx, dw, db)[i].clone()
            cuda_rows.add_targets(*alone, x, scale, w, target, value)
            assert torch.equal(alone[i], found[i])


def test_targets_of_nothing(cuda_rows):
    w = torch.randn(3, 4)
    dx = torch.zeros(2, 4)
    cuda_rows.add_targets(dx, None, None, dx, None, w, torch.zeros(2, 0).long(), torch.zeros(2, 0))
    cuda_rows.add_targets(dx, None, None, dx, None, w[:0], torch.zeros(2, 1).long(), dx[:, :1])
    assert not dx.any()


@pytest.mark.parametrize("layout", ["dense", "odd", "apart"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_rounds_once(cuda_rows, shuffle, dtype, layout):
    v, low = 23, DTYPES[dtype]
    ids = torch.tensor([7, 0, 22, 4])
    for seed, width in enumerate((5, 136, 300)):
        shuffle(seed)
        g = made(4, width, low, layout)
        w, m, s = (made(v, width, low, layout) for _ in range(3))
        s = s.abs()
        count = torch.arange(v, dtype=torch.int32)
        count[4] = 2**24 + 1
        for name, tensors, numbers in (
            ("sgd_rows", [w, None], (0.1, 0.9, 0.05)),
            ("sgd_rows", [w, m], (0.1, 0.9, 0.05)),
            ("adamw_rows", [w, m, s, count], (0.1, 0.8, 0.9999, 1e-6, 0.03)),
        ):
            found = [None if t is None else made_like(t) for t in tensors]
            exact = [
                None if t is None else t.double() if t.is_floating_point() else t.clone()
                for t in tensors
            ]
            getattr(cuda_rows, name)(*found, ids, g, *numbers)
            getattr(reference_rows, name)(*exact, ids, g.double(), *numbers)
            untouched = [i for i in range(v) if i not in ids.tolist()]
            for f, e, before in zip(found, exact, tensors, strict=True):
                if f is None:
                    continue
                assert torch.equal(f[untouched], before[untouched])
                if f.is_floating_point():
                    assert_close(f, e, low, 4)
                else:
                    assert torch.equal(f, e)


def made_like(t: Tensor) -> Tensor:
    """A copy with the same strides, at as odd a place."""
    odd = t.data_ptr() % 16 // t.element_size()
    storage = t.new_empty(odd + (t.shape[0] - 1) * t.stride(0) + t.shape[1] if t.ndim > 1 else
                          odd + t.shape[0])  # fmt: skip
    return storage[odd:].as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradients_of_a_row_are_added_up(cuda_rows, shuffle, name):
    shuffle(3)
    ids = ids_of_runs()
    g = torch.randn(len(ids), 40)
    w = torch.randn(12, 40)
    distinct = torch.unique(ids)
    sums = torch.zeros(12, 40, dtype=torch.float64).index_add_(0, ids, g.double())[distinct]
    found, exact = w.clone(), w.double()
    if name == "sgd":
        v, e = torch.randn(12, 40), torch.zeros(0)
        e = v.double()
        cuda_rows.sgd_rows(found, v, ids, g, 0.1, 0.9, 0.01)
        reference_rows.sgd_rows(exact, e, distinct, sums, 0.1, 0.9, 0.01)
        assert_close(v, e, torch.float32, 4)
    else:
        states = [torch.zeros(12, 40, dtype=d) for d in (torch.float32,) * 2 + (torch.float64,) * 2]
        counts = [torch.zeros(12, dtype=torch.int32) for _ in range(2)]
        numbers = (0.1, 0.9, 0.999, 1e-8, 0.01)
        cuda_rows.adamw_rows(found, *states[:2], counts[0], ids, g, *numbers)
        reference_rows.adamw_rows(exact, *states[2:], counts[1], distinct, sums, *numbers)
        assert torch.equal(*counts)
    assert_close(found, exact, torch.float32, 4)


def test_partial_fc_learns_as_in_float64(device, shuffle):
    shuffle(1)
    heads = [
        lossops.PartialFC(24, 60, sample_rate=0.3, backend=b, device=device, dtype=torch.float32)
        for b in ("auto", "reference")
    ]
    heads[1].double().load_state_dict(heads[0].state_dict())
    optimizers = [optim.RowSGD(h.parameters(), 0.5, 0.9, 0.01) for h in heads]
    assert rows.primitives(heads[0].weight) is rows.cuda_rows
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(7, 24, generator=draw).to(device)
        y = torch.randint(60, (7,), generator=draw).to(device)
        losses = []
        for head, optimizer in zip(heads, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(head(x.to(head.weight.dtype), y))
            losses[-1].backward()
            optimizer.step()
        assert math.isclose(losses[0].item(), losses[1].item(), rel_tol=1e-5)
    assert_close(heads[0].weight.detach(), heads[1].weight.detach(), torch.float32, 64)


@pytest.mark.parametrize("sparse", [True, False])
def test_sampled_softmax_learns_as_in_float64(device, shuffle, sparse):
    shuffle(2)
    w = (torch.randn(50, 16) * 0.1).to(device)
    tables = [torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.double())]
    optimizers = [optim.RowAdamW([t], 0.05) for t in tables]
    sampler = lossops.samplers.LogUniform(50, 12, seed=3)
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(9, 16, generator=draw).to(device)
        y = torch.randint(50, (9,), generator=draw).to(device)
        losses, inputs = [], []
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.zero_grad()
            inputs.append(x.to(table.dtype, copy=True).requires_grad_())
            sample = sampler(y, step)
            losses.append(lossops.sampled_softmax_loss(inputs[-1], table, y, sample, sparse=sparse))
            losses[-1].backward()
            optimizer.step()
        assert math.isclose(losses[0].item(), losses[1].item(), rel_tol=1e-5)
        assert_close(inputs[0].grad, inputs[1].grad, torch.float32, 64)
    torch.testing.assert_close(tables[0].double(), tables[1], rtol=1e-4, atol=1e-5)
