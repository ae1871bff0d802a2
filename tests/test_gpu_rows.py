"""Rows by id and draws of class ids in CUDA on a real device: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_device import DEVICE, Moved, device, needs, needs_room, on_cuda
from gpu_draws import *  # noqa: F403
from gpu_rows import *  # noqa: F403

import lossops.cuda_draws
import lossops.cuda_rows
from lossops import reference_rows, reference_sampling

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> None:
    """All of these are kernels of that backend."""
    needs("cuda")


@pytest.fixture
def cuda_rows() -> Moved:
    return Moved(lossops.cuda_rows)


@pytest.fixture
def cuda_draws() -> Moved:
    return Moved(lossops.cuda_draws)


@pytest.fixture
def draws() -> Moved:
    return Moved(lossops.cuda_draws.DeviceDraws(DEVICE))


@pytest.fixture
def shuffle() -> Callable[[int], None]:
    """A GPU has its own order."""
    return lambda seed: None


@pytest.mark.slow
def test_more_rows_than_a_grid_has_in_one_direction(cuda_rows, draws, cuda_draws):
    """70,000 of them, of one class and of many."""
    s, v = 70_000, 80_000
    table, given = torch.randn(v, 4), torch.randn(s, 4)
    ids = draws.sample_permuted(7, v, s)
    assert torch.equal(ids, reference_sampling.sample_permuted(7, v, s))
    unit, norms = cuda_rows.normalized_rows(table, ids, 1e-12)
    exact, lengths = reference_rows.normalized_rows(table.double(), ids, 1e-12)
    torch.testing.assert_close(unit.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norms.double(), lengths, rtol=1e-6, atol=1e-6)
    for where in (ids, torch.where(torch.arange(s) < 66_000, 5, ids)):
        found = cuda_rows.scattered(where, given, table, False)
        exact = torch.zeros(v, 4, dtype=torch.float64).index_add_(0, where, given.double())
        scale = float(exact.abs().max())
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * scale)
    updated, exact = table.clone(), table.double()
    cuda_rows.sgd_rows(updated, None, ids, given, 0.1, 0.0, 0.0)
    reference_rows.sgd_rows(exact, None, ids, given.double(), 0.1, 0.0, 0.0)
    torch.testing.assert_close(updated.double(), exact, rtol=1e-6, atol=1e-6)
    dx, dw = torch.zeros(s, 4), torch.zeros(v, 4)
    value = torch.randn(s, 1)
    cuda_rows.add_targets(dx, dw, None, given, None, table, ids.unsqueeze(1), value)
    torch.testing.assert_close(dx, value * table[ids])
    torch.testing.assert_close(dw[ids], value * given)
    rising = ids.sort().values
    at = cuda_draws.positions(rising, torch.arange(v))
    assert torch.equal(at >= 0, torch.isin(torch.arange(v), ids))
    assert torch.equal(rising[at[at >= 0]], torch.arange(v)[at >= 0])
    drawn = ids.view(-1, 1)
    assert torch.equal(cuda_draws.hits(drawn, drawn.flip(0)), drawn == drawn.flip(0))


@on_cuda
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_more_than_2_31_elements(dtype):
    """Rows on both sides of 2^31 and at the end; a dense gradient of as many."""
    from lossops import cuda_rows

    needs_room(20)
    d = 512
    v = 2**31 // d + 100
    table = torch.zeros(v, d, dtype=dtype, device=DEVICE)
    ids = torch.tensor([0, 2**31 // d - 1, 2**31 // d, v - 1], device=DEVICE)
    given = torch.randn(4, d).to(dtype).to(DEVICE)
    table[ids] = given
    unit, norms = cuda_rows.normalized_rows(table, ids, 1e-12)
    exact, lengths = reference_rows.normalized_rows(given, torch.arange(4, device=DEVICE), 1e-12)
    torch.testing.assert_close(unit, exact)
    torch.testing.assert_close(norms, lengths)
    cuda_rows.sgd_rows(table, None, ids, given, 1.0, 0.0, 0.0)
    assert not table[ids].any()
    for distinct in (True, False):
        dense = cuda_rows.scattered(ids, given, table, distinct)
        assert torch.equal(dense[ids], given)
        assert torch.count_nonzero(dense) == torch.count_nonzero(given)
        del dense
    dx, value = torch.zeros(4, d, device=DEVICE), torch.ones(4, 1, device=DEVICE)
    table[ids] = given
    cuda_rows.add_targets(dx, None, None, dx, None, table, ids.unsqueeze(1), value)
    assert torch.equal(dx, given.float())
    if dtype == torch.float32:
        x = given.float()
        cuda_rows.add_targets(None, table, None, x, None, table, ids.unsqueeze(1), value)
        torch.testing.assert_close(table[ids], 2 * given)
