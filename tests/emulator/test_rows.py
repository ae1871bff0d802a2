"""Rows of a table by id, sums by class, row updates: the CUDA source on a CPU, against float64."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from fixtures import built, emulator, loaded, run
from gpu_rows import *  # noqa: F403

import lossops.cuda_rows

NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which mmap has from Python 3.13 on


@pytest.fixture
def cuda_rows(emulator: Callable[[int], None]) -> ModuleType:
    return lossops.cuda_rows


@pytest.fixture
def shuffle(emulator: Callable[[int], None]) -> Callable[[int], None]:
    return emulator


def test_offsets_beyond_32_bits(cuda_rows):
    # Three rows, 4 GiB apart: only their pages are ever touched.
    stride = 2**30 + 4
    memory = mmap.mmap(-1, 4 * (2 * stride + 8), mmap.MAP_PRIVATE | NO_RESERVE)
    storage = torch.frombuffer(memory, dtype=torch.float32)
    table = storage.as_strided((3, 8), (stride, 1))
    given = torch.randn(3, 8)
    for i in range(3):
        table[i].copy_(given[i])
    ids = torch.tensor([2, 0])
    unit, _ = cuda_rows.normalized_rows(table, ids, 1e-12)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(given[ids], dim=1))
    cuda_rows.sgd_rows(table, None, ids, torch.ones(2, 8), 0.5, 0.0, 0.0)
    assert torch.equal(torch.stack([table[i].clone() for i in range(3)]),
                       given - torch.tensor([[0.5], [0.0], [0.5]]))  # fmt: skip
    dx = torch.zeros(1, 8)
    cuda_rows.add_targets(dx, table, None, torch.ones(1, 8), None, table, ids[None, :1],
                          torch.full((1, 1), 3.0))  # fmt: skip
    torch.testing.assert_close(dx[0], 3 * (given[2] - 0.5))
    torch.testing.assert_close(table[2], given[2] + 2.5)


def test_refusals(cuda_rows):
    w, g = torch.randn(4, 6), torch.randn(2, 6)
    ids = torch.tensor([0, 1])
    ops = torch.ops.lossops_cuda
    with pytest.raises(RuntimeError, match="table must be Float, got Double"):
        ops.sgd_rows(w.double(), None, ids, None, g, 0.1, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="table must be Half, got Float"):
        ops.sgd_rows(w, None, ids, None, g.half(), 0.1, 0.0, 0.0)
    with pytest.raises(RuntimeError, match=r"velocity must have shape \(4, 6\)"):
        ops.sgd_rows(w, w[:3], ids, None, g, 0.1, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="table must have rows without holes, got stride 2"):
        ops.normalized_rows(torch.randn(4, 12)[:, ::2], ids, 1e-12, g, torch.empty(2))
    assert not cuda_rows.takes(torch.randn(4, 12)[:, ::2])
    assert not cuda_rows.takes(w.double())
