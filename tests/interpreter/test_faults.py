"""The checks find what they are for: each seeded fault is caught, each clean twin passes."""

from __future__ import annotations

import memory
import pytest
import torch
import triton
import triton.language as tl
from repair import rounded, to_tf32, widened
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def copy(x, out, n, B: tl.constexpr, LOADS: tl.constexpr, STORES: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + o, tl.load(x + o, mask=o < n + LOADS), mask=o < n + STORES)


@triton.jit
def product(a, b, c, m, n, k, B: tl.constexpr, WIDE: tl.constexpr):
    o_m = tl.program_id(0) * B + tl.arange(0, B)
    o_n = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros((B, B), tl.float32)
    for first in range(0, k, B):
        o_k = first + tl.arange(0, B)
        m_k = o_k < k + WIDE
        b_a = tl.load(a + o_m[:, None] * k + o_k, mask=(o_m[:, None] < m) & m_k, other=0.0)
        b_b = tl.load(b + o_n * k + o_k[:, None], mask=(o_n < n) & m_k[:, None], other=0.0)
        total = tl.dot(b_a, b_b, total)
    tl.store(c + o_m[:, None] * n + o_n, total, mask=(o_m[:, None] < m) & (o_n < n))


@triton.jit
def gather(x, ids, out, n, B: tl.constexpr):
    o = tl.arange(0, B)
    i = tl.load(ids + o, mask=o < n, other=0)
    tl.store(out + o, tl.load(x + i), mask=o < n)


@triton.jit
def sum_into_one(x, out, B: tl.constexpr):
    tl.store(out, tl.load(out) + tl.sum(tl.load(x + tl.program_id(0) * B + tl.arange(0, B))))


@triton.jit
def atomic_sum(x, out, B: tl.constexpr):
    tl.atomic_add(out, tl.sum(tl.load(x + tl.program_id(0) * B + tl.arange(0, B))))


@triton.jit
def reverse(x, out, B: tl.constexpr, BARRIER: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(x + o, o * 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + o, tl.load(x + (B - 1 - o)))


@triton.jit
def same_lane(x, out, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(x + o, o * 1.0)
    tl.store(out + o, tl.load(x + o))


@triton.jit
def twice(out, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out + o // 2, o * 1.0)


@triton.jit
def overlapping(x, out, n, B: tl.constexpr):
    o = tl.program_id(0) * (B - 1) + tl.arange(0, B)
    tl.store(out + o, tl.load(x + o, mask=o < n), mask=o < n)


@triton.jit
def far_row(x, out, row, stride, B: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    o = tl.arange(0, B)
    tl.store(out + o, tl.load(x + (row * stride) % 4 + o))


@triton.jit
def double(x, out, B: tl.constexpr):
    at = [tl.program_id(0) * B, 0]
    out.store(at, x.load(at) * 2)


@triton.jit
def of_tuple(both, n, B: tl.constexpr, MORE: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(both[1] + o, tl.load(both[0] + o, mask=o < n + MORE), mask=o < n)


@triton.jit
def bfloat16_sum(x, out, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out + o, tl.load(x + o) + tl.load(x + o))


X = torch.arange(100.0)
BIG = torch.arange(200.0)
I100 = torch.arange(16, dtype=torch.int32)


def at(index: int, value: int) -> torch.Tensor:
    return I100.clone().index_fill_(0, torch.tensor(index), value)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def tiles(t: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, [16, 16])


FACTORS = (torch.ones(50, 40), torch.ones(60, 40))
CLEAN = {
    "masked copy": lambda: copy[(4,)](X, zeros(100), 100, 32, 0, 0),
    "ragged product": lambda: product[(2, 2)](*FACTORS, zeros(50, 60), 50, 60, 40, 32, 0),
    "gather": lambda: gather[(1,)](X, I100, zeros(16), 16, 16),
    "barrier": lambda: reverse[(1,)](zeros(32), zeros(32), 32, True),
    "same lanes": lambda: same_lane[(1,)](zeros(32), zeros(32), 32),
    "int64 offsets": lambda: far_row[(1,)](X, zeros(32), 69999, 32768, 32, True),
    "descriptors": lambda: double[(3,)](tiles(torch.ones(40, 16)), tiles(zeros(40, 16)), 16),
    "tuple": lambda: of_tuple[(4,)]((X, zeros(100)), 100, 32, 0),
}
FAULTY = {
    "load past the end": lambda: copy[(4,)](X, zeros(100), 100, 32, 28, 0),
    "store past the end": lambda: copy[(4,)](X, zeros(100), 100, 32, 0, 1),
    "load past a view": lambda: copy[(4,)](BIG[:100], zeros(200), 100, 32, 28, 0),
    "mask of k too wide": lambda: product[(2, 2)](*FACTORS, zeros(50, 60), 50, 60, 40, 32, 8),
    "gather of 100 of 100": lambda: gather[(1,)](X, at(3, 100), zeros(16), 16, 16),
    "gather of -1": lambda: gather[(1,)](X, at(3, -1), zeros(16), 16, 16),
    "sum without a lock": lambda: sum_into_one[(4,)](zeros(128), zeros(1), 32),
    "atomic": lambda: atomic_sum[(4,)](zeros(128), zeros(1), 32),
    "no barrier": lambda: reverse[(1,)](zeros(32), zeros(32), 32, False),
    "one address, two lanes": lambda: twice[(1,)](zeros(32), 32),
    "overlapping tiles": lambda: overlapping[(3,)](X, zeros(100), 94, 32),
    "int32 overflow": lambda: far_row[(1,)](X, zeros(32), 69999, 32768, 32, False),
    "past the end in a tuple": lambda: of_tuple[(4,)]((X, zeros(100)), 100, 32, 1),
    "arithmetic in bfloat16": lambda: bfloat16_sum[(1,)](
        zeros(32).bfloat16(), zeros(32).bfloat16(), 32
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean(name: str) -> None:
    with memory.checked(seed=3):
        CLEAN[name]()


@pytest.mark.parametrize("name", FAULTY)
def test_faulty(name: str) -> None:
    with pytest.raises((memory.Fault, TypeError, AssertionError)), memory.checked(seed=3):
        FAULTY[name]()


def test_order_is_shuffled_and_bytes_are_counted() -> None:
    with memory.checked(seed=3) as traffic:
        CLEAN["masked copy"]()
    assert (traffic.read, traffic.written) == (400, 400)
    programs = [access.program for access in traffic.log]
    assert sorted(programs) != programs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products(dtype: torch.dtype) -> None:
    a, b = torch.randn(50, 40).to(dtype), torch.randn(60, 40).to(dtype)
    c = zeros(50, 60)
    product[(2, 2)](a, b, c, 50, 60, 40, 32, 0)
    if dtype == torch.float32:  # TF32 is the default
        a, b = (torch.from_numpy(to_tf32(t.numpy())) for t in (a, b))
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_rounding_to_bfloat16() -> None:
    x = torch.cat([torch.randn(1000) * 10.0**e for e in range(-38, 38, 5)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    ours = torch.from_numpy(widened(rounded(x.numpy())))
    torch.testing.assert_close(ours, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
