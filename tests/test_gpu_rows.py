"""Rows, sums by class and draws on a real device: `pytest -m gpu`. None of this has run yet.

The oracle is the reference in float64, and for draws the reference bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lossops
from lossops import backends, cuda_draws, cuda_rows, optim, reference_rows, reference_sampling

pytestmark = pytest.mark.gpu

V, D, N = 100_003, 520, 5000
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def kernels_are_there() -> None:
    """They are, wherever the GPU tests run: a GPU without them is a failure."""
    assert backends.load_cuda_module() is None


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def assert_close(found: Tensor, exact: Tensor, roundings: float = 4) -> None:
    eps = torch.finfo(found.dtype).eps
    atol = roundings * eps * float(exact.abs().max()) / 2
    torch.testing.assert_close(found.double(), exact, rtol=roundings * eps, atol=atol)


@every_dtype
@pytest.mark.parametrize("width", [D, 37, 5001])
def test_rows(dtype: torch.dtype, width: int) -> None:
    w, ids = made(3000, width, dtype=dtype), torch.randint(3000, (N,), device="cuda")
    unit, norms = cuda_rows.normalized_rows(w, ids, 1e-12)
    exact, lengths = reference_rows.normalized_rows(w.double(), ids, 1e-12)
    assert_close(unit, exact)
    assert_close(norms, lengths, 16)
    g = made(N, width, dtype=dtype)
    found = cuda_rows.normalized_rows_gradient(unit, norms, g)
    exact = reference_rows.normalized_rows_gradient(unit.double(), norms.double(), g.double())
    assert_close(found, exact, 8)


@every_dtype
@pytest.mark.parametrize("width", [D, 37])
def test_sums_by_class(dtype: torch.dtype, width: int) -> None:
    x, w = made(N, width, dtype=dtype), made(V, width, dtype=dtype)
    target = torch.randint(-1, V, (N, 2), device="cuda")
    target[: N // 2] = 7
    value = made(N, 2)
    dx, dw, db = made(N, width), made(V, width), made(V)
    exact = [t.double() for t in (dx, dw, db)]
    for y, v in zip(target.T, value.double().T, strict=True):
        some = y >= 0
        exact[0][some] += v[some].unsqueeze(1) * w[y[some]].double()
        exact[1].index_add_(0, y[some], v[some].unsqueeze(1) * x[some].double())
        exact[2].index_add_(0, y[some], v[some])
    again = [t.clone() for t in (dx, dw, db)]
    for three in ((dx, dw, db), again):
        cuda_rows.add_targets(*three, x, None, w, target, value)
    for found, same, expected in zip((dx, dw, db), again, exact, strict=True):
        assert torch.equal(found, same)
        assert_close(found, expected, 64)


@every_dtype
def test_updates(dtype: torch.dtype) -> None:
    ids = torch.randint(V, (N,), device="cuda")
    ids[: N // 4] = 5
    g = made(N, D, dtype=dtype)
    distinct, at = ids.unique(return_inverse=True)
    sums = torch.zeros(len(distinct), D, dtype=torch.float64, device="cuda")
    sums.index_add_(0, at, g.double())
    w, m, s = (made(V, D, dtype=dtype) for _ in range(3))
    count = torch.arange(V, dtype=torch.int32, device="cuda")
    for name, tensors, numbers in (
        ("sgd_rows", [w, m], (0.1, 0.9, 0.05)),
        ("adamw_rows", [w, m, s.abs(), count], (0.1, 0.8, 0.9999, 1e-6, 0.03)),
    ):
        found = [t.clone() for t in tensors]
        exact = [t.double() if t.is_floating_point() else t.clone() for t in tensors]
        getattr(cuda_rows, name)(*found, ids, g, *numbers)
        getattr(reference_rows, name)(*exact, distinct, sums, *numbers)
        for f, e in zip(found, exact, strict=True):
            assert_close(f, e, 16) if f.is_floating_point() else torch.testing.assert_close(f, e)


@pytest.mark.parametrize("count", [7, 1000, 2**33 + 5])
def test_draws(count: int) -> None:
    ours = cuda_draws.DeviceDraws(torch.device("cuda"))
    some, log2 = min(count, 3000), math.log2(count + 1)
    calls = {
        "sample_permuted": (3, count, some),
        "sample_uniform": (3, count, 3000),
        "sample_log_uniform": (3, count, log2, min(some, 400), True, 100_000),
    }
    for name, arguments in calls.items():
        found = getattr(ours, name)(*arguments)
        expected = getattr(reference_sampling, name)(*arguments)
        if name == "sample_log_uniform":
            assert int(found[1]) == expected[1]
            found, expected = found[0], expected[0]
        assert torch.equal(found.cpu(), expected), name


def training(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[], Tensor]:
    """A step over a sample of the classes, loss and update."""
    w = torch.nn.Parameter(made(V, 64))
    optimizer, sampler = make([w]), lossops.samplers.LogUniform(V, 1000)
    x, y = made(N, 64), torch.randint(V, (N,), device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = lossops.sampled_softmax_loss(x, w, y, sampler)
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("make", [lambda p: optim.RowSGD(p, 0.1, 0.9), optim.RowAdamW])
def test_a_step_over_a_sample_waits_for_nothing(make: Callable[..., torch.optim.Optimizer]) -> None:
    step = training(make)
    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        last = [step() for _ in range(3)][-1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(last.isfinite() & (last < first))


def test_partial_fc_waits_for_nothing() -> None:
    head = lossops.PartialFC(64, V, sample_rate=0.1, device="cuda")
    optimizer = optim.RowSGD(head.parameters(), 0.1, 0.9)
    x, y = made(N, 64), torch.randint(V, (N,), device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = head(x, y)
        loss.backward()
        optimizer.step()
        return loss

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert step().shape == ()
    finally:
        torch.cuda.set_sync_debug_mode("default")
